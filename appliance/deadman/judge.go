package deadman

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/letter"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"
)

const (
	// A part that restarts this often within restartWindow is in a loop.
	restartLimit  = 5
	restartWindow = time.Hour
	// proofInterval is the pace of the mail that says that all is well.
	proofInterval = 30 * 24 * time.Hour
	// welcomeWait is how long the first mail waits for VPN and disk to have
	// something to tell.
	welcomeWait = 3 * time.Minute
	// maxBody bounds a mail's text, in bytes; encoded it is three times as long at
	// most, which the outbox takes.
	maxBody = 20_000
)

// Facts is what the judge sees at one moment. A nil status is unknown.
type Facts struct {
	Now     time.Time
	Uptime  time.Duration // of the machine
	BootID  string
	Host    string // the appliance's name
	Waiting []string
	Boot    *status.Boot
	Network *status.Network
	Disk    *status.Disk
	Keeper  *status.Keeper
	Mail    *status.Mail
}

// clockSure reports whether the wall clock may decide anything.
func (f Facts) clockSure() bool {
	return f.Network != nil && f.Network.ClockSet && f.Network.ClockJump == ""
}

// clockKnown reports whether the start is over: the clock is set, or known to
// stay as it is.
func (f Facts) clockKnown() bool {
	return f.Network != nil && (f.Network.ClockSet || f.Network.ClockSource != "")
}

func (f Facts) moment() Moment {
	return Moment{Boot: f.BootID, Uptime: f.Uptime, Wall: f.Now, Sure: f.clockSure()}
}

// since is how long ago m was, at the least. Within one boot that is exact. For
// an earlier boot's moment it takes a clock that is set, then and now; otherwise
// only the present boot's uptime is certain.
func (f Facts) since(m Moment) time.Duration {
	if m.Boot == f.BootID && m.Boot != "" {
		return max(0, f.Uptime-m.Uptime)
	}
	if m.Sure && f.clockSure() {
		return max(f.Uptime, f.Now.Sub(m.Wall))
	}
	return f.Uptime
}

// ago tells since in words, and that it is a lower bound where it is one.
func (f Facts) ago(m Moment) string {
	if (m.Boot == f.BootID && m.Boot != "") || (m.Sure && f.clockSure()) {
		return span(f.since(m)) + " ago"
	}
	return "at least " + span(f.since(m)) + " ago"
}

// settle gives moments of this boot that were noted before the clock was set
// their place on the wall clock, now that it is.
func (f Facts) settle(m *Moment) {
	if f.clockSure() && !m.Sure && m.Boot == f.BootID && m.Boot != "" {
		m.Wall, m.Sure = f.Now.Add(m.Uptime-f.Uptime), true
	}
}

// fact is one line of a mail's first part.
type fact struct{ label, value string }

// finding is one thing that is wrong at present.
type finding struct {
	kind    string
	subject string // what it is about: a host, a repository, a part, or ""
	facts   []fact
	// commands are what the operator may run, ready to be copied.
	commands []string
}

func (f finding) key() string { return f.kind + "/" + f.subject }

// Judge is the dead man's switch: from what it remembers and what it sees it
// makes what it remembers next and the mails to send. It has no side effects,
// and state is not changed.
//
// One mail when an alarm is raised, reminders at the set pace, one all-clear.
// What cannot be seen at present changes nothing: an alarm does not end because
// a status file is missing, and a disk that is dark is not known to be well.
func Judge(state State, see Facts, set settings.DeadMan) (State, []Mail) {
	j := judge{state: state.clone(), see: see, set: set, unknown: map[string]bool{}}
	if j.state.Installed == (Moment{}) {
		j.state.Installed = see.moment()
	}
	j.settle()
	j.heartbeats()
	j.repositories()
	j.history()
	j.disk()
	j.clock()
	j.machine()
	j.flip()
	j.events()
	j.proof()
	return j.state, j.mails
}

type judge struct {
	state    State
	see      Facts
	set      settings.DeadMan
	findings []finding
	unknown  map[string]bool // kinds that cannot be judged now
	mails    []Mail
}

func (s State) clone() State {
	s.Hosts, s.Alarms, s.Restarts = maps.Clone(s.Hosts), maps.Clone(s.Alarms), maps.Clone(s.Restarts)
	if s.Hosts == nil {
		s.Hosts = map[string]Host{}
	}
	if s.Alarms == nil {
		s.Alarms = map[string]Alarm{}
	}
	if s.Restarts == nil {
		s.Restarts = map[string]Window{}
	}
	s.Pending, s.Told = slices.Clone(s.Pending), slices.Clone(s.Told)
	return s
}

