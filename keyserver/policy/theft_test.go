package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
)

// Where thieves have their lines: none of it is any household's.
var elsewhereBlocks = prefixes("62.46.0.0/15", "77.20.0.0/14", "5.146.0.0/15", "145.253.0.0/16", "185.220.100.0/22", "2a02:8100::/26", "2001:16b8::/32")

// snapshot is the household as it stands, to be robbed: the key server's state and
// trail, and what is on the card. What happens to it does not happen to h.
func (h *household) snapshot(seed uint64) *household {
	c := *h
	c.r = rand.New(rand.NewPCG(seed, 1))
	c.queue, c.sure, c.tally = nil, true, tally{}
	c.state = reread(h.state)
	c.power, c.link, c.homeUp = true, true, true
	c.recorder = place.NewRecorder(c.serverBoot, c.file, c.as)
	c.hear()
	return &c
}

// carry puts the appliance behind a thief's line, after a while.
func (h *household) carry(d time.Duration) {
	h.t += d
	h.endpoint = netip.AddrPortFrom(addressIn(h.r, elsewhereBlocks[h.r.IntN(len(elsewhereBlocks))]), uint16(1024+h.r.IntN(60000)))
	h.relayUntil = 0
	h.line.relay = ""
}

// insist asks for the key every ten minutes for so many days, from a line that
// gets another address every night, and reports what was said.
func (h *household) insist(days int) (said map[policy.Verdict]int) {
	said = map[policy.Verdict]int{}
	for day := range days {
		if day > 0 {
			h.carry(0)
			h.restart()
		}
		for range 144 {
			v, _ := h.request(keywire.Key)
			said[v]++
			h.t += 10 * time.Minute
		}
	}
	return said
}

// thefts are what may happen to an appliance. Each wants that the thief is given
// nothing, or that what he got is found; it returns what went wrong.
var thefts = []struct {
	name string
	do   func(*household) string
}{
	{"powered off and carried away", func(h *household) string {
		h.carry(h.span(5*time.Minute, 30*24*time.Hour))
		h.restart()
		return nothing(h.insist(20))
	}},
	{"the card alone, in a board of the thief's", func(h *household) string {
		h.carry(h.span(5*time.Minute, 3*24*time.Hour))
		h.restart()
		return nothing(h.insist(5))
	}},
	{"carried away, with every claim as it was", func(h *household) string {
		h.carry(h.span(11*time.Minute, 3*24*time.Hour))
		return nothing(h.insist(1))
	}},
	{"running on a battery, seen again after more than ten minutes", func(h *household) string {
		h.request(keywire.Key)
		h.carry(h.span(11*time.Minute, 24*time.Hour))
		for range 20 {
			if v, _ := h.request(keywire.Renew); v == policy.Grant {
				return "its lease was renewed"
			}
			h.t += time.Minute
		}
		return nothing(h.insist(2))
	}},
	{"running on a battery, seen again at once, and revoked", func(h *household) string {
		h.carry(time.Minute)
		h.state = order(policy.Revoke(h.state, "ada", "stolen", h.moment()))
		if v, _ := h.request(keywire.Renew); v != policy.Refuse {
			return "its lease was renewed"
		}
		return nothing(h.insist(5))
	}},
	{"revoked, and it never left", func(h *household) string {
		h.state = order(policy.Revoke(h.state, "ada", "stolen", h.moment()))
		h.t += time.Minute
		for _, verb := range []keywire.Verb{keywire.Key, keywire.Renew, keywire.CheckIn} {
			if v, _ := h.request(verb); v != policy.Refuse {
				return fmt.Sprintf("%s: %s", verb, v)
			}
		}
		return ""
	}},
	{"a copy of the card elsewhere, while the appliance runs", func(h *household) string {
		home, relay, until, token := h.endpoint, h.line.relay, h.relayUntil, h.token
		boot, bootAt := h.boot, h.bootAt
		copied := token
		for range 100 {
			// The copy.
			h.carry(30 * time.Second)
			h.restart()
			h.token = copied
			for _, verb := range []keywire.Verb{keywire.Key, keywire.Renew, keywire.CheckIn} {
				if v, _ := h.request(verb); v == policy.Grant {
					return fmt.Sprintf("the copy got a %s", verb)
				}
			}
			// The appliance, which is at home and goes on.
			h.t += 30 * time.Second
			h.endpoint, h.line.relay, h.relayUntil, h.boot, h.bootAt, h.token = home, relay, until, boot, bootAt, token
			h.request(keywire.CheckIn)
			token = h.token
		}
		if len(h.state.Waiting) == 0 {
			return "nobody heard of the copy"
		}
		return ""
	}},
	{"a copy of the card elsewhere, and their packets cross", func(h *household) string {
		home, relay, until, token := h.endpoint, h.line.relay, h.relayUntil, h.token
		boot, bootAt := h.boot, h.bootAt
		copied, copyBoot, copyBootAt := token, h.id(), h.t
		original := func() {
			h.endpoint, h.line.relay, h.relayUntil, h.boot, h.bootAt, h.token = home, relay, until, boot, bootAt, token
		}
		h.carry(0)
		away := h.endpoint
		copyAsks := func() string {
			h.boot, h.bootAt, h.token = copyBoot, copyBootAt, copied
			if v, _ := h.request(keywire.Key); v == policy.Grant {
				return "the copy got a key"
			}
			return ""
		}
		for range 60 {
			// The copy asks, and the newest packet is the appliance's.
			h.t += 20 * time.Second
			h.endpoint, h.line.relay, h.relayUntil = away, "", 0
			h.hear()
			h.t += time.Second
			original()
			if wrong := copyAsks(); wrong != "" {
				return wrong
			}
			// The appliance asks, and the newest packet is the copy's.
			h.t += 20 * time.Second
			original()
			h.hear()
			h.t += time.Second
			h.endpoint, h.line.relay, h.relayUntil = away, "", 0
			if v, _ := h.request(keywire.CheckIn); v == policy.Grant {
				return "the copy's place was taken for the appliance's"
			}
			h.t += time.Second
			if wrong := copyAsks(); wrong != "" {
				return wrong
			}
		}
		if len(h.state.Waiting) == 0 {
			return "nobody heard of the copy"
		}
		return ""
	}},
	{"a copy of the card at the same line: found when the other one asks", func(h *household) string {
		first := h.token
		h.t += time.Hour
		h.restart()
		if v, _ := h.request(keywire.Key); v != policy.Grant {
			return "" // not even once
		}
		h.request(keywire.Renew)
		// The appliance itself, with the token that it has.
		h.t += time.Hour
		h.restart()
		h.token = first
		d := policy.Decide(h.a, h.state, policy.Facts{Request: keywire.Request{Verb: keywire.CheckIn, Token: first}, From: vpnHome, Place: h.sightingNow(), Now: h.moment()})
		if d.Verdict != policy.Refuse || d.Reason != policy.AskToken || !d.Unexpected {
			return fmt.Sprintf("its checkin: %s: %s, to be told %v", d.Verdict, d.Reason, d.Unexpected)
		}
		if v, _ := h.request(keywire.Key); v != policy.Hold {
			return fmt.Sprintf("its key: %s", v)
		}
		return ""
	}},
	{"hidden for longer than the absence, then at the same line", func(h *household) string {
		h.t += 97 * time.Hour
		h.restart()
		h.request(keywire.CheckIn) // which hides nothing
		v, _ := h.request(keywire.Key)
		return nothing(map[policy.Verdict]int{v: 1})
	}},
	{"carried away while a request of somebody at home is approved", func(h *household) string {
		h.carry(20 * time.Minute)
		h.restart()
		h.token = "damaged"
		h.request(keywire.Key)
		// The approval is for what was seen there, with that token. The thief has the
		// right token, and another line.
		s, err := policy.Approve(h.state, "", "ada", "I replaced the card", h.moment())
		if err != nil {
			return err.Error()
		}
		h.state = s
		h.carry(time.Hour)
		return nothing(h.insist(1))
	}},
	{"a relay forced upon an appliance that has direct paths", func(h *household) string {
		if h.line.source != place.SourceTailscale || !slices.ContainsFunc(h.state.Networks, func(n policy.KnownNetwork) bool { return !n.IsRelay() }) {
			return ""
		}
		h.carry(h.span(11*time.Minute, 24*time.Hour))
		h.restart()
		h.line.relay = "fra"
		return nothing(func() map[policy.Verdict]int {
			said := map[policy.Verdict]int{}
			for range 300 {
				v, _ := h.request(keywire.Key)
				said[v]++
				h.t += 10 * time.Minute
			}
			return said
		}())
	}},
}

