// Package policy decides who gets a key. [Decide] is a pure function of the
// standing rules (site.toml), of what a key server remembers about an appliance
// ([State]) and of one request with its circumstances ([Facts]); its answer holds
// what is to be remembered next. [Store] keeps a state per appliance in a small
// file that survives restarts and crashes, and that the server and the command
// line may change at the same time. Orders of a person ([Approve], [Deny],
// [Revoke], [Allow], [Expect]) are pure functions of a state too.
//
// Whatever is missing, unreadable or contradictory means no. What an appliance
// says of itself can turn a yes into a no and never the other way.
//
// The caller stores Decision.Next whatever the verdict is, and acts on a grant
// only when it is stored.
package policy

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
)

// Verdict is the kind of an answer.
type Verdict string

// The verdicts. Of these only Grant gives anything.
const (
	Grant  Verdict = "granted"
	Hold   Verdict = "held"    // a person is asked; the request waits in State.Waiting
	Refuse Verdict = "refused" // nobody is asked
	Later  Verdict = "later"   // it is not known yet where the appliance is: to be tried again
)

// Reasons for a decision. They are part of the audit log's vocabulary.
const (
	ReasonExpected    = "as expected"
	ReasonApproved    = "approved by a person"
	ReasonAnnounced   = "a move that was announced"
	ReasonNoted       = "noted"
	ReasonNoStanding  = "no standing on file"
	ReasonRevoked     = "revoked"
	ReasonNoDisk      = "no disk in site.toml"
	ReasonForeignDisk = "another appliance's disk, or nobody's"
	ReasonForeign     = "not from its VPN address"
	ReasonTooOften    = "too many keys in 24 hours"
	ReasonUnplaced    = "the VPN does not say where it is"
	ReasonUnknownVerb = "no such request"
)

// What a person is asked about, in the order of weight; the first that applies is
// a decision's reason.
const (
	AskToken       = "another token than the last grant's: its card was copied or replaced"
	AskFlapping    = "its VPN endpoint goes to and fro: two machines have its key"
	AskContradicts = "its boot id and uptime contradict what was heard before: two machines, or an altered one"
	AskSerial      = "another board than before"
	AskPlace       = "another place than before"
	AskAbsence     = "silent for longer than key_policy.absence"
	AskWindow      = "outside key_policy.windows"
	AskAlways      = "every key is approved by a person"
)

var allAsks = []string{AskToken, AskFlapping, AskContradicts, AskSerial, AskPlace, AskAbsence, AskWindow, AskAlways}

// Alarms about the LUKS header that the appliance reports.
const (
	AlarmHeader = "the LUKS header is not the one in the backups"
	AlarmDamage = "a copy of the LUKS header is damaged"
	AlarmSlots  = "the LUKS header has an unexpected number of key slots"
)

// expectedSlots is the number of key slots of a disk of ours: the key server's and the bundle's.
const expectedSlots = 2

// Facts are one request and its circumstances.
type Facts struct {
	Request  keywire.Request
	From     netip.Addr     // the peer's address in the VPN; not valid where it cannot be read
	Place    place.Sighting // where the VPN sees that peer; zero: it does not say
	Now      moment.Moment
	NewToken keywire.Token // random; becomes the appliance's next token if a key is granted
}

// Decision is the answer to a request.
type Decision struct {
	Verdict    Verdict
	Reason     string        // one of the constants above
	Asks       []string      // everything that was not as it should be, Reason first
	Unexpected bool          // a person should hear of it, and has not within a day
	Alarms     []string      // about the LUKS header, each once per change
	Waiting    string        // id of the waiting request, with Hold
	Token      keywire.Token // to hand out with the key; "" for none
	Lease      time.Duration // with a granted lease
	Renew      time.Duration // when to renew it
	Next       State         // to be stored, whatever the verdict
}

