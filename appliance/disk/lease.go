package disk

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/consent"
	"farkeep/appliance/status"
	"farkeep/appliance/unlock"
	"farkeep/shared/keywire"
)

// The consent of the key servers.
//
//	                        renewed
//	                      ┌─────────┐
//	         key          ▼         │
//	dark ──────────▶ open, leased ──┘
//	 ▲                  │      │ lease over, no answer      ┌────────────────────┐
//	 │          refused │      └──────────────────────────▶ │ barred: closed in  │
//	 │                  └─────────────────────────────────▶ │ order, told to all │
//	 └───────────────────────────────────────────────────── │ servers ("dark")   │
//	  consent is back: that of any server after a lease that└────────────────────┘
//	  ran out, that of every server that refused otherwise
//
// While the disk is dark the servers hear a check-in now and then, so that none
// takes the appliance for lost; a check-in that is refused bars the disk as well.
// The bar itself costs the disk nothing: it stays without power until a check-in
// was granted. A refusal ends only with a key from the server that refused. Where
// a person has to approve, as for a copied card or another place, the request is
// listed by asking for the key with the disk dark; a key that comes is thrown away.
const (
	// firstLease is how long a key alone keeps the disk open. The first lease is
	// asked for as soon as the key was there.
	firstLease = 15 * time.Minute
	// adoptGrace is what a part has that finds an open disk and no word of its lease.
	adoptGrace = time.Minute
	// consentTimeout bounds one round: two requests to the slowest server.
	consentTimeout = time.Minute
	// checkinPace is how often a dark appliance checks in; barredPace and
	// expiredPace, how often at the most it asks to be let in again.
	checkinPace = 30 * time.Minute
	barredPace  = 15 * time.Minute
	expiredPace = time.Minute
	// silentPace bounds the time between rounds that nobody answered, and askFirst
	// is the shortest time between two rounds of any kind.
	silentPace = 5 * time.Minute
	askFirst   = 5 * time.Second
)

// lease is the part of a Disk that is about consent; its mu guards it.
type lease struct {
	until   time.Duration // by Boottime; while there is a mapping
	renewAt time.Duration // by Boottime
	by      string        // the server that consented last
	slots   int           // key slots of the header, 0 if not known

	barred   string        // "" or why the disk may not be open: status.DarkRefused, DarkExpired
	unnoted  bool          // a bar that Book does not know of yet
	askAt    time.Duration // by Boottime: the next check-in
	askedAt  time.Duration // by Boottime: the last round
	tries    int           // rounds since something changed
	unheard  bool          // the last round had a server that was silent
	toldDark bool          // "dark" was sent at least once for this bar

	cancelAsk context.CancelFunc // calls off the round under way
}

// recall takes over what earlier runs left: refusals from the card, the rest
// from the status of this boot.
func (d *Disk) recall(b status.Disk) {
	d.until, d.by = b.LeaseEnds, b.LeaseServer
	d.askAt = d.cfg.Boottime() + checkinPace/30
	switch refusing := d.cfg.Book.Refusing(); {
	case len(refusing) > 0:
		d.barLocked(status.DarkRefused, refusing)
	case b.Dark == status.DarkExpired:
		d.barLocked(status.DarkExpired, nil)
	}
	d.unnoted = false
	if d.barred != "" {
		d.askAt = 0
	}
}

// adoptLeaseLocked judges the lease of a disk that an earlier run left open.
// d.mu is held.
func (d *Disk) adoptLeaseLocked() {
	if d.node == "" {
		return
	}
	now := d.cfg.Boottime()
	if d.until <= 0 || d.until > now+keywire.MaxLease {
		d.until = now + adoptGrace
	}
	d.renewAt = 0
}

// grantLocked notes a consent. d.mu is held.
func (d *Disk) grantLocked(server string, until, renewAt time.Duration) {
	d.until, d.renewAt, d.by = until, renewAt, server
}

// expireLocked bars the disk when its lease is over. d.mu is held.
func (d *Disk) expireLocked() {
	if d.node != "" && d.barred == "" && d.cfg.Boottime() >= d.until {
		d.barLocked(status.DarkExpired, nil)
	}
}

