package keystore_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/keyserver/keystore"
	"farkeep/keyserver/seal"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
)

const second = "11111111-2222-3333-4444-555555555555"

func identity(t *testing.T) (*seal.Identity, seal.Recipients) {
	t.Helper()
	text, recipient, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	id, err := seal.ParseIdentity(text)
	if err != nil {
		t.Fatal(err)
	}
	r, err := seal.ParseRecipients(recipient)
	if err != nil {
		t.Fatal(err)
	}
	return id, r
}

// holds checks that the store gives these keys.
func holds(t *testing.T, s *keystore.Store, want map[string][]byte) {
	t.Helper()
	for uuid, key := range want {
		k, err := s.Get(uuid)
		if err != nil {
			t.Errorf("%s: %v", uuid, err)
			continue
		}
		if !bytes.Equal(k.Reveal(), key) {
			t.Errorf("%s: another key came back", uuid)
		}
		k.Release()
	}
}

// files are the names in the store's folder.
func files(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// filled is a store of two keys.
func filled(t *testing.T) (*keystore.Store, string, map[string][]byte) {
	t.Helper()
	s, dir := open(t)
	want := map[string][]byte{uuid: bytes.Repeat([]byte{0, 1, '\n'}, 21), second: bytes.Repeat([]byte("x"), keywire.MaxKey)}
	for uuid, key := range want {
		if err := s.Add(uuid, secret.New(bytes.Clone(key))); err != nil {
			t.Fatal(err)
		}
	}
	return s, dir, want
}

func TestSealedStore(t *testing.T) {
	s, dir, want := filled(t)
	id, r := identity(t)
	if _, err := s.Seal(r); err == nil || !strings.Contains(hint.Of(err), "--identity") {
		t.Fatalf("sealed without proof that it can be opened: %v", err)
	}
	if err := s.Use(id); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Seal(r); n != 2 || err != nil {
		t.Fatalf("seal: %d, %v", n, err)
	}
	if got := files(t, dir); got != uuid+".key.age "+second+".key.age recipients.txt" {
		t.Errorf("the folder holds %s", got)
	}
	for _, name := range strings.Fields(files(t, dir)) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range want {
			if bytes.Contains(text, key[:16]) {
				t.Errorf("%s holds a key", name)
			}
		}
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
	}
	holds(t, s, want)

	// Another process, without the identity: it can add, and cannot get.
	blind, err := keystore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	third := strings.Replace(uuid, "0b", "0c", 1)
	want[third] = []byte("third")
	if err := blind.Add(third, secret.New([]byte("third"))); err != nil {
		t.Fatal(err)
	}
	for uuid := range want {
		if k, err := blind.Get(uuid); !errors.Is(err, keystore.ErrSealed) || k != nil {
			t.Errorf("without the identity: %v", err)
		}
		if err := blind.Add(uuid, secret.New([]byte("another"))); !errors.Is(err, fs.ErrExist) {
			t.Errorf("a key was replaced: %v", err)
		}
	}
	keys, strays, err := blind.List()
	if err != nil || len(keys) != 3 || len(strays) != 0 {
		t.Errorf("list: %v, %v, %v", keys, strays, err)
	}
	for _, k := range keys {
		if !k.Sealed || k.Err != nil || k.Modified.IsZero() {
			t.Errorf("list: %+v", k)
		}
	}
	holds(t, s, want)

	// Another identity opens nothing, and is refused before it tries.
	stranger, theirs := identity(t)
	if err := blind.Use(stranger); err == nil || !strings.Contains(err.Error(), theirs.Names()[0]) {
		t.Errorf("a stranger's identity: %v", err)
	}

	// The identity changes.
	if _, err := s.Seal(theirs); err == nil {
		t.Error("sealed for somebody whose identity nobody showed")
	}
	holds(t, s, want)
	if err := s.Use(id.Join(stranger)); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Seal(theirs); n != 3 || err != nil {
		t.Fatalf("seal for another: %d, %v", n, err)
	}
	if err := blind.Use(id); err == nil {
		t.Error("the old identity is still taken")
	}
	if err := blind.Use(stranger); err != nil {
		t.Fatal(err)
	}
	holds(t, blind, want)

	if n, err := blind.Unseal(); n != 3 || err != nil {
		t.Fatalf("unseal: %d, %v", n, err)
	}
	if got := files(t, dir); strings.Contains(got, "age") || strings.Contains(got, "recipients") {
		t.Errorf("unsealed, the folder holds %s", got)
	}
	plain, err := keystore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	holds(t, plain, want)
}

