package alert

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"farkeep/shared/letter"
)

// kind is how a kind of event is told. NAME and DISK in its texts stand for the
// event's appliance and disk.
type kind struct {
	subject string
	seen    string   // what happened, one or two sentences
	means   []string // what may be behind it, the harmless first
	yours   []string // commands, if it was you
	other   []string // what else to do, or to look at
	nothing string   // what happens if nobody does anything
	revoke  bool     // it may be a thief: say how to revoke
}

var kinds = map[string]kind{
	Up: {
		subject: "the key server can mail",
		seen:    "This is the first mail of this key server. It says that mails arrive; nothing is wrong.",
		means:   []string{"If you ever get no mail for what you do know of, try sudo farkeep-keyserver check --mail."},
	},
	Held: {
		subject: "NAME asks for its key, and waits for you",
		seen:    "NAME asked for the key of its disk. It was not given: the request waits for a person.",
		means: []string{
			"The appliance was off, or its house without power, for longer than its policy allows.",
			"It was carried to another place, or its provider has changed.",
			"Somebody took it, or has its SD card, and has plugged it in.",
		},
		yours:   []string{"sudo farkeep-keyserver waiting", "sudo farkeep-keyserver approve NAME --reason \"why it is all right\""},
		other:   []string{"Call the people who live there before you approve: is the box still where it stood?"},
		revoke:  true,
		nothing: "It gets no key and its disk stays dark: nothing can be read, and no backup arrives there until you decide.",
	},
	GrantedUnexpected: {
		subject: "NAME was given what it asked for, but something was unusual",
		seen:    "The policy of NAME (key_policy in site.toml) grants this without asking you. You should know of it all the same.",
		means: []string{
			"The appliance was carried to another place, or its provider has changed.",
			"Somebody took it, or has its SD card, and it works for him.",
		},
		other:   []string{"key_policy.approval = \"after-absence\" would have waited for you."},
		revoke:  true,
		nothing: "It goes on as it is, with its disk open.",
	},
	Stranger: {
		subject: "somebody without a right showed an SSH key",
		seen:    "A machine in the VPN connected to the key server with an SSH key that has no right here. It got no session.",
		means: []string{
			"You tried something yourself, or site.toml here is older than a new appliance.",
			"The key was declared void, and whoever has the stolen appliance or its card tries it.",
			"A machine in the VPN looks around.",
		},
		other: []string{"Whose address is that? wg show, or tailscale status, says. Take the peer out if you do not know it."},
	},
	RefusedUnexpected: {
		subject: "NAME was refused something unexpected",
		seen:    "A request came that this key server's policy does not foresee. It was not granted.",
		means: []string{
			"site.toml here is older than the appliance: a new disk, another address.",
			"Somebody tries what this key gets.",
		},
		other:   []string{"Compare the disk and the address above with site.toml."},
		revoke:  true,
		nothing: "It gets nothing, this time and the next.",
	},
	TokenMismatch: {
		subject: "NAME showed an old token: its SD card may have been copied",
		seen: "With every key the appliance gets a token that the next request must show. This request showed another one, or none.\n" +
			"So two cards exist that both say they are NAME, or its card was replaced or written anew.",
		means: []string{
			"You wrote its SD card again, or put in another one.",
			"Somebody copied the card. Either the copy asks now, or the copy asked before and this is the real one.",
		},
		yours:   []string{"sudo farkeep-keyserver approve NAME --reason \"I wrote the card anew\""},
		other:   []string{"If you did not touch the card, do not approve, although the box may be in its place: revoke, and write a new card with new keys (farkeep-image personalise --replace)."},
		revoke:  true,
		nothing: "With the default policy it gets no key and its disk stays dark until you decide; \"decision\" above says what was done this time.",
	},
	PlaceUnknownLasting: {
		subject: "where appliances are is not known",
		seen:    "The key server cannot learn from the VPN where its peers are. Keys that depend on the place are not given until it can.",
		means:   []string{"The unit farkeep-endpoints does not run, or WireGuard is down."},
		other:   []string{"systemctl status farkeep-endpoints wg-quick@farkeep"},
		nothing: "Appliances that restart get no key, and no backup arrives there until the place is known again.",
	},
	HeaderChanged: {
		subject: "the header of NAME's disk is not the one in the backup",
		seen:    "The appliance reports a LUKS header that differs from the one that was backed up. The disk works; the backup of its header may not fit it.",
		means: []string{
			"You changed a key slot and did not make the header backup and the bundle anew.",
			"Somebody who had the disk, or the running appliance, changed its key slots.",
			"The disk is another one.",
		},
		other:  []string{"If you did: farkeep-image disk rekey makes both anew. If you did not: keep the old header backup, it still opens what it opened."},
		revoke: true,
	},
	HeaderDamaged: {
		subject: "one copy of the LUKS header of NAME's disk is damaged",
		seen:    "A LUKS2 disk has two copies of its header. One no longer reads, the other does: the disk opens today.",
		means:   []string{"The disk is failing, or something wrote over its beginning."},
		other:   []string{"See that the bundle is at hand and fits (farkeep-keyserver bundle verify, on your laptop), then mend the header as docs/disk.md says.", "Think about a new disk."},
		nothing: "It works, until the other copy goes too. Then only the header backup in the bundle opens the disk.",
	},
	Slots: {
		subject: "NAME's disk has an unexpected number of key slots",
		seen:    "A disk of Farkeep has two key slots: the key server's and the bundle's. This one has another number.",
		means: []string{
			"The disk had slots of its own before it was adopted, and they are still there.",
			"A change of keys was begun and not finished.",
			"Somebody who had the disk open added a key of his own. It opens the disk without this key server, revoked or not.",
		},
		other:  []string{"cryptsetup luksDump shows the slots; docs/disk.md says how to remove one."},
		revoke: true,
	},
	RevokedTold: {
		subject: "NAME was told that it is revoked",
		seen:    "The revoked appliance asked and was refused. If its disk was open, it closes it now and reports that it is dark.",
		means:   []string{"The revocation has reached it."},
		yours:   []string{"sudo farkeep-keyserver allow NAME --reason \"why it is trusted again\""},
	},
	Dark: {
		subject: "NAME says that its disk is dark",
		seen:    "The appliance closed its disk and cut its power, because it was refused or could not renew its lease.",
		means: []string{
			"It was revoked: it has done what it should.",
			"No key server could be reached for the whole lease.",
			"It is the appliance's own word. A machine in a thief's hands can say so too.",
		},
		other:   []string{"sudo farkeep-keyserver list"},
		revoke:  true,
		nothing: "The disk stays dark, and no backup arrives there, until a key server grants the key again.",
	},
	RevocationNotDelivered: {
		subject: "another key server does not know that NAME is revoked",
		seen:    "NAME is revoked here. Another key server of this site could not be told, and may still give the key away.",
		means:   []string{"That key server is off, or not to be reached from here. This one goes on trying."},
		other:   []string{"On the other key server: sudo farkeep-keyserver revoke NAME --reason \"as on the first\""},
		nothing: "This key server goes on trying. Until the other knows, a thief who reaches it may get the key.",
	},
	BundleStale: {
		subject: "the recovery bundle does not fit NAME's disk",
		seen:    "The disk's header is not the one that the recovery bundle was made for. If home burned today, the bundle might not open this disk.",
		means:   []string{"Keys or the disk were changed after the bundle was made."},
		other:   []string{"On your laptop: farkeep-keyserver bundle create, then bundle verify. Then destroy the old bundle."},
		nothing: "Everything works, and a recovery might not.",
	},
	StateUnreadable: {
		subject: "the key server could not answer NAME",
		seen:    "Something went wrong inside the key server, and when in doubt it gives no key. The reason is below.",
		means:   []string{"The disk of the key server is full or failing.", "A file that it needs is missing or unreadable: a key, what it remembers of NAME, the audit log.", "Somebody changed such a file."},
		other:   []string{"sudo farkeep-keyserver check", "sudo farkeep-keyserver audit --verify"},
		nothing: "Nobody gets a key of that appliance until it is mended.",
	},
	Flapping: {
		subject: "NAME is in two places at once",
		seen:    "The VPN sees NAME now in one network, now in another, back and forth. So two machines use its WireGuard key.",
		means: []string{
			"A line that changes between two providers, for instance with a mobile fallback. List both as known: approve once at each.",
			"Somebody copied the SD card and runs the copy.",
		},
		revoke: true,
	},
}

