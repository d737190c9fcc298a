// Package sdcard writes whole card images and one appliance's settings into
// copies of them. Files appear under their final name only when they are
// complete, and an image that is read is never altered. The same content gives
// the same bytes, provided that mke2fs is the same.
package sdcard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"farkeep/image/debian"
	"farkeep/image/fat"
	"farkeep/shared/atomicfile"
	"farkeep/shared/card"
	"farkeep/shared/hint"
)

// Content is what a card holds at first.
type Content struct {
	Selector, SlotA, SlotB []fat.File
	Time                   time.Time // of every file
}

// stateUUID is fixed like every other number here: it identifies nothing, the
// card's signature does.
const stateUUID = "4661726b-6565-7000-8000-737461746500"

// Write makes the image at path.
func Write(ctx context.Context, path string, c Content) error {
	return replace(path, 0o644, func(f *os.File) error {
		if err := f.Truncate(card.TotalSize); err != nil {
			return err
		}
		if _, err := f.WriteAt(masterBootRecord(), 0); err != nil {
			return err
		}
		for _, p := range card.Partitions() {
			var files []fat.File
			switch p.Number {
			case card.Selector:
				files = c.Selector
			case card.SlotA:
				files = c.SlotA
			case card.SlotB:
				files = c.SlotB
			case card.State:
				if err := makeExt4(ctx, f.Name(), p, c.Time); err != nil {
					return err
				}
				continue
			}
			if err := formatFAT(f, p, files, c.Time); err != nil {
				return fmt.Errorf("%s: %w", p.Name, err)
			}
		}
		return nil
	})
}

func formatFAT(f io.WriterAt, p card.Partition, files []fat.File, t time.Time) error {
	return fat.Format(io.NewOffsetWriter(f, p.Start), fat.Volume{
		Label: p.Label, Serial: card.Signature + uint32(p.Number), Time: t, Size: p.Size, Offset: p.Start,
	}, files)
}

func masterBootRecord() []byte {
	b := make([]byte, 512)
	binary.LittleEndian.PutUint32(b[440:], card.Signature)
	for i, p := range card.Partitions() {
		e := b[446+16*i:]
		// Cylinders, heads and sectors cannot say where this is; these values mean "see the LBA fields".
		copy(e[1:4], []byte{0xfe, 0xff, 0xff})
		e[4] = p.Type
		copy(e[5:8], []byte{0xfe, 0xff, 0xff})
		binary.LittleEndian.PutUint32(e[8:], uint32(p.Start/512))
		binary.LittleEndian.PutUint32(e[12:], uint32(p.Size/512))
	}
	b[510], b[511] = 0x55, 0xaa
	return b
}

// makeExt4 has mke2fs write a file system into the image file, with everything
// set that it would otherwise take from chance, the clock or /etc/mke2fs.conf.
func makeExt4(ctx context.Context, image string, p card.Partition, t time.Time) error {
	if err := debian.Tool("mke2fs", "e2fsprogs"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4",
		"-b", "4096", "-I", "256", "-N", "4096", "-m", "1", "-J", "size=4",
		"-O", "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-L", p.Label, "-U", stateUUID, "-M", "/state",
		"-E", fmt.Sprintf("offset=%d,hash_seed=%s,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard", p.Start, stateUUID),
		image, strconv.FormatInt(p.Size/1024, 10)+"k")
	cmd.Env = append(os.Environ(), "MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME="+strconv.FormatInt(t.Unix(), 10), "LC_ALL=C")
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: mke2fs: %w: %s", p.Name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// OpenPartition reads one of a card's FAT partitions; image is a card image or
// a whole card.
func OpenPartition(image io.ReaderAt, number int) (*fat.FS, error) {
	var signature [4]byte
	if _, err := image.ReadAt(signature[:], 440); err != nil {
		return nil, fmt.Errorf("read card image: %w", err)
	}
	if binary.LittleEndian.Uint32(signature[:]) != card.Signature {
		return nil, hint.Because(errors.New("not a Farkeep card image: it has another signature"), `make one with "farkeep-image build"`)
	}
	for _, p := range card.Partitions() {
		if p.Number == number && p.Type != 0x83 {
			v, err := fat.Open(io.NewSectionReader(image, p.Start, p.Size), p.Size)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.Name, err)
			}
			return v, nil
		}
	}
	return nil, fmt.Errorf("partition %d of the card is no FAT partition", number)
}

// Personal is what makes an image one appliance's.
type Personal struct {
	Settings  []byte // farkeep.toml, already checked
	RelayLine int    // the relay's GPIO line, negative for none
	// RelayActiveHigh says that a high level powers the disk.
	RelayActiveHigh bool
}

