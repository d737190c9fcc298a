// Package deadman is the part that raises the alarm: when heartbeats stop, when
// a repository never changes any more, when the disk, the key servers, the
// clock or the appliance itself are not well.
//
// It has no network and no secret. It reads what the other parts tell in their
// status files, judges ([Judge], a pure function), and puts mails into the
// outbox, from where another part delivers them. It works whatever state the
// disk is in. It guarantees one mail per flip, also across crashes and reboots;
// it does not judge by a clock that is not set.
package deadman

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// Brief is what the part is told.
type Brief struct {
	DeadMan settings.DeadMan
	From    string   // the mails' sender
	To      []string // their recipients
}

// rewriteInterval is how often a status file is written that has not changed.
const rewriteInterval = time.Minute

type deadman struct {
	env    *part.Env
	brief  Brief
	uptime func() (time.Duration, error)
	bootID string

	state   State
	saved   []byte // the state file's content
	written status.Deadman
	failing map[string]bool // by source of errors
}

// Run is the part. It returns nil after ctx ended.
func Run(ctx context.Context, env *part.Env) error {
	b, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	d := &deadman{env: env, brief: b, uptime: uptime, bootID: bootID()}
	if err := d.open(); err != nil {
		return err
	}
	return env.Loop(ctx, b.DeadMan.CheckInterval.Std(), func(context.Context) error {
		d.step()
		return nil
	})
}

func (d *deadman) path() string {
	return filepath.Join(d.env.Paths.StateDir(part.Deadman), "state.json")
}

// open reads the state. One that cannot be read is put aside: an alarm that is
// mailed again is the smaller harm.
func (d *deadman) open() error {
	d.failing = map[string]bool{}
	state, err := readState(d.path())
	if err != nil {
		d.env.Log.Error("starting without what was remembered", "err", err)
		if err := os.Rename(d.path(), d.path()+".bad"); err != nil {
			d.env.Log.Error("the bad state was not put aside", "err", err)
		}
		state = State{}
	}
	if state.Nonce == 0 {
		var b [4]byte
		if _, err := rand.Read(b[:]); err != nil {
			return fmt.Errorf("dead man's switch: %w", err)
		}
		state.Nonce = binary.BigEndian.Uint32(b[:]) | 1
	}
	d.state = state
	return nil
}

// step judges once. Errors are logged and tried again with the next step.
func (d *deadman) step() {
	facts := d.look()
	next, mails := Judge(d.state, facts, d.brief.DeadMan)
	next.Pending = append(next.Pending, mails...)
	if over := len(next.Pending) - maxAlarms; over > 0 {
		next.Pending = slices.Delete(next.Pending, 0, over)
		next.Dropped += over
	}
	for _, m := range mails {
		d.env.Log.Warn("mail", "id", m.ID, "subject", m.Subject)
	}
	d.state = next
	// First what was decided, then what follows from it: after a crash in
	// between, the mails are put into the outbox again, under the same names.
	if d.note("state", d.save()) {
		d.queue()
		d.note("state", d.save())
		d.note("outbox", d.prune())
	}
	d.note("status", d.tell())
}

// note logs a source's error when it begins, and its end, and reports whether
// there was none: what is tried every few seconds must not fill the log.
func (d *deadman) note(source string, err error) bool {
	switch {
	case err != nil && !d.failing[source]:
		d.env.Log.Error("dead man's switch", "err", err)
	case err == nil && d.failing[source]:
		d.env.Log.Info("dead man's switch: works again", "what", source)
	}
	d.failing[source] = err != nil
	return err == nil
}

// look reads everything that there is to see.
func (d *deadman) look() Facts {
	f := Facts{Now: d.env.Now().Round(0), BootID: d.bootID, Host: d.env.Host}
	up, err := d.uptime()
	d.note("uptime", err)
	f.Uptime = up
	f.Waiting, err = outbox.List(d.env.Paths.Outbox())
	d.note("outbox list", err)
	p := d.env.Paths
	f.Boot = read[status.Boot](d, p.Boot())
	f.Network = read[status.Network](d, p.Status(part.Network))
	f.Disk = read[status.Disk](d, p.Status(part.Disk))
	f.Keeper = read[status.Keeper](d, p.Status(part.Keeper))
	f.Mail = read[status.Mail](d, p.Status(part.Mail))
	return f
}

// read reads a status file; one that cannot be read is unknown.
func read[T any](d *deadman, path string) *T {
	v, err := status.Read[T](path)
	d.note(path, err)
	if err != nil {
		return nil
	}
	return v
}

// save writes the state if it changed.
func (d *deadman) save() error {
	data, err := json.Marshal(d.state)
	if err != nil {
		return fmt.Errorf("state of the dead man's switch: %w", err)
	}
	if bytes.Equal(data, d.saved) {
		return nil
	}
	if err := writeState(d.path(), d.state); err != nil {
		return err
	}
	d.saved = data
	return nil
}

// queue puts the pending mails into the outbox.
func (d *deadman) queue() {
	var rest []Mail
	var errs []error
	for _, m := range d.state.Pending {
		text, err := m.letter().Text(d.brief.From, d.brief.To)
		if err == nil {
			err = outbox.Put(d.env.Paths.Outbox(), m.ID, text)
			if err != nil && !errors.Is(err, outbox.ErrFull) {
				rest = append(rest, m) // another time
				errs = append(errs, err)
				continue
			}
		}
		if err != nil {
			d.state.Dropped++
			errs = append(errs, err)
		}
	}
	d.state.Pending = rest
	d.note("queue", errors.Join(errs...))
}

// prune removes what was sent. The mails are out of Pending, durably, before
// that, so that nothing is queued again.
func (d *deadman) prune() error {
	sent, err := outbox.ReadSent(filepath.Join(d.env.Paths.RunDir(part.Mail), "sent.json"))
	if err != nil {
		return err
	}
	sent = slices.DeleteFunc(sent, func(id string) bool {
		return slices.ContainsFunc(d.state.Pending, func(m Mail) bool { return m.ID == id })
	})
	return outbox.Prune(d.env.Paths.Outbox(), sent)
}

// tell writes the status file if there is something new to tell.
func (d *deadman) tell() error {
	now := d.env.Now()
	s := status.Deadman{Alarms: d.state.Raised(), Updated: d.written.Updated}
	if reflect.DeepEqual(s, d.written) && now.Sub(d.written.Updated).Abs() < rewriteInterval {
		return nil
	}
	s.Updated = now
	if err := status.Write(d.env.Paths.Status(part.Deadman), s); err != nil {
		return err
	}
	d.written = s
	return nil
}

// uptime is CLOCK_BOOTTIME: it goes on whatever happens to the wall clock.
func uptime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("read the uptime: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// bootID is the kernel's random name for this boot (random(4)). Without one,
// moments of this boot count like those of an earlier one.
func bootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(data) > 64 {
		return ""
	}
	return strings.TrimSpace(string(data))
}
