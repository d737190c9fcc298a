package metrics

import (
	"net"
	"sync"
)

// limited lets at most n connections be open at once; the next waits in the
// kernel's queue. What is slow ends by its timeout and makes room.
func limited(l net.Listener, n int) net.Listener {
	return &gate{Listener: l, places: make(chan struct{}, n), closed: make(chan struct{})}
}

type gate struct {
	net.Listener
	places chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (g *gate) Accept() (net.Conn, error) {
	select {
	case g.places <- struct{}{}:
	case <-g.closed:
		return nil, net.ErrClosed
	}
	conn, err := g.Listener.Accept()
	if err != nil {
		<-g.places
		return nil, err
	}
	return &guest{Conn: conn, leave: func() { <-g.places }}, nil
}

func (g *gate) Close() error {
	g.once.Do(func() { close(g.closed) })
	return g.Listener.Close()
}

type guest struct {
	net.Conn
	once  sync.Once
	leave func()
}

func (c *guest) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.leave)
	return err
}
