package bundle

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"farkeep/keyserver/runbook"
	"farkeep/shared/borgconfig"
	"farkeep/shared/borgsegment"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/tomlfile"

	"github.com/pelletier/go-toml/v2"
)

// Borg's keys need no borg to be exported: a key file is, byte for byte, what "borg
// key export" writes, and the key of a repokey repository is a value of its config
// file, under the same first line (Borg 1.2, crypto/keymanager.py).

const (
	keyMagic      = "BORG_KEY "
	maxKeyFile    = 64 << 10 // Borg's have less than 1 KiB
	maxKeysFolder = 1000     // files looked at in a folder of keys
	// InventoryFile says which repositories a machine has, beside their keys.
	InventoryFile = "repositories.toml"
)

// ErrNotAKey means that a file is none of Borg's keys.
var ErrNotAKey = errors.New("not a key file of Borg")

// BorgKey is one key as borg key export writes it. It is under the repository's
// passphrase.
type BorgKey struct {
	ID     string // of the repository, 64 hexadecimal digits
	Export secret.Bytes
}

// ParseBorgKey reads a key file.
func ParseBorgKey(text []byte) (BorgKey, error) {
	if len(text) > maxKeyFile {
		return BorgKey{}, fmt.Errorf("%w: longer than %d bytes", ErrNotAKey, maxKeyFile)
	}
	first, rest, ok := strings.Cut(string(text), "\n")
	id := strings.TrimSpace(strings.TrimPrefix(first, keyMagic))
	if !ok || !strings.HasPrefix(first, keyMagic) || !isDigest(id) {
		return BorgKey{}, ErrNotAKey
	}
	if blob, err := unwrap(rest); err != nil || len(blob) == 0 {
		return BorgKey{}, fmt.Errorf("%w: its content is damaged", ErrNotAKey)
	}
	return BorgKey{ID: id, Export: secret.New(bytes.Clone(text))}, nil
}

func unwrap(base64Lines string) ([]byte, error) {
	return base64.StdEncoding.DecodeString(strings.Join(strings.Fields(base64Lines), ""))
}

// Paper is the key as borg key export --paper prints it, for borg key import
// --paper: lines of 18 bytes, each with a check of its own.
func (k BorgKey) Paper() (secret.Text, error) {
	_, rest, _ := strings.Cut(string(k.Export.Reveal()), "\n")
	blob, err := unwrap(rest)
	if err != nil {
		return "", fmt.Errorf("print a key of Borg: %w", ErrNotAKey)
	}
	defer clear(blob)
	groups := func(s string) string {
		var out []string
		for part := range slices.Chunk([]byte(s), 6) {
			out = append(out, string(part))
		}
		return strings.Join(out, " ")
	}
	short := func(b []byte, n int) string {
		sum := sha256.Sum256(b)
		return hex.EncodeToString(sum[:])[:n]
	}
	const line = 18
	lines := (len(blob) + line - 1) / line
	id, whole := k.ID[:18], short(blob, 12)
	var out strings.Builder
	fmt.Fprintf(&out, "BORG PAPER KEY v1\nid: %d / %s / %s - %s\n", lines, groups(id), groups(whole), short(fmt.Appendf(nil, "%d/%s/%s", lines, id, whole), 2))
	for i := range lines {
		part := blob[i*line : min((i+1)*line, len(blob))]
		fmt.Fprintf(&out, "%2d: %s - %s\n", i+1, groups(hex.EncodeToString(part)), short(append([]byte{byte((i + 1) >> 8), byte(i + 1)}, part...), 2))
	}
	return secret.Text(out.String()), nil
}

// Inventory is what one machine knows of its repositories.
type Inventory struct {
	Repositories []Repository
	Keys         []BorgKey // of key files, and of the repositories themselves
	Notes        []string  // what could not be looked at
}

// Wipe overwrites the keys.
func (v *Inventory) Wipe() {
	for _, k := range v.Keys {
		k.Export.Wipe()
	}
}

func (v *Inventory) note(format string, args ...any) {
	v.Notes = append(v.Notes, fmt.Sprintf(format, args...))
}

