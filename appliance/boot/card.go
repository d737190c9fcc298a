package boot

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"farkeep/appliance/board"
	"farkeep/shared/card"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"

	"golang.org/x/sys/unix"
)

// ParseWords reads the kernel command line.
func ParseWords(cmdline string) Words {
	signature, slot := card.ParseCommandLine(cmdline)
	fields := strings.Fields(cmdline)
	return Words{
		Card: signature, Slot: string(slot),
		Debug:    cut(fields, "farkeep.log=") == "debug",
		Watchdog: cut(fields, "farkeep.watchdog="),
	}
}

// Card is the card that the machine started from.
type Card struct {
	Disk string // kernel name, for instance mmcblk0
	// Device files of the partitions.
	Selector, State string
}

const (
	selectorDir = "/boot"
	safe        = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

func findCard(ctx context.Context, m *Machine) error {
	signature := m.Words.Card
	if signature == "" {
		signature = fmt.Sprintf("%08x", card.Signature)
	}
	// The controller's driver has just been loaded.
	for {
		c, err := FindCard("/", signature)
		if err == nil {
			m.Card = c
			m.Log.Info("card found", "disk", c.Disk)
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// FindCard looks for the whole disk with the given MBR signature. The card's
// own slot goes before disks that anybody can plug in, so that a stick with a
// copied signature does not replace the card.
func FindCard(root, signature string) (Card, error) {
	disks, err := filepath.Glob(filepath.Join(root, "sys/class/block/*"))
	if err != nil {
		return Card{}, fmt.Errorf("find the card: %w", err)
	}
	slices.SortStableFunc(disks, func(a, b string) int { return rank(a) - rank(b) })
	for _, dir := range disks {
		if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
			continue
		}
		name := filepath.Base(dir)
		got, err := mbrSignature(filepath.Join(root, "dev", name))
		if err != nil || got != signature {
			continue // empty readers, other people's disks
		}
		c := Card{Disk: name}
		for number, path := range map[int]*string{card.Selector: &c.Selector, card.State: &c.State} {
			part, err := partition(dir, number)
			if err != nil {
				return Card{}, fmt.Errorf("card %s: %w", name, err)
			}
			*path = filepath.Join(root, "dev", part)
		}
		return c, nil
	}
	return Card{}, fmt.Errorf("find the card: no disk has the signature %s: %w", signature, fs.ErrNotExist)
}

// rank orders disks by how hard it is to exchange them.
func rank(dir string) int {
	for i, prefix := range []string{"mmcblk", "vd", "nvme"} {
		if strings.HasPrefix(filepath.Base(dir), prefix) {
			return i
		}
	}
	return 9
}

// mbrSignature reads bytes 440 to 443 of a disk.
func mbrSignature(device string) (string, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var sector [512]byte
	if _, err := io.ReadFull(f, sector[:]); err != nil {
		return "", err
	}
	if sector[510] != 0x55 || sector[511] != 0xaa {
		return "", errors.New("no MBR")
	}
	return fmt.Sprintf("%08x", binary.LittleEndian.Uint32(sector[440:])), nil
}

// partition finds a disk's partition by its number.
func partition(disk string, number int) (string, error) {
	files, err := filepath.Glob(filepath.Join(disk, "*/partition"))
	if err != nil {
		return "", err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(text)) == strconv.Itoa(number) {
			return filepath.Base(filepath.Dir(file)), nil
		}
	}
	// The kernel may still be reading the table.
	return "", fmt.Errorf("partition %d: %w", number, fs.ErrNotExist)
}

func checkBoard(_ context.Context, m *Machine) error {
	b, err := board.Check("/")
	if err != nil {
		return err
	}
	m.Board = b
	m.Log.Info("board", "name", b.Name)
	return nil
}

// withSelector mounts the boot partition, calls f and unmounts it again: the
// less it is mounted, the less a power cut can do to it.
func (m *Machine) withSelector(writable bool, f func(dir string) error) error {
	return withFAT(m.Card.Selector, writable, f)
}

// withFAT mounts one of the card's FAT partitions for f.
func withFAT(device string, writable bool, f func(dir string) error) (err error) {
	flags := uintptr(safe)
	if !writable {
		flags |= unix.MS_RDONLY
	}
	if err := os.MkdirAll(selectorDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", selectorDir, err)
	}
	if err := unix.Mount(device, selectorDir, "vfat", flags, "umask=0077"); err != nil {
		return fmt.Errorf("mount the boot partition %s: %w", device, err)
	}
	defer func() {
		if uerr := unix.Unmount(selectorDir, 0); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unmount the boot partition: %w", uerr))
		}
	}()
	return f(selectorDir)
}

func readSettings(_ context.Context, m *Machine) error {
	hadError := false
	err := m.withSelector(false, func(dir string) (err error) {
		hadError = board.HasError(dir)
		m.Settings, err = ReadSettings(dir)
		return err
	})
	if err != nil {
		return err
	}
	m.Log.Info("settings read", "name", m.Settings.Name, "site", m.Settings.Site)
	if hadError {
		if err := m.withSelector(true, board.ClearError); err != nil {
			m.Log.Warn("an old error file stays", "err", err)
		}
	}
	return nil
}

// ReadSettings reads farkeep.toml from a folder, under any of the names that
// computers give it.
func ReadSettings(dir string) (*settings.Appliance, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("look for the settings: %w", err)
	}
	for _, want := range card.SettingsNames() {
		for _, e := range entries {
			if !strings.EqualFold(e.Name(), want) || !e.Type().IsRegular() {
				continue
			}
			text, err := readBounded(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, fmt.Errorf("read the settings: %w", err)
			}
			s, err := settings.Parse(e.Name(), text)
			if err != nil {
				return nil, hint.Because(err, "correct this line of %s on this partition, or have farkeep-image write the file again", e.Name())
			}
			if s.VPN.PrivateKey == "" {
				return nil, hint.Because(fmt.Errorf("%s: the table [vpn] is missing: this image has no other VPN", e.Name()),
					"have farkeep-image write the file again")
			}
			return s, nil
		}
	}
	return nil, hint.Because(fmt.Errorf("%s is not on this partition: %w", card.SettingsFile, fs.ErrNotExist),
		"copy the file that \"farkeep-image site init\" made for this appliance here")
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, tomlfile.MaxSize+1))
}

