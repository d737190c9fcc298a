package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
)

// device is a machine with the appliance's card or a copy of it: the appliance
// itself, or a thief's.
type device struct {
	endpoint netip.AddrPort
	boot     string
	bootAt   time.Duration
	token    keywire.Token
	lies     bool // claims the boot of the other one
}

// play is a random sequence of everything that can happen, beside a model of what
// must never be granted. The model knows the truth: true time, who was carried
// where, and what a person ordered. It is written without a look at Decide.
type play struct {
	r   *rand.Rand
	a   site.Appliance
	s   policy.State
	log []string

	t        time.Duration // true time
	lie      time.Duration // what the wall clock is ahead of it
	bootAt   time.Duration // of the key server
	boot     string
	recorder *place.Recorder
	file     place.File
	received uint64
	devices  []*device
	tokens   int

	// The model.
	revoked          bool
	fine             map[string]bool // networks where the appliance may be
	following        string          // where it was when it was last accepted
	followBoot       string
	heard            []heard // what the VPN received, in this boot of the key server
	keys             []time.Duration
	issued, shown    keywire.Token
	anyToken         bool
	lastFine         time.Duration
	everFine, absent bool
	approvals        int
	repeat           *repetition // of an approved key; nil: none is open
	expectations     int
	expectUntil      time.Duration
	granted          int
	sound            bool // nothing crashes
}

// repetition is the one that an approved key may have.
type repetition struct {
	at                  time.Duration
	boot, network, home string
}

type heard struct {
	at      time.Duration
	network string
}

var playNets = []netip.AddrPort{
	netip.MustParseAddrPort("84.150.1.1:1000"), netip.MustParseAddrPort("91.20.1.1:1000"), netip.MustParseAddrPort("46.80.1.1:1000"),
	netip.MustParseAddrPort("198.51.100.1:1000"), netip.MustParseAddrPort("203.0.113.1:1000"), netip.MustParseAddrPort("[2001:db8::1]:1000"),
}

func newPlay(seed uint64) *play {
	p := &play{r: rand.New(rand.NewPCG(seed, 7)), fine: map[string]bool{}, t: 24 * time.Hour}
	p.a = site.Appliance{Name: "attic", LUKS: disk, VPNAddress: vpnHome, VPNKey: vpnKey}
	p.a.KeyPolicy = site.KeyPolicy{
		Approval:   []string{site.ApprovalAfterAbsence, site.ApprovalAfterAbsence, site.ApprovalAlways, site.ApprovalNever}[p.r.IntN(4)],
		Place:      []string{site.PlaceWireGuard, site.PlaceWireGuard, site.PlaceNone}[p.r.IntN(3)],
		Token:      []string{site.TokenRequired, site.TokenRequired, site.TokenIgnored}[p.r.IntN(3)],
		KeysPerDay: 1 + p.r.IntN(8),
	}
	p.a.SetDefaults()
	p.s = policy.State{Appliance: "attic", Standing: policy.Standing{State: policy.Enabled}}
	p.devices = []*device{{endpoint: playNets[0], boot: bootA, bootAt: p.t}}
	p.restartServer()
	p.sound = true
	if wrong := p.request(p.devices[0]); wrong != "" {
		panic(wrong)
	}
	p.sound = false
	return p
}

func (p *play) say(format string, args ...any) {
	p.log = append(p.log, fmt.Sprintf("%v: ", p.t)+fmt.Sprintf(format, args...))
}

func (p *play) restartServer() {
	p.boot, p.bootAt = fmt.Sprintf("%032x", p.r.Uint64()), p.t
	p.recorder, p.file, p.heard, p.received = place.NewRecorder(p.boot, place.File{}, nil), place.File{}, nil, 0
}

func (p *play) now() moment.Moment {
	return moment.Moment{Wall: yearStart.Add(p.t + p.lie), Boot: p.boot, Up: p.t - p.bootAt}
}

