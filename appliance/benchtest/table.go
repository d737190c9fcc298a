// Package benchtest holds what a benchmark of several rivals found out, and writes
// it down: as Markdown, as CSV, and as plots in SVG.
//
// Rivals run in turns, round by round, each over the same data and the same line.
// Of each quantity the table has the median of the rounds, and the least and the
// most. A ratio is taken within a round, where the machine was the same for both,
// and its median is the median of these ratios, not the ratio of medians.
package benchtest

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Cost is what one run of a program took, on both sides.
type Cost struct {
	Wall                   time.Duration
	ClientCPU, ServerCPU   time.Duration // user and system
	ClientPeak, ServerPeak int64         // bytes of memory
	Up, Down               int64         // bytes on the line, from the client and to it
}

// CPU is the processor's time on both sides together.
func (c Cost) CPU() time.Duration { return c.ClientCPU + c.ServerCPU }

// Line is what was between the two sides.
type Line struct {
	RoundTrip time.Duration
	Mbit      int64 // per second and direction; 0: no limit
}

func (l Line) String() string {
	rate := "no limit"
	if l.Mbit > 0 {
		rate = fmt.Sprintf("%d Mbit/s", l.Mbit)
	}
	return fmt.Sprintf("%d ms, %s", l.RoundTrip.Milliseconds(), rate)
}

// Run is one turn of one rival.
type Run struct {
	Case  string
	Line  Line
	Rival string
	// Data names what was to be brought over, with its size.
	Data  string
	Round int
	Cost
}

// Table is what came out. Cases, lines and rivals keep the order in which they
// were added first.
type Table struct {
	// Own is the rival that the others are compared with.
	Own string
	// Notes say what it was made on, and what else is to be known, a line each.
	Notes []string
	runs  []Run
}

// Add records a turn. Nobody else may use the table meanwhile.
func (t *Table) Add(r Run) { t.runs = append(t.runs, r) }

// Spread is a quantity over the rounds.
type Spread struct{ Median, Least, Most float64 }

