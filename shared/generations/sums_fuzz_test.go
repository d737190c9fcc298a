package generations_test

import (
	"encoding/hex"
	"strings"
	"testing"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
)

// FuzzSums: whatever a path is, its line in SUMS.b2 is one line, from which b2sum's
// rules (coreutils 9, "file name escaping") give back the path and the sum.
func FuzzSums(f *testing.F) {
	for _, path := range []string{"a", "dir/file", "back\\slash", "carriage\rreturn", "\\", "ends in \\", " spaces  ", "\xff\xfe", "\\n"} {
		f.Add(path, []byte("content"))
	}
	f.Fuzz(func(t *testing.T, path string, content []byte) {
		if manifest.CheckPath(path) != nil {
			return
		}
		h := manifest.NewHash()
		h.Write(content)
		e := manifest.Entry{Path: path, Kind: manifest.File, Sum: manifest.SumOf(h)}
		line := string(generations.AppendSum(nil, &e))
		text, ok := strings.CutSuffix(line, "\n")
		if !ok || strings.ContainsAny(text, "\n\r") {
			t.Fatalf("%q makes %q: not one line", path, line)
		}
		text, escaped := strings.CutPrefix(text, `\`)
		sum, name, ok := strings.Cut(text, "  ")
		if !ok || sum != hex.EncodeToString(e.Sum[:]) {
			t.Fatalf("%q makes %q: not a sum and a name", path, line)
		}
		if escaped {
			name = unescape(t, name)
		}
		if name != generations.FilesFolder+"/"+path {
			t.Fatalf("%q makes %q, which names %q", path, line, name)
		}
	})
}

// unescape is b2sum's.
func unescape(t *testing.T, name string) string {
	t.Helper()
	var out strings.Builder
	for i := 0; i < len(name); i++ {
		if name[i] != '\\' {
			out.WriteByte(name[i])
			continue
		}
		i++
		if i == len(name) {
			t.Fatalf("%q ends in the middle of an escape", name)
		}
		switch name[i] {
		case '\\':
			out.WriteByte('\\')
		case 'n':
			out.WriteByte('\n')
		case 'r':
			out.WriteByte('\r')
		default:
			t.Fatalf("%q has an escape that b2sum does not know", name)
		}
	}
	return out.String()
}