func (j *judge) settle() {
	j.see.settle(&j.state.Installed)
	j.see.settle(&j.state.LastProof)
	for name, h := range j.state.Hosts {
		j.see.settle(&h.Arrived)
		j.state.Hosts[name] = h
	}
	for key, a := range j.state.Alarms {
		for _, m := range []*Moment{&a.Seen, &a.Gone, &a.Since, &a.Last} {
			j.see.settle(m)
		}
		j.state.Alarms[key] = a
	}
	for name, w := range j.state.Restarts {
		j.see.settle(&w.From)
		j.state.Restarts[name] = w
	}
}

func (j *judge) find(kind, subject string, facts ...fact) {
	j.findings = append(j.findings, finding{kind: kind, subject: subject, facts: facts})
}

func (j *judge) raised(kind, subject string) bool {
	return j.state.Alarms[finding{kind: kind, subject: subject}.key()].Raised
}

// heartbeats notes what arrived and judges what did not.
func (j *judge) heartbeats() {
	if j.see.Keeper != nil {
		// A heartbeat that the keeper did not have a while ago in this boot has
		// arrived since, whatever any clock says.
		watched := j.state.KeeperBoot == j.see.BootID && j.see.BootID != ""
		for _, h := range j.see.Keeper.Heartbeats {
			old, known := j.state.Hosts[h.Host]
			if !known && len(j.state.Hosts) >= maxHosts || known && old.At.Equal(h.At) && old.ReceivedAt.Equal(h.ReceivedAt) {
				continue
			}
			arrived := Moment{Wall: h.ReceivedAt, Sure: true}
			if watched {
				arrived = j.see.moment()
			}
			j.state.Hosts[h.Host] = Host{At: h.At, ReceivedAt: h.ReceivedAt, Arrived: arrived}
		}
		j.state.KeeperBoot = j.see.BootID
	}
	if !j.see.clockKnown() {
		j.unknown[heartbeatStale] = true
		return
	}
	threshold := fact{"threshold", j.set.HeartbeatAge.String()}
	limit := j.set.HeartbeatAge.Std()
	if len(j.state.Hosts) == 0 {
		if j.raised(heartbeatStale, "") || j.see.since(j.state.Installed) > limit {
			j.find(heartbeatStale, "", fact{"last heartbeat", "none since the appliance was set up, " + j.see.ago(j.state.Installed)}, threshold)
		}
		return
	}
	for _, name := range slices.Sorted(maps.Keys(j.state.Hosts)) {
		h := j.state.Hosts[name]
		// Once stale it stays so until the next one arrives: after a start without
		// a clock less is known about its age, but it is not younger.
		h.Stale = h.Stale || j.see.since(h.Arrived) > limit
		j.state.Hosts[name] = h
		if h.Stale {
			j.find(heartbeatStale, name, fact{"last heartbeat", stamp(h.ReceivedAt) + ", " + j.see.ago(h.Arrived)},
				fact{"by its own clock", stamp(h.At)}, threshold)
		}
	}
}

func (j *judge) repositories() {
	if j.see.Keeper == nil || !j.see.clockSure() {
		j.unknown[unchanged] = true
		return
	}
	limit := j.set.UnchangedAge.Std()
	for _, r := range j.see.Keeper.Repositories {
		if age := j.see.Now.Sub(r.ChangedAt); limit > 0 && !r.ChangedAt.IsZero() && age > limit {
			j.find(unchanged, r.Name, fact{"last change", stamp(r.ChangedAt) + ", " + span(age) + " ago"},
				fact{"last confirmed", stamp(r.ConfirmedAt)}, fact{"threshold", j.set.UnchangedAge.String()})
		}
	}
}

// diskKinds maps the disk part's words to alarms.
var diskKinds = map[string]string{
	status.ErrorMissing:     diskMissing,
	status.ErrorRefused:     unlockRefused,
	status.ErrorUnreachable: unreachable,
	status.ErrorWrongKey:    wrongKey,
	status.ErrorBadHeader:   badHeader,
	status.ErrorFileSystem:  fileSystem,
	status.ErrorHung:        diskHung,
}