// SpreadOf is the zero Spread for no values. Of an even number of values the
// median is the mean of the middle two.
func SpreadOf(values []float64) Spread {
	if len(values) == 0 {
		return Spread{}
	}
	v := slices.Sorted(slices.Values(values))
	return Spread{(v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[0], v[len(v)-1]}
}

// A row is one rival's rounds over one line.
type row struct {
	rival  string
	rounds map[int]Cost
	own    map[int]Cost // of the rival that it is compared with
}

func (r row) spread(of func(Cost) float64) Spread {
	var values []float64
	for _, c := range r.rounds {
		values = append(values, of(c))
	}
	return SpreadOf(values)
}

// ratio is Own's quantity by this rival's, of the rounds that both have.
func (r row) ratio(of func(Cost) float64) Spread {
	var values []float64
	for round, c := range r.rounds {
		if own, both := r.own[round]; both && of(c) > 0 {
			values = append(values, of(own)/of(c))
		}
	}
	return SpreadOf(values)
}

// A group is all rivals over one line.
type group struct {
	line Line
	data string
	rows []row
}

// A section is one case.
type section struct {
	name   string
	groups []group
}

func (t *Table) sections() (all []section) {
	for _, r := range t.runs {
		s := slices.IndexFunc(all, func(s section) bool { return s.name == r.Case })
		if s < 0 {
			s = len(all)
			all = append(all, section{name: r.Case})
		}
		groups := &all[s].groups
		g := slices.IndexFunc(*groups, func(g group) bool { return g.line == r.Line })
		if g < 0 {
			g = len(*groups)
			*groups = append(*groups, group{line: r.Line, data: r.Data})
		}
		rows := &(*groups)[g].rows
		w := slices.IndexFunc(*rows, func(w row) bool { return w.rival == r.Rival })
		if w < 0 {
			w = len(*rows)
			*rows = append(*rows, row{r.Rival, map[int]Cost{}, nil})
		}
		(*rows)[w].rounds[r.Round] = r.Cost
	}
	for _, s := range all {
		for _, g := range s.groups {
			// Turns change from round to round; names do not. Own stands last.
			slices.SortStableFunc(g.rows, func(a, b row) int {
				return cmp.Or(compare(a.rival == t.Own, b.rival == t.Own), cmp.Compare(t.place(a.rival), t.place(b.rival)))
			})
			own := slices.IndexFunc(g.rows, func(r row) bool { return r.rival == t.Own })
			for i := range g.rows {
				if own >= 0 {
					g.rows[i].own = g.rows[own].rounds
				}
			}
		}
	}
	return all
}

func compare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// place is where a rival was added first.
func (t *Table) place(rival string) int {
	return slices.IndexFunc(t.runs, func(r Run) bool { return r.Rival == rival })
}

// Of is a quantity of a rival in a case and over a line; the zero Spread when that
// was not measured.
func (t *Table) Of(name string, line Line, rival string, of func(Cost) float64) Spread {
	return t.row(name, line, rival).spread(of)
}

// Ratio is Own's quantity by the rival's, taken within each round.
func (t *Table) Ratio(name string, line Line, rival string, of func(Cost) float64) Spread {
	return t.row(name, line, rival).ratio(of)
}

func (t *Table) row(name string, line Line, rival string) row {
	for _, s := range t.sections() {
		for _, g := range s.groups {
			for _, r := range g.rows {
				if s.name == name && g.line == line && r.rival == rival {
					return r
				}
			}
		}
	}
	return row{}
}

// What is measured: how it is called, in which unit, and how it is read.
var quantities = []struct {
	name string
	of   func(Cost) float64
}{
	{"seconds", func(c Cost) float64 { return c.Wall.Seconds() }},
	{"client_cpu_seconds", func(c Cost) float64 { return c.ClientCPU.Seconds() }},
	{"server_cpu_seconds", func(c Cost) float64 { return c.ServerCPU.Seconds() }},
	{"client_peak_bytes", func(c Cost) float64 { return float64(c.ClientPeak) }},
	{"server_peak_bytes", func(c Cost) float64 { return float64(c.ServerPeak) }},
	{"bytes_up", func(c Cost) float64 { return float64(c.Up) }},
	{"bytes_down", func(c Cost) float64 { return float64(c.Down) }},
}

// Ratios of the table.
var ratios = []struct {
	name string
	of   func(Cost) float64
}{
	{"time_ratio", func(c Cost) float64 { return c.Wall.Seconds() }},
	{"cpu_ratio", func(c Cost) float64 { return c.CPU().Seconds() }},
	{"bytes_ratio", func(c Cost) float64 { return float64(c.Up + c.Down) }},
}

// CSV writes a line for each rival and line (RFC 4180): median, least and most of
// each quantity, and of Own's ratio to it.
func (t *Table) CSV(to io.Writer) error {
	w := csv.NewWriter(to)
	head := []string{"case", "data", "round_trip_ms", "mbit_per_s", "rival", "rounds"}
	for _, q := range slices.Concat(quantities, ratios) {
		head = append(head, q.name, q.name+"_least", q.name+"_most")
	}
	if err := w.Write(head); err != nil {
		return err
	}
	for _, s := range t.sections() {
		for _, g := range s.groups {
			for _, r := range g.rows {
				line := []string{s.name, g.data, fmt.Sprint(g.line.RoundTrip.Milliseconds()), fmt.Sprint(g.line.Mbit), r.rival, fmt.Sprint(len(r.rounds))}
				add := func(s Spread) {
					for _, v := range []float64{s.Median, s.Least, s.Most} {
						line = append(line, strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.3f", v), "0"), "."))
					}
				}
				for _, q := range quantities {
					add(r.spread(q.of))
				}
				for _, q := range ratios {
					add(r.ratio(q.of))
				}
				if err := w.Write(line); err != nil {
					return err
				}
			}
		}
	}
	w.Flush()
	return w.Error()
}
