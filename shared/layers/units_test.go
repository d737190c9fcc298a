package layers

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	unitName  = regexp.MustCompile(`/etc/systemd/system/(farkeep-[a-z-]+\.(?:service|timer))`)
	installed = regexp.MustCompile(`/usr/local/bin/farkeep-[a-z]+`)
)

// TestUnitsInTheDocs has systemd judge every unit that the docs tell a user to
// install: a fenced block after a line that names its file.
func TestUnitsInTheDocs(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Fatal("systemd-analyze is missing: apt-get install systemd")
	}
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var units []string
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		rest := string(text)
		for {
			at := unitName.FindStringSubmatchIndex(rest)
			if at == nil {
				break
			}
			name := rest[at[2]:at[3]]
			rest = rest[at[1]:]
			_, block, found := strings.Cut(rest, "```ini\n")
			unit, _, closed := strings.Cut(block, "```")
			if !found || !closed {
				t.Errorf("%s names %s and does not show it", page, name)
				continue
			}
			// The programs are not installed here; something else has to be executable.
			unit = installed.ReplaceAllString(unit, "/bin/true")
			path := filepath.Join(dir, name)
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s shows %s, which another page shows too", page, name)
			}
			if err := os.WriteFile(path, []byte(unit), 0o600); err != nil {
				t.Fatal(err)
			}
			units = append(units, path)
		}
	}
	if len(units) < 4 {
		t.Fatalf("only %d units were found: key server, appliance, push and its timer are expected", len(units))
	}
	for _, unit := range units {
		if out, err := exec.Command(analyze, "verify", unit).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", filepath.Base(unit), err, out)
		}
	}
}
