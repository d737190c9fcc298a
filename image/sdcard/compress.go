package sdcard

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"farkeep/image/debian"
)

// dictionary is how far back the compressor looks for repetitions: beyond the
// 120 MiB between the slots, so that the second one costs nothing. Unpacking
// needs as much memory.
const dictionary = "128MiB"

// Compress writes an xz copy of an image, which Raspberry Pi Imager and Etcher
// read on every system; of zstd files that is not true. One thread, so that the
// bytes depend on the image and the version of xz alone.
func Compress(ctx context.Context, image, to string) error {
	if err := debian.Tool("xz", "xz-utils"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	return replace(to, 0o644, func(out *os.File) error {
		cmd := exec.CommandContext(ctx, "xz", "--threads=1", "--check=crc64", "--lzma2=preset=6,dict="+dictionary, "--stdout", "--", image)
		// The environment can carry options of its own.
		cmd.Env = append(os.Environ(), "XZ_DEFAULTS=", "XZ_OPT=")
		var messages bytes.Buffer
		cmd.Stdout, cmd.Stderr = out, &messages
		cmd.WaitDelay = time.Second
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("xz: %w: %s", err, strings.TrimSpace(messages.String()))
		}
		return nil
	})
}
