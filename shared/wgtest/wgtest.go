// Package wgtest gives tests a WireGuard interface made by its Go implementation
// and driven through the same wgctrl and wg(8) as the kernel's: the machine that
// runs the tests may have no WireGuard in its kernel. It wants root, in a network
// and mount namespace of the test's own.
package wgtest

import (
	"testing"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"
)

// Interface makes the interface name, until the test ends.
func Interface(t testing.TB, name string, mtu int) {
	t.Helper()
	dev, err := tun.CreateTUN(name, mtu)
	if err != nil {
		t.Fatal("make a TUN device: ", err)
	}
	wg := device.NewDevice(dev, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
	t.Cleanup(wg.Close)
	Control(t, name, wg)
}

// Control answers wgctrl and wg(8) for a device, until the test ends.
func Control(t testing.TB, name string, wg *device.Device) {
	t.Helper()
	file, err := ipc.UAPIOpen(name)
	if err != nil {
		t.Fatal(err)
	}
	uapi, err := ipc.UAPIListen(name, file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { uapi.Close() })
	go func() {
		for {
			c, err := uapi.Accept()
			if err != nil {
				return
			}
			go wg.IpcHandle(c)
		}
	}()
}
