package deadman

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/settings"
)

const (
	// A disk that is full within fullSoon is an alarm, until it is not within
	// fullLater.
	fullSoon  = 30 * 24 * time.Hour
	fullLater = 35 * 24 * time.Hour
	// maxListed bounds what one mail lists of one kind, in lines.
	maxListed = 10
	// maxSubjects bounds the repositories and hosts that one kind can be about.
	maxSubjects = 64
)

// delay is how long something must be so before it is an alarm.
func (e entry) delay(set settings.DeadMan) time.Duration {
	if e.after {
		return set.UnreachableAfter.Std()
	}
	return e.wait
}

// history judges what the keeper says of generations and their disk. It remembers
// while the disk is dark.
func (j *judge) history() {
	k := j.see.Keeper
	if k == nil {
		for _, kind := range []string{suspect, untrue, rotten, scrubOverdue, diskFilling, retiring, frozen, clockRecord} {
			j.unknown[kind] = true
		}
		return
	}
	j.suspects(k)
	j.untrue(k)
	j.rot(k)
	j.scrub(k)
	j.room(k)
	for _, r := range k.Retiring[:min(len(k.Retiring), maxSubjects)] {
		j.findings = append(j.findings, finding{
			kind: retiring, subject: r.Repository,
			facts:    []fact{{"asked for", stamp(r.Asked) + " with the key " + line(r.By)}, {"it leaves on", stamp(r.Due)}},
			commands: []string{j.ssh("keep", r.Repository)},
		})
	}
	if !k.FrozenSince.IsZero() {
		facts := []fact{{"frozen since", stamp(k.FrozenSince)}}
		for _, why := range k.Frozen[:min(len(k.Frozen), status.MaxFrozen)] {
			facts = append(facts, fact{"because", line(why)})
		}
		j.find(frozen, "", facts...)
	}
	if k.ClockDoubt != "" {
		j.find(clockRecord, "", fact{"what happened", line(k.ClockDoubt)}, fact{"the clock shows", stamp(j.see.Now)})
	}
}

// ssh is a command line for the operator. The words after the verb are names that
// the keeper checked; they are checked again, because they will be pasted into a
// shell.
func (j *judge) ssh(verb string, words ...string) string {
	for i, w := range words {
		if !plainWord(w) {
			words[i] = "NAME"
		}
	}
	return "ssh " + j.see.Host + " " + verb + " " + strings.Join(words, " ")
}

func plainWord(s string) bool {
	return s != "" && len(s) <= 160 && s[0] != '-' && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r))
	})
}

func (j *judge) suspects(k *status.Keeper) {
	found := 0
	// The longest histories first: whoever may push under any name must not crowd
	// out what happened to others.
	repositories := slices.SortedStableFunc(slices.Values(k.Repositories), func(a, b status.RepositoryStatus) int { return b.Generations - a.Generations })
	for _, r := range repositories {
		if !r.Suspect || found == maxSubjects {
			continue
		}
		found++
		f := finding{kind: suspect, subject: r.Name}
		f.commands = append(f.commands, j.ssh("generations --text", r.Name))
		for _, s := range r.Suspects[:min(len(r.Suspects), status.MaxSuspects)] {
			f.facts = append(f.facts, fact{"generation", line(s.Generation) + ", committed " + stamp(s.At)})
			for _, reason := range s.Reasons[:min(len(s.Reasons), status.MaxReasons)] {
				f.facts = append(f.facts, fact{"because", line(reason)})
			}
			f.commands = append(f.commands, j.ssh("accept", r.Name, s.Generation), j.ssh("reject", r.Name, s.Generation))
		}
		j.findings = append(j.findings, f)
	}
}

func (j *judge) untrue(k *status.Keeper) {
	said := map[string]bool{}
	for _, u := range k.Untrue[:min(len(k.Untrue), status.MaxUntrue)] { // newest first
		if said[u.Host] {
			continue
		}
		said[u.Host] = true
		// A true one since then is the all-clear.
		if slices.ContainsFunc(k.Heartbeats, func(h status.Heartbeat) bool { return h.Host == u.Host && h.ReceivedAt.After(u.At) }) {
			continue
		}
		j.find(untrue, u.Host, fact{"received", stamp(u.At)}, fact{"it claimed", line(u.What)})
	}
}

