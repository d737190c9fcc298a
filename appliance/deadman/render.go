package deadman

import (
	"bytes"
	"fmt"
	"mime"
	"mime/quotedprintable"
	"net/mail"
	"regexp"
	"strings"
	"time"

	"farkeep/appliance/outbox"
)

var domainPattern = regexp.MustCompile(`^[A-Za-z0-9.-]{1,255}$`)

// render makes the complete text of a mail (RFC 5322, lines end in CRLF). What
// other parts said may be in subject and body; it cannot make a header or a
// line too long.
func render(m Mail, from string, to []string) ([]byte, error) {
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
	header("Subject", encodeSubject(m.Subject))
	header("Date", m.Date.UTC().Format(time.RFC1123Z))
	header("Message-ID", "<"+m.ID+"@"+domain+">")
	header("Auto-Submitted", "auto-generated") // RFC 3834: no vacation replies
	header("MIME-Version", "1.0")
	header("Content-Type", "text/plain; charset=utf-8")
	header("Content-Transfer-Encoding", "quoted-printable")
	b.WriteString("\r\n")
	q := quotedprintable.NewWriter(&b)
	if _, err := q.Write([]byte(strings.ReplaceAll(strings.ToValidUTF8(m.Body, "?"), "\n", "\r\n"))); err != nil {
		return nil, fmt.Errorf("write mail %s: %w", m.ID, err)
	}
	if err := q.Close(); err != nil {
		return nil, fmt.Errorf("write mail %s: %w", m.ID, err)
	}
	if b.Len() > outbox.MaxSize {
		return nil, fmt.Errorf("write mail %s: %d bytes, more than %d", m.ID, b.Len(), outbox.MaxSize)
	}
	return b.Bytes(), nil
}

// encodeSubject keeps a subject on one line of at most 998 bytes (RFC 5322 §2.1.1).
func encodeSubject(s string) string {
	s = line(s)
	if r := []rune(s); len(r) > 150 {
		s = string(r[:150]) + " ..."
	}
	return mime.QEncoding.Encode("utf-8", s)
}