// Explain puts what is wrong onto the boot partition, if there is one.
func (m *Machine) Explain(err error) error {
	if m.Card.Selector == "" {
		return errors.New("no card to write the error to")
	}
	return m.withSelector(true, func(dir string) error {
		return board.WriteError(dir, board.ErrorText(m.Version, err))
	})
}

const fsckFile = "/sbin/e2fsck"

func mountState(ctx context.Context, m *Machine) error {
	err := m.mountCardState(ctx)
	if err != nil {
		m.StateLost = err
		// Everything works but what must survive a power cut.
		if terr := unix.Mount("tmpfs", m.Paths.State, "tmpfs", safe, "mode=0755,size=32m"); terr != nil {
			return errors.Join(err, fmt.Errorf("keep the state in RAM: %w", terr))
		}
	}
	marker := filepath.Join(m.Paths.State, "supervisor")
	if _, serr := os.Lstat(marker); errors.Is(serr, fs.ErrNotExist) {
		m.FirstBoot = m.StateLost == nil
	}
	if merr := os.MkdirAll(marker, 0o700); merr != nil {
		return errors.Join(err, fmt.Errorf("make %s: %w", marker, merr))
	}
	return err
}

func (m *Machine) mountCardState(ctx context.Context) error {
	if err := os.MkdirAll(m.Paths.State, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", m.Paths.State, err)
	}
	if err := m.fsck(ctx); err != nil {
		return err
	}
	if err := unix.Mount(m.Card.State, m.Paths.State, "ext4", safe|unix.MS_NOATIME, "errors=remount-ro,commit=10"); err != nil {
		return fmt.Errorf("mount the state partition %s: %w", m.Card.State, err)
	}
	return nil
}

// fsck checks the state partition: first what is safe to repair, then, because
// what lies there can be made again, everything.
func (m *Machine) fsck(ctx context.Context) error {
	if _, err := os.Stat(fsckFile); errors.Is(err, fs.ErrNotExist) {
		m.Log.Warn("the state partition is not checked: e2fsck is not in this image")
		return nil
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("check the state partition: %w", err)
	}
	defer null.Close()
	for _, mode := range []string{"-p", "-y"} {
		code, err := m.Run(ctx, null, fsckFile, mode, m.Card.State)
		if err != nil {
			return fmt.Errorf("check the state partition: %w", err)
		}
		// e2fsck(8): 0 clean, 1 corrected, 2 corrected and a reboot is advised,
		// which is for mounted file systems.
		if code < 4 {
			m.Log.Info("state partition checked", "mode", mode, "code", code)
			return nil
		}
		m.Log.Warn("state partition is damaged", "mode", mode, "code", code)
	}
	return errors.New("the state partition is damaged beyond repair")
}
