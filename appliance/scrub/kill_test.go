package scrub_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/appliance/scrub"
	"farkeep/shared/generations"

	"golang.org/x/sys/unix"
)

// scrubFolder tells a copy of the test's program to scrub the store there until a
// round ended, on a clock that each file moves by ten seconds, and to print the
// inode of each file that it read.
const scrubFolder = "FARKEEP_TEST_SCRUB_FOLDER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(scrubFolder); dir != "" {
		if err := scrubUntilDone(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func scrubUntilDone(dir string) error {
	begun := time.Now()
	var moved atomic.Int64
	now := func() time.Time { return begun.Add(time.Duration(moved.Load())) }
	s, err := generations.Open(dir, generations.Options{Reserve: 1, Now: now})
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	err = scrub.Run(ctx, scrub.Config{
		Store: s, Every: every, Now: now,
		Sleep: func(ctx context.Context, d time.Duration) error {
			moved.Add(int64(d))
			return ctx.Err()
		},
		Reader: func(f *os.File) io.Reader {
			moved.Add(int64(10 * time.Second))
			return &printing{f}
		},
		Report: func(p scrub.Progress) {
			if !p.Running && !p.LastFull.IsZero() {
				cancel()
			}
		},
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// printing prints the inode of a file that was read to its end.
type printing struct{ *os.File }

func (p *printing) Read(b []byte) (int, error) {
	n, err := p.File.Read(b)
	if err == io.EOF {
		var st unix.Stat_t
		if unix.Fstat(int(p.Fd()), &st) == nil {
			fmt.Println(st.Ino)
		}
	}
	return n, err
}

// TestKilled: killed at random instants the scrub goes on, reads everything, finds
// what is rotten, and repeats no more than a batch and a checkpoint's time.
func TestKilled(t *testing.T) {
	b := newBench(t)
	photos, _ := b.history()
	b.damage(b.path("photos", photos[2], "files/data/2/11"), func(d []byte) []byte { d[77] ^= 2; return d })
	b.store.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var said strings.Builder
	killed := 0
	for try := 0; ; try++ {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), scrubFolder+"="+b.dir)
		var diagnostics strings.Builder
		cmd.Stdout, cmd.Stderr = &said, &diagnostics
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if try < 10 {
			time.AfterFunc(time.Duration(10+random.IntN(150))*time.Millisecond, func() { cmd.Process.Signal(unix.SIGKILL) })
		}
		err := cmd.Wait()
		if err == nil {
			break
		}
		if diagnostics.Len() > 0 {
			t.Fatal(diagnostics.String())
		}
		killed++
	}
	t.Log("killed ", killed)
	read := map[string]int{}
	for line := range strings.Lines(said.String()) {
		read[strings.TrimSpace(line)]++
	}
	for ino := range b.inodes() {
		if n := read[fmt.Sprint(ino)]; n == 0 || n > killed+2 { // the healing looks once more
			t.Errorf("inode %d was read %d times", ino, n)
		}
	}
	b.open()
	b.want("photos/data/2/11: 1 2 3")
}
