// Package secret holds bytes that must not leak: keys, passphrases, passwords.
//
// A secret prints as "[redacted]" through every verb of fmt, through slog,
// encoding/json and encoding.TextMarshaler, so that it reaches a log, an error
// or a status page only by deliberate use of [Bytes.Reveal]. It cannot promise
// that the Go runtime never copied the bytes; short-lived processes and a
// kernel with init_on_free=1 take care of what is left behind.
package secret

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"golang.org/x/sys/unix"
)

const redacted = "[redacted]"

// Bytes is a secret byte string. The zero value is an empty secret.
type Bytes struct{ b []byte }

// New takes ownership of b: the caller must not use b afterwards.
func New(b []byte) Bytes { return Bytes{b} }

// Reveal returns the secret itself, not a copy. The slice is void after Wipe.
func (s Bytes) Reveal() []byte { return s.b }

// Len is the length of the secret in bytes.
func (s Bytes) Len() int { return len(s.b) }

// Wipe overwrites the secret with zeros. It may be called more than once.
func (s Bytes) Wipe() { clear(s.b) }

// Lock keeps the secret's pages out of swap (mlock(2)). A kernel that refuses,
// usually because RLIMIT_MEMLOCK is too low, is reported and not ignored.
func (s Bytes) Lock() error {
	if len(s.b) == 0 {
		return nil
	}
	if err := unix.Mlock(s.b); err != nil {
		return fmt.Errorf("lock %d secret bytes in memory: %w", len(s.b), err)
	}
	return nil
}

// Format implements fmt.Formatter for every verb.
func (Bytes) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler.
func (Bytes) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Text is a secret string as configuration files hold it: a password, a private
// key in its text form. Unlike Bytes it cannot be wiped; it is for secrets that
// live as long as the process.
type Text string

// Reveal returns the secret itself.
func (t Text) Reveal() string { return string(t) }

// Format implements fmt.Formatter for every verb.
func (Text) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (Text) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler: a Text never marshals itself.
func (Text) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// ErrTooLong is returned by ReadAll when the source holds more than the limit.
var ErrTooLong = errors.New("secret is longer than allowed")

// ReadAll reads a secret of at most limit bytes until EOF, into one buffer that
// never grows, so that no stale copies stay behind. On error it wipes what it read.
func ReadAll(r io.Reader, limit int) (Bytes, error) {
	buf := make([]byte, limit+1)
	n, err := io.ReadFull(r, buf)
	switch {
	case err == nil:
		clear(buf)
		return Bytes{}, fmt.Errorf("%w (%d bytes)", ErrTooLong, limit)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Bytes{buf[:n:n]}, nil
	default:
		clear(buf)
		return Bytes{}, err
	}
}
