package place

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"time"

	"farkeep/shared/atomicfile"
)

const (
	// DefaultPath is where the file lies: a file system in memory, gone with the
	// boot whose clock its times count in.
	DefaultPath = "/run/farkeep-keyserver/endpoints.json"
	// MaxPeers bounds how many peers are followed.
	MaxPeers = 2000
	maxFile  = 16 << 20
	version  = 1
)

// File is one look at the VPN, as root's part writes it and the key server reads it.
type File struct {
	Version int           `json:"version"`
	Boot    string        `json:"boot"`  // of the machine
	Taken   time.Duration `json:"taken"` // CLOCK_BOOTTIME of the look, in nanoseconds
	Peers   []Peer        `json:"peers"`
}

// Write puts f where the key server finds it. It is no secret to the machine's users.
func (f File) Write(path string) error {
	text, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return atomicfile.Write(path, append(text, '\n'), 0o644)
}

// ReadFile reads what Write wrote.
func ReadFile(path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil {
		var file File
		if file, err = ParseFile(text); err == nil {
			return file, nil
		}
	}
	return File{}, fmt.Errorf("read %s: %w", path, err)
}

var bootPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// ParseFile reads a file; whatever this package would not write is an error.
func ParseFile(text []byte) (File, error) {
	if len(text) > maxFile {
		return File{}, fmt.Errorf("larger than %d bytes", maxFile)
	}
	var f File
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return File{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return File{}, errors.New("there is something behind the endpoints")
	}
	switch {
	case f.Version != version:
		return File{}, fmt.Errorf("version %d, this program knows %d", f.Version, version)
	case !bootPattern.MatchString(f.Boot):
		return File{}, fmt.Errorf("%q is no boot id", f.Boot)
	case f.Taken < 0 || len(f.Peers) > MaxPeers:
		return File{}, errors.New("the time or the number of peers makes no sense")
	}
	seen := map[id]bool{}
	for _, p := range f.Peers {
		if err := p.check(f.Taken); err != nil {
			return File{}, fmt.Errorf("peer %.64q: %w", p.Peer, err)
		}
		if k := (id{p.Source, p.Peer}); seen[k] {
			return File{}, fmt.Errorf("peer %.64q: named twice", p.Peer)
		} else {
			seen[k] = true
		}
	}
	return f, nil
}

func (p Peer) check(taken time.Duration) error {
	switch {
	case p.Source != SourceWireGuard && p.Source != SourceTailscale:
		return fmt.Errorf("%q is no VPN", p.Source)
	case p.Peer == "" || len(p.Peer) > 128 || len(p.Allowed) > maxAllowed || len(p.Trail) > Visits || len(p.Recent) > maxRecent || len(p.Returns) > maxRecent:
		return errors.New("its size makes no sense")
	case slices.ContainsFunc(p.Allowed, func(a netip.Prefix) bool { return !a.IsValid() }):
		return errors.New("an address of it is none")
	case slices.ContainsFunc(p.Recent, func(s string) bool { return len(s) > 128 }):
		return errors.New("an endpoint of it is none")
	}
	last := time.Duration(0)
	for _, v := range p.Trail {
		if !v.Network.Valid() || v.First < last || v.Last < v.First || v.Last > taken {
			return errors.New("its trail makes no sense")
		}
		if !v.Network.IsRelay() && (!v.Endpoint.IsValid() || NetworkOf(v.Endpoint.Addr()).Name != v.Network.Name) {
			return errors.New("an endpoint is not in its network")
		}
		last = v.Last
	}
	for _, v := range p.Returns {
		if v.Last < 0 || v.Last > taken {
			return errors.New("a time makes no sense")
		}
	}
	return nil
}

// maxAllowed bounds the addresses of one peer.
const maxAllowed = 64

// Sighting is what the file says of the peer that an address in the VPN belongs
// to, according to one VPN; zero if nobody has that address.
func (f File) Sighting(source string, from netip.Addr) Sighting {
	from = from.Unmap()
	var found *Peer
	bits := -1
	for i, p := range f.Peers {
		for _, a := range p.Allowed {
			// The longest prefix wins, as it does in WireGuard.
			if p.Source == source && a.Contains(from) && a.Bits() > bits {
				found, bits = &f.Peers[i], a.Bits()
			}
		}
	}
	if found == nil {
		return Sighting{}
	}
	return Sighting{Boot: f.Boot, Source: found.Source, Peer: found.Peer, Trail: found.Trail, Flaps: found.flaps(f.Taken)}
}
