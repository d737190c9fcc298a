package demo

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// narrator tells what happens, line by line, and counts the steps that held.
type narrator struct {
	out     io.Writer
	log     *os.File // everything that the programs and the consoles print
	started time.Time
	steps   int
}

func (n *narrator) chapter(format string, args ...any) {
	title := fmt.Sprintf(format, args...)
	fmt.Fprintf(n.out, "\n%s\n%s\n", title, strings.Repeat("-", len(title)))
	fmt.Fprintf(n.log, "\n##### %s\n", title)
}

// step does one thing and says how long it took.
func (n *narrator) step(what string, do func() error) error {
	n.steps++
	fmt.Fprintf(n.log, "\n### %s\n", what)
	began := time.Now()
	fmt.Fprintf(n.out, "  .. %s\n", what)
	if err := do(); err != nil {
		fmt.Fprintf(n.out, "  NO %s\n", what)
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Fprintf(n.out, "  ok %5.1f s  %s\n", time.Since(began).Seconds(), what)
	return nil
}

// say tells a fact that a step brought to light.
func (n *narrator) say(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	for line := range strings.SplitSeq(text, "\n") {
		fmt.Fprintf(n.out, "             %s\n", line)
	}
}

// prefixed marks the lines of one source in a common log.
type prefixed struct {
	mu     *sync.Mutex
	w      io.Writer
	prefix string
	rest   []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			return len(b), nil
		}
		if _, err := fmt.Fprintf(p.w, "%s%s\n", p.prefix, bytes.TrimRight(p.rest[:i], "\r")); err != nil {
			return 0, err
		}
		p.rest = p.rest[i+1:]
	}
}
