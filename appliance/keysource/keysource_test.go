package keysource_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"farkeep/appliance/keysource"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

const uuid = "b64e6fbb-11a0-42e1-b7f1-32adde77f805"

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

// fake is a key server in memory.
type fake struct {
	name  string
	delay time.Duration
	key   string
	err   error
	late  bool // the answer was under way when it was called off
	token keywire.Token
	given secret.Bytes
	asked keywire.Request
}

func (f *fake) String() string { return f.name }

func (f *fake) ID() string { return "id of " + f.name }

func (f *fake) Key(ctx context.Context, r keywire.Request) (keysource.Grant, error) {
	f.asked = r
	select {
	case <-ctx.Done():
		if !f.late {
			return keysource.Grant{}, ctx.Err()
		}
	case <-time.After(f.delay):
	}
	if f.err != nil {
		return keysource.Grant{}, f.err
	}
	f.given = secret.New([]byte(f.key))
	return keysource.Grant{Key: f.given, Token: f.token}, nil
}

// request is what Find asks a source: each has a token of its own.
func request(s keysource.Source) keywire.Request {
	return keywire.Request{Verb: keywire.Key, UUID: uuid, Token: keywire.Token("old-" + strings.ReplaceAll(s.ID(), " ", "-"))}
}

func TestFind(t *testing.T) {
	const forever = time.Hour
	refused := errors.Join(keysource.ErrRefused, errors.New("revoked"))
	down := errors.New("connection refused")
	broken := errors.New("no such device")
	for _, tc := range []struct {
		name    string
		sources []*fake
		accept  error
		want    string // the source whose key is taken
		err     error
		within  time.Duration
	}{
		{"one", []*fake{{name: "a", key: "right"}}, nil, "a", nil, 0},
		{"first down", []*fake{{name: "a", err: down}, {name: "b", key: "right"}}, nil, "b", nil, 0},
		{"first hangs", []*fake{{name: "a", delay: forever}, {name: "b", key: "right"}}, nil, "b", nil, keysource.Stagger},
		{"three hang", []*fake{{name: "a", delay: forever}, {name: "b", delay: forever}, {name: "c", delay: forever}, {name: "d", key: "right"}}, nil, "d", nil, 3 * keysource.Stagger},
		{"first slow, still first", []*fake{{name: "a", delay: 2 * time.Second, key: "right"}, {name: "b", key: "right"}}, nil, "a", nil, 2 * time.Second},
		{"first lies", []*fake{{name: "a", key: "wrong"}, {name: "b", key: "right"}}, nil, "b", nil, 0},
		{"first refuses", []*fake{{name: "a", err: refused}, {name: "b", key: "right"}}, nil, "b", nil, 0},
		{"all down", []*fake{{name: "a", err: down}, {name: "b", err: down}}, nil, "", keysource.ErrUnreachable, 0},
		{"one refuses, one is down", []*fake{{name: "a", err: refused}, {name: "b", err: down}}, nil, "", keysource.ErrRefused, 0},
		{"one lies, one refuses", []*fake{{name: "a", key: "wrong"}, {name: "b", err: refused}}, nil, "", keysource.ErrWrongKey, 0},
		{"none", nil, nil, "", keysource.ErrUnreachable, 0},
		{"disk broken", []*fake{{name: "a", key: "right"}, {name: "b", key: "right"}}, broken, "", broken, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var sources []keysource.Source
				for _, f := range tc.sources {
					sources = append(sources, f)
				}
				begin := time.Now()
				got, err := keysource.Find(t.Context(), logger(t), sources, keysource.Stagger, request, func(_ keysource.Source, key secret.Bytes) error {
					if tc.accept == nil && string(key.Reveal()) != "right" {
						return keysource.ErrWrongKey
					}
					return tc.accept
				})
				name := ""
				if got.From != nil {
					name = got.From.String()
				}
				if name != tc.want || !errors.Is(err, tc.err) {
					t.Errorf("got %q, %v; want %q, %v", name, err, tc.want, tc.err)
				}
				if took := time.Since(begin); took != tc.within {
					t.Errorf("took %v, want %v", took, tc.within)
				}
				for _, f := range tc.sources {
					if strings.Trim(string(f.given.Reveal()), "\x00") != "" {
						t.Errorf("the key of %s was not wiped", f.name)
					}
				}
			})
		})
	}
}

func TestFindCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := keysource.Find(ctx, logger(t), []keysource.Source{&fake{name: "a", delay: time.Hour}}, keysource.Stagger, request, nil)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// server runs a key server's SSH side with the given handler and returns how to
// reach it and whom it lets in.
func server(t *testing.T, h sshverb.Handler) (settings.KeyServer, ssh.Signer) {
	t.Helper()
	hostPrivate, hostPublic := newIdentity(t)
	clientPrivate, _ := newIdentity(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sshverb.Server{
		HostKey: hostPrivate,
		Authorise: func(key ssh.PublicKey, _ net.Addr) (*ssh.Permissions, error) {
			if !bytes.Equal(key.Marshal(), clientPrivate.PublicKey().Marshal()) {
				return nil, errors.New("unknown")
			}
			return &ssh.Permissions{}, nil
		},
		Exec: h,
		Log:  logger(t),
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-done })
	return settings.KeyServer{Name: "home", Address: l.Addr().String(), HostKey: hostPublic}, clientPrivate
}

