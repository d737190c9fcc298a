package policy_test

import (
	"container/heap"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
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

// The simulated year: households whose lines behave as lines do, and a key server
// that runs this package's Decide and package place's Recorder for them. What is
// counted is how often anything but yes was said to the rightful appliance.
//
// What is simulated, in each household, with chances of its own: the provider's
// daily reconnection at night (an hour later in winter, by UTC), restarts of the
// router, outages of the provider from minutes to days, power cuts from seconds to
// hours that take router and appliance down, restarts of the appliance alone;
// answers that are lost with the connection; and at home: outages of home's line,
// and restarts of the key server, which lose the trail. Outages are shorter than
// the policy's absence: asking after a longer silence is what a person chose.

// line is how a household is connected.
type line struct {
	name      string
	source    string
	daily     bool          // the provider ends the connection every night
	sticky    float64       // chance of the same address after a reconnection
	perDay    float64       // reconnections a day besides
	gap       time.Duration // longest pause of a reconnection
	pool      func(*rand.Rand) []netip.Prefix
	relay     string  // always by this relay
	relayTurn float64 // chance that a contact begins by relay, for minutes
	as        uint32
}

// Where a provider's addresses lie. The blocks are those of a large one, and
// 198.18.0.0/15 (RFC 2544) for smaller ones; what matters is their shape.
var (
	bigBlocks = prefixes("84.128.0.0/10", "87.128.0.0/10", "91.0.0.0/10", "79.192.0.0/10", "93.192.0.0/10", "217.224.0.0/11", "80.128.0.0/11", "46.80.0.0/12")
	cgnat     = prefixes("109.40.0.0/18", "109.41.64.0/18", "80.187.96.0/19", "46.114.0.0/17", "89.204.128.0/17", "176.0.0.0/14")
	cable     = prefixes("188.192.0.0/14", "178.24.0.0/14", "91.64.0.0/14", "37.4.0.0/15")
	big6      = prefixes("2003:c0::/28", "2003:d0::/28", "2003:e0::/28", "2003:f0::/28")
)

func prefixes(all ...string) (p []netip.Prefix) {
	for _, one := range all {
		p = append(p, netip.MustParsePrefix(one))
	}
	return p
}

// some draws n networks of one access router from a provider's blocks.
func some(blocks []netip.Prefix, n int) func(*rand.Rand) []netip.Prefix {
	return func(r *rand.Rand) (pool []netip.Prefix) {
		for range n {
			b := blocks[r.IntN(len(blocks))]
			bits := 18
			if b.Addr().Is6() {
				bits = 40
			}
			p, _ := addressIn(r, b).Prefix(max(bits, b.Bits()))
			pool = append(pool, p)
		}
		return pool
	}
}

func addressIn(r *rand.Rand, p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		if r.IntN(2) == 1 {
			b[i/8] |= 1 << (7 - i%8)
		} else {
			b[i/8] &^= 1 << (7 - i%8)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func lines() []line {
	return []line{
		{name: "DSL, a new address every night", source: place.SourceWireGuard, daily: true, gap: time.Minute, pool: some(bigBlocks, 10), as: 3320},
		{name: "DSL by IPv6, a new prefix every night", source: place.SourceWireGuard, daily: true, gap: time.Minute, pool: some(big6, 4), as: 3320},
		{name: "fibre behind carrier-grade NAT", source: place.SourceWireGuard, sticky: 0.7, perDay: 0.3, gap: 2 * time.Minute, pool: some(cgnat, 4), as: 64500},
		{name: "cable", source: place.SourceWireGuard, sticky: 0.95, perDay: 0.02, gap: 5 * time.Minute, pool: some(cable, 3), as: 6830},
		{name: "mobile router", source: place.SourceWireGuard, sticky: 0.2, perDay: 6, gap: 3 * time.Minute, pool: some(cgnat, 6), as: 64500},
		{name: "Tailscale, direct, by relay at times", source: place.SourceTailscale, daily: true, gap: time.Minute, pool: some(bigBlocks, 10), relayTurn: 0.5, as: 3320},
		{name: "Tailscale, only by relay", source: place.SourceTailscale, daily: true, gap: time.Minute, pool: some(bigBlocks, 10), relay: "fra", as: 3320},
	}
}

// event is something that happens at a time.
type event struct {
	at time.Duration
	n  int
	do func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].n < e[j].n
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	last := old[len(old)-1]
	*e = old[:len(old)-1]
	return last
}

// tally is what a year came to.
type tally struct {
	keys, leases, checkins, laters int
	holds, refusals                int
	networks                       int
	longestLater                   time.Duration
	first                          string // the first false hold
}

func (a *tally) add(b tally) {
	a.keys += b.keys
	a.leases += b.leases
	a.checkins += b.checkins
	a.laters += b.laters
	a.holds += b.holds
	a.refusals += b.refusals
	a.networks = max(a.networks, b.networks)
	a.longestLater = max(a.longestLater, b.longestLater)
	if a.first == "" {
		a.first = b.first
	}
}

// household is one appliance, its line, and the key server.
type household struct {
	r     *rand.Rand
	line  line
	table bool
	a     site.Appliance
	queue events
	n     int
	t     time.Duration // since the start of the year
	tally tally

	pool                 []netip.Prefix
	power, link, homeUp  bool
	linkWas              int // counts what happened to power and line, so that old plans are dropped
	endpoint             netip.AddrPort
	relayUntil           time.Duration
	boot                 string
	bootAt               time.Duration
	token                keywire.Token
	open                 bool
	state                policy.State
	recorder             *place.Recorder
	serverBoot           string
	serverBootAt         time.Duration
	received             uint64
	lastHeard            time.Duration
	file                 place.File
	sighting             place.Sighting
	sure                 bool // no answer is lost, and nobody approves
	waitingSince, laterT time.Duration
	tokens               int
}

const year = 365 * 24 * time.Hour

// yearStart is a New Year; its summer is from April to October.
var yearStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newHousehold(seed uint64, l line, table bool) *household {
	h := &household{r: rand.New(rand.NewPCG(seed, uint64(len(l.name)))), line: l, table: table, power: true, link: true, homeUp: true, waitingSince: -1, laterT: -1}
	h.a = site.Appliance{Name: "attic", LUKS: disk, VPNAddress: vpnHome, VPNKey: vpnKey}
	h.a.SetDefaults()
	h.a.KeyPolicy.Place = l.source
	h.state = policy.State{Appliance: "attic", Standing: policy.Standing{State: policy.Enabled}}
	h.pool = l.pool(h.r)
	h.restart()
	h.dial(false)
	h.startServer(true)
	return h
}

func (h *household) span(least, most time.Duration) time.Duration {
	// Short ones are more frequent than long ones.
	return time.Duration(float64(least) * math.Pow(float64(most)/float64(least), h.r.Float64()))
}

func (h *household) id() string { return fmt.Sprintf("%016x%016x", h.r.Uint64(), h.r.Uint64()) }

func (h *household) after(d time.Duration, do func()) {
	h.n++
	heap.Push(&h.queue, event{h.t + d, h.n, do})
}

// poisson repeats something so many times a year on average.
func (h *household) poisson(perYear float64, do func()) {
	var next func()
	plan := func() { h.after(time.Duration(h.r.ExpFloat64()/perYear*float64(year)), next) }
	next = func() { do(); plan() }
	plan()
}

func (h *household) online() bool { return h.power && h.link && h.homeUp }

func (h *household) restart() { h.boot, h.bootAt, h.open = h.id(), h.t, false }

// dial gives the line an address.
func (h *household) dial(keep bool) {
	if keep && h.r.Float64() < h.line.sticky {
		return
	}
	// An access router hands out more of some of its networks than of others.
	i := min(int(h.r.ExpFloat64()*float64(len(h.pool))/2), len(h.pool)-1)
	h.endpoint = netip.AddrPortFrom(addressIn(h.r, h.pool[i]), uint16(1024+h.r.IntN(60000)))
}

// What a cut takes away.
type cutKind int

const (
	lineCut  cutKind = iota // the line, which comes back with another address
	powerCut                // line and appliance
	appCut                  // the appliance alone
)

// down takes something away for a while.
func (h *household) down(d time.Duration, kind cutKind) {
	h.hear()
	h.linkWas++
	mine := h.linkWas
	h.link = false
	h.power = kind == lineCut
	// A keepalive comes every 25 s, and a tunnel needs a handshake.
	h.after(d+time.Duration(h.r.Int64N(int64(50*time.Second))), func() {
		if mine != h.linkWas {
			return
		}
		h.up(kind)
	})
}

func (h *household) up(kind cutKind) {
	h.link, h.power = true, true
	if kind != lineCut {
		h.restart()
	}
	if kind != appCut {
		h.dial(true)
	}
	if h.r.Float64() < h.line.relayTurn {
		h.relayUntil = h.t + h.span(5*time.Second, 20*time.Minute)
	}
	h.hear()
	if kind != lineCut {
		h.after(time.Minute, h.wake)
	}
}

func (h *household) startServer(lost bool) {
	if lost {
		h.serverBoot, h.serverBootAt = h.id(), h.t
		h.recorder = place.NewRecorder(h.serverBoot, place.File{}, h.as)
	}
	h.homeUp = true
	h.hear()
}

func (h *household) as(a netip.Addr) uint32 {
	if !h.table {
		return 0
	}
	for _, p := range h.pool {
		if p.Contains(a) {
			return h.line.as
		}
	}
	for i, p := range elsewhereBlocks {
		if p.Contains(a) {
			return 64400 + uint32(i)
		}
	}
	return 0
}

// hear lets the VPN receive something.
func (h *household) hear() {
	if !h.online() || h.recorder == nil {
		return
	}
	h.look(h.t-h.serverBootAt, true)
	h.look(h.t-h.serverBootAt+time.Second, true)
}

func (h *household) look(at time.Duration, data bool) {
	at = max(at, h.lastHeard)
	if h.lastHeard > h.t-h.serverBootAt+time.Minute {
		at = h.t - h.serverBootAt // another boot
	}
	h.lastHeard = at
	if data {
		h.received += 1000
	}
	o := place.Observation{Source: h.line.source, Peer: vpnKey, Allowed: []netip.Prefix{netip.PrefixFrom(vpnHome, 32)}, Received: h.received, Endpoint: h.endpoint}
	if h.line.relay != "" || h.t < h.relayUntil {
		o.Endpoint, o.Relay = netip.AddrPort{}, "fra"
		if h.line.relay != "" {
			o.Relay = h.line.relay
		}
	}
	h.file = h.recorder.Observe(at, []place.Observation{o})
	h.sighting = h.file.Sighting(h.line.source, vpnHome)
}

func (h *household) moment() moment.Moment {
	return moment.Moment{Wall: yearStart.Add(h.t), Boot: h.serverBoot, Up: h.t - h.serverBootAt + 2*time.Second}
}

// request asks as the appliance does.
func (h *household) request(verb keywire.Verb) (policy.Verdict, bool) {
	if !h.online() {
		return "", false
	}
	h.hear()
	r := keywire.Request{Verb: verb, Token: h.token, Claims: keywire.Claims{Boot: h.boot, Serial: "10000000abcdef", Up: int64((h.t-h.bootAt)/time.Second) + 1}}
	if verb != keywire.CheckIn {
		r.UUID = disk
	}
	h.tokens++
	d := policy.Decide(h.a, h.state, policy.Facts{Request: r, From: vpnHome, Place: h.sighting, Now: h.moment(), NewToken: keywire.Token("token-" + strconv.Itoa(h.tokens))})
	h.state = d.Next
	if h.tokens%500 == 0 { // a crash now and then: what is remembered is what was written
		h.state = reread(h.state)
	}
	lost := !h.sure && h.r.Float64() < 0.002 // the answer never arrives
	if d.Token != "" && !lost {
		h.token = d.Token
	}
	h.count(verb, d)
	if lost {
		return "", false
	}
	return d.Verdict, true
}

func reread(s policy.State) policy.State {
	s.Version = 1
	text, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	if s, err = policy.Parse(s.Appliance, text); err != nil {
		panic(err)
	}
	return s
}

func (h *household) count(verb keywire.Verb, d policy.Decision) {
	if d.Verdict == policy.Later {
		h.tally.laters++
		if h.laterT < 0 {
			h.laterT = h.t
		}
		h.tally.longestLater = max(h.tally.longestLater, h.t-h.laterT)
		return
	}
	h.laterT = -1
	switch d.Verdict {
	case policy.Grant:
		switch verb {
		case keywire.Key:
			h.tally.keys++
		case keywire.Renew:
			h.tally.leases++
		default:
			h.tally.checkins++
		}
	case policy.Hold:
		if h.waitingSince < 0 {
			h.tally.holds++
			h.waitingSince = h.t
			if h.tally.first == "" {
				h.tally.first = fmt.Sprintf("%v: %s %q at %s, known %v, trail %v", yearStart.Add(h.t), verb, d.Asks, h.sighting, len(h.state.Networks), h.sighting.Trail)
			}
		}
		if !h.sure && h.t-h.waitingSince > 12*time.Hour { // a person comes by
			if s, err := policy.Approve(h.state, d.Waiting, "ada", "it was me", h.moment()); err == nil {
				h.state, h.waitingSince = s, -1
			}
		}
	default:
		h.tally.refusals++
	}
	if d.Verdict == policy.Grant && verb == keywire.Key {
		h.waitingSince = -1
	}
}

// window reports whether the disk is to be open: 01:30 to 05:30 UTC.
func (h *household) window() bool {
	at := h.t % (24 * time.Hour)
	return at >= 90*time.Minute && at < 330*time.Minute
}

// wake opens the disk if it is time, until that works or the window is over.
func (h *household) wake() {
	if !h.window() || h.open || !h.power {
		return
	}
	v, ok := h.request(keywire.Key)
	switch {
	case ok && v == policy.Grant:
		h.open = true
		h.renew()
	case ok && v == policy.Later:
		h.after(30*time.Second, h.wake)
	default:
		h.after(5*time.Minute, h.wake)
	}
}

func (h *household) renew() {
	if !h.open {
		return
	}
	if !h.window() {
		h.open = false
		return
	}
	if v, ok := h.request(keywire.Renew); ok && v == policy.Refuse {
		h.open = false // dark
		h.after(5*time.Minute, h.wake)
		return
	}
	h.after(5*time.Minute, h.renew)
}

// run lives through so much time.
func (h *household) run(d time.Duration) tally {
	const day = 24 * time.Hour
	var daily, nightly, checkin func()
	daily = func() { h.wake(); h.after(day, daily) }
	h.after(90*time.Minute, daily)
	h.after(time.Minute, func() { h.first() })
	checkin = func() {
		if !h.open {
			h.request(keywire.CheckIn)
		}
		h.after(25*time.Minute+time.Duration(h.r.Int64N(int64(10*time.Minute))), checkin)
	}
	h.after(10*time.Minute, checkin)
	nightly = func() {
		if h.power && h.link {
			h.down(h.span(2*time.Second, h.line.gap), lineCut)
		}
		next := day + time.Duration(h.r.Int64N(int64(10*time.Minute))) - 5*time.Minute
		// Clocks at the household go by summer time.
		switch date := yearStart.Add(h.t); {
		case date.YearDay() == 88:
			next -= time.Hour
		case date.YearDay() == 298:
			next += time.Hour
		}
		h.after(next, nightly)
	}
	if h.line.daily {
		h.after(3*time.Hour, nightly)
	}
	if h.line.perDay > 0 {
		h.poisson(h.line.perDay*365, func() {
			if h.power && h.link {
				h.down(h.span(2*time.Second, h.line.gap), lineCut)
			}
		})
	}
	cut := func(least, most time.Duration, kind cutKind) func() {
		return func() {
			if h.power && h.link {
				h.down(h.span(least, most), kind)
			}
		}
	}
	h.poisson(12, cut(90*time.Second, 8*time.Minute, lineCut)) // the router restarts
	h.poisson(4, cut(5*time.Minute, 60*time.Hour, lineCut))    // the provider is out
	h.poisson(4, cut(3*time.Minute, 12*time.Hour, powerCut))   // power cuts
	h.poisson(6, cut(40*time.Second, 2*time.Minute, appCut))   // the appliance alone restarts
	h.poisson(6, func() { h.homeDown(h.span(5*time.Minute, 12*time.Hour), false) })
	h.poisson(12, func() { h.homeDown(h.span(time.Minute, 10*time.Minute), true) })
	for h.queue.Len() > 0 && h.queue[0].at <= d {
		e := heap.Pop(&h.queue).(event)
		h.t = e.at
		e.do()
	}
	h.t = d
	h.tally.networks = len(h.state.Networks)
	return h.tally
}

// first is the first day: the disk opens as soon as the appliance is plugged in.
func (h *household) first() {
	if v, ok := h.request(keywire.Key); !ok || v != policy.Grant {
		h.after(time.Minute, h.first)
	}
}

func (h *household) homeDown(d time.Duration, server bool) {
	if !h.homeUp {
		return
	}
	h.hear()
	h.homeUp = false
	h.after(d, func() { h.startServer(server) })
}

// years is how many households of each kind live through a year; the long form is
// FARKEEP_YEARS=200 go test ./keyserver/policy -run Year -v.
func years(short int) int {
	n, err := strconv.Atoi(os.Getenv("FARKEEP_YEARS"))
	if err != nil || n < 1 {
		return short
	}
	return n
}

func TestYear(t *testing.T) {
	n := years(1)
	for _, table := range []bool{true, false} {
		for i, l := range lines() {
			if !table && n == 1 && i > 0 {
				continue // the short form
			}
			t.Run(fmt.Sprintf("table=%v/%s", table, strings.ReplaceAll(l.name, " ", "_")), func(t *testing.T) {
				t.Parallel()
				var all tally
				for seed := range n {
					all.add(newHousehold(uint64(seed), l, table).run(year))
				}
				t.Logf("%d years: %d false holds, %d false refusals; %d keys, %d leases, %d checkins, %d to try again (longest %v), up to %d networks",
					n, all.holds, all.refusals, all.keys, all.leases, all.checkins, all.laters, all.longestLater, all.networks)
				// With a table of networks nobody is ever asked. Without one, a line that
				// comes back from a power cut in a network that it never had before
				// cannot be told from a theft; docs/keyserver.md says how often that is.
				if allowed := n / 2; table && all.holds+all.refusals > 0 || !table && all.holds > max(allowed, 1) {
					t.Errorf("the first: %s", all.first)
				}
			})
		}
	}
}
