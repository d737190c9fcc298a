package emulate

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/image/emulate/qmp"
)

// run is one QEMU process, from one power-on to the next power-off or restart.
type run struct {
	cmd     *exec.Cmd
	qmp     *qmp.Client
	deleted chan string   // ids of devices that are gone
	exited  chan struct{} // closed when the process is gone; wait holds afterwards
	wait    error

	lineTaken bool // the kernel has driven the relay's line; of the goroutine that plays the relay

	mu     sync.Mutex
	reason string   // of the shutdown, in QMP's words
	stderr []string // last lines
}

// start runs QEMU with a stopped machine and connects to it.
func start(ctx context.Context, path string, args []string, c *console, log *slog.Logger) (*run, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	r := &run{
		cmd:     exec.CommandContext(ctx, path, args...),
		deleted: make(chan string, 4),
		exited:  make(chan struct{}),
	}
	stdout := &lineWriter{add: c.add}
	stderr := &lineWriter{add: func(line string) { r.complain(line, log) }}
	r.cmd.ExtraFiles = []*os.File{theirs}
	r.cmd.Stdout, r.cmd.Stderr = stdout, stderr
	r.cmd.WaitDelay = 5 * time.Second
	r.cmd.SysProcAttr = &syscall.SysProcAttr{
		// A Ctrl-C at the terminal is for us; we then end QEMU.
		Setpgid: true,
		// Nothing else ends QEMU if we die.
		Pdeathsig: syscall.SIGKILL,
	}

	started := make(chan error, 1)
	go func() {
		// The death signal belongs to the thread that forked, so it has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := r.cmd.Start()
		theirs.Close()
		started <- err
		if err != nil {
			return
		}
		r.wait = r.cmd.Wait()
		stdout.end()
		stderr.end()
		close(r.exited)
	}()
	if err := <-started; err != nil {
		ours.Close()
		return nil, fmt.Errorf("start %s: %w", path, err)
	}

	greet, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if r.qmp, err = qmp.New(greet, ours, r.event); err != nil {
		r.kill()
		return nil, fmt.Errorf("%w: %w", r.failure(), err)
	}
	return r, nil
}

// socketPair is a control connection: one end for a qmp.Client, one to inherit.
func socketPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "control")
	f := os.NewFile(uintptr(fds[0]), "control")
	defer f.Close()
	if ours, err = net.FileConn(f); err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return ours, theirs, nil
}

func (r *run) event(e qmp.Event) {
	switch e.Name {
	case "SHUTDOWN":
		var data struct{ Reason string }
		if json.Unmarshal(e.Data, &data) == nil {
			r.mu.Lock()
			r.reason = data.Reason
			r.mu.Unlock()
		}
	case "DEVICE_DELETED":
		var data struct{ Device string }
		if json.Unmarshal(e.Data, &data) == nil && data.Device != "" {
			select {
			case r.deleted <- data.Device:
			default:
			}
		}
	}
}

// complain notes a line of QEMU's standard error.
func (r *run) complain(line string, log *slog.Logger) {
	if strings.Contains(line, "usbnet: failed control transaction") {
		return // QEMU's usb-net says so of a request that it does not know; harmless
	}
	log.Debug("qemu", "stderr", line)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stderr = append(r.stderr, line)
	if len(r.stderr) > 10 {
		r.stderr = r.stderr[1:]
	}
}

func (r *run) kill() {
	_ = r.cmd.Process.Kill()
	<-r.exited
}

// ending says how the process came to its end; call it after that.
func (r *run) ending() Ending {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.wait != nil:
		return Crashed
	case r.reason == "guest-shutdown":
		return GuestOff
	case r.reason == "guest-reset":
		return GuestReset
	case r.reason == "host-qmp-quit":
		return SwitchedOff
	}
	return Crashed
}

// failure is QEMU's own explanation of its end; call it after that.
func (r *run) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := fmt.Errorf("qemu ended: %v", r.wait)
	if r.wait == nil {
		err = fmt.Errorf("qemu ended (%q)", r.reason)
	}
	if len(r.stderr) > 0 {
		err = fmt.Errorf("%w: %s", err, strings.Join(r.stderr, "; "))
	}
	return err
}

// attach plugs the USB disk in.
func (r *run) attach(ctx context.Context, m Machine) error {
	if err := r.qmp.Execute(ctx, "device_add", m.diskArguments(), nil); err != nil {
		return fmt.Errorf("attach the USB disk: %w", err)
	}
	return nil
}

// detach pulls the USB disk and returns when it is gone.
func (r *run) detach(ctx context.Context, _ Machine) error {
	if err := r.qmp.Execute(ctx, "device_del", map[string]string{"id": diskDevice}, nil); err != nil {
		return fmt.Errorf("detach the USB disk: %w", err)
	}
	limit := time.NewTimer(10 * time.Second)
	defer limit.Stop()
	for {
		select {
		case id := <-r.deleted:
			if id == diskDevice {
				return nil
			}
		case <-r.exited:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-limit.C:
			return fmt.Errorf("detach the USB disk: the emulator did not let go of it")
		}
	}
}
