package receiver

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/pushwire"
)

// collect puts together what the parts say, as far as k may see it. A part that
// says nothing leaves its fields at zero, which never reads as "good".
func (r *receiver) collect(k Key) pushwire.Status {
	now := pushwire.Status{Appliance: r.brief.Appliance, Time: r.env.Now().UTC(), Disk: pushwire.DiskState{State: "unknown"}}
	// Not what the clock showed at the start: that was before it was set.
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err == nil {
		now.Started = now.Time.Add(-time.Duration(up.Nano())).Truncate(time.Second)
	}
	if boot := read[status.Boot](r, r.env.Paths.Boot()); boot != nil {
		now.Version, now.Board, now.Slot = boot.Version, boot.Board, boot.Slot
		now.Degraded, now.Restarts = boot.Degraded, boot.Restarts
	}
	if network := read[status.Network](r, r.env.Paths.Status(part.Network)); network != nil {
		now.ClockSet = network.ClockSet
		if network.ClockJump != "" {
			now.Degraded = append(now.Degraded, "clock: "+network.ClockJump)
		}
		if len(network.Addresses)+len(network.Peers) > 0 {
			now.VPN = &pushwire.VPNState{Addresses: network.Addresses}
		}
		if len(network.Peers) > 0 {
			now.VPN.Endpoint, now.VPN.LastHandshake = network.Peers[0].Endpoint, network.Peers[0].LastHandshake
		}
	}
	if disk := read[status.Disk](r, r.env.Paths.Status(part.Disk)); disk != nil {
		now.Disk = diskState(disk)
	}
	if keeper := read[status.Keeper](r, r.env.Paths.Status(part.Keeper)); keeper != nil {
		for _, repo := range keeper.Repositories {
			if k.mayUse(repo.Name) {
				now.Repositories = append(now.Repositories, pushwire.RepositoryStatus{
					Name: repo.Name, Newest: repo.Newest, NewestAt: repo.NewestAt, ConfirmedAt: repo.ConfirmedAt,
					Generations: repo.Generations, Suspect: repo.Suspect, Suspects: suspectsFor(repo.Suspects), Bytes: repo.Bytes,
				})
			}
		}
		historyFor(k, &now, keeper)
		for _, beat := range keeper.Heartbeats {
			now.Heartbeats = append(now.Heartbeats, pushwire.HeartbeatStatus{Host: beat.Host, ReceivedAt: beat.ReceivedAt})
		}
	}
	if deadman := read[status.Deadman](r, r.env.Paths.Status(part.Deadman)); deadman != nil {
		for _, a := range deadman.Alarms {
			// A push key must not learn the names of others' repositories.
			if a.Repository != "" && !k.mayUse(a.Repository) {
				continue
			}
			now.Alarms = append(now.Alarms, pushwire.Alarm{Kind: a.Kind, Subject: a.Subject, Since: a.Since})
		}
	}
	if mail := read[status.Mail](r, r.env.Paths.Status(part.Mail)); mail != nil {
		now.MailQueued, now.MailError, now.MailSent = mail.Queued, mail.LastError, mail.LastSent
	}
	return now
}

func read[T any](r *receiver, path string) *T {
	v, err := status.Read[T](path)
	if err != nil {
		r.env.Log.Warn("a part's status cannot be read", "err", err)
		return nil
	}
	return v
}

func diskState(d *status.Disk) pushwire.DiskState {
	s := pushwire.DiskState{
		State: d.State, Power: d.Power, Unlocked: d.Unlocked, Mounted: d.Mounted, Since: d.Since,
		ExposureMinutes: d.ExposureMinutes, Error: d.Error, TotalBytes: d.TotalBytes, FreeBytes: d.FreeBytes,
		HeaderDigest: d.HeaderDigest, LeaseUntil: d.LeaseUntil, LeaseServer: d.LeaseServer, Dark: d.Dark,
	}
	for _, r := range d.Refused {
		s.RefusedBy = append(s.RefusedBy, r.Server)
	}
	return s
}

// describe writes a status for a person.
func describe(s pushwire.Status) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("appliance", "%s, %s, version %s, up since %s", s.Appliance, orUnknown(s.Board), orUnknown(s.Version), when(s.Started))
	clock := "not set: no heartbeat is judged until it is"
	if s.ClockSet {
		clock = "set"
	}
	row("clock", "%s, %s", s.Time.Format(time.RFC3339), clock)
	row("power", "%s", onOff(s.Disk.Power, "on", "off"))
	row("unlocked", "%s", onOff(s.Disk.Unlocked, "yes", "no"))
	row("mounted", "%s", onOff(s.Disk.Mounted, "yes", "no"))
	row("exposure", "%d min since power on", s.Disk.ExposureMinutes)
	if s.Disk.Error != "" {
		row("disk", "%s: %s", s.Disk.State, s.Disk.Error)
	} else {
		row("disk", "%s", s.Disk.State)
	}
	if !s.Disk.LeaseUntil.IsZero() {
		row("lease", "until %s, renewed by %s", when(s.Disk.LeaseUntil), orUnknown(s.Disk.LeaseServer))
	}
	if len(s.Disk.RefusedBy) > 0 {
		row("consent", "refused by %s: dark until it grants again", strings.Join(s.Disk.RefusedBy, " and "))
	}
	if s.Disk.TotalBytes > 0 {
		row("space", "%s free of %s", size(s.Disk.FreeBytes), size(s.Disk.TotalBytes))
	}
	for _, r := range s.Repositories {
		suspect := ""
		if r.Suspect {
			suspect = ", SUSPECT"
		}
		row("repository "+r.Name, "%d generations, newest %s (%s), confirmed %s%s", r.Generations, orUnknown(r.Newest), size(r.Bytes), when(r.ConfirmedAt), suspect)
	}
	for _, h := range s.Heartbeats {
		row("heartbeat "+h.Host, "%s", when(h.ReceivedAt))
	}
	for _, a := range s.Alarms {
		row("ALARM", "%s (since %s)", a.Subject, when(a.Since))
	}
	describeHistory(s, row)
	mail := fmt.Sprintf("%d waiting", s.MailQueued)
	if s.MailError != "" {
		mail += ", last error: " + s.MailError
	}
	row("mail", "%s", mail)
	for _, d := range s.Degraded {
		row("degraded", "%s", d)
	}
	w.Flush()
	return b.String()
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

func onOff(b bool, on, off string) string {
	if b {
		return on
	}
	return off
}

func when(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

func size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, prefix := float64(n)/unit, 0
	for value >= unit && prefix < 4 {
		value, prefix = value/unit, prefix+1
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGTP"[prefix])
}
