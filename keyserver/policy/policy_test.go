package policy_test

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
)

const (
	disk    = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	vpnKey  = "Ly+EMK/V66hwOXYwQIySB9B9JiMRsYOUcEoxMNBcmzE="
	otherVP = "uLoNi33NtkJDyUSpUrTSJVvI9t2o8oiiNNF6wOHetEY="
	bootA   = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	bootB   = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	machine = "0123456789abcdef0123456789abcdef"
)

// day0 is a Sunday noon, UTC.
var day0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

var (
	home      = netip.MustParseAddrPort("84.150.1.2:40000")
	homeAgain = netip.MustParseAddrPort("84.150.99.9:41000") // the same /16
	thief     = netip.MustParseAddrPort("198.51.100.7:5000")
	vpnHome   = netip.MustParseAddr("10.77.0.2")
)

// world is one appliance that runs well, one request of it, and the clock.
type world struct {
	a     site.Appliance
	s     policy.State
	f     policy.Facts
	now   moment.Moment
	token keywire.Token // the one that the appliance holds
	count int
}

func newWorld() *world {
	w := &world{a: site.Appliance{Name: "attic", LUKS: disk, VPNAddress: vpnHome, VPNKey: vpnKey}}
	w.a.SetDefaults()
	w.a.KeyPolicy.Place = site.PlaceWireGuard
	w.now = moment.Moment{Wall: day0.Add(-48 * time.Hour), Boot: machine, Up: 240 * time.Hour}
	w.s = policy.State{Appliance: "attic", Standing: policy.Standing{State: policy.Enabled}}
	w.ask(keywire.Key)
	w.at(home)
	w.must(policy.Grant)
	w.pass(47 * time.Hour)
	w.ask(keywire.Renew)
	w.at(home)
	w.must(policy.Grant)
	w.pass(time.Hour)
	w.ask(keywire.Key)
	w.at(home)
	return w
}

// pass lets both clocks run.
func (w *world) pass(d time.Duration) {
	w.now.Wall, w.now.Up = w.now.Wall.Add(d), w.now.Up+d
	w.f.Now = w.now
}

// ask prepares a request, as the appliance itself would make it.
func (w *world) ask(verb keywire.Verb) {
	w.count++
	r := keywire.Request{Verb: verb, UUID: disk, Token: w.token, Claims: keywire.Claims{Boot: bootA, Serial: "10000000abcdef", Up: int64(w.now.Up/time.Second) - 3600}}
	if verb == keywire.CheckIn {
		r.UUID = ""
	}
	w.f.Request, w.f.From, w.f.Now = r, vpnHome, w.now
	w.f.NewToken = keywire.Token(strings.Repeat("x", 20) + time.Duration(w.count).String())
}

// at puts the peer at an endpoint, where it has been for two days.
func (w *world) at(e netip.AddrPort) { w.f.Place = w.sighting(w.visit(e, 50*time.Hour, 0)) }

func (w *world) sighting(trail ...place.Visit) place.Sighting {
	return place.Sighting{Boot: machine, Source: place.SourceWireGuard, Peer: vpnKey, Trail: trail}
}

func (w *world) visit(e netip.AddrPort, first, last time.Duration) place.Visit {
	return place.Visit{Network: place.NetworkOf(e.Addr()), Endpoint: e, First: w.now.Up - first, Last: w.now.Up - last}
}

// decide judges and remembers; a token that is granted reaches the appliance.
func (w *world) decide() policy.Decision {
	d := policy.Decide(w.a, w.s, w.f)
	w.s = d.Next
	if d.Token != "" {
		w.token = d.Token
	}
	return d
}

func (w *world) must(v policy.Verdict) {
	if d := w.decide(); d.Verdict != v {
		panic("the world is not as it should be: " + string(d.Verdict) + ": " + d.Reason)
	}
}

// order carries out a person's order.
func (w *world) order(do func(policy.State) (policy.State, error)) {
	s, err := do(w.s)
	if err != nil {
		panic(err)
	}
	w.s = s
}

func (w *world) approve() {
	w.order(func(s policy.State) (policy.State, error) { return policy.Approve(s, "", "ada", "it was me", w.now) })
}

func (w *world) expect(d time.Duration) {
	w.order(func(s policy.State) (policy.State, error) {
		return policy.Expect(s, w.now.Wall.Add(d), "ada", "it moves", w.now)
	})
}

func (w *world) revoke() {
	w.order(func(s policy.State) (policy.State, error) { return policy.Revoke(s, "ada", "stolen", w.now) })
}

func (w *world) allow() {
	w.order(func(s policy.State) (policy.State, error) { return policy.Allow(s, "ada", "found", w.now) })
}

// again repeats the request, with the token that the appliance now holds.
func (w *world) again(verb keywire.Verb) {
	p := w.f.Place
	w.ask(verb)
	w.f.Place = p
}

