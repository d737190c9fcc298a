package sdcard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

// window is how far back the compressor looks for repetitions. The two slots
// lie 120 MiB apart, and 128 MiB is the most that decoders accept unasked.
const window = 128 << 20

// Compress writes a zstd copy of an image, readable by every zstd decoder
// without options and by Raspberry Pi Imager. One thread, so that the bytes
// depend on the image alone.
func Compress(ctx context.Context, image, to string) error {
	in, err := os.Open(image)
	if err != nil {
		return fmt.Errorf("compress image: %w", err)
	}
	defer in.Close()
	return replace(to, 0o644, func(out *os.File) error {
		enc, err := zstd.NewWriter(out, zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(window))
		if err != nil {
			return err
		}
		_, err = io.Copy(enc, &cancellable{ctx, in})
		return errors.Join(err, enc.Close())
	})
}

type cancellable struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
