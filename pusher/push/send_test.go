package push

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

// finisher takes a push in one go, step by step on a folder, and a test interferes
// with the steps.
type finisher struct {
	*wrapped
	steps  []string
	older  bool                    // it knows only one step at a time
	before func(step string) error // ends Finish in front of "upload", "commit" and "heartbeat"
	after  func(step string) error // ends it behind them: the answer is lost
}

func (f *finisher) Commit(ctx context.Context, push string) (pushwire.CommitAnswer, error) {
	f.steps = append(f.steps, "a commit by itself")
	return f.wrapped.Commit(ctx, push)
}

func (f *finisher) Heartbeat(ctx context.Context, h pushwire.Heartbeat) error {
	f.steps = append(f.steps, "a heartbeat by itself")
	return f.wrapped.Heartbeat(ctx, h)
}

func (f *finisher) Finish(ctx context.Context, push string, write func(io.Writer) error, end target.Ending) (done target.Finished, err error) {
	step := func(name string, do func() error) error {
		if f.before != nil {
			if err := f.before(name); err != nil {
				return err
			}
		}
		f.steps = append(f.steps, name)
		err := do()
		if err == nil && f.after != nil {
			err = f.after(name)
		}
		return err
	}
	commit := false
	var got pushwire.UploadAnswer
	err = step("upload", func() (err error) {
		got, err = f.Upload(ctx, push, func(w io.Writer) error {
			if err := write(w); err != nil {
				return err
			}
			commit = end.Commit()
			return nil
		})
		return err
	})
	if err != nil {
		return done, err
	}
	end.Uploaded(got)
	if !commit || f.older {
		return done, nil
	}
	var made pushwire.CommitAnswer
	err = step("commit", func() (err error) {
		made, err = f.wrapped.Commit(ctx, push)
		return err
	})
	if err != nil {
		return done, err
	}
	done.Commit = &made
	if end.Heartbeat != nil {
		done.Beaten = true
		done.BeatErr = step("heartbeat", func() error { return f.wrapped.Heartbeat(ctx, end.Heartbeat()) })
	}
	return done, nil
}

// plain makes a site of two folders of files, and a target that takes them in one go.
func (b *bench) plain() (f *finisher, homes [2]string) {
	b.t.Helper()
	b.site.Folders = nil
	f = &finisher{wrapped: b.wrapped(b.t.TempDir())}
	b.targets[0] = f
	for i, name := range []string{"music", "photos"} {
		homes[i] = b.t.TempDir()
		if err := os.WriteFile(filepath.Join(homes[i], "a"), []byte(name), 0o600); err != nil {
			b.t.Fatal(err)
		}
		b.site.Repositories = append(b.site.Repositories, site.Repository{Name: name, Path: homes[i]})
	}
	return f, homes
}

var errCut = hint.Exit(hint.ExitUnreachable, errors.New("the line was cut"))

func TestPushInOneGo(t *testing.T) {
	refused := hint.Exit(hint.ExitRefused, errors.New("refused"))
	all := []string{"upload", "commit", "upload", "commit", "heartbeat"}
	once := func(step string, nth int, err error) func(string) error {
		return func(s string) error {
			if s == step {
				if nth--; nth == 0 {
					return err
				}
			}
			return nil
		}
	}
	tests := []struct {
		name      string
		interfere func(f *finisher)
		steps     []string
		failed    string // repository
		sent      bool
	}{
		{"all is well", func(*finisher) {}, all, "", true},
		{"an older target", func(f *finisher) { f.older = true },
			[]string{"upload", "a commit by itself", "upload", "a commit by itself", "a heartbeat by itself"}, "", true},
		{"a commit is refused", func(f *finisher) {
			f.before = func(step string) error {
				if step == "commit" && len(f.steps) > 2 {
					return refused
				}
				return nil
			}
		}, []string{"upload", "commit", "upload", "upload"}, "photos", false},
		{"an earlier repository is refused", func(f *finisher) {
			f.before = func(step string) error {
				if step == "commit" && len(f.steps) < 3 {
					return refused
				}
				return nil
			}
		}, []string{"upload", "upload", "upload", "commit"}, "music", false},
		{"the line is cut before the commit", func(f *finisher) { f.before = once("commit", 2, errCut) },
			[]string{"upload", "commit", "upload", "upload", "commit", "heartbeat"}, "", true},
		{"the answer to the commit is lost", func(f *finisher) { f.after = once("commit", 2, errCut) },
			[]string{"upload", "commit", "upload", "commit", "a heartbeat by itself"}, "", true},
		{"the answer to the heartbeat is lost", func(f *finisher) { f.after = once("heartbeat", 1, errCut) },
			append(all, "a heartbeat by itself"), "", true},
		{"the heartbeat is refused", func(f *finisher) { f.before = once("heartbeat", 1, refused) }, all[:4], "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			f, _ := b.plain()
			tt.interfere(f)
			r := b.push()
			if diff := cmp.Diff(tt.steps, f.steps); diff != "" {
				t.Errorf("steps (-want +got):\n%s", diff)
			}
			for _, o := range r.Outcomes {
				if (o.Err != nil) != (o.Repository == tt.failed) || o.Err == nil && (!o.New || o.Generation == "" || o.Files != 1) {
					t.Errorf("%s: %+v, %v", o.Repository, o, o.Err)
				}
			}
			if len(r.Beats) != 1 || r.Beats[0].Sent != tt.sent || tt.sent != (len(f.beats) > 0) {
				t.Errorf("heartbeats: %+v, %d told", r.Beats, len(f.beats))
			}
			if err := r.Err(); (err == nil) != (tt.sent && tt.failed == "") {
				t.Errorf("the run ended with %v", err)
			}
			f.before, f.after, f.steps = nil, nil, nil
			b.mustPush()
			s, err := f.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, repo := range s.Repositories {
				if repo.Generations != 1 {
					t.Errorf("%s has %d generations", repo.Name, repo.Generations)
				}
			}
		})
	}
}

// What changed while it went out is not committed behind its upload.
func TestChangesDuringAnUploadInOneGo(t *testing.T) {
	b := newBench(t)
	f, homes := b.plain()
	changed := false
	f.onUpload = func(w io.Writer) io.Writer {
		if !changed {
			changed = true
			if err := os.WriteFile(filepath.Join(homes[0], "b"), []byte("it came meanwhile"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return w
	}
	r := b.mustPush()
	want := []string{"upload", "upload", "commit", "upload", "commit", "heartbeat"}
	if diff := cmp.Diff(want, f.steps); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	if o := r.Outcomes[0]; o.Files != 2 {
		t.Errorf("%+v", o)
	}
}

// A look that takes long does not hold up the target, is taken once, and is waited for.
func TestCheckingIsTakenOnce(t *testing.T) {
	go1, looks := make(chan struct{}), 0
	wrong := &ChangedError{"x"}
	c := &checking{look: func() error {
		looks++
		<-go1
		return wrong
	}}
	if c.within(time.Millisecond) {
		t.Error("a look that goes on was over")
	}
	close(go1)
	if err := c.wait(); err != wrong {
		t.Errorf("got %v", err)
	}
	c.settle()
	if !c.within(time.Minute) || c.err != wrong || looks != 1 {
		t.Errorf("%d looks, %v", looks, c.err)
	}
}
