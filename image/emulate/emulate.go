// Package emulate boots an SD image on an emulated Raspberry Pi 3B, or on a generic arm64 machine, with QEMU.
//
// It plays what surrounds the board: the boot loader (package bootloader takes kernel, initramfs, device
// tree and command line out of the very image that would be flashed), the relay (a GPIO line, watched from
// outside, decides whether the USB disk is there), the hand that pulls the disk's cable, and the power
// cut. The guest's network is QEMU's user network: it reaches the host's loopback at 10.0.2.2, and is reached
// through HostForward only.
//
// It needs the program qemu-system-aarch64 (Debian: qemu-system-arm) and neither root nor KVM. A power cut
// loses what the guest had not yet handed to a disk, and nothing else: real disks may also lose or reorder what
// lies in their caches. The image and the disk are written to; copying them first is the caller's business.
package emulate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"farkeep/image/emulate/bootloader"
)

// Config is one emulated machine.
type Config struct {
	Machine Machine
	Image   string // SD image, MBR; for RaspberryPi3 its size is a power of two
	Disk    string // raw image of the USB disk, "" for none
	Relay   Relay  // what switches the disk
	// DiskServer is the unix socket of an NBD server that stands before Disk; ""
	// for none. Flushes of the guest reach it, as they do not reach a plain Disk.
	DiskServer string

	Append      string    // further kernel words, after those of the image
	Console     io.Writer // gets the serial console line by line; may be nil. Must not block for long
	HostForward []Forward
	RTC         time.Time // Generic only: what its clock shows at power-on; zero: the host's time

	// Tryboot boots what the image's boot selector names for a trial, as after a reboot with the boot
	// loader's one-shot flag.
	Tryboot bool
	// FollowRestarts boots again, from the image as it then is, when the guest restarts or its watchdog
	// resets it. Otherwise that ends the machine.
	FollowRestarts bool
	// Concurrent starts the machine even while another one runs on this host. See turn for why that is not
	// the default.
	Concurrent bool
	// Patience is how long to wait for another machine to end; 0 means 15 minutes.
	Patience time.Duration

	Logger *slog.Logger // may be nil
}

// ErrNoEmulator is returned by Start if QEMU is not installed.
var ErrNoEmulator = errors.New("qemu-system-aarch64 is not installed (Debian: apt-get install qemu-system-arm)")

// Ending says how a machine came to its end.
type Ending string

const (
	PowerCut    Ending = "power cut"          // CutPower, or the end of Start's context
	SwitchedOff Ending = "emulator shut down" // PowerOff
	GuestOff    Ending = "guest powered off"
	GuestReset  Ending = "guest restarted" // or its watchdog bit
	Crashed     Ending = "emulator failed"
)

// RelayEvent is a change of the relay's state.
type RelayEvent struct {
	Time   time.Time // on the host
	Closed bool      // the disk has power
}

// Pi is a running machine. Its methods may be called from several goroutines.
type Pi struct {
	cfg     Config
	qemu    string
	line    line
	log     *slog.Logger
	console *console
	dir     string // of the boot files
	release func() // gives the turn back
	ctx     context.Context
	cut     context.CancelFunc
	poke    chan struct{} // wakes the goroutine that plays the relay
	done    chan struct{} // closed when the machine is off and everything is cleaned up

	mu        sync.Mutex
	run       *run // the current emulator
	boot      *bootloader.Boot
	closed    bool // relay
	unplugged bool // cable
	attached  bool // disk
	events    []RelayEvent
	changed   chan struct{} // closed and replaced whenever one of the above changes
	ending    Ending
	err       error
}

// Start boots a machine and returns when it runs; its guest needs some seconds more. It waits for other
// machines on this host to end first. The end of ctx, at any time, cuts the machine's power.
func Start(ctx context.Context, cfg Config) (*Pi, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Patience == 0 {
		cfg.Patience = 15 * time.Minute
	}
	p := &Pi{
		cfg:     cfg,
		log:     cfg.Logger,
		console: newConsole(cfg.Console),
		poke:    make(chan struct{}, 1),
		done:    make(chan struct{}),
		changed: make(chan struct{}),
		release: func() {},
	}
	var err error
	if err := p.check(); err != nil {
		return nil, err
	}
	if p.qemu, err = exec.LookPath("qemu-system-aarch64"); err != nil {
		return nil, ErrNoEmulator
	}
	if !cfg.Concurrent {
		if p.release, err = turn(ctx, lockPaths(), cfg.Patience, p.log); err != nil {
			return nil, err
		}
	}
	if p.dir, err = os.MkdirTemp("", "farkeep-emulate-"); err != nil {
		p.release()
		return nil, err
	}
	p.ctx, p.cut = context.WithCancel(ctx)
	if err := p.power(); err != nil {
		p.cleanUp()
		return nil, err
	}
	go p.live()
	return p, nil
}

