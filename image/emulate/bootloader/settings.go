package bootloader

import (
	"fmt"
	"strconv"
	"strings"

	"farkeep/shared/card"
)

// facts decide which sections of autoboot.txt and config.txt hold.
type facts struct {
	board     Board
	tryboot   bool
	partition int
}

// settings are the lines that hold. A later line overrides an earlier one, except gpio, which adds up.
type settings struct {
	facts
	include func(name string) ([]byte, error) // nil: none

	values map[string]string
	gpio   map[int]bool
	depth  int
}

const (
	maxDepth    = 4  // of includes
	maxGPIOLine = 57 // of a BCM2711
)

func (s *settings) value(name, fallback string) string {
	if v := s.values[name]; v != "" {
		return v
	}
	return fallback
}

// bootPartition is the value of boot_partition: 0 and an absent line mean fallback.
func (s *settings) bootPartition(fallback int) (int, error) {
	v := s.value("boot_partition", "0")
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 || n > card.State {
		return 0, fmt.Errorf("boot_partition=%.20s is no partition of a card (1 to %d)", v, card.State)
	}
	if n == 0 {
		return fallback, nil
	}
	return n, nil
}

// parse reads the lines "name=value" and "initramfs file [address]" of the sections that hold.
//
// Filters of one kind replace each other, filters of different kinds must all hold, and [all] takes
// every filter away ("Conditional filters" in the documentation). A filter that we do not know does not
// hold: a setting meant for a serial number or a monitor is not meant for an emulator.
func (s *settings) parse(text []byte) error {
	filters := map[string]bool{}
	holds := func() bool {
		for _, ok := range filters {
			if !ok {
				return false
			}
		}
		return true
	}
	for i, line := range strings.Split(string(text), "\n") {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		switch {
		case line == "":
		case line[0] == '[':
			if !strings.HasSuffix(line, "]") {
				return fmt.Errorf("line %d: %.80q does not end in ]", i+1, line)
			}
			name := strings.ToLower(strings.TrimSpace(line[1 : len(line)-1]))
			if name == "all" {
				clear(filters)
				continue
			}
			kind, ok := filter(name, s.facts)
			filters[kind] = ok
		case holds():
			if err := s.set(line); err != nil {
				return fmt.Errorf("line %d: %w", i+1, err)
			}
		}
	}
	return nil
}

// set takes one line of a section that holds.
func (s *settings) set(line string) error {
	if s.values == nil {
		s.values, s.gpio = map[string]string{}, map[int]bool{}
	}
	name, value, ok := strings.Cut(line, "=")
	name, value = strings.TrimSpace(name), strings.TrimSpace(value)
	if ok && name == "gpio" {
		return s.drive(value)
	}
	if ok {
		s.values[name] = value
		return nil
	}
	// Two settings have no equals sign: "initramfs file followkernel" and "include file".
	words := strings.Fields(line)
	if len(words) < 2 {
		return nil
	}
	switch words[0] {
	case "initramfs":
		s.values["initramfs"] = words[1]
	case "include":
		if s.include == nil || s.depth == maxDepth {
			return fmt.Errorf("cannot include %.80q here", words[1])
		}
		text, err := s.include(words[1])
		if err != nil {
			return fmt.Errorf("include %.80s: %w", words[1], err)
		}
		s.depth++
		defer func() { s.depth-- }()
		if err := s.parse(text); err != nil {
			return fmt.Errorf("include %.80s: %w", words[1], err)
		}
	}
	return nil
}

// drive takes the value of a gpio line, such as "17=op,dl" or "0-27=a2". Of the functions and levels only the
// outputs matter here.
func (s *settings) drive(value string) error {
	lines, functions, ok := strings.Cut(value, "=")
	if !ok {
		return fmt.Errorf("gpio=%.80s: want LINES=FUNCTIONS", value)
	}
	output, high := false, false
	for word := range strings.SplitSeq(functions, ",") {
		switch strings.TrimSpace(word) {
		case "op":
			output = true
		case "ip", "a0", "a1", "a2", "a3", "a4", "a5":
			output = false
		case "dh":
			high = true
		case "dl":
			high = false
		}
	}
	for part := range strings.SplitSeq(lines, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.Atoi(from)
		b, err2 := strconv.Atoi(to)
		if err1 != nil || err2 != nil || a < 0 || b < a || b > maxGPIOLine {
			return fmt.Errorf("gpio=%.80s: no such lines (0 to %d)", value, maxGPIOLine)
		}
		for n := a; n <= b; n++ {
			delete(s.gpio, n)
			if output {
				s.gpio[n] = high
			}
		}
	}
	return nil
}

// filter says of which kind a filter is, and whether it holds.
func filter(name string, f facts) (kind string, holds bool) {
	key, value, hasValue := strings.Cut(name, "=")
	switch {
	case name == "none":
		return "model", false
	case name == "tryboot":
		return "tryboot", f.tryboot
	case hasValue && key == "partition":
		n, err := strconv.Atoi(value)
		return key, err == nil && n == f.partition
	case !hasValue && (strings.HasPrefix(key, "pi") || strings.HasPrefix(key, "cm")):
		return "model", f.board == Pi3B && name == "pi3"
	}
	return key, false
}
