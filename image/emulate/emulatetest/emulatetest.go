// Package emulatetest builds what tests of the emulator boot: an image as it would be flashed, with a small
// program in the appliance's place that does what kernel words tell it (see ../internal/guest).
package emulatetest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"farkeep/image/build"
	"farkeep/image/debian"
)

// BuildImage builds the image in dir and returns its path. It needs the go command, and a Debian mirror the
// first time: downloads are kept in the user's cache directory, together with those of "farkeep-image
// build".
func BuildImage(ctx context.Context, dir string) (string, error) {
	guest := filepath.Join(dir, "guest")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", guest, "farkeep/image/emulate/internal/guest")
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	o := build.Options{
		Appliance: guest,
		Out:       filepath.Join(dir, "sd.img"),
		Cache:     filepath.Join(cache, "farkeep"),
		Mirror:    debian.Mirror{Archive: os.Getenv("FARKEEP_APT_MIRROR")},
		Log:       slog.New(slog.DiscardHandler),
	}
	if o.Mirror.Archive == "" {
		if o.Mirror, err = debian.FindMirror(os.DirFS("/etc/apt")); err != nil {
			return "", err
		}
	}
	_, err = build.Build(ctx, o)
	return o.Out, err
}
