// Package runsteps reads the commands of a runbook out of its Markdown, so that
// what a drill runs is the text that a person will paste.
//
// A command block is fenced by ```sh and has a name, in a comment above it:
//
//	<!-- step: unlock -->
//	```sh
//	cryptsetup open --key-file "$KEY" "$DISK" farkeep
//	```
//
// The blocks are plain POSIX sh and meant for one shell, one after the other. What a
// person must choose stands as an assignment at the beginning of a line
// (DISK=/dev/sdX), which [Step.Set] replaces. Blocks with other fences are not commands.
//
// Parse is strict: a block without a name, or a name that is used twice, is an
// error, so that no command of a runbook escapes its drill.
package runsteps

import (
	"bytes"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Bounds of a runbook.
const (
	MaxSize  = 1 << 20 // bytes
	MaxSteps = 200
)

// Step is one command block.
type Step struct {
	Chapter string // the heading of second order above it
	Name    string // small letters, digits and dashes; unique in its runbook
	Script  string // ends in a newline
}

var (
	nameLine   = regexp.MustCompile(`^<!-- step: ([a-z0-9]+(?:-[a-z0-9]+)*) -->$`)
	assignment = regexp.MustCompile(`(?m)^([A-Z][A-Z0-9_]*)=.*$`)
	variable   = regexp.MustCompile(`^[A-Z][A-Z0-9_]*$`)
)

// Parse returns the steps of a runbook in their order.
func Parse(markdown []byte) ([]Step, error) {
	if len(markdown) > MaxSize {
		return nil, fmt.Errorf("runbook: longer than %d bytes", MaxSize)
	}
	var (
		steps   []Step
		seen    = map[string]int{}
		chapter string
		name    string // announced, and its block has not begun
		fence   string // of the open block
		indent  string
		script  strings.Builder
		n       int
	)
	mistake := func(format string, args ...any) error {
		return fmt.Errorf("runbook: line %d: %s", n, fmt.Sprintf(format, args...))
	}
	for raw := range bytes.Lines(markdown) {
		n++
		line := strings.TrimRight(string(raw), "\r\n")
		trimmed := strings.TrimSpace(line)
		if fence != "" {
			switch {
			case trimmed == "```":
				if fence == "sh" {
					steps = append(steps, Step{chapter, name, script.String()})
					name = ""
				}
				fence = ""
			case fence == "sh":
				script.WriteString(strings.TrimPrefix(line, indent) + "\n")
			}
			continue
		}
		if announced, ok := strings.CutPrefix(trimmed, "<!-- step"); ok {
			m := nameLine.FindStringSubmatch(trimmed)
			switch {
			case m == nil:
				return nil, mistake("%q names no step", "<!-- step"+announced)
			case name != "":
				return nil, mistake("step %q has no commands", name)
			case seen[m[1]] > 0:
				return nil, mistake("step %q is in line %d already", m[1], seen[m[1]])
			case len(steps) == MaxSteps:
				return nil, mistake("more than %d steps", MaxSteps)
			}
			name, seen[m[1]] = m[1], n
			continue
		}
		if kind, ok := strings.CutPrefix(trimmed, "```"); ok {
			if kind == "sh" && name == "" {
				return nil, mistake("these commands have no name: put <!-- step: NAME --> above them")
			}
			if kind != "sh" && name != "" {
				return nil, mistake("step %q has no commands", name)
			}
			fence, indent = kind, line[:len(line)-len(strings.TrimLeft(line, " "))]
			if fence == "" {
				fence = "text"
			}
			script.Reset()
			continue
		}
		if trimmed == "" {
			continue
		}
		if name != "" {
			return nil, mistake("step %q has no commands", name)
		}
		if heading, ok := strings.CutPrefix(line, "## "); ok {
			chapter = strings.TrimSpace(heading)
		}
	}
	switch {
	case fence != "":
		return nil, mistake("the last block does not end")
	case name != "":
		return nil, mistake("step %q has no commands", name)
	}
	return steps, nil
}

// Variables lists what the step lets a person choose: the names assigned at the
// beginning of a line, in their order.
func (s Step) Variables() (names []string) {
	for _, m := range assignment.FindAllStringSubmatch(s.Script, -1) {
		if !slices.Contains(names, m[1]) {
			names = append(names, m[1])
		}
	}
	return names
}

// Set is the step with other values for its variables. A variable that it does
// not assign is an error: the runbook has changed, and whoever sets it must too.
func (s Step) Set(values map[string]string) (Step, error) {
	own := s.Variables()
	for _, name := range slices.Sorted(maps.Keys(values)) {
		value := values[name]
		if !variable.MatchString(name) || !slices.Contains(own, name) {
			return Step{}, fmt.Errorf("step %s assigns no variable %q; it has %v", s.Name, name, own)
		}
		if strings.ContainsAny(value, "\n\x00") {
			return Step{}, fmt.Errorf("step %s: the value of %s has more than one line", s.Name, name)
		}
		s.Script = assignment.ReplaceAllStringFunc(s.Script, func(line string) string {
			if before, _, _ := strings.Cut(line, "="); before != name {
				return line
			}
			return name + "=" + quote(value)
		})
	}
	return s, nil
}

// quote makes text one word of the shell.
func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// In returns the steps of the chapters whose headings begin with prefix.
func In(steps []Step, prefix string) (some []Step) {
	for _, s := range steps {
		if strings.HasPrefix(s.Chapter, prefix) {
			some = append(some, s)
		}
	}
	return some
}
