package scrub

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"farkeep/shared/generations"

	"github.com/pelletier/go-toml/v2"
)

// correctedName is the record that says that the file system was corrected.
const correctedName = "corrected"

type corrected struct {
	Format int    `toml:"format"` // 1
	ID     string `toml:"id"`     // another one at each correction
}

// Corrected notes on a mounted disk that e2fsck corrected its file system, so that
// the next Run begins to read everything anew, at once. disk is the disk's top,
// keeper the uid and gid of those who own its records. A disk on which no
// generation was ever made needs no note.
func Corrected(disk *os.Root, keeper int) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("note that the file system was corrected: %w", err)
		}
	}()
	text, err := toml.Marshal(corrected{Format: 1, ID: rand.Text()})
	if err != nil {
		return err
	}
	name := generations.PrivateFolder + "/" + correctedName + ".toml"
	// Not written in place of the old one: the folder is the keeper's, and this is
	// not.
	if err := disk.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := disk.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no such folder
	}
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chown(keeper, keeper), f.Sync(), f.Close())
}

// begin forgets where the scrub stopped if the file system was corrected since.
func (s *Scrub) begin() {
	var c corrected
	err := s.cfg.Store.ReadRecord(correctedName, &c)
	if errors.Is(err, fs.ErrNotExist) || err == nil && c.ID == s.r.Corrected {
		return
	}
	if err != nil {
		s.cfg.Log.Warn("whether the file system was corrected cannot be read", "err", err)
		return
	}
	s.cfg.Log.Warn("the file system was corrected: everything is read anew")
	s.r = record{Format: 1, LastFull: s.r.LastFull, Share: s.r.Share, Corrected: c.ID}
}
