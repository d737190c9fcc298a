// Package server answers appliances: it puts the store of keys, the policies
// and the audit log behind the SSH verbs of shared/keywire.
//
// The order of every grant is: decide, read the key into locked memory, make the
// new state durable (what was counted, the new token), put the decision on
// record, and only then send. When any of these fails nothing is sent. What a
// crash leaves at each point:
//
//   - before the state is durable: nothing has happened;
//   - after it, before the record: a key is counted, and a token issued, that
//     nobody got. The appliance asks again and shows the token that it has, which
//     is still accepted;
//   - after the record, before the answer: the same, and the record says granted:
//     it means "may have been sent";
//   - in the middle of the answer: the appliance may have the key, the new token or
//     both. Whatever it has is accepted next time.
//
// A peer that is refused learns that and no more; the reason is in the log and in
// the audit log. A token is in neither.
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
	"slices"
	"sync"
	"time"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

// Entries of ssh.Permissions that carry a name.
const (
	extension     = "farkeep-appliance"
	peerExtension = "farkeep-key-server"
)

// Config is what a server is made of. All fields are needed but where it is said.
type Config struct {
	Site    *site.Site
	HostKey ssh.Signer
	Keys    *keystore.Store
	Policy  *policy.Store
	Audit   *audit.Log
	Log     *slog.Logger
	Now     func() time.Time
	// Moment is Now beside the clock that nobody can set; nil for moment.Now.
	Moment func() (moment.Moment, error)
	// Place says where the VPN sees an appliance; nil where it cannot be asked.
	Place func(ctx context.Context, a site.Appliance, from netip.Addr) place.Sighting
	// Alert is told what a person should know; nil for nobody. It must not block.
	Alert func(alert.Event)
	// Void reports whether a client key was declared void; nil for none.
	Void func(appliance, fingerprint string) (bool, error)
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
	desk    chan struct{} // one entry for each request that is being decided
}

// atOnce bounds how many requests are decided at once: each may wait for the disk
// several times, and takes a thread of the system while it does. Enough wait together for the
// audit log to write many records in one go; the others queue in order.
const atOnce = 64

// New prepares a server. It gives every appliance of the site that has no
// standing one ([orders.Book.Adopt]). last is the audit log's last order about
// each appliance ([orders.LastOrders]).
func New(c Config, last map[string]string) (*Server, error) {
	if c.Moment == nil {
		c.Moment = func() (moment.Moment, error) { return moment.Now(c.Now) }
	}
	if c.Alert == nil {
		c.Alert = func(alert.Event) {}
	}
	if c.Observe == nil {
		c.Observe = func(Observation) {}
	}
	s := &Server{c: c, byKey: map[string]string{}, witness: newWitness(c.Audit, c.Log, c.Now), desk: make(chan struct{}, atOnce)}
	book := &orders.Book{Policy: c.Policy, Audit: c.Audit, Now: c.Moment}
	for _, a := range c.Site.Appliances {
		key, err := identity.ParsePublic(a.ClientKey)
		if err != nil {
			return nil, fmt.Errorf("client key of %s: %w", a.Name, err)
		}
		s.byKey[string(key.Marshal())] = a.Name
		again, err := book.Adopt(a.Name, last[a.Name])
		if err != nil {
			// Its requests fail as long as that is so; the others' need not.
			c.Log.Error("the state of an appliance cannot be read or written: it gets nothing", "appliance", a.Name, "err", err)
			c.Alert(alert.Event{Kind: alert.StateUnreadable, Appliance: a.Name, Reason: err.Error()})
			continue
		}
		if again {
			c.Log.Warn("revoked again: the audit log says so and its state did not", "appliance", a.Name)
		}
	}
	return s, nil
}

