package server

import (
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// perAddress bounds the connections of one address at once.
	perAddress = 16
	// lifetime bounds a connection: an exchange takes a second or two. Without
	// it, one peer that only answers keepalives would hold its place for ever.
	lifetime = time.Minute
)

// fairListener keeps one address from taking all the places.
func fairListener(l net.Listener, log *slog.Logger) net.Listener {
	return &fair{Listener: l, log: log, open: map[string]int{}}
}

type fair struct {
	net.Listener
	log *slog.Logger

	mu   sync.Mutex
	open map[string]int // connections by address, without port
}

func (f *fair) Accept() (net.Conn, error) {
	for {
		conn, err := f.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, _, err := net.SplitHostPort(conn.RemoteAddr().String())
		if err != nil || !f.enter(host) {
			f.log.Warn("too many connections from one address, one turned away", "peer", conn.RemoteAddr().String(), "limit", perAddress)
			conn.Close()
			continue
		}
		leave := sync.OnceFunc(func() { f.leave(host) })
		end := time.AfterFunc(lifetime, func() { leave(); conn.Close() })
		return &fairConn{Conn: conn, leave: leave, end: end}, nil
	}
}

func (f *fair) enter(host string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open[host] >= perAddress {
		return false
	}
	f.open[host]++
	return true
}

func (f *fair) leave(host string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open[host]--; f.open[host] <= 0 {
		delete(f.open, host)
	}
}

type fairConn struct {
	net.Conn
	leave func()
	end   *time.Timer
}

func (c *fairConn) Close() error {
	c.end.Stop()
	c.leave()
	return c.Conn.Close()
}
