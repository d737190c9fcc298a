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
	"regexp"
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
	text, err := ReadText(path)
	if err != nil {
		return err
	}
	return Parse(path, text, v)
}

// ReadText reads the text of a configuration file for Parse, which refuses one
// that is larger than MaxSize.
func ReadText(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxSize+1)) // the byte too many is for Parse to refuse
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
		return &Error{File: name, Line: row, Key: strings.Join(bad.Key(), "."), Text: plain(strings.TrimPrefix(bad.Error(), "toml: "))}
	}
	return &Error{File: name, Text: strings.TrimPrefix(err.Error(), "toml: ")}
}

var wrongType = regexp.MustCompile(`^cannot decode TOML (\w+) into struct field .* of type (.+)$`)

// plain says what is wrong with a value's type in words for people, who know
// nothing of our Go structs.
func plain(text string) string {
	m := wrongType.FindStringSubmatch(text)
	if m == nil {
		return text
	}
	want := "a table"
	switch kind := m[2]; {
	case strings.HasPrefix(kind, "int"):
		want = "a whole number"
	case kind == "bool":
		want = "true or false"
	case strings.HasPrefix(kind, "[]"):
		want = "a list in brackets"
	case kind == "string", strings.HasSuffix(kind, ".Text"), strings.HasSuffix(kind, ".Duration"), strings.HasSuffix(kind, ".ClockTime"), strings.HasPrefix(kind, "netip."):
		want = "a text in quotes"
	}
	return fmt.Sprintf("%s is wanted here, this is a TOML %s", want, m[1])
}

// Line finds the line, 1-based, on which key is set in text, for errors about
// values: a bare key below a table header ("" for the top level, "peer" for
// [peer] and [[peer]]). Where the table, or one that it lies in, is an array, n
// is the element, from 0: Line(text, "peer.route", "to", 1) looks below the
// second [[peer]]. Without the key it returns the line of the table's header,
// and 0 when it finds neither.
func Line(text []byte, table, key string, n int) int {
	current, index, header := "", 0, 0
	arrays := map[string]int{} // how many [[name]] came so far
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(strings.TrimPrefix(line, "\ufeff"))
		if strings.HasPrefix(line, "[") {
			name, _, _ := strings.Cut(line, "#")
			current = strings.TrimSpace(strings.Trim(name, "[] \t\r"))
			if strings.HasPrefix(line, "[[") {
				arrays[current]++
			}
			index = element(arrays, current)
			if current == table && index == n && header == 0 {
				header = i + 1
			}
			continue
		}
		name, _, found := strings.Cut(line, "=")
		if found && current == table && index == n && strings.Trim(strings.TrimSpace(name), `"'`) == key {
			return i + 1
		}
	}
	return header
}

// element is the index of the array element that a table belongs to, 0 outside arrays.
func element(arrays map[string]int, table string) int {
	for {
		if count := arrays[table]; count > 0 {
			return count - 1
		}
		i := strings.LastIndexByte(table, '.')
		if i < 0 {
			return 0
		}
		table = table[:i]
	}
}
