package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"farkeep/shared/card"
	"farkeep/shared/settings"
)

// relayFile makes relay.txt in both slots agree with the settings. farkeep-image
// personalise writes it; a settings file that was copied onto the card by hand
// comes without it, and until the next start the relay's line floats.
func relayFile(_ context.Context, m *Machine) error {
	want := relayConfig(m.Settings.Disk.Relay)
	var errs []error
	for _, slot := range []card.Slot{card.A, card.B} {
		name, err := partition(filepath.Join("/sys/block", m.Card.Disk), slot.Partition())
		if err == nil {
			err = m.updateSlot(filepath.Join("/dev", name), want)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("slot %s: %w", slot, err))
		}
	}
	return errors.Join(errs...)
}

func relayConfig(r settings.Relay) []byte {
	line := r.Line
	if r.Driver == "none" {
		line = -1
	}
	return card.RelayConfig(line, r.Active != "low")
}

func (m *Machine) updateSlot(device string, want []byte) error {
	stale := false
	err := withFAT(device, false, func(dir string) error {
		have, err := readBounded(filepath.Join(dir, card.RelayFile))
		stale = err == nil && !bytes.Equal(have, want)
		return err
	})
	if err != nil || !stale {
		return err
	}
	m.Log.Info("the boot loader learns the relay's idle level", "partition", device)
	return withFAT(device, true, func(dir string) error { return overwrite(filepath.Join(dir, card.RelayFile), want) })
}

// overwrite replaces the content of a file of one sector in place: on FAT that
// is one write, where a new file under the old name would be several.
func overwrite(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != int64(len(content)) {
		return fmt.Errorf("%s has %d bytes, not %d: it is left as it is", path, info.Size(), len(content))
	}
	if _, err := f.WriteAt(content, 0); err != nil {
		return err
	}
	return f.Sync()
}
