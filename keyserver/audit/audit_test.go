package audit_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/keyserver/audit"

	"golang.org/x/sys/unix"
)

func clock() time.Time { return time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) }

func open(t testing.TB) (*audit.Log, string) {
	t.Helper()
	dir := t.TempDir()
	l, err := audit.Open(dir, clock)
	if err != nil {
		t.Fatal(err)
	}
	return l, dir
}

func fill(t testing.TB, l *audit.Log, n int) (heads []string) {
	t.Helper()
	for i := range n {
		head, err := l.Append(audit.Record{Event: "key", Decision: "granted", Appliance: "attic", Reason: fmt.Sprint("number ", i)})
		if err != nil {
			t.Fatal(err)
		}
		heads = append(heads, head)
	}
	return heads
}

func TestChain(t *testing.T) {
	l, dir := open(t)
	if s, err := audit.Verify(dir); err != nil || s.Records != 0 {
		t.Errorf("an empty log: %+v, %v", s, err)
	}
	if n, err := l.Newest(); n != 0 || err != nil || l.Check() != nil {
		t.Errorf("an empty log: newest %d, %v, %v", n, err, l.Check())
	}
	heads := fill(t, l, 5)
	if n, err := l.Newest(); n != 5 || err != nil || l.Check() != nil {
		t.Errorf("newest %d, %v, %v", n, err, l.Check())
	}
	s, err := audit.Verify(dir, heads...)
	if err != nil || s.Records != 5 || s.First != 1 || s.Head != heads[4] || s.Heads != 5 {
		t.Errorf("got %+v, %v", s, err)
	}
	info, err := os.Stat(filepath.Join(dir, "audit.log"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	var seen []string
	if err := audit.Read(dir, func(_ []byte, r audit.Record) error { seen = append(seen, r.Reason); return nil }); err != nil || len(seen) != 5 || seen[4] != "number 4" {
		t.Errorf("read %v, %v", seen, err)
	}
	// The hash is what b2sum -l 256 prints, so that anybody can check the chain by hand.
	text, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	cmd := exec.Command("b2sum", "-l", "256")
	cmd.Stdin = strings.NewReader(lines[4])
	if out, err := cmd.Output(); err != nil || !strings.HasPrefix(string(out), heads[4]) {
		t.Errorf("b2sum (apt install coreutils) says %s, %v; the head is %s", out, err, heads[4])
	}
}

func TestTamperingIsFound(t *testing.T) {
	tests := map[string]func(lines [][]byte) [][]byte{
		"a line removed": func(l [][]byte) [][]byte { return slices.Delete(l, 2, 3) },
		"the first line removed": func(l [][]byte) [][]byte {
			return append([][]byte{bytes.Replace(l[1], []byte(`"seq":2`), []byte(`"seq":1`), 1)}, l[2:]...)
		},
		"a line changed": func(l [][]byte) [][]byte {
			l[2] = bytes.Replace(l[2], []byte("granted"), []byte("refused"), 1)
			return l
		},
		"one letter in the middle": func(l [][]byte) [][]byte { l[1][len(l[1])/2] ^= 1; return l },
		"lines swapped":            func(l [][]byte) [][]byte { l[2], l[3] = l[3], l[2]; return l },
		"a line twice":             func(l [][]byte) [][]byte { return slices.Insert(l, 2, l[2]) },
		"a line put in":            func(l [][]byte) [][]byte { return slices.Insert(l, 2, []byte(`{"seq":3,"event":"allow"}`)) },
		"garbage put in":           func(l [][]byte) [][]byte { return slices.Insert(l, 2, []byte("garbage")) },
		"an empty line put in":     func(l [][]byte) [][]byte { return slices.Insert(l, 2, []byte{}) },
		"garbage at the end":       func(l [][]byte) [][]byte { return append(l, []byte("garbage")) },
		"a long line put in":       func(l [][]byte) [][]byte { return slices.Insert(l, 2, bytes.Repeat([]byte("x"), 1<<20)) },
	}
	for name, tamper := range tests {
		t.Run(name, func(t *testing.T) {
			l, dir := open(t)
			fill(t, l, 5)
			path := filepath.Join(dir, "audit.log")
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			lines := tamper(bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n")))
			if err := os.WriteFile(path, append(bytes.Join(lines, []byte("\n")), '\n'), 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err := audit.Verify(dir); !errors.Is(err, audit.ErrDamaged) || !strings.Contains(err.Error(), "audit.log:") {
				t.Errorf("got %+v, %v; want ErrDamaged with the place", s, err)
			}
		})
	}
}

func TestCutOffEndIsFoundWithANotedHead(t *testing.T) {
	l, dir := open(t)
	heads := fill(t, l, 5)
	path := filepath.Join(dir, "audit.log")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	if err := os.WriteFile(path, bytes.Join(lines[:3], nil), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("with the head that was noted beside it: %v", err)
	}
	if _, err := l.Append(audit.Record{Event: "key", Decision: "granted"}); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("an append to it: %v", err)
	}
	// Whoever cut it wrote that head anew: only one that was noted elsewhere tells.
	note(t, dir, heads[2])
	if _, err := audit.Verify(dir, heads[2]); err != nil {
		t.Errorf("what is left is whole: %v", err)
	}
	if _, err := audit.Verify(dir, heads[4]); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("with the last head: %v", err)
	}
}

// note writes the head that lies beside the log.
func note(t testing.TB, dir, head string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "audit.head"), []byte(head+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A crash between a record and its head: the next record sets it right. A log of
// an older version has no head yet.
func TestHeadLagsBehind(t *testing.T) {
	for _, tt := range []struct {
		name   string
		behind int // records that are not noted
		whole  bool
	}{{"not at all", 0, true}, {"one", 1, true}, {"two", 2, true}, {"three", 3, false}} {
		l, dir := open(t)
		heads := fill(t, l, 6)
		note(t, dir, heads[5-tt.behind])
		if s, err := audit.Verify(dir); (err == nil) != tt.whole || !s.Noted {
			t.Errorf("%s: %+v, %v", tt.name, s, err)
		}
		_, err := l.Append(audit.Record{Event: "start", Decision: "done"})
		// Two are one crash only when the first of them owns up to an unfinished line.
		if (err == nil) != (tt.behind < 2) {
			t.Errorf("%s: append: %v", tt.name, err)
		}
	}
	l, dir := open(t)
	fill(t, l, 2)
	if err := os.Remove(filepath.Join(dir, "audit.head")); err != nil {
		t.Fatal(err)
	}
	if s, err := audit.Verify(dir); err != nil || s.Noted {
		t.Errorf("%+v, %v", s, err)
	}
	fill(t, l, 1)
	if s, err := audit.Verify(dir); err != nil || !s.Noted || s.Records != 3 {
		t.Errorf("%+v, %v", s, err)
	}
	// Both crashes in a row: a line cut off, then the record that owns up to it not noted.
	heads := fill(t, l, 1)
	f, err := os.OpenFile(filepath.Join(dir, "audit.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"seq":5,"ti`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	fill(t, l, 1)
	note(t, dir, heads[0])
	fill(t, l, 1)
	if s, err := audit.Verify(dir); err != nil || s.Torn != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	note(t, dir, "no head")
	if _, err := audit.Verify(dir); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("a head that is none: %v", err)
	}
}

// Whatever is done to the files: if the log still verifies, every record that was
// in it is in it, in order and to the letter, but for what is gone from the
// beginning of the oldest file, which Verify says.
func TestRandomTampering(t *testing.T) {
	l, dir := open(t)
	l.RotateAt = 1500
	fill(t, l, 30)
	names := append(glob(t, dir), filepath.Join(dir, "audit.head"))
	whole := map[string][]byte{}
	var lines []string
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		whole[name] = text
		if strings.HasSuffix(name, ".log") && filepath.Base(name) != "audit.log" {
			lines = append(lines, strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")...)
		}
	}
	if text := whole[filepath.Join(dir, "audit.log")]; len(text) > 0 {
		lines = append(lines, strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")...)
	}
	if len(lines) != 30 {
		t.Fatalf("%d lines", len(lines))
	}
	found := 0
	for seed := range uint64(1500) {
		random := rand.New(rand.NewPCG(seed, 4))
		name := names[random.IntN(len(names))]
		text := tamper(random, whole[name])
		if bytes.Equal(text, whole[name]) {
			continue
		}
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := audit.Verify(dir)
		switch {
		case errors.Is(err, audit.ErrDamaged):
			found++
		case err != nil:
			t.Errorf("seed %d: %v", seed, err)
		default:
			var left []string
			if err := audit.Read(dir, func(line []byte, _ audit.Record) error { left = append(left, string(line)); return nil }); err != nil {
				t.Errorf("seed %d: %v", seed, err)
			}
			if s.First < 1 || int(s.First) > len(lines) || !slices.Equal(left, lines[s.First-1:]) {
				t.Errorf("seed %d: %s was altered and nothing was found", seed, filepath.Base(name))
			}
		}
		if err := os.WriteFile(name, whole[name], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if found < 1300 {
		t.Errorf("%d alterations were found", found)
	}
}

// tamper alters a text at random: bytes, lines, its end.
func tamper(random *rand.Rand, text []byte) []byte {
	text = bytes.Clone(text)
	lines := bytes.SplitAfter(text, []byte("\n"))
	at := random.IntN(len(text))
	one, other := random.IntN(len(lines)), random.IntN(len(lines))
	switch random.IntN(9) {
	case 0:
		text[at] ^= 1 << random.IntN(8)
		return text
	case 1:
		return slices.Delete(text, at, at+1+random.IntN(min(len(text)-at, 300)))
	case 2:
		return slices.Insert(text, at, byte(random.IntN(256)))
	case 3:
		return text[:at]
	case 4:
		return text[at:]
	case 5:
		lines = slices.Delete(lines, one, one+1)
	case 6:
		lines[one], lines[other] = lines[other], lines[one]
	case 7:
		lines = slices.Insert(lines, one, lines[other])
	case 8:
		lines[one] = bytes.Replace(lines[one], []byte("granted"), []byte("refused"), 1)
	}
	return bytes.Join(lines, nil)
}

// A power cut may leave any beginning of the last line, or zeros in its place.
func TestTornEnd(t *testing.T) {
	for cut := range 120 {
		l, dir := open(t)
		heads := fill(t, l, 3)
		note(t, dir, heads[1])
		path := filepath.Join(dir, "audit.log")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lines := bytes.SplitAfter(text, []byte("\n"))
		last := lines[2]
		torn := last[:len(last)*cut/119]
		if cut%2 == 1 {
			torn = make([]byte, len(torn))
		}
		if err := os.WriteFile(path, append(bytes.Join(lines[:2], nil), torn...), 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := audit.Verify(dir); err != nil || s.Records < 2 {
			t.Errorf("cut %d: before the repair: %+v, %v", cut, s, err)
		}
		fill(t, l, 2)
		s, err := audit.Verify(dir)
		if err != nil || s.Records < 4 || s.Records > 5 {
			t.Errorf("cut %d of %d: %+v, %v", len(torn), len(last), s, err)
		}
	}
}

func TestRotation(t *testing.T) {
	l, dir := open(t)
	l.RotateAt = 2000
	heads := fill(t, l, 40)
	if n, err := l.Newest(); n != 40 || err != nil {
		t.Errorf("newest %d, %v", n, err)
	}
	if n := len(glob(t, dir)); n < 4 {
		t.Fatalf("%d files; want several", n)
	}
	s, err := audit.Verify(dir, heads...)
	if err != nil || s.First != 1 || s.Records != 40 {
		t.Errorf("got %+v, %v", s, err)
	}
	// A file in the middle is gone.
	names := glob(t, dir)
	aside := filepath.Join(t.TempDir(), "aside")
	if err := os.Rename(names[1], aside); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("without a file in the middle: %v", err)
	}
	if err := os.Rename(aside, names[1]); err != nil {
		t.Fatal(err)
	}
	// A person removed the oldest file: the rest is whole, and Verify says where it begins.
	if err := os.Remove(names[0]); err != nil {
		t.Fatal(err)
	}
	if s, err = audit.Verify(dir); err != nil || s.First <= 1 {
		t.Errorf("without the oldest file: %+v, %v", s, err)
	}
}

func glob(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "audit*.log"))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func TestTwoProcessesShareOneChain(t *testing.T) {
	one, dir := open(t)
	two, err := audit.Open(dir, clock)
	if err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	for _, l := range []*audit.Log{one, two} {
		g.Go(func() { fill(t, l, 50) })
	}
	g.Wait()
	if s, err := audit.Verify(dir); err != nil || s.Records != 100 {
		t.Errorf("got %+v, %v", s, err)
	}
}

// A small tmpfs plays the full disk.
func TestNoRecordWhenTheDiskIsFull(t *testing.T) {
	l, dir := open(t)
	fill(t, l, 3)
	before, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	small := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatalf("mount a small tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(small, "audit.log"), before, 0o600); err != nil {
		t.Fatal(err)
	}
	full, err := audit.Open(small, clock)
	if err != nil {
		t.Fatal(err)
	}
	n := 3
	for ; n < 1000; n++ {
		if _, err = full.Append(audit.Record{Event: "key", Decision: "granted", Reason: strings.Repeat("x", 200)}); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("after %d records: %v; want ENOSPC", n, err)
	}
	if full.Check() == nil {
		t.Error("Check does not see the full disk")
	}
	if s, err := audit.Verify(small); err != nil || s.Records != uint64(n) {
		t.Errorf("what was written before is whole: %+v, %v; want %d records", s, err, n)
	}
}

func TestUnwritable(t *testing.T) {
	l, dir := open(t)
	fill(t, l, 1)
	if err := os.Remove(filepath.Join(dir, "audit.log")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "audit.log"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(audit.Record{Event: "key", Decision: "granted"}); err == nil {
		t.Error("a record was accepted that cannot be written")
	}
	if l.Check() == nil {
		t.Error("Check does not see it")
	}
	if _, err := audit.Open(filepath.Join(dir, "none"), clock); err == nil {
		t.Error("a folder that does not exist was opened")
	}
}

func TestDamagedEndStopsAppending(t *testing.T) {
	l, dir := open(t)
	fill(t, l, 2)
	f, err := os.OpenFile(filepath.Join(dir, "audit.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("garbage\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := l.Append(audit.Record{Event: "key", Decision: "granted"}); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("got %v; want ErrDamaged", err)
	}
}

func FuzzVerify(f *testing.F) {
	l, dir := open(f)
	fill(f, l, 3)
	text, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte{})
	f.Add([]byte("{}\n"))
	f.Add(append(bytes.Clone(text), `{"seq":4`...))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "audit.log"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Verify(dir); err != nil {
			return
		}
		// On whatever verifies, appending works and still verifies: an unfinished
		// end is owned up to.
		l, err := audit.Open(dir, clock)
		if err != nil {
			t.Fatal(err)
		}
		head, err := l.Append(audit.Record{Event: "key", Decision: "granted"})
		if err != nil {
			t.Fatalf("append to a log that verifies: %v", err)
		}
		if _, err := audit.Verify(dir, head); err != nil {
			t.Fatalf("after the append: %v", err)
		}
	})
}
