package generations_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
)

// endless repeats a manifest's entries for ever.
type endless struct{ i int }

func (e *endless) Read(p []byte) (int, error) {
	n := 0
	for n+64 < len(p) {
		path := []byte{byte('a' + e.i>>24&15), byte('a' + e.i>>20&15), byte('a' + e.i>>16&15), byte('a' + e.i>>12&15), byte('a' + e.i>>8&15), byte('a' + e.i>>4&15), byte('a' + e.i&15)}
		if e.i == 0 {
			n += copy(p[n:], "FKMANIF1F\x00\x07aaaaaaa\x01\x00\x00")
		} else {
			shared := 6
			for k, v := 0, e.i; v&15 == 0; k, v = k+1, v>>4 {
				shared--
			}
			n += copy(p[n:], append([]byte{'F', byte(shared), byte(7 - shared)}, path[shared:]...))
			n += copy(p[n:], "\x01\x00\x00")
		}
		n += copy(p[n:], strings.Repeat("s", 32))
		e.i++
	}
	return n, nil
}

func TestOffersAreRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	good := tree{}.add("a/b", "content").add("c", "x")
	name, _ := push(t, s, "photos", good)
	next := good.clone().add("d", "new")
	list, offer := next.manifest(t)

	with := func(change func(*pushwire.Offer)) pushwire.Offer {
		o := offer
		change(&o)
		return o
	}
	tests := []struct {
		name       string
		repository string
		offer      pushwire.Offer
		list       io.Reader
		want       string
	}{
		{"no digest", "photos", with(func(o *pushwire.Offer) { o.Digest = "" }), nil, "digits"},
		{"10^9 files", "photos", with(func(o *pushwire.Offer) { o.Entries = 1e9 }), nil, "possible"},
		{"negative", "photos", with(func(o *pushwire.Offer) { o.Bytes = -1 }), nil, "possible"},
		{"kind", "photos", with(func(o *pushwire.Offer) { o.Kind = "zip" }), nil, "kind"},
		{"repository id", "photos", with(func(o *pushwire.Offer) { o.RepositoryID = "../x" }), nil, "hexadecimal"},
		{"repository ../x", "../x", offer, nil, "repository name"},
		{"repository hidden", ".heartbeat", offer, nil, "repository name"},
		{"repository empty", "", offer, nil, "repository name"},
		{"digest of the newest, other counts", "photos", func() pushwire.Offer { _, o := good.manifest(t); o.Bytes++; return o }(), nil, "counts are not"},
		{"empty manifest", "photos", offer, strings.NewReader(""), "unexpected EOF"},
		{"cut manifest", "photos", offer, bytes.NewReader(list[:len(list)/2]), "unexpected EOF"},
		{"garbage after it", "photos", offer, bytes.NewReader(append(list[:len(list):len(list)], 'x')), "after the end"},
		{"another manifest", "photos", with(func(o *pushwire.Offer) { o.Digest = strings.Repeat("0", 64) }), bytes.NewReader(list), generations.ErrOffer.Error()},
		{"more entries than offered", "photos", with(func(o *pushwire.Offer) { o.Entries-- }), bytes.NewReader(list), "more than"},
		{"more bytes than offered", "photos", with(func(o *pushwire.Offer) { o.Bytes-- }), bytes.NewReader(list), "more than"},
		{"fewer entries than offered", "photos", with(func(o *pushwire.Offer) { o.Entries++ }), bytes.NewReader(list), generations.ErrOffer.Error()},
		{"a manifest without end", "photos", with(func(o *pushwire.Offer) { o.Entries = 10_000 }), &endless{}, "more than the 10000 entries"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, tx, err := s.Begin(t.Context(), generations.Request{Repository: tt.repository, Offer: tt.offer, Pusher: "home"})
			if err == nil {
				if tt.list == nil {
					t.Fatal("accepted")
				}
				_, err = tx.TakeManifest(t.Context(), tt.list)
				tx.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
		})
	}
	compare(t, dir, "photos", name, good)
	name, _ = push(t, s, "photos", next)
	compare(t, dir, "photos", name, next)
}

func TestUploadsAreRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	old := tree{}.add("old", strings.Repeat("0123456789", 100))
	one, _ := push(t, s, "photos", old)
	next := old.clone().add("a", "hello").add("b", "world")
	entries := next.entries()
	sumOf := func(i int) manifest.Sum { return entries[i].Sum }

	tests := []struct {
		name  string
		write func(e *recipe.Encoder) error
		want  string
	}{
		{"nothing", func(*recipe.Encoder) error { return errStop }, "unexpected EOF"},
		{"a file that was not asked for", func(e *recipe.Encoder) error { return e.File(2) }, "not asked for"},
		{"a file beyond the manifest", func(e *recipe.Encoder) error { return e.File(77) }, "not asked for"},
		{"longer than announced", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), write(e, "hello, and more"))
		}, "longer than the 5 bytes"},
		{"wrong content", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), write(e, "hullo"), e.End(sumOf(0)))
		}, "does not have the hash"},
		{"hash that does not match", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), write(e, "hello"), e.End(sumOf(1)))
		}, "does not have the hash"},
		{"copy from outside", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), e.Copy("nowhere/x", 0, 5), e.End(sumOf(0)))
		}, "no such file"},
		{"copy past the end", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), e.Copy("old", 998, 5), e.End(sumOf(0)))
		}, "ends before"},
		{"keep what was not offered", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), e.Keep(5), e.End(sumOf(0)))
		}, "not offered"},
		{"cut in the second file", func(e *recipe.Encoder) error {
			return errors.Join(e.File(0), write(e, "hello"), e.End(sumOf(0)), e.File(1), write(e, "wor"), e.Flush(), errStop)
		}, "unexpected EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			answer, tx, err := begin(t, s, "photos", next)
			if err != nil || answer.Answer != pushwire.AnswerSend {
				t.Fatal(answer, err)
			}
			defer tx.Close()
			var b bytes.Buffer
			e := recipe.NewEncoder(&b)
			if err := tt.write(e); errors.Is(err, errStop) {
				e.Flush()
			} else if err != nil {
				t.Fatal(err)
			} else {
				e.Flush()
			}
			_, err = tx.Receive(t.Context(), &b)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
			if _, err := tx.Commit(t.Context()); !errors.Is(err, generations.ErrIncomplete) {
				t.Errorf("commit after it: %v", err)
			}
		})
	}
	// The first file of the last attempt is complete, and is not asked for again.
	answer, tx, err := begin(t, s, "photos", next)
	if err != nil || answer.Need != 1 || answer.Kept != 1 {
		t.Fatalf("after a cut %d files are asked for, %d are kept, %v; want 1 and 1", answer.Need, answer.Kept, err)
	}
	if _, err := tx.Commit(t.Context()); !errors.Is(err, generations.ErrIncomplete) {
		t.Errorf("commit of half an upload: %v", err)
	}
	tx.Close()
	two, _ := push(t, s, "photos", next)
	compare(t, dir, "photos", one, old)
	compare(t, dir, "photos", two, next)
}

var errStop = errors.New("stop here")

func write(e *recipe.Encoder, s string) error {
	_, err := io.WriteString(e, s)
	return err
}

