// Package unlock opens the encrypted disk: it fetches the key and hands it to
// the kernel's dm-crypt. It is the whole of the part "unlock", a process that
// lives for seconds: the disk part starts one for every attempt, and it exits
// as soon as the mapping exists, so that no process of the appliance holds the
// key or the volume key while the disk is open. What the process leaves in
// memory the kernel clears (init_on_free=1).
//
// The key is in no file, argument, environment or log. The process locks its
// memory against swapping and allows no core dump and no debugger ([keysource.Confine]).
//
// The LUKS header is checked (package luksheader) before luks.go sees it, and
// luks.go is given the checked bytes themselves, from memory: a disk that
// answers two reads differently gains nothing, and a header whose primary copy
// is damaged opens by its secondary, without a write to the disk. Only slots
// with PBKDF2 are tried: an Argon2 slot asks for more memory than a small board
// has, and the slots that Farkeep makes are PBKDF2 (their keys are random).
package unlock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"

	"farkeep/appliance/keysource"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/appliance/tokens"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"github.com/anatol/devmapper.go"
	"github.com/anatol/luks.go"
	"golang.org/x/sys/unix"
)

// Brief is what the disk part tells the part unlock.
type Brief struct {
	Identity   secret.Text // what the appliance shows to key servers
	KeyServers []settings.KeyServer
	UUID       string // of the LUKS header that the disk must have
	Device     string // its node
	Mapping    string // the name under which the opened disk appears
	// Tokens are what the servers gave with the last key, by host key.
	Tokens map[string]keywire.Token
	// Refused are the servers, by host key, that refused last. While there is one
	// only they are asked, and the disk opens when each of them has given a key.
	Refused []string
	Claims  keywire.Claims // what this part adds are those about the header
}

// Result is how the attempt ended; of secrets it holds tokens alone, which do
// not print.
type Result struct {
	OK           bool   `json:"ok"`
	Minor        uint32 `json:"minor"`         // of the mapping: /dev/dm-<minor>
	HeaderDigest string `json:"header_digest"` // luksheader's Fingerprint; "" before the header was accepted
	HeaderDamage string `json:"header_damage"` // luksheader's Damage
	Slots        int    `json:"slots"`         // key slots in use
	Server       string `json:"server"`        // the key server whose key opened it
	// Tokens came with keys, also where the disk did not open, by host key.
	Tokens tokens.Fresh `json:"tokens"`
	// Granted are those of Brief.Refused that gave a key.
	Granted   []string `json:"granted"`
	ErrorKind string   `json:"error_kind"` // one of package status
	Error     string   `json:"error"`
	Hint      string   `json:"hint"`
}

// Run is the part unlock: one attempt, one result line. Its error is nil when
// the result, good or bad, was delivered.
func Run(ctx context.Context, env *part.Env) error {
	if err := keysource.Confine(); err != nil {
		return env.Result(Result{ErrorKind: status.ErrorHung, Error: err.Error(), Hint: hint.Of(err)})
	}
	brief, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	return env.Result(Attempt(ctx, env.Log, brief, kernel{}))
}

// Mapper makes mappings; the kernel is one.
type Mapper interface {
	// Map makes the mapping for volume, which luks.go has unsealed, and returns
	// its minor number. After an error there is no mapping.
	Map(volume *luks.Volume, name string) (minor uint32, err error)
}

