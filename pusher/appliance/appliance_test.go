package appliance_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"farkeep/pusher/appliance"
	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/sshverb"
)

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start serves verbs as an appliance would, and returns the pusher's view of it.
func start(t *testing.T, exec sshverb.Handler) *appliance.Appliance {
	t.Helper()
	return startKnowing(t, exec)
}

// startKnowing starts one that can do more than the oldest.
func startKnowing(t *testing.T, exec sshverb.Handler, words ...string) *appliance.Appliance {
	t.Helper()
	host, identity := newSigner(t), newSigner(t)
	server := &sshverb.Server{
		HostKey:   host,
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Exec:      exec,
		Knows:     words,
		Log:       slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(ctx, l) }()
	a := appliance.New(appliance.Config{Name: "vault", Address: l.Addr().String(), HostKey: host.PublicKey(), Identity: identity, Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() {
		a.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return a
}

func list(text string) target.List {
	return target.List{Open: func(string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(text)), nil }}
}

func TestOffer(t *testing.T) {
	needed := manifest.NewSet(1000)
	for _, i := range []int64{0, 1, 2, 7, 999} {
		needed.Add(i)
	}
	var setBytes bytes.Buffer
	if _, err := needed.WriteTo(&setBytes); err != nil {
		t.Fatal(err)
	}
	const sendLine = `{"answer":"send","push":"p1","need":5,"need_bytes":9}` + "\n"
	tests := []struct {
		name          string
		first, second string // answers; "" ends the verb
		wantErr       string
		wantManifest  bool
		wantAnswer    string
	}{
		{"same", `{"answer":"same","generation":"000001-x"}` + "\n", "", "", false, pushwire.AnswerSame},
		{"send", `{"answer":"send-manifest"}` + "\n", sendLine + setBytes.String(), "", true, pushwire.AnswerSend},
		{"asks twice for the manifest", `{"answer":"send-manifest"}` + "\n", `{"answer":"send-manifest"}` + "\n", "no known answer", true, ""},
		{"nonsense", `{"answer":"bring money"}` + "\n", "", "no known answer", false, ""},
		{"unknown key", `{"answer":"same","please":1}` + "\n", "", "unknown field", false, ""},
		{"no answer", "", "", "without an answer", false, ""},
		{"endless line", strings.Repeat("x", pushwire.MaxLine+1), "", "no line end", false, ""},
		{"set cut", `{"answer":"send-manifest"}` + "\n", sendLine + setBytes.String()[:2], "needed files", true, ""},
		{"set that says something else", `{"answer":"send-manifest"}` + "\n", strings.Replace(sendLine, `"need":5`, `"need":6`, 1) + setBytes.String(), "are listed", true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			gotManifest := make(chan string, 1)
			a := start(t, func(_ context.Context, s *sshverb.Session) error {
				r := pushwire.NewReader(s.Stdin)
				var offer pushwire.Offer
				if err := pushwire.ReadLine(r, &offer); err != nil {
					return err
				}
				if diff := cmp.Diff(pushwire.Offer{Digest: "d", Entries: 1000, Kind: pushwire.KindFiles}, offer); diff != "" {
					t.Error(diff)
				}
				io.WriteString(s.Stdout, tt.first)
				if tt.second != "" {
					m, err := io.ReadAll(r)
					if err != nil {
						return err
					}
					gotManifest <- string(m)
					io.WriteString(s.Stdout, tt.second)
				}
				return nil
			})
			answer, err := a.Offer(t.Context(), "photos", pushwire.Offer{Digest: "d", Entries: 1000, Kind: pushwire.KindFiles}, list("the manifest"))
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("got %v; want %q", err, tt.wantErr)
				}
			} else if err != nil || answer.Answer != tt.wantAnswer {
				t.Errorf("got %+v, %v", answer, err)
			}
			if tt.wantManifest {
				if m := <-gotManifest; m != "the manifest" {
					t.Errorf("the manifest arrived as %q", m)
				}
			}
			if tt.wantAnswer == pushwire.AnswerSend && (answer.Needed.Len() != 5 || !answer.Needed.Has(999)) {
				t.Errorf("needed: %d", answer.Needed.Len())
			}
		})
	}
}

