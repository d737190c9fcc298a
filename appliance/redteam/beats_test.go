package redteam

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"farkeep/appliance/clock"
	"farkeep/appliance/keysource"
	"farkeep/image/ntpserver"
	"farkeep/image/torture/service"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/pushwire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

func (w *world) beat(k service.Key, host string, repositories ...pushwire.RepositoryDigest) error {
	text, err := json.Marshal(pushwire.Heartbeat{Host: host, At: time.Now(), Repositories: repositories})
	if err != nil {
		return err
	}
	_, err = w.verb(k, "heartbeat "+host, string(text)+"\n")
	return err
}

func (w *world) digest(c tree) string { o, _ := c.list(); return o.Digest }

func heartbeatAttacks() []attack {
	const kind = "heartbeats"
	return []attack{
		{kind, "claim what was never committed", "refused, and told to the operator", func(w *world) error {
			err := w.beat(service.Push, "home", pushwire.RepositoryDigest{Name: own, Digest: strings.Repeat("ab", 32)})
			if err := refused(err, own); err != nil {
				return err
			}
			for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(100 * time.Millisecond) {
				out, err := w.verb(service.Admin, "status --json", "")
				var s pushwire.Status
				if err = errors.Join(err, json.Unmarshal([]byte(out), &s)); err != nil {
					return err
				}
				if len(s.Untrue) > 0 {
					return nil
				}
			}
			return errors.New("the admin's status does not tell of it")
		}},
		{kind, "replay yesterday's", "refused: not the newest generation's digest", func(w *world) error {
			return refused(w.beat(service.Push, "home", pushwire.RepositoryDigest{Name: own, Digest: w.digest(w.one)}), own)
		}},
		{kind, "speak for another key's repositories", "refused", func(w *world) error {
			return refused(w.beat(service.Push, "home", pushwire.RepositoryDigest{Name: foreign, Digest: w.digest(tree{"song": noise(4, 50_000)})}), ".")
		}},
		{kind, "speak for another key's host", "refused: a host's heartbeats are its key's", func(w *world) error {
			if err := w.beat(service.Other, "cabin", pushwire.RepositoryDigest{Name: foreign, Digest: w.digest(tree{"song": noise(4, 50_000)})}); err != nil {
				return err
			}
			return refused(w.beat(service.Push, "cabin", pushwire.RepositoryDigest{Name: own, Digest: w.digest(w.two)}), "another key|cabin|minute")
		}},
		{kind, "hosts named ../x and .", "refused", func(w *world) error {
			for _, host := range []string{"../x", ".", "..", "a/b", strings.Repeat("h", 200)} {
				if err := refused(w.beat(service.Push, host, pushwire.RepositoryDigest{Name: own, Digest: w.digest(w.two)}), "."); err != nil {
					return fmt.Errorf("%s: %w", host, err)
				}
			}
			return nil
		}},
		{kind, "one that names no repository", "refused, or says nothing of any", func(w *world) error {
			before := w.confirmed()
			_ = w.beat(service.Push, "nobody")
			if now := w.confirmed(); !now.Equal(before) {
				return fmt.Errorf("%s was confirmed at %v, is now at %v", own, before, now)
			}
			return nil
		}},
		{kind, "a time of its own, years ahead", "told, never judged by", func(w *world) error {
			text, err := json.Marshal(pushwire.Heartbeat{Host: "future", At: time.Now().AddDate(30, 0, 0), Repositories: []pushwire.RepositoryDigest{{Name: own, Digest: w.digest(w.two)}}})
			if err != nil {
				return err
			}
			if _, err := w.verb(service.Push, "heartbeat future", string(text)+"\n"); err != nil {
				return err
			}
			out, err := w.verb(service.Push, "status --json", "")
			var s pushwire.Status
			if err = errors.Join(err, json.Unmarshal([]byte(out), &s)); err != nil {
				return err
			}
			for _, h := range s.Heartbeats {
				if h.ReceivedAt.After(time.Now().Add(time.Minute)) {
					return fmt.Errorf("%s was received at %v", h.Host, h.ReceivedAt)
				}
			}
			return nil
		}},
		{kind, "a thousand hosts, a thousand beats", "bounded; nothing else suffers", func(w *world) error {
			c, err := w.svc.Dial(w.Context(), service.Push)
			if err != nil {
				return err
			}
			defer c.Close()
			taken := 0
			for i := range 120 {
				text, _ := json.Marshal(pushwire.Heartbeat{Host: fmt.Sprint("h", i), At: time.Now(), Repositories: []pushwire.RepositoryDigest{{Name: own, Digest: w.digest(w.two)}}})
				if _, err := c.Run(w.Context(), fmt.Sprint("heartbeat h", i), strings.NewReader(string(text)+"\n"), 1<<16); err == nil {
					taken++
				}
			}
			if taken > 64 {
				return fmt.Errorf("%d hosts were taken", taken)
			}
			return nil
		}},
		{kind, "bombs of JSON", "refused", func(w *world) error {
			for _, text := range []string{strings.Repeat("[", 60_000), `{"host":"home","repositories":[` + strings.Repeat(`{"name":"photos","digest":"x"},`, 1500) + `{}]}`, `{"host":"home","host":"x","at":"never"}`, strings.Repeat("a", 1<<18)} {
				if out, err := w.verb(service.Push, "heartbeat home", text+"\n"); err == nil {
					return fmt.Errorf("%.20q was answered %q", text, out)
				}
			}
			return nil
		}},
	}
}

