package listing

import (
	"io"
	"io/fs"
	"testing"
)

func TestListAt(t *testing.T) {
	all := make(Entries, 5)
	for _, tc := range []struct {
		room   int
		offset int64
		n      int
		err    error
	}{
		{2, 0, 2, nil}, {2, 2, 2, nil}, {2, 4, 1, io.EOF}, {5, 0, 5, nil}, {1, 5, 0, io.EOF}, {9, 0, 5, io.EOF}, {1, 1 << 40, 0, io.EOF}, {1, -1, 0, io.EOF},
	} {
		if n, err := all.ListAt(make([]fs.FileInfo, tc.room), tc.offset); n != tc.n || err != tc.err {
			t.Errorf("%d entries at %d: %d, %v; want %d, %v", tc.room, tc.offset, n, err, tc.n, tc.err)
		}
	}
}
