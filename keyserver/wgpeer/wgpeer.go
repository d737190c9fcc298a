// Package wgpeer takes a peer out of a WireGuard tunnel, out of the interface as
// it runs and out of the file that wg-quick(8) reads, so that it stays out after
// the next start.
//
// It only ever removes. A peer that is not there is no error: taking it out twice
// is the same as once.
package wgpeer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"farkeep/shared/atomicfile"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// maxConf bounds the file of wg-quick, in bytes: 500 peers take 100 KiB.
const maxConf = 1 << 20

// ErrNoInterface means that this machine has no WireGuard interface of that name.
var ErrNoInterface = errors.New("no such WireGuard interface here")

// Cut removes the peer with a public key from a running interface and reports
// whether it was there. It needs CAP_NET_ADMIN.
func Cut(iface, publicKey string) (was bool, err error) {
	key, err := wgtypes.ParseKey(publicKey)
	if err != nil {
		return false, fmt.Errorf("take a peer out of %s: %w", iface, err)
	}
	c, err := wgctrl.New()
	if err != nil {
		return false, fmt.Errorf("take a peer out of %s: %w", iface, err)
	}
	defer c.Close()
	if was, err = has(c, iface, key); err != nil || !was {
		return was, err
	}
	if err := c.ConfigureDevice(iface, wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, Remove: true, UpdateOnly: true}}}); err != nil {
		return true, fmt.Errorf("take a peer out of %s: %w", iface, err)
	}
	// What the kernel says afterwards counts, not that it did not complain.
	if still, err := has(c, iface, key); err != nil || still {
		return true, errors.Join(fmt.Errorf("take a peer out of %s: it is still there", iface), err)
	}
	return true, nil
}

func has(c *wgctrl.Client, iface string, key wgtypes.Key) (bool, error) {
	d, err := c.Device(iface)
	if errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("%w: %s", ErrNoInterface, iface)
	}
	if err != nil {
		return false, fmt.Errorf("look at the WireGuard interface %s: %w", iface, err)
	}
	for _, p := range d.Peers {
		if p.PublicKey == key {
			return true, nil
		}
	}
	return false, nil
}

// Strike removes the peer with a public key from a file of wg-quick, in one
// step, and reports whether it was there. Mode and owner stay, everything else
// in the file as well.
func Strike(path, publicKey string) (was bool, err error) {
	if _, err := wgtypes.ParseKey(publicKey); err != nil {
		return false, fmt.Errorf("strike a peer from %s: %w", path, err)
	}
	// A link, as some systems have it for /etc/wireguard, stays one.
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return false, fmt.Errorf("strike a peer: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("strike a peer: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false, errors.Join(fmt.Errorf("strike a peer: %s is not a regular file", path), err)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err != nil || len(text) > maxConf {
		return false, errors.Join(fmt.Errorf("strike a peer: read %s, %d bytes at most", path, maxConf), err)
	}
	// The old content has the private key in it, and so has the copy.
	defer clear(text)
	rest, was := without(text, publicKey)
	defer clear(rest)
	if !was {
		return false, nil
	}
	if err := atomicfile.Write(path, rest, info.Mode().Perm()); err != nil {
		return true, fmt.Errorf("strike a peer: %w", err)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
			return true, fmt.Errorf("strike a peer: %w", err)
		}
	}
	return true, nil
}

// without returns a file of wg-quick less every [Peer] section that names the
// key. A section goes from its header to the next one; blank lines between two
// sections go with the first of them.
func without(text []byte, publicKey string) (rest []byte, found bool) {
	var section []byte
	hit := false
	end := func() {
		if hit {
			found = true
		} else {
			rest = append(rest, section...)
		}
		section, hit = section[:0], false
	}
	peer := false
	for line := range bytes.Lines(text) {
		// wg(8): a # begins a comment, names of keys and sections know no case.
		bare, _, _ := strings.Cut(string(line), "#")
		bare = strings.TrimSpace(bare)
		if strings.HasPrefix(bare, "[") {
			end()
			peer = strings.EqualFold(bare, "[Peer]")
		}
		section = append(section, line...)
		if name, value, ok := strings.Cut(bare, "="); ok && peer && strings.EqualFold(strings.TrimSpace(name), "PublicKey") && strings.TrimSpace(value) == publicKey {
			hit = true
		}
	}
	end()
	return rest, found
}