// check refuses what QEMU or the guest would trip over later.
func (p *Pi) check() error {
	c := &p.cfg
	switch c.Machine {
	case RaspberryPi3, Generic:
	default:
		return fmt.Errorf("machine %q: use %q or %q", c.Machine, RaspberryPi3, Generic)
	}
	if !c.RTC.IsZero() && c.Machine == RaspberryPi3 {
		return errors.New("a Raspberry Pi 3 has no clock to set: it starts in 1970")
	}
	image, err := os.Stat(c.Image)
	if err != nil {
		return fmt.Errorf("SD image: %w", err)
	}
	if c.Machine == RaspberryPi3 && (image.Size() == 0 || bits.OnesCount64(uint64(image.Size())) != 1) {
		return fmt.Errorf("SD image %s has %d bytes, and an emulated SD card's size is a power of two: enlarge it with \"truncate -s %d\"",
			c.Image, image.Size(), uint64(1)<<bits.Len64(uint64(image.Size())))
	}
	if c.Disk != "" {
		disk, err := os.Stat(c.Disk)
		if err != nil {
			return fmt.Errorf("USB disk image: %w", err)
		}
		if disk.Mode().IsRegular() && (disk.Size() == 0 || disk.Size()%512 != 0) {
			return fmt.Errorf("USB disk image %s has %d bytes, which is not a number of 512-byte sectors", c.Disk, disk.Size())
		}
	}
	if !c.Relay.None {
		if p.line, err = c.Machine.line(c.Relay.Line); err != nil {
			return err
		}
	}
	return nil
}

// power plays power-on: the boot loader, then the machine.
func (p *Pi) power() error {
	boot, err := bootloader.Load(p.cfg.Image, p.cfg.Machine.board(), p.cfg.Tryboot)
	if err != nil {
		return err
	}
	f, err := p.unpack(boot)
	if err != nil {
		return err
	}
	p.log.Info("boot", "machine", p.cfg.Machine, "partition", boot.Partition, "kernel", boot.KernelName,
		"initramfs", boot.InitramfsName, "dtb", boot.DeviceTreeName, "cmdline", f.commandLine)
	r, err := start(p.ctx, p.qemu, arguments(&p.cfg, f), p.console, p.log)
	if err != nil {
		return err
	}
	p.update(func() { p.run, p.boot = r, boot })
	// The disk of a machine without relay is there before the guest looks.
	if p.cfg.Relay.None && p.cfg.Disk != "" && !p.isUnplugged() {
		if err := r.attach(p.ctx, p.cfg.Machine); err != nil {
			r.kill()
			return err
		}
		p.update(func() { p.attached = true })
	}
	if err := r.qmp.Execute(p.ctx, "cont", nil, nil); err != nil {
		r.kill()
		return err
	}
	return nil
}

// unpack writes the boot files where QEMU can read them.
func (p *Pi) unpack(boot *bootloader.Boot) (files, error) {
	words := strings.Fields(boot.CommandLine + " " + p.cfg.Machine.words() + " " + p.cfg.Append)
	f := files{commandLine: strings.Join(words, " ")}
	for _, part := range []struct {
		name string
		data []byte
		path *string
	}{
		{"kernel", boot.Kernel, &f.kernel},
		{"initramfs", boot.Initramfs, &f.initramfs},
		{"dtb", boot.DeviceTree, &f.deviceTree},
	} {
		if part.data == nil {
			continue
		}
		*part.path = filepath.Join(p.dir, part.name)
		if err := os.WriteFile(*part.path, part.data, 0o600); err != nil {
			return files{}, err
		}
	}
	// QEMU has its own copy now; do not hold a hundred megabytes for as long as the machine runs.
	boot.Kernel, boot.Initramfs, boot.DeviceTree = nil, nil, nil
	return f, nil
}

