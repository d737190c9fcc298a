package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/benchtest"
	"farkeep/shared/linetest"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"golang.org/x/sys/unix"
)

// The bench of docs/performance.md: all that one would take in place of Farkeep, on
// the same data and over the same lines, in turns. Each copy is compared with its
// source by b2sum; a wrong one fails the bench, a slow one does not.
//
// BenchmarkLine is the whole of it, half an hour; TestLine the same with next to no
// data, so that it cannot rot.

// An undertaking is some cases on the same data, over some lines.
type undertaking struct {
	name string // the case's, where it is one
	// data makes the states in dir. What comes first is seeded, unmeasured and
	// without a line between, unless there is but one; the others are the steps.
	data   func(b testing.TB, dir string) []state
	seeded int
	steps  []step
	lines  []benchtest.Line
	rounds int
	once   []benchtest.Line // of lines: one round
	rivals []string
	// keep says that mirrors live on through all rounds and lines: nothing changes.
	keep bool
	// size describes the data.
	size string
	// slow are rivals that have their turn in the first round alone.
	slow []string
}

// A step brings a state over; its name is a case of the table.
type step struct {
	name  string
	state int
}

const (
	firstPush  = "First push"
	noChange   = "No change, 100,000 files"
	smallFiles = "500 files of 20 KB"
	normalDay  = "A normal day"
	compaction = "A compaction day"
	idleDay    = "No change, a Borg repository"
)

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// plan is what "make bench" does. Sizes and rounds are such that it takes little more
// than half an hour. Where the line is the limit, a few seconds of it tell as much as
// minutes; and rivals that wait for the line, packet by packet or file by file, have
// one turn with little data, or none.
func plan() (all []undertaking) {
	var (
		patient  = []string{"rclone sftp", "restic copy", "Borg-in-Borg"}
		everyone = []string{"rsync", "rsync aes128-gcm", "rclone sftp", "restic copy", "Borg-in-Borg", "Farkeep"}
		quick    = []string{"rsync", "rsync aes128-gcm", "Farkeep"}
	)
	first := func(mib, rounds int, names, slow []string, lines ...benchtest.Line) {
		all = append(all, undertaking{
			name: firstPush, size: fmt.Sprintf("%d MiB", mib), rounds: rounds, rivals: names, slow: slow, lines: lines,
			data:  func(b testing.TB, dir string) []state { return []state{makeFirst(b, dir, mib)} },
			steps: []step{{firstPush, 0}},
		})
	}
	first(512, 5, everyone, nil, benchtest.Line{})
	first(128, 3, quick, nil, benchtest.Line{RoundTrip: ms(40)}, benchtest.Line{RoundTrip: ms(150)}, benchtest.Line{RoundTrip: ms(150), Mbit: 100})
	first(32, 3, everyone, patient, benchtest.Line{Mbit: 100}, benchtest.Line{RoundTrip: ms(40), Mbit: 100})
	first(8, 3, everyone, patient, benchtest.Line{Mbit: 20}, benchtest.Line{RoundTrip: ms(40), Mbit: 20}, benchtest.Line{RoundTrip: ms(150), Mbit: 20})

	all = append(all, undertaking{
		name: noChange, size: "100,000 files", rounds: 5, keep: true, seeded: 1,
		rivals: []string{"rsync", "rsync --no-inc-recursive", "rclone sftp", "Farkeep"}, slow: patient,
		lines: []benchtest.Line{{}, {RoundTrip: ms(40)}, {RoundTrip: ms(40), Mbit: 20}, {RoundTrip: ms(150), Mbit: 100}},
		once:  []benchtest.Line{{RoundTrip: ms(40), Mbit: 20}, {RoundTrip: ms(150), Mbit: 100}},
		data: func(b testing.TB, dir string) []state {
			makeMany(b, dir, 100_000)
			return []state{plain(b, dir)}
		},
		steps: []step{{noChange, 0}},
	})
	small := func(names []string, lines ...benchtest.Line) {
		all = append(all, undertaking{
			name: smallFiles, size: "10 MB", rounds: 5, rivals: names, slow: patient, lines: lines,
			data: func(b testing.TB, dir string) []state {
				makeSmall(b, dir)
				return []state{plain(b, dir)}
			},
			steps: []step{{smallFiles, 0}},
		})
	}
	small([]string{"rsync", "rsync aes128-gcm", "rclone sftp", "Farkeep"}, benchtest.Line{})
	small(quick, benchtest.Line{RoundTrip: ms(40)}, benchtest.Line{RoundTrip: ms(150)}, benchtest.Line{RoundTrip: ms(40), Mbit: 20}, benchtest.Line{RoundTrip: ms(150), Mbit: 100})

	days := undertaking{
		name: "days", size: "60 MB household", rounds: 3, seeded: 1,
		rivals: []string{"rsync", "rsync --fuzzy", "rclone sftp", "restic copy", "Borg-in-Borg", "Farkeep"},
		data:   func(b testing.TB, dir string) []state { return makeDays(b, dir, 12, &family{}) },
		steps:  []step{{normalDay, 1}, {compaction, 2}, {idleDay, 2}},
	}
	for _, mbit := range []int64{0, 100, 20} {
		for _, rtt := range []int{0, 40, 150} {
			line := benchtest.Line{RoundTrip: ms(rtt), Mbit: mbit}
			days.lines = append(days.lines, line)
			if mbit > 0 || rtt > 40 {
				days.once = append(days.once, line)
			}
		}
	}
	return append(all, days)
}