// mail is one before it has an id.
type mail struct{ subject, body string }

const subjectPrefix = "[KEY SERVER] "

func compose(ev Event, keyServer string) mail {
	k := kinds[ev.Kind]
	name := ev.Appliance
	if name == "" {
		name = "somebody"
	}
	say := strings.NewReplacer("NAME", name, "DISK", ev.Disk).Replace
	var b strings.Builder
	b.WriteString(say(k.seen) + "\n\n")
	for _, row := range []struct{ label, value string }{
		{"key server", keyServer}, {"appliance", ev.Appliance}, {"disk", ev.Disk}, {"asked from", ev.From}, {"place", ev.Place},
		{"when", ev.At.Format("2006-01-02 15:04:05 UTC")}, {"decision", ev.Decision}, {"because", ev.Reason},
	} {
		if row.value != "" {
			fmt.Fprintf(&b, "  %-11s %s\n", row.label, row.value)
		}
	}
	list := func(title string, lines []string) {
		if len(lines) == 0 {
			return
		}
		b.WriteString("\n" + title + "\n")
		for _, l := range lines {
			b.WriteString("  " + say(l) + "\n")
		}
	}
	bullets := make([]string, len(k.means))
	for i, m := range k.means {
		bullets[i] = "- " + m
	}
	list("What it can mean", bullets)
	yours := ev.Next
	if len(yours) == 0 {
		yours = k.yours
	}
	list("If it is all right, type on the key server", yours)
	list("To do", k.other)
	if k.nothing != "" {
		list("If you do nothing", []string{k.nothing})
	}
	if k.revoke && ev.Appliance != "" {
		list("If you do not know, or it was stolen, type on the key server", []string{"sudo farkeep-keyserver revoke NAME --reason \"stolen?\""})
		b.WriteString("\n\"allow\" takes a revocation back. When in doubt, revoke first and ask then.\n")
	}
	b.WriteString(footer)
	return mail{subjectPrefix + say(k.subject), b.String()}
}

