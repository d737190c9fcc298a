package generations_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/shared/generations"

	"golang.org/x/sys/unix"
)

// crashFolder tells a copy of the test's program to push there until it is killed.
// With crashOnce it ends after one push.
const (
	crashFolder = "FARKEEP_TEST_CRASH_FOLDER"
	crashOnce   = "FARKEEP_TEST_CRASH_ONCE"
	// With crashExpire it expires generations as well.
	crashExpire = "FARKEEP_TEST_CRASH_EXPIRE"
	// healFolder tells it to heal what is rotten there.
	healFolder = "FARKEEP_TEST_HEAL_FOLDER"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashFolder); dir != "" {
		var err error
		if os.Getenv(crashExpire) != "" {
			err = pushAndExpire(dir)
		} else {
			err = pushDays(dir, os.Getenv(crashOnce) != "")
		}
		if err == nil {
			os.Exit(0)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if dir := os.Getenv(healFolder); dir != "" {
		if err := healOnce(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// dayTree is the repository on one day: something stays, something changes, something goes.
func dayTree(day int64) tree {
	t := tree{}.add("config", "for ever").add("day", fmt.Sprint(day)).add("data/0/big", noise(1000+uint64(day/3), 5<<20))
	for i := max(0, day-10); i <= day; i++ {
		t.add(fmt.Sprintf("data/%d/%d", i/4, i), noise(uint64(i), 1+int(i*7919%90_000)))
	}
	for i := range int64(30) {
		t.add(fmt.Sprintf("small/%d", i), fmt.Sprint(day/(i+1)))
	}
	return t
}

// pushDays pushes day after day and says of each generation when it is there.
func pushDays(dir string, once bool) error {
	ctx := context.Background()
	s, err := generations.Open(dir, generations.Options{Reserve: 1})
	if err != nil {
		return err
	}
	for {
		day := int64(1)
		if newest, err := s.Newest(ctx, "photos"); err == nil {
			if day, err = dayOf(dir, newest.Name); err != nil {
				return err
			}
			day++
		} else if !errors.Is(err, generations.ErrNone) {
			return err
		}
		if err := pushDay(ctx, s, day); err != nil || once {
			return err
		}
	}
}

// dayOf reads which day a generation holds; numbers have gaps where a commit was cut.
func dayOf(dir, name string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(dir, "generations/photos", name, "files/day"))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(string(text), 10, 64)
}

func pushDay(ctx context.Context, s *generations.Store, day int64) error {
	now := dayTree(day)
	var tb testing.B // only its Fatal could be called, and then this process may die
	list, offer := now.manifest(&tb)
	answer, tx, err := s.Begin(ctx, generations.Request{Repository: "photos", Offer: offer, Pusher: "home"})
	if err != nil {
		return err
	}
	if tx == nil {
		return fmt.Errorf("day %d is there already", day)
	}
	defer tx.Close()
	if answer.Needed == nil {
		if answer, err = tx.TakeManifest(ctx, strings.NewReader(string(list))); err != nil {
			return err
		}
	}
	if _, err := tx.Upload(ctx, func(w io.Writer) error { return now.write(w, answer) }); err != nil {
		return err
	}
	name, err := tx.Commit(ctx)
	if err == nil {
		fmt.Println(name)
	}
	return err
}

// crasher is a process that pushes until it is killed.
type crasher struct {
	cmd   *exec.Cmd
	names chan string // generations that it said are there
}

func startCrasher(tb testing.TB, dir string, env ...string) *crasher {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(append(os.Environ(), crashFolder+"="+dir), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	c := &crasher{cmd: cmd, names: make(chan string, 10_000)}
	go func() {
		defer close(c.names)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			c.names <- lines.Text()
		}
	}()
	return c
}

// said takes what the process has said so far; all takes it to the end.
func (c *crasher) said() (names []string) {
	for {
		select {
		case name, ok := <-c.names:
			if !ok {
				return names
			}
			names = append(names, name)
		default:
			return names
		}
	}
}

// await takes what the process says up to a line that begins so.
func (c *crasher) await(tb testing.TB, prefix string) (names []string) {
	tb.Helper()
	limit := time.After(2 * time.Minute)
	for {
		select {
		case name, ok := <-c.names:
			if !ok {
				tb.Fatal("the pushing process ended by itself")
			}
			if names = append(names, name); strings.HasPrefix(name, prefix) {
				return names
			}
		case <-limit:
			tb.Fatalf("the pushing process does not say %q", prefix)
		}
	}
}

func (c *crasher) kill(tb testing.TB) (names []string) {
	tb.Helper()
	if err := c.cmd.Process.Kill(); err != nil {
		tb.Errorf("the pushing process ended by itself: %v", err)
	}
	for name := range c.names {
		names = append(names, name)
	}
	var exit *exec.ExitError
	if err := c.cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		tb.Errorf("the pushing process ended by itself: %v", err)
	}
	return names
}

// checkHistory checks from outside that the generations that are there are what was
// pushed, the last most of them byte by byte, and that those which were said to be
// there are. It returns the last day.
func checkHistory(tb testing.TB, dir string, said []string, most int64) (last int64) {
	tb.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "generations/photos"))
	if err != nil && len(said) > 0 {
		tb.Fatal(err)
	}
	there := map[string]bool{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		there[e.Name()] = true
		if _, _, err := generations.ParseName(e.Name()); err != nil {
			tb.Error(err)
			continue
		}
		day, err := dayOf(dir, e.Name())
		if err != nil {
			tb.Error(err)
			continue
		}
		if day != last+1 {
			tb.Errorf("after day %d comes day %d", last, day)
		}
		last = day
		if day > int64(len(entries))-most {
			compare(tb, dir, "photos", e.Name(), dayTree(day))
		}
	}
	for _, name := range said {
		if !there[name] {
			tb.Errorf("generation %s was committed and is gone", name)
		}
	}
	return last
}

