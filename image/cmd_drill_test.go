package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/image/drill"
	"farkeep/image/luksfile"
	"farkeep/image/stockdebian"
	"farkeep/shared/hint"
	"farkeep/shared/secret"

	"github.com/google/go-cmp/cmp"
)

const (
	drillDisk  = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	drillOther = "7c2d44a0-0f63-4b7e-8f0e-52a9d2f1b6c3"
)

// clearBundle is a bundle in clear, as far as the command looks at it before it boots
// anything: the runbook as it is shipped, and the name of a disk's key.
func clearBundle(t *testing.T, uuid string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "farkeep-bundle")
	text, err := os.ReadFile("../docs/recovery.md")
	if err == nil {
		err = os.MkdirAll(filepath.Join(dir, "disks"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "RUNBOOK.md"), text, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "disks", uuid+".recovery.key"), []byte("key"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Whatever is wrong is said before 150 MB are fetched and a machine is booted.
func TestDrillRefuses(t *testing.T) {
	bundle := clearBundle(t, drillDisk)
	blank := filepath.Join(t.TempDir(), "blank.img")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.img")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(other, 32<<20); err != nil {
		t.Fatal(err)
	}
	random := func() secret.Bytes {
		b := make([]byte, 64)
		rand.Read(b) // never fails
		return secret.New(b)
	}
	if _, err := luksfile.Format(t.Context(), other, drillOther, luksfile.AES, random(), random()); err != nil {
		t.Fatal(err)
	}
	broken := clearBundle(t, drillDisk)
	if err := os.WriteFile(filepath.Join(broken, "RUNBOOK.md"), []byte("<!-- step: choose -->\n```sh\nDISK=/dev/sdX\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		want string
		hint string
		code int
	}{
		{"nothing named", nil, "name the bundle (--bundle) and the disk (--disk)", "", hint.ExitUsage},
		{"no disk", []string{"--bundle", bundle}, "name the bundle (--bundle) and the disk (--disk)", "", hint.ExitUsage},
		{"no such bundle", []string{"--bundle", bundle + "-2", "--disk", blank}, "no such file", "bundle open unpacks a sealed one", hint.ExitUsage},
		{"no such disk", []string{"--bundle", bundle, "--disk", blank + ".none"}, "no such file", "", hint.ExitUsage},
		{"not encrypted, or no header", []string{"--bundle", bundle, "--disk", blank}, blank, "--without-header UUID tries the bundle's header", hint.ExitUsage},
		{"another disk", []string{"--bundle", bundle, "--disk", other}, "the bundle does not open " + other + ", whose UUID is " + drillOther, "", hint.ExitUsage},
		{"another header", []string{"--bundle", bundle, "--disk", blank, "--without-header", drillOther}, "the bundle opens no disk " + drillOther, "it opens " + drillDisk, hint.ExitUsage},
		{"no such passphrase file", []string{"--bundle", bundle, "--disk", blank, "--without-header", drillDisk, "--passphrase-file", blank + ".none"}, "no such file", "", hint.ExitUsage},
		{"a runbook that was cut", []string{"--bundle", broken, "--disk", blank, "--without-header", drillDisk}, "runbook: line 3: the last block does not end", "", hint.ExitFailure},
		{"more words", []string{"attic", "--bundle", bundle, "--disk", blank}, `unknown command "attic"`, "", hint.ExitUsage},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, diagnostics bytes.Buffer
			code := run(t.Context(), append([]string{"drill"}, c.args...), &Env{Stdout: &out, Stderr: &diagnostics, Getenv: os.Getenv})
			if code != c.code || !strings.Contains(diagnostics.String(), c.want) || !strings.Contains(diagnostics.String(), c.hint) || out.Len() > 0 {
				t.Errorf("exit %d, stderr %q, stdout %q; want exit %d, %q and %q", code, diagnostics.String(), out.String(), c.code, c.want, c.hint)
			}
		})
	}
}

// paste is the shell of a machine on which everything works but what fails names.
type paste struct {
	repositories string
	fails        string // part of the script that goes wrong
	scripts      []string
}

