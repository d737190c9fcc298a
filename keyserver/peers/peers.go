// Package peers keeps the key servers of a site alike in the one thing that
// cannot wait: what is revoked on one is revoked on all. And one that is not where
// the VPN ends asks another where an appliance is ([Peers.Where]).
//
// A key server speaks to another as its own host key, and knows it by the host
// key that site.toml pins. One verb between them revokes, one asks for evidence; none
// allows. An
// order is durable before it is sent ([Peers.Queue]), is tried at once
// ([Peers.Deliver]) and then, with back-off and jitter, until each of the others
// has given a receipt for it ([Peers.Run]). The others are tried side by side, so that
// one that is dead, slow or only half there holds up none.
//
// A receipt is the word of whoever holds the pinned host key. That the peer
// keeps it cannot be seen from here.
package peers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"farkeep/keyserver/place"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/crypto/ssh"
)

// Config says who the others are. Zero durations get the defaults.
type Config struct {
	Servers []site.KeyServer // of the site; this one is among them and is left out
	HostKey ssh.Signer       // of this key server
	State   string           // its state folder: the queue is in outgoing/
	Log     *slog.Logger
	Now     func() time.Time
	// Revoke carries out another server's order: durably, and on record. known is
	// whether the appliance was revoked already. An error is not told to the peer, but for
	// an *sshverb.Error. nil where nobody is answered.
	Revoke func(ctx context.Context, from string, o Order) (known bool, err error)
	// Alarm is told once of every order that was pending for longer than Lasting; nil
	// for nobody. It must not block.
	Alarm   func(Pending)
	Lasting time.Duration // default 10m
	// Place says where the VPN sees the peer with an address; nil where it cannot be
	// seen from here, and the others are told of nobody.
	Place func(ctx context.Context, source string, from netip.Addr) (place.Sighting, error)

	Connect  time.Duration // TCP and SSH handshake with one peer; default 5s
	Attempt  time.Duration // all orders for one peer, connect included; default 15s
	Retry    time.Duration // first wait after a failed try; default 2s
	RetryMax time.Duration // longest wait; default 5m
	Poll     time.Duration // how often Run looks for orders of the command line; default 10s
	// DialContext replaces net.Dialer's, for tests.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
}

// Peers are the other key servers of a site. Make them with New.
type Peers struct {
	c     Config
	me    string
	peers []peer
	queue queue
	poke  map[string]chan struct{} // by peer: something new is pending

	asking   map[string]chan struct{} // by peer: an entry for each question under way
	whereErr atomic.Pointer[error]    // of the last Where
}

type peer struct {
	name, address string
	key           ssh.PublicKey
}

// New prepares them. There may be none.
func New(c Config) (*Peers, error) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.Lasting, 10*time.Minute)
	def(&c.Connect, 5*time.Second)
	def(&c.Attempt, 15*time.Second)
	def(&c.Retry, 2*time.Second)
	def(&c.RetryMax, 5*time.Minute)
	def(&c.Poll, 10*time.Second)
	p := &Peers{c: c, queue: queue{filepath.Join(c.State, "outgoing")}, poke: map[string]chan struct{}{}, asking: map[string]chan struct{}{}}
	own := c.HostKey.PublicKey().Marshal()
	for _, s := range c.Servers {
		key, err := identity.ParsePublic(s.HostKey)
		if err != nil {
			return nil, fmt.Errorf("host key of the key server %s: %w", s.Name, err)
		}
		if bytes.Equal(key.Marshal(), own) {
			p.me = s.Name
			continue
		}
		p.peers = append(p.peers, peer{s.Name, s.Address, key})
		p.poke[s.Name] = make(chan struct{}, 1)
		p.asking[s.Name] = make(chan struct{}, whereAtOnce)
	}
	return p, nil
}

// Names are the other key servers, in the site's order.
func (p *Peers) Names() []string {
	var names []string
	for _, o := range p.peers {
		names = append(names, o.name)
	}
	return names
}

// Me is this key server's name; "" where the site does not have its host key.
func (p *Peers) Me() string { return p.me }

