// Package contentname knows the repositories whose files are named by the hash of
// their content: those of restic, and those of Borg 2 since it has packs. A file
// there is written once, under its final name, and never changed; whoever reads it
// can tell without any key whether it is what was written.
//
// It tells from the names in a tree what it is ([Recognizer]), which names are
// hashes ([Layout.Claim]), whether a content has the hash that its name says
// ([NewCheck]), and what of a living repository is only of the moment and belongs in no copy
// ([Layout.Passing]). Nothing that anybody says about a repository counts here, only its names.
//
// What it leaves to callers: what to do about a name that is not true, and to
// remember that a name alone proves nothing about who wrote the content: a hash can
// be made of anything.
//
// Sources. restic, repository versions 1 and 2: doc/design.rst, "Repository Format"
// (https://restic.readthedocs.io/en/stable/100_references.html): the SHA-256 of every
// file's bytes is its name, but for config. Borg 2: docs/internals/data-structures.rst and
// packs.rst; packs/ and index/ since 2.0.0b22 (July 2026), named by SHA-256 (pull
// requests 9783 and 9794), and by BLAKE3 since September 2026 (pull request 10363).
// What looks like a hash and is none that can be checked without the key: archives/ of Borg 2,
// and data/ of its betas before b22, which are named by a MAC of the plain text.
package contentname

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"

	"lukechampine.com/blake3"
)

// Layout is a kind of repository whose files are named by their content.
type Layout string

// The layouts that are known.
const (
	None   Layout = ""       // any other tree
	Restic Layout = "restic" // repository version 1 or 2
	Borg2  Layout = "borg2"  // with packs: 2.0.0b22 and later
)

// String is what a person calls a repository of this layout, with its article.
func (l Layout) String() string {
	switch l {
	case Restic:
		return "a restic repository"
	case Borg2:
		return "a Borg 2 repository"
	}
	return "a plain folder of files"
}

// Role is what a file of a repository is for.
type Role int

// The roles of files. Only the first four are of files whose names can be hashes.
const (
	Other    Role = iota
	Pack          // the backups themselves
	Index         // says where in the packs things lie; can be made anew from them
	Key           // opens the repository with a passphrase
	Snapshot      // the beginning of one backup: restic's snapshot, Borg's archive
	Identity      // says which repository it is: written once, and hardly ever again
)

// IDSize is the length of the hashes, in bytes.
const IDSize = 32

// ID is the hash of a content.
type ID [IDSize]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// parseID reads the 64 lower case hexadecimal digits that both programs write.
func parseID(name string) (id ID, ok bool) {
	if len(name) != 2*IDSize || strings.Trim(name, "0123456789abcdef") != "" {
		return id, false
	}
	_, err := hex.Decode(id[:], []byte(name))
	return id, err == nil
}

// Claim returns what the file at path is for, and the hash that its name says its
// content has; ok is false for a name that says nothing of the kind.
func (l Layout) Claim(path string) (id ID, role Role, ok bool) {
	folder, name, found := strings.Cut(path, "/")
	if !found {
		if l == Restic && path == "config" {
			return id, Identity, false
		}
		return id, Other, false
	}
	switch {
	case l == Restic && folder == "data", l == Borg2 && folder == "packs":
		// One folder between: the first two digits again.
		first, rest, _ := strings.Cut(name, "/")
		id, ok = parseID(rest)
		if ok = ok && first == rest[:2]; ok {
			return id, Pack, true
		}
		return id, Other, false
	case l == Restic && folder == "snapshots":
		id, ok = parseID(name)
		return id, Snapshot, ok
	case l == Borg2 && folder == "archives":
		// A MAC of its plain text: nobody can check it without the key.
		if _, ok := parseID(name); ok {
			return id, Snapshot, false
		}
		return id, Other, false
	case l != None && folder == "index":
		id, ok = parseID(name)
		return id, Index, ok
	case l != None && folder == "keys":
		id, ok = parseID(name)
		return id, Key, ok
	case l == Borg2 && (path == borg2ID || path == borg2Version):
		return id, Identity, false
	}
	return id, Other, false
}

const (
	borg2ID      = "config/id"
	borg2Version = "config/version"
)

