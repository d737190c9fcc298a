package generations_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/shared/generations"

	"github.com/google/go-cmp/cmp"
)

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	type record struct {
		Latest time.Time `toml:"latest"`
		Count  int       `toml:"count"`
	}
	var got record
	if err := s.ReadRecord("clock", &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a record that was never written: %v", err)
	}
	want := record{time.Date(2026, 11, 22, 1, 2, 3, 0, time.UTC), 7}
	if err := s.WriteRecord("clock", want); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadRecord("clock", &got); err != nil || !cmp.Equal(got, want) {
		t.Errorf("read %+v, %v; want %+v", got, err, want)
	}
	info, err := os.Stat(filepath.Join(dir, ".farkeep/clock.toml"))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the record's mode is %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Join(dir, ".farkeep")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder's mode is %v, %v", info.Mode(), err)
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b", ".hidden", "Upper", "space d", strings.Repeat("a", 65)} {
		if err := s.WriteRecord(name, want); err == nil {
			t.Errorf("record %q was written", name)
		}
		if err := s.ReadRecord(name, &got); err == nil {
			t.Errorf("record %q was read", name)
		}
	}
	if err := s.WriteRecord("large", map[string]string{"a": strings.Repeat("x", generations.MaxRecord)}); err == nil {
		t.Error("a record over the limit was written")
	}
	for text, want := range map[string]string{
		"latest = 2026-11-22T01:02:03Z\nmore = 1\n":           "unknown key",
		"count = \"many\"\n":                                  "whole number",
		strings.Repeat("# long\n", generations.MaxRecord/7+1): "more than",
	} {
		if err := os.WriteFile(filepath.Join(dir, ".farkeep/odd.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadRecord("odd", &got); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a record of %.40q: %v; want %q", text, err, want)
		}
	}
	if err := os.Remove(filepath.Join(dir, ".farkeep/clock.toml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("odd.toml", filepath.Join(dir, ".farkeep/clock.toml")); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadRecord("clock", &got); err == nil {
		t.Error("a link was followed")
	}
}

func TestDecide(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{Judge: suspecting})
	good := tree{}.add("a", "1")
	one, _ := push(t, s, "photos", good)
	two, _ := push(t, s, "photos", good.clone().add("odd", "2"))
	three, _ := push(t, s, "photos", good.clone().add("odd", "3"))
	standings := func(s *generations.Store, current string, want ...generations.Standing) {
		t.Helper()
		list, err := s.List(t.Context(), "photos")
		if err != nil {
			t.Fatal(err)
		}
		var got []generations.Standing
		for _, g := range list {
			got = append(got, g.Standing)
			if g.Suspect != (g.Standing != generations.Good) || g.Suspect != (len(g.Reasons) == 1) {
				t.Errorf("%s: suspect %v, reasons %q, standing %s", g.Name, g.Suspect, g.Reasons, g.Standing)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error("standings (-want +got):\n" + diff)
		}
		if g, err := s.Current(t.Context(), "photos"); err != nil || g.Name != current {
			t.Errorf("the current generation is %q, %v; want %s", g.Name, err, current)
		}
		if g, err := s.Newest(t.Context(), "photos"); err != nil || g.Name != three {
			t.Errorf("the newest is %s, %v", g.Name, err)
		}
	}
	decide := func(name string, d generations.Standing) error {
		return s.Decide(t.Context(), "photos", name, generations.Decision{Standing: d, By: "admin", Why: "we\nlooked " + strings.Repeat("é", 300)})
	}
	standings(s, one, generations.Good, generations.Suspect, generations.Suspect)
	for name, d := range map[string]generations.Standing{one: generations.Rejected, two: generations.Good, three: "", "000009-20260101T000000Z": generations.Accepted} {
		if err := decide(name, d); err == nil {
			t.Errorf("%s became %q", name, d)
		}
	}
	if err := decide(two, generations.Accepted); err != nil {
		t.Fatal(err)
	}
	standings(s, two, generations.Good, generations.Accepted, generations.Suspect)
	if err := decide(three, generations.Rejected); err != nil {
		t.Fatal(err)
	}
	standings(s, two, generations.Good, generations.Accepted, generations.Rejected)
	// The disk remembers, not the process.
	standings(open(t, dir, generations.Options{}), two, generations.Good, generations.Accepted, generations.Rejected)

	// What was rejected is not confirmed when it is offered again.
	if name, _ := push(t, s, "photos", good.clone().add("odd", "3")); name == three {
		t.Error("a rejected generation was confirmed")
	} else if err := decide(name, generations.Rejected); err != nil {
		t.Fatal(err)
	} else if err := s.Remove(t.Context(), "photos", name); err != nil {
		t.Fatal(err)
	}
	if err := decide(three, generations.Accepted); err != nil {
		t.Fatal(err)
	}
	standings(s, three, generations.Good, generations.Accepted, generations.Accepted)
	// A record that is damaged decides nothing, and is not written over.
	record := filepath.Join(dir, ".farkeep/verdicts.toml")
	text, err := os.ReadFile(record)
	if err != nil || strings.Count(string(text), "[[verdict]]") != 2 {
		t.Errorf("the record holds %q, %v; want the last word on the two that are there", text, err)
	}
	for _, damage := range []string{"[[verdict]]\nstanding = \"good\"\n", "gone mad"} {
		if err := os.WriteFile(record, []byte(damage), 0o600); err != nil {
			t.Fatal(err)
		}
		s = open(t, dir, generations.Options{})
		standings(s, one, generations.Good, generations.Suspect, generations.Suspect)
		if err := decide(three, generations.Accepted); err == nil {
			t.Error("a damaged record was written over")
		}
	}
}