// A seal that was cut off anywhere leaves every key readable, and done again it
// completes.
func TestSealInterrupted(t *testing.T) {
	id, r := identity(t)
	for name, cut := range map[string]func(t *testing.T, dir string){
		"before the first key": func(t *testing.T, dir string) {},
		"a key in both forms": func(t *testing.T, dir string) {
			text, err := r.Seal(bytes.Repeat([]byte{0, 1, '\n'}, 21))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, uuid+".key.age"), text)
		},
		"a key that is being overwritten": func(t *testing.T, dir string) {
			text, err := r.Seal(bytes.Repeat([]byte{0, 1, '\n'}, 21))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, uuid+".key.age"), text)
			if err := os.Rename(filepath.Join(dir, uuid+".key"), filepath.Join(dir, "."+uuid+".key.gone")); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "."+uuid+".key.gone"), make([]byte, 63))
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, dir, want := filled(t)
			write(t, filepath.Join(dir, "recipients.txt"), []byte(r.Text()))
			cut(t, dir)
			s, err := keystore.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Use(id); err != nil {
				t.Fatal(err)
			}
			holds(t, s, want)
			if keys, _, err := s.List(); err != nil || len(keys) != 2 {
				t.Errorf("list: %+v, %v", keys, err)
			}
			if _, err := s.Seal(r); err != nil {
				t.Fatal(err)
			}
			if got := files(t, dir); got != uuid+".key.age "+second+".key.age recipients.txt" {
				t.Errorf("the folder holds %s", got)
			}
			holds(t, s, want)
		})
	}
}

func write(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSealedRefusals(t *testing.T) {
	id, r := identity(t)
	_, stranger := identity(t)
	seal := func(r seal.Recipients, key []byte) []byte {
		text, err := r.Seal(key)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	good := seal(r, []byte("key"))
	altered := bytes.Clone(good)
	altered[len(altered)-1] ^= 1
	for name, tt := range map[string]struct {
		text []byte
		want string
	}{
		"for another":   {seal(stranger, []byte("key")), "sealed to somebody else"},
		"altered":       {altered, "altered"},
		"cut short":     {good[:len(good)-20], "open what is sealed"},
		"not age":       {[]byte("key"), "open what is sealed"},
		"an empty key":  {seal(r, nil), "the sealed key is empty"},
		"too long":      {seal(r, make([]byte, keywire.MaxKey+1)), "only 8192 are possible"},
		"far too long":  {make([]byte, 1<<20), "not a key"},
		"an empty file": {nil, "is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := open(t)
			write(t, filepath.Join(dir, uuid+".key.age"), tt.text)
			if err := s.Use(id); err != nil {
				t.Fatal(err)
			}
			if k, err := s.Get(uuid); err == nil || k != nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want %q", err, tt.want)
			}
			if _, err := s.Seal(r); err == nil {
				t.Error("what cannot be opened was sealed")
			}
		})
	}
	s, dir := open(t)
	write(t, filepath.Join(dir, "recipients.txt"), []byte("age1nonsense\n"))
	if err := s.Add(uuid, secret.New([]byte("k"))); err == nil || !strings.Contains(err.Error(), "recipients.txt") {
		t.Errorf("recipients that make no sense: %v", err)
	}
	if err := s.Use(id); err == nil {
		t.Error("an identity for recipients that make no sense")
	}
}

// A key is sent so that the largest piece of it that anybody could keep is small.
func TestSentInPieces(t *testing.T) {
	s, _ := open(t)
	for i, size := range []int{1, 64, 128, 129, keywire.MaxKey} {
		id := strings.Replace(uuid, "0b", "0"+string(rune('0'+i)), 1)
		key := make([]byte, size)
		rand.Read(key)
		if err := s.Add(id, secret.New(bytes.Clone(key))); err != nil {
			t.Fatal(err)
		}
		k, err := s.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		var w pieces
		if n, err := k.WriteTo(&w); err != nil || n != int64(size) || !bytes.Equal(w.all, key) {
			t.Errorf("%d bytes: %d sent, %v", size, n, err)
		}
		if w.largest > (size+15)/16 {
			t.Errorf("%d bytes: a piece of %d", size, w.largest)
		}
		w = pieces{failAt: size/2 + 1}
		if n, err := k.WriteTo(&w); err == nil || n >= int64(size) && size > 1 {
			t.Errorf("%d bytes: a broken line was not noticed, %d sent, %v", size, n, err)
		}
		k.Release()
	}
}

type pieces struct {
	all     []byte
	largest int
	failAt  int
}

func (p *pieces) Write(b []byte) (int, error) {
	if p.failAt > 0 && len(p.all)+len(b) >= p.failAt {
		return 0, errors.New("broken line")
	}
	p.largest = max(p.largest, len(b))
	p.all = append(p.all, b...)
	return len(b), nil
}
