package drill_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/image/drill"
	"farkeep/image/stockdebian"
	"farkeep/shared/runsteps"
)

// here is a shell on this machine. The runbook's folders of a live stick lie below
// dir; otherwise its commands are as they are. Like the stick's, it ends when a
// command goes wrong.
type here struct {
	dir   string
	cmd   *exec.Cmd
	paste *os.File
	said  *bufio.Reader
}

func open(t *testing.T, dir string) *here {
	t.Helper()
	read, paste, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	said, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer write.Close()
	h := &here{dir: dir, paste: paste, said: bufio.NewReader(said)}
	h.cmd = exec.CommandContext(t.Context(), "sh", "-euc", `while IFS= read -r pasted <&3; do . "$pasted" 3>&- < /dev/null; printf '\036'; done`)
	h.cmd.Dir = dir
	h.cmd.Env = []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8", "BORG_PASSPHRASE=" + passphrase}
	h.cmd.ExtraFiles, h.cmd.Stdout, h.cmd.Stderr = []*os.File{read}, write, write
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		paste.Close()
		h.cmd.Wait()
		said.Close()
	})
	return h
}

func (h *here) Run(_ context.Context, script string, _ ...stockdebian.Answer) (string, error) {
	file := filepath.Join(h.dir, "pasted")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(script, "/mnt/farkeep", h.dir+"/mnt/farkeep")), 0o600); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(h.paste, file); err != nil {
		return "", err
	}
	text, err := h.said.ReadString('\036')
	if err != nil { // the shell has ended
		h.cmd.Wait()
		return text, &stockdebian.ScriptError{Code: h.cmd.ProcessState.ExitCode(), Output: text}
	}
	return strings.TrimSuffix(text, "\036"), nil
}

const passphrase = "what only the household knows"

