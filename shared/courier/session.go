package courier

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"farkeep/shared/settings"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	dialTimeout    = 30 * time.Second
	commandTimeout = time.Minute // RFC 5321 §4.5.3.2 asks for up to 5; this is a submission server
	sessionTimeout = 10 * time.Minute
)

// ErrAvoided is wrapped by an error that says: the mail server would be reached
// through addresses that this sender may not use.
var ErrAvoided = errors.New("the mail server's address belongs to the VPN: mail must have a way of its own")

// rejected is a permanent refusal of one mail, or of one recipient.
type rejected struct{ err error }

func (r *rejected) Error() string { return r.err.Error() }
func (r *rejected) Unwrap() error { return r.err }

// sender knows the account.
type sender struct {
	settings settings.Mail
	avoid    []netip.Prefix
	roots    *x509.CertPool
	clock    func() (now time.Time, doubt Doubt)
}

// Doubt is what may be wrong with the clock, and so with certificates' dates.
type Doubt struct {
	Behind bool // it was not set: the true time is later
	Ahead  bool // it jumped, perhaps into the future
}

// roots returns the public authorities that this program was built with, and
// extra ones in PEM. The system's are not used: the firmware has none, and a
// provider that works for one machine of a site should work for all.
func roots(extra string) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	for r := range bundle.Roots() {
		c, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			return nil, fmt.Errorf("built-in certificate authorities: %w", err)
		}
		if r.Constraint == nil {
			pool.AddCert(c)
		} else {
			pool.AddCertWithConstraint(c, r.Constraint)
		}
	}
	if strings.TrimSpace(extra) != "" && !pool.AppendCertsFromPEM([]byte(extra)) {
		return nil, errors.New("mail.root_ca holds no certificate in PEM")
	}
	return pool, nil
}

// session is one connection to the mail server, authenticated.
type session struct {
	client *smtp.Client
	stop   func() bool
	cancel context.CancelFunc
}

// open connects, always by TLS, and authenticates. The session ends with ctx.
func (s *sender) open(ctx context.Context) (*session, error) {
	now, d := s.clock()
	x, err := s.openAt(ctx, now)
	// A certificate is out of its dates: if the clock may be the reason, believe
	// the authority's signature on the dates instead. A time server that lies
	// must not be able to silence the alarms.
	for range 2 { // a leaf and an intermediate
		at, ok := d.allows(err, now)
		if !ok {
			break
		}
		x, err = s.openAt(ctx, at)
	}
	return x, err
}

// allows returns the moment at which a certificate that err is about was valid,
// if the clock's doubt covers it.
func (d Doubt) allows(err error, now time.Time) (time.Time, bool) {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired || invalid.Cert == nil {
		return time.Time{}, false
	}
	switch c := invalid.Cert; {
	case d.Behind && c.NotBefore.After(now):
		return c.NotBefore.Add(time.Minute), true
	case d.Ahead && c.NotAfter.Before(now):
		return c.NotAfter.Add(-time.Minute), true
	}
	return time.Time{}, false
}

func (s *sender) openAt(ctx context.Context, at time.Time) (*session, error) {
	host, _, err := net.SplitHostPort(s.settings.Server)
	if err != nil {
		return nil, fmt.Errorf("mail server %s: %w", s.settings.Server, err)
	}
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	dialer := net.Dialer{Timeout: dialTimeout, ControlContext: s.permitted}
	conn, err := dialer.DialContext(ctx, "tcp", s.settings.Server)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("connect to the mail server: %w", err)
	}
	// Whatever waits on the connection ends with ctx.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	client, err := s.greet(ctx, conn, &tls.Config{
		ServerName: host, RootCAs: s.roots, MinVersion: tls.VersionTLS12,
		Time: func() time.Time { return at },
	})
	if err != nil {
		stop()
		conn.Close()
		cancel()
		return nil, err
	}
	return &session{client: client, stop: stop, cancel: cancel}, nil
}

// permitted refuses a connection at the moment when its address is known, so
// that no answer of a resolver can go around it.
func (s *sender) permitted(_ context.Context, _, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := a.Addr().Unmap().WithZone("")
	if slices.ContainsFunc(s.avoid, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return ErrAvoided
	}
	return nil
}

