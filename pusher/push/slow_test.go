package push

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/pusher/directory"
	"farkeep/pusher/target"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

// hands is a clock that only tests move.
type hands struct {
	mu  sync.Mutex
	now time.Time
}

func (h *hands) Now() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

func (h *hands) move(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

func (h *hands) sleep(_ context.Context, d time.Duration) error {
	h.move(d)
	return nil
}

// far is a target at the other end of a line, which answers an upload as it likes.
type far struct {
	*wrapped
	answer func(*pushwire.UploadAnswer)
}

func (f *far) Far() bool { return true }

func (f *far) Upload(ctx context.Context, push string, write func(io.Writer) error) (pushwire.UploadAnswer, error) {
	got, err := f.wrapped.Upload(ctx, push, write)
	if f.answer != nil {
		f.answer(&got)
	}
	return got, err
}

// slowLog moves the clock when a certain line is logged.
type slowLog struct {
	slog.Handler
	at   string
	move func()
}

func (l slowLog) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == l.at {
		l.move()
	}
	return l.Handler.Handle(ctx, r)
}

// What a push waited for most is named, by a clock that moves only there.
func TestWhySlow(t *testing.T) {
	content := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{5}).Read(content)
	tests := []struct {
		name string
		set  func(h *hands, f *far, p *Push)
		want string
	}{
		{"quick", func(*hands, *far, *Push) {}, ""},
		{"source", func(h *hands, _ *far, p *Push) {
			p.Log = slog.New(slowLog{p.Log.Handler(), "listed", func() { h.move(time.Hour) }})
		}, "100 % of 2h0m0s reading the source"}, // before the upload, and again after it
		{"line", func(h *hands, f *far, _ *Push) {
			f.onUpload = func(w io.Writer) io.Writer {
				return writerFunc(func(b []byte) (int, error) {
					h.move(10 * time.Minute)
					return w.Write(b)
				})
			}
		}, "waiting for the line ("},
		{"target", func(h *hands, f *far, _ *Push) {
			f.onUpload = func(w io.Writer) io.Writer {
				return writerFunc(func(b []byte) (int, error) {
					h.move(10 * time.Minute)
					return w.Write(b)
				})
			}
			// It was never waited for: while the clock moved, it worked.
			f.answer = func(a *pushwire.UploadAnswer) { a.Waited = a.Took / 10 }
		}, "waiting for the target's disk and processor"},
		{"commit", func(h *hands, f *far, _ *Push) {
			f.commit = func() error { h.move(7 * time.Minute); return nil }
		}, "100 % of 7m0s waiting for the target's disk and processor"},
		{"limit", func(_ *hands, _ *far, p *Push) {
			p.Rate = func(string, time.Time) int64 { return 4 << 10 }
		}, "waiting for the rate limit of 4.00 KiB/s"},
		{"cut", func(h *hands, f *far, p *Push) {
			cuts := 0
			f.commit = func() error {
				if cuts++; cuts == 1 {
					h.move(time.Minute)
					return errLine
				}
				return nil
			}
			p.sleep = func(context.Context, time.Duration) error { h.move(20 * time.Minute); return nil }
		}, "95 % of 21m0s waiting for the target to be there"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			tree := t.TempDir()
			if err := os.WriteFile(filepath.Join(tree, "noise"), content, 0o644); err != nil {
				t.Fatal(err)
			}
			b.site = &site.Site{Repositories: []site.Repository{{Name: "papers", Path: tree}}}
			h := &hands{now: time.Unix(1e9, 0)}
			d := directory.New(directory.Config{Name: "vault", Path: t.TempDir(), Pusher: "home", Now: h.Now, Log: b.log})
			t.Cleanup(func() { d.Close() })
			f := &far{wrapped: &wrapped{Target: d}}
			b.targets = []target.Target{f}
			report := b.mustPush(func(p *Push) {
				p.Now, p.sleep = h.Now, h.sleep
				tt.set(h, f, p)
			})
			if got := report.Outcomes[0].Slow; tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
				t.Errorf("%q; want %q", got, tt.want)
			}
		})
	}
}

// A file that compresses goes compressed to a far target, if the line is slower than
// that, and to no other; what crossed and what did not is told.
func TestPackWhereItPays(t *testing.T) {
	text := strings.Repeat("the quick brown fox jumps over the lazy dog. ", 500_000)
	for _, tt := range []struct {
		name        string
		far         bool
		wait        time.Duration // for each write
		least, most int64         // bytes that cross
	}{
		{"folder", false, 50 * time.Millisecond, int64(len(text)), int64(len(text))},
		{"slow line", true, 50 * time.Millisecond, 1, 1 << 20},
		{"fast line", true, 0, int64(len(text)) - 8<<20, int64(len(text))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			tree, disk := t.TempDir(), t.TempDir()
			// Before it, some that does not compress.
			noise := make([]byte, 5<<20)
			rand.NewChaCha8([32]byte{6}).Read(noise)
			for name, content := range map[string][]byte{"a": noise, "text": []byte(text)} {
				if err := os.WriteFile(filepath.Join(tree, name), content, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			b.site = &site.Site{Repositories: []site.Repository{{Name: "papers", Path: tree}}}
			h := &hands{now: time.Unix(1e9, 0)}
			w := b.wrapped(disk)
			crossed := int64(0)
			w.onUpload = func(out io.Writer) io.Writer {
				return writerFunc(func(p []byte) (int, error) {
					h.move(tt.wait)
					crossed += int64(len(p))
					return out.Write(p)
				})
			}
			if tt.far {
				b.targets = []target.Target{&far{wrapped: w}}
			}
			o := b.mustPush(func(p *Push) { p.Now, p.sleep = h.Now, h.sleep }).Outcomes[0]
			if all := int64(len(text) + len(noise)); o.Bytes+o.Spared != all || crossed < o.Bytes || crossed > o.Bytes+1000 {
				t.Errorf("%d bytes of %d sent, %d spared; %d crossed", o.Bytes, all, o.Spared, crossed)
			}
			if n := o.Bytes - int64(len(noise)); n < tt.least || n > tt.most {
				t.Errorf("%d bytes crossed for %d of text, want %d to %d", n, len(text), tt.least, tt.most)
			}
			got, err := os.ReadFile(filepath.Join(files(disk, "papers", o.Generation), "text"))
			if err != nil || !bytes.Equal(got, []byte(text)) {
				t.Errorf("the text came out as %d bytes, %v", len(got), err)
			}
		})
	}
}
