package mailsink_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/smtp"
	"strings"
	"testing"
	"time"

	"farkeep/image/mailsink"
)

const body = "From: pi@example.org\r\nTo: me@example.org\r\nSubject: =?utf-8?q?heartbeat_=E2=80=94_STALE?=\r\n\r\nhello\r\n"

func start(t *testing.T, implicit bool) *mailsink.Sink {
	t.Helper()
	s, err := mailsink.Start(mailsink.Config{
		Address: "127.0.0.1:0", ImplicitTLS: implicit, Names: []string{"mail.test", "127.0.0.1"},
		User: "pi", Password: "open sesame", Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// send delivers a mail with the standard library's client.
func send(s *mailsink.Sink, implicit bool, password string, timeout time.Duration) error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA())
	settings := &tls.Config{RootCAs: roots, ServerName: "mail.test"}
	conn, err := net.DialTimeout("tcp", s.Addr().String(), timeout)
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(timeout))
	if implicit {
		conn = tls.Client(conn, settings)
	}
	c, err := smtp.NewClient(conn, "mail.test")
	if err != nil {
		return err
	}
	defer c.Close()
	if !implicit {
		if ok, _ := c.Extension("AUTH"); ok {
			return errors.New("offers AUTH before TLS")
		}
		if err := c.StartTLS(settings); err != nil {
			return err
		}
	}
	if password != "" {
		if err := c.Auth(smtp.PlainAuth("", "pi", password, "mail.test")); err != nil {
			return err
		}
	}
	if err := c.Mail("pi@example.org"); err != nil {
		return err
	}
	if err := c.Rcpt("me@example.org"); err != nil {
		return err
	}
	w, err := c.Data()
	if err != nil {
		return err
	}
	if _, err := w.Write([]byte(body)); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return c.Quit()
}

func TestTakesMail(t *testing.T) {
	for name, implicit := range map[string]bool{"STARTTLS": false, "implicit TLS": true} {
		t.Run(name, func(t *testing.T) {
			s := start(t, implicit)
			if err := send(s, implicit, "open sesame", 10*time.Second); err != nil {
				t.Fatal(err)
			}
			m, err := s.Wait(t.Context(), func(m mailsink.Message) bool { return strings.Contains(m.Subject(), "STALE") })
			if err != nil {
				t.Fatal(err)
			}
			if m.From != "pi@example.org" || len(m.To) != 1 || m.To[0] != "me@example.org" || m.Subject() != "heartbeat — STALE" ||
				!strings.HasSuffix(string(m.Data), "\r\nhello\r\n") {
				t.Errorf("took %+v with subject %q", m, m.Subject())
			}
			for _, password := range []string{"", "wrong"} {
				if err := send(s, implicit, password, 10*time.Second); err == nil {
					t.Errorf("took a mail with password %q", password)
				}
			}
			if n := len(s.Messages()); n != 1 {
				t.Errorf("keeps %d messages, not 1", n)
			}
		})
	}
}

func TestBadDays(t *testing.T) {
	s := start(t, true)
	s.Refuse(450)
	if err := send(s, true, "open sesame", 10*time.Second); err == nil || !strings.Contains(err.Error(), "450") {
		t.Errorf("refusing: %v", err)
	}
	s.Refuse(0)
	s.Stall(true)
	var timeout net.Error
	if err := send(s, true, "open sesame", 300*time.Millisecond); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("stalling: %v", err)
	}
	s.Stall(false)
	if err := send(s, true, "open sesame", 10*time.Second); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := s.Wait(ctx, func(mailsink.Message) bool { return false })
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "heartbeat — STALE") {
		t.Errorf("waiting in vain: %v", err)
	}
	// A certificate for another name does not pass.
	if _, err := tls.Dial("tcp", s.Addr().String(), &tls.Config{}); err == nil {
		t.Error("a client that does not know the authority connects")
	}
	s.Stall(true)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Wait(t.Context(), func(mailsink.Message) bool { return false }); !errors.Is(err, net.ErrClosed) {
		t.Errorf("waiting on a closed server: %v", err)
	}
}

func TestText(t *testing.T) {
	for _, tt := range []struct{ name, data, want string }{
		{"as it is", "Subject: x\r\n\r\none\r\ntwo\r\n", "one\ntwo\n"},
		{"quoted-printable", "Content-Transfer-Encoding: quoted-printable\r\n\r\na long=\r\n line =3D 1\r\n", "a long line = 1\n"},
		{"no message", "nonsense", ""},
	} {
		if got := (mailsink.Message{Data: []byte(tt.data)}).Text(); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
