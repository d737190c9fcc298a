package deadman

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// subject makes a mail's subject: the watchdog's mark, what it is about, what
// is the matter. A heartbeat is about the host that fell silent, everything else
// about the appliance.
func (j *judge) subject(e entry, about, what string) string {
	switch {
	case e.kind == heartbeatStale:
		return fmt.Sprintf("[WATCHDOG] %s %s", cmp.Or(line(about), "home"), what)
	case slices.Contains(ofRepositories, e.kind):
		return fmt.Sprintf("[WATCHDOG] %s repository %s %s", j.see.Host, line(about), what)
	case about != "":
		return fmt.Sprintf("[WATCHDOG] %s %s %s", j.see.Host, line(about), what)
	default:
		return fmt.Sprintf("[WATCHDOG] %s %s", j.see.Host, what)
	}
}

func (j *judge) body(e entry, f finding, a Alarm) string {
	var b strings.Builder
	switch {
	case e.kind == heartbeatStale:
		fmt.Fprintf(&b, "The heartbeat of %s is STALE: %s has not heard for too long that its backups arrived.\n\n", cmp.Or(line(f.subject), "home"), j.see.Host)
	case slices.Contains(ofRepositories, e.kind):
		fmt.Fprintf(&b, "%s: repository %s %s.\n\n", j.see.Host, line(f.subject), e.title)
	case f.subject != "":
		fmt.Fprintf(&b, "%s: %s %s.\n\n", j.see.Host, line(f.subject), e.title)
	default:
		fmt.Fprintf(&b, "%s: %s.\n\n", j.see.Host, e.title)
	}
	facts := f.facts
	if a.Reminders > 0 {
		facts = append(slices.Clone(facts), fact{"this alarm", fmt.Sprintf("raised %s, reminder %d", j.see.ago(a.Since), a.Reminders)})
	}
	table(&b, facts)
	if len(f.commands) > 0 {
		list(&b, "Commands, for a copy of the admin key", f.commands)
	}
	list(&b, "What it could mean", e.meaning)
	list(&b, "What to do", e.todo)
	j.view(&b)
	fmt.Fprintf(&b, "A reminder comes every %s until this is over, and one mail when it is.\nThe alarm is called %s; docs/alarms.md lists them all.\n", j.set.ReminderInterval, e.kind)
	return b.String()
}

func (j *judge) clearBody(e entry, a Alarm) string {
	var b strings.Builder
	about := cmp.Or(line(a.Subject), j.see.Host)
	if e.kind == heartbeatStale && a.Subject == "" {
		about = "home"
	}
	fmt.Fprintf(&b, "All clear: %s %s.\n\n", about, e.clear)
	facts := []fact{{"raised", j.see.ago(a.Since)}, {"reminders sent", fmt.Sprint(a.Reminders)}}
	if h, ok := j.state.Hosts[a.Subject]; ok && e.kind == heartbeatStale {
		facts = append(facts, fact{"last heartbeat", stamp(h.ReceivedAt)})
	}
	if e.kind == rotten && j.see.Keeper != nil {
		for _, r := range j.see.Keeper.Rot[:min(len(j.see.Keeper.Rot), maxListed)] {
			if r.Repository == a.Subject && !r.Healed.IsZero() {
				facts = append(facts, fact{"healed", fmt.Sprintf("%s, in %s", line(r.Path), few(r.Generations))})
			}
		}
	}
	table(&b, facts)
	j.view(&b)
	return b.String()
}

func (j *judge) proofBody(opening string) string {
	var b strings.Builder
	b.WriteString(opening + "\n\n")
	j.view(&b)
	if raised := j.state.Raised(); len(raised) > 0 {
		var names []string
		for _, a := range raised {
			names = append(names, strings.TrimSpace(a.Kind+" "+line(a.Subject)))
		}
		list(&b, "Alarms that are raised", names)
	} else {
		b.WriteString("No alarm is raised.\n")
	}
	return b.String()
}

// view is what the appliance sees of itself: the part of every mail that saves
// a question.
func (j *judge) view(b *strings.Builder) {
	b.WriteString("What I see\n")
	var facts []fact
	add := func(label, format string, args ...any) {
		facts = append(facts, fact{label, fmt.Sprintf(format, args...)})
	}
	if x := j.see.Boot; x != nil {
		add("board", "%s", cmp.Or(line(x.Board), "unknown"))
		add("software", "%s", cmp.Or(line(x.Version), "unknown"))
	}
	add("up", "%s", span(j.see.Uptime))
	if n := j.see.Network; n != nil {
		if n.ClockSet {
			add("clock", "%s (%s)", stamp(j.see.Now), line(n.ClockSource))
		} else {
			add("clock", "not set; I take it to be %s", stamp(j.see.Now))
		}
		if n.ClockJump != "" {
			add("clock jump", "%s", line(n.ClockJump))
		}
		add("addresses", "%s", cmp.Or(line(strings.Join(n.Addresses, ", ")), "none"))
		add("VPN", "%s", map[bool]string{true: "up", false: "down"}[n.VPNUp])
		for _, p := range n.Peers {
			if !p.LastHandshake.IsZero() {
				add("VPN peer "+line(p.Name), "last handshake %s", stamp(p.LastHandshake))
			}
		}
	} else {
		add("network", "unknown")
	}
	if d := j.see.Disk; d != nil {
		add("disk", "%s", cmp.Or(line(d.State), "unknown"))
		if d.Error != "" {
			add("disk error", "%s", line(d.Error))
		}
		if !d.LeaseUntil.IsZero() {
			add("disk lease", "until %s, renewed by %s", stamp(d.LeaseUntil), cmp.Or(line(d.LeaseServer), "nobody yet"))
		}
		if d.TotalBytes > 0 {
			add("disk room", "%s free of %s", size(d.FreeBytes), size(d.TotalBytes))
		}
	} else {
		add("disk", "unknown")
	}
	for _, name := range slices.Sorted(maps.Keys(j.state.Hosts)) {
		add("heartbeat", "%s, %s", line(name), j.see.ago(j.state.Hosts[name].Arrived))
	}
	if k := j.see.Keeper; k != nil {
		for _, r := range k.Repositories[:min(len(k.Repositories), 32)] {
			add("repository", "%s: %d generations, changed %s", line(r.Name), r.Generations, stamp(r.ChangedAt))
		}
	}
	if m := j.see.Mail; m != nil && m.LastError != "" {
		add("mail", "the last trouble was: %s", line(m.LastError))
	}
	table(b, facts)
}

func table(b *strings.Builder, facts []fact) {
	if len(facts) == 0 {
		return
	}
	width := 0
	for _, f := range facts {
		width = max(width, len([]rune(f.label)))
	}
	for _, f := range facts {
		fmt.Fprintf(b, "  %-*s  %s\n", width, f.label, f.value)
	}
	b.WriteString("\n")
}

func list(b *strings.Builder, title string, items []string) {
	b.WriteString(title + "\n")
	for _, i := range items {
		b.WriteString("  - " + i + "\n")
	}
	b.WriteString("\n")
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04 UTC")
}

func span(d time.Duration) string {
	switch {
	case d >= 72*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%d hours", d/time.Hour)
	case d >= 2*time.Minute:
		return fmt.Sprintf("%d minutes", d/time.Minute)
	default:
		return fmt.Sprintf("%d seconds", d/time.Second)
	}
}

// size writes bytes the way disks are sold.
func size(n int64) string {
	for _, u := range []struct {
		unit string
		size int64
	}{{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}} {
		if n >= u.size {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.unit)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
