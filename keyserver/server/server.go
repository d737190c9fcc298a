// Package server answers appliances: it puts the store of keys, the policies
// and the audit log behind the SSH verbs of shared/keywire.
//
// The order of every grant is: decide, read the key into locked memory, record
// the history, record the decision, and only then send. When any of these fails
// nothing is sent. A peer that is refused learns that and no more; the reason is
// in the log and in the audit log.
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/policy"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

// Lease is how long an appliance may keep its disk open without asking again.
const Lease = 24 * time.Hour

// Entries of ssh.Permissions that carry a name.
const (
	extension     = "farkeep-appliance"
	peerExtension = "farkeep-key-server"
)

// Config is what a server is made of. All fields are needed.
type Config struct {
	Site    *site.Site
	HostKey ssh.Signer
	Keys    *keystore.Store
	Policy  *policy.Store
	Audit   *audit.Log
	Log     *slog.Logger
	Now     func() time.Time
	// Limits of the SSH server; zero fields get this package's defaults.
	Limits sshverb.Limits
	// Peers are the other key servers of the site; nil for none.
	Peers Peers
	// Observe is told of every request once it is decided, for metrics; nil for
	// nobody. It must not block.
	Observe func(Observation)
}

// Peers answers other key servers. Their keys are no appliance's.
type Peers interface {
	// Authorise names the key server that a public key belongs to.
	Authorise(key ssh.PublicKey) (name string, ok bool)
	// Exec carries out a verb of the key server name. Errors are those of an
	// sshverb.Handler.
	Exec(ctx context.Context, name string, session *sshverb.Session) error
}

// Observation is what became of one request. It holds nothing that a peer wrote.
type Observation struct {
	Verb      string // of keywire; "connect" for an unknown key, "request" for what is none
	Verdict   string // granted, held, refused, later, failed, malformed
	Appliance string // "" for an unknown key
	Took      time.Duration
}

// Server is a key server. Make it with New.
type Server struct {
	c       Config
	byKey   map[string]string // public key, in wire form, to the appliance's name
	witness *witness

	mu sync.Mutex // one decision at a time: a grant counts before the next is judged
}

