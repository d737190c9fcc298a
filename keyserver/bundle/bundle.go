// Package bundle makes and checks recovery bundles: all that a person needs, with
// the disk, when home is gone.
//
//	START-HERE.txt            what this is
//	RUNBOOK.md, RUNBOOK.html  the steps; the page to print, with the keys
//	bundle.toml               what is in it
//	disks/UUID.recovery.key   opens the disk
//	disks/UUID.luks-header    for cryptsetup luksHeaderRestore
//	borg-keys/NAME.keyfile    as borg key export writes them; NAME.repokey where
//	                          the repository has its key itself
//	site/                     the operator's site folder: what rebuilds home
//	tools/                    for comfort, never required
//	SHA256SUMS                of all other files
//
// Laid out in clear it is a folder; sealed, the same folder as a tar archive under
// a passphrase, as "age -d" opens it. The paper is the page alone.
//
// A bundle is input from outside when it is read: every name passes one check,
// sizes and counts are bounded, nothing but regular files is taken, and nothing is
// written anywhere. Making one opens each disk's header with its key before
// anything is written, and runs no other program.
//
// A bundle lies outside the kill switch. It holds all secrets of the site; files
// have mode 0600 where the file system knows modes.
package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"farkeep/keyserver/runbook"
	"farkeep/shared/manifest"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"

	"github.com/pelletier/go-toml/v2"
)

// The names in a bundle.
const (
	startFile    = "START-HERE.txt"
	RunbookFile  = "RUNBOOK.md"
	PageFile     = "RUNBOOK.html"
	manifestFile = "bundle.toml"
	sumsFile     = "SHA256SUMS"
	disksFolder  = "disks"
	keysFolder   = "borg-keys"
	siteFolder   = "site"
	toolsFolder  = "tools"
	// Folder is what a sealed bundle unpacks to.
	Folder = "farkeep-bundle"
)

// Bounds of a bundle, in bytes and files.
const (
	maxFiles = 20000
	maxSmall = 64 << 20 // a file that is not a tool; the largest are LUKS headers
	maxTool  = 512 << 20
	maxTotal = 4 << 30
	maxHeld  = 1 << 30 // of what is kept in memory when a bundle is read
)

// File is one file of a bundle.
type File struct {
	Name string // slashes, relative
	Size int64
	Sum  [sha256.Size]byte
	Data []byte // nil for tools, of which only the sum is kept
	From string // the file that a tool comes from, when a bundle is made
}

// Contents are the files of a bundle. Wipe it after use.
type Contents struct {
	files map[string]*File
	total int64
}

func newContents() *Contents { return &Contents{files: map[string]*File{}} }

// ErrFormat is wrapped by all errors about what a bundle looks like.
var ErrFormat = errors.New("this is not a bundle that can be used")

// check is the one door for names and sizes.
func (c *Contents) check(name string, size int64) error {
	if err := manifest.CheckPath(name); err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	for _, r := range name {
		if r < ' ' || r == 0x7f || r == '\\' || r == 0xfffd {
			return fmt.Errorf("%w: %q has characters that a list of checksums cannot hold", ErrFormat, name)
		}
	}
	limit := int64(maxSmall)
	if isTool(name) {
		limit = maxTool
	}
	switch {
	case c.files[name] != nil:
		return fmt.Errorf("%w: %s is there twice", ErrFormat, name)
	case len(c.files) >= maxFiles:
		return fmt.Errorf("%w: more than %d files", ErrFormat, maxFiles)
	case size < 0 || size > limit:
		return fmt.Errorf("%w: %s has %d bytes, %d are allowed", ErrFormat, name, size, limit)
	case c.total+size > maxTotal:
		return fmt.Errorf("%w: more than %d bytes", ErrFormat, int64(maxTotal))
	}
	return nil
}

func isTool(name string) bool { return strings.HasPrefix(name, toolsFolder+"/") }

// put adds a file whose bytes are given.
func (c *Contents) put(name string, data []byte) error {
	if err := c.check(name, int64(len(data))); err != nil {
		return err
	}
	c.files[name] = &File{Name: name, Size: int64(len(data)), Sum: sha256.Sum256(data), Data: data}
	c.total += int64(len(data))
	return nil
}

