package benchtest

import (
	"fmt"
	"html"
	"io"
	"strings"
)

// Plot is one picture: a file name without folder, and its content.
type Plot struct {
	Name string
	SVG  []byte
}

// Plots draws the time of each case, a block of bars for each line; and for each
// case what crossed the line and what both processors took, over its first line.
func (t *Table) Plots() (all []Plot) {
	for _, s := range t.sections() {
		name := strings.ToLower(strings.Map(func(r rune) rune {
			if r == ' ' || r == '-' {
				return '-'
			}
			if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
				return r
			}
			return -1
		}, s.name))
		var times []block
		for _, g := range s.groups {
			times = append(times, t.block(fmt.Sprintf("%s (%s)", g.line, g.data), g, quantities[0].of, func(v float64) string { return seconds(v) + " s" }))
		}
		all = append(all, draw(name+"-time.svg", s.name+": seconds", times))
		if len(s.groups) > 0 {
			g := s.groups[0]
			all = append(all, draw(name+"-cost.svg", fmt.Sprintf("%s: what it takes (%s, %s)", s.name, g.line, g.data), []block{
				t.block("bytes on the line, both ways", g, ratios[2].of, bytes),
				t.block("CPU seconds, both sides", g, ratios[1].of, func(v float64) string { return seconds(v) + " s" }),
				t.block("memory of the client, peak", g, quantities[3].of, func(v float64) string { return fmt.Sprintf("%.0f MiB", v/(1<<20)) }),
				t.block("memory of the server, peak", g, quantities[4].of, func(v float64) string { return fmt.Sprintf("%.0f MiB", v/(1<<20)) }),
			}))
		}
	}
	return all
}

// A block is bars on one scale.
type block struct {
	title string
	bars  []bar
}

type bar struct {
	name, text string
	Spread
	own bool
}

func (t *Table) block(title string, g group, of func(Cost) float64, text func(float64) string) block {
	b := block{title: title}
	for _, r := range g.rows {
		s := r.spread(of)
		b.bars = append(b.bars, bar{r.rival, text(s.Median), s, r.rival == t.Own})
	}
	return b
}

// Measures of a picture, in pixels.
const (
	width   = 760
	left    = 170 // where bars begin
	longest = 460 // bar
	rowStep = 20
	barTall = 13
	headGap = 34
)

// draw makes a picture that is readable on a light and on a dark page, by the
// reader's own wish (prefers-color-scheme).
func draw(file, title string, blocks []block) Plot {
	var b strings.Builder
	y := 28
	text := func(class string, x, y int, s string) {
		fmt.Fprintf(&b, `<text class="%s" x="%d" y="%d">%s</text>`+"\n", class, x, y, html.EscapeString(s))
	}
	text("title", 12, y, title)
	y += 18
	text("note", 12, y, "Bars are medians, thin lines the least and the most. Each block has a scale of its own.")
	for _, block := range blocks {
		y += headGap
		text("head", 12, y, block.title)
		top := 0.0
		for _, bar := range block.bars {
			top = max(top, bar.Most)
		}
		scale := func(v float64) int {
			if top == 0 {
				return 0
			}
			return int(v / top * longest)
		}
		y += 8
		for _, bar := range block.bars {
			class := "bar"
			if bar.own {
				class = "own"
			}
			long := max(scale(bar.Median), 1)
			text("name", left-8, y+barTall-2, bar.name)
			fmt.Fprintf(&b, `<rect class="%s" x="%d" y="%d" width="%d" height="%d"/>`+"\n", class, left, y, long, barTall)
			end := left + long
			if bar.Least < bar.Most {
				from, to, middle := left+scale(bar.Least), left+scale(bar.Most), y+barTall/2
				fmt.Fprintf(&b, `<path class="spread" d="M%d %dH%d"/>`+"\n", from, middle, to)
				end = max(end, to)
			}
			text("value", end+6, y+barTall-2, bar.text)
			y += rowStep
		}
	}
	y += 12
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">
<title>%s</title>
<style>
.page{fill:#fff}text{font:12px sans-serif;fill:#222}.title{font-size:16px;font-weight:bold}.head{font-weight:bold}
.note{font-size:11px}.name{text-anchor:end}.bar{fill:#9ab}.own{fill:#c60}.spread{stroke:#222;stroke-width:1;fill:none}
@media(prefers-color-scheme:dark){.page{fill:#161616}text{fill:#ddd}.bar{fill:#567}.own{fill:#e82}.spread{stroke:#ddd}}
</style>
<rect class="page" width="%d" height="%d"/>
%s</svg>
`, width, y, width, y, html.EscapeString(title), width, y, b.String())
	return Plot{file, []byte(out.String())}
}

// Save writes table.md, table.csv and the plots by create, which makes a file of
// that name.
func (t *Table) Save(create func(name string) (io.WriteCloser, error)) error {
	write := func(name string, f func(io.Writer) error) error {
		w, err := create(name)
		if err != nil {
			return err
		}
		if err := f(w); err != nil {
			w.Close()
			return fmt.Errorf("write %s: %w", name, err)
		}
		return w.Close()
	}
	if err := write("table.md", t.Markdown); err != nil {
		return err
	}
	if err := write("table.csv", t.CSV); err != nil {
		return err
	}
	for _, p := range t.Plots() {
		if err := write(p.Name, func(w io.Writer) error {
			_, err := w.Write(p.SVG)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}
