// Package demo shows Farkeep's main job from a site that does not exist yet to
// an alarm that arrives, on one machine, with real Borg, ssh, sftp, b2sum and
// e2fsck and an emulated Raspberry Pi. Every step is checked; one that does not
// hold ends the demonstration with an error.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/mailsink"
	"farkeep/image/stage"
	"farkeep/shared/pushwire"
)

// Options say how to show it.
type Options struct {
	Bin   string    // the folder with the programs
	Dir   string    // where everything lies; "" for a temporary folder that is removed
	Image string    // a built image; "" builds one
	Out   io.Writer // the story
}

// heartbeatAge is short enough for a demonstration and longer than its pushes.
const heartbeatAge = 45 * time.Second

type show struct {
	narrator
	dir   string
	s     *stage.Stage
	vault *stage.Appliance // the Raspberry Pi 3B, slow and with no clock
	barn  *stage.Appliance // the generic machine, for bulk data

	lastPush time.Time
	notes    *borg // small, on both
	media    *borg // large, on the barn
}

// Run shows it. The error says which step did not hold.
func Run(ctx context.Context, o Options) (err error) {
	dir := o.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "farkeep-demo-"); err != nil {
			return err
		}
		defer func() {
			if err == nil {
				os.RemoveAll(dir)
			}
		}()
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, "demo.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d := &show{narrator: narrator{out: o.Out, log: log, started: time.Now()}, dir: dir}
	var mu sync.Mutex
	d.s, err = stage.New(ctx, stage.Options{
		Dir: dir, Bin: o.Bin, Image: o.Image,
		Out:          &prefixed{mu: &mu, w: log, prefix: "    "},
		Console:      &prefixed{mu: &mu, w: log, prefix: "pi| "},
		Log:          slog.New(slog.NewTextHandler(&prefixed{mu: &mu, w: log, prefix: "stage| "}, nil)),
		HeartbeatAge: heartbeatAge, UnreachableAfter: 20 * time.Second,
	})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.s.Close())
		if err != nil {
			fmt.Fprintf(o.Out, "\nIt did not hold. Everything that was printed is in %s\n", log.Name())
		}
	}()
	for _, act := range []func(context.Context) error{d.prepare, d.firstPush, d.secondPush, d.powerCut, d.restore, d.silence, d.revoke, d.bulk, d.search} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	fmt.Fprintf(o.Out, "\nEvery step held: %d steps in %s.\n", d.steps, time.Since(d.started).Round(time.Second))
	return nil
}

// within bounds a wait.
func within(ctx context.Context, d time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return do(ctx)
}

func (d *show) prepare(ctx context.Context) error {
	d.chapter("1. A site, an image, two disks")
	if err := d.step("make two real Borg repositories at home", func() (err error) {
		if d.notes, err = newBorg(ctx, d.s, d.dir, "notes"); err != nil {
			return err
		}
		if d.media, err = newBorg(ctx, d.s, d.dir, "media"); err != nil {
			return err
		}
		if err := errors.Join(d.notes.write("first", firstFiles, firstSize), d.media.write("first", 12, 4<<20)); err != nil {
			return err
		}
		// Borg's own 500 MB would make one segment of it all.
		if err := d.notes.run(ctx, "config", d.notes.path, "max_segment_size", fmt.Sprint(segmentSize)); err != nil {
			return err
		}
		if err := d.notes.create(ctx, "monday"); err != nil {
			return err
		}
		return d.media.create(ctx, "monday")
	}); err != nil {
		return err
	}
	if err := d.step("add the small one to the site; every machine has its secrets folder", func() error {
		_, err := d.s.Run(ctx, "farkeep-image", "site", "add", "repository", "notes", d.notes.path, "--dir", d.s.Site)
		return err
	}); err != nil {
		return err
	}
	if err := d.step("build the image that a user would flash, from Debian's packages", func() error { return d.s.BuildImage(ctx) }); err != nil {
		return err
	}
	if err := d.step("prepare a disk for a Raspberry Pi 3 (adiantum) and personalise its card", func() (err error) {
		d.vault, err = d.s.Add(ctx, stage.Cast{Name: "vault", Machine: emulate.RaspberryPi3, DiskSize: 256 << 20, Relay: emulate.Relay{Line: 17}, Window: "24h", Settings: stage.ShortLease})
		return err
	}); err != nil {
		return err
	}
	if err := d.step("the same for a generic machine whose relay is active-low", func() (err error) {
		d.barn, err = d.s.Add(ctx, stage.Cast{Name: "barn", Machine: emulate.Generic, DiskSize: 1 << 30, Relay: emulate.Relay{Line: 3, ActiveLow: true}})
		return err
	}); err != nil {
		return err
	}
	return d.step("open home: the key server, and home's end of the VPN", func() error { return d.s.OpenHome(ctx) })
}

