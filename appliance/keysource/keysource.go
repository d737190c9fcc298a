// Package keysource fetches the disk's key from key servers over SSH.
//
// Every configured server is asked. The next one starts a moment after the one
// before it, whether that has answered or not, so that a dead, slow or lying
// server delays the others by seconds ([Stagger]) and never blocks them. The
// first key that the caller accepts ends the search: a server that hands out a
// wrong key is passed over like one that is silent.
//
// One search is one attempt; trying again, with back-off, is up to the caller.
package keysource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

// Source gives the key of a disk. Key is called once per search, with a context
// that ends when another source was faster; it must return soon after that.
// Errors that wrap ErrRefused are answers, all others are silence.
type Source interface {
	Key(ctx context.Context, uuid string) (secret.Bytes, error)
	String() string
}

// Server is one key server.
type Server struct {
	name string
	peer sshverb.Peer
}

// NewServer is a key server as the settings describe it, asked as identity.
func NewServer(s settings.KeyServer, id ssh.Signer) (*Server, error) {
	key, err := identity.ParsePublic(s.HostKey)
	if err != nil {
		return nil, fmt.Errorf("key server %s: host key: %w", s.Name, err)
	}
	return &Server{name: s.Name, peer: sshverb.Peer{
		Address: s.Address, User: "farkeep", Identity: id, HostKey: key, Connect: Connect, Idle: Answer,
	}}, nil
}

// String is the server's name.
func (s *Server) String() string { return s.name }

// Key asks for a key: `key UUID`; the answer on stdout is the key and nothing else.
func (s *Server) Key(ctx context.Context, uuid string) (secret.Bytes, error) {
	ctx, cancel := context.WithTimeout(ctx, Answer)
	defer cancel()
	key, err := s.ask(ctx, uuid)
	if err == nil {
		return key, nil
	}
	key.Wipe()
	if expired := ctx.Err(); expired != nil {
		err = fmt.Errorf("no answer within %v", Answer)
	}
	// A host key that is not the pinned one is nobody's refusal: the server that
	// could refuse was never reached.
	if hint.Code(err) == hint.ExitRefused && !errors.Is(err, sshverb.ErrHostKey) {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return secret.Bytes{}, fmt.Errorf("key server %s: %w", s.name, err)
}

func (s *Server) ask(ctx context.Context, uuid string) (secret.Bytes, error) {
	client, err := sshverb.Dial(ctx, s.peer)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer client.Close()
	// Ending the verb alone would wait for a server that need not agree, while
	// another one has already given the key.
	defer context.AfterFunc(ctx, func() { client.Close() })()
	d, err := client.Start(ctx, keywire.Request{Verb: keywire.Key, UUID: uuid}.Line())
	if err != nil {
		return secret.Bytes{}, err
	}
	d.Stdin.Close()
	key, err := secret.ReadAll(d.Stdout, keywire.MaxKey)
	if err != nil {
		d.Close()
		return key, fmt.Errorf("read the key: %w", err)
	}
	if err := d.Wait(); err != nil {
		return key, err
	}
	if key.Len() == 0 {
		return key, io.ErrUnexpectedEOF
	}
	return key, nil
}

// Find asks sources, each one stagger after the one before, and hands every key
// that comes to accept, one at a time; accept says whether it was the right one
// and must not keep it: Find wipes it. Find returns the source whose key was
// accepted. Its error wraps ErrWrongKey, ErrRefused or ErrUnreachable, the
// first of these that any source met, or is the error that accept returned.
func Find(ctx context.Context, log *slog.Logger, sources []Source, stagger time.Duration, uuid string, accept func(Source, secret.Bytes) (bool, error)) (Source, error) {
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	type answer struct {
		source Source
		key    secret.Bytes
		err    error
	}
	answers := make(chan answer, len(sources)) // room for all: nobody blocks when Find has returned
	ask := func(s Source) {
		asking.Go(func() {
			key, err := s.Key(ctx, uuid)
			answers <- answer{s, key, err}
		})
	}
	defer func() {
		// Keys that come too late are wiped all the same.
		cancel()
		asking.Wait()
		close(answers)
		for a := range answers {
			a.key.Wipe()
		}
	}()

	waiting, next := 0, time.NewTimer(0)
	defer next.Stop()
	var failures []error
	worst := ErrUnreachable
	for len(sources) > 0 || waiting > 0 {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
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
			if a.err == nil {
				ok, err := accept(a.source, a.key)
				a.key.Wipe()
				if ok || err != nil {
					return a.source, err
				}
				a.err = fmt.Errorf("key server %s: %w", a.source, ErrWrongKey)
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
	return nil, fmt.Errorf("%w: %w", worst, errors.Join(failures...))
}