func (j *judge) rot(k *status.Keeper) {
	files := map[string][]status.Rot{}
	var order []string
	for _, r := range k.Rot[:min(len(k.Rot), status.MaxRot)] {
		if !r.Healed.IsZero() {
			continue
		}
		if files[r.Repository] == nil && len(order) < maxSubjects {
			order = append(order, r.Repository)
		}
		files[r.Repository] = append(files[r.Repository], r)
	}
	for _, repository := range order {
		all := files[repository]
		var facts []fact
		for _, r := range all[:min(len(all), maxListed)] {
			facts = append(facts, fact{"file", line(r.Path)}, fact{"  what", line(r.What)}, fact{"  found", stamp(r.Found)}, fact{"  generations", few(r.Generations)})
		}
		if over := len(all) - maxListed; over > 0 {
			facts = append(facts, fact{"and", fmt.Sprintf("%d more of this repository", over)})
		}
		if k.RotCount > len(all) {
			facts = append(facts, fact{"on the disk", fmt.Sprintf("%d rotten files in all", k.RotCount)})
		}
		j.find(rotten, repository, facts...)
	}
}

// few writes a bounded list of names.
func few(names []string) string {
	text := strings.Join(names[:min(len(names), 4)], ", ")
	if over := len(names) - 4; over > 0 {
		text += fmt.Sprintf(" and %d more", over)
	}
	return cmp.Or(line(text), "none")
}

func (j *judge) scrub(k *status.Keeper) {
	s := k.Scrub
	if s == nil || s.Every <= 0 {
		return
	}
	if !j.see.clockSure() {
		j.unknown[scrubOverdue] = true
		return
	}
	limit := s.Every + s.Every/2
	facts := []fact{
		{"last read through", stamp(s.LastFull)}, {"wanted every", span(s.Every)},
		{"this round", fmt.Sprintf("%.0f %% since %s", 100*s.Done, stamp(s.Started))},
	}
	if s.Paused != "" {
		facts = append(facts, fact{"held up by", line(s.Paused)})
	}
	late := j.see.Now.Sub(s.LastFull) > limit
	if s.LastFull.IsZero() {
		late = j.see.since(j.state.Installed) > limit && !s.Started.IsZero() && j.see.Now.Sub(s.Started) > limit
	}
	if late {
		j.find(scrubOverdue, "", facts...)
	}
}

func (j *judge) room(k *status.Keeper) {
	r := k.Room
	if r == nil || !j.see.clockSure() {
		j.unknown[diskFilling] = true
		return
	}
	limit := fullSoon
	if j.raised(diskFilling, "") {
		limit = fullLater
	}
	soon := !r.FullOn.IsZero() && r.FullOn.Sub(j.see.Now) < limit
	if !soon && (r.WorstDay == 0 || r.Free >= r.WorstDay) {
		return
	}
	facts := []fact{
		{"free for pushes", size(r.Free)}, {"a day adds", size(max(0, r.PerDay)) + " on average"},
		{"the worst day added", size(r.WorstDay)},
	}
	if !r.FullOn.IsZero() {
		facts = append(facts, fact{"full on", r.FullOn.UTC().Format("2006-01-02") + ", one worst day kept in reserve"})
	}
	j.find(diskFilling, "", facts...)
}

// events mails what was decided, once each.
func (j *judge) events() {
	if j.see.Keeper == nil {
		return
	}
	var told []string
	listed := j.see.Keeper.Events
	for _, e := range listed[max(0, len(listed)-status.MaxEvents):] {
		if len(e.ID) > 64 {
			continue
		}
		told = append(told, e.ID)
		n, ok := noticeOf(e.Kind)
		if !ok || slices.Contains(j.state.Told, e.ID) {
			continue
		}
		about := j.see.Host
		if e.Repository != "" {
			about += " repository " + line(e.Repository)
		}
		var b strings.Builder
		fmt.Fprintf(&b, "%s %s.\n\n%s\n\n", about, n.title, n.meaning)
		facts := []fact{{"when", stamp(e.At)}}
		for _, f := range []fact{{"key", e.By}, {"repository", e.Repository}, {"generation", e.Generation}, {"in words", e.Text}} {
			if f.value != "" {
				facts = append(facts, fact{f.label, line(f.value)})
			}
		}
		table(&b, facts)
		if e.By != "" {
			b.WriteString("If the key was not in your hands, it is in somebody else's: docs/history.md.\n\n")
		}
		j.view(&b)
		j.mail(e.Kind, fmt.Sprintf("[WATCHDOG] %s %s", about, n.title), b.String())
	}
	j.state.Told = told
}