// hear lets the VPN receive something from a device.
func (p *play) hear(d *device) {
	for range 2 {
		p.received += 100
		p.file = p.recorder.Observe(p.t-p.bootAt, []place.Observation{{
			Source: place.SourceWireGuard, Peer: vpnKey, Allowed: []netip.Prefix{netip.PrefixFrom(vpnHome, 32)}, Endpoint: d.endpoint, Received: p.received,
		}})
	}
	p.heard = append(p.heard, heard{p.t, network(d)})
}

func network(d *device) string { return place.NetworkOf(d.endpoint.Addr()).Name }

// followed is the model's word on whether the one that asks came to where it is
// without a silence of more than ten minutes in between.
func (p *play) followed(d *device, boot string) bool {
	if boot == "" || boot != p.followBoot {
		return false
	}
	for i := len(p.heard) - 1; i >= 0; i-- {
		if p.heard[i].network == p.following {
			return true
		}
		if i > 0 && p.heard[i-1].network != p.heard[i].network && p.heard[i].at-p.heard[i-1].at > 10*time.Minute {
			return false
		}
	}
	return false
}

func (p *play) request(d *device) (wrong string) {
	verb := []keywire.Verb{keywire.Key, keywire.Key, keywire.Renew, keywire.CheckIn}[p.r.IntN(4)]
	p.hear(d)
	r := keywire.Request{Verb: verb, UUID: disk, Token: d.token, Claims: keywire.Claims{Boot: d.boot, Up: int64((p.t-d.bootAt)/time.Second) + 1}}
	if d.lies {
		r.Claims.Boot, r.Claims.Up = p.devices[0].boot, int64((p.t-p.devices[0].bootAt)/time.Second)+1
	}
	if verb == keywire.CheckIn {
		r.UUID = ""
	}
	p.tokens++
	f := policy.Facts{Request: r, From: vpnHome, Now: p.now(), NewToken: keywire.Token("t" + strconv.Itoa(p.tokens))}
	if p.a.KeyPolicy.Place != site.PlaceNone {
		f.Place = p.file.Sighting(p.a.KeyPolicy.Place, vpnHome)
	}
	dec := policy.Decide(p.a, p.s, f)
	p.say("%s from %s, token %q, boot %.4s: %s, %s %q", verb, network(d), r.Token.Reveal(), r.Claims.Boot, dec.Verdict, dec.Reason, dec.Asks)
	if !p.sound && p.r.IntN(20) == 0 {
		p.say("crash: nothing was written, and nothing was sent")
		return ""
	}
	p.s = reread(dec.Next)
	if dec.Verdict != policy.Grant {
		if !p.revoked {
			p.silence()
		}
		return ""
	}
	p.granted++
	wrong = p.judge(d, r, dec)
	if dec.Token != "" && p.r.IntN(10) > 0 {
		d.token = dec.Token
	}
	return wrong
}

// silence notes, as a person would who sees all requests, that the appliance was
// not heard of for too long.
func (p *play) silence() {
	if p.everFine && p.t-p.lastFine > p.a.KeyPolicy.Absence.Std() {
		p.absent = true
	}
}