// Serve answers on l until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	limits := s.c.Limits
	if limits.Connections == 0 {
		// After a power cut everybody comes at once, and some have a connection that
		// is dying still.
		limits.Connections = min(max(256, 3*len(s.c.Site.Appliances)), 4096)
	}
	if limits.Handshakes == 0 {
		limits.Handshakes = 64
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
	counting, stop := context.WithCancel(context.WithoutCancel(ctx))
	var counts sync.WaitGroup
	counts.Go(func() { s.witness.run(counting) })
	defer counts.Wait()
	defer stop() // after the last answer
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
			Event: "connect", Decision: refused, Reason: "unknown SSH key",
			Remote: peer.String(), Identity: identity.Fingerprint(key),
		})
		s.c.Observe(Observation{Verb: "connect", Verdict: refused})
		s.c.Alert(alert.Event{Kind: alert.Stranger, From: peer.String(), Decision: "connect refused", Reason: "unknown SSH key " + identity.Fingerprint(key), At: s.c.Now()})
		return nil, errors.Join(errors.New("unknown key"), err)
	}
	if s.c.Void != nil {
		void, err := s.c.Void(name, identity.Fingerprint(key))
		if err != nil || void {
			err = errors.Join(err, s.witness.record(audit.Record{
				Event: "connect", Decision: refused, Reason: "void SSH key", Appliance: name,
				Remote: peer.String(), Identity: identity.Fingerprint(key),
			}))
			s.c.Observe(Observation{Verb: "connect", Verdict: refused, Appliance: name})
			s.c.Alert(alert.Event{Kind: alert.Stranger, Appliance: name, Disk: s.diskOf(name), From: peer.String(), Decision: "connect refused", Reason: "void SSH key " + identity.Fingerprint(key), At: s.c.Now()})
			return nil, errors.Join(errors.New("void key"), err)
		}
	}
	return &ssh.Permissions{Extensions: map[string]string{extension: name}}, nil
}

func (s *Server) diskOf(appliance string) string {
	if a, ok := s.c.Site.Appliance(appliance); ok {
		return a.LUKS
	}
	return ""
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
	started := time.Now()
	record := audit.Record{Appliance: name, Remote: session.Peer.String(), Identity: identity.Fingerprint(session.Key)}
	r, err := keywire.Parse(session.Verb, session.Args)
	if err != nil {
		record.Event, record.Decision, record.Reason = "request", refused, "malformed"
		s.c.Observe(Observation{Verb: "request", Verdict: "malformed", Appliance: name, Took: time.Since(started)})
		return &sshverb.Error{Code: hint.ExitUsage, Text: "this is not a request", Hint: "key UUID, lease UUID, checkin or dark UUID", Err: errors.Join(err, s.witness.record(record))}
	}
	record.Event, record.UUID = string(r.Verb), r.UUID
	verdict, err := s.answer(ctx, session, *a, r, record)
	s.c.Observe(Observation{Verb: string(r.Verb), Verdict: verdict, Appliance: name, Took: time.Since(started)})
	return err
}

// answer carries out one request that was parsed.
func (s *Server) answer(ctx context.Context, session *sshverb.Session, a site.Appliance, r keywire.Request, record audit.Record) (verdict string, err error) {
	from := netip.Addr{} // an address that cannot be read is no VPN address
	if ap, err := netip.ParseAddrPort(session.Peer.String()); err == nil {
		from = ap.Addr().Unmap()
	}
	// Outside of the turns below: it waits until the VPN was looked at, for seconds
	// where that does not happen.
	var seen place.Sighting
	if s.c.Place != nil {
		seen = s.c.Place(ctx, a, from)
	}
	select {
	case s.desk <- struct{}{}:
	case <-ctx.Done():
		return failed, ctx.Err()
	}
	leave := sync.OnceFunc(func() { <-s.desk })
	defer leave()
	o, err := s.decide(ctx, a, r, from, seen)
	defer o.release()
	record.Decision, record.Reason = o.verdict(), o.decision.Reason
	record.Place, record.Waiting, record.Claims = o.place.String(), o.decision.Waiting, r.Claims.String()
	record.Token = tokenState(a, r, o.decision)
	if err != nil {
		record.Decision, record.Reason = failed, err.Error()
	}
	if recorded := s.witness.record(record); recorded != nil {
		record.Decision, err = failed, errors.Join(err, fmt.Errorf("no answer without a record: %w", recorded))
	}
	leave() // the answer may take as long as the line is slow
	s.alarm(a, r, o, record, err)
	if err != nil {
		return failed, err // the peer learns that something went wrong inside
	}
	switch o.decision.Verdict {
	case policy.Grant:
		return record.Decision, s.send(session, a, r, o)
	case policy.Later:
		return record.Decision, &sshverb.Error{Code: hint.ExitUnreachable, Text: "not yet", Hint: "ask again in a minute", Err: errors.New(o.decision.Reason)}
	default:
		// Whether a person is asked is nothing for a thief: held and refused look alike.
		return record.Decision, sshverb.Refuse(errors.New(o.decision.Reason), "refused")
	}
}