func (d *show) firstPush(ctx context.Context) error {
	d.chapter("2. A Raspberry Pi 3B boots, fetches its key, opens its disk, takes a push")
	if err := d.step("switch the Pi on: no clock, no key, relay open, disk dark", func() error { return d.vault.Boot(ctx) }); err != nil {
		return err
	}
	if err := d.step("it sets its clock, joins the VPN, closes the relay, fetches the key, mounts", func() error {
		return within(ctx, 4*time.Minute, func(ctx context.Context) error {
			_, err := d.vault.Mounted(ctx)
			return err
		})
	}); err != nil {
		return err
	}
	if err := d.step("its first mail: I am up, from here, and this is what I see", func() error {
		m, err := d.mail(ctx, 2*time.Minute, time.Time{}, func(m mailsink.Message) bool { return strings.Contains(m.Subject(), "up") })
		if err == nil {
			d.say("Subject: %s", m.Subject())
		}
		return err
	}); err != nil {
		return err
	}
	if err := d.push(ctx, "push: offer, upload, commit, heartbeat", "vault"); err != nil {
		return err
	}
	return d.step("ask for the status, with a stock ssh", func() error {
		text, err := d.vault.SSH(ctx, "home/pusher/ssh_key", "status")
		d.say("%s", text)
		return err
	})
}

func (d *show) secondPush(ctx context.Context) error {
	d.chapter("3. Life goes on: create, prune, compact, and a second generation")
	if err := d.step("an unchanged repository costs one exchange and makes no generation", func() error {
		before, err := d.generations(ctx, d.vault)
		if err != nil {
			return err
		}
		sent, err := d.s.Sent("vault")
		if err != nil {
			return err
		}
		if _, err := d.s.Push(ctx, "--target", "vault"); err != nil {
			return err
		}
		now, err := d.s.Sent("vault")
		if err != nil {
			return err
		}
		d.say("%d bytes went through the VPN, SSH's handshake and the heartbeat included", now-sent)
		if now-sent > 32<<10 {
			return fmt.Errorf("%d bytes are more than an exchange", now-sent)
		}
		after, err := d.generations(ctx, d.vault)
		if err == nil && len(after) != len(before) {
			err = fmt.Errorf("%d generations became %d", len(before), len(after))
		}
		return err
	}); err != nil {
		return err
	}
	if err := d.step("borg create, prune and compact", func() error {
		if err := d.notes.write("second", 8, 20_000); err != nil {
			return err
		}
		if err := d.notes.create(ctx, "tuesday"); err != nil {
			return err
		}
		if err := d.notes.run(ctx, "prune", "--keep-last=1", d.notes.path); err != nil {
			return err
		}
		return d.notes.run(ctx, "compact", d.notes.path)
	}); err != nil {
		return err
	}
	return d.step("push, and run borg create while the push goes on", func() error { return d.beside(ctx) })
}

// beside runs borg create while a push goes on. With its limit the push takes several
// times as long; should borg create be kept waiting by the host and not by the push,
// there is another push.
func (d *show) beside(ctx context.Context) error {
	const most = 4
	for try := 1; ; try++ {
		pushed := make(chan error, 1)
		go func() {
			_, err := d.s.Push(ctx, "--target", "vault", "--rate-limit", "30000")
			pushed <- err
		}()
		if err := d.uploading(ctx, d.vault, 20_000); err != nil {
			return errors.Join(err, <-pushed)
		}
		began := time.Now()
		if err := d.notes.create(ctx, fmt.Sprintf("while-pushing-%d", try)); err != nil {
			return errors.Join(err, <-pushed)
		}
		took := time.Since(began)
		select {
		case err := <-pushed:
			if err != nil || try == most {
				return errors.Join(errors.New("the push ended before borg create did: nothing was shown"), err)
			}
		default:
			d.say("borg create took %.1f s while the push went on", took.Seconds())
			return <-pushed
		}
		if err := d.notes.write(fmt.Sprintf("again-%d", try), 8*try, 20_000); err != nil {
			return err
		}
		if err := d.notes.create(ctx, fmt.Sprintf("again-%d", try)); err != nil {
			return err
		}
	}
}