func hours(t string) site.Hours {
	var h site.Hours
	if err := h.UnmarshalText([]byte(t)); err != nil {
		panic(err)
	}
	return h
}

func always(w *world)      { w.a.KeyPolicy.Approval = site.ApprovalAlways }
func never(w *world)       { w.a.KeyPolicy.Approval = site.ApprovalNever }
func elsewhere(w *world)   { w.at(thief) }
func lease(w *world)       { w.again(keywire.Renew) }
func checkin(w *world)     { w.again(keywire.CheckIn) }
func oldToken(w *world)    { w.f.Request.Token = "stolen" }
func newBoot(w *world)     { w.f.Request.Claims.Boot, w.f.Request.Claims.Up = bootB, 60 }
func unknown(w *world)     { w.f.Place = place.Sighting{} }
func silent(w *world)      { w.pass(97 * time.Hour); w.again(w.f.Request.Verb); w.at(home) }
func inWindow(w *world)    { w.a.KeyPolicy.Windows = []site.Hours{hours("11:00-13:00")} }
func outWindow(w *world)   { w.a.KeyPolicy.Windows = []site.Hours{hours("22:00-06:00")} }
func vpnOnly(w *world)     { w.a.KeyPolicy.Source = "vpn" }
func noPlace(w *world)     { w.a.KeyPolicy.Place = site.PlaceNone }
func noToken(w *world)     { w.f.Request.Token = "" }
func ignoreToken(w *world) { w.a.KeyPolicy.Token = site.TokenIgnored }
func held(w *world)        { w.must(policy.Hold) }
func granted(w *world)     { w.must(policy.Grant) }
func refused(w *world)     { w.must(policy.Refuse) }
func approved(w *world)    { w.approve() }
func revoked(w *world)     { w.revoke() }
func allowed(w *world)     { w.allow() }
func fresh(w *world) {
	w.s = policy.State{Appliance: "attic", Standing: policy.Standing{State: policy.Enabled}}
	w.token = ""
	w.again(w.f.Request.Verb)
}
func expected(w *world)   { w.expect(24 * time.Hour) }
func later(w *world)      { w.pass(time.Hour); w.again(w.f.Request.Verb); w.shift(time.Hour) }
func soon(w *world)       { w.pass(time.Minute); w.again(w.f.Request.Verb); w.shift(time.Minute) }
func otherBoard(w *world) { w.f.Request.Claims.Serial = "10000000beef" }
func flapping(w *world)   { w.f.Place.Flaps = true }

// shift keeps the newest visit going while time passes.
func (w *world) shift(d time.Duration) {
	if n := len(w.f.Place.Trail); n > 0 {
		w.f.Place.Trail = slices.Clone(w.f.Place.Trail)
		w.f.Place.Trail[n-1].Last += d
	}
}

// moves puts the peer from home to another endpoint after a silence.
func moves(to netip.AddrPort, silence time.Duration) func(*world) {
	return func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 2*time.Minute+silence), w.visit(to, 2*time.Minute, 0))
	}
}