// Personalise writes a copy of the image at from to the path to.
func Personalise(ctx context.Context, from, to string, p Personal) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("open image: %w", err)
	}
	defer in.Close()
	selector, err := OpenPartition(in, card.Selector)
	if err != nil {
		return fmt.Errorf("image %s: %w", from, err)
	}
	if same(in, to) {
		return hint.Because(fmt.Errorf("%s is the image itself", to), "give --out another name: the image stays as it is, for other appliances")
	}
	// A personalised image holds the appliance's own keys.
	return replace(to, 0o600, func(out *os.File) error {
		if err := copySparse(ctx, out, in); err != nil {
			return err
		}
		if err := writeSettings(out, selector, p.Settings); err != nil {
			return err
		}
		for _, slot := range []card.Slot{card.A, card.B} {
			if err := writeRelay(out, slot, p); err != nil {
				return fmt.Errorf("slot %s: %w", slot, err)
			}
		}
		return nil
	})
}

func same(in *os.File, path string) bool {
	a, err := in.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// writeSettings makes the selector partition anew, because a file that was not
// there before needs a place; it is small.
func writeSettings(out *os.File, selector *fat.FS, settings []byte) error {
	files := []fat.File{{Name: card.SettingsFile, Data: settings}}
	for _, name := range selector.Names() {
		if name == card.ErrorFile || isSettings(name) {
			continue
		}
		data, err := selector.ReadFile(name)
		if err != nil {
			return fmt.Errorf("selector: %w", err)
		}
		files = append(files, fat.File{Name: name, Data: data})
	}
	p := card.Partitions()[card.Selector-1]
	if err := zero(out, p.Start, p.Size); err != nil {
		return fmt.Errorf("selector: %w", err)
	}
	return formatFAT(out, p, files, selector.Time)
}

func isSettings(name string) bool {
	for _, s := range card.SettingsNames() {
		if strings.EqualFold(name, s) {
			return true
		}
	}
	return false
}

// writeRelay overwrites a slot's relay.txt, which has exactly one sector.
func writeRelay(out *os.File, slot card.Slot, p Personal) error {
	v, err := OpenPartition(out, slot.Partition())
	if err != nil {
		return err
	}
	line := card.RelayConfig(p.RelayLine, p.RelayActiveHigh)
	offset, size, err := v.Locate(card.RelayFile)
	if err != nil {
		return err
	}
	if int(size) != len(line) {
		return fmt.Errorf("%s has %d bytes, not %d", card.RelayFile, size, len(line))
	}
	_, err = out.WriteAt(line, card.Partitions()[slot.Partition()-1].Start+offset)
	return err
}

// PersonaliseFolder writes the settings onto a mounted selector partition. It
// leaves the slots alone, which are not mounted there: the relay's idle level
// before Linux runs is then whatever the slots say.
func PersonaliseFolder(dir string, settings []byte) error {
	if _, err := os.Stat(filepath.Join(dir, card.AutobootFile)); err != nil {
		return hint.Because(fmt.Errorf("%s is not a Farkeep boot partition: no %s", dir, card.AutobootFile),
			"flash the image first, then name the folder where the partition %s is mounted", card.Partitions()[0].Label)
	}
	if err := atomicfile.Write(filepath.Join(dir, card.SettingsFile), settings, 0o600); err != nil {
		return err
	}
	// An old file under the other accepted name, or an old error, would only confuse.
	for _, name := range append(card.SettingsNames()[1:], card.ErrorFile) {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove old %s: %w", name, err)
		}
	}
	return nil
}

// replace makes path from what fill writes into a new file, or leaves it as it was.
func replace(path string, perm os.FileMode, fill func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}

const block = 64 << 10

// copySparse copies an image and leaves holes where it holds nothing but zeros.
func copySparse(ctx context.Context, out *os.File, in io.ReaderAt) error {
	if err := out.Truncate(card.TotalSize); err != nil {
		return err
	}
	buf, zeros := make([]byte, block), make([]byte, block)
	for at := int64(0); at < card.TotalSize; at += block {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := in.ReadAt(buf, at); err != nil {
			return fmt.Errorf("read image at %d: %w", at, err)
		}
		if bytes.Equal(buf, zeros) {
			continue
		}
		if _, err := out.WriteAt(buf, at); err != nil {
			return err
		}
	}
	return nil
}

// zero overwrites what is not zero yet, which keeps holes.
func zero(f *os.File, at, size int64) error {
	buf, zeros := make([]byte, block), make([]byte, block)
	for end := at + size; at < end; at += block {
		if _, err := f.ReadAt(buf, at); err != nil {
			return err
		}
		if bytes.Equal(buf, zeros) {
			continue
		}
		if _, err := f.WriteAt(zeros, at); err != nil {
			return err
		}
	}
	return nil
}
