// Package couriertest is a mail provider for tests: a real SMTP submission
// server on localhost, with TLS, that refuses what a test wants refused.
package couriertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

// Options say how the provider differs from a good one.
type Options struct {
	TLS       string    // "implicit", "starttls" or "none"
	Mechanism string    // "PLAIN" (default) or "LOGIN"
	From, To  time.Time // when its certificate is valid; default now
	Name      string    // the name in its certificate; default localhost
}

// Mail is one that was accepted.
type Mail struct {
	From string
	To   []string
	Text string
}

// Provider is the server.
type Provider struct {
	Address string // localhost and a port
	CA      []byte // PEM of the authority that signed its certificate

	mu       sync.Mutex // guards the fields below
	mails    []Mail
	answer   func(stage, arg string) error
	sessions int
	logins   []string
	arrived  chan struct{} // closed when a mail arrives
}

// Start starts a provider that ends with the test.
func Start(t testing.TB, o Options) *Provider {
	t.Helper()
	if o.From.IsZero() {
		o.From, o.To = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	if o.Name == "" {
		o.Name = "localhost"
	}
	if o.Mechanism == "" {
		o.Mechanism = sasl.Plain
	}
	p := &Provider{arrived: make(chan struct{})}
	var certificate tls.Certificate
	p.CA, certificate = authority(t, o)
	server := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.sessions++
		return &visit{p: p, mechanism: o.Mechanism}, nil
	}))
	server.Domain = "provider.example"
	server.ErrorLog = discard{}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}}
	if o.TLS != "none" {
		server.TLSConfig = config
	}
	server.AllowInsecureAuth = true // so that a client which would log in without TLS is seen
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.Address = "localhost" + l.Addr().String()[strings.LastIndexByte(l.Addr().String(), ':'):]
	if o.TLS == "implicit" {
		l = tls.NewListener(l, config)
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return p
}

// Answer makes the provider ask f at each stage of a delivery ("auth", "mail",
// "rcpt", "data") what to answer; nil accepts everything.
func (p *Provider) Answer(f func(stage, arg string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = f
}

// Reply is an error for Answer: an SMTP reply with this code.
func Reply(code int) error {
	return &smtp.SMTPError{Code: code, EnhancedCode: smtp.EnhancedCode{code / 100, 0, 0}, Message: "because\r\nof this"}
}

// Mails are those that were accepted, oldest first.
func (p *Provider) Mails() []Mail {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.mails)
}

// Arrived is closed when the next mail is accepted.
func (p *Provider) Arrived() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.arrived
}

// Sessions is how many connections there were.
func (p *Provider) Sessions() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sessions
}

// Logins are the users that logged in or tried to, each with a colon and its password.
func (p *Provider) Logins() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.logins)
}

func (p *Provider) say(stage, arg string) error {
	p.mu.Lock()
	answer := p.answer
	p.mu.Unlock()
	if answer == nil {
		return nil
	}
	return answer(stage, arg)
}

type discard struct{}

func (discard) Printf(string, ...any) {}
func (discard) Println(...any)        {}

func authority(t testing.TB, o Options) ([]byte, tls.Certificate) {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	caKey, leafKey := key(), key()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().AddDate(-20, 0, 0), NotAfter: time.Now().AddDate(20, 0, 0)}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{o.Name}, NotBefore: o.From, NotAfter: o.To,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: leafKey}
}

type visit struct {
	p         *Provider
	mechanism string
	now       Mail
}

func (v *visit) AuthMechanisms() []string { return []string{v.mechanism} }
func (v *visit) Auth(string) (sasl.Server, error) {
	check := func(user, password string) error {
		v.p.mu.Lock()
		v.p.logins = append(v.p.logins, user+":"+password)
		v.p.mu.Unlock()
		return v.p.say("auth", user)
	}
	if v.mechanism == sasl.Login {
		return &loginServer{check: check}, nil
	}
	return sasl.NewPlainServer(func(_, user, password string) error { return check(user, password) }), nil
}

// loginServer is AUTH LOGIN, which go-sasl has only the client of.
type loginServer struct {
	check func(user, password string) error
	got   []string
}

func (l *loginServer) Next(response []byte) (challenge []byte, done bool, err error) {
	if response != nil {
		l.got = append(l.got, string(response))
	}
	switch len(l.got) {
	case 0:
		return []byte("Username:"), false, nil
	case 1:
		return []byte("Password:"), false, nil
	default:
		return nil, true, l.check(l.got[0], l.got[1])
	}
}

func (v *visit) Mail(from string, _ *smtp.MailOptions) error {
	v.now = Mail{From: from}
	return v.p.say("mail", from)
}

func (v *visit) Rcpt(to string, _ *smtp.RcptOptions) error {
	if err := v.p.say("rcpt", to); err != nil {
		return err
	}
	v.now.To = append(v.now.To, to)
	return nil
}

func (v *visit) Data(r io.Reader) error {
	text, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if err := v.p.say("data", string(text)); err != nil {
		return err
	}
	v.now.Text = string(text)
	v.p.mu.Lock()
	defer v.p.mu.Unlock()
	v.p.mails = append(v.p.mails, v.now)
	close(v.p.arrived)
	v.p.arrived = make(chan struct{})
	return nil
}

func (v *visit) Reset()        {}
func (v *visit) Logout() error { return nil }
