package localcall

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"

	"farkeep/shared/hint"
)

// Call asks the part at path for verb and decodes its one reply into v, which
// may be nil. It waits until ctx ends, CallTimeout at most if ctx has no
// deadline.
func Call(ctx context.Context, path, verb string, args, v any) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, CallTimeout)
		defer cancel()
	}
	c, err := Open(ctx, path, verb, args)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.ReadReply(v); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("%s: %w", verb, err)
	}
	return nil
}

// Open begins a call of verb whose raw bytes the caller then exchanges by the
// Conn. The call ends with ctx; the caller closes it.
func Open(ctx context.Context, path, verb string, args any) (*Conn, error) {
	raw, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("%s: arguments: %w", verb, err)
	}
	var d net.Dialer
	uc, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, hint.Exit(hint.ExitUnreachable, fmt.Errorf("%s: %w", verb, err))
	}
	c := newConn(ctx, uc.(*net.UnixConn))
	if err := c.writeLine(Request{Verb: verb, Args: raw}); err != nil {
		// A part that refuses at once may have answered before it read.
		if !errors.Is(err, errLine) {
			if answer := c.ReadReply(nil); answer != nil {
				err = answer
			}
		}
		c.Close()
		return nil, fmt.Errorf("%s: %w", verb, err)
	}
	return c, nil
}

// strict decodes exactly one JSON value without unknown fields. No arguments at
// all are the same as null.
func strict(data []byte, v any) error {
	if len(data) == 0 {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one value")
	}
	return nil
}
