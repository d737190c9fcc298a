package faulty_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"

	"farkeep/image/torture/faulty"
)

// client is as much of an emulator as the tests need.
type client struct {
	t    *testing.T
	conn net.Conn
}

func open(t *testing.T) (*faulty.Disk, *client, string) {
	t.Helper()
	dir := t.TempDir()
	path, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	d, err := faulty.Open(path, socket)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	conn, err := net.Dial("unix", socket)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	c := &client{t, conn}
	c.read(18)
	c.write(binary.BigEndian.AppendUint32(nil, 3))
	// An option that is not known, then "go" for an export without a name.
	for option, want := range map[int]uint32{8: 1<<31 + 1} {
		c.option(uint32(option), nil)
		if kind, _ := c.reply(); kind != want {
			t.Fatalf("option %d was answered with %d", option, kind)
		}
	}
	c.option(7, make([]byte, 6))
	if kind, data := c.reply(); kind != 3 || binary.BigEndian.Uint64(data[2:]) != 1<<20 {
		t.Fatalf("the export is %d, %x", kind, data)
	}
	if kind, _ := c.reply(); kind != 1 {
		t.Fatalf("the export was not acknowledged: %d", kind)
	}
	return d, c, path
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c.conn, b)
	must(c.t, err)
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	_, err := c.conn.Write(b)
	must(c.t, err)
}

func (c *client) option(option uint32, data []byte) {
	b := append([]byte("IHAVEOPT"), binary.BigEndian.AppendUint32(nil, option)...)
	c.write(append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...))
}

func (c *client) reply() (kind uint32, data []byte) {
	head := c.read(20)
	return binary.BigEndian.Uint32(head[12:]), c.read(int(binary.BigEndian.Uint32(head[16:])))
}

// request does one, and returns the error number and what was read.
func (c *client) request(command, flags uint16, at int64, data []byte) (uint32, []byte) {
	c.t.Helper()
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, command)
	b = append(b, "a-handle"...)
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if command == 1 {
		b = append(b, data...)
	}
	c.write(b)
	head := c.read(16)
	if string(head[8:]) != "a-handle" {
		c.t.Fatalf("the answer is to %q", head[8:])
	}
	code := binary.BigEndian.Uint32(head[4:])
	if command == 0 && code == 0 {
		return 0, c.read(len(data))
	}
	return code, nil
}

func (c *client) do(command, flags uint16, at int64, data []byte) []byte {
	c.t.Helper()
	code, out := c.request(command, flags, at, data)
	if code != 0 {
		c.t.Fatalf("command %d at %d: error %d", command, at, code)
	}
	return out
}

// What was flushed survives every power cut; what was not may be lost, and only
// that.
func TestPowerCut(t *testing.T) {
	const cuts = 200
	d, c, path := open(t)
	r := rand.New(rand.NewPCG(1, 1))
	durable, volatile := bytes.Repeat([]byte{'d'}, 8192), bytes.Repeat([]byte{'v'}, 8192)
	kept, torn, lost := 0, 0, 0
	for range cuts {
		c.do(1, 0, 0, durable)
		c.do(3, 0, 0, nil)
		c.do(1, 1, 16384, durable) // forced: durable without a flush
		c.do(1, 0, 8192, volatile)
		if got := c.do(0, 0, 8192, make([]byte, 8192)); !bytes.Equal(got, volatile) {
			t.Fatal("what was written is not what is read")
		}
		n, err := d.PowerCut(r)
		must(t, err)
		platter, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Equal(platter[:8192], durable) || !bytes.Equal(platter[16384:24576], durable) {
			t.Fatal("what was flushed is lost")
		}
		switch v := bytes.Count(platter[8192:16384], []byte{'v'}); {
		case v == 8192 && n == 0:
			kept++
		case v == 0 && n == 1:
			lost++
		case v%512 == 0 && n == 1:
			torn++
		default:
			t.Fatalf("%d bytes of the write are there, %d writes are lost", v, n)
		}
		c.do(1, 1, 8192, make([]byte, 8192))
	}
	if kept == 0 || lost == 0 || torn == 0 {
		t.Errorf("of %d writes %d were kept, %d torn, %d lost", cuts, kept, torn, lost)
	}
	if f := d.Figures(); f.Flushes != cuts || f.Lost != lost+torn {
		t.Errorf("figures: %+v", f)
	}
}

func TestFaults(t *testing.T) {
	d, c, _ := open(t)
	data := make([]byte, 1024)
	code := func(command uint16, at int64) uint32 { n, _ := c.request(command, 0, at, data); return n }
	d.Fail(faulty.Fault{Reads: true, From: 4096, To: 8192})
	for at, want := range map[int64]uint32{0: 0, 3072: 0, 3584: 5, 4096: 5, 7680: 5, 8192: 0} {
		if got := code(0, at); got != want {
			t.Errorf("read at %d: error %d, want %d", at, got, want)
		}
		if got := code(1, at); got != 0 {
			t.Errorf("write at %d: error %d", at, got)
		}
	}
	d.Fail(faulty.Fault{Writes: true})
	if got := code(1, 0); got != 5 {
		t.Errorf("write: error %d", got)
	}
	if got, _ := c.request(3, 0, 0, nil); got != 5 {
		t.Errorf("flush: error %d", got)
	}
	d.Fail(faulty.Fault{})
	if got := code(1, 0); got != 0 {
		t.Errorf("write after the fault: error %d", got)
	}
	for _, bad := range []int64{1 << 20, -512, 100} {
		if got := code(0, bad); got != 22 {
			t.Errorf("read at %d: error %d", bad, got)
		}
	}
}
