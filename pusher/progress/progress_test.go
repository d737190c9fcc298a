package progress

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10230: "9.99 KiB", 10240: "10.0 KiB", 102350: "100 KiB", 1023 << 10: "1.00 MiB", 1 << 20: "1.00 MiB", 5 << 40: "5.00 TiB", 1<<63 - 1: "8.00 EiB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

func TestTerminal(t *testing.T) {
	now := time.Unix(1e9, 0)
	var out bytes.Buffer
	width := 200
	b := New(&out, func() int { return width }, slog.New(slog.DiscardHandler), func() time.Time { return now })
	attic, nas := b.Lane("attic"), b.Lane("nas")
	b.show()
	if out.Len() > 0 {
		t.Errorf("nothing is under way, and it shows %q", out.String())
	}
	attic.Begin("photos", 100<<20)
	nas.Begin("music", 0)
	for range 10 {
		now = now.Add(time.Second)
		attic.Add(1 << 20)
		b.show()
	}
	last := out.String()[strings.LastIndex(out.String(), "\x1b[K")+3:]
	if want := "attic: photos 10.0 MiB of 100 MiB, 1.00 MiB/s, 2m left | nas: music 0 B, 0 B/s"; last != want {
		t.Errorf("shows %q, want %q", last, want)
	}
	width = 20
	b.show()
	if last := out.String()[strings.LastIndex(out.String(), "\x1b[K")+3:]; len(last) != 19 {
		t.Errorf("%d columns in a terminal of 20: %q", len(last), last)
	}
	// A line that is logged meanwhile stands alone.
	out.Reset()
	b.Writer(&out).Write([]byte("level=INFO\n"))
	if out.String() != "\r\x1b[Klevel=INFO\n" {
		t.Errorf("%q", out.String())
	}
	// The rate follows what happens now.
	for range 60 {
		now = now.Add(time.Second)
		attic.Add(2 << 20)
		b.show()
	}
	if got := attic.rate(); got != 2<<20 {
		t.Errorf("rate %d", got)
	}
}

func TestLog(t *testing.T) {
	now := time.Unix(1e9, 0)
	var out bytes.Buffer
	b := New(nil, nil, slog.New(slog.NewTextHandler(&out, nil)), func() time.Time { return now })
	l := b.Lane("attic")
	l.Begin("photos", 10<<30)
	for range 300 {
		now = now.Add(time.Second)
		l.Add(1 << 20)
		b.show()
	}
	if lines := strings.Count(out.String(), "\n"); lines != 5 {
		t.Errorf("%d lines in five minutes:\n%s", lines, out.String())
	}
	if !strings.Contains(out.String(), "rate=\"1.00 MiB/s\"") {
		t.Errorf("%s", out.String())
	}
	l.End()
	now = now.Add(time.Hour)
	out.Reset()
	b.show()
	if out.Len() > 0 {
		t.Errorf("nothing is under way, and it logs %s", out.String())
	}
}

func TestStartStop(t *testing.T) {
	b := New(nil, nil, slog.New(slog.DiscardHandler), time.Now)
	b.Start()
	b.Stop()
}