func (s *sender) greet(ctx context.Context, conn net.Conn, config *tls.Config) (*smtp.Client, error) {
	var client *smtp.Client
	if s.settings.TLS == "implicit" {
		secure := tls.Client(conn, config)
		shake, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		if err := secure.HandshakeContext(shake); err != nil {
			return nil, fmt.Errorf("TLS with the mail server: %w", err)
		}
		client = smtp.NewClient(secure)
		client.CommandTimeout, client.SubmissionTimeout = commandTimeout, commandTimeout
	} else {
		// Bounded here, because the library's own time for the greeting is longer.
		timer := time.AfterFunc(2*commandTimeout, func() { conn.Close() })
		defer timer.Stop()
		var err error
		if client, err = smtp.NewClientStartTLS(conn, config); err != nil {
			return nil, fmt.Errorf("STARTTLS with the mail server: %w", err)
		}
		client.CommandTimeout, client.SubmissionTimeout = commandTimeout, commandTimeout
	}
	// The first command after STARTTLS makes the handshake.
	if err := client.Noop(); err != nil {
		return nil, fmt.Errorf("greet the mail server: %w", err)
	}
	if _, ok := client.TLSConnectionState(); !ok {
		return nil, errors.New("the connection to the mail server is not encrypted")
	}
	if s.settings.User == "" {
		return client, nil
	}
	var auth sasl.Client
	switch password := s.settings.Password.Reveal(); {
	case client.SupportsAuth(sasl.Plain):
		auth = sasl.NewPlainClient("", s.settings.User, password)
	case client.SupportsAuth(sasl.Login):
		auth = sasl.NewLoginClient(s.settings.User, password)
	default:
		return nil, errors.New("the mail server offers neither AUTH PLAIN nor AUTH LOGIN")
	}
	if err := client.Auth(auth); err != nil {
		return nil, fmt.Errorf("log in to the mail server: %w", err)
	}
	return client, nil
}

// send delivers one mail to those recipients for which it is not done yet, and
// marks in done who is: accepted, or refused for good. It returns nil when all
// are and one accepted at least; *rejected when nobody ever will; another error
// when it is worth trying again.
func (x *session) send(from string, to []string, text []byte, done map[string]error) error {
	if err := x.client.Mail(from, nil); err != nil {
		return permanent(fmt.Errorf("sender: %w", err))
	}
	var accepted []string
	var again error
	for _, rcpt := range to {
		if _, ok := done[rcpt]; ok {
			continue
		}
		switch err := permanent(x.client.Rcpt(rcpt, nil)); {
		case err == nil:
			accepted = append(accepted, rcpt)
		case isRejected(err):
			done[rcpt] = err
		default:
			again = fmt.Errorf("recipient: %w", err)
		}
	}
	if len(accepted) > 0 {
		if err := x.data(text); err != nil {
			return permanent(err)
		}
		for _, rcpt := range accepted {
			done[rcpt] = nil
		}
	} else if err := x.client.Reset(); err != nil && again == nil {
		again = err
	}
	if again != nil {
		return again
	}
	var refusal error
	for _, rcpt := range to {
		err, ok := done[rcpt]
		if ok && err == nil {
			return nil
		}
		refusal = err
	}
	return refusal
}

func (x *session) data(text []byte) error {
	w, err := x.client.Data()
	if err != nil {
		return fmt.Errorf("content: %w", err)
	}
	if _, err := w.Write(text); err != nil {
		return fmt.Errorf("content: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("content: %w", err)
	}
	return nil
}

func (x *session) close() {
	x.client.Quit() // the mails are delivered or not, whatever it answers
	x.client.Close()
	x.stop()
	x.cancel()
}

// permanent marks a 5yz reply (RFC 5321 §4.2.1).
func permanent(err error) error {
	var reply *smtp.SMTPError
	if errors.As(err, &reply) && reply.Code >= 500 {
		return &rejected{err}
	}
	return err
}

func isRejected(err error) bool {
	var r *rejected
	return errors.As(err, &r)
}