// confirmed is when the attacker's repository was confirmed last.
func (w *world) confirmed() time.Time {
	out, err := w.verb(service.Push, "status --json", "")
	must(w.T, err)
	var s pushwire.Status
	must(w.T, json.Unmarshal([]byte(out), &s))
	for _, r := range s.Repositories {
		if r.Name == own {
			return r.ConfirmedAt
		}
	}
	w.Fatalf("status does not name %s", own)
	return time.Time{}
}

// board is a clock for package clock that lives as fast as this test wants.
type board struct {
	mu   sync.Mutex
	skew time.Duration
	born time.Time
}

func (b *board) Now() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Now().Add(b.skew).Round(0)
}
func (b *board) Uptime() time.Duration { return time.Since(b.born) }
func (b *board) Step(d time.Duration) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.skew += d
	return nil
}
func (b *board) Slew(d time.Duration) error { return b.Step(d) }

// lie runs the appliance's clock against three time servers that are off by so
// much each, after a first run with honest ones, and returns how it ends.
func (w *world) lie(offsets ...time.Duration) (*board, clock.Status, error) {
	b := &board{born: time.Now()}
	var servers []*ntpserver.Server
	var names []string
	for range offsets {
		s, err := ntpserver.Listen("127.0.0.1:0", nil)
		if err != nil {
			return nil, clock.Status{}, err
		}
		defer s.Close()
		servers, names = append(servers, s), append(names, s.Addr().String())
	}
	path := filepath.Join(w.TempDir(), "clock")
	run := func(wait time.Duration) (clock.Status, error) {
		k, err := clock.New(clock.Config{Servers: names, Path: path, System: b, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return clock.Status{}, err
		}
		ctx, cancel := context.WithCancel(w.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		select {
		case <-k.Ready():
		case <-time.After(wait):
		}
		s := k.Status()
		cancel()
		return s, <-done
	}
	if s, err := run(time.Minute); err != nil || !s.Set {
		return b, s, fmt.Errorf("honest servers: %+v, %w", s, err)
	}
	for i, s := range servers {
		s.SetOffset(offsets[i])
	}
	s, err := run(8 * time.Second) // liars may well leave it unset
	return b, s, err
}

func (b *board) off() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.skew.Abs()
}

func clockAttacks() []attack {
	const kind = "clock"
	const year = 365 * 24 * time.Hour
	return []attack{
		{kind, "one time server of three lies by a year", "outvoted", func(w *world) error {
			b, s, err := w.lie(year, 0, 0)
			if err != nil || b.off() > time.Minute || s.Jump != "" {
				return fmt.Errorf("off by %v, %+v, %w", b.off(), s, err)
			}
			return nil
		}},
		{kind, "all of them throw the clock a year forward", "a jump: expiry is frozen, a mail goes out", func(w *world) error {
			b, s, err := w.lie(year, year, year)
			if err != nil || s.Jump == "" && b.off() > time.Minute {
				return fmt.Errorf("off by %v, %+v, %w", b.off(), s, err)
			}
			return nil
		}},
		{kind, "all of them throw it back by a year", "not followed below the last known time, or a jump", func(w *world) error {
			b, s, err := w.lie(-year, -year, -year)
			if err != nil || s.Jump == "" && b.off() > 49*time.Hour {
				return fmt.Errorf("off by %v, %+v, %w", b.off(), s, err)
			}
			return nil
		}},
		{kind, "each says something else", "no majority: the last known time goes on", func(w *world) error {
			b, s, err := w.lie(year, -year, 30*24*time.Hour)
			if err != nil || b.off() > time.Minute {
				return fmt.Errorf("off by %v, %+v, %w", b.off(), s, err)
			}
			return nil
		}},
	}
}

// keyServer is a key server that the attacker runs with the real one's keys.
func (w *world) keyServer(answer func(ctx context.Context, s *sshverb.Session) error) (settings.KeyServer, error) {
	private, public, err := identity.New("key server")
	if err != nil {
		return settings.KeyServer{}, err
	}
	host, err := identity.Signer(private)
	if err != nil {
		return settings.KeyServer{}, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return settings.KeyServer{}, err
	}
	server := &sshverb.Server{
		HostKey:   host,
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Exec:      answer,
		Log:       slog.New(slog.DiscardHandler),
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	w.Cleanup(func() { cancel(); <-done })
	return settings.KeyServer{Name: "cellar", Address: l.Addr().String(), HostKey: strings.TrimSpace(public)}, nil
}

// ask is the appliance asking such a server.
func (w *world) ask(k settings.KeyServer, limit time.Duration) (secret.Bytes, error) {
	s, err := keysource.NewServer(k, stranger())
	if err != nil {
		return secret.Bytes{}, err
	}
	ctx, cancel := context.WithTimeout(w.Context(), limit)
	defer cancel()
	g, err := s.Key(ctx, keywire.Request{Verb: keywire.Key, UUID: "01234567-89ab-cdef-0123-456789abcdef"})
	return g.Key, err
}

func keyServerAttacks() []attack {
	const kind = "key server"
	return []attack{
		{kind, "a key without end", "cut off at 8 KiB", func(w *world) error {
			k, err := w.keyServer(func(ctx context.Context, s *sshverb.Session) error {
				for ctx.Err() == nil {
					if _, err := s.Stdout.Write(make([]byte, 32<<10)); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
			_, err = w.ask(k, 10*time.Second)
			return refused(err, "key")
		}},
		{kind, "an empty key", "refused", func(w *world) error {
			k, err := w.keyServer(func(context.Context, *sshverb.Session) error { return nil })
			if err != nil {
				return err
			}
			_, err = w.ask(k, 10*time.Second)
			return refused(err, "EOF|empty|key")
		}},
		{kind, "no answer at all", "given up after a bounded time; asked again later", func(w *world) error {
			k, err := w.keyServer(func(ctx context.Context, _ *sshverb.Session) error { <-ctx.Done(); return ctx.Err() })
			if err != nil {
				return err
			}
			_, err = w.ask(k, time.Second)
			return refused(err, "answer|deadline|closed|cut")
		}},
		{kind, "another machine under the key server's address", "refused: its host key is pinned", func(w *world) error {
			k, err := w.keyServer(func(context.Context, *sshverb.Session) error { return nil })
			if err != nil {
				return err
			}
			_, public, err := identity.New("pinned")
			if err != nil {
				return err
			}
			k.HostKey = strings.TrimSpace(public)
			_, err = w.ask(k, 10*time.Second)
			return refused(err, "host key")
		}},
		{kind, "a wrong key", "the disk stays shut, the next server is asked, the operator is told", func(w *world) error {
			wrong := strings.Repeat("k", keywire.NewKey)
			k, err := w.keyServer(func(_ context.Context, s *sshverb.Session) error { _, err := s.Stdout.Write([]byte(wrong)); return err })
			if err != nil {
				return err
			}
			source, err := keysource.NewServer(k, stranger())
			if err != nil {
				return err
			}
			asked := 0
			_, err = keysource.Find(w.Context(), slog.New(slog.DiscardHandler), []keysource.Source{source, source}, time.Millisecond,
				func(keysource.Source) keywire.Request {
					return keywire.Request{Verb: keywire.Key, UUID: "01234567-89ab-cdef-0123-456789abcdef"}
				},
				func(keysource.Source, secret.Bytes) error { asked++; return keysource.ErrWrongKey })
			if !errors.Is(err, keysource.ErrWrongKey) || asked != 2 {
				return fmt.Errorf("%d servers were asked: %w", asked, err)
			}
			return nil
		}},
		{kind, "refuse the key for ever", "dark, with its history; a mail says who refuses", func(w *world) error {
			k, err := w.keyServer(func(context.Context, *sshverb.Session) error { return &sshverb.Error{Code: 4, Text: "revoked"} })
			if err != nil {
				return err
			}
			_, err = w.ask(k, 10*time.Second)
			if !errors.Is(err, keysource.ErrRefused) {
				return fmt.Errorf("it is not taken for a refusal: %w", err)
			}
			return nil
		}},
		{kind, "terminal escapes in a refusal", "printable in the log", func(w *world) error {
			k, err := w.keyServer(func(context.Context, *sshverb.Session) error {
				return &sshverb.Error{Code: 4, Text: "\x1b]0;owned\x07"}
			})
			if err != nil {
				return err
			}
			_, err = w.ask(k, 10*time.Second)
			if err == nil || strings.ContainsAny(err.Error(), "\x1b\x07") {
				return fmt.Errorf("it says %q", err)
			}
			return nil
		}},
	}
}