// live accompanies the machine until it is off.
func (p *Pi) live() {
	defer p.cleanUp()
	for {
		r := p.current()
		err := p.playRelay(r)
		if err != nil {
			r.kill()
		}
		<-r.exited
		p.update(func() {
			if p.closed && !p.cfg.Relay.None { // without power the relay opens
				p.events = append(p.events, RelayEvent{time.Now(), false})
			}
			p.attached, p.closed = false, false
		})
		ending := r.ending()
		switch {
		case p.ctx.Err() != nil: // which explains any other error
			ending, err = PowerCut, nil
		case err != nil:
			ending = Crashed
		case ending == Crashed:
			err = r.failure()
		case ending == GuestReset && p.cfg.FollowRestarts:
			p.log.Info("the guest restarts")
			if err = p.power(); err == nil {
				continue
			}
			ending = Crashed
			if p.ctx.Err() != nil {
				ending, err = PowerCut, nil
			}
		}
		p.log.Info("machine off", "how", ending)
		p.update(func() { p.ending, p.err = ending, err })
		return
	}
}

func (p *Pi) cleanUp() {
	p.cut()
	os.RemoveAll(p.dir)
	p.release()
	p.mu.Lock()
	ending, err := p.ending, p.err
	p.mu.Unlock()
	if err == nil {
		err = fmt.Errorf("the machine is off: %s", ending)
	}
	p.console.end(err)
	close(p.done)
}

// playRelay attaches and detaches the disk as the relay's line and the cable say, until the emulator exits.
func (p *Pi) playRelay(r *run) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := p.relayOnce(r)
		select {
		case <-r.exited:
			return nil
		case <-r.qmp.Done():
			// It is exiting, which explains any error.
			return nil
		default:
		}
		if err != nil {
			return err
		}
		select {
		case <-r.exited:
			return nil
		case <-p.poke:
		case <-tick.C:
		}
	}
}

func (p *Pi) relayOnce(r *run) error {
	closed := true
	if !p.cfg.Relay.None {
		var err error
		if closed, err = p.relayClosed(r); err != nil {
			return fmt.Errorf("watch the relay's line: %w", err)
		}
	}
	p.mu.Lock()
	flipped := closed != p.closed && !p.cfg.Relay.None
	want := closed && !p.unplugged && p.cfg.Disk != ""
	attached := p.attached
	p.mu.Unlock()
	if flipped {
		what := "the relay opens: the USB disk loses power"
		if closed {
			what = "the relay closes: the USB disk gets power"
		}
		p.log.Info(what, "relay", p.cfg.Relay)
		p.update(func() { p.events = append(p.events, RelayEvent{time.Now(), closed}) })
	}
	p.update(func() { p.closed = closed })
	if want == attached {
		return nil
	}
	change := r.detach
	if want {
		change = r.attach
	}
	if err := change(p.ctx, p.cfg.Machine); err != nil {
		return err
	}
	p.log.Debug("USB disk", "attached", want)
	p.update(func() { p.attached = want })
	return nil
}

// relayClosed says whether the relay's line closes it. A line that drives nothing leaves it open, because of
// the pull resistor on the relay's board, unless the boot loader drives the line until the kernel takes it over.
func (p *Pi) relayClosed(r *run) (bool, error) {
	driven, high, err := p.line.read(p.ctx, r.qmp)
	if err != nil {
		return false, err
	}
	if driven {
		r.lineTaken = true
	} else if !r.lineTaken {
		p.mu.Lock()
		high, driven = p.boot.GPIO[p.cfg.Relay.Line]
		p.mu.Unlock()
	}
	return driven && high != p.cfg.Relay.ActiveLow, nil
}

func (p *Pi) update(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *Pi) current() *run {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.run
}

func (p *Pi) isUnplugged() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.unplugged
}

// await returns when ok, called with p.mu held, holds.
func (p *Pi) await(ctx context.Context, what string, ok func() bool) error {
	for {
		p.mu.Lock()
		holds, changed := ok(), p.changed
		p.mu.Unlock()
		if holds {
			return nil
		}
		select {
		case <-changed:
		case <-p.done:
			return fmt.Errorf("wait until %s: the machine is off: %s", what, p.ending)
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w%s", what, ctx.Err(), p.console.context())
		}
	}
}

