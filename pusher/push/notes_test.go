package push

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/pusher/repository"
)

// Whatever befalls the notes between two pushes, the generation is right, the
// pusher says what it did, and the notes are right again.
func TestNotesLie(t *testing.T) {
	t.Parallel()
	before, r, beforeDisk := compacted(t, "none")
	copied := func(t *testing.T, from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
			t.Fatalf("%s", out)
		}
	}
	// again is the bench as it was before the push after the compaction.
	again := func(t *testing.T) (b *bench, notes, disk string) {
		t.Helper()
		b, disk = newBench(t), t.TempDir()
		copied(t, before.state, b.state)
		copied(t, beforeDisk, disk)
		b.repos, b.site = before.repos, before.site
		b.memory = repository.NewMemory(filepath.Join(b.state, "repositories"))
		b.directory("disk", disk)
		return b, filepath.Join(b.state, "base", "photos"), disk
	}
	read := func(t *testing.T, path string) []byte {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(t *testing.T, path string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	honest, notes, disk := again(t)
	right := honest.mustPush().Outcomes[0]
	want, wantNotes := files(disk, "photos", right.Generation), read(t, filepath.Join(notes, "disk.base"))
	verify(t, r, want, map[string]string{"two": r.Source})
	if right.Copied == 0 {
		t.Fatal("without a lie nothing is copied")
	}

	for _, c := range []struct {
		name string
		lie  func(t *testing.T, notes string)
		want string // what the pusher says
	}{
		{"a byte changed", func(t *testing.T, notes string) {
			b := read(t, filepath.Join(notes, "disk.base"))
			b[len(b)/2] ^= 1
			write(t, filepath.Join(notes, "disk.base"), b)
		}, "sending whole files"},
		{"cut", func(t *testing.T, notes string) {
			b := read(t, filepath.Join(notes, "disk.base"))
			write(t, filepath.Join(notes, "disk.base"), b[:len(b)-100])
		}, "sending whole files"},
		{"empty", func(t *testing.T, notes string) {
			write(t, filepath.Join(notes, "disk.base"), nil)
		}, "sending whole files"},
		{"of another target's generation", func(t *testing.T, notes string) {
			write(t, filepath.Join(notes, "disk.base"), wantNotes)
		}, "what was noted is of another generation"},
		{"today's index for yesterday's", func(t *testing.T, notes string) {
			now, err := filepath.Glob(filepath.Join(r.Path, "index.*"))
			if err != nil || len(now) != 1 {
				t.Fatal(now, err)
			}
			index, lied := read(t, now[0]), false
			kept, err := filepath.Glob(filepath.Join(notes, "kept", "disk", "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range kept {
				if len(read(t, path)) == len(index) {
					write(t, path, index)
					lied = true
				}
			}
			if !lied {
				t.Fatalf("no index is kept: %v", kept)
			}
		}, "sending whole files"},
		{"lost", func(t *testing.T, notes string) {
			if err := os.RemoveAll(notes); err != nil {
				t.Fatal(err)
			}
		}, "was not noted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, notes, disk := again(t)
			c.lie(t, notes)
			o := b.mustPush().Outcomes[0]
			if !strings.Contains(b.said.String(), c.want) {
				t.Errorf("the pusher does not say %q", c.want)
			}
			if out, err := exec.Command("diff", "-r", want, files(disk, "photos", o.Generation)).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			if !bytes.Equal(read(t, filepath.Join(notes, "disk.base")), wantNotes) {
				t.Error("the notes are not right again")
			}
		})
	}
}