// Queue makes an order pending for every other key server, durably, and sends
// nothing itself: Deliver and Run do.
func (p *Peers) Queue(o Order) error { return p.forward(o, "") }

// forward queues an order for all but one.
func (p *Peers) forward(o Order, but string) error {
	var names []string
	for _, other := range p.peers {
		if other.name != but && other.name != o.From {
			names = append(names, other.name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	if err := p.queue.put(names, o, p.c.Now()); err != nil {
		return fmt.Errorf("queue the revocation of %s for %v: %w", o.Appliance, names, err)
	}
	for _, name := range names {
		select {
		case p.poke[name] <- struct{}{}:
		default:
		}
	}
	return nil
}

// Withdraw removes what is pending about an appliance, because a person allowed it
// again, and returns for whom it was.
func (p *Peers) Withdraw(appliance string) ([]string, error) { return p.queue.withdraw(appliance) }

// Pending is what the others have not taken yet, oldest first.
func (p *Peers) Pending() ([]Pending, error) { return p.queue.list() }

// Outcome is what came of one order at one key server: a nil Err means that it
// was taken.
type Outcome struct {
	Peer  string
	Order Order
	Err   error
}

// Deliver tries everything that is pending once, at all peers side by side, and
// calls each with every outcome as it comes, never two at a time. It returns
// when all are done: at the latest, soon after Config.Attempt.
func (p *Peers) Deliver(ctx context.Context, each func(Outcome)) error {
	all, err := p.Pending()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var wait sync.WaitGroup
	for _, o := range p.peers {
		wait.Go(func() {
			p.try(ctx, o, of(o.name, all), func(out Outcome) {
				mu.Lock()
				defer mu.Unlock()
				each(out)
			})
		})
	}
	wait.Wait()
	return ctx.Err()
}

func of(name string, all []Pending) (some []Pending) {
	for _, one := range all {
		if one.Peer == name {
			some = append(some, one)
		}
	}
	return some
}

// try sends orders to one peer over one connection. It reports whether all were taken.
func (p *Peers) try(ctx context.Context, to peer, orders []Pending, each func(Outcome)) (all bool) {
	if len(orders) == 0 {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, p.c.Attempt)
	defer cancel()
	client, err := p.dial(ctx, to)
	if err == nil {
		defer client.Close()
	}
	all = true
	for _, one := range orders {
		failed := err
		if failed == nil {
			failed = p.send(ctx, client, one.Order)
		}
		if noted := p.queue.note(one, failed == nil, failed, p.c.Now()); noted != nil {
			p.c.Log.Error("the queue of revocations is not up to date", "key_server", to.name, "appliance", one.Order.Appliance, "err", noted)
		}
		if failed == nil {
			p.c.Log.Info("revocation taken", "key_server", to.name, "appliance", one.Order.Appliance, "id", one.Order.ID)
		} else {
			p.c.Log.Warn("revocation not taken", "key_server", to.name, "appliance", one.Order.Appliance, "id", one.Order.ID, "tries", one.Tries+1, "err", failed)
			all = false
		}
		each(Outcome{Peer: to.name, Order: one.Order, Err: failed})
	}
	return all
}

func (p *Peers) send(ctx context.Context, client *sshverb.Client, o Order) error {
	text, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("%s: %w", Verb, err)
	}
	answer, err := client.Run(ctx, Verb+" "+o.Appliance, bytes.NewReader(text), maxReceipt)
	if err != nil {
		return err
	}
	return o.checkReceipt(answer)
}

// Run delivers what is pending until ctx ends: what this process queues at once, what
// the command line queues within Config.Poll, and what failed after a growing,
// jittered wait.
func (p *Peers) Run(ctx context.Context) {
	p.dropStrangers()
	var wait sync.WaitGroup
	for _, o := range p.peers {
		wait.Go(func() { p.attend(ctx, o) })
	}
	<-ctx.Done() // also where there is nobody to deliver to
	wait.Wait()
}

// dropStrangers removes what is pending for key servers that site.toml no longer
// has: nobody will ever take it.
func (p *Peers) dropStrangers() {
	all, err := p.Pending()
	if err != nil {
		return // attend says so
	}
	for _, one := range all {
		if _, known := p.poke[one.Peer]; known {
			continue
		}
		p.c.Log.Warn("a revocation was pending for a key server that the site no longer has", "key_server", one.Peer, "appliance", one.Order.Appliance)
		if err := p.queue.note(one, true, nil, p.c.Now()); err != nil {
			p.c.Log.Error("the queue of revocations is not up to date", "key_server", one.Peer, "err", err)
		}
	}
}

// attend delivers to one peer.
func (p *Peers) attend(ctx context.Context, to peer) {
	pace := backoff.NewExponentialBackOff()
	pace.InitialInterval, pace.MaxInterval, pace.Multiplier, pace.RandomizationFactor = p.c.Retry, p.c.RetryMax, 2, 0.5
	alarmed := map[string]bool{} // by order's id
	for {
		wait := p.c.Poll
		all, err := p.Pending()
		orders := of(to.name, all)
		switch {
		case err != nil:
			p.c.Log.Error("the queue of revocations cannot be read", "err", err)
		case p.try(ctx, to, orders, func(Outcome) {}):
			pace.Reset()
		default:
			wait = pace.NextBackOff()
		}
		p.alarm(to, alarmed)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-p.poke[to.name]:
			// A person is waiting: no matter how long this peer has been away.
			timer.Stop()
			pace.Reset()
		case <-timer.C:
		}
	}
}

// alarm tells of orders that a peer has not taken for long.
func (p *Peers) alarm(to peer, told map[string]bool) {
	if p.c.Alarm == nil {
		return
	}
	all, err := p.Pending()
	if err != nil {
		return // said already
	}
	left := map[string]bool{}
	for _, one := range of(to.name, all) {
		left[one.Order.ID] = true
		if !told[one.Order.ID] && p.c.Now().Sub(one.Queued) >= p.c.Lasting {
			told[one.Order.ID] = true
			p.c.Alarm(one)
		}
	}
	for id := range told {
		if !left[id] {
			delete(told, id)
		}
	}
}

// Authorise names the key server that a public key belongs to.
func (p *Peers) Authorise(key ssh.PublicKey) (name string, ok bool) {
	for _, o := range p.peers {
		if bytes.Equal(o.key.Marshal(), key.Marshal()) {
			return o.name, true
		}
	}
	return "", false
}

// Exec carries out what another key server asks. An order that is news here is
// passed on to the rest: whoever gave it may not reach them, or may be gone soon.
func (p *Peers) Exec(ctx context.Context, name string, session *sshverb.Session) error {
	if session.Verb == PlaceVerb {
		return p.tellWhere(ctx, session)
	}
	if session.Verb != Verb || p.c.Revoke == nil {
		return &sshverb.Error{Code: hint.ExitUsage, Text: "key servers may ask nothing else", Hint: Verb + " NAME"}
	}
	o, err := ParseOrder(session.Args, session.Stdin)
	if errors.Is(err, ErrBadOrder) {
		return &sshverb.Error{Code: hint.ExitUsage, Text: "this is not an order", Hint: Verb + " NAME", Err: err}
	}
	if err != nil {
		return err
	}
	if o.From == "" {
		o.From = name
	}
	known, err := p.c.Revoke(ctx, name, o)
	if err != nil {
		return err
	}
	if !known && o.ID != "" {
		// It is revoked here; that it could not be passed on is the log's affair.
		if err := p.forward(o, name); err != nil {
			p.c.Log.Error("a revocation is not passed on", "appliance", o.Appliance, "err", err)
		}
	}
	text, err := json.Marshal(receipt{Revoked: o.Appliance, ID: o.ID})
	if err != nil {
		return err
	}
	_, err = session.Stdout.Write(append(text, '\n'))
	return err
}

// dial connects to another key server, as this one's host key.
func (p *Peers) dial(ctx context.Context, to peer) (*sshverb.Client, error) {
	return sshverb.Dial(ctx, sshverb.Peer{
		Address: to.address, User: "key-server", Identity: p.c.HostKey, HostKey: to.key,
		Connect: p.c.Connect, Idle: p.c.Attempt, DialContext: p.c.DialContext,
	})
}
