package stockdebian

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/image/debian"
	"farkeep/image/emulate"
)

// Disk is a disk that is put on before the machine starts.
type Disk struct {
	Path   string // a raw image
	Serial string // its name in the machine is /dev/disk/by-id/virtio-SERIAL; at most 20 characters
	Keep   bool   // what the machine writes goes into the image; otherwise it is forgotten
}

// Device is the disk's name in the machine.
func (d Disk) Device() string { return "/dev/disk/by-id/virtio-" + d.Serial }

// Config is one machine.
type Config struct {
	Stick *Stick
	Disks []Disk
	// Network gives it a network card: it then reaches the host's loopback at
	// emulate.HostAddress. Otherwise it has none.
	Network  bool
	Forward  []emulate.Forward // ports that are reached at the host's loopback; needs Network
	Console  io.Writer         // gets what the shell and the kernel print; may be nil
	Patience time.Duration     // how long to wait for another emulated machine to end; 0 means 15 minutes
	Logger   *slog.Logger      // may be nil
}

// Machine is a running machine with a root shell. Its methods are for one goroutine.
type Machine struct {
	cmd     *exec.Cmd
	release func()
	exited  chan struct{}
	hands   net.Conn // commands go in
	tty     net.Conn // what is typed goes in, what is printed comes out
	printed chan []byte
	rest    []byte // printed, and not looked at
	log     *lockedBuffer
	Booted  time.Duration // from power-on to the shell
}

// Bounds of what a machine may do.
const (
	bootLimit = 10 * time.Minute
	maxOutput = 8 << 20 // bytes that one block of commands may print
	maxScript = 256 << 10
)

// Boot starts a machine and waits for its shell. It waits for other emulated
// machines on this host to end first. The end of ctx cuts the machine's power.
func Boot(ctx context.Context, c Config) (_ *Machine, err error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Console == nil {
		c.Console = io.Discard
	}
	if c.Patience == 0 {
		c.Patience = 15 * time.Minute
	}
	const program = "qemu-system-x86_64"
	if err := debian.Tool(program, "qemu-system-x86"); err != nil {
		return nil, err
	}
	m := &Machine{exited: make(chan struct{}), printed: make(chan []byte, 64), log: &lockedBuffer{w: c.Console}}
	if m.release, err = emulate.Turn(ctx, c.Patience, c.Logger); err != nil {
		return nil, err
	}
	var theirs []*os.File
	drop := func() {
		for _, f := range theirs {
			f.Close()
		}
		theirs = nil
	}
	defer func() {
		drop()
		if err != nil {
			m.Close()
		}
	}()
	for _, ours := range []*net.Conn{&m.tty, &m.hands} {
		var f *os.File
		if *ours, f, err = pair(); err != nil {
			return nil, err
		}
		theirs = append(theirs, f)
	}
	m.cmd = exec.CommandContext(ctx, program, arguments(c)...)
	m.cmd.ExtraFiles = theirs
	m.cmd.Stdout, m.cmd.Stderr = m.log, m.log
	m.cmd.WaitDelay = 5 * time.Second
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	begin := time.Now()
	started := make(chan error, 1)
	go func() {
		// The death signal belongs to the thread that forked, so it has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := m.cmd.Start()
		started <- err
		if err == nil {
			m.cmd.Wait()
		}
		close(m.exited)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	drop() // or the end of a machine that dies while it boots would not be heard
	go m.listen()
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	mark, out, err := m.until(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("boot a stock Debian: %w%s", err, m.log.tail())
	}
	if mark != "ready" {
		return nil, fmt.Errorf("boot a stock Debian: its shell says %q: %s", mark, out)
	}
	if c.Network {
		if out, err := m.Run(ctx, network); err != nil {
			return nil, fmt.Errorf("set up the network of a stock Debian: %w: %s", err, out)
		}
	}
	m.Booted = time.Since(begin)
	return m, nil
}

// network does what a desktop's network manager would; the card's name depends on
// the slot that QEMU gives it.
const network = `modprobe virtio_net
udevadm settle
for nic in /sys/class/net/e*; do
	ip link set "${nic##*/}" up
	ip address add 10.0.2.15/24 dev "${nic##*/}"
done
ip route add default via 10.0.2.2
`

// arguments are QEMU's. The sockets are descriptors 3 (terminal) and 4 (commands).
func arguments(c Config) []string {
	args := []string{
		"-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot",
		// One processor: a kernel that patches itself while another one runs through that
		// code dies of it now and then under QEMU's threads ("int3", in a timer).
		"-M", "q35", "-accel", "tcg,thread=single", "-cpu", "qemu64", "-smp", "1", "-m", "1G",
		"-kernel", c.Stick.Kernel, "-initrd", c.Stick.Initramfs,
		// On a busy host the emulated timer comes late, and the kernel takes it for broken and panics.
		"-append", "console=ttyS0 quiet panic=-1 cryptomgr.notests no_timer_check",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=tty,fd=3", "-device", "virtconsole,chardev=tty",
		"-chardev", "socket,id=hands,fd=4", "-device", "virtserialport,chardev=hands,name=hands",
	}
	put := func(path, serial string, keep bool) {
		id := "d" + strconv.Itoa(len(args))
		snapshot := "on"
		if keep {
			snapshot = "off"
		}
		args = append(args, "-drive", "if=none,format=raw,cache=unsafe,snapshot="+snapshot+",id="+id+",file="+strings.ReplaceAll(path, ",", ",,"),
			"-device", "virtio-blk-pci,drive="+id+",serial="+serial)
	}
	put(c.Stick.Image, "stick", false)
	for _, d := range c.Disks {
		put(d.Path, d.Serial, d.Keep)
	}
	if c.Network {
		card := "user,id=net"
		for _, f := range c.Forward {
			protocol := "tcp"
			if f.UDP {
				protocol = "udp"
			}
			card += fmt.Sprintf(",hostfwd=%s:127.0.0.1:%d-:%d", protocol, f.HostPort, f.GuestPort)
		}
		args = append(args, "-netdev", card, "-device", "virtio-net-pci,netdev=net,romfile=")
	} else {
		args = append(args, "-nic", "none")
	}
	return args
}

// pair is a connection to a device of the machine: our end, and one to inherit.
func pair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	theirs, f := os.NewFile(uintptr(fds[1]), "device"), os.NewFile(uintptr(fds[0]), "device")
	defer f.Close()
	ours, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return ours, theirs, nil
}

