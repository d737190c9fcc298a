// Package keysource speaks to key servers over SSH (shared/keywire) and fetches
// the disk's key from them.
//
// Every configured server is asked. The next one starts a moment after the one
// before it, whether that has answered or not, so that a dead, slow or lying
// server delays the others by seconds ([Stagger]) and never blocks them. The
// first key that the caller accepts ends the search: a server that hands out a
// wrong key is passed over like one that is silent. The tokens that came with
// keys are handed back all, those of keys that were not used or came too late
// included: the servers that issued them count them as given.
//
// A server is its host key: several addresses with one host key are several ways
// to one server, never asked at the same time, because a token belongs to it.
//
// One search is one attempt; trying again, with back-off, is up to the caller.
package keysource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

const (
	// Connect bounds TCP and SSH handshake with one server.
	Connect = 8 * time.Second
	// Answer bounds the whole exchange with one server.
	Answer = 20 * time.Second
	// Stagger is how long one server has before the next is asked as well.
	Stagger = 3 * time.Second
)

var (
	// ErrUnreachable means that no server gave an answer.
	ErrUnreachable = errors.New("no key server answered")
	// ErrRefused means that a server answered and gave no key.
	ErrRefused = errors.New("key refused")
	// ErrWrongKey means that keys came and none was accepted.
	ErrWrongKey = errors.New("no key server's key opens the disk")
)

// Grant is a key and the token that came with it, "" from a server that issues
// none.
type Grant struct {
	Key   secret.Bytes
	Token keywire.Token
}

// Source gives the key of a disk. Key is called once per search, with a context
// that ends when another source was faster; it must return soon after that.
// Errors that wrap ErrRefused are answers, all others are silence.
type Source interface {
	Key(ctx context.Context, r keywire.Request) (Grant, error)
	ID() string     // tells it from all others: a server's host key
	String() string // its name
}

// Server is one key server.
type Server struct {
	name, id string
	peers    []sshverb.Peer // the ways to it, in the order of the settings
}

// Servers are the key servers that the settings describe, asked as identity, in
// their order. Entries with the same host key are one server.
func Servers(list []settings.KeyServer, identity ssh.Signer) ([]*Server, error) {
	var all []*Server
	for _, k := range list {
		s, err := NewServer(k, identity)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(all, func(o *Server) bool { return o.id == s.id })
		if i < 0 {
			all = append(all, s)
			continue
		}
		all[i].peers = append(all[i].peers, s.peers...)
	}
	return all, nil
}

// Names are the servers' names by their IDs, as Servers would make them.
func Names(list []settings.KeyServer) (map[string]string, error) {
	all, err := Servers(list, nil)
	names := make(map[string]string, len(all))
	for _, s := range all {
		names[s.id] = s.name
	}
	return names, err
}

// NewServer is one entry of Servers.
func NewServer(s settings.KeyServer, id ssh.Signer) (*Server, error) {
	key, err := identity.ParsePublic(s.HostKey)
	if err != nil {
		return nil, fmt.Errorf("key server %s: host key: %w", s.Name, err)
	}
	return &Server{name: s.Name, id: identity.Fingerprint(key), peers: []sshverb.Peer{{
		Address: s.Address, User: "farkeep", Identity: id, HostKey: key, Connect: Connect, Idle: Answer,
	}}}, nil
}

// String is the server's name.
func (s *Server) String() string { return s.name }

// ID is the fingerprint of the server's host key.
func (s *Server) ID() string { return s.id }

