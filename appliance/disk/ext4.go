package disk

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"farkeep/appliance/status"
)

// When the whole file system is checked, though nothing is known to be wrong. A
// full check of a large disk takes a good part of a night's window, and each
// byte that it reads wears the disk: four months of nightly openings.
const (
	checkAfterMounts = 120
	checkAfterTime   = 120 * 24 * time.Hour
)

// Care is what a file system wants before it is mounted.
type Care int

// The kinds of care. docs/crash-safety.md says why these.
const (
	// CareNone: it was unmounted in order, and nothing is known against it.
	CareNone Care = iota
	// CareReplay: its journal holds what a power cut left. e2fsck replays it, and
	// checks everything by itself if it cannot, or if the journal tells of errors.
	CareReplay
	// CareFull: everything is looked at.
	CareFull
)

// superblock is what we read of ext4's (Linux, Documentation/filesystems/ext4,
// "The Super Block").
type superblock struct {
	mounts    uint16
	state     uint16
	errors    uint32 // errors the kernel has met since the last check
	lastCheck time.Time
	journal   bool // it must be replayed
	damaged   bool // its own checksum is wrong
}

const (
	superblockAt   = 1024
	superblockSize = 1024
	ext4Magic      = 0xef53
	stateValid     = 1    // EXT4_VALID_FS: unmounted in order, or it has a journal that says so
	stateErrors    = 2    // EXT4_ERROR_FS
	incompatReplay = 4    // EXT4_FEATURE_INCOMPAT_RECOVER
	compatChecksum = 1024 // EXT4_FEATURE_RO_COMPAT_METADATA_CSUM
)

func readSuperblock(r io.ReaderAt) (*superblock, error) {
	b := make([]byte, superblockSize)
	if _, err := r.ReadAt(b, superblockAt); err != nil {
		return nil, fmt.Errorf("read the file system's superblock: %w", err)
	}
	if binary.LittleEndian.Uint16(b[0x38:]) != ext4Magic {
		return nil, errors.New("there is no ext4 file system behind the encryption")
	}
	sum := ^crc32.Checksum(b[:0x3fc], crc32.MakeTable(crc32.Castagnoli))
	return &superblock{
		journal:   binary.LittleEndian.Uint32(b[0x60:])&incompatReplay != 0,
		damaged:   binary.LittleEndian.Uint32(b[0x64:])&compatChecksum != 0 && binary.LittleEndian.Uint32(b[0x3fc:]) != sum,
		mounts:    binary.LittleEndian.Uint16(b[0x34:]),
		state:     binary.LittleEndian.Uint16(b[0x3a:]),
		lastCheck: time.Unix(int64(binary.LittleEndian.Uint32(b[0x40:]))|int64(b[0x277])<<32, 0),
		errors:    binary.LittleEndian.Uint32(b[0x194:]),
	}, nil
}

// needs says what care the file system wants, and why. now is zero while the
// clock is unset: then its age is not judged.
func (s *superblock) needs(now time.Time) (Care, string) {
	switch {
	case s.damaged:
		return CareFull, "the checksum of its superblock is wrong"
	case s.state&stateErrors != 0 || s.errors > 0:
		return CareFull, "the kernel met errors in it"
	case s.mounts >= checkAfterMounts:
		return CareFull, fmt.Sprintf("it was mounted %d times since the last check", s.mounts)
	case !now.IsZero() && now.Sub(s.lastCheck) > checkAfterTime:
		return CareFull, fmt.Sprintf("the last check was on %s", s.lastCheck.UTC().Format(time.DateOnly))
	case s.journal:
		return CareReplay, "it was not unmounted in order"
	case s.state&stateValid == 0:
		return CareFull, "it is not marked clean, and has no journal to replay"
	}
	return CareNone, ""
}

// fsckPrograms is where e2fsck may lie: in the firmware, on Debian.
var fsckPrograms = []string{"/sbin/e2fsck", "/usr/sbin/e2fsck"}

// errUnopened is e2fsck's operational error: it did not get as far as to check.
var errUnopened = errors.New("e2fsck could not open the file system")

type fsck struct {
	log      *slog.Logger
	programs []string
	quiet    time.Duration // the least time between two lines of progress
}

// progressEvery keeps a check that takes hours from filling the log, and one
// that takes seconds from saying anything.
const progressEvery = 10 * time.Second

