package policy

import (
	"slices"
	"time"

	"farkeep/keyserver/place"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
)

// placing says how well the place of a request is known.
type placing int

const (
	placeUnjudged placing = iota // the policy does not ask
	placeUnknown                 // the VPN does not say
	placeKnown                   // it was there before
	placeFollowed                // it came there without having been carried
	placeFirst                   // nothing is on file yet
	placeOther
)

// whereabouts is the place of a request.
type whereabouts struct {
	standing placing
	network  place.Network
	endpoint string
	flaps    bool
}

// where judges what the VPN says of the peer.
func (j *judgement) where() whereabouts {
	if j.p.Place == site.PlaceNone {
		return whereabouts{standing: placeUnjudged}
	}
	s, at := j.f.Place, j.f.Now
	here := s.Here()
	if !s.Known() || s.Source != j.p.Place || s.Boot == "" || s.Boot != at.Boot || at.Up-here.Last > place.Stale {
		return whereabouts{standing: placeUnknown}
	}
	w := whereabouts{standing: placeOther, network: here.Network, flaps: s.Flaps}
	if here.Endpoint.IsValid() {
		w.endpoint = here.Endpoint.String()
	}
	if s.Source == site.PlaceWireGuard && j.a.VPNKey != "" && s.Peer != j.a.VPNKey {
		return w // it came through somebody else's tunnel
	}
	waits := here.Network.IsRelay() && at.Up-here.First < RelayPatience
	switch {
	case j.known(here.Network):
		w.standing = placeKnown
		if j.f.Request.Verb == keywire.Key && !j.settled() {
			w.standing = placeUnknown
		}
	case j.followed(j.next.Trusted.Network, j.next.Trusted.Boot):
		w.standing = placeFollowed
		if !j.settled() || j.returned() {
			w.standing = placeUnknown
		}
	case waits && (len(j.next.Networks) == 0 || j.direct()):
		w.standing = placeUnknown
	case len(j.next.Networks) == 0:
		w.standing = placeFirst
	}
	if w.flaps && w.standing == placeUnknown && j.f.Request.Verb == keywire.Key {
		w.standing = placeOther // waiting would not settle it: a person is asked
	}
	return w
}

// known reports whether the appliance was accepted from a network before. A relay
// says little, and whoever blocks direct paths gets one: it counts only for an
// appliance that has never been reached otherwise, or where a person said so.
func (j *judgement) known(n place.Network) bool {
	return slices.ContainsFunc(j.next.Networks, func(k KnownNetwork) bool {
		return k.Same(n) && j.next.latest(j.f.Now).Wall.Sub(k.Last) <= NetworkMemory && (!n.IsRelay() || k.asked() || !j.direct())
	})
}

// asked reports whether a person has said that the appliance may be there.
func (k KnownNetwork) asked() bool { return k.How == "approved" || k.How == "expected" }

// direct reports whether the appliance was ever reached without a relay.
func (j *judgement) direct() bool {
	return slices.ContainsFunc(j.next.Networks, func(k KnownNetwork) bool { return !k.IsRelay() })
}

// settled reports whether the peer was heard from one network alone for a while.
// A copy of its card elsewhere sends with the same key: for a moment the newest
// packet may be the appliance's while the request is the copy's, or the other way
// round. The next keepalive, or the copy's own packets, give that away.
func (j *judgement) settled() bool {
	trail := j.f.Place.Trail
	return len(trail) < 2 || j.f.Now.Up-trail[len(trail)-2].Last >= SettleTime
}

// returned reports whether the peer lately came back to a network that it had
// left shortly before: then there may be two, and neither is followed.
func (j *judgement) returned() bool {
	trail := j.f.Place.Trail
	for k := range trail {
		for i := range k {
			if trail[i].Network.Name == trail[k].Network.Name && j.f.Now.Up-trail[k].First < FollowGap && gap(trail[i], trail[k]) < FollowGap {
				return true
			}
		}
	}
	return false
}

// followed reports whether the VPN saw the peer go from a network to where it is
// now without a silence in which it could have been carried there, and with the
// boot id that it had there.
func (j *judgement) followed(from place.Network, boot string) bool {
	trail := j.f.Place.Trail
	if boot == "" || boot != j.f.Request.Claims.Boot || from.Name == "" {
		return false
	}
	for i := len(trail) - 1; i >= 0; i-- {
		if trail[i].Network.Same(from) {
			return true
		}
		if i == 0 || gap(trail[i-1], trail[i]) > FollowGap {
			return false
		}
	}
	return false
}

func gap(before, after place.Visit) time.Duration { return after.First - before.Last }

// settle remembers the network of an accepted request.
func (j *judgement) settle(w whereabouts, how string) {
	n := &j.next
	switch w.standing {
	case placeUnjudged, placeUnknown:
		return
	case placeKnown:
	case placeFirst:
		how = "first"
	case placeFollowed:
		how = "followed"
		if w.network.IsRelay() && j.direct() {
			return // trusted for now, and not known from now on
		}
	}
	wall := stamp(j.f.Now)
	for i, k := range n.Networks {
		if k.Name == w.network.Name {
			n.Networks[i].Last = wall
			n.Networks[i].AS = w.network.AS
			if w.standing != placeKnown {
				n.Networks[i].How = how
			}
			return
		}
	}
	if w.standing == placeKnown {
		how = "alike"
	}
	if len(n.Networks) >= maxNetworks {
		oldest := 0
		for i, k := range n.Networks {
			if k.Last.Before(n.Networks[oldest].Last) {
				oldest = i
			}
		}
		n.Networks = slices.Delete(n.Networks, oldest, oldest+1)
	}
	n.Networks = append(n.Networks, KnownNetwork{Network: w.network, First: wall, Last: wall, How: how})
}