const (
	// FollowGap is the longest silence between two networks of a peer over which
	// it is believed not to have been carried from one to the other, if its boot id
	// is the same too: a router's restart takes minutes, and an appliance that is
	// unplugged loses its boot id.
	FollowGap = 10 * time.Minute
	// SettleTime is how long a peer must have been heard from one network alone
	// before a key goes there, or before it is believed to have gone there itself:
	// three keepalives of WireGuard's.
	SettleTime = 90 * time.Second
	// RelayPatience is how long a peer that is reached through a relay may take to
	// find a direct path before the relay counts as its place.
	RelayPatience = 30 * time.Minute
	// UnplacedPatience is how long the VPN may say nothing before a person hears of it.
	UnplacedPatience = 15 * time.Minute
	// NetworkMemory is how long a network is known after the appliance was there.
	NetworkMemory = 400 * 24 * time.Hour
	// RepeatTime is for how long a machine may repeat a request for a key that a person
	// approved: its answer may be lost on the line, and an appliance that was refused asks
	// with its disk dark, and again to open it.
	RepeatTime = 15 * time.Minute
	// waitingMemory is how long a request is listed after it was last made.
	waitingMemory = 7 * 24 * time.Hour
	// warnAgain is when the same is said again.
	warnAgain = 24 * time.Hour
	// claimSlack is how far a claimed uptime may be off.
	claimSlack = 5 * time.Minute
	// day is the stretch in which keys are counted.
	day = 24 * time.Hour
)

// Decide judges a request of the appliance a, of which s is remembered.
func Decide(a site.Appliance, s State, f Facts) Decision {
	j := judgement{a: a, p: a.KeyPolicy, f: f, next: s.clone()}
	d := j.decide()
	if d.Verdict == Grant || d.Verdict == Hold {
		d.Alarms = j.alarms()
	}
	d.Next = j.next
	return d
}

// judgement is one decision under way.
type judgement struct {
	a    site.Appliance
	p    site.KeyPolicy
	f    Facts
	next State
}

func (j *judgement) decide() Decision {
	n, r := &j.next, j.f.Request
	if n.Appliance != j.a.Name {
		return Decision{Verdict: Refuse, Reason: ReasonNoStanding}
	}
	n.anchor(j.f.Now)
	if r.Verb == keywire.Dark {
		if j.a.LUKS == "" || r.UUID != j.a.LUKS {
			return j.refuse(ReasonForeignDisk)
		}
		n.Dark = j.f.Now
		return Decision{Verdict: Grant, Reason: ReasonNoted}
	}
	switch n.Standing.State {
	case Enabled:
	case Revoked:
		d := j.refuse(ReasonRevoked)
		if n.Told.IsZero() { // which is news of its own
			n.Told, d.Unexpected = j.f.Now, false
		}
		return d
	default:
		return j.refuse(ReasonNoStanding)
	}
	if j.p.Source != "any" && (!j.a.VPNAddress.IsValid() || j.f.From.Unmap() != j.a.VPNAddress) {
		return j.refuse(ReasonForeign)
	}
	switch r.Verb {
	case keywire.CheckIn:
	case keywire.Key, keywire.Renew:
		if j.a.LUKS == "" {
			return j.refuse(ReasonNoDisk)
		}
		if r.UUID != j.a.LUKS {
			return j.refuse(ReasonForeignDisk)
		}
	default:
		return j.refuse(ReasonUnknownVerb)
	}
	j.forget()
	if r.Verb == keywire.Key && len(n.Keys) >= min(j.p.KeysPerDay, maxKeys) {
		return j.refuse(ReasonTooOften)
	}

	w := j.where()
	asks := j.asks(w)
	switch {
	case j.p.Approval == site.ApprovalNever:
		return j.unasked(w, asks)
	case w.standing == placeUnknown:
		return j.later()
	}
	switch r.Verb {
	case keywire.CheckIn:
		return j.checkin(w, asks)
	case keywire.Renew:
		return j.lease(w, asks)
	}
	return j.key(w, asks)
}