// The table of decisions: policy and circumstances, verdict and reason. The
// circumstances happen in the order in which they are written, to an appliance
// that was given its key two days ago, renewed its lease an hour ago and now asks
// for its key again, from home and with its token, under the default policy with
// place = "wireguard".
var decisions = []struct {
	name   string
	do     []func(*world)
	want   policy.Verdict
	reason string
}{
	// As it should be.
	{"a key", nil, policy.Grant, policy.ReasonExpected},
	{"a lease", doing(lease), policy.Grant, policy.ReasonExpected},
	{"a checkin", doing(checkin), policy.Grant, policy.ReasonExpected},
	{"a key after a restart", doing(newBoot), policy.Grant, policy.ReasonExpected},
	{"the first key ever", doing(fresh), policy.Grant, policy.ReasonExpected},
	{"the first key ever, from anywhere", doing(fresh, elsewhere), policy.Grant, policy.ReasonExpected},
	{"the first lease, at a key server that gave no key", doing(fresh, lease), policy.Grant, policy.ReasonExpected},
	{"a key that claims nothing of itself", doing(func(w *world) { w.f.Request.Claims = keywire.Claims{} }), policy.Grant, policy.ReasonExpected},

	// Revoked.
	{"revoked: a key", doing(revoked), policy.Refuse, policy.ReasonRevoked},
	{"revoked: a lease", doing(lease, revoked), policy.Refuse, policy.ReasonRevoked},
	{"revoked: a checkin", doing(checkin, revoked), policy.Refuse, policy.ReasonRevoked},
	{"revoked: its disk is dark", doing(revoked, func(w *world) { w.f.Request = keywire.Request{Verb: keywire.Dark, UUID: disk} }), policy.Grant, policy.ReasonNoted},
	{"revoked under approval = never", doing(never, revoked), policy.Refuse, policy.ReasonRevoked},
	{"revoked voids an approval", doing(elsewhere, held, approved, revoked), policy.Refuse, policy.ReasonRevoked},
	{"revoked voids an expectation", doing(expected, revoked, elsewhere), policy.Refuse, policy.ReasonRevoked},
	{"allowed again after an hour", doing(revoked, later, refused, allowed), policy.Grant, policy.ReasonExpected},
	{"allowed again voids nothing of the place", doing(revoked, allowed, elsewhere), policy.Hold, policy.AskPlace},
	{"allowed again after a long silence", doing(revoked, silent, allowed), policy.Hold, policy.AskAbsence},
	{"an approval before a revocation does not count after allow", doing(elsewhere, held, approved, revoked, allowed), policy.Hold, policy.AskPlace},
	{"never enabled", doing(func(w *world) { w.s = policy.State{Appliance: "attic"} }), policy.Refuse, policy.ReasonNoStanding},
	{"a state with an unknown standing", doing(func(w *world) { w.s.Standing.State = "perhaps" }), policy.Refuse, policy.ReasonNoStanding},
	{"another appliance's state", doing(func(w *world) { w.s.Appliance = "shed" }), policy.Refuse, policy.ReasonNoStanding},

	// Whose disk, and from where in the VPN.
	{"another disk", doing(func(w *world) { w.f.Request.UUID = strings.Replace(disk, "0b", "0c", 1) }), policy.Refuse, policy.ReasonForeignDisk},
	{"a lease of another disk", doing(lease, func(w *world) { w.f.Request.UUID = strings.Replace(disk, "0b", "0c", 1) }), policy.Refuse, policy.ReasonForeignDisk},
	{"no disk in site.toml", doing(func(w *world) { w.a.LUKS = "" }), policy.Refuse, policy.ReasonNoDisk},
	{"no disk in site.toml and none asked for", doing(func(w *world) { w.a.LUKS, w.f.Request.UUID = "", "" }), policy.Refuse, policy.ReasonNoDisk},
	{"a checkin before there is a disk", doing(checkin, func(w *world) { w.a.LUKS = "" }), policy.Grant, policy.ReasonExpected},
	{"dark, another disk", doing(func(w *world) {
		w.f.Request = keywire.Request{Verb: keywire.Dark, UUID: strings.Replace(disk, "0b", "0c", 1)}
	}), policy.Refuse, policy.ReasonForeignDisk},
	{"a verb that is none", doing(func(w *world) { w.f.Request.Verb = "open" }), policy.Refuse, policy.ReasonUnknownVerb},
	{"source = vpn, from its address", doing(vpnOnly), policy.Grant, policy.ReasonExpected},
	{"source = vpn, from its address as IPv6 writes it", doing(vpnOnly, func(w *world) { w.f.From = netip.MustParseAddr("::ffff:10.77.0.2") }), policy.Grant, policy.ReasonExpected},
	{"source = vpn, from another address", doing(vpnOnly, func(w *world) { w.f.From = netip.MustParseAddr("10.77.0.3") }), policy.Refuse, policy.ReasonForeign},
	{"source = vpn, from an address that cannot be read", doing(vpnOnly, func(w *world) { w.f.From = netip.Addr{} }), policy.Refuse, policy.ReasonForeign},
	{"source = vpn, no address in site.toml", doing(vpnOnly, func(w *world) { w.a.VPNAddress, w.f.From = netip.Addr{}, netip.Addr{} }), policy.Refuse, policy.ReasonForeign},
	{"a source that no site.toml could say", doing(func(w *world) { w.a.KeyPolicy.Source = ""; w.f.From = thief.Addr() }), policy.Refuse, policy.ReasonForeign},

	// The token.
	{"the token before the last, which a power cut may have lost", doing(granted, func(w *world) { w.token = w.token + "-lost" }, func(w *world) {
		w.ask(keywire.Key)
		w.f.Request.Token = keywire.Token(strings.Repeat("x", 20) + time.Duration(1).String())
		w.at(home)
	}), policy.Grant, policy.ReasonExpected},
	{"the token before the last, after the last was shown", doing(granted, lease, granted, func(w *world) {
		w.again(keywire.Key)
		w.f.Request.Token = keywire.Token(strings.Repeat("x", 20) + time.Duration(1).String())
	}), policy.Hold, policy.AskToken},
	{"a wrong token", doing(oldToken), policy.Hold, policy.AskToken},
	{"no token", doing(noToken), policy.Hold, policy.AskToken},
	{"no token, when the first one was lost on its way", doing(fresh, granted, later, noToken), policy.Grant, policy.ReasonExpected},
	{"a token, when the first one was lost on its way", doing(fresh, granted, later, oldToken), policy.Hold, policy.AskToken},
	{"a lease with a wrong token", doing(lease, oldToken), policy.Refuse, policy.AskToken},
	{"a checkin with a wrong token", doing(checkin, oldToken), policy.Refuse, policy.AskToken},
	{"a wrong token under token = ignored", doing(ignoreToken, oldToken), policy.Grant, policy.ReasonExpected},
	{"a wrong token under approval = never", doing(never, oldToken), policy.Grant, policy.AskToken},
	{"a wrong token, approved", doing(oldToken, held, approved), policy.Grant, policy.ReasonApproved},
	{"a wrong token, another one approved", doing(oldToken, held, approved, noToken), policy.Hold, policy.AskToken},
	{"a wrong token, a move is expected", doing(expected, oldToken), policy.Grant, policy.ReasonAnnounced},

	// Windows.
	{"in a window", doing(inWindow), policy.Grant, policy.ReasonExpected},
	{"outside the windows", doing(outWindow), policy.Hold, policy.AskWindow},
	{"outside the windows, approval = never", doing(never, outWindow), policy.Refuse, policy.AskWindow},
	{"outside the windows, approved", doing(outWindow, held, approved), policy.Grant, policy.ReasonApproved},
	{"outside the windows, a move is expected", doing(expected, outWindow), policy.Hold, policy.AskWindow},
	{"a lease outside the windows", doing(lease, outWindow), policy.Grant, policy.ReasonExpected},
	{"a clock that was set into a window", doing(outWindow, held, func(w *world) { w.now.Wall = w.now.Wall.Add(12 * time.Hour); w.f.Now = w.now }), policy.Hold, policy.AskWindow},
	{"a clock that was set out of a window", doing(inWindow, func(w *world) { w.now.Wall = w.now.Wall.Add(12 * time.Hour); w.f.Now = w.now }), policy.Hold, policy.AskWindow},

	// How many.
	{"the last key of the day's allowance", doing(func(w *world) { w.a.KeyPolicy.KeysPerDay = 2 }, granted, later), policy.Grant, policy.ReasonExpected},
	{"one key too many", doing(func(w *world) { w.a.KeyPolicy.KeysPerDay = 1 }, granted, later), policy.Refuse, policy.ReasonTooOften},
	{"one key too many under approval = never", doing(never, func(w *world) { w.a.KeyPolicy.KeysPerDay = 1 }, granted, later), policy.Refuse, policy.ReasonTooOften},
	{"a lease when the keys are used up", doing(lease, func(w *world) { w.a.KeyPolicy.KeysPerDay = 1 }, granted), policy.Grant, policy.ReasonExpected},
	{"no key allowed at all", doing(func(w *world) { w.a.KeyPolicy.KeysPerDay = 0 }), policy.Refuse, policy.ReasonTooOften},
	{"a clock that was set forward frees no key", doing(func(w *world) { w.a.KeyPolicy.KeysPerDay = 1 }, granted, later, func(w *world) { w.now.Wall = w.now.Wall.Add(48 * time.Hour); w.f.Now = w.now }), policy.Refuse, policy.ReasonTooOften},
	{"a clock that was set back frees no key", doing(func(w *world) { w.a.KeyPolicy.KeysPerDay = 1 }, granted, later, func(w *world) { w.now.Wall = w.now.Wall.Add(-480 * time.Hour); w.f.Now = w.now }), policy.Refuse, policy.ReasonTooOften},

	// The place.
	{"another address of the same network", doing(func(w *world) { w.at(homeAgain) }), policy.Grant, policy.ReasonExpected},
	{"another place", doing(elsewhere), policy.Hold, policy.AskPlace},
	{"another place after a restart", doing(newBoot, elsewhere), policy.Hold, policy.AskPlace},
	{"another place, approval = never", doing(never, elsewhere), policy.Grant, policy.AskPlace},
	{"another place, place = none", doing(noPlace, elsewhere), policy.Grant, policy.ReasonExpected},
	{"another place, the same autonomous system", doing(func(w *world) { w.s.Networks[0].AS = 3320; w.at(thief); w.f.Place.Trail[0].Network.AS = 3320 }), policy.Grant, policy.ReasonExpected},
	{"another place, another autonomous system", doing(func(w *world) { w.s.Networks[0].AS = 3320; w.at(thief); w.f.Place.Trail[0].Network.AS = 64496 }), policy.Hold, policy.AskPlace},
	{"a lease from another place", doing(lease, elsewhere), policy.Refuse, policy.AskPlace},
	{"a checkin from another place", doing(checkin, elsewhere), policy.Refuse, policy.AskPlace},
	{"a line that reconnects in another network", doing(moves(thief, time.Minute)), policy.Grant, policy.ReasonExpected},
	{"a lease on a line that reconnects in another network", doing(lease, moves(thief, time.Minute)), policy.Grant, policy.ReasonExpected},
	{"a line that reconnected in another network a minute ago", doing(func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 61*time.Second), w.visit(thief, time.Minute, 0))
	}), policy.Later, policy.ReasonUnplaced},
	{"a lease, a minute after the line reconnected in another network", doing(lease, func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 61*time.Second), w.visit(thief, time.Minute, 0))
	}), policy.Later, policy.ReasonUnplaced},
	{"somebody else was heard a moment ago: the request may be his", doing(func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 20*time.Second), w.visit(thief, 10*time.Second, 5*time.Second), w.visit(home, time.Second, 0))
	}), policy.Later, policy.ReasonUnplaced},
	{"somebody else was heard a moment ago: a lease", doing(lease, func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 20*time.Second), w.visit(thief, 10*time.Second, 5*time.Second), w.visit(home, time.Second, 0))
	}), policy.Grant, policy.ReasonExpected},
	{"somebody else is heard at this moment: his place is not learned from the appliance's request", doing(checkin, func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 5*time.Second), w.visit(thief, time.Second, 0))
	}), policy.Later, policy.ReasonUnplaced},
	{"two senders with one key, seconds apart: waiting settles nothing", doing(flapping, func(w *world) {
		w.f.Place.Trail = []place.Visit{w.visit(home, 50*time.Hour, 20*time.Second), w.visit(thief, 10*time.Second, 5*time.Second), w.visit(home, time.Second, 0)}
	}), policy.Hold, policy.AskFlapping},
	{"there and back and there within minutes: not followed", doing(checkin, func(w *world) {
		w.f.Place = w.sighting(w.visit(home, 50*time.Hour, 7*time.Minute), w.visit(thief, 6*time.Minute, 5*time.Minute), w.visit(home, 5*time.Minute, 4*time.Minute), w.visit(thief, 3*time.Minute, 0))
	}), policy.Later, policy.ReasonUnplaced},
	{"moved in a minute, with a new boot id", doing(moves(thief, time.Minute), newBoot), policy.Hold, policy.AskPlace},
	{"moved in a minute, with no boot id", doing(moves(thief, time.Minute), func(w *world) { w.f.Request.Claims = keywire.Claims{} }), policy.Hold, policy.AskPlace},
	{"silent for eleven minutes, then in another network", doing(moves(thief, 11*time.Minute)), policy.Hold, policy.AskPlace},
	{"followed, and back there a day later after a restart", doing(moves(thief, time.Minute), granted, later, newBoot, elsewhere), policy.Grant, policy.ReasonExpected},
	{"the place is not known", doing(unknown), policy.Later, policy.ReasonUnplaced},
	{"the place of a lease is not known", doing(lease, unknown), policy.Later, policy.ReasonUnplaced},
	{"the place of a checkin is not known", doing(checkin, unknown), policy.Later, policy.ReasonUnplaced},
	{"the place is not known, approval = never", doing(never, unknown), policy.Grant, policy.ReasonExpected},
	{"the place is not known, a move is expected", doing(expected, unknown), policy.Later, policy.ReasonUnplaced},
	{"the place was seen two minutes ago", doing(func(w *world) { w.f.Place = w.sighting(w.visit(home, time.Hour, 2*time.Minute)) }), policy.Later, policy.ReasonUnplaced},
	{"the place was seen in another boot", doing(func(w *world) { w.f.Place.Boot = bootB }), policy.Later, policy.ReasonUnplaced},
	{"the place is another VPN's word", doing(func(w *world) { w.f.Place.Source = place.SourceTailscale }), policy.Later, policy.ReasonUnplaced},
	{"through another appliance's tunnel", doing(func(w *world) { w.f.Place.Peer = otherVP }), policy.Hold, policy.AskPlace},
	{"the first key, through another appliance's tunnel", doing(fresh, func(w *world) { w.f.Place.Peer = otherVP }), policy.Hold, policy.AskPlace},
	{"two senders with one key", doing(flapping), policy.Hold, policy.AskFlapping},
	{"two senders with one key: a lease", doing(lease, flapping), policy.Grant, policy.ReasonExpected},
	{"a network that was left 401 days ago", doing(newBoot, func(w *world) { w.s.Networks[0].Last = w.now.Wall.Add(-401 * 24 * time.Hour) }), policy.Hold, policy.AskPlace},

	// Silence.
	{"silent for 95 hours", doing(func(w *world) { w.pass(94 * time.Hour); w.again(keywire.Key); w.at(home) }), policy.Grant, policy.ReasonExpected},
	{"silent for 97 hours", doing(silent), policy.Hold, policy.AskAbsence},
	{"silent for 97 hours, approval = never", doing(never, silent), policy.Grant, policy.ReasonExpected},
	{"silent for 97 hours, a checkin", doing(checkin, silent), policy.Grant, policy.ReasonExpected},
	{"silent for 97 hours, a checkin, then a key", doing(checkin, silent, granted, func(w *world) { w.again(keywire.Key) }), policy.Hold, policy.AskAbsence},
	{"silent for 97 hours, approved", doing(silent, held, approved), policy.Grant, policy.ReasonApproved},
	{"silent for 97 hours, a move is expected", doing(expected, func(w *world) { w.expect(200 * time.Hour) }, silent), policy.Grant, policy.ReasonAnnounced},
	{"silent for 97 hours, once approved", doing(silent, held, approved, granted, later), policy.Grant, policy.ReasonExpected},
	{"a clock that was set forward makes no silence", doing(func(w *world) { w.now.Wall = w.now.Wall.AddDate(1, 0, 0); w.f.Now = w.now }), policy.Grant, policy.ReasonExpected},
	{"a clock that was set back hides no silence", doing(func(w *world) {
		w.pass(97 * time.Hour)
		w.now.Wall = w.now.Wall.Add(-96 * time.Hour)
		w.again(keywire.Key)
		w.at(home)
	}), policy.Hold, policy.AskAbsence},
	{"the key server restarted, and its clock is two days behind", doing(func(w *world) {
		w.now = moment.Moment{Wall: w.now.Wall.Add(-48 * time.Hour), Boot: bootB, Up: time.Hour}
		w.again(keywire.Key)
		w.f.Place = place.Sighting{Boot: bootB, Source: place.SourceWireGuard, Peer: vpnKey, Trail: []place.Visit{w.visit(home, time.Minute, 0)}}
	}), policy.Hold, policy.AskAbsence},

	{"the key server's clock was days ahead when the appliance was last heard, and was put right by a restart", doing(func(w *world) {
		w.now.Wall = w.now.Wall.Add(78 * time.Hour)
		w.again(keywire.CheckIn)
		w.must(policy.Grant)
		w.pass(97 * time.Hour)
		w.now = moment.Moment{Wall: w.now.Wall.Add(-78 * time.Hour), Boot: bootB, Up: time.Hour}
		w.again(keywire.Key)
		w.f.Place = place.Sighting{Boot: bootB, Source: place.SourceWireGuard, Peer: vpnKey, Trail: []place.Visit{w.visit(home, time.Minute, 0)}}
	}), policy.Hold, policy.AskAbsence},
	{"an expectation given while the clock was days ahead, which a restart put right", doing(func(w *world) {
		w.now.Wall = w.now.Wall.Add(78 * time.Hour)
		w.expect(24 * time.Hour)
		w.pass(80 * time.Hour)
		w.now = moment.Moment{Wall: w.now.Wall.Add(-78 * time.Hour), Boot: bootB, Up: time.Hour}
		w.again(keywire.Key)
		w.f.Place = place.Sighting{Boot: bootB, Source: place.SourceWireGuard, Peer: vpnKey, Trail: []place.Visit{w.visit(thief, time.Minute, 0)}}
	}), policy.Hold, policy.AskPlace},

	// What it says of itself.
	{"another board", doing(otherBoard), policy.Hold, policy.AskSerial},
	{"another board, approved", doing(otherBoard, held, approved), policy.Grant, policy.ReasonApproved},
	{"another board, then the old one again", doing(otherBoard, held, approved, granted, later, func(w *world) { w.again(keywire.Key) }), policy.Hold, policy.AskSerial},
	{"another board, a move is expected", doing(expected, otherBoard), policy.Grant, policy.ReasonAnnounced},
	{"another board, once a move was expected", doing(expected, otherBoard, granted, later, otherBoard), policy.Grant, policy.ReasonExpected},
	{"a lease by another board", doing(lease, otherBoard), policy.Refuse, policy.AskSerial},
	{"another boot that ran while the first was heard", doing(func(w *world) { w.f.Request.Claims.Boot, w.f.Request.Claims.Up = bootB, 3*3600 }), policy.Hold, policy.AskContradicts},
	{"the same boot with a younger uptime", doing(func(w *world) { w.f.Request.Claims.Up = 60 }), policy.Hold, policy.AskContradicts},
	{"a claim never opens: another place with every claim right", doing(elsewhere), policy.Hold, policy.AskPlace},

	// Approvals and expectations.
	{"approval = always", doing(always), policy.Hold, policy.AskAlways},
	{"approval = always, the first key", doing(always, fresh), policy.Hold, policy.AskAlways},
	{"approval = always, a lease", doing(always, lease), policy.Grant, policy.ReasonExpected},
	{"approval = always, approved", doing(always, held, approved), policy.Grant, policy.ReasonApproved},
	{"approval = always, the key after the approved one", doing(always, held, approved, granted, later), policy.Hold, policy.AskAlways},
	{"approval = always, the approved key once more: its answer was lost", doing(always, held, approved, granted, soon), policy.Grant, policy.ReasonApproved},
	{"approval = always, the approved key a third time", doing(always, held, approved, granted, soon, granted, soon), policy.Hold, policy.AskAlways},
	{"approval = always, the approved key once more after a quarter of an hour", doing(always, held, approved, granted, soon, later), policy.Hold, policy.AskAlways},
	{"approval = always, the approved key once more after a lease", doing(always, held, approved, granted, lease, granted, func(w *world) { w.again(keywire.Key) }), policy.Hold, policy.AskAlways},
	{"approval = always, the approved key once more by another boot", doing(always, held, approved, granted, soon, newBoot), policy.Hold, policy.AskAlways},
	{"approval = always, the approved key once more with an old token", doing(always, held, approved, granted, soon, oldToken), policy.Hold, policy.AskToken},
	{"approval = always, the approved key once more from elsewhere", doing(always, held, approved, granted, soon, elsewhere), policy.Hold, policy.AskPlace},
	{"approval = always, the approved key once more, and revoked meanwhile", doing(always, held, approved, granted, soon, revoked, allowed), policy.Hold, policy.AskAlways},
	{"approval = always, the approved key once more, after the key server restarted", doing(always, held, approved, granted, soon, func(w *world) {
		w.now.Boot = bootB
		w.f.Now, w.f.Place.Boot = w.now, bootB
	}), policy.Hold, policy.AskAlways},
	{"approval = always, another place, one approval for the dark disk and its opening", doing(always, elsewhere, held, approved, granted, soon), policy.Grant, policy.ReasonApproved},
	{"outside the windows, the approved key once more", doing(outWindow, held, approved, granted, soon), policy.Grant, policy.ReasonApproved},
	{"another place, approved: what is in order afterwards needs no approval", doing(elsewhere, held, approved, granted, soon), policy.Grant, policy.ReasonExpected},
	{"approval = always, the approved key once more by a machine that says no boot", doing(always, func(w *world) { w.f.Request.Claims = keywire.Claims{} }, held, approved, granted, soon, func(w *world) { w.f.Request.Claims = keywire.Claims{} }), policy.Hold, policy.AskAlways},
	{"approval = always, a move is expected", doing(always, expected), policy.Hold, policy.AskAlways},
	{"an approval policy that no site.toml could say", doing(func(w *world) { w.a.KeyPolicy.Approval = "" }), policy.Hold, policy.AskAlways},
	{"another place, approved", doing(elsewhere, held, approved), policy.Grant, policy.ReasonApproved},
	{"another place, approved, an hour later", doing(elsewhere, held, approved, later), policy.Grant, policy.ReasonApproved},
	{"another place, approved, a day later", doing(elsewhere, held, approved, func(w *world) { w.pass(25 * time.Hour); w.again(keywire.Key); w.shift(25 * time.Hour) }), policy.Hold, policy.AskPlace},
	{"another place, approved, a third one asks", doing(elsewhere, held, approved, func(w *world) { w.at(netip.MustParseAddrPort("203.0.113.1:1")) }), policy.Hold, policy.AskPlace},
	{"another place, approved, with another token", doing(elsewhere, held, approved, oldToken), policy.Hold, policy.AskToken},
	{"another place, approved, once it is home", doing(elsewhere, held, approved, granted, later), policy.Grant, policy.ReasonExpected},
	{"another place, approved: its lease", doing(elsewhere, held, approved, lease), policy.Grant, policy.ReasonApproved},
	{"another place, approved: a checkin uses nothing up", doing(elsewhere, held, approved, checkin, refused, func(w *world) { w.again(keywire.Key) }), policy.Grant, policy.ReasonApproved},
	{"another place, denied", doing(elsewhere, held, approved, func(w *world) {
		w.order(func(s policy.State) (policy.State, error) { return policy.Deny(s, "", "ada", "not me") })
	}), policy.Hold, policy.AskPlace},
	{"approved for its silence, and then from another place", doing(silent, held, approved, elsewhere), policy.Hold, policy.AskPlace},
	{"an approval and a clock that was set back", doing(elsewhere, held, approved, func(w *world) {
		w.pass(25 * time.Hour)
		w.now.Wall = w.now.Wall.Add(-24 * time.Hour)
		w.again(keywire.Key)
		w.at(thief)
	}), policy.Hold, policy.AskPlace},
	{"an approval and a clock that was set forward", doing(elsewhere, held, approved, func(w *world) { w.now.Wall = w.now.Wall.Add(25 * time.Hour); w.f.Now = w.now }), policy.Hold, policy.AskPlace},
	{"an approval does not free keys", doing(func(w *world) { w.a.KeyPolicy.KeysPerDay = 1 }, elsewhere, held, approved, granted, later), policy.Refuse, policy.ReasonTooOften},
	{"a move is expected", doing(expected, elsewhere), policy.Grant, policy.ReasonAnnounced},
	{"a move is expected, after a restart", doing(expected, newBoot, elsewhere), policy.Grant, policy.ReasonAnnounced},
	{"a move is expected: a lease", doing(expected, lease, elsewhere), policy.Grant, policy.ReasonAnnounced},
	{"a move is expected: a checkin", doing(expected, checkin, elsewhere), policy.Grant, policy.ReasonAnnounced},
	{"a move is expected: a checkin uses nothing up", doing(expected, checkin, elsewhere, granted, func(w *world) { w.again(keywire.Key) }), policy.Grant, policy.ReasonAnnounced},
	{"one move is expected, and then another comes", doing(expected, elsewhere, granted, later, func(w *world) { w.at(netip.MustParseAddrPort("203.0.113.1:1")) }), policy.Hold, policy.AskPlace},
	{"a move is expected, and it came too late", doing(expected, func(w *world) { w.pass(25 * time.Hour); w.again(keywire.Key); w.at(thief) }), policy.Hold, policy.AskPlace},
	{"a move is expected, and the clock was set back", doing(expected, func(w *world) {
		w.pass(25 * time.Hour)
		w.now.Wall = w.now.Wall.Add(-10 * time.Hour)
		w.again(keywire.Key)
		w.at(thief)
	}), policy.Hold, policy.AskPlace},
	{"a move is expected, and two senders have its key", doing(expected, elsewhere, flapping), policy.Hold, policy.AskFlapping},
	{"an expectation is not used up by what needs none", doing(expected, granted, later, elsewhere), policy.Grant, policy.ReasonAnnounced},

	// A relay says little.
	{"through a relay", doing(tailscale, relayedFor(time.Hour)), policy.Hold, policy.AskPlace},
	{"through a relay for a minute", doing(tailscale, relayedFor(time.Minute)), policy.Later, policy.ReasonUnplaced},
	{"the first key, through a relay for a minute", doing(tailscale, fresh, relayedFor(time.Minute)), policy.Later, policy.ReasonUnplaced},
	{"the first key, through a relay for an hour", doing(tailscale, fresh, relayedFor(time.Hour)), policy.Grant, policy.ReasonExpected},
	{"only ever through a relay", doing(tailscale, fresh, relayedFor(time.Hour), granted, later), policy.Grant, policy.ReasonExpected},
	{"only ever through a relay, now through another", doing(tailscale, fresh, relayedFor(time.Hour), granted, later, func(w *world) { w.f.Place.Trail[0].Network = place.RelayOf("nyc") }), policy.Hold, policy.AskPlace},
	{"by relay at first, then directly, then somebody forces the relay", doing(tailscale, fresh, relayedFor(time.Hour), granted, func(w *world) {
		w.f.Place.Trail[0].Last -= 3 * time.Minute
		w.f.Place.Trail = append(w.f.Place.Trail, w.visit(home, 2*time.Minute, 0))
	}, granted, newBoot, relayedFor(time.Hour), func(w *world) { w.again(keywire.Key); newBoot(w) }), policy.Hold, policy.AskPlace},
}