// judge says what is wrong with a grant.
func (p *play) judge(d *device, r keywire.Request, dec policy.Decision) string {
	k := p.a.KeyPolicy
	key := r.Verb == keywire.Key
	excused := dec.Reason == policy.ReasonApproved || dec.Reason == policy.ReasonAnnounced
	unasked := k.Approval == site.ApprovalNever
	p.silence()

	if p.revoked {
		return "granted to a revoked appliance"
	}
	if r.Verb == keywire.Renew {
		defer func() { p.repeat = nil }()
	}
	switch dec.Reason {
	case policy.ReasonApproved:
		again := repetition{p.t, r.Claims.Boot, network(d), p.boot}
		switch was := p.repeat; {
		case p.approvals > 0:
			p.approvals, p.repeat = p.approvals-1, nil
			if key && k.Approval == site.ApprovalAlways && r.Claims.Boot != "" {
				p.repeat = &again
			}
		case key && was != nil && was.boot == again.boot && was.home == again.home && p.t-was.at < 15*time.Minute &&
			(k.Place == site.PlaceNone || was.network == again.network) && slices.Equal(dec.Asks, []string{policy.AskAlways}):
			p.repeat = nil
		default:
			return "an approval that nobody gave, or that was used up"
		}
	case policy.ReasonAnnounced:
		if p.t > p.expectUntil || p.expectations == 0 {
			return "an expectation that nobody has, or that is over"
		}
		if r.Verb == keywire.CheckIn {
			return "" // answered, and nothing changes
		}
		p.expectations--
		p.absent = false
	}
	if key {
		if k.Approval == site.ApprovalAlways && dec.Reason != policy.ReasonApproved {
			return "a key without an approval, which each needs"
		}
		n := 0
		for _, at := range p.keys {
			if p.t-at < 24*time.Hour {
				n++
			}
		}
		if n >= k.KeysPerDay {
			return "more keys than a day allows"
		}
		p.keys = append(p.keys, p.t)
		if p.absent && !excused && !unasked {
			return "a key after a silence, without an approval"
		}
		p.absent = false
	}
	if k.Token == site.TokenRequired {
		match := !p.anyToken || r.Token == p.shown || r.Token != "" && r.Token == p.issued
		if !match && !excused && !unasked {
			return "the token is neither the last one shown nor the last one issued"
		}
		switch {
		case !match, !p.anyToken && key:
			p.shown, p.issued = r.Token, ""
		case r.Token != "" && r.Token == p.issued:
			p.shown, p.issued = r.Token, ""
		}
		if key {
			p.issued, p.anyToken = dec.Token, true
		}
		p.anyToken = p.shown != "" || p.issued != ""
	}
	if k.Place != site.PlaceNone {
		here := network(d)
		if len(p.fine) > 0 && !p.fine[here] && !excused && !unasked && !p.followed(d, r.Claims.Boot) {
			return "from another place, without an approval"
		}
		p.fine[here] = true
		p.following, p.followBoot = here, r.Claims.Boot
	}
	p.lastFine, p.everFine = p.t, true
	return ""
}

// step does one thing.
func (p *play) step() (wrong string) {
	d := p.devices[p.r.IntN(len(p.devices))]
	order := func(what string, do func() (policy.State, error)) bool {
		s, err := do()
		if err != nil {
			return false
		}
		p.say("%s", what)
		p.s = reread(s)
		return true
	}
	switch n := p.r.IntN(100); {
	case n < 45:
		return p.request(d)
	case n < 58:
		p.t += time.Duration(p.r.Int64N(int64(9 * time.Minute)))
	case n < 68:
		p.t += time.Duration(p.r.Int64N(int64(30 * time.Hour)))
	case n < 70:
		p.t += time.Duration(p.r.Int64N(int64(200 * time.Hour)))
	case n < 76:
		d.endpoint = playNets[p.r.IntN(len(playNets))]
		p.say("a device is in %s now", network(d))
	case n < 80:
		d.boot, d.bootAt = fmt.Sprintf("%032x", p.r.Uint64()), p.t
		p.say("a device restarts")
	case n < 82 && len(p.devices) < 3:
		c := *p.devices[0]
		c.lies = p.r.IntN(2) == 0
		p.devices = append(p.devices, &c)
		p.say("the card is copied")
	case n < 85:
		p.lie = time.Duration(p.r.Int64N(int64(400*24*time.Hour))) - 200*24*time.Hour
		p.say("the key server's clock is set, %v ahead", p.lie)
	case n < 86:
		// A key server that starts with a wrong clock is beyond what can be known.
		// One whose clock was wrong before, and after its first look at it, is not.
		p.lie = 0
		p.t += time.Minute
		p.restartServer()
		p.say("the key server restarts")
		p.sound = true
		defer func() { p.sound = false }()
		return p.request(d)
	case n < 88:
		if order("revoked", func() (policy.State, error) { return policy.Revoke(p.s, "ada", "stolen", p.now()) }) {
			p.revoked, p.approvals, p.repeat, p.expectations = true, 0, nil, 0
		}
	case n < 91:
		if order("allowed", func() (policy.State, error) { return policy.Allow(p.s, "ada", "found", p.now()) }) {
			p.revoked = false
		}
	case n < 95 && len(p.s.Waiting) > 0:
		w := p.s.Waiting[p.r.IntN(len(p.s.Waiting))]
		if order("approved "+w.ID, func() (policy.State, error) { return policy.Approve(p.s, w.ID, "ada", "me", p.now()) }) {
			p.approvals, p.repeat = 1, nil
		}
	case n < 96 && len(p.s.Waiting) > 0:
		order("denied", func() (policy.State, error) { return policy.Deny(p.s, p.s.Waiting[0].ID, "ada", "not me") })
	case n < 98:
		span := time.Duration(1+p.r.IntN(72)) * time.Hour
		if order("expected", func() (policy.State, error) {
			return policy.Expect(p.s, p.now().Wall.Add(span), "ada", "it moves", p.now())
		}) {
			p.expectations, p.expectUntil = 1, p.t+span
		}
	}
	return ""
}

