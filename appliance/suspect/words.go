package suspect

import (
	"fmt"
	"strconv"
	"strings"

	"farkeep/shared/generations"
)

// findings gathers the reasons of a verdict.
type findings struct{ reasons []string }

// maxFindings leaves room for the advice among the 8 reasons of a Verdict.
const maxFindings = 7

func (f *findings) add(format string, args ...any) {
	if len(f.reasons) < maxFindings {
		f.reasons = append(f.reasons, fmt.Sprintf(format, args...))
	}
}

func (f *findings) verdict(c *generations.Candidate) generations.Verdict {
	if len(f.reasons) == 0 {
		return generations.Verdict{}
	}
	advice := "If you know why, accept it with the admin key. If not, look at the machine at home first, and change nothing here."
	if c.Current != nil {
		advice = fmt.Sprintf("If you know why, accept it with the admin key. If not, look at the machine at home first, and change nothing here: %s and what came before it is as it was.", c.Current.Name)
	}
	return generations.Verdict{Suspect: true, Reasons: append(f.reasons, advice)}
}

// count writes a number as a person reads it.
func count(n int64) string {
	s := strconv.FormatInt(n, 10)
	var b strings.Builder
	for i, c := range s {
		if i > 0 && (len(s)-i)%3 == 0 && s[i-1] != '-' {
			b.WriteByte(',')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// size writes a number of bytes as a person reads it.
func size(n int64) string {
	units := []string{"bytes", "kB", "MB", "GB", "TB", "PB"}
	v, u := float64(n), 0
	for v >= 999.5 && u < len(units)-1 {
		v /= 1000
		u++
	}
	if u == 0 || v >= 9.95 {
		return fmt.Sprintf("%.0f %s", v, units[u])
	}
	return fmt.Sprintf("%.1f %s", v, units[u])
}

// percent is part of whole, in words that never round a loss away, nor up to all.
func percent(part, whole int64) string {
	if whole <= 0 {
		return "0 %"
	}
	p := float64(part) * 100 / float64(whole)
	switch {
	case part == whole:
		return "100 %"
	case p > 0 && p < 1:
		return "under 1 %"
	case p > 99:
		return "over 99 %"
	}
	return fmt.Sprintf("%.0f %%", p)
}

// some lists the first names, and says how many more there are.
func some(names []string, n int64) string {
	s := strings.Join(names, ", ")
	if rest := n - int64(len(names)); rest > 0 {
		s += fmt.Sprintf(" and %s more", count(rest))
	}
	return s
}

// plural is "1 segment", "2 segments".
func plural(n int64, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return count(n) + " " + one + "s"
}
