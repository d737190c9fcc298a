package diskuse_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"farkeep/image/diskuse"
	"farkeep/shared/retention"
)

const day = 24 * time.Hour

// policies are those of the table and of the plot in docs/retention.md. All stand
// on the default floor.
var policies = []struct {
	name   string
	policy retention.Policy
	colour string // of the line in the plot; "" for none
}{
	{"nothing but the floor (`floor_only`)", retention.Policy{}, "#777777"},
	{"`within = \"10d\"`, `weekly = 4`", retention.Policy{Within: 10 * day, Weekly: 4}, ""},
	{"`daily = 7`, `weekly = 4`, `monthly = 6`", retention.Policy{Daily: 7, Weekly: 4, Monthly: 6}, "#0a7d33"},
	{"**default**: `within = \"10d\"`, `weekly = 4`, `monthly = 12`, `yearly = -1`", retention.Policy{Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1}, "#1257c2"},
	{"`daily = 30`", retention.Policy{Daily: 30}, ""},
	{"`daily = 30`, `monthly = 12`", retention.Policy{Daily: 30, Monthly: 12}, "#b06000"},
	{"`within = \"90d\"`, `monthly = 12`", retention.Policy{Within: 90 * day, Monthly: 12}, "#8e2bb0"},
	{"every night for ever: `daily = -1`", retention.Policy{Daily: -1}, "#c0182b"},
}

func rules(p retention.Policy) retention.Rules {
	return retention.Rules{Policy: p, Floor: retention.Floor{Generations: 7, Age: 14 * day}, PerDay: 8}
}