// Passing reports whether the file at path is only of the moment: a lock, or what a
// program is still writing. In a copy a lock would be a stale one, held by nobody,
// and have to be broken before the copy can be used.
func (l Layout) Passing(path string) bool {
	folder, name, found := strings.Cut(path, "/")
	if l == None || !found {
		return false
	}
	switch folder {
	case "locks":
		return true
	case "data", "packs", "index", "keys", "snapshots", "archives", "config", "cache":
	default:
		return false
	}
	name = name[strings.LastIndexByte(name, '/')+1:]
	if l == Borg2 {
		// borgstore's names for what it has not written to its end.
		return strings.HasSuffix(name, ".tmp") || strings.HasPrefix(name, "temp-")
	}
	// restic's local and sftp back ends, and its rest-server: the final name, then this.
	if len(name) <= 2*IDSize {
		return false
	}
	if _, ok := parseID(name[:2*IDSize]); !ok {
		return false
	}
	for _, mark := range []string{"-tmp-", "-restic-temp-", ".rest-server-temp"} {
		if strings.HasPrefix(name[2*IDSize:], mark) {
			return true
		}
	}
	return false
}

// Recognizer tells from the names in a tree what it is. The zero value has seen
// nothing.
type Recognizer struct{ seen uint }

// What has to be seen.
const (
	resticConfig = 1 << iota
	resticData
	resticIndex
	resticSnapshots
	someKey
	borg2IDSeen
	borg2VersionSeen
	borg2Packs

	allRestic = resticConfig | resticData | resticIndex | resticSnapshots | someKey
	allBorg2  = borg2IDSeen | borg2VersionSeen | borg2Packs
)

// See takes the next name of the tree, in any order; folder says that it is one.
func (r *Recognizer) See(path string, folder bool) {
	first, rest, below := strings.Cut(path, "/")
	if folder || below {
		switch first {
		case "data":
			r.seen |= resticData
		case "index":
			r.seen |= resticIndex
		case "snapshots":
			r.seen |= resticSnapshots
		case "packs":
			r.seen |= borg2Packs
		}
	}
	switch {
	case folder:
	case path == "config":
		r.seen |= resticConfig
	case path == borg2ID:
		r.seen |= borg2IDSeen
	case path == borg2Version:
		r.seen |= borg2VersionSeen
	case r.seen&someKey == 0 && first == "keys":
		if _, ok := parseID(rest); ok {
			r.seen |= someKey
		}
	}
}

// Layout is what the names make of the tree.
func (r *Recognizer) Layout() Layout {
	switch {
	case r.seen&allRestic == allRestic:
		return Restic
	case r.seen&allBorg2 == allBorg2:
		return Borg2
	}
	return None
}

// Hashes is how many hashes a name of this layout may have been made by.
func (l Layout) Hashes() int {
	switch l {
	case Restic:
		return 1
	case Borg2:
		return 2
	}
	return 0
}

var hashNames = []string{"SHA-256", "BLAKE3"}

// newHash is the n-th of them.
func newHash(n int) hash.Hash {
	if n == 0 {
		return sha256.New()
	}
	return blake3.New(IDSize, nil)
}

// Check takes a content and says whether it has the hash that its name says.
type Check struct {
	claim  ID
	hashes []hash.Hash
	by     string // which hash Err tells
}

// NewCheck returns a check of the file at path, nil for a name that says nothing.
// Without only it tries every hash that the name may have been made by, in one
// reading; with it, the numbered ones alone, from 0 to Hashes less one.
func (l Layout) NewCheck(path string, only ...int) *Check {
	id, _, ok := l.Claim(path)
	if !ok {
		return nil
	}
	c := &Check{claim: id}
	for n := range l.Hashes() {
		if len(only) == 0 || only[0] == n {
			if c.hashes = append(c.hashes, newHash(n)); c.by == "" {
				c.by = hashNames[n]
			}
		}
	}
	return c
}

// Write takes the next bytes of the content; it never fails.
func (c *Check) Write(p []byte) (int, error) {
	for _, h := range c.hashes {
		h.Write(p)
	}
	return len(p), nil
}

// OK reports whether what was written is what the name says.
func (c *Check) OK() bool { return c.Err() == nil }

// Err says what was written instead of what the name says.
func (c *Check) Err() error {
	var first ID
	for i, h := range c.hashes {
		sum := ID(h.Sum(nil))
		if sum == c.claim {
			return nil
		}
		if i == 0 {
			first = sum
		}
	}
	return fmt.Errorf("it is named %.16s... by the hash of its content, and has %.16s... (%s)", c.claim, first, c.by)
}

// Path is where the file lies whose name claims id.
func (l Layout) Path(role Role, id ID) string {
	name := id.String()
	switch role {
	case Pack:
		if l == Borg2 {
			return "packs/" + name[:2] + "/" + name
		}
		return "data/" + name[:2] + "/" + name
	case Index:
		return "index/" + name
	case Key:
		return "keys/" + name
	default:
		return "snapshots/" + name
	}
}