// failure is an error with its kind.
type failure struct {
	kind string
	err  error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// Attempt opens the disk once. It blocks for as long as the slowest key server
// may take, or until ctx ends.
func Attempt(ctx context.Context, log *slog.Logger, b Brief, m Mapper) Result {
	r := Result{}
	err := attempt(ctx, log, b, m, &r)
	if err == nil {
		r.OK = true
		return r
	}
	var f *failure
	switch {
	case errors.As(err, &f):
		r.ErrorKind = f.kind
	case errors.Is(err, keysource.ErrWrongKey):
		r.ErrorKind = status.ErrorWrongKey
		err = hint.Because(err, "the key server holds the key of another disk or of an older header, or the disk's key slot is damaged: give the key server the right key with \"farkeep-keyserver add\", or restore the header from the operator's backup with cryptsetup luksHeaderRestore")
	case errors.Is(err, keysource.ErrRefused):
		r.ErrorKind = status.ErrorRefused
		err = hint.Because(err, "on the key server \"farkeep-keyserver list\" says whether it was revoked (\"allow\" lets it in again) or waits for a person (\"approve\")")
	default:
		r.ErrorKind = status.ErrorUnreachable
		err = hint.Because(err, "check that the VPN is up and that the key server runs")
	}
	r.Error, r.Hint = err.Error(), hint.Of(err)
	return r
}

func attempt(ctx context.Context, log *slog.Logger, b Brief, m Mapper, r *Result) error {
	h, err := readHeader(b)
	if err != nil {
		return err
	}
	r.HeaderDigest, r.HeaderDamage, r.Slots = h.Fingerprint(), h.Damage, len(h.Slots)
	if h.Damage != "" {
		log.Error("the LUKS header is damaged; its other copy is used", "damage", h.Damage)
	}
	// The header first, the key second: a disk that cannot be opened anyway
	// gives no reason to let a key out.
	volumes, err := openVolumes(h, b.Device)
	if err != nil {
		return err
	}
	defer volumes.Close()

	id, err := identity.Signer(b.Identity)
	if err != nil {
		return fmt.Errorf("client identity: %w", err)
	}
	servers, err := keysource.Servers(b.KeyServers, id)
	if err != nil {
		return err
	}
	var sources []keysource.Source
	refusing := map[string]string{} // those that have to grant, with their names
	for _, s := range servers {
		if len(b.Refused) == 0 || slices.Contains(b.Refused, s.ID()) {
			sources = append(sources, s)
		}
		if slices.Contains(b.Refused, s.ID()) {
			refusing[s.ID()] = s.String()
		}
	}
	found, err := keysource.Find(ctx, log, sources, keysource.Stagger, func(s keysource.Source) keywire.Request {
		return keywire.Request{Verb: keywire.Key, UUID: b.UUID, Token: b.Tokens[s.ID()], Claims: claims(b.Claims, h)}
	}, func(s keysource.Source, key secret.Bytes) error {
		if _, refused := refusing[s.ID()]; refused {
			delete(refusing, s.ID())
			r.Granted = append(r.Granted, s.ID())
		}
		volume, err := volumes.unseal(key)
		switch {
		case err != nil:
			return err
		case volume == nil:
			return keysource.ErrWrongKey
		case len(refusing) > 0:
			return fmt.Errorf("%w by %s, which has to agree as well", keysource.ErrRefused, strings.Join(slices.Sorted(maps.Values(refusing)), " and "))
		}
		minor, err := m.Map(volume, b.Mapping)
		if err != nil {
			return &failure{status.ErrorHung, fmt.Errorf("map %s as %s: %w", b.Device, b.Mapping, err)}
		}
		r.Minor = minor
		return nil
	})
	r.Tokens = found.Tokens
	if err != nil {
		return err
	}
	r.Server = found.From.String()
	return nil
}

// claims adds to c what the header says.
func claims(c keywire.Claims, h *luksheader.Header) keywire.Claims {
	c.Header, c.Slots = h.Fingerprint(), len(h.Slots)
	c.Damage = Damage(h.Damage)
	return c
}

// Damage is a claim's word for luksheader's damage.
func Damage(damage string) string {
	switch {
	case strings.HasPrefix(damage, keywire.DamagePrimary):
		return keywire.DamagePrimary
	case damage != "":
		return keywire.DamageSecondary
	default:
		return ""
	}
}

func readHeader(b Brief) (*luksheader.Header, error) {
	f, err := os.Open(b.Device)
	if err != nil {
		return nil, &failure{status.ErrorMissing, err}
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, &failure{status.ErrorHung, fmt.Errorf("size of %s: %w", b.Device, err)}
	}
	h, err := luksheader.Check(f, size)
	switch {
	case err == nil && h.UUID != b.UUID:
		return nil, &failure{status.ErrorMissing, fmt.Errorf("%s is LUKS disk %s, not %s", b.Device, h.UUID, b.UUID)}
	case err == nil:
		return h, nil
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, &failure{status.ErrorHung, fmt.Errorf("%s: %w", b.Device, err)}
	default:
		return nil, &failure{status.ErrorBadHeader, hint.Because(fmt.Errorf("%s: %w", b.Device, err),
			"attach the disk to a Linux machine and restore its header from the operator's backup: cryptsetup luksHeaderRestore --header-backup-file FILE DEVICE")}
	}
}

// volumes unseals the volume key of one checked header.
type volumes struct {
	dev    luks.Device
	mem    *os.File
	h      *luksheader.Header
	device string
	slots  []luksheader.Slot
}

// openVolumes gives luks.go the checked header from memory: a file that exists
// nowhere, as long as the disk and empty but for its beginning.
func openVolumes(h *luksheader.Header, device string) (*volumes, error) {
	v := &volumes{h: h, device: device}
	for _, s := range h.Slots {
		if s.KDF == "pbkdf2" && s.Priority > 0 {
			v.slots = append(v.slots, s)
		}
	}
	if len(v.slots) == 0 {
		return nil, &failure{status.ErrorBadHeader, hint.Because(errors.New("the disk has no key slot with PBKDF2"),
			"give it one with \"farkeep-image disk adopt\"")}
	}
	// The quickest first: ours have the fewest iterations.
	slices.SortStableFunc(v.slots, func(a, b luksheader.Slot) int { return a.Iterations - b.Iterations })

	fd, err := unix.MemfdCreate("luks header", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("header in memory: %w", err)
	}
	v.mem = os.NewFile(uintptr(fd), "luks header")
	if _, err := v.mem.Write(h.Canonical()); err != nil {
		v.mem.Close()
		return nil, fmt.Errorf("header in memory: %w", err)
	}
	if err := v.mem.Truncate(h.DataOffset + h.DataSize); err != nil {
		v.mem.Close()
		return nil, fmt.Errorf("header in memory: %w", err)
	}
	v.dev, err = luks.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		v.mem.Close()
		return nil, &failure{status.ErrorBadHeader, fmt.Errorf("%s: %w", device, err)}
	}
	return v, nil
}