func TestOnePushAtATime(t *testing.T) {
	s := open(t, t.TempDir(), generations.Options{})
	_, tx, err := begin(t, s, "photos", tree{}.add("a", "1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := begin(t, s, "photos", tree{}.add("b", "2")); !errors.Is(err, generations.ErrBusy) {
		t.Errorf("a second push: %v", err)
	}
	if _, other, err := begin(t, s, "docs", tree{}.add("b", "2")); err != nil {
		t.Errorf("a push of another repository: %v", err)
	} else {
		other.Close()
	}
	tx.Close()
	push(t, s, "photos", tree{}.add("b", "2"))
}

func TestCancelledContextDoesNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	day := tree{}.add("a", noise(1, 1<<20))
	answer, tx, err := begin(t, s, "photos", day)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	if _, err := upload(t, tx, day, answer, -1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tx.Commit(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("commit: %v", err)
	}
	if list, _ := s.List(t.Context(), "photos"); len(list) != 0 {
		t.Errorf("a cancelled commit made %v", names(list))
	}
}

// Someone had the disk in hand and left links. None may be followed, whatever
// else happens.
func TestPlantedLinks(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	day := tree{}.add("d/a", "content").add("d/b", "more")
	next := day.clone().add("d/c", "third")
	in := func(dir string, parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	replace := func(t *testing.T, path, to string) {
		t.Helper()
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name  string
		plant func(t *testing.T, dir, generation string)
		heals bool // the push goes through, at the latest when it is tried again
	}{
		{"incoming", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming"), outside) }, false},
		{"incoming repository", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming/photos"), outside) }, false},
		{"objects", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming/photos/objects"), outside) }, false},
		{"building", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming/photos/building"), outside) }, false},
		{"push.toml", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming/photos/push.toml"), secret) }, true},
		{"offered manifest", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming/photos/MANIFEST"), secret) }, true},
		{"staging", func(t *testing.T, dir, _ string) { replace(t, in(dir, "incoming/photos/generation"), outside) }, true},
		{"repository", func(t *testing.T, dir, _ string) { replace(t, in(dir, "generations/photos"), outside) }, false},
		{"generation", func(t *testing.T, dir, g string) { replace(t, in(dir, "generations/photos", g), outside) }, true},
		{"files", func(t *testing.T, dir, g string) { replace(t, in(dir, "generations/photos", g, "files"), outside) }, true},
		{"folder", func(t *testing.T, dir, g string) { replace(t, in(dir, "generations/photos", g, "files/d"), outside) }, true},
		{"file", func(t *testing.T, dir, g string) { replace(t, in(dir, "generations/photos", g, "files/d/a"), secret) }, true},
		{"base manifest", func(t *testing.T, dir, g string) { replace(t, in(dir, "generations/photos", g, "MANIFEST"), secret) }, true},
		{"sequence", func(t *testing.T, dir, _ string) { replace(t, in(dir, "generations/photos/.sequence"), secret) }, false},
		{"heartbeats", func(t *testing.T, dir, _ string) { replace(t, in(dir, ".heartbeat"), outside) }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			s, err := generations.Open(dir, generations.Options{Reserve: 1})
			if err != nil {
				t.Fatal(err)
			}
			name, _ := push(t, s, "photos", day)
			// A push under way, so that incoming/ has all of its files.
			if _, tx, err := begin(t, s, "photos", next); err != nil {
				t.Fatal(err)
			} else {
				tx.Close()
			}
			s.Close()
			tt.plant(t, dir, name)

			attempt := func() error {
				s, err := generations.Open(dir, generations.Options{Reserve: 1})
				if err != nil {
					return err
				}
				defer s.Close()
				answer, tx, err := begin(t, s, "photos", next)
				if err != nil {
					return err
				}
				defer tx.Close()
				if _, err := upload(t, tx, next, answer, -1); err != nil {
					return err
				}
				if name, err = tx.Commit(t.Context()); err != nil {
					return err
				}
				compare(t, dir, "photos", name, next)
				return nil
			}
			first, err := attempt(), error(nil)
			if first != nil {
				err = attempt()
			}
			if tt.heals && err != nil || !tt.heals && first == nil {
				t.Errorf("first %v, then %v; heals %v", first, err, tt.heals)
			}
			// Nothing outside was made, read into a generation, changed or removed.
			left, readErr := os.ReadDir(outside)
			data, _ := os.ReadFile(secret)
			if readErr != nil || len(left) != 1 || string(data) != "secret\n" {
				t.Errorf("outside there is %v, %q, %v", left, data, readErr)
			}
			info, err := os.Stat(secret)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("the mode outside is %v, %v", info.Mode(), err)
			}
		})
	}
}