// asks is everything about the request that a person should be asked about.
func (j *judgement) asks(w whereabouts) (asks []string) {
	n, r, at := &j.next, j.f.Request, j.f.Now
	if !n.LastSeen.IsZero() || !n.LastKey.IsZero() {
		if _, most := n.latest(at).Since(n.LastSeen); n.LastSeen.IsZero() || most > j.p.Absence.Std() {
			n.Absent = true // until a person has said that it is all right
		}
	}
	key := r.Verb == keywire.Key
	for _, one := range []struct {
		ask     string
		applies bool
	}{
		{AskToken, j.p.Token != site.TokenIgnored && !n.Tokens.accept(digest(r.Token))},
		{AskFlapping, key && w.flaps},
		{AskContradicts, j.contradicts()},
		{AskSerial, n.Serial != "" && r.Claims.Serial != "" && n.Serial != r.Claims.Serial},
		{AskPlace, w.standing == placeOther},
		{AskAbsence, key && n.Absent},
		{AskWindow, key && !j.inWindow()},
		{AskAlways, key && j.p.Approval != site.ApprovalAfterAbsence && j.p.Approval != site.ApprovalNever},
	} {
		if one.applies {
			asks = append(asks, one.ask)
		}
	}
	return asks
}

// contradicts reports whether boot id and uptime cannot be those of the machine
// that was heard before. It measures by the clock that nobody sets, and says
// nothing where that one began anew meanwhile.
func (j *judgement) contradicts() bool {
	c, t, at := j.f.Request.Claims, j.next.Trusted, j.f.Now
	if c.Boot == "" || c.Up == 0 || t.Boot == "" || at.Boot == "" || at.Boot != t.At.Boot {
		return false
	}
	passed, up := at.Up-t.At.Up, time.Duration(c.Up)*time.Second
	if c.Boot != t.Boot {
		return up > passed+claimSlack // it ran while another boot was heard
	}
	return t.Up != 0 && (up-t.Up-passed).Abs() > claimSlack
}

// inWindow judges by the wall clock, and by what it would show had nobody set it
// since the key server's boot: both must agree that keys are expected now.
func (j *judgement) inWindow() bool {
	return j.p.Expects(j.f.Now.Wall) && j.p.Expects(j.next.unset(j.f.Now))
}

// refuse says no and asks nobody.
func (j *judgement) refuse(why string) Decision {
	return Decision{Verdict: Refuse, Reason: why, Unexpected: j.warn(why, "")}
}

// later says that it is too early to judge.
func (j *judgement) later() Decision {
	n := &j.next
	if n.Unplaced.IsZero() {
		n.Unplaced = j.f.Now
	}
	least, _ := j.f.Now.Since(n.Unplaced)
	return Decision{Verdict: Later, Reason: ReasonUnplaced, Unexpected: least >= UnplacedPatience && j.warn(ReasonUnplaced, "")}
}

// unasked judges for an appliance about which nobody wants to be asked.
func (j *judgement) unasked(w whereabouts, asks []string) Decision {
	if slices.Contains(asks, AskWindow) {
		return j.refuse(AskWindow)
	}
	// Its silence is nobody's business.
	asks = slices.DeleteFunc(asks, func(ask string) bool { return ask == AskAbsence })
	d := Decision{Verdict: Grant, Reason: ReasonExpected}
	if len(asks) > 0 {
		d.Reason, d.Asks, d.Unexpected = asks[0], asks, j.warn(asks[0], w.network.Name)
	}
	j.accept(&d, w, asks, "unasked")
	return d
}

// checkin is never waited for. A silence is only remembered, and what a person has
// announced is neither refused nor used up.
func (j *judgement) checkin(w whereabouts, asks []string) Decision {
	switch {
	case len(asks) == 0:
		d := Decision{Verdict: Grant, Reason: ReasonExpected, Unexpected: w.flaps && j.warn(AskFlapping, "")}
		j.accept(&d, w, nil, "")
		return d
	case j.announced(asks):
		return Decision{Verdict: Grant, Reason: ReasonAnnounced, Asks: asks}
	}
	return j.oddly(Refuse, w, asks)
}