// BenchmarkLine writes its table and its plots into the folder that FARKEEP_BENCH
// names, and with FARKEEP_DOCS=write the table into docs/performance.md.
// For a try, FARKEEP_BENCH_ROUNDS bounds the rounds, and FARKEEP_BENCH_ONLY, a
// regular expression, says which undertakings: "First push", "days".
func BenchmarkLine(b *testing.B) {
	all := plan()
	if text, short := os.LookupEnv("FARKEEP_BENCH_ROUNDS"); short {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			b.Fatalf("FARKEEP_BENCH_ROUNDS=%q is no number of rounds", text)
		}
		for i := range all {
			all[i].rounds = min(all[i].rounds, n)
		}
	}
	if text, some := os.LookupEnv("FARKEEP_BENCH_ONLY"); some {
		only, err := regexp.Compile(text)
		must(b, err)
		all = slices.DeleteFunc(all, func(u undertaking) bool { return !only.MatchString(u.name) })
	}
	into := cmp.Or(os.Getenv("FARKEEP_BENCH"), b.TempDir())
	must(b, os.MkdirAll(into, 0o755))
	var table measured
	for b.Loop() {
		// What was measured stays when the rest is not waited for.
		table = compareOverLines(b, all, func(sofar *benchtest.Table) {
			must(b, sofar.Save(func(name string) (io.WriteCloser, error) { return os.Create(filepath.Join(into, name)) }))
		})
	}
	b.ReportMetric(0, "ns/op") // everyone's together
	b.Logf("table.md, table.csv and the plots are in %s", into)
	if os.Getenv("FARKEEP_DOCS") == "write" {
		must(b, document(table, filepath.Join("..", "docs", "performance.md")))
	}
}

// TestLine is the bench with next to no data: every rival, every case.
func TestLine(t *testing.T) {
	all := plan()
	small := []benchtest.Line{{}, {RoundTrip: ms(2), Mbit: 1000}}
	one := func(b testing.TB, dir string) []state {
		must(b, os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644))
		return []state{plain(b, dir)}
	}
	seen := map[string]bool{}
	all = slices.DeleteFunc(all, func(u undertaking) bool {
		defer func() { seen[u.name] = true }()
		return seen[u.name]
	})
	for i := range all {
		u := &all[i]
		u.rounds, u.slow = 1, nil
		switch u.name {
		case firstPush:
			u.lines, u.size = small[:1], "1 MiB"
			u.data = func(b testing.TB, dir string) []state { return []state{makeFirst(b, dir, 1)} }
		case noChange:
			u.lines, u.size = small, "1 file"
			u.data = one
		case smallFiles:
			u.lines, u.size = small[1:], "1 file"
			u.data = one
		default:
			u.lines = small[1:]
			u.data = func(b testing.TB, dir string) []state { return makeDays(b, dir, 1, &single{}) }
		}
	}
	saved := 0
	table := compareOverLines(t, all, func(*benchtest.Table) { saved++ })
	if saved != len(all) {
		t.Errorf("the table was saved %d times, want %d", saved, len(all))
	}
	var text strings.Builder
	must(t, table.Markdown(&text))
	for _, want := range []string{firstPush, noChange, smallFiles, normalDay, compaction, idleDay, "restic", "borg", "rclone", "OpenSSH"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the table does not mention %q", want)
		}
	}
	if text := promises(table); strings.Count(text, "\n") != 9 || !strings.Contains(text, "not in this run") || !strings.Contains(text, "| yes |") {
		t.Errorf("what was asked for:\n%s", text)
	}
	for name := range rivals() {
		if !strings.Contains(text.String(), "| "+name+" |") {
			t.Errorf("%s had no turn", name)
		}
	}
	page := filepath.Join(t.TempDir(), "page.md")
	must(t, os.WriteFile(page, []byte("before\n"+docsBegin+"\nold\n"+docsEnd+"\nafter\n"), 0o644))
	must(t, document(table, page))
	got, err := os.ReadFile(page)
	must(t, err)
	if !strings.HasPrefix(string(got), "before\n"+docsBegin+"\n\n- ") || !strings.HasSuffix(string(got), "|\n\n"+docsEnd+"\nafter\n") || strings.Contains(string(got), "old\n") {
		t.Errorf("the page is now\n%s", got)
	}
	must(t, os.WriteFile(page, []byte("nothing\n"), 0o644))
	if err := document(table, page); err == nil {
		t.Error("a page without a place for the table was written")
	}
	// The real page has the place.
	real, err := os.ReadFile(filepath.Join("..", "docs", "performance.md"))
	must(t, err)
	must(t, os.WriteFile(page, real, 0o644))
	must(t, document(table, page))
}