// book is the runbook as it is shipped, with an example's names.
func book(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/recovery.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// generation makes a mounted disk, as far as a shell can tell: one repository, one
// suspect generation that is newer than the good one.
func generation(t *testing.T, dir string) (source string) {
	t.Helper()
	source = filepath.Join(dir, "household")
	good := filepath.Join(dir, "mnt/farkeep/generations/photos/000002-20260102T030405Z")
	data := make([]byte, 100_000)
	rand.Read(data)
	for _, err := range []error{
		os.MkdirAll(filepath.Join(source, "folder"), 0o755), os.MkdirAll(good, 0o755), os.MkdirAll(filepath.Join(good, "../000003-20260103T030405Z"), 0o755),
		os.WriteFile(filepath.Join(source, "folder", "picture"), data, 0o640),
		os.WriteFile(filepath.Join(good, "generation.toml"), []byte("sequence = 2\nsuspect = false\n"), 0o644),
		os.WriteFile(filepath.Join(good, "../000003-20260103T030405Z/generation.toml"), []byte("sequence = 3\nsuspect = true\n"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", `borg init --encryption=repokey "$1/files" && borg create "$1/files::monday" household
cd "$1" && find files -type f -exec b2sum -l 256 {} + > SUMS.b2 && chmod -R a-w files`, "sh", good)
	cmd.Dir = dir
	cmd.Env = []string{"HOME=" + filepath.Join(dir, "before"), "PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8", "BORG_PASSPHRASE=" + passphrase}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("a repository: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("chmod", "-R", "u+w", dir).Run() })
	return source
}

// rehearse goes from a mounted disk to files and looks at them.
func rehearse(t *testing.T, dir, runbook string) error {
	r, err := drill.New([]byte(runbook), open(t, dir))
	if err != nil {
		return err
	}
	work := filepath.Join(dir, "work")
	defer os.RemoveAll(work)
	if _, err := r.Step(t.Context(), "choose", drill.Values{"DISK": "/dev/none", "BUNDLE": filepath.Join(dir, "bundle"), "WORK": work}); err != nil {
		return err
	}
	generation, err := r.Sums(t.Context(), "photos", work)
	if err != nil {
		return err
	}
	if generation != "000002-20260102T030405Z\n" {
		return errors.New("the newest good generation is taken to be " + generation)
	}
	if err := r.Extract(t.Context()); err != nil {
		return err
	}
	want, err := os.ReadFile(filepath.Join(dir, "household/folder/picture"))
	if err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(work, "files-of-photos/household/folder/picture"))
	if err == nil && !slices.Equal(got, want) {
		err = errors.New("what was extracted is not what was backed up")
	}
	return err
}

// A runbook whose commands do not work any more, or are not there any more, fails
// the drill; the one that is shipped passes it.
func TestAChangedRunbookFails(t *testing.T) {
	for _, tool := range []string{"borg", "b2sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: install the Debian packages borgbackup and coreutils", tool)
		}
	}
	dir := t.TempDir()
	generation(t, dir)
	shipped := book(t)
	if err := rehearse(t, dir, shipped); err != nil {
		t.Fatalf("the runbook as it is shipped: %v", err)
	}
	for _, tt := range []struct{ name, old, new string }{
		{"a step is gone", "<!-- step: copy -->\n", "<!-- step: duplicate -->\n"},
		{"a step without a name", "<!-- step: copy -->\n", ""},
		{"a variable is gone", "\nREPO=", "\nREPOSITORY="},
		{"another file of sums", "--quiet -c SUMS.b2", "--quiet -c SHA256SUMS"},
		{"the suspect generation is taken", "'^suspect = false'", "'^suspect ='"},
		{"the copy goes elsewhere", `cp -r "$FROM/files/." "$COPY"`, `cp -r "$FROM/files/." "$COPY/files"`},
		{"a word that Borg does not know", "borg list --short --last 1", "borg ls --short --last 1"},
		{"an option that Borg does not know", "borg check --verify-data", "borg check --verify-everything"},
		{"the archive is not named", `borg extract "$COPY::$ARCHIVE"`, `borg extract "$COPY"`},
		{"extracted elsewhere", `cd "$OUT" && borg extract`, `cd "$WORK" && borg extract`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if !strings.Contains(shipped, tt.old) {
				t.Fatalf("docs/recovery.md does not say %q any more: change this test with it", tt.old)
			}
			if err := rehearse(t, dir, strings.Replace(shipped, tt.old, tt.new, 1)); err == nil {
				t.Error("passed")
			}
		})
	}
}

// An error names the step, its chapter and what the terminal showed.
func TestStepError(t *testing.T) {
	text := "## Open\n\n<!-- step: unlock -->\n```sh\nWHO=nobody\necho \"$WHO is there\"; exit 7\n```\n"
	r, err := drill.New([]byte(text), open(t, t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Step(t.Context(), "unlock", drill.Values{"WHO": "somebody"})
	var step *drill.StepError
	var script *stockdebian.ScriptError
	if !errors.As(err, &step) || step.Step.Name != "unlock" || step.Step.Chapter != "Open" || !errors.As(err, &script) || script.Code != 7 || !strings.Contains(err.Error(), "somebody is there") {
		t.Errorf("error %v", err)
	}
	if left := r.NotRun(); !slices.Equal(left, []string{"unlock"}) {
		t.Errorf("not run: %q", left)
	}
	if _, err := r.Step(t.Context(), "unlock", drill.Values{"WHOM": "x"}); err == nil {
		t.Error("a variable that the step does not have was set")
	}
	if _, err := r.Step(t.Context(), "lock", nil); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a step that is not there: %v", err)
	}
}

// Every step of the runbook is somebody's: run by the drill in the emulated machine,
// or by the test that is named here.
func TestEveryStepIsKnown(t *testing.T) {
	steps, err := runsteps.Parse([]byte(book(t)))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("vm_test.go")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("drill.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range steps {
		if strings.HasPrefix(s.Name, "primary-") { // pusher.TestNewPrimaryRepository
			continue
		}
		if !strings.Contains(string(text)+string(code), `"`+s.Name+`"`) {
			t.Errorf("no drill runs the step %s of %q", s.Name, s.Chapter)
		}
	}
}