// A refusal that passes leaves the connection, and what else is at work on it, alone.
func TestRefusalBesideAnotherVerb(t *testing.T) {
	begun, release := make(chan bool), make(chan bool)
	a := start(t, func(_ context.Context, s *sshverb.Session) error {
		if s.Verb == "offer" {
			return &sshverb.Error{Code: hint.ExitUnreachable, Text: "the disk is dark"}
		}
		close(begun)
		<-release
		_, err := io.WriteString(s.Stdout, `{"state":"mounted","mounted":true}`+"\n")
		return err
	})
	woken := make(chan error)
	go func() { woken <- a.Wake(t.Context()) }()
	<-begun
	if _, err := a.Offer(t.Context(), "photos", pushwire.Offer{}, list("")); !target.Temporary(err) || !strings.Contains(err.Error(), "dark") {
		t.Errorf("offered in the dark: %v", err)
	}
	close(release)
	if err := <-woken; err != nil {
		t.Errorf("the wake beside it: %v", err)
	}
	if err := a.Wake(t.Context()); err != nil { // or the channel would be closed twice
		t.Errorf("known to be awake: %v", err)
	}
}

func TestRefusalInTheMiddleOfAnUpload(t *testing.T) {
	a := start(t, func(_ context.Context, s *sshverb.Session) error {
		io.CopyN(io.Discard, s.Stdin, 100)
		return &sshverb.Error{Code: hint.ExitFailure, Text: "entry 7: the hash does not match", Hint: "push again"}
	})
	_, err := a.Upload(t.Context(), "p1", func(w io.Writer) error {
		for {
			if _, err := w.Write(make([]byte, 1<<16)); err != nil {
				return err
			}
		}
	})
	if err == nil || !strings.Contains(err.Error(), "the hash does not match") || hint.Of(err) != "push again" || target.Temporary(err) {
		t.Errorf("got %v, hint %q", err, hint.Of(err))
	}
}

// What follows an upload is one line, and its answers are lines. An appliance that
// does not say that it knows such a line gets none.
func TestFinish(t *testing.T) {
	const uploaded, committed = `{"files":1,"bytes":3,"took":1,"waited":1}` + "\n", `{"generation":"000001-x"}` + "\n"
	tests := []struct {
		name         string
		older        bool
		answers      string
		end          error
		repositories int
		wantCommit   bool
		wantBeat     bool
		wantErr      string
		wantBeatErr  string
	}{
		{name: "all", answers: uploaded + committed + "{}\n", repositories: 1, wantCommit: true, wantBeat: true},
		{name: "more repositories than a line holds", answers: uploaded + committed, repositories: 1000, wantCommit: true},
		{name: "an older appliance", older: true, answers: uploaded, repositories: 1},
		{name: "an older appliance refuses the upload", older: true, end: sshverb.Refuse(nil, "a wrong file"), repositories: 1, wantErr: "a wrong file"},
		{name: "the upload is refused", end: sshverb.Refuse(nil, "a wrong file"), repositories: 1, wantErr: "a wrong file"},
		{name: "the commit is refused", answers: uploaded, end: sshverb.Refuse(nil, "files are missing"), repositories: 1, wantErr: "files are missing"},
		{name: "the heartbeat is refused", answers: uploaded + committed, end: sshverb.Refuse(nil, "not true"), repositories: 1, wantCommit: true, wantBeat: true, wantBeatErr: "not true"},
		{name: "no word of the commit", answers: uploaded, repositories: 1, wantErr: "without an answer"},
		{name: "no word of the heartbeat", answers: uploaded + committed, repositories: 1, wantCommit: true, wantBeat: true, wantBeatErr: "without an answer"},
		{name: "half an answer", answers: uploaded + committed[:9], repositories: 1, wantErr: "not an expected line"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := make(chan string, 1)
			words := []string{"something", pushwire.KnowsEnding}
			if tt.older {
				words = []string{"notthe" + pushwire.KnowsEnding}
			}
			a := startKnowing(t, func(_ context.Context, s *sshverb.Session) error {
				all, err := io.ReadAll(s.Stdin)
				if err != nil {
					return err
				}
				got <- string(all)
				io.WriteString(s.Stdout, tt.answers)
				return tt.end
			}, words...)
			beat := pushwire.Heartbeat{Host: "home"}
			for range tt.repositories {
				beat.Repositories = append(beat.Repositories, pushwire.RepositoryDigest{Name: "photos", Digest: strings.Repeat("0", 64)})
			}
			done, err := a.Finish(t.Context(), "photos/1", func(w io.Writer) error {
				_, err := io.WriteString(w, "the stream")
				return err
			}, target.Ending{
				Commit:    func() bool { return true },
				Heartbeat: func() pushwire.Heartbeat { return beat },
				Uploaded:  func(pushwire.UploadAnswer) {},
			})
			said := func(err error, want string) bool {
				return err == nil && want == "" || err != nil && want != "" && strings.Contains(err.Error(), want)
			}
			if !said(err, tt.wantErr) || !said(done.BeatErr, tt.wantBeatErr) || err == nil && ((done.Commit != nil) != tt.wantCommit || done.Beaten != tt.wantBeat) {
				t.Errorf("got %+v, %v; want %+v", done, err, tt)
			}
			line, ok := strings.CutPrefix(<-got, "the stream")
			if tt.older {
				if !ok || line != "" {
					t.Errorf("behind the stream came %.200q", line)
				}
				return
			}
			var ending pushwire.Ending
			if err := pushwire.ReadLine(pushwire.NewReader(strings.NewReader(line)), &ending); err != nil || !ok || ending.Commit != "photos/1" || (ending.Heartbeat != nil) != (tt.repositories == 1) {
				t.Errorf("behind the stream came %.200q, %v", line, err)
			}
		})
	}
}