func (j *judge) disk() {
	d := j.see.Disk
	j.consent(d)
	if d == nil {
		j.unknown[diskFull], j.unknown[diskFailing] = true, true
		for _, kind := range diskKinds {
			j.unknown[kind] = true
		}
		return
	}
	switch {
	case d.ErrorKind == status.ErrorLeaseRefused, d.ErrorKind == status.ErrorLeaseExpired:
	case d.ErrorKind != "":
		kind := cmp.Or(diskKinds[d.ErrorKind], diskFailing)
		facts := []fact{{"what happened", line(d.Error)}}
		if j.see.clockSure() && !d.FailingSince.IsZero() {
			facts = append(facts, fact{"failing since", stamp(d.FailingSince)})
		}
		j.find(kind, "", facts...)
	case !d.Unlocked && !d.Mounted:
		// Dark, and nothing was tried since the start.
		j.unknown[diskFailing] = true
		for _, kind := range diskKinds {
			j.unknown[kind] = true
		}
	}
	if d.TotalBytes <= 0 || !d.Mounted {
		j.unknown[diskFull] = true
		return
	}
	limit := int64(j.set.DiskFullPercent)
	if j.raised(diskFull, "") {
		limit-- // no all-clear, and no new alarm, for a few bytes
	}
	if used := d.TotalBytes - d.FreeBytes; used >= d.TotalBytes/100*limit {
		j.find(diskFull, "", fact{"used", fmt.Sprintf("%d %% of %s", used/max(d.TotalBytes/100, 1), size(d.TotalBytes))},
			fact{"free", size(d.FreeBytes)}, fact{"threshold", fmt.Sprintf("%d %%", j.set.DiskFullPercent)})
	}
}

// closingTime is how long a disk may take to close before a mail says that it is
// not dark yet. One whose power cannot be switched always takes that long.
const closingTime = time.Minute

// consent judges a disk that is kept dark, whatever else went wrong with it.
func (j *judge) consent(d *status.Disk) {
	if d == nil || d.Dark == "" && !d.Unlocked && !d.Mounted {
		// Not seen, or dark for another reason, or since a start: not known to be over.
		j.unknown[leaseRefused], j.unknown[leaseExpired] = true, true
		return
	}
	kind := map[string]string{status.DarkRefused: leaseRefused, status.DarkExpired: leaseExpired}[d.Dark]
	if kind == "" {
		return
	}
	if (d.Unlocked || d.Power) && j.see.Now.Sub(d.FailingSince).Abs() < closingTime {
		j.unknown[kind] = true // it is being closed
		return
	}
	var facts []fact
	for _, r := range d.Refused[:min(len(d.Refused), maxListed)] {
		facts = append(facts, fact{"refused by", line(r.Server)})
		if j.see.clockSure() {
			facts = append(facts, fact{"since", stamp(r.Since)})
		}
	}
	state := line(d.State)
	switch {
	case d.Unlocked:
		state += ", STILL UNLOCKED"
	case d.Power:
		state += ", locked, with power"
	default:
		state += ", locked, without power"
	}
	j.find(kind, "", append(facts, fact{"disk", state})...)
}

func (j *judge) clock() {
	n := j.see.Network
	if n == nil {
		j.unknown[clockUnset], j.unknown[clockJump], j.unknown[undervoltage] = true, true, true
		return
	}
	if !n.ClockSet {
		j.find(clockUnset, "", fact{"the clock goes by", cmp.Or(n.ClockSource, "nothing: not even a last time is known")})
	}
	if n.ClockJump != "" {
		j.find(clockJump, "", fact{"what happened", line(n.ClockJump)})
	}
	if n.Undervoltage {
		j.find(undervoltage, "")
	}
}

func (j *judge) machine() {
	b := j.see.Boot
	if b == nil {
		j.unknown[stateLost], j.unknown[degraded], j.unknown[restarting] = true, true, true
		return
	}
	if b.StateLost {
		j.find(stateLost, "")
	}
	if len(b.Degraded) > 0 {
		var facts []fact
		for _, d := range b.Degraded[:min(len(b.Degraded), 10)] {
			facts = append(facts, fact{"failed", line(d)})
		}
		j.find(degraded, "", facts...)
	}
	for _, name := range slices.Sorted(maps.Keys(b.Restarts)) {
		count := b.Restarts[name]
		w, known := j.state.Restarts[name]
		switch {
		case !known && len(j.state.Restarts) >= maxHosts:
			continue
		case !known || w.From.Boot != j.see.BootID:
			// Counted from zero: those before the first look belong to this boot too.
			w = Window{From: j.see.moment()}
		case count == w.Count: // steady; the window begins with the next restart
		case count < w.Count || j.see.since(w.From) >= restartWindow:
			w = Window{From: j.see.moment(), Count: count}
		}
		j.state.Restarts[name] = w
		if n := count - w.Count; n >= restartLimit {
			j.find(restarting, name, fact{"restarts", fmt.Sprintf("%d within %s", n, restartWindow)})
		}
	}
}

