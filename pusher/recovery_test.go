package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"farkeep/pusher/borgtest"
	"farkeep/shared/borgsegment"
)

// chapter reads the commands of a chapter of docs/recovery.md: what stands in its
// blocks marked as sh, in order.
func chapter(t *testing.T, title string) (blocks []string) {
	t.Helper()
	text, err := os.ReadFile("../docs/recovery.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n## "+title+"\n")
	if !ok {
		t.Fatalf("docs/recovery.md has no chapter %q", title)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	for _, m := range regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$").FindAllStringSubmatch(rest, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// drill is a home with one repository, two clients of it, and a folder of generations.
type drill struct {
	dir        string // stands for / in the chapter's commands
	repository string
	farkeep    string // a folder with the program as the commands call it
}

func newDrill(t *testing.T, encryption string) *drill {
	t.Helper()
	d := &drill{dir: t.TempDir()}
	d.repository = filepath.Join(d.dir, "srv/borg/photos")
	d.farkeep = filepath.Join(d.dir, "bin")
	for _, dir := range []string{"srv/borg", "bin", "vault", "client-a", "client-b"} {
		if err := os.MkdirAll(filepath.Join(d.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	site := fmt.Sprintf("[[directory_target]]\nname = \"vault\"\npath = %q\n[[repository]]\nname = \"photos\"\npath = %q\n", filepath.Join(d.dir, "vault"), d.repository)
	if err := writeSite(d.dir, site); err != nil {
		t.Fatal(err)
	}
	self, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	wrapper := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" --site %s --identity %s --state %s\n", self, filepath.Join(d.dir, "site.toml"), filepath.Join(d.dir, "ssh_key"), filepath.Join(d.dir, "state"))
	if err := os.WriteFile(filepath.Join(d.farkeep, program), []byte(wrapper), 0o755); err != nil {
		t.Fatal(err)
	}
	d.sh(t, "client-a", "borg init --encryption="+encryption+" "+d.repository)
	return d
}

// sh runs commands as one of the clients, who has a home of his own; the
// chapter's paths are made to lie below dir.
func (d *drill) sh(t *testing.T, client, commands string) string {
	t.Helper()
	out, err := d.try(client, commands)
	if err != nil {
		t.Fatalf("%s: %v\n%s\n%s", client, err, commands, out)
	}
	return out
}

func (d *drill) try(client, commands string) (string, error) {
	if !strings.Contains(commands, d.dir) {
		commands = strings.ReplaceAll(commands, "/srv/borg/", d.dir+"/srv/borg/")
	}
	cmd := exec.Command("sh", "-eu", "-c", commands)
	cmd.Dir = d.dir
	// Only what a person has who types this; Borg's questions are not answered in advance.
	cmd.Env = []string{"HOME=" + filepath.Join(d.dir, client), "PATH=" + d.farkeep + ":" + os.Getenv("PATH"), "LANG=C.UTF-8", "BORG_PASSPHRASE=" + borgtest.Passphrase}
	if v := os.Getenv("GOCOVERDIR"); v != "" {
		cmd.Env = append(cmd.Env, "GOCOVERDIR="+v)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// backup makes an archive of new random files.
func (d *drill) backup(t *testing.T, client, archive string) {
	t.Helper()
	d.sh(t, client, fmt.Sprintf(`mkdir -p "$HOME/documents" && head -c 700000 /dev/urandom > "$HOME/documents/%s" && cp "$HOME/documents/%s" "$HOME/documents/same" && borg create %s::%s "$HOME/documents"`,
		archive, archive, d.repository, archive))
}

// span is a piece that Borg encrypted: blocks of 16 bytes from counter first.
type span struct {
	first, blocks uint64
	data          [32]byte // a hash of what came out
}

// spans reads what Borg encrypted out of a repository (Borg 1.2, crypto/key.py:
// TYPE(1) + HMAC(32) + NONCE(8) + ciphertext).
func spans(t *testing.T, repository string) (all []span) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(repository, "data"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		r := borgsegment.NewReader(borgsegment.Headers)
		r.Reset(bytes.NewReader(content), int64(len(content)))
		var entry borgsegment.Entry
		for r.Next(&entry) {
			off, size := entry.Data()
			if entry.Tag != borgsegment.Put || size <= 41 {
				continue
			}
			data := content[off : off+size]
			all = append(all, span{binary.BigEndian.Uint64(data[33:41]), uint64(size-41+15) / 16, sha256.Sum256(data)})
		}
		return r.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatalf("%s holds nothing", repository)
	}
	return all
}

// reused counts the counters that were used for two different pieces.
func reused(all ...[]span) (n int) {
	list := slices.Concat(all...)
	slices.SortFunc(list, func(a, b span) int {
		switch {
		case a.first < b.first:
			return -1
		case a.first > b.first:
			return 1
		}
		return bytes.Compare(a.data[:], b.data[:])
	})
	list = slices.Compact(list) // the same piece in both repositories
	var last span
	for _, s := range list {
		if s.first < last.first+last.blocks {
			n++
		}
		if s.first+s.blocks > last.first+last.blocks {
			last = s
		}
	}
	return n
}

// The chapter's own commands make a generation the new repository: every archive
// is there, backups go on from both clients, one of which has lost all that it
// knew, and no counter is used twice. Without the chapter counters are.
func TestNewPrimaryRepository(t *testing.T) {
	if _, err := exec.LookPath("borg"); err != nil {
		t.Fatal("borg is missing: install the Debian package borgbackup")
	}
	blocks := chapter(t, "A generation as the new repository")
	if len(blocks) != 6 {
		t.Fatalf("the chapter has %d blocks of commands, the test knows 6: %q", len(blocks), blocks)
	}
	for _, tt := range []struct {
		encryption string
		clients    []string
	}{
		{"repokey", []string{"client-a", "client-b"}},
		{"keyfile-blake2", []string{"client-a"}},
	} {
		t.Run(tt.encryption, func(t *testing.T) {
			d := newDrill(t, tt.encryption)
			d.backup(t, "client-a", "one")
			d.sh(t, "client-a", program+" push")
			// After the generation every client wrote more, and all of it is lost.
			for _, client := range tt.clients {
				d.backup(t, client, "of-"+client)
			}
			if len(tt.clients) > 1 {
				// What would happen without care: a client that has lost its memory goes on.
				careless := filepath.Join(d.dir, "careless")
				d.sh(t, "client-a", program+" restore vault photos latest --to "+careless)
				d.sh(t, "client-c", `mkdir -p "$HOME"; head -c 700000 /dev/urandom > "$HOME/x"; borg create `+careless+`::careless "$HOME/x"`)
				if reused(spans(t, d.repository), spans(t, careless)) == 0 {
					t.Error("without the chapter no counter is used twice: the test does not see what it is about")
				}
			}

			for _, commands := range blocks[:4] {
				d.sh(t, "client-a", commands)
			}
			// Before a client forgets, Borg refuses.
			if out, err := d.try("client-a", "borg list "+d.repository); err == nil {
				t.Errorf("borg takes an older repository without a word: %s", out)
			}
			for _, client := range tt.clients {
				if client == "client-b" { // it has lost everything that it knew
					d.sh(t, client, `rm -rf "$HOME/.cache" "$HOME/.config/borg"`)
				}
				d.sh(t, client, blocks[4])
				if out := d.sh(t, client, blocks[5]); !strings.Contains(out, "one") {
					t.Errorf("%s does not see the archive of the generation:\n%s", client, out)
				}
			}
			d.backup(t, "client-a", "last")
			if n := reused(spans(t, d.repository+".never-use-again"), spans(t, d.repository)); n > 0 {
				t.Errorf("%d pieces were encrypted with counters that had been used", n)
			}
			d.sh(t, "client-a", fmt.Sprintf(`mkdir x && cd x && borg extract %s::last && cmp .%s/client-a/documents/last "$HOME/documents/last"`, d.repository, d.dir))
			// And it is pushed as ever.
			d.sh(t, "client-a", program+" push")
		})
	}
}
