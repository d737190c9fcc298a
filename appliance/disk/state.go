package disk

import (
	"time"

	"farkeep/appliance/status"
)

// enter changes the state, and reports it.
func (d *Disk) enter(state string, change func(s *status.Disk)) {
	d.mu.Lock()
	if d.now.State != state {
		d.now.State, d.now.Since = state, time.Now()
	}
	if change != nil {
		change(&d.now)
	}
	switch {
	case !d.exposed():
		d.poweredAt = time.Time{}
	case d.poweredAt.IsZero():
		d.poweredAt = time.Now()
	}
	d.mu.Unlock()
	d.report()
}

// exposed says whether the disk could be read by somebody who takes over the
// appliance: it has power, or, if its power cannot be switched, it is unlocked.
func (d *Disk) exposed() bool {
	if d.relay != nil && !d.relay.Switches() {
		return d.now.Unlocked
	}
	return d.now.Power
}

// fail records an error. It stays, with the time since when it is so, until the
// disk was opened again, so that a failure that is not being retried just now,
// outside the window, is not forgotten.
func (d *Disk) fail(err error) {
	state := status.DiskFailed
	if d.mounted() {
		state = status.DiskMounted
	}
	d.enter(state, func(s *status.Disk) {
		if s.FailingSince.IsZero() {
			s.FailingSince = time.Now()
		}
		s.Error, s.ErrorKind = err.Error(), kindOf(err)
	})
}

// succeed clears the error; a damaged header stays one.
func succeed(s *status.Disk, damage string) {
	s.Dark = ""
	if damage == "" {
		s.Error, s.ErrorKind, s.FailingSince = "", "", time.Time{}
		return
	}
	if s.ErrorKind != status.ErrorBadHeader || s.FailingSince.IsZero() {
		s.FailingSince = time.Now()
	}
	s.Error = "one copy of the LUKS header is damaged (" + damage + "): attach the disk to a Linux machine and run cryptsetup repair before the other goes too"
	s.ErrorKind = status.ErrorBadHeader
}

func (d *Disk) mounted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now.Mounted
}

func (d *Disk) since() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now.Since
}

// dark says whether there is nothing left to close.
func (d *Disk) dark() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.now.Mounted && !d.now.Unlocked && (!d.now.Power || !d.relay.Switches()) && d.now.State != status.DiskClosing
}

// Status is the state now.
func (d *Disk) Status() status.Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.snapshotLocked()
}

func (d *Disk) snapshotLocked() status.Disk {
	s := d.now
	if !d.poweredAt.IsZero() {
		s.ExposureMinutes = int(time.Since(d.poweredAt) / time.Minute)
	}
	// The clock may have been set since: what counts is how long ago it was.
	s.Since, s.FailingSince = restate(s.Since), restate(s.FailingSince)
	d.describeLease(&s)
	s.Updated = time.Now()
	return s
}

// restate gives a moment in terms of the clock as it goes now, if it was taken
// by this process and so has a monotonic reading.
func restate(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return time.Now().Add(-time.Since(t)).Round(0)
}

func (d *Disk) report() { d.cfg.Report(d.Status()) }

// rest gives a dark disk that nobody wants its plain state; what went wrong
// before stays on record.
func (d *Disk) rest() {
	state := status.DiskOff
	if !d.relay.Switches() {
		state = status.DiskPowered
	}
	d.mu.Lock()
	changed := d.now.State != state
	d.mu.Unlock()
	if changed {
		d.enter(state, nil)
	}
}
