// Package targettest is the test that every target of package target passes.
package targettest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"farkeep/pusher/target"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
)

// tree is a repository in memory: content by path. Folders are not in it but
// for those that the paths imply: one level, which is enough.
type tree map[string]string

// list makes the manifest, and the content of each of its entries.
func (tr tree) list(t testing.TB) (offer pushwire.Offer, encoded []byte, entries []manifest.Entry) {
	t.Helper()
	var names []string
	for name := range tr {
		names = append(names, name)
	}
	for i := range names {
		for j := i + 1; j < len(names); j++ {
			if manifest.ComparePaths(names[i], names[j]) > 0 {
				names[i], names[j] = names[j], names[i]
			}
		}
	}
	for _, name := range names {
		h := manifest.NewHash()
		io.WriteString(h, tr[name])
		entries = append(entries, manifest.Entry{Path: name, Kind: manifest.File, Mode: 0o644, Size: int64(len(tr[name])), Sum: manifest.SumOf(h)})
	}
	var b bytes.Buffer
	m := manifest.NewWriter(&b)
	for _, e := range entries {
		if err := m.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	s, err := m.Close()
	if err != nil {
		t.Fatal(err)
	}
	return pushwire.Offer{Digest: s.Digest.String(), Entries: s.Entries, Bytes: s.Bytes, Kind: pushwire.KindFiles}, b.Bytes(), entries
}

type push struct {
	target.Answer
	entries []manifest.Entry
	tree    tree
	listed  int // how often the manifest was asked for
}

func offer(t testing.TB, to target.Target, repository string, tr tree) *push {
	t.Helper()
	o, encoded, entries := tr.list(t)
	p := &push{entries: entries, tree: tr}
	var err error
	p.Answer, err = to.Offer(t.Context(), repository, o, target.List{Open: func(string) (io.ReadCloser, error) {
		p.listed++
		return io.NopCloser(bytes.NewReader(encoded)), nil
	}})
	if err != nil {
		t.Fatalf("offer: %v", err)
	}
	return p
}

// write sends the needed files; content may alter what is sent of a file.
func (p *push) write(w io.Writer, content func(path, right string) string) error {
	e := recipe.NewEncoder(w)
	for i := range p.Needed.All() {
		entry := p.entries[i]
		if err := e.File(i); err != nil {
			return err
		}
		if _, err := io.WriteString(e, content(entry.Path, p.tree[entry.Path])); err != nil {
			return err
		}
		if err := e.End(entry.Sum); err != nil {
			return err
		}
	}
	return e.Close()
}

func right(_, content string) string { return content }

func (p *push) paths() []string {
	var all []string
	if p.Needed == nil {
		return nil
	}
	for i := range p.Needed.All() {
		all = append(all, p.entries[i].Path)
	}
	return all
}

func deliver(t testing.TB, to target.Target, repository string, tr tree) string {
	t.Helper()
	p := offer(t, to, repository, tr)
	if p.Answer.Answer != pushwire.AnswerSend {
		t.Fatalf("answer %q", p.Answer.Answer)
	}
	if p.Needed.Len() > 0 {
		if _, err := to.Upload(t.Context(), p.Push, func(w io.Writer) error { return p.write(w, right) }); err != nil {
			t.Fatalf("upload: %v", err)
		}
	}
	c, err := to.Commit(t.Context(), p.Push)
	if err != nil || c.Generation == "" {
		t.Fatalf("commit: %+v %v", c, err)
	}
	return c.Generation
}

// Run tests the targets that open makes, each with an empty store.
func Run(t *testing.T, open func(t *testing.T) target.Target) {
	awake := func(t *testing.T) target.Target {
		to := open(t)
		t.Cleanup(func() { to.Close() })
		if err := to.Wake(t.Context()); err != nil {
			t.Fatalf("wake: %v", err)
		}
		return to
	}
	home := tree{"a": "one", "b": "two", "c": "three"}

	t.Run("PushAndSame", func(t *testing.T) {
		to := awake(t)
		if to.Name() == "" {
			t.Error("it has no name")
		}
		first := deliver(t, to, "photos", home)
		again := offer(t, to, "photos", home)
		if again.Answer.Answer != pushwire.AnswerSame || again.Generation != first || again.listed != 0 {
			t.Errorf("unchanged: %+v, manifest asked for %d times", again.OfferAnswer, again.listed)
		}
		changed := tree{"a": "one", "b": "other", "d": "three"}
		p := offer(t, to, "photos", changed)
		if got := fmt.Sprint(p.paths()); got != "[b d]" && got != "[b]" {
			t.Errorf("needed after a change: %s", got)
		}
		second := deliver(t, to, "photos", changed)
		if second == first {
			t.Errorf("second generation is called %s too", second)
		}
		// What was once committed is news again, but its files need not travel unless
		// they are gone from the newest generation.
		back := offer(t, to, "photos", home)
		if back.Answer.Answer != pushwire.AnswerSend {
			t.Errorf("an older state: %+v", back.OfferAnswer)
		}
	})

	// A manifest that comes before it is asked for is taken as if it had been, and
	// harms nothing where it is not.
	t.Run("ManifestAhead", func(t *testing.T) {
		to := awake(t)
		listed := 0
		ahead := func(tr tree) target.Answer {
			t.Helper()
			o, encoded, _ := tr.list(t)
			answer, err := to.Offer(t.Context(), "photos", o, target.List{Ahead: encoded, Open: func(string) (io.ReadCloser, error) {
				listed++
				return io.NopCloser(bytes.NewReader(encoded)), nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			return answer
		}
		if a := ahead(home); a.Answer != pushwire.AnswerSend || a.Needed.Len() != 3 {
			t.Fatalf("%+v", a.OfferAnswer)
		}
		deliver(t, to, "photos", home)
		long := tree{}
		for i := range 2000 {
			long[fmt.Sprintf("%04d", i)] = "the same"
		}
		deliver(t, to, "photos", long)
		for range 3 {
			if a := ahead(long); a.Answer != pushwire.AnswerSame {
				t.Fatalf("unchanged: %+v", a.OfferAnswer)
			}
		}
		// One that is not the offer's is refused, as always.
		o, _, _ := tree{"x": "y"}.list(t)
		_, other, _ := home.list(t)
		whole := func(string) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(other)), nil }
		if a, err := to.Offer(t.Context(), "photos", o, target.List{Ahead: other, Open: whole}); err == nil || target.Temporary(err) {
			t.Errorf("another manifest than the offer's: %+v, %v", a.OfferAnswer, err)
		}
		deliver(t, to, "photos", home)
	})

	t.Run("CommitNeedsTheUpload", func(t *testing.T) {
		to := awake(t)
		p := offer(t, to, "photos", home)
		if _, err := to.Commit(t.Context(), p.Push); err == nil {
			t.Error("a push without its files was committed")
		}
	})

	t.Run("CommitAgain", func(t *testing.T) {
		to := awake(t)
		p := offer(t, to, "photos", home)
		if _, err := to.Upload(t.Context(), p.Push, func(w io.Writer) error { return p.write(w, right) }); err != nil {
			t.Fatal(err)
		}
		one, err := to.Commit(t.Context(), p.Push)
		if err != nil {
			t.Fatal(err)
		}
		two, err := to.Commit(t.Context(), p.Push)
		if err != nil || one.Generation != two.Generation {
			t.Errorf("commit repeated: %q and %q, %v", one.Generation, two.Generation, err)
		}
	})

	t.Run("WriterFails", func(t *testing.T) {
		to := awake(t)
		p := offer(t, to, "photos", home)
		ours := errors.New("ours")
		_, err := to.Upload(t.Context(), p.Push, func(w io.Writer) error {
			io.WriteString(w, "FKRECIP1F")
			return ours
		})
		if !errors.Is(err, ours) {
			t.Errorf("an error of the writer came back as %v", err)
		}
		deliver(t, to, "photos", home)
	})

	t.Run("WrongContent", func(t *testing.T) {
		to := awake(t)
		p := offer(t, to, "photos", home)
		_, err := to.Upload(t.Context(), p.Push, func(w io.Writer) error {
			return p.write(w, func(path, right string) string {
				if path == "b" {
					return "tw0"
				}
				return right
			})
		})
		if err == nil {
			t.Fatal("wrong bytes were taken")
		}
		if target.Temporary(err) {
			t.Errorf("wrong bytes are taken for a cut line: %v", err)
		}
		if again := offer(t, to, "photos", home); again.Answer.Answer != pushwire.AnswerSend || !again.Needed.Has(1) {
			t.Errorf("after wrong bytes: %+v %v", again.OfferAnswer, again.paths())
		}
		deliver(t, to, "photos", home)
	})

	// Step by step or in one go, a push ends the same.
	t.Run("Finish", func(t *testing.T) {
		to := awake(t)
		f, ok := to.(target.Finisher)
		if !ok {
			return // it is called step by step, which the others test
		}
		type ended struct {
			target.Finished
			uploaded int64 // files, as the upload's answer says; -1: there was none
		}
		finish := func(tr tree, commit bool, write func(*push, io.Writer) error, beat func(*pushwire.Heartbeat)) (p *push, e ended, err error) {
			t.Helper()
			p, e.uploaded = offer(t, to, "photos", tr), -1
			if p.Answer.Answer != pushwire.AnswerSend {
				t.Fatalf("answer %q", p.Answer.Answer)
			}
			wrote := false
			end := target.Ending{
				Commit: func() bool {
					if !wrote || e.uploaded >= 0 {
						t.Error("asked for the commit before the last byte went out, or after the answer to it")
					}
					return commit
				},
				Uploaded: func(got pushwire.UploadAnswer) { e.uploaded = got.Files },
			}
			if beat != nil {
				end.Heartbeat = func() pushwire.Heartbeat {
					o, _, _ := tr.list(t)
					h := pushwire.Heartbeat{Host: "home", At: time.Now().UTC(), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}}
					beat(&h)
					return h
				}
			}
			e.Finished, err = f.Finish(t.Context(), p.Push, func(w io.Writer) error {
				wrote = true
				return write(p, w)
			}, end)
			return p, e, err
		}
		whole := func(p *push, w io.Writer) error { return p.write(w, right) }
		nothing := func(_ *push, w io.Writer) error { return recipe.NewEncoder(w).Close() }
		honest := func(*pushwire.Heartbeat) {}

		_, e, err := finish(home, true, whole, honest)
		if err != nil || e.uploaded != 3 || e.Commit == nil || e.Commit.Generation == "" || !e.Beaten || e.BeatErr != nil {
			t.Fatalf("all in one: %+v, %v", e, err)
		}
		if again := offer(t, to, "photos", home); again.Answer.Answer != pushwire.AnswerSame || again.Generation != e.Commit.Generation {
			t.Errorf("after all in one: %+v", again.OfferAnswer)
		}
		if _, e, err = finish(tree{"a": "one"}, true, nothing, nil); err != nil || e.uploaded != 0 || e.Commit == nil || e.Beaten {
			t.Errorf("nothing to upload, and no heartbeat: %+v, %v", e, err)
		}
		_, e, err = finish(home, true, whole, func(h *pushwire.Heartbeat) { h.Repositories[0].Digest = manifest.Sum{}.String() })
		if err != nil || e.Commit == nil || !e.Beaten || e.BeatErr == nil || target.Temporary(e.BeatErr) {
			t.Errorf("a heartbeat that is not true: %+v, %v", e, err)
		}

		// What is refused changes nothing, and the next goes on as if it had not been.
		last := e.Commit.Generation
		next := tree{"a": "another", "b": "two"}
		p, e, err := finish(next, false, whole, honest)
		if err != nil || e.uploaded != 1 || e.Commit != nil || e.Beaten {
			t.Errorf("no commit: %+v, %v", e, err)
		}
		if c, err := to.Commit(t.Context(), p.Push); err != nil || c.Generation == last {
			t.Errorf("a commit by itself after that: %+v, %v", c, err)
		}
		ours := errors.New("ours")
		if _, e, err = finish(home, true, func(*push, io.Writer) error { return ours }, honest); !errors.Is(err, ours) || e.Commit != nil {
			t.Errorf("an error of the writer: %+v, %v", e, err)
		}
		if _, e, err = finish(home, true, nothing, honest); err == nil || target.Temporary(err) || e.uploaded != 0 || e.Commit != nil {
			t.Errorf("a commit of what was not uploaded: %+v, %v", e, err)
		}
		wrong := func(p *push, w io.Writer) error {
			return p.write(w, func(_, right string) string { return right + "!" })
		}
		if _, e, err = finish(home, true, wrong, honest); err == nil || target.Temporary(err) || e.uploaded != -1 || e.Commit != nil {
			t.Errorf("wrong content: %+v, %v", e, err)
		}
		deliver(t, to, "photos", home)
	})

	t.Run("Abort", func(t *testing.T) {
		to := awake(t)
		p := offer(t, to, "photos", home)
		if err := to.Abort(t.Context(), p.Push); err != nil {
			t.Fatal(err)
		}
		if _, err := to.Upload(t.Context(), p.Push, func(w io.Writer) error { return p.write(w, right) }); err == nil {
			t.Error("an aborted push took files")
		}
		deliver(t, to, "photos", home)
	})

	t.Run("Heartbeat", func(t *testing.T) {
		to := awake(t)
		deliver(t, to, "photos", home)
		o, _, _ := home.list(t)
		beat := pushwire.Heartbeat{Host: "home", At: time.Now().UTC(), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}}
		if err := to.Heartbeat(t.Context(), beat); err != nil {
			t.Errorf("a true heartbeat: %v", err)
		}
		other, _, _ := tree{"x": "y"}.list(t)
		for name, r := range map[string]pushwire.RepositoryDigest{
			"another digest":     {Name: "photos", Digest: other.Digest},
			"another repository": {Name: "music", Digest: o.Digest},
			"no digest":          {Name: "photos", Digest: "zz"},
		} {
			beat.Repositories = []pushwire.RepositoryDigest{r}
			if err := to.Heartbeat(t.Context(), beat); err == nil {
				t.Errorf("heartbeat with %s was believed", name)
			}
		}
	})

	t.Run("BadOffers", func(t *testing.T) {
		to := awake(t)
		good, encoded, _ := home.list(t)
		list := target.List{Open: func(string) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(encoded)), nil }}
		wrong := good
		wrong.Entries++
		for _, c := range []struct {
			name, repository string
			offer            pushwire.Offer
		}{
			{"a name that leads out", "../photos", good},
			{"no name", "", good},
			{"another count than the manifest's", "photos", wrong},
			{"no digest", "photos", pushwire.Offer{Entries: 1, Kind: pushwire.KindFiles}},
			{"10^9 entries", "photos", pushwire.Offer{Digest: good.Digest, Entries: 1e9, Kind: pushwire.KindFiles}},
		} {
			if a, err := to.Offer(t.Context(), c.repository, c.offer, list); err == nil {
				t.Errorf("%s: answered %q", c.name, a.Answer)
			}
		}
	})

	t.Run("Status", func(t *testing.T) {
		to := awake(t)
		name := deliver(t, to, "photos", home)
		s, err := to.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Repositories) != 1 || s.Repositories[0].Name != "photos" || s.Repositories[0].Newest != name || s.Repositories[0].Generations != 1 {
			t.Errorf("repositories: %+v", s.Repositories)
		}
	})
}