// Killed at any instant, a push leaves every generation as it was, and the next
// one goes on.
func TestKilledAtAnyInstant(t *testing.T) {
	const kills = 30
	dir := t.TempDir()
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	var said []string
	for i := range kills {
		c := startCrasher(t, dir)
		if i%5 == 0 { // on a busy machine too it gets somewhere
			said = append(said, c.await(t, "")...)
		}
		time.Sleep(time.Duration(r.Int64N(int64(250 * time.Millisecond)))) // the instant is what is random here
		said = append(said, c.kill(t)...)
	}
	n := checkHistory(t, dir, said, 1000)
	t.Logf("%d kills, %d generations", kills, n)
	if n < 2 {
		t.Errorf("only %d generations were made: the test proves little", n)
	}
	// Nothing is left behind once a push goes through.
	s := open(t, dir, generations.Options{})
	push(t, s, "photos", dayTree(n+1))
	left, err := os.ReadDir(filepath.Join(dir, "incoming/photos"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in incoming/: %v, %v", left, err)
	}
}

// tool runs a program that the test needs.
func tool(tb testing.TB, pkg, name string, args ...string) string {
	tb.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s %s (package %s): %v\n%s", name, strings.Join(args, " "), pkg, err, out)
	}
	return strings.TrimSpace(string(out))
}

// unmount unmounts an image that "mount -o loop" has mounted, and waits until the
// kernel has let go of it: a process that began a mount namespace in the meantime, as
// tests of other packages do, holds it a moment longer.
func unmount(t *testing.T, disk, image string) {
	t.Helper()
	if err := unix.Unmount(disk, 0); err != nil {
		t.Fatal("unmount: ", err)
	}
	for limit := time.Now().Add(2 * time.Minute); tool(t, "mount", "losetup", "--associated", image) != ""; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%s is unmounted, and yet the kernel holds it", image)
		}
	}
}