// TestFigures keeps the table and the plot of docs/retention.md what the
// recordings say. FARKEEP_FIGURES=write writes them.
func TestFigures(t *testing.T) {
	everyNight, everyWeek, err := diskuse.Recordings()
	if err != nil {
		t.Fatal(err)
	}
	const doc, picture, begin, end = "../../docs/retention.md", "../../docs/pictures/retention.svg", "<!-- figures -->\n", "<!-- end of figures -->\n"
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the figures", doc)
	}
	for _, f := range []struct{ path, want string }{
		{doc, before + begin + table(t, everyNight, everyWeek) + end + after},
		{picture, plot(everyNight)},
	} {
		if os.Getenv("FARKEEP_FIGURES") == "write" {
			if err := os.WriteFile(f.path, []byte(f.want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(f.path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != f.want {
			t.Errorf("%s does not show what the recordings say: run FARKEEP_FIGURES=write go test -run TestFigures ./image/diskuse", f.path)
		}
	}
}

func table(t *testing.T, everyNight, everyWeek *diskuse.Recording) string {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "| rules, on the default floor | generations | compacted nightly: least, average, peak | compacted weekly: least, average, peak | disk to buy |\n|---|---|---|---|---|\n")
	for _, p := range policies {
		e, err := diskuse.For(rules(p.policy))
		if err != nil {
			t.Fatal(err)
		}
		n, w := diskuse.Sum(everyNight.Simulate(rules(p.policy))), diskuse.Sum(everyWeek.Simulate(rules(p.policy)))
		fmt.Fprintf(&b, "| %s | %d | %.2f, %.2f, %.2f | %.2f, %.2f, %.2f | %.1f |\n", p.name, n.Generations, n.Least, n.Average, n.Peak, w.Least, w.Average, w.Peak, e.Factor())
	}
	fmt.Fprintf(&b, "\n| the recordings | compacted nightly | compacted weekly |\n|---|---|---|\n")
	a, c := facts(everyNight), facts(everyWeek)
	row := func(what, format string, value func(f fact) float64) {
		fmt.Fprintf(&b, "| %s | "+format+" | "+format+" |\n", what, value(a), value(c))
	}
	row("nights", "%.0f", func(f fact) float64 { return f.nights })
	row("repository at first, MB", "%.0f", func(f fact) float64 { return f.first / 1e6 })
	row("repository at last, MB", "%.0f", func(f fact) float64 { return f.last / 1e6 })
	row("segment files at last", "%.0f", func(f fact) float64 { return f.files })
	row("new in a night, on average, % of the repository", "%.2f", func(f fact) float64 { return 100 * f.mean })
	row("new in the worst night, % of the repository", "%.1f", func(f fact) float64 { return 100 * f.worst })
	row("files of the first night that are still the same at last, % of the bytes", "%.0f", func(f fact) float64 { return 100 * f.stayed })
	return b.String()
}

type fact struct{ nights, first, last, files, mean, worst, stayed float64 }

func facts(r *diskuse.Recording) fact {
	nights := r.Simulate(rules(retention.Policy{}))
	f := fact{nights: float64(len(nights)), first: float64(nights[0].Repository), last: float64(nights[len(nights)-1].Repository)}
	stayed := f.first
	initial := map[int]int64{}
	for d, day := range r.Days {
		f.files += float64(len(day.Added) - len(day.Removed))
		if d == 0 {
			for _, file := range day.Added {
				initial[file.ID] = file.Bytes
			}
			continue
		}
		for _, id := range day.Removed {
			stayed -= float64(initial[id])
		}
		share := float64(nights[d].New) / float64(nights[d].Repository)
		f.mean += share
		f.worst = max(f.worst, share)
	}
	f.mean /= f.nights - 1
	f.stayed = stayed / f.first
	return f
}

// plot draws how the disk fills, in times of the repository's size, night by
// night, as an SVG that needs no other program and no font of its own.
func plot(r *diskuse.Recording) string {
	const width, height, left, top, right, bottom = 860, 420, 50, 20, 20, 120
	type line struct {
		name, colour string
		values       []float64
	}
	var lines []line
	highest, nights := 1.0, len(r.Days)
	for _, p := range policies {
		if p.colour == "" {
			continue
		}
		l := line{name: strings.NewReplacer("`", "", "*", "").Replace(p.name), colour: p.colour}
		for _, n := range r.Simulate(rules(p.policy)) {
			times := float64(n.Disk) / float64(n.Repository)
			l.values = append(l.values, times)
			highest = max(highest, times)
		}
		lines = append(lines, l)
	}
	const step = 0.25
	ceiling := step
	for ceiling < highest {
		ceiling += step
	}
	x := func(night int) float64 { return left + float64(night)*(width-left-right)/float64(nights-1) }
	y := func(times float64) float64 { return height - bottom - times*(height-top-bottom)/ceiling }
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, "<title>Disk use of a history, in times of the repository's size, over %d nights</title>\n", nights)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	for times := 0.0; times <= ceiling; times += step * 2 {
		fmt.Fprintf(&b, `<path d="M%d %.1fH%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.1f</text>`+"\n", left, y(times), width-right, left-6, y(times)+4, times)
	}
	for night := 0; night < nights; night += 50 {
		fmt.Fprintf(&b, `<path d="M%.1f %dv4" stroke="#777"/><text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n", x(night), height-bottom, x(night), height-bottom+17, night)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">nights</text>`+"\n", width-right, height-bottom+32)
	for i, l := range lines {
		var points strings.Builder
		for night, times := range l.values {
			fmt.Fprintf(&points, " %.1f,%.1f", x(night), y(times))
		}
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="1.5" points="%s"/>`+"\n", l.colour, points.String()[1:])
		row, column := float64(height-bottom+52+i/2*20), float64(left+i%2*430)
		fmt.Fprintf(&b, `<path d="M%.0f %.0fh20" stroke="%s" stroke-width="3"/><text x="%.0f" y="%.0f">%s</text>`+"\n", column, row-4, l.colour, column+26, row, strings.ReplaceAll(l.name, `"`, "&quot;"))
	}
	b.WriteString("</svg>\n")
	return b.String()
}