// Key asks for a key; the answer on stdout is the key and nothing else.
func (s *Server) Key(ctx context.Context, r keywire.Request) (Grant, error) {
	var g Grant
	err := s.exchange(ctx, func(ctx context.Context, c *sshverb.Client) (err error) {
		g, err = askKey(ctx, c, r)
		return err
	})
	if err == nil {
		return g, nil
	}
	g.Key.Wipe()
	// A host key that is not the pinned one is nobody's refusal: the server that
	// could refuse was never reached.
	if hint.Code(err) == hint.ExitRefused && !errors.Is(err, sshverb.ErrHostKey) {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return Grant{}, fmt.Errorf("key server %s: %w", s.name, err)
}

// Ask makes a request other than for a key and returns the answer on stdout.
// Its error wraps ErrRefused only when the server itself refused the request: one
// that does not know the appliance has not judged it.
func (s *Server) Ask(ctx context.Context, r keywire.Request) ([]byte, error) {
	var answer []byte
	err := s.exchange(ctx, func(ctx context.Context, c *sshverb.Client) (err error) {
		answer, err = c.Run(ctx, r.Line(), nil, keywire.MaxAnswer)
		return err
	})
	if err == nil {
		return answer, nil
	}
	var said *sshverb.Error
	if errors.As(err, &said) && said.Code == hint.ExitRefused {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil, fmt.Errorf("key server %s: %w", s.name, err)
}

// exchange connects, by the next way where one fails, and does one thing, all
// within Answer.
func (s *Server) exchange(ctx context.Context, do func(context.Context, *sshverb.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, Answer)
	defer cancel()
	var client *sshverb.Client
	var failures []error
	for _, p := range s.peers {
		var err error
		if client, err = sshverb.Dial(ctx, p); err == nil {
			break
		}
		failures = append(failures, err)
	}
	if client == nil {
		if ctx.Err() != nil {
			return fmt.Errorf("no answer within %v", Answer)
		}
		return errors.Join(failures...)
	}
	defer client.Close()
	// Ending the verb alone would wait for a server that need not agree, while
	// another one has already given the key.
	defer context.AfterFunc(ctx, func() { client.Close() })()
	err := do(ctx, client)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("no answer within %v", Answer)
	}
	return err
}

func askKey(ctx context.Context, client *sshverb.Client, r keywire.Request) (Grant, error) {
	d, err := client.Start(ctx, r.Line())
	if err != nil {
		return Grant{}, err
	}
	d.Stdin.Close()
	key, err := secret.ReadAll(d.Stdout, keywire.MaxKey)
	if err != nil {
		d.Close()
		return Grant{Key: key}, fmt.Errorf("read the key: %w", err)
	}
	if err := d.Wait(); err != nil {
		return Grant{Key: key}, err
	}
	if key.Len() == 0 {
		return Grant{}, io.ErrUnexpectedEOF
	}
	return Grant{Key: key, Token: keywire.ParseTokenLine(d.Stderr())}, nil
}

// Found is what a search brought to light, with an accepted key or without.
type Found struct {
	// From is the source whose key was accepted; nil if none was.
	From Source
	// Tokens are all tokens that came, by the ID of the source.
	Tokens map[string]keywire.Token
}

// Find asks sources, each one stagger after the one before, and hands every key
// that comes to accept, one at a time; accept must not keep it: Find wipes it.
// When accept returns nil the search is over. An error of accept that wraps
// ErrWrongKey or ErrRefused passes this key over, any other ends the search.
// Find's error wraps ErrWrongKey, ErrRefused or ErrUnreachable, the first of
// these that any source met, or is the error that accept returned.
func Find(ctx context.Context, log *slog.Logger, sources []Source, stagger time.Duration, request func(Source) keywire.Request, accept func(Source, secret.Bytes) error) (found Found, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	type answer struct {
		source Source
		Grant
		err error
	}
	found.Tokens = map[string]keywire.Token{}
	note := func(a answer) {
		if a.err == nil && a.Token != "" {
			found.Tokens[a.source.ID()] = a.Token
		}
	}
	answers := make(chan answer, len(sources)) // room for all: nobody blocks when Find has returned
	ask := func(s Source) {
		asking.Go(func() {
			g, err := s.Key(ctx, request(s))
			answers <- answer{s, g, err}
		})
	}
	defer func() {
		// Keys that come too late are wiped all the same, and their tokens kept.
		cancel()
		asking.Wait()
		close(answers)
		for a := range answers {
			note(a)
			a.Key.Wipe()
		}
	}()

	waiting, next := 0, time.NewTimer(0)
	defer next.Stop()
	var failures []error
	worst := ErrUnreachable
	for len(sources) > 0 || waiting > 0 {
		select {
		case <-ctx.Done():
			return found, ctx.Err()
		case <-next.C:
			if len(sources) > 0 {
				ask(sources[0])
				sources = sources[1:]
				waiting++
				next.Reset(stagger)
			}
			continue
		case a := <-answers:
			waiting--
			note(a)
			if a.err == nil {
				err := accept(a.source, a.Key)
				a.Key.Wipe()
				if err == nil {
					found.From = a.source
					return found, nil
				}
				if !errors.Is(err, ErrWrongKey) && !errors.Is(err, ErrRefused) {
					return found, err
				}
				a.err = fmt.Errorf("key server %s: %w", a.source, err)
			}
			log.Warn("no key from this server", "server", a.source.String(), "err", a.err)
			failures = append(failures, a.err)
			switch {
			case errors.Is(a.err, ErrWrongKey):
				worst = ErrWrongKey
			case errors.Is(a.err, ErrRefused) && worst == ErrUnreachable:
				worst = ErrRefused
			}
			next.Reset(0) // nothing to wait for: on to the next
		}
	}
	return found, fmt.Errorf("%w: %w", worst, errors.Join(failures...))
}
