package tomlfile

import "fmt"

// Checker judges the values of a file that was read, and keeps the first
// mistake that it is told of.
type Checker struct {
	file string
	text []byte
	err  error
}

// NewChecker returns one for the file that name and text stand for, as in Parse.
func NewChecker(name string, text []byte) *Checker { return &Checker{file: name, text: text} }

// Check records a mistake in table.key unless ok; format says what is wrong with
// it. Table, key and n are as in Line, by which the mistake gets its line.
func (c *Checker) Check(ok bool, table, key string, n int, format string, args ...any) {
	if ok || c.err != nil {
		return
	}
	full := key
	if table != "" {
		full = table + "." + key
	}
	c.err = &Error{File: c.file, Line: Line(c.text, table, key, n), Key: full, Text: fmt.Sprintf(format, args...)}
}

// Err returns the first mistake, of type *Error, or nil.
func (c *Checker) Err() error { return c.err }
