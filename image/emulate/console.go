package emulate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
)

// Limits on what is kept of a serial console.
const (
	maxLine  = 4 << 10 // bytes; longer lines are split
	maxLines = 100_000 // the oldest are forgotten
)

// console keeps the lines that a machine has printed and wakes those who wait for one.
type console struct {
	copy io.Writer // may be nil

	mu      sync.Mutex
	lines   []string
	first   int           // number of lines[0], counted from power-on
	mark    int           // number of the first line that WaitLine considers
	changed chan struct{} // closed and replaced at every new line
	ended   error         // why no line will come any more
}

func newConsole(copy io.Writer) *console {
	return &console{copy: copy, changed: make(chan struct{})}
}

// lineWriter splits what is written to it into lines and gives each to add.
type lineWriter struct {
	add  func(line string)
	rest []byte // of a line that has not ended yet
}

func (w *lineWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			w.rest = append(w.rest, b...)
			break
		}
		w.rest = append(w.rest, b[:i]...)
		w.flush()
		b = b[i+1:]
	}
	if len(w.rest) >= maxLine {
		w.flush()
	}
	return n, nil
}

func (w *lineWriter) flush() {
	line := strings.TrimRight(string(w.rest), "\r")
	w.rest = w.rest[:0]
	for len(line) > maxLine {
		w.add(line[:maxLine])
		line = line[maxLine:]
	}
	w.add(line)
}

// end hands over a last line that no newline has ended, as when power is cut.
func (w *lineWriter) end() {
	if len(w.rest) > 0 {
		w.flush()
	}
}

func (c *console) add(line string) {
	c.mu.Lock()
	c.lines = append(c.lines, line)
	if len(c.lines) > maxLines {
		c.lines = c.lines[1:]
		c.first++
	}
	close(c.changed)
	c.changed = make(chan struct{})
	c.mu.Unlock()
	if c.copy != nil {
		// A reader that has gone away is no reason to stop the machine.
		_, _ = io.WriteString(c.copy, line+"\n")
	}
}

// end tells the waiting that no line will come.
func (c *console) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended == nil {
		c.ended = err
		close(c.changed)
		c.changed = make(chan struct{})
	}
}

func (c *console) setMark() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mark = c.first + len(c.lines)
}

func (c *console) tail(n int) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := c.lines[max(0, len(c.lines)-n):]
	return append([]string(nil), lines...)
}

// wait returns the first line since the mark that re matches.
func (c *console) wait(ctx context.Context, re *regexp.Regexp) (string, error) {
	next := -1
	for {
		c.mu.Lock()
		if next < 0 {
			next = c.mark
		}
		next = max(next, c.first)
		fresh := c.lines[next-c.first:]
		changed, ended := c.changed, c.ended
		c.mu.Unlock()
		for _, line := range fresh {
			if re.MatchString(line) {
				return line, nil
			}
		}
		next += len(fresh)
		if ended != nil {
			return "", fmt.Errorf("wait for a line that matches %q: %w%s", re, ended, c.context())
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("wait for a line that matches %q: %w%s", re, ctx.Err(), c.context())
		}
	}
}

// context quotes the last lines, because they usually say why the awaited one did not come.
func (c *console) context() string {
	lines := c.tail(15)
	if len(lines) == 0 {
		return "; the console is empty"
	}
	return "; the console ends in\n\t" + strings.Join(lines, "\n\t")
}
