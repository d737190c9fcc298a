// Package travel is the list before the drive: what must be in order before an
// appliance is carried to where nobody can look after it.
//
// It judges what the appliance says of itself, what site.toml says of it and of
// the bundle, and what was tried from here; it asks nobody by itself. What is not
// known is never in order.
package travel

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

// Facts are what the list is made from.
type Facts struct {
	Site      *site.Site
	Appliance *site.Appliance
	Status    *pushwire.Status // nil: it did not answer
	Silence   error            // why it did not
	// KeyServers holds, by name, what came of trying each of the site's: nil for one
	// that answered with its host key.
	KeyServers map[string]error
	// Here are the networks of this machine, which stands at home.
	Here []netip.Prefix
	Now  time.Time
}

// Item is one line of the list.
type Item struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	Says string `json:"says"`
	Do   string `json:"do,omitempty"` // "" when it is in order
}

// How old evidence may be.
const (
	handshakeAge = 5 * time.Minute // WireGuard makes one every two minutes
	clockError   = 5 * time.Minute
	openedAge    = 48 * time.Hour
	mailAge      = 35 * 24 * time.Hour // a mail goes out every month
	drillAge     = 366 * 24 * time.Hour
)

// List is the list, in the order in which things are best put in order.
func List(f Facts) []Item {
	l := &list{f: f}
	l.answers()
	l.vpn()
	l.foreign()
	l.clock()
	l.keyServers()
	l.disk()
	l.relay()
	l.mail()
	l.bundle()
	l.drill()
	l.alarms()
	return l.items
}

// Ready reports whether every item is in order.
func Ready(items []Item) bool {
	return len(items) > 0 && !slices.ContainsFunc(items, func(i Item) bool { return !i.OK })
}

type list struct {
	f     Facts
	items []Item
}

func (l *list) ok(name, format string, args ...any) {
	l.items = append(l.items, Item{Name: name, OK: true, Says: fmt.Sprintf(format, args...)})
}

func (l *list) bad(name, do, format string, args ...any) {
	l.items = append(l.items, Item{Name: name, Says: fmt.Sprintf(format, args...), Do: do})
}

// silent says that something is not known, if it is the appliance that would know.
func (l *list) silent(name string) bool {
	if l.f.Status != nil {
		return false
	}
	l.bad(name, "first the appliance must answer", "not known")
	return true
}

func (l *list) answers() {
	if l.f.Status == nil {
		l.bad("answers", "switch it on, look at its LED and at farkeep-error.txt on its card, and at wg show on the home server", "no answer: %v", l.f.Silence)
		return
	}
	l.ok("answers", "version %s, up since %s", l.f.Status.Version, l.f.Status.Started.UTC().Format(time.DateTime))
}

// ownTunnel: the appliance's own WireGuard carries its traffic, so it knows how it
// reaches home. In service mode the system's VPN does.
func (l *list) ownTunnel() bool {
	return l.f.Appliance.VPNKey != "" && l.f.Appliance.Board != "service"
}

func (l *list) vpn() {
	if l.silent("vpn") {
		return
	}
	if !l.ownTunnel() {
		l.ok("vpn", "the system's own carries its traffic")
		return
	}
	v := l.f.Status.VPN
	if v == nil || v.LastHandshake.IsZero() {
		l.bad("vpn", "look at wg show on the home server, and at the endpoints in site.toml", "it says nothing of a handshake with home")
		return
	}
	if age := l.f.Status.Time.Sub(v.LastHandshake); age > handshakeAge || age < -handshakeAge {
		l.bad("vpn", "wait for a minute and ask again", "the last handshake with home was at %s, by its clock", v.LastHandshake.UTC().Format(time.DateTime))
		return
	}
	l.ok("vpn", "handshake with home, by way of %s", v.Endpoint)
}

// foreign: the trial counts from another network only. At home an appliance may
// reach the key server by a way that does not exist where it will stand.
func (l *list) foreign() {
	const name, do = "foreign network", "connect it to another network than home's, for instance a phone's hotspot, and ask again"
	if l.silent(name) {
		return
	}
	v := l.f.Status.VPN
	if v == nil || len(v.Addresses) == 0 {
		l.bad(name, do, "it does not say in which network it is")
		return
	}
	if l.ownTunnel() {
		endpoint, err := netip.ParseAddrPort(v.Endpoint)
		if err != nil {
			l.bad(name, do, "it does not say how it reaches home")
			return
		}
		if a := endpoint.Addr().Unmap(); a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() {
			l.bad(name, do, "it reaches home at %s, which is an address inside of a house", a)
			return
		}
	}
	for _, text := range v.Addresses {
		own, err := netip.ParsePrefix(text)
		if err != nil || own.Addr().IsLinkLocalUnicast() || own.Addr().IsLoopback() || l.f.Site.VPN.Network.Contains(own.Addr()) {
			continue
		}
		for _, here := range l.f.Here {
			if !here.Addr().IsLinkLocalUnicast() && !here.Addr().IsLoopback() && here.Masked().Contains(own.Addr()) {
				l.bad(name, do, "its address %s is one of this machine's own network %s", own.Addr(), here.Masked())
				return
			}
		}
	}
	l.ok(name, "it is not in home's network")
}

