package disk

import (
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/settings"
)

const day = 24 * time.Hour

// windowStart returns when the window that contains now began, and false if
// none does. A window of a day is always open.
func windowStart(w settings.Window, now time.Time) (time.Time, bool) {
	if w.Length <= 0 {
		return time.Time{}, false
	}
	now = now.UTC()
	midnight := time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, time.UTC)
	start := midnight.Add(time.Duration(w.Start))
	if start.After(now) {
		// Yesterday's may reach over midnight.
		start = start.Add(-day)
	}
	return start, now.Sub(start) < w.Length.Std()
}

// inWindow judges the window, by a clock that is set only.
func (d *Disk) inWindow(now time.Time) (time.Time, bool) {
	if d.cfg.ClockSet() {
		return windowStart(d.cfg.Window, now)
	}
	return time.Time{}, d.cfg.Window.Length.Std() >= day
}

func (d *Disk) wanted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.wantedLocked(time.Now())
}

// wantedLocked decides whether the disk should be open. d.mu is held.
func (d *Disk) wantedLocked(now time.Time) bool {
	if d.stopping || d.barred != "" {
		return false
	}
	start, in := d.inWindow(now)
	if d.asleep {
		if !in || start.Equal(d.asleepFrom) {
			return false
		}
		d.asleep = false // a new window has begun
	}
	switch {
	case in:
		return true
	case d.now.Mounted:
		return d.holds > 0 || now.Sub(d.lastUse) < d.cfg.IdleClose
	default:
		return now.Before(d.wakeUntil)
	}
}

// Wake wants the disk open, window or not.
func (d *Disk) Wake() status.Disk {
	d.mu.Lock()
	now := time.Now()
	d.asleep = false
	d.lastUse = now
	if !d.now.Mounted {
		d.wakeUntil = now.Add(max(wakePatience, d.cfg.IdleClose))
	}
	if d.barred != "" {
		// Whoever wakes it may just have allowed it again, or wake it all day.
		d.askAt = min(d.askAt, d.askedAt+askFirst)
	}
	s := d.snapshotLocked()
	d.mu.Unlock()
	poke(d.askNow)
	d.cfg.Log.Info("the disk was woken", "state", s.State)
	d.wake()
	return s
}

// Sleep wants the disk dark, until Wake or the next window. Sessions are ended.
func (d *Disk) Sleep() status.Disk {
	d.mu.Lock()
	d.asleep = true
	d.asleepFrom, _ = d.inWindow(time.Now())
	d.wakeUntil = time.Time{}
	s := d.snapshotLocked()
	d.mu.Unlock()
	d.cfg.Log.Info("the disk was sent to sleep", "state", s.State)
	return s
}

// Hold keeps an open disk open until release is called. It returns false, and
// no release, while the disk is not mounted.
func (d *Disk) Hold() (release func(), ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// A disk that is about to close takes nobody in: wanted and mounted are
	// judged together, so that a session is either counted or refused.
	if !d.now.Mounted || d.now.State == status.DiskClosing || d.asleep || d.stopping || d.barred != "" {
		return nil, false
	}
	d.holds++
	d.now.Sessions = d.holds
	var once bool
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !once {
			once = true
			d.holds--
			d.now.Sessions = d.holds
			d.lastUse = time.Now()
		}
	}, true
}

// wake makes the driver look again at once.
func (d *Disk) wake() { poke(d.poke) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