// take reads a file of a bundle; of tools it keeps the sum.
func (c *Contents) take(name string, size int64, r io.Reader) error {
	if err := c.check(name, size); err != nil {
		return err
	}
	if !isTool(name) {
		if c.held()+size > maxHeld {
			return fmt.Errorf("%w: more than %d bytes", ErrFormat, int64(maxHeld))
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(r, data); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		return c.put(name, data)
	}
	h := sha256.New()
	if _, err := io.CopyN(h, r, size); err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	f := &File{Name: name, Size: size}
	h.Sum(f.Sum[:0])
	c.files[name] = f
	c.total += size
	return nil
}

func (c *Contents) held() (n int64) {
	for _, f := range c.files {
		n += int64(len(f.Data))
	}
	return n
}

// Names lists the files in order.
func (c *Contents) Names() []string {
	names := make([]string, 0, len(c.files))
	for name := range c.files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Data is the content of a file that is no tool; nil without it.
func (c *Contents) Data(name string) []byte {
	if f := c.files[name]; f != nil {
		return f.Data
	}
	return nil
}

// Wipe overwrites what is in memory.
func (c *Contents) Wipe() {
	for _, f := range c.files {
		clear(f.Data)
	}
}

// sums is SHA256SUMS, as sha256sum -c reads it.
func (c *Contents) sums() []byte {
	var out bytes.Buffer
	for _, name := range c.Names() {
		if name != sumsFile {
			fmt.Fprintf(&out, "%x  %s\n", c.files[name].Sum, name)
		}
	}
	return out.Bytes()
}

// checkSums compares SHA256SUMS with what is there: each file must be in it, and
// nothing else.
func (c *Contents) checkSums() []error {
	text := c.Data(sumsFile)
	if text == nil {
		return []error{fmt.Errorf("%s is missing", sumsFile)}
	}
	var problems []error
	listed := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		sum, name, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "  ")
		want, err := hex.DecodeString(sum)
		if !ok || err != nil || len(want) != sha256.Size || listed[name] {
			return []error{fmt.Errorf("%s: %.80q is no line of it", sumsFile, line)}
		}
		listed[name] = true
		switch f := c.files[name]; {
		case f == nil:
			problems = append(problems, fmt.Errorf("%.200q is missing", name))
		case !bytes.Equal(f.Sum[:], want):
			problems = append(problems, fmt.Errorf("%s is damaged or was changed", name))
		}
	}
	for _, name := range c.Names() {
		if !listed[name] && name != sumsFile {
			problems = append(problems, fmt.Errorf("%s is not in %s: somebody put it there", name, sumsFile))
		}
	}
	return problems
}

// Manifest is bundle.toml.
type Manifest struct {
	Format       int          `toml:"format"`
	Site         string       `toml:"site"`
	Created      time.Time    `toml:"created"`
	KnownBy      string       `toml:"passphrases_known_by"`
	Disks        []Disk       `toml:"disk"`
	Repositories []Repository `toml:"repository"`
}

// Disk is a disk that the bundle opens.
type Disk struct {
	Appliance string `toml:"appliance"`
	LUKS      string `toml:"luks_uuid"`
	Header    string `toml:"header"` // fingerprint of the header in the bundle
}

// Repository is what is known of a repository's key.
type Repository struct {
	Name string   `toml:"name"`
	Host string   `toml:"host"`
	ID   string   `toml:"id"`  // Borg's; "" unknown
	Key  string   `toml:"key"` // runbook.KeyInRepository and the others
	Keys []string `toml:"keys"`
}

// valid judges what was read from a file.
func (r Repository) valid() bool {
	kinds := []string{runbook.KeyInRepository, runbook.KeyFile, runbook.KeyNone, runbook.KeyNoBorg, runbook.KeyUnknown}
	for _, k := range r.Keys {
		if manifest.CheckPath(k) != nil || path.Dir(k) != keysFolder {
			return false
		}
	}
	return settings.IsRepository(r.Name) && (r.ID == "" || isDigest(r.ID)) && slices.Contains(kinds, r.Key) && (r.Host == "" || settings.IsName(r.Host))
}

// unreadable reports whether the bundle lacks a key file that the repository needs.
func (r Repository) unreadable() bool { return r.Key == runbook.KeyFile && len(r.Keys) == 0 }

const (
	formatNow       = 1
	maxDisks        = 500
	maxRepositories = 10000
	maxKnownBy      = 1000
)

func (m *Manifest) text() ([]byte, error) {
	b, err := toml.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", manifestFile, err)
	}
	return append([]byte("# What this bundle is. Farkeep compares it with the site; no secret.\n"), b...), nil
}

// ParseManifest reads a bundle.toml and judges it.
func ParseManifest(text []byte) (*Manifest, error) {
	m := &Manifest{}
	if err := tomlfile.Parse(manifestFile, text, m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s: %s", ErrFormat, manifestFile, fmt.Sprintf(format, args...))
	}
	switch {
	case m.Format != formatNow:
		return nil, bad("format %d; this program knows %d", m.Format, formatNow)
	case !settings.IsName(m.Site):
		return nil, bad("%.80q is no site's name", m.Site)
	case len(m.Disks) < 1 || len(m.Disks) > maxDisks:
		return nil, bad("%d disks", len(m.Disks))
	case len(m.Repositories) > maxRepositories:
		return nil, bad("%d repositories", len(m.Repositories))
	case len(m.KnownBy) > maxKnownBy || strings.ContainsFunc(m.KnownBy, control):
		return nil, bad("passphrases_known_by is no line of %d bytes at most", maxKnownBy)
	}
	seen := map[string]bool{}
	for _, d := range m.Disks {
		if !settings.IsName(d.Appliance) || !settings.IsLUKSUUID(d.LUKS) || !isDigest(d.Header) || seen[d.LUKS] {
			return nil, bad("%.80q is no disk", d.LUKS)
		}
		seen[d.LUKS] = true
	}
	for _, r := range m.Repositories {
		if !r.valid() || seen["repository "+r.Name] {
			return nil, bad("%.80q is no repository", r.Name)
		}
		seen["repository "+r.Name] = true
	}
	return m, nil
}

func isDigest(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

func control(r rune) bool { return r < ' ' || r == 0x7f }