// Look finds the repositories of a host ("" is home) as site.toml names them, as far
// as this machine has them, and the key files in the folders.
func Look(s *site.Site, host string, folders []string) *Inventory {
	v := &Inventory{}
	own := s.Of(host)
	for _, r := range own.Repositories {
		v.repository(r.Name, r.Path, host, true)
	}
	for _, f := range own.Folders {
		entries, err := os.ReadDir(f.Path)
		if err != nil {
			v.note("%s is not here: which repositories are in it is not known", f.Path)
			continue
		}
		for _, e := range entries {
			if name := f.Prefix + e.Name(); e.IsDir() && !slices.Contains(f.Exclude, e.Name()) && settings.IsRepository(name) {
				v.repository(name, filepath.Join(f.Path, e.Name()), host, false)
			}
		}
	}
	for _, folder := range folders {
		v.keyFolder(folder)
	}
	return v
}

// repository looks at one; named ones are in the inventory whatever they are.
func (v *Inventory) repository(name, path, host string, named bool) {
	r := Repository{Name: name, Host: host, Key: runbook.KeyUnknown}
	text, err := readSmall(filepath.Join(path, "config"), borgconfig.MaxSize)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(path); err == nil {
			r.Key = runbook.KeyNoBorg
		}
	case err == nil:
		config, err := borgconfig.Parse(text)
		if err != nil {
			r.Key = runbook.KeyNoBorg
			break
		}
		r.ID = config.ID
		if key, ok := keyInConfig(config.ID, text); ok {
			r.Key = runbook.KeyInRepository
			v.Keys = append(v.Keys, key)
		} else if r.Key, err = keyOf(path); err != nil {
			v.note("%s: %v", path, err)
		}
	default:
		v.note("%s: %v", path, err)
	}
	if named || r.ID != "" {
		v.Repositories = append(v.Repositories, r)
	}
}

// keyInConfig is the export of a key that the repository holds itself.
func keyInConfig(id string, config []byte) (BorgKey, bool) {
	var blob []string
	inside := false
	for line := range strings.Lines(string(config)) {
		trimmed := strings.TrimSpace(line)
		key, value, isSetting := strings.Cut(trimmed, "=")
		switch {
		case inside && trimmed != "" && (line[0] == ' ' || line[0] == '\t'):
			blob = append(blob, trimmed)
		case isSetting && strings.EqualFold(strings.TrimSpace(key), "key"):
			inside = true
			if value = strings.TrimSpace(value); value != "" {
				blob = append(blob, value)
			}
		default:
			inside = false
		}
	}
	if len(blob) == 0 {
		return BorgKey{}, false
	}
	key, err := ParseBorgKey([]byte(keyMagic + id + "\n" + strings.Join(blob, "\n") + "\n"))
	return key, err == nil
}

// keyOf says where the key of a repository without one in its config is, by the
// first byte of what is stored in it (Borg 1.2, crypto/key.py: TYPE).
func keyOf(path string) (string, error) {
	found := errors.New("found")
	kind := runbook.KeyUnknown
	err := filepath.WalkDir(filepath.Join(path, "data"), func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		if _, ok := borgsegment.Number(e.Name()); !ok {
			return nil
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		reader := borgsegment.NewReader(borgsegment.Headers)
		reader.Reset(f, info.Size())
		var entry borgsegment.Entry
		for reader.Next(&entry) {
			at, size := entry.Data()
			if entry.Tag != borgsegment.Put || size < 1 {
				continue
			}
			var first [1]byte
			if _, err := f.ReadAt(first[:], at); err != nil {
				return err
			}
			switch first[0] {
			case 0x00, 0x04:
				kind = runbook.KeyFile
			case 0x02:
				kind = runbook.KeyNone
			case 0x01, 0x03, 0x05, 0x06, 0x07:
				// Its key should be in its config, and is not: what a bundle can hold is a key file.
				kind = runbook.KeyFile
			default:
				continue
			}
			return found
		}
		return nil
	})
	if err != nil && !errors.Is(err, found) {
		return kind, err
	}
	return kind, nil
}