// find returns where e2fsck lies.
func (c fsck) find() (string, error) {
	for _, p := range c.programs {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", failed(status.ErrorFileSystem, "e2fsck is missing (%s): install e2fsprogs", strings.Join(c.programs, ", "))
}

// run runs e2fsck -p, which repairs only what it can repair without a choice, and
// then what mend repairs; its exit codes: e2fsck(8). corrected says that there
// was more to a full check than a look.
func (c fsck) run(ctx context.Context, node string, full bool, more ...string) (corrected bool, err error) {
	program, err := c.find()
	if err != nil {
		return false, err
	}
	args := []string{"-p", "-C", "3"} // progress on descriptor 3
	if full {
		args = append(args, "-f")
	}
	begin := time.Now()
	said, err := c.call(ctx, program, briefly, append(append(args, more...), node)...)
	if err != nil {
		return false, err
	}
	text := brief(said.text)
	log := c.log.With("took", time.Since(begin).Round(10*time.Millisecond), "full", full)
	switch code := said.code; {
	case code == 0:
		log.Info("the file system is clean", "e2fsck", text)
		return false, nil
	case code >= 1 && code&^3 == 0: // 1: errors corrected; 2: a mounted file system must be rebooted for that
		log.Warn("the file system had errors, which were corrected", "e2fsck", text)
		return full, nil
	case code&4 != 0:
		log.Warn("e2fsck gave up", "e2fsck", text)
		return true, c.mend(ctx, program, node, text)
	case code == 8:
		return false, &failure{status.ErrorFileSystem, fmt.Errorf("%w: %s", errUnopened, text)}
	default:
		return false, failed(status.ErrorFileSystem, "e2fsck ended with code %d: %s", code, text)
	}
}

// answered is how e2fsck ended.
type answered struct {
	code int
	text string // the beginning of what it said
	cut  bool   // it said more
}

// call runs e2fsck and keeps limit bytes of what it says. The error is about the
// call, or ctx's.
func (c fsck) call(ctx context.Context, program string, limit int, args ...string) (answered, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"} // no LANG: it speaks English
	cmd.WaitDelay = 5 * time.Second
	// It dies with this part: the next one would otherwise mount what it still
	// repairs. The kernel ties that to the thread that forks, so this goroutine
	// keeps its thread. What a killed e2fsck leaves is a journal to replay and the
	// same reason to check again.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// e2fsck ends in order when it is interrupted; SIGKILL in the middle of a
	// repair would not harm either, but leaves the journal to be replayed.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	out := limitedText{limit: limit}
	cmd.Stdout, cmd.Stderr = &out, &out
	r, w, err := os.Pipe()
	if err != nil {
		return answered{}, err
	}
	cmd.ExtraFiles = []*os.File{w}
	err = cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return answered{}, fmt.Errorf("start e2fsck: %w", err)
	}
	watched := make(chan struct{})
	go func() { defer close(watched); c.progress(r) }()
	err = cmd.Wait()
	r.Close() // an e2fsck that could not be killed must not keep us
	<-watched
	if ctx.Err() != nil {
		return answered{}, ctx.Err()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return answered{}, fmt.Errorf("e2fsck: %w", err)
	}
	return answered{code: cmd.ProcessState.ExitCode(), text: string(out.text), cut: out.cut}, nil
}

// progress logs e2fsck's progress lines, "PASS CURRENT MAXIMUM DEVICE", now and
// then.
func (c fsck) progress(r io.Reader) {
	lines := bufio.NewScanner(r)
	last := time.Now()
	for lines.Scan() {
		var pass, at, of int
		if n, err := fmt.Sscan(lines.Text(), &pass, &at, &of); n < 3 || err != nil || of <= 0 || time.Since(last) < c.quiet {
			continue
		}
		last = time.Now()
		c.log.Info("checking the file system", "pass", pass, "of", 5, "percent", 100*at/of)
	}
}

// briefly is how much of what e2fsck says is logged and mailed, in bytes.
const briefly = 2000

// brief makes one line of what e2fsck said.
func brief(text string) string {
	line := strings.Join(strings.Fields(text), " ")
	return line[:min(len(line), briefly)]
}

// limitedText keeps the beginning of what a program says.
type limitedText struct {
	text  []byte
	limit int
	cut   bool
}

func (t *limitedText) Write(p []byte) (int, error) {
	room := min(len(p), t.limit-len(t.text))
	t.text = append(t.text, p[:room]...)
	t.cut = t.cut || room < len(p)
	return len(p), nil
}