func (j *judgement) lease(w whereabouts, asks []string) Decision {
	d := Decision{Verdict: Grant, Reason: ReasonExpected, Lease: j.p.Lease.Std(), Renew: keywire.RenewAfter(j.p.Lease.Std())}
	if len(asks) == 0 {
		d.Unexpected = w.flaps && j.warn(AskFlapping, "")
		j.accept(&d, w, nil, "")
		return d
	}
	if !j.excused(&d, w, asks) {
		return j.oddly(Refuse, w, asks)
	}
	return d
}

func (j *judgement) key(w whereabouts, asks []string) Decision {
	d := Decision{Verdict: Grant, Reason: ReasonExpected}
	if len(asks) == 0 {
		j.accept(&d, w, nil, "")
		return d
	}
	if j.excused(&d, w, asks) {
		return d
	}
	d = j.oddly(Hold, w, asks)
	id, added := j.wait(w, asks)
	d.Waiting = id
	// Where each key waits, each is worth a word; what a thief can repeat is not.
	if added && (asks[0] == AskAlways || asks[0] == AskWindow || asks[0] == AskAbsence) {
		d.Unexpected = true
	}
	return d
}

// oddly says no because of asks.
func (j *judgement) oddly(v Verdict, w whereabouts, asks []string) Decision {
	return Decision{Verdict: v, Reason: asks[0], Asks: asks, Unexpected: j.warn(asks[0], w.network.Name)}
}

// excused grants what a person has approved or announced, and uses that up.
func (j *judgement) excused(d *Decision, w whereabouts, asks []string) bool {
	n := &j.next
	switch {
	case j.approved(w, asks):
		id := n.Approval.Of.ID
		n.Approval = j.repeatable(w, asks)
		n.drop(func(w Waiting) bool { return w.ID == id })
		d.Reason, d.Asks = ReasonApproved, asks
		j.accept(d, w, asks, "approved")
	case j.announced(asks):
		n.Expected = nil
		d.Reason, d.Asks = ReasonAnnounced, asks
		j.accept(d, w, asks, "expected")
	default:
		return false
	}
	return true
}

// approved reports whether a person approved a request like this one.
func (j *judgement) approved(w whereabouts, asks []string) bool {
	a, r := j.next.Approval, j.f.Request
	if a == nil || !j.lasts(a.Given, a.Earliest, ApprovalTime) {
		return false
	}
	if !a.Used.IsZero() {
		return j.repeats(*a, w, asks)
	}
	for _, ask := range asks {
		alike := slices.Contains(a.Of.Asks, ask)
		switch ask {
		case AskAbsence, AskWindow, AskAlways:
			alike = true
		case AskToken:
			alike = alike && a.Of.Token == digest(r.Token)
		case AskSerial:
			alike = alike && a.Of.Serial == r.Claims.Serial
		case AskPlace:
			alike = alike && (a.Of.Network.Same(w.network) || j.followed(a.Of.Network, a.Of.Boot))
		}
		if !alike {
			return false
		}
	}
	return true
}

// repeatable is what is left of an approval that lets this request through: where
// each key is asked about whatever else is settled, the same machine may have this one
// once more.
func (j *judgement) repeatable(w whereabouts, asks []string) *Approval {
	a, r := *j.next.Approval, j.f.Request
	if r.Verb != keywire.Key || !a.Used.IsZero() || r.Claims.Boot == "" || !slices.ContainsFunc(asks, eachTime) {
		return nil
	}
	a.Used, a.Of.Boot, a.Of.Network = j.f.Now, r.Claims.Boot, w.network
	return &a
}

