package generations

import (
	"bytes"
	"fmt"
	"io/fs"
	"regexp"

	"farkeep/shared/tomlfile"

	"github.com/pelletier/go-toml/v2"
)

// MaxRecord bounds a record, in bytes.
const MaxRecord = 1 << 20

var recordName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,63}$`)

func recordFile(name string) (string, error) {
	if !recordName.MatchString(name) {
		return "", fmt.Errorf("%.80q is not the name of a record: small letters, digits, dots and dashes, 64 at most", name)
	}
	return name + ".toml", nil
}

// ReadRecord reads what WriteRecord wrote into v, a pointer to a struct with toml
// tags; a key that v does not know is an error. Without such a record the error
// wraps fs.ErrNotExist.
//
// Records hold what must not be forgotten with the SD card. They lie on the disk,
// in .farkeep/, where only the store's owner reads and writes.
func (s *Store) ReadRecord(name string, v any) error {
	file, err := recordFile(name)
	if err != nil {
		return err
	}
	if s.private == nil { // opened read-only, and there is none
		return fmt.Errorf("read record %s: %w", name, fs.ErrNotExist)
	}
	text, err := s.private.ReadFile(file, MaxRecord)
	if err != nil {
		return fmt.Errorf("read record %s: %w", name, err)
	}
	if err := tomlfile.Parse(PrivateFolder+"/"+file, text, v); err != nil {
		return fmt.Errorf("read record %s: %w", name, err)
	}
	return nil
}

// WriteRecord replaces the record name, [a-z0-9-.]+, by v, at most MaxRecord bytes
// of TOML. A power cut leaves the old or the new one; when WriteRecord returned,
// the new one.
func (s *Store) WriteRecord(name string, v any) error {
	file, err := recordFile(name)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := toml.NewEncoder(&text).Encode(v); err != nil {
		return fmt.Errorf("write record %s: %w", name, err)
	}
	if text.Len() > MaxRecord {
		return fmt.Errorf("write record %s: %d bytes, at most %d are possible", name, text.Len(), MaxRecord)
	}
	s.records.Lock()
	defer s.records.Unlock()
	if err := s.writeFile(s.private, file, text.Bytes(), 0o600); err != nil {
		return fmt.Errorf("write record %s: %w", name, err)
	}
	return nil
}
