package disk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"farkeep/appliance/status"
	"farkeep/appliance/unlock"

	"golang.org/x/sys/unix"
)

// adopt finds out what an earlier run of this part left behind, takes the relay
// accordingly, and goes on from there.
func (d *Disk) adopt() error {
	sys := d.cfg.System
	var node string
	var mounted bool
	err := d.bounded(stepTimeout, "look for a mapping", func() (err error) {
		if node, err = sys.Mapping(); err != nil || node == "" {
			return err
		}
		mounted, err = sys.Mounted()
		return err
	})
	if err != nil {
		return err
	}
	var dev Device
	found := d.bounded(stepTimeout, "look for the disk", func() (err error) { dev, err = sys.Find(d.cfg.UUID); return err }) == nil
	// Turned on if there is anything of the disk: a relay that falls now would
	// cut the power of a mounted disk.
	sw, err := d.cfg.OpenRelay(found || node != "")
	if err != nil {
		return &failure{ErrorRelay, err}
	}
	d.mu.Lock()
	d.relay, d.device, d.node = sw, dev, node
	d.lastUse = time.Now()
	d.adoptLeaseLocked()
	d.mu.Unlock()
	state := status.DiskOff
	switch {
	case mounted:
		state = status.DiskMounted
	case node != "":
		state = status.DiskUnlocked
	case found, sw.IsOn():
		state = status.DiskPowered
	}
	d.enter(state, func(s *status.Disk) { s.Power, s.Unlocked, s.Mounted = sw.IsOn(), node != "", mounted })
	if state != status.DiskOff {
		d.cfg.Log.Info("found the disk in use, going on", "state", state)
	}
	if node != "" && !found {
		return d.dropDisk(failed(status.ErrorHung, "the mapping's disk is gone"))
	}
	return nil
}

// open takes the disk from wherever it is to mounted. It is called off, with
// context.Canceled, when the disk is not wanted any more; what was reached is
// then undone by close.
func (d *Disk) open(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	d.mu.Lock()
	d.cancelOpen = cancel
	node := d.node
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.cancelOpen = nil
		d.mu.Unlock()
		if err != nil && ctx.Err() != nil {
			err = context.Canceled
		}
	}()
	begin := time.Now()
	dev, err := d.power(ctx)
	if err != nil {
		// Powered off again: the next attempt begins with a power cycle, which
		// is all that can be done for a disk that does not show up.
		return errors.Join(err, d.darken(dev))
	}
	if node == "" {
		if node, err = d.unlock(ctx, dev); err != nil {
			// A child that was killed between making the mapping and saying so
			// leaves it behind, and the key in the kernel with it.
			err = errors.Join(err, d.lock(dev))
			if kindOf(err) == status.ErrorHung {
				err = errors.Join(err, d.darken(dev))
			}
			return err
		}
	}
	if err := d.mount(ctx, node); err != nil {
		return errors.Join(err, d.lock(dev))
	}
	d.cfg.Log.Info("the disk is open", "device", dev.Name, "took", time.Since(begin).Round(10*time.Millisecond))
	d.attach(ctx)
	return nil
}

// power turns the relay on and waits for the disk.
func (d *Disk) power(ctx context.Context) (Device, error) {
	if !d.relay.IsOn() {
		if err := d.relay.On(); err != nil {
			return Device{}, &failure{ErrorRelay, err}
		}
	}
	d.enter(status.DiskPowered, func(s *status.Disk) { s.Power = true })
	deadline := time.Now().Add(appearTimeout)
	for {
		var dev Device
		err := d.bounded(stepTimeout, "look for the disk", func() (err error) {
			dev, err = d.cfg.System.Find(d.cfg.UUID)
			return err
		})
		switch {
		case err == nil:
			d.mu.Lock()
			d.device = dev
			d.mu.Unlock()
			return dev, nil
		case !errors.Is(err, errNotFound):
			return Device{}, err
		case !time.Now().Before(deadline):
			return Device{}, failed(status.ErrorMissing, "no disk with LUKS UUID %s appeared within %v of power on: check its cable, its supply and the relay", d.cfg.UUID, appearTimeout)
		}
		select {
		case <-ctx.Done():
			return Device{}, ctx.Err()
		case <-time.After(appearPoll):
		}
	}
}

