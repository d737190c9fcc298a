package place

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"farkeep/keyserver/moment"
)

// MaxTold bounds what [Sighting.Tell] writes, in bytes.
const MaxTold = 8 << 10

// told is a sighting as one machine tells it to another. The clocks of the two
// have nothing in common, so that it has ages and no times.
type told struct {
	Source string      `json:"source,omitempty"`
	Peer   string      `json:"peer,omitempty"`
	Flaps  bool        `json:"flaps,omitempty"`
	Trail  []toldVisit `json:"trail,omitempty"` // oldest first
}

type toldVisit struct {
	Network  Network        `json:"network"`
	Endpoint netip.AddrPort `json:"endpoint,omitzero"`
	First    time.Duration  `json:"first"` // ago, in nanoseconds
	Last     time.Duration  `json:"last"`
}

// Tell writes s for another machine: how long ago, at now, everything was.
func (s Sighting) Tell(now moment.Moment) ([]byte, error) {
	if !s.Known() {
		return []byte("{}"), nil
	}
	if s.Boot != now.Boot {
		return nil, errors.New("tell where a peer is: it was seen in another boot")
	}
	t := told{Source: s.Source, Peer: s.Peer, Flaps: s.Flaps}
	for _, v := range s.Trail {
		t.Trail = append(t.Trail, toldVisit{v.Network, v.Endpoint, max(now.Up-v.First, 0), max(now.Up-v.Last, 0)})
	}
	return json.Marshal(t)
}

// ParseTold reads what another machine told, at now: a sighting by this machine's
// clock, the zero one where the other knows nothing. What [Recorder] would not
// have seen is an error.
func ParseTold(text []byte, now moment.Moment) (Sighting, error) {
	s, err := parseTold(text, now)
	if err != nil {
		return Sighting{}, fmt.Errorf("read where a peer is: %w", err)
	}
	return s, nil
}

func parseTold(text []byte, now moment.Moment) (Sighting, error) {
	if len(text) > MaxTold {
		return Sighting{}, fmt.Errorf("longer than %d bytes", MaxTold)
	}
	var t told
	dec := json.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(&t); err != nil {
		return Sighting{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Sighting{}, errors.New("there is something behind it")
	}
	if len(t.Trail) == 0 {
		return Sighting{}, nil
	}
	// The same rules as for a file, on an axis that ends now.
	const end = 1 << 62
	p := Peer{Source: t.Source, Peer: t.Peer}
	s := Sighting{Boot: now.Boot, Source: t.Source, Peer: t.Peer, Flaps: t.Flaps}
	for _, v := range t.Trail {
		if v.First < 0 || v.First > end || v.Last < 0 || v.Last > v.First {
			return Sighting{}, errors.New("an age makes no sense")
		}
		p.Trail = append(p.Trail, Visit{v.Network, v.Endpoint, end - v.First, end - v.Last})
		s.Trail = append(s.Trail, Visit{v.Network, v.Endpoint, now.Up - v.First, now.Up - v.Last})
	}
	return s, p.check(end)
}