func (v *volumes) Close() error {
	return errors.Join(v.dev.Close(), v.mem.Close())
}

// unseal returns the volume that key opens, nil if it opens none.
func (v *volumes) unseal(key secret.Bytes) (*luks.Volume, error) {
	for _, s := range v.slots {
		volume, err := v.dev.UnsealVolume(s.ID, key.Reveal())
		if errors.Is(err, luks.ErrPassphraseDoesNotMatch) {
			continue
		}
		if err != nil {
			return nil, &failure{status.ErrorBadHeader, fmt.Errorf("%s, key slot %d: %w", v.device, s.ID, err)}
		}
		volume.BackingDevice = v.device
		volume.StorageSize = uint64(v.h.DataSize)
		return volume, nil
	}
	return nil, nil
}

// kernel maps with the kernel's device mapper.
type kernel struct{}

func (kernel) Map(volume *luks.Volume, name string) (uint32, error) {
	if _, err := devmapper.InfoByName(name); err == nil {
		return 0, fmt.Errorf("there is a mapping %s already", name)
	}
	if err := volume.SetupMapper(name); err != nil {
		// It may have got as far as a mapping without a table.
		return 0, errors.Join(err, removeIfThere(name))
	}
	info, err := devmapper.InfoByName(name)
	if err != nil {
		return 0, errors.Join(err, removeIfThere(name))
	}
	return unix.Minor(info.DevNo), nil
}

func removeIfThere(name string) error {
	if err := devmapper.Remove(name); err != nil && !errors.Is(err, unix.ENXIO) {
		return err
	}
	return nil
}
