package logbook

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLinesReachEveryDestination(t *testing.T) {
	b := New()
	b.Logger(slog.LevelInfo).Info("starting", "took", 1500*time.Millisecond, "why", "power on")
	var console, kernel bytes.Buffer
	b.ToConsole(&console, slog.LevelInfo)
	b.ToJournal(&kernel, true)
	dir := t.TempDir()
	if err := b.ToFile(dir, 0); err != nil {
		t.Fatal(err)
	}
	b.Relay("keeper", strings.NewReader(
		`{"time":"2026-11-05T00:00:00Z","level":"WARN","msg":"slow disk","part":"keeper","ms":900,"at":{"a":1}}`+"\n"+
			"panic: runtime error\x1b[31m\n\n"+
			`{"msg":"not a logger's","level":"QUIET"}`+"\n"+
			"last line without end"))
	b.Close(5 * time.Second)

	for _, want := range []string{
		`supervisor: starting took=1.5s why="power on"`,
		`WARN keeper: slow disk ms=900 at="{\"a\":1}"`,
		`WARN keeper: panic: runtime error·[31m`,
		`WARN keeper: {"msg":"not a logger's"`,
		`WARN keeper: last line without end`,
	} {
		if !strings.Contains(console.String(), want) {
			t.Errorf("the console lacks %q:\n%s", want, console.String())
		}
	}
	for line := range strings.Lines(kernel.String()) {
		if !strings.HasPrefix(line, "<7>farkeep: ") {
			t.Errorf("kernel log line %q", line)
		}
	}
	// The file is JSON throughout, whatever the parts wrote.
	text, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		var v struct{ Msg, Part string }
		if err := json.Unmarshal([]byte(line), &v); err != nil || v.Msg == "" || v.Part == "" {
			t.Errorf("%q: %v", line, err)
		}
	}
	if n != 5 {
		t.Errorf("%d lines in the file", n)
	}
}

func TestPriorities(t *testing.T) {
	b := New()
	var out bytes.Buffer
	b.ToJournal(&out, false)
	log := b.Logger(slog.LevelDebug)
	log.Debug("d")
	log.Info("i")
	log.Warn("w")
	log.Error("e")
	b.Close(5 * time.Second)
	if want := "<7>farkeep: supervisor: d\n<6>farkeep: supervisor: i\n<4>farkeep: supervisor: w\n<3>farkeep: supervisor: e\n"; out.String() != want {
		t.Errorf("got %q", out.String())
	}
}

func TestLongLinesAreCut(t *testing.T) {
	b := New()
	var out bytes.Buffer
	b.ToConsole(&out, slog.LevelDebug)
	b.Relay("keeper", io.MultiReader(strings.NewReader(strings.Repeat("x", 10*MaxLine)+"\nnext\n")))
	b.Close(5 * time.Second)
	sc := bufio.NewScanner(&out)
	sc.Buffer(nil, 1<<20)
	var lengths []int
	for sc.Scan() {
		lengths = append(lengths, len(sc.Text()))
	}
	if len(lengths) != 2 || lengths[0] > MaxLine+100 {
		t.Errorf("lines of %v bytes", lengths)
	}
}

// A part that logs without end costs little and is told of.
func TestFloodIsCut(t *testing.T) {
	bu := &budget{tokens: burst}
	now := time.Now()
	bu.last = now
	passed := 0
	for range 10 * burst {
		if ok, _ := bu.take(now); ok {
			passed++
		}
	}
	if passed != burst {
		t.Errorf("%d lines passed at once, want %d", passed, burst)
	}
	ok, lost := bu.take(now.Add(time.Second))
	if !ok || lost != 9*burst {
		t.Errorf("a second later: %v, %d lost", ok, lost)
	}
}

// A destination that blocks for ever holds up nobody.
func TestBlockedConsole(t *testing.T) {
	b := New()
	r, w := io.Pipe()
	defer r.Close()
	b.ToConsole(w, slog.LevelDebug)
	var other bytes.Buffer
	b.ToJournal(&other, true)
	log := b.Logger(slog.LevelInfo)
	for i := range 3 * queueSize {
		log.Info("line", "n", i)
	}
	b.Close(time.Millisecond)
}

func TestRotationAndRead(t *testing.T) {
	dir := t.TempDir()
	// Without the queue in between, which may drop lines when the disk is slow.
	f := &file{path: filepath.Join(dir, FileName)}
	if err := f.open(); err != nil {
		t.Fatal(err)
	}
	filler := strings.Repeat("x", 4000)
	const lines = 6 * FileSize / 4000
	for i := range lines {
		f.write(parse("keeper", fmt.Appendf(nil, `{"msg":%q,"n":%d}`, filler, i), time.Now()))
	}
	f.close()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	total := int64(0)
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > FileSize {
			t.Errorf("%s has %d bytes", e.Name(), info.Size())
		}
		total += info.Size()
	}
	if len(entries) != FileCount || total > FileCount*FileSize {
		t.Errorf("%d files with %d bytes", len(entries), total)
	}
	for _, limit := range []int64{100, 10_000, FileSize + 10_000, 100 * FileSize} {
		var out bytes.Buffer
		if err := Read(&out, dir, limit); err != nil {
			t.Fatal(err)
		}
		if int64(out.Len()) > limit {
			t.Errorf("%d bytes for a limit of %d", out.Len(), limit)
		}
		var first, n, last = -1, 0, -1
		for line := range strings.Lines(out.String()) {
			var v struct{ N int }
			if err := json.Unmarshal([]byte(line), &v); err != nil {
				t.Fatalf("limit %d: cut line: %v", limit, err)
			}
			if first < 0 {
				first = v.N
			} else if v.N != last+1 {
				t.Fatalf("line %d after %d", v.N, last)
			}
			last = v.N
			n++
		}
		if n > 0 && last != lines-1 {
			t.Errorf("limit %d: ends with line %d of %d", limit, last, lines)
		}
	}
	if err := Read(io.Discard, t.TempDir(), 100); err != nil {
		t.Errorf("no log at all: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`{"level":"INFO","msg":"x","a":[1,2]}`)
	f.Add("panic: x\x00\x1b")
	f.Add(`{"msg":"x"}{"msg":"y"}`)
	f.Fuzz(func(t *testing.T, line string) {
		if strings.TrimSpace(line) == "" {
			return
		}
		r := parse("keeper", []byte(line), time.Unix(0, 0))
		if !json.Valid(r.json) {
			t.Errorf("%q became %q, which is not JSON", line, r.json)
		}
		if strings.ContainsAny(string(r.json), "\n") || strings.ContainsAny(r.short, "\n\r\x1b\x00") {
			t.Errorf("%q became %q, %q: more than a line, or steers a terminal", line, r.json, r.short)
		}
		if !strings.HasPrefix(r.short, "keeper: ") {
			t.Errorf("%q lost its part: %q", line, r.short)
		}
	})
}