func TestSourceErrorCutsTheUpload(t *testing.T) {
	cut := make(chan error, 1)
	a := start(t, func(ctx context.Context, s *sshverb.Session) error {
		_, err := io.Copy(io.Discard, s.Stdin)
		cut <- err
		return err
	})
	mine := errors.New("read segment 7: input/output error")
	_, err := a.Upload(t.Context(), "p1", func(w io.Writer) error {
		w.Write([]byte("half"))
		return mine
	})
	if !errors.Is(err, mine) {
		t.Errorf("got %v", err)
	}
	<-cut
}

func TestBrokenLineIsTemporaryAndReconnects(t *testing.T) {
	calls := make(chan struct{}, 2)
	calls <- struct{}{}
	a := start(t, func(_ context.Context, s *sshverb.Session) error {
		select {
		case <-calls:
			s.ReadWriteCloser().Close() // no exit status: as if the line broke
			return nil
		default:
			io.WriteString(s.Stdout, `{"generation":"000002-x"}`+"\n")
			return nil
		}
	})
	if _, err := a.Commit(t.Context(), "p1"); !target.Temporary(err) {
		t.Errorf("got %v, which is not temporary", err)
	}
	answer, err := a.Commit(t.Context(), "p1")
	if err != nil || answer.Generation != "000002-x" {
		t.Errorf("got %+v, %v", answer, err)
	}
}

func TestWake(t *testing.T) {
	state := `{"state":"failed","error":"the key server at home refused"}`
	a := start(t, func(_ context.Context, s *sshverb.Session) error {
		if s.Verb != "wake" || !strings.HasPrefix(s.Args[0], "--wait=") {
			t.Errorf("verb %s %v", s.Verb, s.Args)
		}
		io.WriteString(s.Stdout, state+"\n")
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := a.Wake(ctx); !target.Temporary(err) || !strings.Contains(err.Error(), "key server at home refused") {
		t.Errorf("got %v", err)
	}
	state = `{"state":"mounted","mounted":true}`
	if err := a.Wake(ctx); err != nil {
		t.Error(err)
	}
}

func TestUnreachableAppliance(t *testing.T) {
	a := appliance.New(appliance.Config{Name: "vault", Address: "127.0.0.1:1", HostKey: newSigner(t).PublicKey(), Identity: newSigner(t), Log: slog.New(slog.DiscardHandler)})
	if _, err := a.Status(t.Context()); !target.Temporary(err) || !strings.Contains(err.Error(), "appliance vault: ") {
		t.Errorf("got %v", err)
	}
}
