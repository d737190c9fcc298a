// Package listing answers sftp clients that list a folder whose entries are in
// memory already. Folders that may be large are read as they are asked for, by
// those who know them.
package listing

import (
	"io"
	"io/fs"
)

// Entries is what a folder holds. It implements sftp.ListerAt.
type Entries []fs.FileInfo

// ListAt fills out from the entry at offset on; io.EOF when there are no more.
func (e Entries) ListAt(out []fs.FileInfo, offset int64) (int, error) {
	if offset < 0 || offset >= int64(len(e)) {
		return 0, io.EOF
	}
	n := copy(out, e[offset:])
	if n < len(out) {
		return n, io.EOF
	}
	return n, nil
}