// tokenState is all that the audit log has of a token.
func tokenState(a site.Appliance, r keywire.Request, d policy.Decision) string {
	switch {
	case a.KeyPolicy.Token == site.TokenIgnored:
		return "ignored"
	case slices.Contains(d.Asks, policy.AskToken):
		return "mismatch"
	case r.Verb == keywire.Dark, d.Verdict == policy.Refuse, d.Verdict == policy.Later:
		return "" // not judged
	case r.Token == "":
		return "none"
	}
	return "accepted"
}

// outcome is what was decided about a request and made durable.
type outcome struct {
	decision      policy.Decision
	before, after policy.State
	place         place.Sighting
	key           *keystore.Key // nil but for a key that was granted
}

// release wipes the key. An outcome may be released more than once.
func (o *outcome) release() {
	if o.key != nil {
		o.key.Release()
		o.key = nil
	}
}

// The verdicts, as the audit log and Observation have them.
const (
	granted = "granted"
	held    = "held"
	refused = "refused"
	later   = "later"
	failed  = "failed"
)

func (o *outcome) verdict() string {
	switch o.decision.Verdict {
	case policy.Grant:
		return granted
	case policy.Hold:
		return held
	case policy.Later:
		return later
	default:
		return refused
	}
}

// decide judges a request and makes the state that follows durable. Two requests
// of one appliance are judged one after the other, also by two processes: a grant
// counts before the next is judged.
func (s *Server) decide(ctx context.Context, a site.Appliance, r keywire.Request, from netip.Addr, seen place.Sighting) (*outcome, error) {
	o := &outcome{place: seen}
	now, err := s.c.Moment()
	if err != nil {
		return o, err
	}
	err = s.c.Policy.Update(a.Name, func(before policy.State) (policy.State, error) {
		// Who gave up waiting may have asked again since, with a newer token: this one
		// would look like a copied card's.
		if err := ctx.Err(); err != nil {
			return before, err
		}
		o.before = before
		o.decision = policy.Decide(a, before, policy.Facts{Request: r, From: from, Place: o.place, Now: now, NewToken: keywire.NewToken()})
		o.after = o.decision.Next
		if r.Verb == keywire.Key && o.decision.Verdict == policy.Grant {
			// Before anything is counted: a key that is missing uses up no allowance.
			var err error
			if o.key, err = s.c.Keys.Get(r.UUID); err != nil {
				return before, err
			}
		}
		return o.after, nil
	})
	if err != nil {
		o.release()
	}
	return o, err
}

// send is the answer to what was granted.
func (s *Server) send(session *sshverb.Session, a site.Appliance, r keywire.Request, o *outcome) error {
	var text []byte
	var err error
	switch r.Verb {
	case keywire.Key:
		_, err = o.key.WriteTo(session.Stdout)
		if err == nil && o.decision.Token != "" {
			_, err = io.WriteString(session.Stderr, keywire.TokenLine(o.decision.Token))
		}
	case keywire.Renew:
		text, err = json.Marshal(keywire.Lease{Seconds: int64(o.decision.Lease / time.Second), Renew: int64(o.decision.Renew / time.Second)})
	case keywire.CheckIn, keywire.Dark:
		text, err = json.Marshal(keywire.Checkin{Appliance: a.Name})
	}
	if err == nil && text != nil {
		_, err = session.Stdout.Write(append(text, '\n'))
	}
	if err != nil {
		return fmt.Errorf("send the answer to %s: %w", r.Verb, err)
	}
	return nil
}
