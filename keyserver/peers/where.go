package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/shared/hint"
	"farkeep/shared/sshverb"
)

const (
	// PlaceVerb asks another key server where the VPN sees the peer with an address.
	// It gives evidence and decides nothing.
	PlaceVerb = "peer-place"
	// WhereWait bounds how long the others are asked.
	WhereWait = 10 * time.Second
	// whereAtOnce bounds how many questions are under way to one key server, which
	// takes so many connections from one address and more.
	whereAtOnce = 8
)

// Where asks the others where the VPN sees a peer, all at once, and takes the word
// of the first that knows. Nothing, without an error, means that somebody answered
// and nobody knows.
func (p *Peers) Where(ctx context.Context, source string, from netip.Addr) (place.Sighting, error) {
	type answer struct {
		seen place.Sighting
		err  error
	}
	answers := make(chan answer, len(p.peers))
	var asking sync.WaitGroup
	defer asking.Wait()
	ctx, cancel := context.WithTimeout(ctx, WhereWait)
	defer cancel() // who has not answered by then need not
	for _, o := range p.peers {
		asking.Go(func() {
			seen, err := p.where(ctx, o, source, from)
			if err != nil {
				err = fmt.Errorf("ask the key server %s where %s is: %w", o.name, from, err)
			}
			answers <- answer{seen, err}
		})
	}
	var errs []error
	for range p.peers {
		a := <-answers
		if a.seen.Known() {
			p.whereErr.Store(nil)
			return a.seen, nil
		}
		if a.err != nil {
			errs = append(errs, a.err)
		}
	}
	var err error
	switch {
	case len(p.peers) == 0:
		err = errors.New("the site has no other key server that could say where an appliance is")
	case len(errs) == len(p.peers):
		err = errors.Join(errs...)
	}
	p.whereErr.Store(&err)
	return place.Sighting{}, err
}

// Blind is why the others could not be asked the last time; nil if one answered, or
// if nobody asked yet.
func (p *Peers) Blind() error {
	if err := p.whereErr.Load(); err != nil {
		return *err
	}
	return nil
}

func (p *Peers) where(ctx context.Context, o peer, source string, from netip.Addr) (place.Sighting, error) {
	select {
	case p.asking[o.name] <- struct{}{}:
		defer func() { <-p.asking[o.name] }()
	case <-ctx.Done():
		return place.Sighting{}, ctx.Err()
	}
	client, err := p.dial(ctx, o)
	if err != nil {
		return place.Sighting{}, err
	}
	defer client.Close()
	text, err := client.Run(ctx, PlaceVerb+" "+from.WithZone("").String()+" "+source, bytes.NewReader(nil), place.MaxTold)
	if err != nil {
		return place.Sighting{}, err
	}
	// By the time at which it arrived: the network before the last must not seem
	// longer ago than it was.
	now, err := moment.Now(p.c.Now)
	if err != nil {
		return place.Sighting{}, err
	}
	return place.ParseTold(text, now)
}

// tellWhere answers PlaceVerb.
func (p *Peers) tellWhere(ctx context.Context, session *sshverb.Session) error {
	if len(session.Args) != 2 {
		return notPlace(nil)
	}
	from, err := netip.ParseAddr(session.Args[0])
	source := session.Args[1]
	if err != nil || from.Zone() != "" || source != place.SourceWireGuard && source != place.SourceTailscale {
		return notPlace(err)
	}
	var seen place.Sighting
	if p.c.Place != nil {
		if seen, err = p.c.Place(ctx, source, from); err != nil {
			// The other one asks again; why is for this one's log.
			return &sshverb.Error{Code: hint.ExitUnreachable, Text: "the VPN does not say where peers are", Err: err}
		}
	}
	now, err := moment.Now(p.c.Now)
	if err != nil {
		return err
	}
	text, err := seen.Tell(now)
	if err != nil {
		return err
	}
	_, err = session.Stdout.Write(append(text, '\n'))
	return err
}

func notPlace(err error) error {
	return &sshverb.Error{Code: hint.ExitUsage, Text: "this is no question between key servers", Hint: PlaceVerb + " ADDRESS wireguard|tailscale", Err: err}
}