// New prepares a server. It gives every appliance of the site that has no
// standing one: enabled, unless the audit log's last word about it is that it
// was revoked.
func New(c Config, history map[string]string) (*Server, error) {
	s := &Server{c: c, byKey: map[string]string{}, witness: newWitness(c.Audit, c.Log, c.Now)}
	for _, a := range c.Site.Appliances {
		key, err := identity.ParsePublic(a.ClientKey)
		if err != nil {
			return nil, fmt.Errorf("client key of %s: %w", a.Name, err)
		}
		s.byKey[string(key.Marshal())] = a.Name
		if err := s.adopt(a.Name, history[a.Name]); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// adopt makes sure that an appliance has a standing. last is the audit log's
// last order about it, "revoke", "allow" or "".
func (s *Server) adopt(name, last string) error {
	standing, err := s.c.Policy.Standing(name)
	if err != nil {
		return err
	}
	switch {
	case standing != nil && (standing.State == policy.Revoked || last != "revoke"):
		return nil
	case last == "revoke":
		// The file was lost, or came back from an old copy. A revocation outlives that.
		s.c.Log.Warn("revoked again: the audit log says so and its standing did not", "appliance", name)
		return s.c.Policy.SetStanding(policy.Standing{Appliance: name, State: policy.Revoked, Reason: "the audit log's last order", Since: s.c.Now()})
	default:
		if _, err := s.c.Audit.Append(audit.Record{Event: "allow", Decision: "done", Appliance: name, Reason: "new in site.toml"}); err != nil {
			return err
		}
		return s.c.Policy.SetStanding(policy.Standing{Appliance: name, State: policy.Enabled, Reason: "new in site.toml", Since: s.c.Now()})
	}
}

// LastOrders reads from the audit log in dir what was last ordered about each
// appliance: "revoke" or "allow".
func LastOrders(dir string) (map[string]string, error) {
	last := map[string]string{}
	err := audit.Read(dir, func(_ []byte, r audit.Record) error {
		if r.Decision == "done" && (r.Event == "revoke" || r.Event == "allow") {
			last[r.Appliance] = r.Event
		}
		return nil
	})
	return last, err
}

// Serve answers on l until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	limits := s.c.Limits
	if limits.Connections == 0 {
		limits.Connections = 256
	}
	if limits.Sessions == 0 {
		limits.Sessions = 2
	}
	if limits.Stall == 0 {
		limits.Stall = 20 * time.Second
	}
	if limits.Idle == 0 {
		limits.Idle = time.Minute
	}
	defer s.witness.flush()
	verbs := &sshverb.Server{HostKey: s.c.HostKey, Authorise: s.authorise, Exec: s.exec, Limits: limits, Log: s.c.Log, LogArgs: logArgs}
	return verbs.Serve(ctx, fairListener(l, s.c.Log))
}

// logArgs lets names and UUIDs into the log, and no tokens.
func logArgs(verb string, args []string) []string {
	if len(args) == 1 && settings.IsName(args[0]) && verb == "peer-revoke" {
		return args
	}
	return keywire.Loggable(verb, args)
}

// authorise knows the appliances of the site, revoked ones too: they are told
// "refused", and that they asked is on record.
func (s *Server) authorise(key ssh.PublicKey, peer net.Addr) (*ssh.Permissions, error) {
	name, ok := s.byKey[string(key.Marshal())]
	if !ok && s.c.Peers != nil {
		if peer, known := s.c.Peers.Authorise(key); known {
			return &ssh.Permissions{Extensions: map[string]string{peerExtension: peer}}, nil
		}
	}
	if !ok {
		// Not proved: a peer may show a key that it does not hold. That one was
		// shown is worth knowing all the same.
		err := s.witness.record(audit.Record{
			Event: "connect", Decision: "refused", Reason: "unknown SSH key",
			Remote: peer.String(), Identity: identity.Fingerprint(key),
		})
		return nil, errors.Join(errors.New("unknown key"), err)
	}
	return &ssh.Permissions{Extensions: map[string]string{extension: name}}, nil
}

func (s *Server) exec(ctx context.Context, session *sshverb.Session) error {
	if peer, ok := session.Permissions.Extensions[peerExtension]; ok {
		return s.c.Peers.Exec(ctx, peer, session)
	}
	name := session.Permissions.Extensions[extension]
	a, ok := s.c.Site.Appliance(name)
	if !ok {
		return fmt.Errorf("the site has no appliance %q", name)
	}
	record := audit.Record{Appliance: name, Remote: session.Peer.String(), Identity: identity.Fingerprint(session.Key)}
	r, err := keywire.Parse(session.Verb, session.Args)
	if err != nil {
		record.Event, record.Decision, record.Reason = "request", "refused", "malformed"
		return &sshverb.Error{Code: hint.ExitUsage, Text: "this is not a request", Hint: "key UUID, lease UUID or checkin", Err: errors.Join(err, s.witness.record(record))}
	}
	record.Event, record.UUID = string(r.Verb), r.UUID

	key, d, err := s.decide(*a, r, session.Peer, record)
	if key != nil {
		defer key.Release()
	}
	switch {
	case err != nil:
		return err // the peer learns that something went wrong inside
	case !d.Granted:
		return sshverb.Refuse(errors.New(d.Reason), "refused")
	}
	return answer(session.Stdout, r, name, key)
}

// decide judges a request and puts it on record. Its key is nil unless a key
// was granted.
func (s *Server) decide(a site.Appliance, r keywire.Request, peer net.Addr, record audit.Record) (*keystore.Key, policy.Decision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.c.Now()
	key, d, after, err := s.judge(a, r, peer, now)
	switch {
	case err != nil:
		record.Decision, record.Reason = "failed", err.Error()
	case d.Granted:
		record.Decision, record.Reason = "granted", d.Reason
	default:
		record.Decision, record.Reason = "refused", d.Reason
	}
	if err == nil && d.Granted {
		// Before the record and the answer: a crash in between costs one key of
		// the day's allowance, the other order would give one away.
		if err = s.c.Policy.SetHistory(after); err != nil {
			record.Decision, record.Reason = "failed", err.Error()
		}
	}
	if recorded := s.witness.record(record); recorded != nil {
		err = errors.Join(err, fmt.Errorf("no answer without a record: %w", recorded))
	}
	if err != nil || !d.Granted {
		if key != nil {
			key.Release()
		}
		return nil, d, err
	}
	return key, d, nil
}

func (s *Server) judge(a site.Appliance, r keywire.Request, peer net.Addr, now time.Time) (*keystore.Key, policy.Decision, policy.History, error) {
	var none policy.History
	standing, err := s.c.Policy.Standing(a.Name)
	if err != nil {
		return nil, policy.Decision{}, none, err
	}
	history, err := s.c.Policy.History(a.Name)
	if err != nil {
		return nil, policy.Decision{}, none, err
	}
	from := netip.Addr{} // an address that cannot be read is no VPN address
	if ap, err := netip.ParseAddrPort(peer.String()); err == nil {
		from = ap.Addr()
	}
	d := policy.Decide(a, standing, history, r, from, now)
	if !d.Granted {
		return nil, d, none, nil
	}
	after := history.After(r.Verb, now)
	if r.Verb != keywire.Key {
		return nil, d, after, nil
	}
	key, err := s.c.Keys.Get(r.UUID)
	return key, d, after, err
}

func answer(w io.Writer, r keywire.Request, name string, key *keystore.Key) error {
	var text []byte
	var err error
	switch r.Verb {
	case keywire.Key:
		text = key.Reveal()
	case keywire.Renew:
		text, err = json.Marshal(keywire.Lease{Seconds: int64(Lease / time.Second)})
		text = append(text, '\n')
	case keywire.CheckIn:
		text, err = json.Marshal(keywire.Checkin{Appliance: name})
		text = append(text, '\n')
	}
	if err == nil {
		_, err = w.Write(text)
	}
	if err != nil {
		return fmt.Errorf("send the answer to %s: %w", r.Verb, err)
	}
	return nil
}
