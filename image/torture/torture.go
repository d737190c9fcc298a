// Package torture breaks an appliance again and again while it works, and looks
// from outside whether it kept its promises.
//
// Two benches. [Kill] runs the whole appliance as a service of this machine
// (package service), lets the real pusher push real Borg repositories and plain
// files to it and OpenSSH's sftp upload and commit, and kills its processes at random instants; in between it fills
// the disk, makes it fail and makes it read-only. [Cut] boots the image that a
// user would flash on an emulated machine, whose disk loses what it had not been
// told to flush when the power is cut (package faulty), and fails and vanishes
// at will.
//
// After each misfortune: the appliance comes back by itself; every generation
// that was committed is what it was, name by name and bit by bit, but for those
// that the policy let go (package witness); the push that was interrupted goes
// through; nothing besides the generations has grown; and e2fsck finds nothing.
//
// Everything random is drawn from one seed, which is printed. The same seed
// draws the same misfortunes in the same order; at which system call they hit is
// the machine's.
package torture

import (
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Options say how to torture.
type Options struct {
	Seed  uint64
	Dir   string       // an empty folder that other users may enter
	Bin   string       // the folder with the programs
	Out   io.Writer    // what happens, line by line
	Log   io.Writer    // what the appliance says
	Stage *slog.Logger // of the emulator; may be nil
}

// Figures are what came out, as a table's rows in the order in which they were
// first counted.
type Figures struct {
	names  []string
	counts map[string]int
	times  map[string][]time.Duration
}

// Add counts n more of what.
func (f *Figures) Add(what string, n int) {
	if f.counts == nil {
		f.counts = map[string]int{}
	}
	f.row(what)
	f.counts[what] += n
}

// Set notes a number.
func (f *Figures) Set(what string, n int) {
	f.Add(what, n-f.Count(what))
}

// Count is how many of what there were.
func (f *Figures) Count(what string) int { return f.counts[what] }

// Took notes how long something took.
func (f *Figures) Took(what string, d time.Duration) {
	if f.times == nil {
		f.times = map[string][]time.Duration{}
	}
	f.row(what)
	f.times[what] = append(f.times[what], d)
}

func (f *Figures) row(what string) {
	if !slices.Contains(f.names, what) {
		f.names = append(f.names, what)
	}
}

// String is the table.
func (f *Figures) String() string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	for _, name := range f.names {
		if all := slices.Clone(f.times[name]); len(all) > 0 {
			slices.Sort(all)
			fmt.Fprintf(w, "%s\tmedian %.1f s, most %.1f s\n", name, all[len(all)/2].Seconds(), all[len(all)-1].Seconds())
			continue
		}
		fmt.Fprintf(w, "%s\t%d\n", name, f.counts[name])
	}
	w.Flush()
	return out.String()
}

// draw is a source of random choices of its own for each purpose, so that one
// more choice here does not change all the others.
func draw(seed uint64, purpose uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, purpose)) }

// pick draws one of all, by weight.
func pick[T any](r *rand.Rand, all []weighted[T]) T {
	total := 0
	for _, w := range all {
		total += w.weight
	}
	n := r.IntN(total)
	for _, w := range all {
		if n -= w.weight; n < 0 {
			return w.value
		}
	}
	return all[0].value
}

type weighted[T any] struct {
	weight int
	value  T
}

// within draws a duration below d.
func within(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