// keyFolder takes the key files of a folder, and the inventory in it if there is one.
func (v *Inventory) keyFolder(folder string) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		v.note("%s: %v", folder, err)
		return
	}
	for i, e := range entries {
		if i == maxKeysFolder {
			v.note("%s has more than %d files: the rest was not looked at", folder, maxKeysFolder)
			return
		}
		path := filepath.Join(folder, e.Name())
		if !e.Type().IsRegular() {
			continue
		}
		if e.Name() == InventoryFile {
			v.inventory(path)
			continue
		}
		text, err := readSmall(path, maxKeyFile)
		if err != nil {
			v.note("%s: %v", path, err)
			continue
		}
		key, err := ParseBorgKey(text)
		clear(text)
		if err != nil {
			if bytes.HasPrefix(text, []byte(keyMagic)) {
				v.note("%s: %v", path, err)
			}
			continue
		}
		v.Keys = append(v.Keys, key)
	}
}

type inventoryText struct {
	Repositories []Repository `toml:"repository"`
}

func (v *Inventory) inventory(path string) {
	var read inventoryText
	if err := tomlfile.Read(path, &read); err != nil {
		v.note("%v", err)
		return
	}
	for _, r := range read.Repositories {
		r.Keys = nil
		if !r.valid() {
			v.note("%s: %.80q is no repository", path, r.Name)
			continue
		}
		v.Repositories = append(v.Repositories, r)
	}
}

// Write puts an inventory and its keys into a new folder, for the laptop where the
// bundle is made.
func (v *Inventory) Write(folder string) error {
	c := newContents()
	named, _ := v.named()
	var text inventoryText
	text.Repositories = named.repositories
	b, err := toml.Marshal(text)
	if err != nil {
		return fmt.Errorf("write the inventory: %w", err)
	}
	if err := c.put(InventoryFile, b); err != nil {
		return err
	}
	for _, f := range named.files {
		if err := c.put(filepath.Base(f.name), f.data); err != nil {
			return err
		}
	}
	return c.writeFolder(folder, false)
}

type keyFile struct {
	name string
	data []byte
}

type namedKeys struct {
	repositories []Repository
	files        []keyFile
}

// named gives each key its name in a bundle, and each repository its keys. What
// several machines say of a repository is joined. Strangers are keys of no
// repository that is known: they are taken along, because they may be one's.
func (v *Inventory) named() (n namedKeys, strangers int) {
	n.repositories = slices.Clone(v.Repositories)
	slices.SortStableFunc(n.repositories, func(a, b Repository) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		// Who knows more stands first.
		return boolOrder(a.Key == runbook.KeyUnknown, b.Key == runbook.KeyUnknown)
	})
	n.repositories = slices.CompactFunc(n.repositories, func(a, b Repository) bool { return a.Name == b.Name })
	taken := map[string]bool{}
	var same [][sha256.Size]byte
	for _, k := range v.Keys {
		sum := sha256.Sum256(k.Export.Reveal())
		if slices.Contains(same, sum) {
			continue
		}
		same = append(same, sum)
		var owner *Repository
		for i := range n.repositories {
			if n.repositories[i].ID == k.ID {
				owner = &n.repositories[i]
				break
			}
		}
		base, ending := "repository-"+k.ID[:16], ".keyfile"
		if owner != nil {
			base = owner.Name
			if owner.Key == runbook.KeyInRepository {
				ending = ".repokey"
			}
		} else {
			strangers++
		}
		name := base + ending
		for i := 2; taken[name]; i++ {
			name = fmt.Sprintf("%s-%d%s", base, i, ending)
		}
		taken[name] = true
		name = keysFolder + "/" + name
		n.files = append(n.files, keyFile{name, bytes.Clone(k.Export.Reveal())})
		if owner != nil {
			owner.Keys = append(slices.Clone(owner.Keys), name)
		}
	}
	return n, strangers
}

func boolOrder(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// readSmall reads a regular file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(bufio.NewReader(f), limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		clear(b)
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return b, nil
}
