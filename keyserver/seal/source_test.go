package seal_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/keyserver/seal"
	"farkeep/shared/hint"
	"farkeep/shared/secret"
)

// file writes a secret with a mode, whatever the umask is.
func file(t *testing.T, path string, text []byte, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSource(t *testing.T) {
	text, recipient, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	other, otherRecipient, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	p, err := seal.NewPassphrase(secret.New([]byte("four words and more")))
	if err != nil {
		t.Fatal(err)
	}
	worded, err := seal.Light(p).SealFile(text)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	// The modes that systemd gives: 0400 to the service's user on ramfs, and the
	// mask of an access control list, which shows as 0440, on tmpfs.
	credentials := t.TempDir()
	file(t, filepath.Join(credentials, "keys"), text.Reveal(), 0o400)
	file(t, filepath.Join(credentials, "listed"), other.Reveal(), 0o440)
	file(t, filepath.Join(credentials, "loose"), text.Reveal(), 0o444)
	file(t, filepath.Join(credentials, "worded"), worded, 0o400)
	if err := os.Chmod(credentials, 0o500); err != nil {
		t.Fatal(err)
	}
	ask := func(words string) func(string) (secret.Bytes, error) {
		return func(string) (secret.Bytes, error) { return secret.New([]byte(words)), nil }
	}
	for name, tt := range map[string]struct {
		source seal.Source
		want   []string
		fails  string
	}{
		"none":               {},
		"a file":             {source: seal.Source{Files: []string{file(t, in("id"), text.Reveal(), 0o600)}}, want: []string{recipient}},
		"read-only":          {source: seal.Source{Files: []string{file(t, in("ro"), text.Reveal(), 0o400)}}, want: []string{recipient}},
		"a credential":       {source: seal.Source{Credentials: []string{"keys"}, Directory: credentials}, want: []string{recipient}},
		"by a list":          {source: seal.Source{Credentials: []string{"listed"}, Directory: credentials}, want: []string{otherRecipient}},
		"several":            {source: seal.Source{Files: []string{in("id")}, Credentials: []string{"listed"}, Directory: credentials}, want: []string{recipient, otherRecipient}},
		"sealed":             {source: seal.Source{Credentials: []string{"worded"}, Directory: credentials, Passphrase: ask("four words and more")}, want: []string{recipient}},
		"wrong words":        {source: seal.Source{Credentials: []string{"worded"}, Directory: credentials, Passphrase: ask("others")}, fails: "passphrase is wrong"},
		"no words":           {source: seal.Source{Credentials: []string{"worded"}, Directory: credentials}, fails: "sealed with a passphrase"},
		"no such file":       {source: seal.Source{Files: []string{in("none")}}, fails: "no such file"},
		"group reads a file": {source: seal.Source{Files: []string{file(t, in("group"), text.Reveal(), 0o440)}}, fails: "mode 0440: others can read it"},
		"all read it":        {source: seal.Source{Credentials: []string{"loose"}, Directory: credentials}, fails: "mode 0444"},
		"a folder":           {source: seal.Source{Files: []string{dir}}, fails: "not a regular file"},
		"too long":           {source: seal.Source{Files: []string{file(t, in("long"), make([]byte, seal.MaxIdentity+1), 0o600)}}, fails: "longer than"},
		"not one":            {source: seal.Source{Files: []string{file(t, in("not"), []byte("hello"), 0o600)}}, fails: "no age identity"},
		"no directory":       {source: seal.Source{Credentials: []string{"keys"}}, fails: "no CREDENTIALS_DIRECTORY"},
		"a path":             {source: seal.Source{Credentials: []string{"../id"}, Directory: credentials}, fails: "not the name of a credential"},
		"a dot":              {source: seal.Source{Credentials: []string{"."}, Directory: credentials}, fails: "not the name of a credential"},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := tt.source.Load()
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Errorf("got %v; want %q", err, tt.fails)
				}
				return
			}
			if err != nil || (id == nil) != (tt.want == nil) || id != nil && !slices.Equal(id.Recipients(), tt.want) {
				t.Errorf("got %v, %v", id, err)
			}
		})
	}
	_, err = seal.Source{Credentials: []string{"keys"}}.Load()
	if !strings.Contains(hint.Of(err), "LoadCredential=keys:") {
		t.Errorf("hint %q", hint.Of(err))
	}
}

func TestReadCredential(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]string{"words\n": "words", "words": "words", "words\r\n": "words", "two\n\n": "two\n", "": ""} {
		file(t, filepath.Join(dir, "words"), []byte(text), 0o400)
		got, err := seal.ReadCredential(dir, "words")
		if err != nil || string(got.Reveal()) != want {
			t.Errorf("%q: %q, %v", text, got.Reveal(), err)
		}
		if err := os.Remove(filepath.Join(dir, "words")); err != nil {
			t.Fatal(err)
		}
	}
}
