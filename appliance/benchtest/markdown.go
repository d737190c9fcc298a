package benchtest

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// Markdown writes a section for each case: a table of times, a line of it for each
// line and a column for each rival, and a table of what the rivals took of both
// machines and of the line, over the first line.
//
// A time stands with its least and its most; in bold, what Own's time is of it.
func (t *Table) Markdown(w io.Writer) error {
	var b strings.Builder
	for _, line := range t.Notes {
		fmt.Fprintf(&b, "- %s\n", line)
	}
	for _, s := range t.sections() {
		fmt.Fprintf(&b, "\n### %s\n\n", s.name)
		t.times(&b, s)
		b.WriteByte('\n')
		t.costs(&b, s)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t *Table) times(b *strings.Builder, s section) {
	var rivals []string
	for _, g := range s.groups {
		for _, r := range g.rows {
			if r.rival != t.Own && !slices.Contains(rivals, r.rival) {
				rivals = append(rivals, r.rival)
			}
		}
	}
	rivals = append(rivals, t.Own)
	fmt.Fprintf(b, "| seconds | data | %s |\n|---|---|%s\n", strings.Join(rivals, " | "), strings.Repeat("---:|", len(rivals)))
	for _, g := range s.groups {
		cells := make([]string, len(rivals))
		for i, name := range rivals {
			cells[i] = "–"
			for _, r := range g.rows {
				if r.rival != name {
					continue
				}
				cells[i] = spread(r.spread(quantities[0].of), seconds)
				if ratio := r.ratio(ratios[0].of); name != t.Own && ratio != (Spread{}) {
					cells[i] += " **" + spread(ratio, plain) + "**"
				}
			}
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", g.line, g.data, strings.Join(cells, " | "))
	}
}

func (t *Table) costs(b *strings.Builder, s section) {
	if len(s.groups) == 0 {
		return
	}
	g := s.groups[0]
	fmt.Fprintf(b, "| %s, %s | bytes up | bytes down | %s / bytes | CPU s, client + server | %s / CPU | MiB client | MiB server |\n|---|---:|---:|---:|---:|---:|---:|---:|\n", g.line, g.data, t.Own, t.Own)
	for _, r := range g.rows {
		of := func(i int) float64 { return r.spread(quantities[i].of).Median }
		ratio := func(i int) string {
			v := r.ratio(ratios[i].of)
			if r.rival == t.Own || v == (Spread{}) {
				return ""
			}
			return "**" + spread(v, plain) + "**"
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s | %.2f + %.2f | %s | %.0f | %.0f |\n", r.rival, bytes(of(5)), bytes(of(6)), ratio(2), of(1), of(2), ratio(1),
			r.spread(quantities[3].of).Most/(1<<20), r.spread(quantities[4].of).Most/(1<<20))
	}
}

// spread writes a median, and the least and the most where they are others.
func spread(s Spread, format func(float64) string) string {
	median, least, most := format(s.Median), format(s.Least), format(s.Most)
	if least == most {
		return median
	}
	return fmt.Sprintf("%s (%s–%s)", median, least, most)
}

func seconds(v float64) string {
	if v >= 9.95 {
		return fmt.Sprintf("%.0f", v)
	}
	if v >= 0.995 {
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func plain(v float64) string {
	switch {
	case v >= 9.95:
		return fmt.Sprintf("%.0f", v)
	case v < 0.0995:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// bytes writes with decimal units, as lines are sold.
func bytes(v float64) string {
	switch {
	case v >= 1e9:
		return fmt.Sprintf("%.2f GB", v/1e9)
	case v >= 99.5e6:
		return fmt.Sprintf("%.0f MB", v/1e6)
	case v >= 1e6:
		return fmt.Sprintf("%.1f MB", v/1e6)
	case v >= 1e3:
		return fmt.Sprintf("%.1f kB", v/1e3)
	}
	return fmt.Sprintf("%.0f", v)
}
