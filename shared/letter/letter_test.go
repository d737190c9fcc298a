package letter_test

import (
	"bytes"
	"mime"
	"net/mail"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/letter"
	"farkeep/shared/outbox"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestText(t *testing.T) {
	text, err := letter.Letter{
		ID:      outbox.ID(12, "heartbeat-stale", 0xabc),
		Subject: "[WATCHDOG] nas\r\nBcc: everybody@x.example\r\n\r\nheartbeat STALE – café " + strings.Repeat("x", 2000),
		Body:    "last heartbeat: none\n.\nFrom here\n" + strings.Repeat("ä", 3000) + "\n",
		Date:    t0,
	}.Text("attic@site.example", []string{"op@site.example", "other@site.example"})
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range bytes.Split(text, []byte("\r\n")) {
		if len(l) > 998 || bytes.ContainsAny(l, "\r\n") {
			t.Errorf("line %d: %d bytes", i, len(l))
		}
	}
	m, err := mail.ReadMessage(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Header) != 9 || m.Header.Get("Bcc") != "" {
		t.Errorf("headers %v", m.Header)
	}
	subject, err := new(mime.WordDecoder).DecodeHeader(m.Header.Get("Subject"))
	if err != nil || !strings.HasPrefix(subject, "[WATCHDOG] nas  Bcc: everybody@x.example    heartbeat STALE – café xxx") {
		t.Errorf("subject %q, %v", subject, err)
	}
	to, err := m.Header.AddressList("To")
	if err != nil || len(to) != 2 || to[1].Address != "other@site.example" {
		t.Errorf("to %v, %v", to, err)
	}
	if date, err := m.Header.Date(); err != nil || !date.Equal(t0) {
		t.Errorf("date %v, %v", date, err)
	}
	if got := m.Header.Get("Message-ID"); got != "<00000012-heartbeat-stale-00000abc@site.example>" {
		t.Errorf("message id %s", got)
	}
	if _, err := (letter.Letter{Body: strings.Repeat("x", outbox.MaxSize)}).Text("a@b", nil); err == nil {
		t.Error("a mail that is too large was made")
	}
	for _, bad := range []string{strings.Repeat("a", 400) + "@b", "a\r\nBcc: x@b"} {
		if _, err := (letter.Letter{}).Text(bad, nil); err == nil {
			t.Errorf("a mail from %.40q was made", bad)
		}
		if _, err := (letter.Letter{}).Text("a@b", []string{bad}); err == nil {
			t.Errorf("a mail to %.40q was made", bad)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("[WATCHDOG] nas heartbeat STALE", "body\n", "attic@site.example")
	f.Add("a\r\nBcc: x", ".\r\n.\n", "ä@ö.example")
	f.Add("\u2028\x00\xff", "\xff", "no address")
	f.Fuzz(func(t *testing.T, subject, body, from string) {
		text, err := letter.Letter{ID: outbox.ID(1, "x", 1), Subject: subject, Body: body, Date: t0}.Text(from, []string{"op@site.example"})
		if err != nil {
			return
		}
		m, err := mail.ReadMessage(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date", "From", "Message-Id", "Mime-Version", "Subject", "To"}
		var got []string
		for name := range m.Header {
			got = append(got, name)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("headers %v", got)
		}
		for _, l := range strings.Split(string(text), "\r\n") {
			if strings.ContainsAny(l, "\r\n") || len(l) > 998 {
				t.Errorf("line %q", l)
			}
		}
	})
}