// repeats reports whether this is the request again that was approved and answered.
// That a token of the appliance's is shown, and all else is in order, is among asks.
func (j *judgement) repeats(a Approval, w whereabouts, asks []string) bool {
	r, now := j.f.Request, j.f.Now
	return r.Verb == keywire.Key && r.Claims.Boot == a.Of.Boot && w.network.Name == a.Of.Network.Name &&
		a.Used.Boot == now.Boot && now.Before(a.Used, RepeatTime) &&
		!slices.ContainsFunc(asks, func(ask string) bool { return !eachTime(ask) })
}

// eachTime reports whether ask comes up at each key, although the last was approved.
func eachTime(ask string) bool { return ask == AskAlways || ask == AskWindow }

// announced reports whether a person said beforehand that the appliance would move,
// with a new card or on a new board too.
func (j *judgement) announced(asks []string) bool {
	e := j.next.Expected
	if e == nil || !j.lasts(e.Given, e.Earliest, e.For) {
		return false
	}
	return !slices.ContainsFunc(asks, func(ask string) bool {
		return ask != AskToken && ask != AskPlace && ask != AskAbsence && ask != AskSerial
	})
}

// lasts reports whether an order that lasts for d still counts.
func (j *judgement) lasts(given moment.Moment, earliest time.Time, d time.Duration) bool {
	n, now := &j.next, j.f.Now
	if given.Boot == now.Boot {
		return now.Before(given, d)
	}
	given = moment.Moment{Wall: earliest}
	return n.earliest(now).Before(given, d) && n.latest(now).Before(given, d)
}

// accept remembers a request that is granted. asks are what was excused, how says
// by whom.
func (j *judgement) accept(d *Decision, w whereabouts, asks []string, how string) {
	n, r, at := &j.next, j.f.Request, j.f.Now
	n.LastSeen = n.earliest(at)
	if w.standing != placeUnknown {
		n.Unplaced = moment.Moment{}
		j.settle(w, how)
	}
	if how != "" || n.Serial == "" {
		n.Serial = cmpOr(r.Claims.Serial, n.Serial)
	}
	n.Trusted = TrustedPlace{Network: w.network, Boot: r.Claims.Boot, Up: time.Duration(r.Claims.Up) * time.Second, At: at}
	if j.p.Token != site.TokenIgnored {
		j.acceptToken(d, slices.Contains(asks, AskToken))
	}
	if slices.Contains(asks, AskAbsence) || j.p.Approval == site.ApprovalNever || how == "expected" {
		n.Absent = false
	}
	if r.Verb == keywire.Renew && n.Approval != nil && !n.Approval.Used.IsZero() {
		n.Approval = nil // the key has arrived: the disk is open
	}
	if r.Verb != keywire.Key {
		return
	}
	n.Keys = append(n.Keys, n.latest(at))
	n.LastKey = at
	n.Dark = moment.Moment{}
	// It is the same machine that waited: what it was asked about has settled itself.
	n.drop(func(one Waiting) bool {
		return one.Boot != "" && one.Boot == r.Claims.Boot && j.p.Place != site.PlaceNone
	})
}

// acceptToken brings the tokens on file in line with the one that was shown, and
// issues one with a key.
func (j *judgement) acceptToken(d *Decision, mismatch bool) {
	t, shown := &j.next.Tokens, digest(j.f.Request.Token)
	key := j.f.Request.Verb == keywire.Key
	switch {
	case mismatch, !t.onFile() && key:
		*t = Tokens{Shown: shown}
	case shown != "" && shown == t.Issued:
		*t = Tokens{Shown: shown}
	}
	if key {
		t.Issued = digest(j.f.NewToken)
		d.Token = j.f.NewToken
	}
}

// accept reports whether a request may show the token with this digest ("" for none).
func (t Tokens) accept(shown string) bool {
	return !t.onFile() || shown == t.Shown || shown != "" && shown == t.Issued
}