// A power cut leaves what had reached the disk at that instant, and no more. The
// disk here is an ext4 image behind a loop device. The pushing process is
// stopped, and the image is copied while nothing is written to it, which the
// device's counters show; what was only in memory is not in the copy. The copy is
// then mounted as after a cut. Instants within a system call are not seen this
// way: the emulated appliance's tests cut those.
func TestPowerCutAtAnyInstant(t *testing.T) {
	var last int64
	kept := 0
	cutPower(t, 10, "0", nil, func(image string, said []string) {
		day, some := afterCut(t, image, said)
		last = day
		if some {
			kept++
		}
	})
	t.Logf("%d days, %d times something of the upload was kept", last, kept)
	if last < 2 {
		t.Errorf("only %d generations were made: the test proves little", last)
	}
}

// cutPower runs a crasher and hands copies of its disk, as so many power cuts
// would leave it, to check, with all that the crasher had said. Every other cut
// comes after it said something that begins with await, if that is not empty.
func cutPower(t *testing.T, cuts int, await string, env []string, check func(image string, said []string)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test makes and mounts a file system: run it as root")
	}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 2))
	t.Logf("seed %d, %d cuts", seed, cuts)
	dir := t.TempDir()
	image, disk := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Truncate(image, 512<<20), os.Mkdir(disk, 0o700)); err != nil {
		t.Fatal(err)
	}
	tool(t, "e2fsprogs", "mke2fs", "-q", "-t", "ext4", "-J", "size=8", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
	loop := tool(t, "mount", "losetup", "--find", "--show", image)
	t.Cleanup(func() { tool(t, "mount", "losetup", "--detach", loop) })
	// The journal is committed when somebody syncs, not by a timer: what the
	// store forgets to sync is missing after the cut.
	if err := unix.Mount(loop, disk, "ext4", 0, "commit=300"); err != nil {
		t.Fatal("mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error("unmount: ", err)
		}
	})
	writes := func() string {
		stat, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop), "stat"))
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(string(stat)) // Documentation/block/stat.rst: 5 writes done, 9 in flight
		if f[8] != "0" {
			return "busy"
		}
		return f[4]
	}

	c := startCrasher(t, disk, env...)
	defer c.kill(t)
	var said []string
	for i := range cuts {
		if await != "" && i%2 == 0 {
			said = append(said, c.await(t, await)...)
			time.Sleep(time.Duration(r.Int64N(int64(100 * time.Millisecond)))) // the instant is what is random here
		} else {
			time.Sleep(100*time.Millisecond + time.Duration(r.Int64N(int64(300*time.Millisecond))))
		}
		if err := c.cmd.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		said = append(said, c.said()...)
		copied := filepath.Join(dir, fmt.Sprint("copy-", i)) // never one that somebody might still hold
		for before := ""; before == "" || before == "busy" || before != writes(); {
			before = writes()
			tool(t, "coreutils", "cp", "--sparse=always", image, copied)
		}
		check(copied, said)
		if t.Failed() {
			break
		}
		if err := os.Remove(copied); err != nil {
			t.Fatal(err)
		}
		if err := c.cmd.Process.Signal(unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
}

// afterCut mounts what a power cut left, checks it, and pushes on.
func afterCut(t *testing.T, image string, said []string) (last int64, kept bool) {
	t.Helper()
	disk := t.TempDir()
	tool(t, "mount", "mount", "-o", "loop", image, disk)
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(disk, unix.MNT_DETACH)
		}
	}()
	last = checkHistory(t, disk, said, 5)
	s, err := generations.Open(disk, generations.Options{Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	next := dayTree(last + 1)
	answer, tx, err := begin(t, s, "photos", next)
	if err != nil {
		t.Fatal(err)
	}
	kept = answer.Kept > 0 || len(answer.Resume) > 0
	if _, err := upload(t, tx, next, answer, -1); err != nil {
		t.Error(err)
	} else if name, err := tx.Commit(t.Context()); err != nil {
		t.Error(err)
	} else {
		compare(t, disk, "photos", name, next)
	}
	tx.Close()
	s.Close()
	unmount(t, disk, image)
	mounted = false
	tool(t, "e2fsprogs", "e2fsck", "-fn", image)
	return last, kept
}