func (d *show) powerCut(ctx context.Context) error {
	d.chapter("4. Borg moves what it keeps, and the power goes in the middle of the push")
	var before []pushwire.Generation
	var day compaction
	if err := d.step("a compaction day: Borg moves most chunks into new segments", func() (err error) {
		if before, err = d.generations(ctx, d.vault); err != nil {
			return err
		}
		day, err = d.compactionDay(ctx)
		return err
	}); err != nil {
		return err
	}
	if err := d.step("begin a push, and end the pusher in the middle", func() error {
		if err := d.interrupted(ctx, &day, 150_000, func() error { return nil }); err != nil {
			return err
		}
		return d.says(ctx, uploadCut)
	}); err != nil {
		return err
	}
	if err := d.step("begin again, and cut the Pi's power in the middle", func() error {
		return d.interrupted(ctx, &day, 50_000, d.vault.CutPower)
	}); err != nil {
		return err
	}
	if err := d.step("the power comes back: it boots and opens its disk by itself", func() error {
		if err := d.vault.Boot(ctx); err != nil {
			return err
		}
		return within(ctx, 4*time.Minute, func(ctx context.Context) error {
			_, err := d.vault.Mounted(ctx)
			return err
		})
	}); err != nil {
		return err
	}
	if err := d.step("every generation from before is still there, every byte of it", func() error {
		after, err := d.generations(ctx, d.vault)
		if err != nil {
			return err
		}
		return errors.Join(sameGenerations(before, after), d.verified(ctx, d.vault, before))
	}); err != nil {
		return err
	}
	return d.step("push again, to the end: what moved crosses the line never, what had arrived not again", func() error {
		out, err := d.s.Push(ctx, "--target", "vault", "--json")
		d.lastPush = time.Now()
		if err != nil {
			return err
		}
		return d.resumed(&day, out)
	})
}

func (d *show) restore(ctx context.Context) error {
	d.chapter("5. Reading back")
	var newest pushwire.Generation
	if err := d.step("list the generations, and why each of them stays", func() error {
		all, err := d.generations(ctx, d.vault)
		for _, g := range all {
			d.say("%s  %s  %d entries, %d bytes, %s: %s", g.Repository, g.Name, g.Entries, g.Bytes, g.Standing, g.Why)
			if !g.Keep || g.Why == "" || g.Standing != "good" {
				return fmt.Errorf("%s %s: keep %v because of %q, standing %q %q", g.Repository, g.Name, g.Keep, g.Why, g.Standing, g.Reasons)
			}
			newest = g
		}
		if err == nil && len(all) < 3 {
			err = fmt.Errorf("%d generations, expected at least 3", len(all))
		}
		return err
	}); err != nil {
		return err
	}
	copied := filepath.Join(d.dir, "restored", "notes")
	if err := d.step("fetch the newest with a stock sftp and the operator's restore key", func() error {
		if err := os.MkdirAll(filepath.Dir(copied), 0o700); err != nil {
			return err
		}
		batch := filepath.Join(d.dir, "sftp.batch")
		commands := fmt.Sprintf("get -R /%s/%s/files %s\n", newest.Repository, newest.Name, copied)
		if err := os.WriteFile(batch, []byte(commands), 0o600); err != nil {
			return err
		}
		_, err := d.vault.SFTP(ctx, batch)
		return err
	}); err != nil {
		return err
	}
	if err := d.step("a push key reads nothing, nobody can write, and neither key decides about history", func() error {
		return d.refused(ctx)
	}); err != nil {
		return err
	}
	return d.checkBorg(ctx, "borg check --verify-data it, extract it, compare it with the source", d.notes, copied)
}

func (d *show) silence(ctx context.Context) error {
	d.chapter("6. Home falls silent")
	return d.step("nobody pushes any more; the Pi raises the alarm by its own path", func() error {
		m, err := d.mail(ctx, 5*time.Minute, d.lastPush, func(m mailsink.Message) bool {
			return strings.HasPrefix(m.Subject(), "[WATCHDOG]") && strings.Contains(m.Subject(), "heartbeat STALE")
		})
		if err == nil {
			d.say("Subject: %s\n\n%s", m.Subject(), m.Text())
		}
		return err
	})
}