const (
	docsBegin = "<!-- what make bench wrote begins -->"
	docsEnd   = "<!-- what make bench wrote ends -->"
)

// document replaces what stands between the two marks of a page.
func document(table measured, page string) error {
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, rest, begins := bytes.Cut(old, []byte(docsBegin))
	_, after, ends := bytes.Cut(rest, []byte(docsEnd))
	if !begins || !ends {
		return fmt.Errorf("%s has no place for the table, between %q and %q", page, docsBegin, docsEnd)
	}
	var text bytes.Buffer
	fmt.Fprintf(&text, "%s%s\n\n", before, docsBegin)
	if err := table.Markdown(&text); err != nil {
		return err
	}
	fmt.Fprintf(&text, "\n### What was asked for\n\n%s\n%s%s", promises(table), docsEnd, after)
	return os.WriteFile(page, text.Bytes(), 0o644)
}

// measured is a table, and how many bytes a login to the appliance takes, both ways.
type measured struct {
	*benchtest.Table
	login int64
}

// A lineBench is two machines on one: what pushes, and what takes in.
type lineBench struct {
	testing.TB
	home      string // memory: sources, and what programs remember
	away      string // an ext4: what is behind sshd
	appliance *benchAppliance
	sshd      *benchSSHD
	rivals    map[string]rival
	cables    map[benchtest.Line]*cable
	table     *benchtest.Table
	mirrors   int
	begun     time.Time
}

func compareOverLines(b testing.TB, all []undertaking, after func(sofar *benchtest.Table)) measured {
	b.Helper()
	dir := benchDir(b)
	l := &lineBench{TB: b, home: filepath.Join(dir, "home"), away: filepath.Join(dir, "away"), rivals: rivals(), cables: map[benchtest.Line]*cable{}, begun: time.Now()}
	l.table = &benchtest.Table{Own: "Farkeep", Notes: machine(b)}
	mountTmpfs(b, l.home, "8g")
	mountExt4(b, l.away, 4<<10)
	buildPrograms(b, dir, "pusher", "appliance")
	l.appliance = startApplianceOn(b, dir, filepath.Join(dir, "farkeep-appliance"), func(disk string) { mountExt4(b, disk, 6<<10) }, settings.History{})
	l.sshd = startSSHD(b, dir)
	up, down := l.login()
	l.table.Notes = append(l.table.Notes, fmt.Sprintf("A login to the appliance, and nothing else, takes %d bytes up and %d down of what Farkeep sends below.", up, down))
	for i, u := range all {
		l.undertake(u, filepath.Join(l.home, fmt.Sprint("data-", i)))
		after(l.table)
	}
	return measured{l.table, up + down}
}