func (d *Disk) unlock(ctx context.Context, dev Device) (node string, err error) {
	letGo, err := d.askAlone(ctx)
	if err != nil {
		return "", err
	}
	defer letGo()
	var r unlock.Result
	sent := d.cfg.Boottime()
	err = d.bounded(unlockTimeout+stepTimeout, "unlock", func() (err error) {
		ctx, cancel := context.WithTimeout(ctx, unlockTimeout)
		defer cancel()
		r, err = d.cfg.System.Unlock(ctx, dev, d.cfg.Book.Tokens(), d.cfg.Book.Refusing())
		return err
	})
	if err != nil {
		return "", err
	}
	// Before anything else, and also where the disk did not open: what a server
	// gave it expects to see again.
	if err := d.cfg.Book.Keep(r.Tokens, r.Granted, r.OK); err != nil {
		d.cfg.Log.Error("the key servers' tokens are not kept: the ones before are shown again", "err", err)
	}
	d.mu.Lock()
	if r.HeaderDigest != "" {
		d.now.HeaderDigest, d.damage, d.slots = r.HeaderDigest, r.HeaderDamage, r.Slots
	}
	d.mu.Unlock()
	if !r.OK {
		text := r.Error
		if r.Hint != "" {
			text += " (" + r.Hint + ")"
		}
		return "", failed(r.ErrorKind, "unlock %s: %s", dev.Name, text)
	}
	node = fmt.Sprintf("/dev/dm-%d", r.Minor)
	d.mu.Lock()
	d.node = node
	d.grantLocked(r.Server, sent+firstLease, 0)
	d.mu.Unlock()
	poke(d.askNow) // the first lease at once: it also shows the new token
	d.enter(status.DiskUnlocked, func(s *status.Disk) { s.Unlocked = true })
	d.cfg.Log.Info("the disk is unlocked", "device", dev.Name, "key_from", r.Server, "header", r.HeaderDigest)
	return node, nil
}

// mount checks the file system if it needs that, and mounts it.
func (d *Disk) mount(ctx context.Context, node string) error {
	sys := d.cfg.System
	d.enter(status.DiskUnlocked, func(s *status.Disk) { s.Unlocked = true })
	care, reason := CareFull, "it failed while it was open"
	if !d.cfg.Memory.CheckWanted() {
		var now time.Time
		if d.cfg.ClockSet() {
			now = time.Now()
		}
		err := d.bounded(stepTimeout, "read the file system's state", func() (err error) {
			care, reason, err = sys.NeedsCheck(node, now)
			return err
		})
		if err != nil {
			return err
		}
	}
	if care != CareNone {
		d.cfg.Log.Info("checking the file system", "full", care == CareFull, "why", reason)
		err := d.bounded(checkTimeout+stepTimeout, "check the file system", func() error {
			ctx, cancel := context.WithTimeout(ctx, checkTimeout)
			defer cancel()
			return sys.Check(ctx, node, care == CareFull)
		})
		if err != nil {
			return err
		}
	}
	if care == CareFull {
		if err := d.cfg.Memory.WantCheck(false); err != nil {
			d.cfg.Log.Warn("remember that the file system was checked", "err", err)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := d.bounded(mountTimeout, "mount", func() error { return sys.Mount(node) }); err != nil {
		return err
	}
	d.mu.Lock()
	d.lastUse, d.wakeUntil, d.healthAt = time.Now(), time.Time{}, time.Time{}
	damage := d.damage
	d.mu.Unlock()
	d.enter(status.DiskMounted, func(s *status.Disk) {
		s.Mounted = true
		succeed(s, damage)
	})
	d.space()
	return nil
}

// attach tells the neighbours, again at every look after the disk's health
// until they have heard.
func (d *Disk) attach(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	err := d.cfg.Neighbours.Attach(ctx)
	d.mu.Lock()
	d.attached = err == nil
	d.mu.Unlock()
	if err != nil {
		d.cfg.Log.Warn("tell the keeper that the disk is mounted", "err", err)
	}
}

func (d *Disk) space() {
	var total, free int64
	err := d.bounded(stepTimeout, "free space", func() (err error) {
		total, free, err = d.cfg.System.Space()
		return err
	})
	if err != nil {
		d.cfg.Log.Warn("the disk", "err", err)
		return
	}
	d.mu.Lock()
	d.now.TotalBytes, d.now.FreeBytes = total, free
	d.mu.Unlock()
}

// health looks after a mounted disk. Whether it is there is asked at every
// call, the rest now and then.
func (d *Disk) health() error {
	d.mu.Lock()
	dev, attached, due := d.device, d.attached, time.Since(d.healthAt) >= healthInterval
	d.mu.Unlock()
	if !d.cfg.System.Present(dev) {
		return failed(status.ErrorHung, "the disk %s vanished while it was open", dev.Name)
	}
	if !due {
		return nil
	}
	if err := d.bounded(healthTimeout, "read the disk", func() error { return d.cfg.System.Healthy(dev) }); err != nil {
		return err
	}
	if !attached {
		d.attach(context.Background())
	}
	d.space()
	d.mu.Lock()
	d.healthAt = time.Now()
	d.mu.Unlock()
	d.report()
	return nil
}

// release asks the neighbours to let go of the disk.
func (d *Disk) release() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*releaseTimeout)
	defer cancel()
	if err := d.cfg.Neighbours.Release(ctx); err != nil {
		d.cfg.Log.Warn("a part does not let go of the disk", "err", err)
	}
}