func (l *list) clock() {
	if l.silent("clock") {
		return
	}
	s := l.f.Status
	off := s.Time.Sub(l.f.Now)
	switch {
	case !s.ClockSet:
		l.bad("clock", "it needs NTP (UDP port 123) to the outside; see clock in site.toml", "it is not set")
	case off > clockError, off < -clockError:
		l.bad("clock", "find out which of the two is wrong", "it differs from this machine's by %v", off.Abs().Round(time.Second))
	default:
		l.ok("clock", "set")
	}
}

func (l *list) keyServers() {
	if len(l.f.Site.KeyServers) == 0 {
		l.bad("key server", "farkeep-image site init", "the site has none")
	}
	for _, k := range l.f.Site.KeyServers {
		name := "key server " + k.Name
		if err, tried := l.f.KeyServers[k.Name]; !tried || err != nil {
			l.bad(name, "systemctl status farkeep-keyserver there, then farkeep-keyserver check", "no answer at %s: %v", k.Address, err)
			continue
		}
		l.ok(name, "answers at %s with its host key", k.Address)
	}
}

func (l *list) disk() {
	if l.silent("disk") {
		return
	}
	s := l.f.Status
	newest := time.Time{}
	for _, r := range s.Repositories {
		if r.ConfirmedAt.After(newest) {
			newest = r.ConfirmedAt
		}
	}
	switch age := s.Time.Sub(newest); {
	case s.Disk.Error != "":
		l.bad("disk", "docs/disk.md says what each error wants", "%s", s.Disk.Error)
	case len(s.Disk.RefusedBy) > 0:
		l.bad("disk", "farkeep-keyserver list says why; approve or allow it there", "refused by %v: it stays dark", s.Disk.RefusedBy)
	case newest.IsZero() || age > openedAge:
		l.bad("disk", "farkeep-pusher push, from where it will stand or a network like it", "nothing was pushed to it in the last %d hours", int(openedAge.Hours()))
	default:
		l.ok("disk", "opened, and a push confirmed at %s", newest.UTC().Format(time.DateTime))
	}
}

func (l *list) relay() {
	if l.silent("relay") {
		return
	}
	d := l.f.Status.Disk
	switch {
	case l.f.Appliance.Relay.Driver != "gpio":
		l.ok("relay", "none: the disk is locked outside its window, and never without power")
	case d.State == "off" && !d.Power && d.Error == "":
		l.ok("relay", "switched off, and the disk is gone since %s", d.Since.UTC().Format(time.DateTime))
	default:
		l.bad("relay", "ssh to the appliance: sleep. Listen to the disk, and ask again", "the disk has power now (%s): whether the relay cuts it shows when it does", d.State)
	}
}

func (l *list) mail() {
	if l.silent("mail") {
		return
	}
	s := l.f.Status
	const do = "the alarms in docs/alarms.md, chapter mail; an appliance without a way to mail watches for nobody"
	switch {
	case s.MailError != "":
		l.bad("mail", do, "%d wait: %s", s.MailQueued, s.MailError)
	case s.MailQueued > 0:
		l.bad("mail", "wait for a minute and ask again", "%d wait", s.MailQueued)
	case s.MailSent.IsZero() || s.Time.Sub(s.MailSent) > mailAge:
		l.bad("mail", do, "none was sent in the last %d days", int(mailAge.Hours()/24))
	default:
		l.ok("mail", "the last one was taken by the provider at %s; see that you have it", s.MailSent.UTC().Format(time.DateTime))
	}
}

func (l *list) bundle() {
	header := ""
	if l.f.Status != nil {
		header = l.f.Status.Disk.HeaderDigest
	}
	b := l.f.Site.Bundle
	if why := b.Stale(l.f.Appliance.LUKS, header); why != "" {
		l.bad("bundle", "farkeep-keyserver bundle create, on the laptop; then copy site.toml here", "%s", why)
		return
	}
	l.ok("bundle", "of %s, with this disk's key and header", b.Created.UTC().Format(time.DateOnly))
}

func (l *list) drill() {
	const do = "farkeep-keyserver drill, on the laptop; then copy site.toml here"
	at := l.f.Site.Bundle.Drilled
	switch age := l.f.Now.Sub(at); {
	case at.IsZero():
		l.bad("drill", do, "never: nobody knows whether the bundle opens the disk")
	case age > drillAge:
		l.bad("drill", do, "the last one was on %s", at.UTC().Format(time.DateOnly))
	default:
		l.ok("drill", "passed on %s", at.UTC().Format(time.DateOnly))
	}
}

func (l *list) alarms() {
	if l.silent("alarms") {
		return
	}
	if all := l.f.Status.Alarms; len(all) > 0 {
		l.bad("alarms", "docs/alarms.md", "%d, the first: %s", len(all), all[0].Subject)
		return
	}
	l.ok("alarms", "none")
}