// barLocked forbids the disk to be open: whoever drives it closes it. refusing
// are the servers that refuse. d.mu is held.
func (d *Disk) barLocked(why string, refusing []string) {
	d.barred, d.unnoted, d.tries, d.toldDark = why, true, 0, false
	s := &d.now
	s.Dark = why
	if s.FailingSince.IsZero() {
		s.FailingSince = time.Now()
	}
	switch why {
	case status.DarkRefused:
		s.ErrorKind = status.ErrorLeaseRefused
		s.Error = fmt.Sprintf("refused by key server %s: the disk stays dark until it grants again (\"farkeep-keyserver list\" there says whether the appliance was revoked, which \"allow\" ends, or waits for a person, who may \"approve\")", d.namesOf(refusing))
		d.cfg.Log.Error("a key server refuses: the disk is closed and stays dark", "server", d.namesOf(refusing))
	default:
		s.ErrorKind = status.ErrorLeaseExpired
		s.Error = "no key server renewed the lease in time: the disk stays dark until one answers (check that the VPN is up and that a key server runs)"
		d.cfg.Log.Error("the lease is over and no key server renewed it: the disk is closed and stays dark")
	}
	poke(d.askNow)
}

// namesOf are the servers' names, for people.
func (d *Disk) namesOf(ids []string) string {
	var names []string
	for _, id := range ids {
		if name := d.cfg.Servers[id]; name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " and ")
}

// describeLease adds to a status what there is to say. d.mu is held.
func (d *Disk) describeLease(s *status.Disk) {
	s.LeaseUntil, s.LeaseEnds, s.LeaseServer = time.Time{}, 0, ""
	if d.node != "" {
		s.LeaseUntil, s.LeaseEnds, s.LeaseServer = time.Now().Add(d.until-d.cfg.Boottime()).Round(0), d.until, d.by
	}
	s.Refused = nil
	all := d.cfg.Book.All()
	for _, id := range d.cfg.Book.Refusing() {
		s.Refused = append(s.Refused, status.Refusal{Server: d.cfg.Servers[id], Since: all[id].Refused})
	}
}

// watch asks the key servers whenever it is time, until ctx ends.
func (d *Disk) watch(ctx context.Context) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	reachable := true
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.askNow:
		case <-ticker.C:
		}
		if up := d.cfg.VPNUp(); up != reachable {
			reachable = up
			d.reachableAgain(up)
		}
		d.noteBar()
		if round, due := d.due(); due {
			d.consult(ctx, round)
		}
	}
}

// reachableAgain makes a round that nobody heard be tried again at once.
func (d *Disk) reachableAgain(up bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if up && d.unheard {
		d.askAt, d.renewAt, d.tries = 0, 0, 0
	}
}

// noteBar has a lease that ran out remembered, outside of any lock: a card that
// is dying must not hold up the closing.
func (d *Disk) noteBar() {
	d.mu.Lock()
	unnoted := d.unnoted
	d.unnoted = false
	d.mu.Unlock()
	if !unnoted {
		return
	}
	d.report()
	d.keep(d.cfg.Book.Close(nil, time.Now()))
}

// keep logs that something was not remembered. It holds until power-off then.
func (d *Disk) keep(err error) {
	if err != nil {
		d.cfg.Log.Error("the key servers' answers are not kept", "err", err)
	}
}

// due returns the round that is to be asked now.
func (d *Disk) due() (consent.Round, bool) {
	untold := d.cfg.Book.Untold()
	dark := d.relayKnown() && d.dark()
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.cfg.Boottime()
	r := consent.Round{UUID: d.cfg.UUID, Tokens: d.cfg.Book.Tokens(), Claims: keywire.Claims{
		Header: d.now.HeaderDigest, Damage: unlock.Damage(d.damage), Slots: d.slots,
	}}
	switch {
	case d.stopping:
		return r, false
	case d.node != "":
		r.Open = true
		return r, d.barred == "" && now >= d.renewAt
	case d.cancelOpen != nil:
		return r, false // the opening under way asks for the key, which says as much
	}
	if dark {
		r.Dark = untold
	}
	r.Petition = dark && d.barred == status.DarkRefused
	tell := len(r.Dark) > 0 && !d.toldDark
	return r, tell || now >= d.askAt
}

// relayKnown: before the first look at the machine nothing is known to be dark.
func (d *Disk) relayKnown() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.relay != nil
}