// close takes a disk that works from wherever it is to dark, in order.
func (d *Disk) close() error {
	d.mu.Lock()
	dev, mounted := d.device, d.now.Mounted
	d.mu.Unlock()
	d.enter(status.DiskClosing, nil)
	if mounted {
		d.release()
		if err := d.bounded(syncTimeout, "sync", d.cfg.System.Sync); err != nil {
			return errors.Join(err, d.dropDisk(err))
		}
		if err := d.unmount(); err != nil {
			return errors.Join(err, d.dropDisk(err))
		}
		d.enter(status.DiskClosing, func(s *status.Disk) { s.Mounted = false })
	}
	if err := d.lock(dev); err != nil {
		return errors.Join(err, d.dropDisk(err))
	}
	if err := d.darken(dev); err != nil {
		return err
	}
	d.cfg.Log.Info("the disk is closed")
	return nil
}

// unmount tries for a while: the sessions that were ended may take a moment to
// close their files. Then the file system is taken from them.
func (d *Disk) unmount() error {
	var err error
	for range unmountTries {
		if err = d.bounded(syncTimeout, "unmount", d.cfg.System.Unmount); err == nil {
			return nil
		}
		if !isBusy(err) {
			return err
		}
		time.Sleep(busyPause)
	}
	d.cfg.Log.Error("files on the disk stay open, taking it away from them", "err", err)
	return d.bounded(syncTimeout, "take the file system away", func() error { return d.cfg.System.Abandon(true) })
}

// lock removes the mapping, and with it the volume key from the kernel.
func (d *Disk) lock(dev Device) error {
	var err error
	for range unmapTries {
		if err = d.bounded(stepTimeout, "remove the mapping", func() error { return d.cfg.System.Unmap(false) }); err == nil {
			d.forgetMapping()
			d.enter(status.DiskPowered, nil)
			return nil
		}
		if !isBusy(err) {
			break
		}
		time.Sleep(busyPause)
	}
	return err
}

func (d *Disk) forgetMapping() {
	d.mu.Lock()
	d.node, d.attached = "", false
	d.now.Unlocked, d.now.Mounted = false, false
	d.mu.Unlock()
}

// darken flushes and stops the disk and cuts its power. A disk whose power
// cannot be switched is only flushed.
func (d *Disk) darken(dev Device) error {
	if dev.Name != "" && d.cfg.System.Present(dev) {
		// A disk that refuses SCSI commands (some bridges do) is powered off
		// all the same: everything was synced before.
		if err := d.bounded(stepTimeout, "stop the disk", func() error { return d.cfg.System.Flush(dev, d.relay.Switches()) }); err != nil {
			d.cfg.Log.Warn("the disk", "err", err)
		}
	}
	return d.cut(dev)
}

// cut turns the power off and sees to it that the disk is gone.
func (d *Disk) cut(dev Device) error {
	if !d.relay.Switches() {
		d.enter(status.DiskPowered, nil)
		return nil
	}
	if err := d.relay.Off(); err != nil {
		return &failure{ErrorRelay, err}
	}
	deadline := time.Now().Add(goneTimeout)
	for dev.Name != "" && d.cfg.System.Present(dev) {
		if !time.Now().Before(deadline) {
			return failed(ErrorRelay, "the relay was turned off, but the disk %s is still there after %v: check the wiring and active = \"high\" or \"low\"", dev.Name, goneTimeout)
		}
		time.Sleep(appearPoll)
	}
	d.mu.Lock()
	d.device = Device{}
	d.mu.Unlock()
	d.enter(status.DiskOff, func(s *status.Disk) { s.Power = false })
	return nil
}

// dropDisk closes a disk that does not work: nothing is waited for, nothing
// more is written, and the power goes. The file system is checked before it is
// mounted again. why is what happened, for those whose sessions end.
func (d *Disk) dropDisk(why error) error {
	d.cfg.Log.Error("the disk fails, closing it", "err", why)
	if err := d.cfg.Memory.WantCheck(true); err != nil {
		d.cfg.Log.Warn("remember that the file system must be checked", "err", err)
	}
	d.mu.Lock()
	dev, mounted := d.device, d.now.Mounted
	if d.holds > 0 {
		// Those who were using it will want it back.
		d.wakeUntil = time.Now().Add(wakePatience)
	}
	d.mu.Unlock()
	d.enter(status.DiskClosing, nil)
	var errs []error
	if mounted {
		if err := d.bounded(stepTimeout, "take the file system away", func() error { return d.cfg.System.Abandon(false) }); err != nil {
			errs = append(errs, err)
		}
	}
	// Also when nothing is mounted any more: who kept files of a file system that
	// was taken away holds the mapping, and would keep the next from being made.
	d.release()
	// The power before the mapping: a hung disk answers nothing until the
	// kernel sees that it is gone, and only then are its users let go.
	cut := d.cut(dev)
	err := d.lock(dev)
	if err != nil {
		// Somebody still holds it. It goes with its last user, and the key with it.
		err = errors.Join(err, d.bounded(stepTimeout, "remove the mapping later", func() error { return d.cfg.System.Unmap(true) }))
		d.forgetMapping()
	}
	if cut == nil && d.relay.Switches() {
		d.enter(status.DiskOff, func(s *status.Disk) { s.Power = false })
	}
	return errors.Join(append(errs, cut, err)...)
}

func isBusy(err error) bool { return errors.Is(err, unix.EBUSY) }
