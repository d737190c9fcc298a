// Command farkeep-appliance is the appliance: the device that keeps the second
// copy in another building. As PID 1 it is the whole userland of a Raspberry
// Pi; under systemd it is a service; in both it supervises its own re-executed
// children, each confined to what it needs. See docs/appliance.md.
package main

import (
	"context"
	"os"
	"os/signal"

	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

func main() {
	env := Env{Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv}
	if os.Getpid() == 1 {
		firmware(env) // never returns
	}
	// Before anything that may be signalled.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	os.Exit(hint.Report(os.Stderr, "farkeep-appliance", run(ctx, os.Args[1:], env)))
}