// askAlone waits until no round is under way, after calling it off, and keeps
// others from beginning until letGo is called.
func (d *Disk) askAlone(ctx context.Context) (letGo func(), err error) {
	d.mu.Lock()
	if d.cancelAsk != nil {
		d.cancelAsk()
	}
	d.mu.Unlock()
	select {
	case d.asking <- struct{}{}:
		return func() { <-d.asking }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// consult makes one round and acts on it.
func (d *Disk) consult(ctx context.Context, r consent.Round) {
	ctx, cancel := context.WithTimeout(ctx, consentTimeout)
	defer cancel()
	d.mu.Lock()
	select {
	case d.asking <- struct{}{}:
		d.cancelAsk = cancel
		d.mu.Unlock()
	default:
		d.mu.Unlock()
		return // the key is being asked for; the next tick looks again
	}
	defer func() { <-d.asking }()
	got, err := d.cfg.System.Consent(ctx, r)
	d.mu.Lock()
	d.cancelAsk = nil
	d.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil || ctx.Err() == context.DeadlineExceeded {
			d.cfg.Log.Error("ask the key servers for consent", "err", err)
		}
		got = consent.Result{}
	}
	d.heard(r, got)
}

// heard acts on the answers of one round.
func (d *Disk) heard(r consent.Round, got consent.Result) {
	var refused, granted, told, freed []string
	silent := len(got.Answers) == 0
	var best consent.Answer
	renewAt := time.Duration(0)
	for _, a := range got.Answers {
		switch {
		case a.Refused:
			refused = append(refused, a.ID)
		case a.Granted:
			granted = append(granted, a.ID)
			if a.Until > best.Until {
				best = a
			}
			if renewAt == 0 || a.Renew < renewAt {
				renewAt = a.Renew
			}
		default:
			silent = true
			d.cfg.Log.Warn("no consent from this key server, and no refusal", "server", a.Server, "err", a.Error)
		}
		if a.Freed {
			freed = append(freed, a.ID)
		}
		if a.Told {
			told = append(told, a.ID)
		}
	}

	refusing := d.cfg.Book.Refusing()
	d.mu.Lock()
	now := d.cfg.Boottime()
	d.unheard, d.askedAt = silent, now
	d.toldDark = d.toldDark || len(r.Dark) > 0
	d.tries++
	switch {
	case len(refused) > 0:
		// Barred anew only if that changes something: the closing is once.
		if d.barred != status.DarkRefused {
			d.barLocked(status.DarkRefused, refused)
		}
		d.unnoted = false // noted below, with the servers
	case r.Open && len(granted) > 0 && d.node != "" && d.barred == "":
		// The latest end that any server gave in this round: an earlier, longer one
		// may have been cut by a new policy.
		d.grantLocked(best.Server, min(best.Until, now+keywire.MaxLease), max(renewAt, now+askFirst))
		d.tries = 0
	case d.barred == status.DarkRefused && containsAll(granted, refusing), d.barred == status.DarkExpired && len(granted) > 0:
		// The disk may be tried again. What refused must grant the key itself.
		d.cfg.Log.Info("consent is back", "servers", d.namesOf(granted))
		d.barred, d.tries = "", 0
	}
	if r.Open && d.renewAt <= now {
		d.renewAt = now + backOff(askFirst, silentPace/5, d.tries)
	}
	d.askAt = now + d.checkinAfterLocked(silent)
	d.mu.Unlock()

	// After the bar: closing must not wait for a card.
	if len(got.Tokens) > 0 || len(freed) > 0 {
		d.keep(d.cfg.Book.Keep(got.Tokens, freed, false))
	}
	if len(refused) > 0 && !containsAll(refusing, refused) {
		d.keep(d.cfg.Book.Close(refused, time.Now()))
	}
	if len(told) > 0 {
		d.keep(d.cfg.Book.Told(told))
	}
	d.report()
}

// checkinAfterLocked is when to check in next, with jitter. d.mu is held.
func (d *Disk) checkinAfterLocked(silent bool) time.Duration {
	switch {
	case d.barred == status.DarkExpired:
		return backOff(askFirst, expiredPace, d.tries)
	case d.barred == status.DarkRefused:
		return backOff(time.Minute, barredPace, d.tries)
	case silent:
		return backOff(time.Minute, silentPace, d.tries)
	default:
		return backOff(checkinPace, checkinPace, 0)
	}
}

// backOff is first, doubled with every try, most at the most, give or take a fifth.
func backOff(first, most time.Duration, tries int) time.Duration {
	d := min(first<<min(max(tries-1, 0), 20), most)
	return d*4/5 + rand.N(d*2/5)
}

func containsAll(all, some []string) bool {
	return !slices.ContainsFunc(some, func(s string) bool { return !slices.Contains(all, s) })
}
