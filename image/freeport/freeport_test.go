package freeport

import (
	"fmt"
	"net"
	"os"
	"testing"
)

func TestPorts(t *testing.T) {
	text, err := os.ReadFile(rangeFile)
	if err != nil {
		t.Fatal(err)
	}
	var first, last int
	if _, err := fmt.Sscan(string(text), &first, &last); err != nil {
		t.Fatal(err)
	}
	low, high := between(first, last)
	for range 50 {
		tcp, err := TCP()
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", tcp))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		udp, err := UDP()
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.ListenPacket("udp4", fmt.Sprintf("127.0.0.1:%d", udp))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, port := range []uint16{tcp, udp} {
			if int(port) < low || int(port) >= high {
				t.Errorf("port %d, not of %d to %d", port, low, high-1)
			}
		}
	}
}

// What is in use is not given, and the error of a machine without a free port says so.
func TestNoneFree(t *testing.T) {
	used := 0
	port, err := find(func(string) error { used++; return os.ErrExist })
	if err == nil || used != tries {
		t.Errorf("port %d after %d tries, %v", port, used, err)
	}
}

func TestBetween(t *testing.T) {
	for _, tt := range []struct{ first, last, low, high int }{
		{32768, 60999, 10_000, 32768}, // Linux's own
		{1024, 60000, 60001, 65536},
		{10_500, 40_000, 40_001, 65536},
		{1024, 65535, 10_000, 65536},
		{1024, 5000, 10_000, 65536},
	} {
		if low, high := between(tt.first, tt.last); low != tt.low || high != tt.high {
			t.Errorf("%d to %d: from %d, to before %d; want %d, %d", tt.first, tt.last, low, high, tt.low, tt.high)
		}
	}
}
