package listing

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// named is a file whose content must be the end of its name.
type named struct {
	bytes.Buffer
	name string
}

var errWrong = errors.New("it is something else")

func (n *named) Err() error {
	if strings.HasSuffix(n.name, n.String()) {
		return nil
	}
	return errWrong
}

// A file that is found wrong is named, after every other file was read, and read
// again until it is right.
func TestCheck(t *testing.T) {
	root := t.TempDir()
	read := map[string]int{}
	opt := Options{
		Cache: filepath.Join(t.TempDir(), "cache"),
		Check: func(name string) Check {
			if !strings.HasPrefix(name, "named/") {
				return nil
			}
			read[name]++ // two files, in turns: see below
			return &named{name: name}
		},
	}
	write(t, filepath.Join(root, "named/good"), "good")
	if _, err := Write(t.Context(), root, io.Discard, opt); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "named/best"), "else")
	write(t, filepath.Join(root, "other"), "anything")
	for range 2 {
		_, err := Write(t.Context(), root, io.Discard, opt)
		var wrong *WrongError
		if !errors.As(err, &wrong) || !strings.Contains(err.Error(), "named/best") {
			t.Fatalf("got %v", err)
		}
		if d := cmp.Diff([]Wrong{{"named/best", sum("else"), errWrong}}, wrong.First, cmpopts.EquateErrors()); d != "" || wrong.Count != 1 {
			t.Error(d)
		}
	}
	write(t, filepath.Join(root, "named/best"), "best")
	r, _ := list(t, root, opt)
	if r.Hashed != 1 || read["named/best"] != 3 || read["named/good"] != 1 {
		t.Errorf("%d files were read in the end, %v in all", r.Hashed, read)
	}

	for i := range 2 * maxWrong {
		write(t, filepath.Join(root, fmt.Sprintf("named/%02d", i)), "?")
	}
	opt.Check = func(name string) Check { return &named{name: name} }
	_, err := Write(t.Context(), root, io.Discard, opt)
	var wrong *WrongError
	if !errors.As(err, &wrong) || wrong.Count != 2*maxWrong || len(wrong.First) != maxWrong {
		t.Errorf("got %v", err)
	}
}
