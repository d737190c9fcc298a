// Package sshverb is the one way in which Farkeep's machines speak to each
// other: SSH (RFC 4251 to 4254) reduced to public keys and exec requests that
// name a verb. There is no shell, no terminal, no environment, no forwarding, no
// password and no agent. A stock ssh or sftp can drive every verb.
//
// [Server] bounds connections, sessions, handshakes, verb lines and stalled
// peers; [Dial] pins the host key. What a verb does, and who may use it, is the
// caller's: the key's permissions come back with each [Session].
package sshverb

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"

	"farkeep/shared/hint"
)

// version begins what both sides send first. A server adds its [Server.Knows], as the
// comments of RFC 4253 §4.2.
const version = "SSH-2.0-Farkeep"

// MaxVerbLine bounds an exec request, in bytes.
const MaxVerbLine = 4096

// Error is what one side tells the other about a verb that was not carried out:
// a text fit for the peer, a hint and an exit code of package hint. Err, the
// whole truth, stays in the log of the side that made it.
type Error struct {
	Code int
	Text string
	Hint string
	Err  error
}

func (e *Error) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("%s: %v", e.Text, e.Err)
	}
	return e.Text
}

func (e *Error) Unwrap() error { return e.Err }

// Refuse makes an Error that tells the peer text, with exit code
// hint.ExitRefused, and keeps err for the log.
func Refuse(err error, text string) *Error {
	return &Error{Code: hint.ExitRefused, Text: text, Err: err}
}

// ErrBadVerb is wrapped by the errors of ParseVerb.
var ErrBadVerb = errors.New("not a verb line")

// ParseVerb splits an exec request into verb and arguments at single spaces.
// There is no quoting, because no argument of ours needs any: letters, digits
// and "._:@=/+*-," are all that a word may hold.
func ParseVerb(line string) (verb string, args []string, err error) {
	if len(line) > MaxVerbLine {
		return "", nil, fmt.Errorf("%w: longer than %d bytes", ErrBadVerb, MaxVerbLine)
	}
	words := strings.Split(line, " ")
	for _, w := range words {
		if w == "" {
			return "", nil, fmt.Errorf("%w: words are separated by one space", ErrBadVerb)
		}
		if i := strings.IndexFunc(w, forbidden); i >= 0 {
			return "", nil, fmt.Errorf("%w: %q is not allowed in a word", ErrBadVerb, w[i:i+1])
		}
	}
	return words[0], words[1:], nil
}

func forbidden(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		return false
	}
	return !strings.ContainsRune("._:@=/+*-,", r)
}

// algorithms narrows SSH to what both Farkeep and every OpenSSH since 8.5 speak.
func algorithms() ssh.Config {
	return ssh.Config{
		Ciphers:      ciphers(cpu.X86.HasAES, cpu.ARM64.HasAES),
		KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519},
		MACs:         []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM},
	}
}

// ciphers are those that a machine offers. The client's order wins in SSH
// (RFC 4253 §7.1), and x/crypto/ssh always prefers AES-GCM, which is 2.6 times
// slower than ChaCha20 on a processor without AES instructions (Pi 3, Pi 4): such
// a machine does not offer it. Of the two flags one belongs to another processor
// and is false.
func ciphers(x86AES, arm64AES bool) []string {
	if x86AES || arm64AES {
		return []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305}
	}
	return []string{ssh.CipherChaCha20Poly1305}
}
