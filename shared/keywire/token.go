package keywire

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// MaxToken bounds a token, in bytes.
const MaxToken = 64

// Token is what one grant hands out and the next request has to show. It is no
// key, but whoever knows it and has the appliance's SSH key can pass for the
// appliance, so it prints as "[redacted]" everywhere.
type Token string

// NewToken makes one of 32 random bytes.
func NewToken() Token {
	var b [32]byte
	rand.Read(b[:]) // never fails since Go 1.24
	return Token(base64.RawURLEncoding.EncodeToString(b[:]))
}

// IsToken reports whether s can be a token: 1 to 64 of what base64 for URLs is made of.
func IsToken(s string) bool {
	return s != "" && len(s) <= MaxToken && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' || r == '-')
	})
}

// Reveal returns the token itself.
func (t Token) Reveal() string { return string(t) }

// Equal compares in constant time. An empty token equals nothing.
func (t Token) Equal(other Token) bool {
	return t != "" && subtle.ConstantTimeCompare([]byte(t), []byte(other)) == 1
}

// Format implements fmt.Formatter for every verb.
func (Token) Format(f fmt.State, _ rune) { io.WriteString(f, "[redacted]") }

// LogValue implements slog.LogValuer.
func (Token) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// MarshalText implements encoding.TextMarshaler: a Token never marshals itself.
func (Token) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

const tokenWord = "token "

// TokenLine is the line on standard error that brings a new token.
func TokenLine(t Token) string { return tokenWord + t.Reveal() + "\n" }

// ParseTokenLine finds the new token in what a key server wrote to standard
// error: the first line that is one. It returns "" where there is none, as from a
// server that issues no tokens.
func ParseTokenLine(stderr string) Token {
	for line := range strings.Lines(stderr) {
		if t, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), tokenWord); ok && IsToken(t) {
			return Token(t)
		}
	}
	return ""
}