// login is how many bytes it takes to be let in.
func (l *lineBench) login() (up, down int64) {
	l.Helper()
	p := linetest.Start(l, l.appliance.address(), linetest.Line{})
	c, err := sshverb.Dial(l.Context(), sshverb.Peer{Address: p.Addr(), User: "farkeep", Identity: l.appliance.identity(l), HostKey: l.appliance.pinned(l)})
	must(l, err)
	c.Close()
	await(l, "the login is over", func() bool {
		u, d := p.Sent()
		done := u > 0 && u == up && d == down // nothing came since the look before
		up, down = u, d
		return done
	})
	return up, down
}

// promises is what the table says about each figure that Farkeep is to reach.
func promises(t measured) string {
	wall := func(c benchtest.Cost) float64 { return c.Wall.Seconds() }
	processor := func(c benchtest.Cost) float64 { return c.CPU().Seconds() }
	sent := func(c benchtest.Cost) float64 { return float64(c.Up + c.Down) }
	near, far, long := benchtest.Line{}, benchtest.Line{RoundTrip: ms(40)}, benchtest.Line{RoundTrip: ms(150), Mbit: 100}
	var text strings.Builder
	text.WriteString("| figure | asked | measured | reached |\n|---|---|---|---|\n")
	row := func(figure, asked, format string, v benchtest.Spread, reached bool) {
		if v == (benchtest.Spread{}) {
			fmt.Fprintf(&text, "| %s | %s | not in this run | |\n", figure, asked)
			return
		}
		answer := map[bool]string{true: "yes", false: "**no**"}[reached]
		fmt.Fprintf(&text, "| %s | %s | "+format+" ("+format+" to "+format+") | %s |\n", figure, asked, v.Median, v.Least, v.Most, answer)
	}
	atMost := func(figure string, limit float64, v benchtest.Spread) {
		row(figure, fmt.Sprintf("at most %.2f", limit), "%.3f", v, v.Median <= limit)
	}
	// The least favourable of the ratios to several rivals: that to the best of them.
	best := func(name string, line benchtest.Line, of func(benchtest.Cost) float64, rivals ...string) (v benchtest.Spread) {
		for _, r := range rivals {
			if ratio := t.Ratio(name, line, r, of); ratio.Median > v.Median {
				v = ratio
			}
		}
		return v
	}
	atMost("First push, no delay: time, of rsync's best cipher (1.25 times its speed)", 0.80, t.Ratio(firstPush, near, "rsync aes128-gcm", wall))
	atMost("First push, no delay: CPU on both sides, of the same", 1, t.Ratio(firstPush, near, "rsync aes128-gcm", processor))
	atMost("100,000 files unchanged, no delay: of rsync's best time", 0.50, best(noChange, near, wall, "rsync", "rsync --no-inc-recursive"))
	atMost("100,000 files unchanged, 40 ms: of plain rsync's time", 0.10, t.Ratio(noChange, far, "rsync", wall))
	own := t.Of(noChange, near, "Farkeep", func(c benchtest.Cost) float64 { return sent(c) - float64(t.login) })
	row(fmt.Sprintf("100,000 files unchanged: bytes, both ways, beyond SSH's own login of %d", t.login), "under 2,000", "%.0f", own, own.Median < 2000)
	atMost("500 files of 20 KB, 40 ms: of rsync's best time", 0.40, best(smallFiles, far, wall, "rsync", "rsync aes128-gcm"))
	full := t.Of(firstPush, long, "Farkeep", func(c benchtest.Cost) float64 { return float64(c.Up) / c.Wall.Seconds() / (100e6 / 8) })
	row("First push, 150 ms and 100 Mbit/s: of the line, from the program's start to its end", "over 0.85", "%.3f", full, full.Median > 0.85)
	return text.String()
}

func (l *lineBench) cable(line benchtest.Line) *cable {
	if l.cables[line] == nil {
		l.cables[line] = newCable(l, line, l.appliance, l.sshd)
	}
	return l.cables[line]
}

// A contest is one rival's part in an undertaking.
type contest struct {
	rival
	dir    string // its own copy of the states
	states []state
	mirror mirror
}