// Generations that were marked by an older Farkeep keep their reason.
func TestOldReason(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{Judge: suspecting})
	name, _ := push(t, s, "photos", tree{}.add("odd", "1"))
	path := filepath.Join(dir, "generations/photos", name, "generation.toml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	old := strings.Replace(string(text), "suspect_reasons = ['There is an odd file.']", "suspect_reason = 'It is old.'", 1)
	if old == string(text) {
		t.Fatalf("generation.toml is %s", text)
	}
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte(old), 0o444)); err != nil {
		t.Fatal(err)
	}
	g, err := open(t, dir, generations.Options{}).Generation(t.Context(), "photos", name)
	if err != nil || len(g.Reasons) != 1 || g.Reasons[0] != "It is old." {
		t.Errorf("reasons %q, %v", g.Reasons, err)
	}
}

func TestJudge(t *testing.T) {
	dir := t.TempDir()
	var verdict func(ctx context.Context, c *generations.Candidate) (generations.Verdict, error)
	s := open(t, dir, generations.Options{Judge: judge(func(ctx context.Context, c *generations.Candidate) (generations.Verdict, error) {
		return verdict(ctx, c)
	})})
	good := func(context.Context, *generations.Candidate) (generations.Verdict, error) {
		return generations.Verdict{}, nil
	}
	read := func(f io.ReadCloser, err error) string {
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		text, _ := io.ReadAll(f)
		return string(text)
	}
	asked := 0
	verdict = func(_ context.Context, c *generations.Candidate) (generations.Verdict, error) {
		asked++
		if c.Current != nil || c.Repository != "photos" || c.Pusher != "home" || c.Offer.Entries != 2 {
			t.Errorf("the first candidate: %+v", c)
		}
		if _, _, err := c.Old(); !errors.Is(err, generations.ErrNone) {
			t.Errorf("the manifest of nothing: %v", err)
		}
		if _, err := c.OpenOld("a"); !errors.Is(err, generations.ErrNone) {
			t.Errorf("a file of nothing: %v", err)
		}
		if err := c.Scratch.WriteFile("index", []byte("first"), 0o600, nil); err != nil {
			t.Error(err)
		}
		return generations.Verdict{}, nil
	}
	one, _ := push(t, s, "photos", tree{}.add("d/a", "1"))

	verdict = func(context.Context, *generations.Candidate) (generations.Verdict, error) {
		reasons := []string{"line\nbreak\x00\x1b[31m", strings.Repeat("ü", 400), "odd \xff"}
		for i := range 20 {
			reasons = append(reasons, fmt.Sprint(i))
		}
		return generations.Verdict{Suspect: true, Reasons: reasons}, nil
	}
	two, _ := push(t, s, "photos", tree{}.add("d/a", "2"))
	g, err := s.Generation(t.Context(), "photos", two)
	if err != nil || len(g.Reasons) != 8 || g.Reasons[0] != "line break  [31m" || len(g.Reasons[1]) != 300 || g.Reasons[2] != "odd \ufffd" {
		t.Errorf("reasons are %q, %v", g.Reasons, err)
	}

	// The judge compares with what counts; the files are linked from the newest.
	verdict = func(_ context.Context, c *generations.Candidate) (generations.Verdict, error) {
		asked++
		if c.Current == nil || c.Current.Name != one {
			t.Errorf("compared with %+v; want %s", c.Current, one)
		}
		if got := read(c.OpenOld("d/a")); got != "1" {
			t.Errorf("the old file is %q", got)
		}
		if got := read(c.Open("d/a")); got != "2" {
			t.Errorf("the new file is %q", got)
		}
		for _, path := range []string{"", "/etc/passwd", "../MANIFEST", "d/../../MANIFEST", "d"} {
			if f, err := c.Open(path); err == nil {
				t.Errorf("%q was opened: %s", path, read(f, nil))
			}
		}
		for _, open := range []string{"new", "old"} {
			f := c.New
			if open == "old" {
				f = c.Old
			}
			list, closer, err := f()
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, err = list.Next(); err == nil; _, err = list.Next() {
				n++
			}
			if want := map[string]int{"new": 3, "old": 2}[open]; n != want || !errors.Is(err, io.EOF) {
				t.Errorf("the %s manifest has %d entries, %v", open, n, err)
			}
			closer.Close()
		}
		if text, err := c.Scratch.ReadFile("index", 100); err != nil || string(text) != "first" {
			t.Errorf("the scratch holds %q, %v", text, err)
		}
		// Meanwhile the current generation cannot go.
		if err := s.Remove(t.Context(), "photos", one); !errors.Is(err, generations.ErrKept) {
			t.Errorf("the current generation: %v", err)
		}
		return generations.Verdict{}, nil
	}
	three, _ := push(t, s, "photos", tree{}.add("d/a", "2").add("b", "3"))
	if g, err := s.Generation(t.Context(), "photos", three); err != nil || g.Base != two || g.Standing != generations.Good {
		t.Errorf("%+v, %v", g, err)
	}
	if asked != 2 {
		t.Errorf("asked %d times", asked)
	}

	// A judge that stumbles loses no push and lets none pass.
	day := tree{}.add("d/a", "2").add("b", "4")
	for i, stumble := range []func(context.Context, *generations.Candidate) (generations.Verdict, error){
		func(context.Context, *generations.Candidate) (generations.Verdict, error) {
			return generations.Verdict{}, errors.New("cannot read segment 7")
		},
		func(context.Context, *generations.Candidate) (generations.Verdict, error) { panic("nil map") },
	} {
		verdict = stumble
		day = day.clone().add("n", fmt.Sprint(i))
		name, _ := push(t, s, "photos", day)
		compare(t, dir, "photos", name, day)
		g, err := s.Generation(t.Context(), "photos", name)
		if err != nil || g.Standing != generations.Suspect || len(g.Reasons) != 1 || !strings.Contains(g.Reasons[0], "could not be compared") {
			t.Errorf("after a stumble: %s, %q, %v", g.Standing, g.Reasons, err)
		}
	}
	// One that is told to stop: nothing is committed, and the next attempt asks again.
	ctx, cancel := context.WithCancel(t.Context())
	verdict = func(ctx context.Context, _ *generations.Candidate) (generations.Verdict, error) {
		cancel()
		return generations.Verdict{}, ctx.Err()
	}
	last := day.clone().add("last", "1")
	answer, tx, err := begin(t, s, "photos", last)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := upload(t, tx, last, answer, -1); err != nil {
		t.Fatal(err)
	}
	if name, err := tx.Commit(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a commit whose judge was stopped: %q, %v", name, err)
	}
	tx.Close()
	verdict = good
	if name, got := push(t, s, "photos", last); got.Files != 0 || !strings.HasPrefix(name, "000006-") {
		t.Errorf("the next attempt uploaded %d files and became %s", got.Files, name)
	}
}
