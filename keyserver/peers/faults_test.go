package peers_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/keyserver/peers"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

// fault is what stands between a key server and another: it gets the
// connection, and the address behind.
type fault func(ctx context.Context, client net.Conn, behind string)

// faults are the ways in which a key server can be out of reach.
var faults = map[string]fault{
	"accepts and says nothing": func(ctx context.Context, client net.Conn, _ string) { <-ctx.Done() },
	"hangs up at once":         func(context.Context, net.Conn, string) {},
	"talks without end": func(_ context.Context, client net.Conn, _ string) {
		for {
			if _, err := client.Write([]byte("SSH-1.5-hello ")); err != nil {
				return
			}
		}
	},
	"lets nothing back": through(func(ctx context.Context, client, server net.Conn) {
		go io.Copy(server, client)
		<-ctx.Done()
	}),
	"lets nothing there": through(func(ctx context.Context, client, server net.Conn) {
		go io.Copy(client, server)
		<-ctx.Done()
	}),
	"one byte in 50 ms": through(func(ctx context.Context, client, server net.Conn) {
		go io.Copy(server, client)
		b := make([]byte, 1)
		for tick := time.NewTicker(50 * time.Millisecond); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
			}
			if _, err := server.Read(b); err != nil {
				return
			}
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	}),
	"is cut after the handshake": through(func(_ context.Context, client, server net.Conn) {
		go io.Copy(server, client)
		io.CopyN(client, server, 1400)
	}),
	"falls silent after the handshake": through(func(ctx context.Context, client, server net.Conn) {
		go io.Copy(server, client)
		io.CopyN(client, server, 1400)
		<-ctx.Done()
	}),
}

func through(between func(ctx context.Context, client, server net.Conn)) fault {
	return func(ctx context.Context, client net.Conn, behind string) {
		server, err := net.Dial("tcp", behind)
		if err != nil {
			return
		}
		defer server.Close()
		defer context.AfterFunc(ctx, func() { server.Close() })()
		between(ctx, client, server)
	}
}

// proxy listens with a fault until the test ends.
func proxy(t *testing.T, f fault, behind string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				f(ctx, conn, behind)
			})
		}
	})
	t.Cleanup(func() { cancel(); l.Close(); all.Wait() })
	return l.Addr().String()
}

// faultySite is a site with one key server that works and one for each fault,
// and one that is a liar: it has the address, and not the key.
func faultySite(t *testing.T, change func(c *peers.Config)) (one, good *node) {
	t.Helper()
	names := []string{"one", "good", "liar", "dead"}
	kinds := []fault{nil, nil, nil, nil}
	for name, f := range faults {
		names = append(names, "faulty-"+strings.ReplaceAll(name, " ", "-"))
		kinds = append(kinds, f)
	}
	address := map[string]string{}
	nodes := newSite(t, names, func(_ string, c *peers.Config) {
		change(c)
		c.DialContext = func(ctx context.Context, network, to string) (net.Conn, error) {
			if other, ok := address[to]; ok {
				to = other
			}
			return (&net.Dialer{}).DialContext(ctx, network, to)
		}
	})
	for i, n := range nodes {
		switch n.name {
		case "one":
		case "dead":
			n.listener.Close()
		case "liar":
			n.key = signer(t, "liar") // site.toml has another
			n.serve(t)
		default:
			n.serve(t)
			if kinds[i] != nil {
				real := n.listener.Addr().String()
				address[real] = proxy(t, kinds[i], real)
			}
		}
	}
	return nodes[0], nodes[1]
}

// The one that works is reached while every other is still being waited for.
func TestFaultyPeersHoldUpNone(t *testing.T) {
	one, good := faultySite(t, func(c *peers.Config) { c.Connect, c.Attempt = time.Hour, time.Hour })
	if err := one.peers.Queue(order("attic")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	reached := false
	err := one.peers.Deliver(ctx, func(o peers.Outcome) {
		if o.Peer == "good" {
			reached = o.Err == nil
			cancel() // the others would have an hour
		}
	})
	if !reached || !errors.Is(err, context.Canceled) {
		t.Errorf("reached %v, %v", reached, err)
	}
	if _, ok := good.has("attic"); !ok {
		t.Error("it was not revoked there")
	}

	// The same for the service, in the background.
	one.run(t)
	if err := one.peers.Queue(order("shed")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the good one revokes", func() bool { _, ok := good.has("shed"); return ok })
}

// Every other is given up after a while, is named, and stays pending.
func TestFaultyPeersAreNamed(t *testing.T) {
	one, _ := faultySite(t, func(c *peers.Config) { c.Connect, c.Attempt = 300*time.Millisecond, 600*time.Millisecond })
	if err := one.peers.Queue(order("attic")); err != nil {
		t.Fatal(err)
	}
	got := outcomes(t, one)
	for _, name := range one.peers.Names() {
		err, tried := got[name]
		switch {
		case !tried:
			t.Errorf("%s was not tried", name)
		case name == "good" && err != nil:
			t.Errorf("good: %v", err)
		case name == "liar" && !errors.Is(err, sshverb.ErrHostKey):
			t.Errorf("liar: %v; want the host key to be refused", err)
		case name != "good" && err == nil:
			t.Errorf("%s: the order counts as taken", name)
		}
	}
	if left := pending(t, one); len(left) != len(faults)+2 {
		t.Errorf("pending: %v", left)
	}
}

// A receipt counts only if it is for this very order.
func TestWrongReceipts(t *testing.T) {
	for name, answer := range map[string]string{
		"none": "", "another appliance": `{"revoked":"shed","id":%q}`, "another order": `{"revoked":"attic","id":"00000000000000000000000000000000"}`,
		"no JSON": "revoked", "too long": strings.Repeat(" ", 1000) + `{"revoked":"attic","id":%q}`,
	} {
		t.Run(name, func(t *testing.T) {
			nodes := newSite(t, []string{"one", "two"}, func(_ string, c *peers.Config) { c.Attempt = 5 * time.Second })
			one, two := nodes[0], nodes[1]
			o := order("attic")
			if strings.Contains(answer, "%q") {
				answer = fmt.Sprintf(answer, o.ID)
			}
			ctx, cancel := context.WithCancel(context.Background())
			s := &sshverb.Server{
				HostKey: two.key, Log: quiet(t),
				Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
				Exec: func(_ context.Context, s *sshverb.Session) error {
					_, err := io.WriteString(s.Stdout, answer)
					return err
				},
			}
			done := make(chan error, 1)
			go func() { done <- s.Serve(ctx, two.listener) }()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}()
			if err := one.peers.Queue(o); err != nil {
				t.Fatal(err)
			}
			if got := outcomes(t, one); got["two"] == nil {
				t.Error("the order counts as taken")
			}
		})
	}
}