func (l *lineBench) undertake(u undertaking, dir string) {
	l.Helper()
	made := filepath.Join(dir, "made")
	must(l, os.MkdirAll(made, 0o755))
	states := u.data(l, made)
	var all []*contest
	for i, name := range u.rivals {
		c := &contest{rival: l.rivals[name], dir: filepath.Join(dir, fmt.Sprint("rival-", i)), states: states}
		if len(states) > 1 {
			// What stays the same from state to state keeps its inode: cp -a keeps links.
			if out, err := exec.Command("cp", "-a", made, c.dir).CombinedOutput(); err != nil {
				l.Fatalf("cp: %v\n%s", err, out)
			}
		}
		all = append(all, c)
	}
	for _, line := range u.lines {
		rounds := u.rounds
		if slices.Contains(u.once, line) {
			rounds = 1
		}
		for round := range rounds {
			for i := range all {
				// Another one begins each round: none is always the one after the break.
				c := all[(round+i)%len(all)]
				if round > 0 && slices.Contains(u.slow, c.name) {
					continue
				}
				l.turn(u, c, line, round)
			}
		}
	}
	for _, c := range all {
		if c.mirror != nil {
			c.mirror.same(l, states[len(states)-1])
			c.mirror.remove(l)
		}
	}
	must(l, os.RemoveAll(dir))
}

// turn is one rival's round.
func (l *lineBench) turn(u undertaking, c *contest, line benchtest.Line, round int) {
	l.Helper()
	m := c.mirror
	if m == nil {
		m = c.open(l, l.places())
		for i := range u.seeded {
			c.in(l, i, func(s state) {
				if copied, ok := m.(seeder); ok {
					copied.seed(l, s)
				} else {
					m.push(l, l.cable(benchtest.Line{}), s)
				}
			})
		}
		if u.keep {
			c.mirror = m
		}
	}
	for _, step := range u.steps {
		settle(l, l.away, l.appliance.paths.Disk())
		c.in(l, step.state, func(s state) {
			took := m.push(l, l.cable(line), s)
			l.table.Add(benchtest.Run{Case: step.name, Line: line, Rival: c.name, Data: u.size, Round: round, Cost: took})
			// At once: a benchmark's log is shown at its end.
			fmt.Fprintf(os.Stderr, "%5.0f s: %s, %s, round %d: %s %.2f s\n", time.Since(l.begun).Seconds(), step.name, line, round+1, c.name, took.Wall.Seconds())
		})
		if !u.keep {
			m.same(l, c.states[step.state])
		}
	}
	if !u.keep {
		m.remove(l)
	}
}

// in has the state where the rival's repository always is. A folder's files keep
// inodes and times when it is renamed.
func (c *contest) in(b testing.TB, i int, do func(s state)) {
	b.Helper()
	s := c.states[i]
	if len(c.states) == 1 {
		do(s)
		return
	}
	for _, folder := range []*string{&s.folder, &s.restic} {
		from := filepath.Join(c.dir, filepath.Base(*folder))
		stem, _, _ := strings.Cut(filepath.Base(*folder), "-")
		*folder = filepath.Join(c.dir, stem)
		must(b, os.Rename(from, *folder))
		defer func() { must(b, os.Rename(*folder, from)) }()
	}
	do(s)
}

func (l *lineBench) places() places {
	l.mirrors++
	name := fmt.Sprint("mirror-", l.mirrors)
	at := places{
		repository: name, target: filepath.Join(l.away, name), appliance: l.appliance,
		memory: filepath.Join(l.home, name), scratch: filepath.Join(l.home, "scratch"),
	}
	must(l, os.Mkdir(at.memory, 0o700))
	return at
}

// machine says what the numbers were made on.
func machine(b testing.TB) []string {
	b.Helper()
	first := func(args ...string) string {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			b.Fatalf("%s: %v\n%s", args, err, out)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		return strings.Join(strings.Fields(line), " ")
	}
	processor := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(name) == "model name" {
				processor = strings.TrimSpace(value)
				break
			}
		}
	}
	var system unix.Utsname
	must(b, unix.Uname(&system))
	var memory unix.Sysinfo_t
	must(b, unix.Sysinfo(&memory))
	commit := "not committed"
	if out, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil {
		commit = strings.TrimSpace(string(out))
	}
	return []string{
		fmt.Sprintf("Machine: %s, %d cores, %d GiB, Linux %s.", processor, runtime.NumCPU(), (memory.Totalram*uint64(memory.Unit)+1<<29)>>30, unix.ByteSliceToString(system.Release[:])),
		fmt.Sprintf("Programs: Farkeep %s with %s; %s; %s; %s; %s; %s.", commit, runtime.Version(),
			first("rsync", "--version"), first("ssh", "-V"), first("rclone", "version"), first("restic", "version"), first("borg", "--version")),
		fmt.Sprintf("Made on %s.", time.Now().UTC().Format("2 January 2006")),
	}
}