func (d *show) revoke(ctx context.Context) error {
	d.chapter("7. The Pi is stolen while it runs")
	if err := d.step("search its whole memory: of the key that opened its disk there is nothing", func() error { return d.memory(ctx, d.vault, true) }); err != nil {
		return err
	}
	revoked := time.Now()
	if err := d.step("revoke it at the key server: within its lease it closes its disk, and says so", func() error {
		args := append([]string{"revoke", "vault", "--reason", "stolen", "--wait", "4m"}, d.s.KeyServerFlags()...)
		if _, err := d.s.Run(ctx, "farkeep-keyserver", args...); err != nil {
			return err
		}
		list, err := d.s.Run(ctx, "farkeep-keyserver", append([]string{"list", "--json"}, d.s.KeyServerFlags()...)...)
		if err != nil {
			return err
		}
		if !strings.Contains(list, `"told": "2`) || !strings.Contains(list, `"dark": "2`) {
			return fmt.Errorf("the key server was not told that it is dark: %s", list)
		}
		d.say("dark after %.0f s; its lease was 2 minutes", time.Since(revoked).Seconds())
		return within(ctx, 3*time.Minute, func(ctx context.Context) error { return d.vault.Pi.WaitDisk(ctx, false) })
	}); err != nil {
		return err
	}
	if err := d.step("a mail by its own path: the disk was closed, and who refused", func() error {
		m, err := d.mail(ctx, 5*time.Minute, revoked, func(m mailsink.Message) bool {
			return strings.Contains(m.Subject(), "consent REFUSED")
		})
		if err == nil {
			d.say("Subject: %s", m.Subject())
		}
		return err
	}); err != nil {
		return err
	}
	if err := d.step("search its memory again: the volume key has left the kernel too", func() error { return d.memory(ctx, d.vault, false) }); err != nil {
		return err
	}
	return d.step("reboot it: it gets no key, and its disk no power", func() error {
		if err := d.vault.CutPower(); err != nil {
			return err
		}
		if err := d.vault.Boot(ctx); err != nil {
			return err
		}
		s, err := d.vault.Await(ctx, "up", func(s pushwire.Status) bool { return s.Disk.Dark != "" })
		if err != nil {
			return err
		}
		if s.Disk.Unlocked || s.Disk.Mounted || len(d.vault.Pi.RelayEvents()) > 0 {
			return fmt.Errorf("the disk is open, or had power: %+v, %v", s.Disk, d.vault.Pi.RelayEvents())
		}
		d.say("%s: %s", s.Disk.State, s.Disk.Error)
		return nil
	})
}

func (d *show) bulk(ctx context.Context) error {
	d.chapter("8. A larger repository, on a generic machine")
	if err := d.step("switch the Pi off and the generic machine on", func() error {
		// Two emulated machines at once would starve each other on a small host.
		if err := d.vault.CutPower(); err != nil {
			return err
		}
		if _, err := d.s.Run(ctx, "farkeep-image", "site", "add", "repository", "media", d.media.path, "--dir", d.s.Site); err != nil {
			return err
		}
		return d.barn.Boot(ctx)
	}); err != nil {
		return err
	}
	if err := d.step("its disk is dark until somebody wakes it", func() error {
		s, err := d.barn.Await(ctx, "up", func(pushwire.Status) bool { return true })
		if err == nil && (s.Disk.Power || d.barn.Pi.DiskAttached()) {
			err = fmt.Errorf("the disk has power: %+v", s.Disk)
		}
		return err
	}); err != nil {
		return err
	}
	if err := d.push(ctx, "push both repositories: the push wakes the disk", "barn"); err != nil {
		return err
	}
	if err := d.step("sleep: unmount, lock, cut the disk's power", func() error {
		if _, err := d.barn.SSH(ctx, "home/pusher/ssh_key", "sleep"); err != nil {
			return err
		}
		return within(ctx, 3*time.Minute, func(ctx context.Context) error { return d.barn.Pi.WaitDisk(ctx, false) })
	}); err != nil {
		return err
	}
	if err := d.step("switch it off: from here on there is only its disk, and the recovery key", d.barn.CutPower); err != nil {
		return err
	}
	dump, err := d.outside(ctx, d.barn)
	if err != nil {
		return err
	}
	folders, err := d.sums(ctx, dump, "media")
	if err != nil {
		return err
	}
	if err := d.checkBorg(ctx, "borg check --verify-data media, extract it, compare it with the source", d.media, filepath.Join(folders[0], "files")); err != nil {
		return err
	}
	// And the stolen one, whose disk the Pi's kernel wrote with adiantum.
	if dump, err = d.outside(ctx, d.vault); err != nil {
		return err
	}
	folders, err = d.sums(ctx, dump, "notes")
	if err == nil && len(folders) < 3 {
		err = fmt.Errorf("%d generations of notes survived, expected 3", len(folders))
	}
	if err != nil {
		return err
	}
	return d.step("borg check --verify-data notes as it was before the compaction day", func() error {
		return d.notes.at(filepath.Join(folders[len(folders)-2], "files")).verify(ctx)
	})
}
