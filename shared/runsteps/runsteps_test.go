package runsteps

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const book = "# A runbook\n\n## Open\n\nSome words.\n\n<!-- step: choose -->\n```sh\nDISK=/dev/sdX   # yours\nKEY=$DISK.key\n```\n\n" +
	"It says\n\n```\nnot a command\n## no heading\n```\n\n1. In a list:\n\n   <!-- step: unlock -->\n\n   ```sh\n   if true; then\n       echo \"$DISK\"\n   fi\n   ```\n\n## Copy\n<!-- step: copy -->\n```sh\necho copied\n```\n"

func TestParse(t *testing.T) {
	want := []Step{
		{"Open", "choose", "DISK=/dev/sdX   # yours\nKEY=$DISK.key\n"},
		{"Open", "unlock", "if true; then\n    echo \"$DISK\"\nfi\n"},
		{"Copy", "copy", "echo copied\n"},
	}
	for name, text := range map[string]string{"unix": book, "windows": strings.ReplaceAll(book, "\n", "\r\n")} {
		got, err := Parse([]byte(text))
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n-want +got:\n%s", name, err, diff)
		}
	}
	if got := In(want, "Op"); len(got) != 2 || got[1].Name != "unlock" {
		t.Errorf("the steps of a chapter: %v", got)
	}
}

func TestParseRefuses(t *testing.T) {
	step := func(name string) string { return "<!-- step: " + name + " -->\n" }
	block := "```sh\ntrue\n```\n"
	for name, tt := range map[string]struct{ text, want string }{
		"no name":        {"words\n" + block, "line 2: these commands have no name"},
		"name and words": {step("a") + "words\n" + block, `line 2: step "a" has no commands`},
		"other fence":    {step("a") + "```text\n```\n", `step "a" has no commands`},
		"twice":          {step("a") + block + step("a") + block, `line 5: step "a" is in line 1 already`},
		"bad name":       {step("A b") + block, "names no step"},
		"two names":      {step("a") + step("b") + block, `step "a" has no commands`},
		"no end":         {step("a") + "```sh\ntrue\n", "does not end"},
		"name at end":    {step("a"), `step "a" has no commands`},
		"long":           {strings.Repeat(" ", MaxSize+1), "longer than"},
	} {
		if _, err := Parse([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want it to say %q", name, err, tt.want)
		}
	}
}

func TestSet(t *testing.T) {
	steps, err := Parse([]byte(book))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"DISK", "KEY"}, steps[0].Variables()); diff != "" {
		t.Error(diff)
	}
	const odd = `/tmp/a 'b' $(c) "d"`
	set, err := steps[0].Set(map[string]string{"DISK": odd})
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sh", "-euc", set.Script+steps[1].Script+"echo \"$KEY\"\n").Output()
	if err != nil || string(out) != odd+"\n"+odd+".key\n" {
		t.Errorf("the shell has %q, %v", out, err)
	}
	if !strings.HasPrefix(steps[0].Script, "DISK=/dev/sdX") {
		t.Error("the step itself has changed")
	}
	for _, values := range []map[string]string{{"OTHER": "x"}, {"disk": "x"}, {"DISK": "a\nb"}} {
		if _, err := steps[0].Set(values); err == nil {
			t.Errorf("%q was set", values)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(book))
	f.Add([]byte("<!-- step: a -->\n```sh\n```"))
	f.Fuzz(func(t *testing.T, text []byte) {
		steps, err := Parse(text)
		if err != nil {
			return
		}
		if blocks := strings.Count(string(text), "```sh"); len(steps) > blocks || len(steps) > MaxSteps {
			t.Errorf("%d steps of %d blocks", len(steps), blocks)
		}
		seen := map[string]bool{}
		for _, s := range steps {
			if s.Name == "" || seen[s.Name] {
				t.Errorf("name %q", s.Name)
			}
			seen[s.Name] = true
		}
	})
}