func doing(do ...func(*world)) []func(*world) { return do }

func tailscale(w *world) {
	w.a.KeyPolicy.Place = site.PlaceTailscale
	w.f.Place.Source = place.SourceTailscale
}

func relayedFor(d time.Duration) func(*world) {
	return func(w *world) {
		w.f.Place.Trail = []place.Visit{{Network: place.RelayOf("fra"), First: w.now.Up - d, Last: w.now.Up}}
	}
}

func TestDecide(t *testing.T) {
	if len(decisions) < 40 {
		t.Fatalf("%d cases", len(decisions))
	}
	names := map[string]bool{}
	for _, tt := range decisions {
		if names[tt.name] {
			t.Errorf("%q is there twice", tt.name)
		}
		names[tt.name] = true
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			for _, do := range tt.do {
				do(w)
			}
			before := w.s
			text := mustJSON(t, before)
			d := policy.Decide(w.a, w.s, w.f)
			if d.Verdict != tt.want || d.Reason != tt.reason {
				t.Errorf("%s: %s %q; want %s: %s", d.Verdict, d.Reason, d.Asks, tt.want, tt.reason)
			}
			if d.Verdict == policy.Hold && !slices.ContainsFunc(d.Next.Waiting, func(w policy.Waiting) bool { return w.ID == d.Waiting }) {
				t.Error("held, and nothing is waiting")
			}
			key := d.Verdict == policy.Grant && w.f.Request.Verb == keywire.Key
			if (d.Token != "") != (key && w.a.KeyPolicy.Token == site.TokenRequired) {
				t.Errorf("token %q", d.Token)
			}
			if renewed := d.Verdict == policy.Grant && w.f.Request.Verb == keywire.Renew; (d.Lease > 0) != renewed || (d.Renew > 0) != renewed {
				t.Errorf("lease %v, renew %v", d.Lease, d.Renew)
			}
			if mustJSON(t, before) != text {
				t.Error("the state that was given has changed")
			}
			if again := policy.Decide(w.a, w.s, w.f); !reflect.DeepEqual(d, again) {
				t.Errorf("the same question has another answer: %+v", again)
			}
		})
	}
	t.Logf("%d decisions", len(decisions))
}
