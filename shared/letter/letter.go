// Package letter makes the text of a mail that a program writes (RFC 5322): one
// plain part, UTF-8, quoted-printable.
//
// Whatever stands in subject and body, it cannot make a header, end the mail
// early or make a line too long; a text that an outbox would refuse is refused
// here, and so is an address that would break a line. That from and to are
// addresses is for the caller to know: settings and site.toml take nothing else.
package letter

import (
	"bytes"
	"fmt"
	"mime"
	"mime/quotedprintable"
	"net/mail"
	"regexp"
	"strings"
	"time"
	"unicode"

	"farkeep/shared/outbox"
)

// maxSubject bounds a subject, in runes: encoded, it stays below the 998 bytes
// of RFC 5322 §2.1.1.
const maxSubject = 150

// maxAddress bounds an address, in bytes: a local part of 64, "@", a domain of 255
// (RFC 5321 §4.5.3.1).
const maxAddress = 320

var domainPattern = regexp.MustCompile(`^[A-Za-z0-9.-]{1,255}$`)

// Letter is a mail before it has a sender.
type Letter struct {
	ID      string // as for an outbox; the Message-ID is made of it
	Subject string
	Body    string // lines end in \n
	Date    time.Time
}

// Text is the complete mail; lines end in CRLF. It is outbox.MaxSize bytes at most.
func (l Letter) Text(from string, to []string) ([]byte, error) {
	for _, a := range append([]string{from}, to...) {
		if len(a) > maxAddress || strings.ContainsFunc(a, unicode.IsControl) {
			return nil, fmt.Errorf("write mail %s: %.60q is no address", l.ID, a)
		}
	}
	domain := from[strings.LastIndexByte(from, '@')+1:]
	if !domainPattern.MatchString(domain) {
		domain = "farkeep.invalid" // RFC 2606; an internationalised domain
	}
	var recipients []string
	for _, a := range to {
		recipients = append(recipients, (&mail.Address{Address: a}).String())
	}
	var b bytes.Buffer
	header := func(name, value string) { fmt.Fprintf(&b, "%s: %s\r\n", name, value) }
	header("From", (&mail.Address{Name: "Farkeep", Address: from}).String())
	header("To", strings.Join(recipients, ",\r\n "))
	header("Subject", mime.QEncoding.Encode("utf-8", Line(l.Subject, maxSubject)))
	header("Date", l.Date.UTC().Format(time.RFC1123Z))
	header("Message-ID", "<"+l.ID+"@"+domain+">")
	header("Auto-Submitted", "auto-generated") // RFC 3834: no vacation replies
	header("MIME-Version", "1.0")
	header("Content-Type", "text/plain; charset=utf-8")
	header("Content-Transfer-Encoding", "quoted-printable")
	b.WriteString("\r\n")
	q := quotedprintable.NewWriter(&b)
	if _, err := q.Write([]byte(strings.ReplaceAll(strings.ToValidUTF8(l.Body, "?"), "\n", "\r\n"))); err != nil {
		return nil, fmt.Errorf("write mail %s: %w", l.ID, err)
	}
	if err := q.Close(); err != nil {
		return nil, fmt.Errorf("write mail %s: %w", l.ID, err)
	}
	if b.Len() > outbox.MaxSize {
		return nil, fmt.Errorf("write mail %s: %d bytes, more than %d", l.ID, b.Len(), outbox.MaxSize)
	}
	return b.Bytes(), nil
}

// Line makes one line of at most limit runes out of text that somebody else
// wrote: no control character, nothing that a reader shows as a new line.
func Line(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\u2028' || r == '\u2029' || r == '\u0085' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if r := []rune(s); len(r) > limit {
		s = string(r[:limit]) + " ..."
	}
	return strings.TrimSpace(s)
}