func (p *paste) Run(_ context.Context, script string, _ ...stockdebian.Answer) (string, error) {
	p.scripts = append(p.scripts, script)
	switch {
	case p.fails != "" && strings.Contains(script, p.fails):
		return "", &stockdebian.ScriptError{Code: 1, Output: "it does not work"}
	case strings.Contains(script, "generations && ls"):
		return p.repositories, nil
	case strings.Contains(script, "suspect"): // the step that finds the newest generation
		return "000007-20260102T030405Z\n", nil
	}
	return "", nil
}

// The command goes through the runbook in a person's order, says how long each step
// took, and stops at the first that does not work.
func TestDrillRehearses(t *testing.T) {
	text, err := os.ReadFile("../docs/recovery.md")
	if err != nil {
		t.Fatal(err)
	}
	opened := []string{"choose", "bundle-sums", "right-disk", "unlock", "fsck", "mount"}
	sums := []string{"choose-repository", "newest", "sums"}
	borg := []string{"copy", "borg-keys", "borg-list", "borg-check", "borg-archive", "borg-extract"}
	steps := func(lists ...[]string) (all []string) {
		for _, l := range lists {
			all = append(all, l...)
		}
		return all
	}
	for _, c := range []struct {
		name  string
		o     rehearsal
		shell paste
		steps []string
		says  []string
		fails string
		hint  string
	}{
		{"sums of all", rehearsal{}, paste{repositories: "letters\nphotos\n"}, steps(opened, sums, sums, []string{"close"}),
			[]string{"letters 000007-20260102T030405Z: every file is what was written", "photos 000007-20260102T030405Z: every file"}, "", ""},
		{"one with Borg", rehearsal{repositories: []string{"photos"}}, paste{repositories: "letters\nphotos\n"}, steps(opened, sums, sums, borg, []string{"close"}),
			[]string{"photos: checked by Borg, and its newest archive extracted"}, "", ""},
		{"without its header", rehearsal{headerless: drillDisk}, paste{repositories: "letters\n"},
			steps([]string{"choose-header", "header-key", "header-detached", "fsck", "mount"}, sums, []string{"close"}), nil, "", ""},
		{"a repository that is not there", rehearsal{repositories: []string{"films"}}, paste{repositories: "letters\nphotos\n"}, opened, nil,
			"the disk has no repository films", "it has letters, photos"},
		{"an empty disk", rehearsal{}, paste{}, opened, nil, "holds no repository", "push to it first"},
		{"the key does not open it", rehearsal{}, paste{fails: "cryptsetup open"}, opened[:3], nil, `the runbook's step "unlock"`, "what stands below this step in the runbook"},
		{"a file is not what it was", rehearsal{}, paste{repositories: "letters\n", fails: "b2sum"}, steps(opened, sums[:2]), nil, `the runbook's step "sums"`, "bundle verify"},
		{"Borg finds something", rehearsal{repositories: []string{"letters"}}, paste{repositories: "letters\n", fails: "borg check"}, steps(opened, sums, borg[:3]), nil, `the runbook's step "borg-check"`, ""},
		{"no bundle on the stick", rehearsal{}, paste{fails: "mount -o ro /dev/stick"}, nil, nil, "mount the stick with the bundle", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			r, err := drill.New(text, &c.shell)
			if err != nil {
				t.Fatal(err)
			}
			err = c.o.rehearse(t.Context(), &Env{Stdout: &out}, r, "/dev/stick", "/dev/disk", drillDisk)
			if (err == nil) != (c.fails == "") || !strings.Contains(fmt.Sprint(err), c.fails) || !strings.Contains(hint.Of(err), c.hint) {
				t.Errorf("%v, hint %q; want %q and %q", err, hint.Of(err), c.fails, c.hint)
			}
			var ran []string
			for line := range strings.Lines(out.String()) {
				if _, step, found := strings.Cut(line, " s  "); found {
					ran = append(ran, strings.TrimSpace(step[strings.LastIndex(step, ": ")+2:]))
				}
			}
			if diff := cmp.Diff(c.steps, ran); diff != "" {
				t.Errorf("steps: %s\n%s", diff, out.String())
			}
			for _, want := range c.says {
				if !strings.Contains(out.String(), want) {
					t.Errorf("it does not say %q:\n%s", want, out.String())
				}
			}
			if all := strings.Join(c.shell.scripts, "\n"); c.steps != nil && (!strings.Contains(all, "/dev/disk") || !strings.Contains(all, drillBundle)) {
				t.Errorf("what a person chooses is not filled in:\n%s", all)
			}
		})
	}
}