// digest stands for a token in the state, which therefore holds nothing that
// opens anything.
func digest(t keywire.Token) string {
	if t == "" {
		return ""
	}
	sum := sha256.Sum256([]byte("farkeep token\n" + t.Reveal()))
	return hex.EncodeToString(sum[:])
}

// wait lists the request for a person: one entry for each network that the
// appliance asked from.
func (j *judgement) wait(w whereabouts, asks []string) (id string, added bool) {
	n, r, at := &j.next, j.f.Request, j.f.Now
	i := slices.IndexFunc(n.Waiting, func(one Waiting) bool { return one.Network.Name == w.network.Name })
	if added = i < 0; added {
		if len(n.Waiting) >= maxWaiting {
			oldest := 0
			for k, one := range n.Waiting {
				if one.Last.Wall.Before(n.Waiting[oldest].Last.Wall) {
					oldest = k
				}
			}
			n.Waiting = slices.Delete(n.Waiting, oldest, oldest+1)
		}
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %d %s %s", n.Appliance, w.network.Name, at.Wall.UnixNano(), at.Boot, at.Up))
		n.Waiting = append(n.Waiting, Waiting{ID: strings.ToLower(base32.StdEncoding.EncodeToString(sum[:4]))[:6], First: at})
		i = len(n.Waiting) - 1
	}
	one := &n.Waiting[i]
	one.Verb, one.Asks, one.Network, one.Endpoint = string(r.Verb), asks, w.network, w.endpoint
	one.Boot, one.Serial, one.Last, one.Token = r.Claims.Boot, r.Claims.Serial, at, digest(r.Token)
	one.Count++
	return one.ID, added
}

func (s *State) drop(which func(Waiting) bool) { s.Waiting = slices.DeleteFunc(s.Waiting, which) }

// forget drops what has grown old. Where clocks contradict each other it keeps.
func (j *judgement) forget() {
	n := &j.next
	at := n.earliest(j.f.Now)
	older := func(than moment.Moment, d time.Duration) bool { least, _ := at.Since(than); return least >= d }
	n.Keys = slices.DeleteFunc(n.Keys, func(k moment.Moment) bool { return older(k, day) })
	n.drop(func(w Waiting) bool { return older(w.Last, waitingMemory) })
	n.Warned = slices.DeleteFunc(n.Warned, func(w Warning) bool { return older(w.At, warnAgain) })
}

// warn reports whether a person should hear of what, which they have not lately.
func (j *judgement) warn(what, from string) bool {
	n := &j.next
	if from != "" {
		what += " (" + from + ")"
	}
	for i, w := range n.Warned {
		if w.What != what {
			continue
		}
		if least, _ := j.f.Now.Since(w.At); least < warnAgain {
			return false
		}
		n.Warned[i].At = j.f.Now
		return true
	}
	if len(n.Warned) >= maxWarned {
		n.Warned = slices.Delete(n.Warned, 0, 1)
	}
	n.Warned = append(n.Warned, Warning{What: what, At: j.f.Now})
	return true
}

// alarms are what the appliance's LUKS header is worth telling about, once per change.
func (j *judgement) alarms() (alarms []string) {
	c, h := j.f.Request.Claims, &j.next.Header
	if c.Header != "" {
		want := cmpOr(j.a.LUKSHeader, h.Digest, c.Header)
		if c.Header != want && c.Header != h.Digest {
			alarms = append(alarms, AlarmHeader)
		}
		h.Digest = c.Header
	}
	if c.Damage != "" && c.Damage != h.Damage {
		alarms = append(alarms, AlarmDamage)
	}
	if c.Damage != "" || c.Header != "" {
		h.Damage = c.Damage
	}
	if c.Slots != 0 {
		if c.Slots != expectedSlots && c.Slots != h.Slots {
			alarms = append(alarms, AlarmSlots)
		}
		h.Slots = c.Slots
	}
	return alarms
}

// cmpOr is the first that is not empty.
func cmpOr(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