// TestNeverGranted plays random sequences of requests, moves, copies, restarts,
// clock changes, crashes and orders. The long form is FARKEEP_PLAYS=1000000.
func TestNeverGranted(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("FARKEEP_PLAYS"))
	if err != nil || n < 1 {
		n = 100
	}
	granted, steps := 0, 0
	for seed := range n {
		p := newPlay(uint64(seed))
		for range 150 {
			steps++
			if wrong := p.step(); wrong != "" {
				t.Fatalf("seed %d, %+v: %s\n%s", seed, p.a.KeyPolicy, wrong, strings.Join(p.log[max(0, len(p.log)-40):], "\n"))
			}
			if len(p.s.Waiting) > 8 || len(p.s.Networks) > 256 {
				t.Fatalf("seed %d: the state has grown", seed)
			}
		}
		granted += p.granted
	}
	if granted < n {
		t.Errorf("%d grants in %d plays: they show nothing", granted, n)
	}
	t.Logf("%d plays, %d steps, %d grants", n, steps, granted)
}

// A model that finds nothing proves nothing: with each rule broken it must object.
func TestTheModelObjects(t *testing.T) {
	d := policy.Decision{Verdict: policy.Grant, Reason: policy.ReasonExpected}
	ask := keywire.Request{Verb: keywire.Key, UUID: disk, Claims: keywire.Claims{Boot: bootB}}
	for name, breakIt := range map[string]func(*play){
		"revoked":  func(p *play) { p.revoked = true },
		"rate":     func(p *play) { p.a.KeyPolicy.KeysPerDay = 0 },
		"silence":  func(p *play) { p.absent = true },
		"token":    func(p *play) { p.anyToken, p.shown, p.issued = true, "one", "other" },
		"place":    func(p *play) { p.fine, p.following = map[string]bool{"other": true}, "other" },
		"always":   func(p *play) { p.a.KeyPolicy.Approval = site.ApprovalAlways },
		"approval": func(p *play) { d.Reason = policy.ReasonApproved },
		"expected": func(p *play) { d.Reason = policy.ReasonAnnounced },
	} {
		p := newPlay(1)
		p.a.KeyPolicy.Approval, p.a.KeyPolicy.Place, p.a.KeyPolicy.Token, p.a.KeyPolicy.KeysPerDay = site.ApprovalAfterAbsence, site.PlaceWireGuard, site.TokenRequired, 2
		d.Reason = policy.ReasonExpected
		if wrong := p.judge(p.devices[0], ask, d); wrong != "" {
			t.Fatalf("nothing is broken: %s", wrong)
		}
		p = newPlay(1)
		p.a.KeyPolicy.Approval, p.a.KeyPolicy.Place, p.a.KeyPolicy.Token, p.a.KeyPolicy.KeysPerDay = site.ApprovalAfterAbsence, site.PlaceWireGuard, site.TokenRequired, 2
		breakIt(p)
		if p.judge(p.devices[0], ask, d) == "" {
			t.Errorf("%s: no objection", name)
		}
	}
}