func (h *household) sightingNow() place.Sighting { h.hear(); return h.sighting }

func order(s policy.State, err error) policy.State {
	if err != nil {
		panic(err)
	}
	return s
}

// nothing complains if a key was given.
func nothing(said map[policy.Verdict]int) string {
	if said[policy.Grant] > 0 {
		return fmt.Sprintf("it got its key: %v", said)
	}
	if said[policy.Hold] == 0 && said[policy.Refuse] == 0 {
		return fmt.Sprintf("nobody was asked: %v", said)
	}
	return ""
}

// TestThefts robs every household of the simulated year, at times that nobody
// chose, with and without a table of networks.
func TestThefts(t *testing.T) {
	n := years(1)
	for _, table := range []bool{true, false} {
		for _, l := range lines() {
			t.Run(fmt.Sprintf("table=%v/%s", table, strings.ReplaceAll(l.name, " ", "_")), func(t *testing.T) {
				t.Parallel()
				tried, alike := 0, 0
				for seed := range n {
					for _, d := range []time.Duration{36 * time.Hour, 10*24*time.Hour + 2*time.Hour} {
						h := newHousehold(uint64(1000+seed), l, table)
						h.run(d)
						if h.state.LastKey.IsZero() {
							t.Fatal("it never had a key")
						}
						for i, theft := range thefts {
							tried++
							if wrong := theft.do(h.snapshot(uint64(seed*100 + i))); wrong != "" {
								t.Errorf("household %d after %v: %s: %s", seed, d, theft.name, wrong)
							}
						}
						// What the place cannot tell: the thief's line is of the same provider.
						c := h.snapshot(uint64(seed))
						c.t += time.Hour
						c.dial(false)
						c.restart()
						if v, _ := c.request(keywire.Key); v == policy.Grant {
							alike++
						}
					}
				}
				t.Logf("%d thefts; of %d to another line of the same provider, %d got the key", tried, 2*n, alike)
			})
		}
	}
}
