package sshverb

import (
	"context"
	"io"
	"net"
	"time"

	"golang.org/x/crypto/ssh"
)

// keepAlive asks the peer for a sign of life, as OpenSSH does, and closes the
// connection when none came within idle. A verb that computes for minutes keeps
// its connection; a peer that lost its power does not.
func keepAlive(ctx context.Context, conn ssh.Conn, raw net.Conn, idle time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(idle / 4)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
			late := time.AfterFunc(idle*3/4, func() { raw.Close() })
			_, _, err := conn.SendRequest("keepalive@openssh.com", true, nil)
			late.Stop()
			if err != nil {
				return
			}
		}
	}()
	return func() {
		cancel()
		raw.Close()
		<-done
	}
}

// stallGuard ends a session whose peer neither sends what is waited for nor
// takes what is offered.
type stallGuard struct {
	limit  time.Duration
	expire func()
}

func (g *stallGuard) reader(r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		defer time.AfterFunc(g.limit, g.expire).Stop()
		return r.Read(p)
	})
}

func (g *stallGuard) writer(w io.Writer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		defer time.AfterFunc(g.limit, g.expire).Stop()
		return w.Write(p)
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
