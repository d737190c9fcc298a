// Package tomlfile reads Farkeep's configuration files: TOML 1.0, bounded in
// size, every key known. An unknown key, a wrong type or a syntax error is one
// error that names the file and the line.
//
// Files edited on Windows or macOS are welcome: a UTF-8 byte order mark and
// CRLF line ends are accepted. Values are not judged here; that is the job of
// the package that knows what they mean.
package tomlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// MaxSize bounds a configuration file, in bytes.
const MaxSize = 1 << 20

// Error is a mistake in a configuration file.
type Error struct {
	File string
	Line int // 1-based; 0 where the mistake has no single line
	Key  string
	Text string
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	b.WriteString(": ")
	if e.Key != "" {
		fmt.Fprintf(&b, "%s: ", e.Key)
	}
	b.WriteString(e.Text)
	return b.String()
}

// Read reads path into v, a pointer to a struct with toml tags.
func Read(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return Parse(path, text, v)
}

// Parse reads text into v; name stands for the file in errors, all of which are
// of type *Error.
func Parse(name string, text []byte, v any) error {
	if len(text) > MaxSize {
		return &Error{File: name, Text: fmt.Sprintf("larger than %d bytes, which no Farkeep configuration is", MaxSize)}
	}
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	dec := toml.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if err == nil {
		return nil
	}
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		first := &unknown.Errors[0]
		row, _ := first.Position()
		return &Error{File: name, Line: row, Key: strings.Join(first.Key(), "."), Text: "unknown key: remove it, or correct its spelling"}
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, _ := bad.Position()
		return &Error{File: name, Line: row, Key: strings.Join(bad.Key(), "."), Text: strings.TrimPrefix(bad.Error(), "toml: ")}
	}
	return &Error{File: name, Text: strings.TrimPrefix(err.Error(), "toml: ")}
}

// Line finds the line, 1-based, on which key is set in text, for errors about
// values: the n-th assignment (from 0) of a bare key below the given table
// header ("" for the top level, "peer" for [peer] and [[peer]]). It returns 0
// when it finds none.
func Line(text []byte, table, key string, n int) int {
	current, seen := "", 0
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(strings.TrimPrefix(line, "\ufeff"))
		if strings.HasPrefix(line, "[") {
			current = strings.TrimSpace(strings.Trim(strings.SplitN(line, "#", 2)[0], "[] \t\r"))
			continue
		}
		name, _, found := strings.Cut(line, "=")
		if !found || current != table || strings.Trim(strings.TrimSpace(name), `"'`) != key {
			continue
		}
		if seen == n {
			return i + 1
		}
		seen++
	}
	return 0
}