// listen reads the terminal until the machine is gone.
func (m *Machine) listen() {
	defer close(m.printed)
	for {
		b := make([]byte, 16<<10)
		n, err := m.tty.Read(b)
		if n > 0 {
			m.log.Write(b[:n])
			m.printed <- b[:n]
		}
		if err != nil {
			return
		}
	}
}

// Answer is what a person types whenever a program asks.
type Answer struct {
	Asked *regexp.Regexp // what it prints, since the block's beginning or the last answer
	Text  string         // typed, and ended with the return key
}

// mark begins and ends a word of the guest's shell to us; see guest/hands.
const mark = '\036'

// until waits for the next such word, and returns it and what was printed before.
func (m *Machine) until(ctx context.Context, answers []Answer) (word string, out []byte, err error) {
	asked := 0 // from here on nobody has answered
	for {
		if i := bytes.IndexByte(m.rest, mark); i >= 0 {
			if j := bytes.IndexByte(m.rest[i+1:], mark); j >= 0 {
				out, word = m.rest[:i], string(m.rest[i+1:i+1+j])
				m.rest = m.rest[i+j+2:]
				return word, out, nil
			}
		}
		if len(m.rest) > maxOutput {
			return "", nil, fmt.Errorf("it printed more than %d bytes", maxOutput)
		}
		for _, a := range answers {
			if a.Asked.Match(m.rest[asked:]) {
				if _, err := io.WriteString(m.tty, a.Text+"\n"); err != nil {
					return "", m.rest, fmt.Errorf("type an answer: %w", err)
				}
				asked = len(m.rest)
			}
		}
		select {
		case b, ok := <-m.printed:
			if !ok {
				return "", m.rest, errors.New("the machine is off")
			}
			m.rest = append(m.rest, b...)
		case <-ctx.Done():
			return "", m.rest, ctx.Err()
		}
	}
}

// ScriptError is a block of commands that went wrong.
type ScriptError struct {
	Code   int    // of the command that ended the shell
	Output string // what the block printed
}

func (e *ScriptError) Error() string {
	lines := strings.Split(strings.TrimSpace(e.Output), "\n")
	return fmt.Sprintf("exit code %d: %s", e.Code, strings.Join(lines[max(0, len(lines)-12):], "\n"))
}

// Run pastes a block of commands into the shell and returns what it printed, both
// outputs mixed as on a terminal. Variables and the current folder stay for the next
// block. A command that goes wrong ends the shell: the error is a *ScriptError, and
// the next block has a fresh shell. Questions are answered as often as they are asked;
// what is asked besides waits until ctx ends, and the machine is of no use then.
func (m *Machine) Run(ctx context.Context, script string, answers ...Answer) (string, error) {
	if len(script) > maxScript {
		return "", fmt.Errorf("a block of %d bytes; at most %d can be pasted", len(script), maxScript)
	}
	if _, err := io.WriteString(m.hands, base64.StdEncoding.EncodeToString([]byte(script))+"\n"); err != nil {
		return "", fmt.Errorf("paste commands: %w", err)
	}
	word, out, err := m.until(ctx, answers)
	if err != nil {
		return string(out), fmt.Errorf("run commands: %w; the terminal shows %q", err, tail(string(out)))
	}
	if word == "done" {
		return string(out), nil
	}
	code, err := strconv.Atoi(strings.TrimPrefix(word, "ended "))
	if err != nil {
		return string(out), fmt.Errorf("run commands: the shell says %q", word)
	}
	text := string(out)
	if word, _, err := m.until(ctx, nil); err != nil || word != "ready" {
		return text, fmt.Errorf("no fresh shell after exit code %d: %q, %w", code, word, err)
	}
	return text, &ScriptError{code, text}
}

func tail(text string) string { return text[max(0, len(text)-500):] }

// Close cuts the power and returns when the machine is gone.
func (m *Machine) Close() {
	for _, c := range []net.Conn{m.tty, m.hands} {
		if c != nil {
			c.Close()
		}
	}
	if m.cmd != nil && m.cmd.Process != nil {
		m.cmd.Process.Kill()
		<-m.exited
		for range m.printed { // until listen has ended
		}
	}
	m.release()
}

// lockedBuffer hands on what the machine prints, and keeps its end.
type lockedBuffer struct {
	mu   sync.Mutex
	w    io.Writer
	kept []byte
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = append(l.kept, b...)
	l.kept = append([]byte(nil), l.kept[max(0, len(l.kept)-4000):]...)
	// A reader that has gone away is no reason to stop the machine.
	_, _ = l.w.Write(b)
	return len(b), nil
}

func (l *lockedBuffer) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return "; the console ends in\n" + string(l.kept)
}
