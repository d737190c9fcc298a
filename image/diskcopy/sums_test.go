package diskcopy

import (
	"strings"
	"testing"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
)

// FuzzParseSum: a line of SUMS.b2 is refused, or it is the one encoding of what it
// was read as.
func FuzzParseSum(f *testing.F) {
	sum := strings.Repeat("0a", 32)
	for _, line := range []string{
		sum + "  files/a", sum + "  files/a/b c", `\` + sum + `  files/a\\b`, `\` + sum + `  files/a\rb`,
		sum + "  files/../a", sum + "  files//", sum + "  files/a\x00", sum[:10] + "  files/a", sum + `  files/0\`, strings.ToUpper(sum) + "  files/a", sum + " *files/a", "",
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		i, err := parseSum(line)
		if err != nil {
			return
		}
		if err := manifest.CheckPath(i.path); err != nil {
			t.Fatalf("%q gives %q: %v", line, i.path, err)
		}
		if got := string(generations.AppendSum(nil, &manifest.Entry{Path: i.path, Sum: i.sum})); got != line+"\n" {
			t.Errorf("%q was read as what is written as %q", line, got)
		}
	})
}