const footer = "\nEvery request and decision: sudo farkeep-keyserver audit.\n" +
	"This mail has no link, and no answer to it opens anything: that is done at the key server alone.\n"

// maxSummary bounds the lines of a summary, so that it fits into a mail.
const maxSummary = 100

func composeSummary(lines []untold, keyServer string) mail {
	var b strings.Builder
	total, appliances := 0, map[string]bool{}
	byKind := map[string]int{}
	for _, u := range lines {
		total += u.Count
		byKind[u.Kind] += u.Count
		if u.Appliance != "" {
			appliances[u.Appliance] = true
		}
	}
	fmt.Fprintf(&b, "More happened than gets a mail of its own. %s since the last mails, on the key server %s:\n", plural(total, "event"), keyServer)
	for i, u := range lines {
		if i == maxSummary {
			fmt.Fprintf(&b, "\nand %s more; by kind, in all:\n", plural(len(lines)-i, "line"))
			for _, name := range slices.Sorted(maps.Keys(byKind)) {
				fmt.Fprintf(&b, "  %6d  %s\n", byKind[name], name)
			}
			break
		}
		name := u.Appliance
		if name == "" {
			name = "(no appliance)"
		}
		fmt.Fprintf(&b, "\n%s: %s, %d times from %s to %s\n", name, u.Kind, u.Count, stamp(u.Since), stamp(u.At))
		var last []string
		for _, s := range []string{u.Decision, u.Reason, u.From, u.Place} {
			if s != "" {
				last = append(last, s)
			}
		}
		if len(last) > 0 {
			fmt.Fprintf(&b, "  the last: %s\n", letter.Line(ascii(strings.Join(last, ", ")), 160))
		}
	}
	b.WriteString("\nWhat waits for you: sudo farkeep-keyserver waiting\nTo stop an appliance that asks and asks: sudo farkeep-keyserver revoke NAME --reason \"...\"\n")
	b.WriteString(footer)
	return mail{fmt.Sprintf("%s%s about %s", subjectPrefix, plural(total, "more event"), plural(len(appliances), "appliance")), b.String()}
}

// ascii bounds what a line takes in the mail: encoded, other characters take 12 bytes.
func ascii(s string) string {
	return strings.Map(func(r rune) rune {
		if r > '~' {
			return '?'
		}
		return r
	}, s)
}

func stamp(t time.Time) string { return t.UTC().Format("01-02 15:04") }

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