func newIdentity(t *testing.T) (ssh.Signer, string) {
	t.Helper()
	private, public, err := identity.New("test")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := identity.Signer(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer, public
}

// deadLine forwards one connection to address, and nothing that comes back from
// there once dead is closed.
func deadLine(t *testing.T, address string, dead <-chan struct{}) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		near, err := l.Accept()
		if err != nil {
			return
		}
		defer near.Close()
		far, err := net.Dial("tcp", address)
		if err != nil {
			return
		}
		defer far.Close()
		go func() {
			buf := make([]byte, 4096)
			for {
				n, err := far.Read(buf)
				if err != nil {
					return
				}
				select {
				case <-dead:
				default:
					near.Write(buf[:n])
				}
			}
		}()
		io.Copy(far, near)
	}()
	return l.Addr().String()
}

func TestServer(t *testing.T) {
	key := bytes.Repeat([]byte{0, '\n', 0xff, 'k'}, 16)
	give := func(b []byte) sshverb.Handler {
		return func(_ context.Context, s *sshverb.Session) error {
			if s.Verb != "key" || len(s.Args) != 1 || s.Args[0] != uuid {
				return errors.New("unexpected verb")
			}
			_, err := s.Stdout.Write(b)
			return err
		}
	}
	ask := func(t *testing.T, s settings.KeyServer, id ssh.Signer) (secret.Bytes, error) {
		t.Helper()
		src, err := keysource.NewServer(s, id)
		if err != nil {
			t.Fatal(err)
		}
		g, err := src.Key(t.Context(), keywire.Request{Verb: keywire.Key, UUID: uuid})
		return g.Key, err
	}
	askNew := func(t *testing.T, h sshverb.Handler) (secret.Bytes, error) {
		t.Helper()
		s, id := server(t, h)
		return ask(t, s, id)
	}
	t.Run("gives the key", func(t *testing.T) {
		got, err := askNew(t, give(key))
		if err != nil || !bytes.Equal(got.Reveal(), key) {
			t.Errorf("%d bytes, %v", got.Len(), err)
		}
	})
	t.Run("refuses", func(t *testing.T) {
		got, err := askNew(t, func(context.Context, *sshverb.Session) error {
			return sshverb.Refuse(errors.New("revoked by the operator"), "no key")
		})
		if !errors.Is(err, keysource.ErrRefused) || got.Len() != 0 {
			t.Errorf("%d bytes, %v", got.Len(), err)
		}
	})
	t.Run("key, then refusal", func(t *testing.T) {
		got, err := askNew(t, func(_ context.Context, s *sshverb.Session) error {
			s.Stdout.Write(key)
			return sshverb.Refuse(io.EOF, "no key")
		})
		if !errors.Is(err, keysource.ErrRefused) || got.Len() != 0 {
			t.Errorf("%d bytes, %v", got.Len(), err)
		}
	})
	t.Run("gives nothing", func(t *testing.T) {
		if got, err := askNew(t, give(nil)); err == nil || errors.Is(err, keysource.ErrRefused) {
			t.Errorf("%d bytes, %v", got.Len(), err)
		}
	})
	t.Run("gives too much", func(t *testing.T) {
		if got, err := askNew(t, give(make([]byte, keywire.MaxKey+1))); !errors.Is(err, secret.ErrTooLong) {
			t.Errorf("%d bytes, %v", got.Len(), err)
		}
	})
	t.Run("does not know us", func(t *testing.T) {
		s, _ := server(t, give(key))
		stranger, _ := newIdentity(t)
		if _, err := ask(t, s, stranger); !errors.Is(err, keysource.ErrRefused) {
			t.Errorf("%v", err)
		}
	})
	t.Run("has another host key", func(t *testing.T) {
		s, id := server(t, give(key))
		_, s.HostKey = newIdentity(t)
		_, err := ask(t, s, id)
		if !errors.Is(err, sshverb.ErrHostKey) || errors.Is(err, keysource.ErrRefused) {
			t.Errorf("%v", err)
		}
	})
	t.Run("is not there", func(t *testing.T) {
		s, id := server(t, give(key))
		s.Address = "127.0.0.1:1"
		if _, err := ask(t, s, id); err == nil || errors.Is(err, keysource.ErrRefused) {
			t.Errorf("%v", err)
		}
	})
	t.Run("goes dead while it is asked", func(t *testing.T) {
		asked := make(chan struct{})
		s, id := server(t, func(ctx context.Context, _ *sshverb.Session) error {
			close(asked)
			<-ctx.Done()
			return nil
		})
		s.Address = deadLine(t, s.Address, asked)
		src, err := keysource.NewServer(s, id)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { <-asked; cancel() }() // another server was faster
		begin := time.Now()
		if _, err := src.Key(ctx, keywire.Request{Verb: keywire.Key, UUID: uuid}); err == nil {
			t.Error("a key from nowhere")
		}
		if took := time.Since(begin); took >= keysource.Answer {
			t.Errorf("held up the others by %v", took)
		}
	})
	t.Run("bad host key in the settings", func(t *testing.T) {
		if _, err := keysource.NewServer(settings.KeyServer{Name: "home", HostKey: "ssh-ed25519 AAAA"}, nil); err == nil {
			t.Error("accepted")
		}
	})
}
