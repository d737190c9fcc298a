//go:build !vm

package main

// testParts has something in builds for tests in the emulator only.
func testParts() []partEntry { return nil }
