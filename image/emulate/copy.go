package emulate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// Copy copies an image to the new file at path, mode 0600, for a machine to write to. Blocks of zeros become
// holes, so a mostly empty image takes little room.
func Copy(ctx context.Context, image, path string) (err error) {
	in, err := os.Open(image)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if e := out.Close(); err == nil {
			err = e
		}
		if err != nil {
			os.Remove(path)
			err = fmt.Errorf("copy %s: %w", image, err)
		}
	}()
	block, zeros := make([]byte, 64<<10), make([]byte, 64<<10)
	var at int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(in, block)
		if n > 0 && !bytes.Equal(block[:n], zeros[:n]) {
			if _, err := out.WriteAt(block[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return out.Truncate(at)
		}
		if err != nil {
			return err
		}
	}
}