// flip compares what is found with what is raised.
func (j *judge) flip() {
	now := j.see.moment()
	found := map[string]bool{}
	for _, f := range j.findings {
		e, ok := entryOf(f.kind)
		if !ok || found[f.key()] {
			continue
		}
		a, known := j.state.Alarms[f.key()]
		if !known {
			if len(j.state.Alarms) >= maxAlarms {
				continue
			}
			a = Alarm{Kind: f.kind, Subject: f.subject, Seen: now}
		}
		found[f.key()] = true
		a.Gone = Moment{}
		switch {
		case !a.Raised && j.see.since(a.Seen) >= e.delay(j.set):
			a.Raised, a.Since, a.Last = true, now, now
			a.MailID = j.mail(f.kind, j.subject(e, f.subject, e.title), j.body(e, f, a))
		// A reminder of a mail that has not even left helps nobody.
		case a.Raised && j.see.since(a.Last) >= j.set.ReminderInterval.Std() && !slices.Contains(j.see.Waiting, a.MailID):
			a.Last = now
			a.Reminders++
			a.MailID = j.mail(f.kind, j.subject(e, f.subject, fmt.Sprintf("%s (reminder %d)", e.title, a.Reminders)), j.body(e, f, a))
		}
		j.state.Alarms[f.key()] = a
	}
	for _, key := range slices.Sorted(maps.Keys(j.state.Alarms)) {
		a := j.state.Alarms[key]
		if found[key] || j.unknown[a.Kind] {
			continue
		}
		if a.Gone == (Moment{}) {
			a.Gone = now
		}
		e, ok := entryOf(a.Kind)
		if a.Raised && ok && j.see.since(a.Gone) < e.hold {
			j.state.Alarms[key] = a
			continue
		}
		delete(j.state.Alarms, key)
		if a.Raised && ok {
			j.mail(a.Kind, j.subject(e, a.Subject, e.clear), j.clearBody(e, a))
		}
	}
}

// mail decides on a mail and returns its id.
func (j *judge) mail(kind, subject, body string) string {
	if j.state.Dropped > 0 {
		body += fmt.Sprintf("\n%d earlier mails were dropped because the queue was full.\n", j.state.Dropped)
		j.state.Dropped = 0
	}
	if len(body) > maxBody {
		body = strings.ToValidUTF8(body[:maxBody], "") + "\n(The rest was cut: it is more than a mail should be.)\n"
	}
	m := Mail{ID: outbox.ID(j.state.Serial, kind, j.state.Nonce), Kind: kind, Subject: subject, Body: body, Date: j.see.Now}
	j.state.Serial++
	j.mails = append(j.mails, m)
	return m.ID
}

// proof sends the first mail and the monthly ones.
func (j *judge) proof() {
	const first, monthly = "first-boot", "monthly"
	switch {
	case !j.state.Welcomed:
		if !j.see.clockKnown() || len(j.see.Network.Addresses) == 0 {
			return
		}
		settled := j.see.Network.VPNUp && j.see.Disk != nil && (j.see.Disk.Mounted || j.see.Disk.ErrorKind != "")
		if !settled && j.see.since(j.state.Installed) < welcomeWait {
			return
		}
		j.state.Welcomed, j.state.LastProof = true, j.see.moment()
		j.mail(first, fmt.Sprintf("[WATCHDOG] %s is up", j.see.Host), j.proofBody("I am up for the first time, from here, and this is what I see.\nIf this mail reaches you, so will my alarms."))
	case j.see.clockSure() && j.see.since(j.state.LastProof) >= proofInterval:
		j.state.LastProof = j.see.moment()
		j.mail(monthly, fmt.Sprintf("[WATCHDOG] %s monthly report", j.see.Host), j.proofBody("I am still here, once a month, and this is what I see.\nA month without this mail is an alarm too, which only you can raise."))
	}
}

// Raised lists the alarms that are raised, for the status file.
func (s State) Raised() []status.Alarm {
	var out []status.Alarm
	for _, key := range slices.Sorted(maps.Keys(s.Alarms)) {
		if a := s.Alarms[key]; a.Raised {
			raised := status.Alarm{Kind: a.Kind, Subject: a.Subject, Since: a.Since.Wall}
			if slices.Contains(ofRepositories, a.Kind) {
				raised.Repository = a.Subject
			}
			out = append(out, raised)
		}
	}
	return out
}

// line makes one line of bounded length out of another part's words.
func line(s string) string { return letter.Line(s, 300) }