// WaitLine waits until the serial console has printed a line that re matches, and returns the line. It
// considers every line since the last Mark, or since power-on, also those that have come already, so the order
// in which several waits are written does not matter. It fails when the machine ends.
func (p *Pi) WaitLine(ctx context.Context, re *regexp.Regexp) (string, error) {
	return p.console.wait(ctx, re)
}

// Mark makes later calls of WaitLine consider only lines that come from now on.
func (p *Pi) Mark() { p.console.setMark() }

// LastLines returns the console's last n lines.
func (p *Pi) LastLines(n int) []string { return p.console.tail(n) }

// Partition is the number of the slot partition that has been booted.
func (p *Pi) Partition() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.boot.Partition
}

// DiskAttached says whether the USB disk is there for the guest.
func (p *Pi) DiskAttached() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.attached
}

// WaitDisk waits until the USB disk is there, or is gone. It fails when the machine ends.
func (p *Pi) WaitDisk(ctx context.Context, attached bool) error {
	what := "the USB disk is detached"
	if attached {
		what = "the USB disk is attached"
	}
	return p.await(ctx, what, func() bool { return p.attached == attached })
}

// RelayEvents returns every change of the relay since power-on, oldest first. Changes that last less than
// about 40 ms go unseen.
func (p *Pi) RelayEvents() []RelayEvent {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]RelayEvent(nil), p.events...)
}

// UnplugDisk pulls the USB disk's cable, whatever the relay says, and returns when the disk is gone.
func (p *Pi) UnplugDisk(ctx context.Context) error {
	p.update(func() { p.unplugged = true })
	p.wake()
	return p.WaitDisk(ctx, false)
}

// PlugDisk puts the cable back. The disk appears when the relay is closed, perhaps at once: see WaitDisk.
func (p *Pi) PlugDisk() {
	p.update(func() { p.unplugged = false })
	p.wake()
}

func (p *Pi) wake() {
	select {
	case p.poke <- struct{}{}:
	default:
	}
}

// DumpMemory writes the machine's memory into the new file at path, mode 0600. The machine stands still
// meanwhile. The file is as large as the memory, about 1 GiB.
func (p *Pi) DumpMemory(ctx context.Context, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	// QEMU would create it readable for all, and it may well hold keys.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	r := p.current()
	if err := r.qmp.Execute(ctx, "stop", nil, nil); err != nil {
		return fmt.Errorf("dump memory: %w", err)
	}
	base, size := p.cfg.Machine.memory()
	err = r.qmp.Execute(ctx, "pmemsave", map[string]any{"val": base, "size": size, "filename": path}, nil)
	if resume := r.qmp.Execute(ctx, "cont", nil, nil); err == nil {
		err = resume
	}
	if err != nil {
		return fmt.Errorf("dump memory to %s: %w", path, err)
	}
	return nil
}

// quitPatience is how long a machine that did not answer "quit" may take to end all the same.
const quitPatience = 5 * time.Second

// CutPower stops the machine in the middle of whatever it does, and returns when it is off and another
// can be started. It does nothing if the machine is off already.
func (p *Pi) CutPower() error {
	p.cut()
	_, err := p.Wait()
	return err
}

// PowerOff ends the emulator in an orderly way: what the guest has handed to its disks is in the files. The
// guest is not asked, as a Pi without a power button is not. When ctx ends first, the power is cut.
func (p *Pi) PowerOff(ctx context.Context) error {
	if err := p.current().qmp.Execute(ctx, "quit", nil, nil); err != nil {
		// It may have gone before its answer was read.
		patience, cancel := context.WithTimeout(ctx, quitPatience)
		defer cancel()
		ctx = patience
	}
	select {
	case <-p.done:
		_, err := p.Wait()
		return err
	case <-ctx.Done():
		return p.CutPower()
	}
}

// Wait returns when the machine is off, with how it came to be. The error is not nil if the emulator
// failed, rather than the guest or the caller ending it.
func (p *Pi) Wait() (Ending, error) {
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ending, p.err
}

// Done is closed when the machine is off.
func (p *Pi) Done() <-chan struct{} { return p.done }

// Config returns what the machine was started with: after CutPower, Start it again with the same.
func (p *Pi) Config() Config { return p.cfg }
