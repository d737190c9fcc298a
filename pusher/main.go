// Command farkeep-pusher carries a Borg server's repositories to appliances
// elsewhere.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:], &Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Terminal: terminalOf(os.Stderr),
		Getenv: os.Getenv, Environ: os.Environ, Now: time.Now, Passphrase: askPassphrase(os.Stdin, os.Stderr),
	})
	stop()
	os.Exit(code)
}
