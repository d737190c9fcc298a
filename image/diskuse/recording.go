package diskuse

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Recording is what became of a repository's segment files, day by day. A file
// never changes: a name that gets a new content is a new file.
type Recording struct{ Days []Day }

// Day is the difference to the day before; day 0 adds all.
type Day struct {
	Added   []File
	Removed []int
}

// File is one content. IDs count from 0 in the order in which files appear.
type File struct {
	ID    int
	Bytes int64
}

// Write writes a line for each day: +ID:BYTES for a file that came, -ID for one
// that went.
func (r *Recording) Write(w io.Writer) error {
	out := bufio.NewWriter(w)
	for _, d := range r.Days {
		sep := ""
		for _, f := range d.Added {
			fmt.Fprintf(out, "%s+%d:%d", sep, f.ID, f.Bytes)
			sep = " "
		}
		for _, id := range slices.Sorted(slices.Values(d.Removed)) {
			fmt.Fprintf(out, "%s-%d", sep, id)
			sep = " "
		}
		fmt.Fprintln(out)
	}
	return out.Flush()
}

// Parse reads what Write wrote.
func Parse(text string) (*Recording, error) {
	r := &Recording{}
	there := map[int]bool{}
	for n, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		var d Day
		for _, word := range strings.Fields(line) {
			id, size, added := strings.Cut(word[1:], ":")
			i, err := strconv.Atoi(id)
			if err != nil || i < 0 || added != (word[0] == '+') || !added && word[0] != '-' || there[i] == added {
				return nil, fmt.Errorf("day %d of the recording: %q is no file that came or went", n, word)
			}
			there[i] = added
			if !added {
				d.Removed = append(d.Removed, i)
				continue
			}
			bytes, err := strconv.ParseInt(size, 10, 64)
			if err != nil || bytes < 0 {
				return nil, fmt.Errorf("day %d of the recording: %q has no size", n, word)
			}
			d.Added = append(d.Added, File{ID: i, Bytes: bytes})
		}
		r.Days = append(r.Days, d)
	}
	return r, nil
}
