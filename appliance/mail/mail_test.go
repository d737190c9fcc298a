package mail

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/appliance/outbox"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/settings"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"github.com/google/go-cmp/cmp"
)

// provider is a real SMTP submission server.
type provider struct {
	address string
	ca      []byte // PEM

	mu       sync.Mutex // guards the fields below
	mails    []delivered
	answer   func(stage, arg string) error // nil accepts everything
	sessions int
	auths    []string
}

type delivered struct {
	From string
	To   []string
	Text string
}

type options struct {
	tls       string // "implicit", "starttls" or "none"
	mechanism string // "PLAIN" or "LOGIN"
	from, to  time.Time
	name      string
}

func startProvider(t *testing.T, o options) *provider {
	t.Helper()
	if o.from.IsZero() {
		o.from, o.to = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	if o.name == "" {
		o.name = "localhost"
	}
	if o.mechanism == "" {
		o.mechanism = sasl.Plain
	}
	p := &provider{}
	var certificate tls.Certificate
	p.ca, certificate = authority(t, o)
	server := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.sessions++
		return &visit{p: p, mechanism: o.mechanism}, nil
	}))
	server.Domain = "provider.example"
	server.ErrorLog = discard{}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}}
	if o.tls != "none" {
		server.TLSConfig = config
	}
	server.AllowInsecureAuth = true // so that a client which would log in without TLS is seen
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.address = "localhost" + l.Addr().String()[strings.LastIndexByte(l.Addr().String(), ':'):]
	if o.tls == "implicit" {
		l = tls.NewListener(l, config)
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return p
}

type discard struct{}

func (discard) Printf(string, ...any) {}
func (discard) Println(...any)        {}

func authority(t *testing.T, o options) ([]byte, tls.Certificate) {
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
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{o.name}, NotBefore: o.from, NotAfter: o.to,
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

// say answers what the test wants.
func (p *provider) say(stage, arg string) error {
	p.mu.Lock()
	answer := p.answer
	p.mu.Unlock()
	if answer == nil {
		return nil
	}
	return answer(stage, arg)
}

func (p *provider) set(answer func(stage, arg string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = answer
}

func (p *provider) got() []delivered {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.mails)
}

func (p *provider) visits() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sessions
}

type visit struct {
	p         *provider
	mechanism string
	now       delivered
}

func (v *visit) AuthMechanisms() []string { return []string{v.mechanism} }
func (v *visit) Auth(string) (sasl.Server, error) {
	check := func(user, password string) error {
		v.p.mu.Lock()
		v.p.auths = append(v.p.auths, user+":"+password)
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
	v.now = delivered{From: from}
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
	return nil
}

func (v *visit) Reset()        {}
func (v *visit) Logout() error { return nil }

// desk is a courier with everything around it.
type desk struct {
	t     *testing.T
	c     *courier
	paths part.Paths
	brief Brief
	log   *bytes.Buffer
	now   time.Time
}

func newDesk(t *testing.T, p *provider, change func(*Brief)) *desk {
	t.Helper()
	dir := t.TempDir()
	d := &desk{t: t, paths: part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}, log: &bytes.Buffer{}, now: time.Now()}
	for _, f := range []string{d.paths.RunDir(part.Mail), d.paths.StateDir(part.Mail), d.paths.RunDir(part.Network), d.paths.Outbox()} {
		if err := os.MkdirAll(f, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d.brief = Brief{Mail: settings.Mail{Server: p.address, TLS: "starttls", User: "attic", Password: "hush", From: "attic@site.example", To: []string{"op@site.example"}, RootCA: string(p.ca)}}
	if change != nil {
		change(&d.brief)
	}
	d.network(status.Network{Addresses: []string{"192.0.2.50/24"}, ClockSet: true, ClockSource: "2 of 3 sources agree"})
	d.restart()
	return d
}

// restart is the part's process anew, over what the last one left.
func (d *desk) restart() {
	d.t.Helper()
	env, err := part.New(part.Header{Name: part.Mail, Host: "attic", Paths: d.paths, Firmware: true}, d.brief, slog.New(slog.NewTextHandler(io.MultiWriter(d.log, d.t.Output()), nil)), nil)
	if err != nil {
		d.t.Fatal(err)
	}
	b, err := part.Brief[Brief](env)
	if err != nil {
		d.t.Fatal(err)
	}
	if d.c, err = newCourier(env, b); err != nil {
		d.t.Fatal(err)
	}
	d.c.wall = func() time.Time { return d.now }
}

func (d *desk) network(n status.Network) {
	d.t.Helper()
	if err := status.Write(d.paths.Status(part.Network), n); err != nil {
		d.t.Fatal(err)
	}
}

// put queues a mail and returns its id.
func (d *desk) put(serial uint64) string {
	d.t.Helper()
	id := outbox.ID(serial, "heartbeat-stale", 7)
	if err := outbox.Put(d.paths.Outbox(), id, []byte("Message-ID: <"+id+"@x>\r\nSubject: x\r\n\r\n.a line with a dot\r\n")); err != nil {
		d.t.Fatal(err)
	}
	return id
}

// work lets the courier do everything that is due now.
func (d *desk) work() status.Mail {
	d.t.Helper()
	for range 3 {
		if err := d.c.step(d.t.Context()); err != nil {
			d.t.Fatal(err)
		}
		if d.c.busy != nil {
			<-d.c.busy
		}
	}
	s, err := status.Read[status.Mail](d.paths.Status(part.Mail))
	if err != nil || s == nil {
		d.t.Fatal(s, err)
	}
	return *s
}

func TestDelivery(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    options
	}{
		{"starttls, plain", options{tls: "starttls"}},
		{"implicit, plain", options{tls: "implicit"}},
		{"starttls, login", options{tls: "starttls", mechanism: sasl.Login}},
		{"implicit, login", options{tls: "implicit", mechanism: sasl.Login}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startProvider(t, tt.o)
			d := newDesk(t, p, func(b *Brief) { b.Mail.TLS = tt.o.tls; b.Mail.To = append(b.Mail.To, "second@site.example") })
			first, second := d.put(1), d.put(2)
			s := d.work()
			if s.Queued != 0 || s.LastSent.IsZero() || s.LastError != "" {
				t.Errorf("status %+v", s)
			}
			want := delivered{From: "attic@site.example", To: []string{"op@site.example", "second@site.example"}}
			got := p.got()
			if len(got) != 2 || p.visits() < 1 {
				t.Fatalf("%d mails", len(got))
			}
			for i, id := range []string{first, second} {
				if !strings.Contains(got[i].Text, id) || !strings.Contains(got[i].Text, "\n.a line with a dot") {
					t.Errorf("mail %d: %q", i, got[i].Text)
				}
				got[i].Text = ""
				if diff := cmp.Diff(want, got[i]); diff != "" {
					t.Error(diff)
				}
			}
			if !slices.Equal(p.auths, []string{"attic:hush"}) {
				t.Errorf("logins %q", p.auths)
			}
			for _, path := range []string{d.c.record(), d.c.public()} {
				if sent, err := outbox.ReadSent(path); err != nil || !slices.Equal(sent, []string{first, second}) {
					t.Errorf("%s: %v, %v", path, sent, err)
				}
			}
			// Pruned by the outbox's owner: forgotten.
			if err := outbox.Prune(d.paths.Outbox(), []string{first}); err != nil {
				t.Fatal(err)
			}
			d.work()
			if sent, _ := outbox.ReadSent(d.c.record()); !slices.Equal(sent, []string{second}) || len(p.got()) != 2 {
				t.Errorf("sent %v, %d mails", sent, len(p.got()))
			}
			if strings.Contains(d.log.String(), "hush") {
				t.Error("the password is in the log")
			}
		})
	}
}

func TestNeverWithoutTrust(t *testing.T) {
	past, future := time.Now().AddDate(0, -2, 0), time.Now().AddDate(0, 2, 0)
	for _, tt := range []struct {
		name   string
		o      options
		change func(*Brief)
		net    status.Network // in addition to an address
		want   string         // "" means delivered
	}{
		{"another authority", options{tls: "starttls"}, func(b *Brief) { b.Mail.RootCA = "" }, status.Network{ClockSet: true}, "unknown authority"},
		{"another authority, implicit", options{tls: "implicit"}, func(b *Brief) { b.Mail.RootCA, b.Mail.TLS = "", "implicit" }, status.Network{ClockSet: true}, "unknown authority"},
		{"another name", options{tls: "starttls", name: "other.example"}, nil, status.Network{ClockSet: true}, "other.example"},
		{"a server without TLS", options{tls: "none"}, nil, status.Network{ClockSet: true}, "STARTTLS"},
		{"expired", options{tls: "starttls", from: past, to: past.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true}, "expired"},
		{"not yet valid", options{tls: "starttls", from: future, to: future.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true}, "not yet valid"},
		{"expired, by a clock that jumped", options{tls: "starttls", from: past, to: past.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true, ClockJump: "a month ahead"}, ""},
		{"not yet valid, by the last known time", options{tls: "starttls", from: future, to: future.AddDate(0, 1, 0)}, nil, status.Network{ClockSource: "last known time"}, ""},
		{"expired, by the last known time", options{tls: "starttls", from: past, to: past.AddDate(0, 1, 0)}, nil, status.Network{ClockSource: "last known time"}, "expired"},
		{"not yet valid, by a clock that jumped", options{tls: "starttls", from: future, to: future.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true, ClockJump: "a month ahead"}, "not yet valid"},
		{"inside the VPN", options{tls: "starttls"}, func(b *Brief) {
			b.VPN = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::/0")}
		}, status.Network{ClockSet: true}, "belongs to the VPN"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startProvider(t, tt.o)
			d := newDesk(t, p, tt.change)
			tt.net.Addresses = []string{"192.0.2.50/24"}
			d.network(tt.net)
			d.put(1)
			s := d.work()
			if tt.want == "" {
				if len(p.got()) != 1 {
					t.Errorf("%d mails, status %+v", len(p.got()), s)
				}
				return
			}
			if len(p.got()) != 0 || s.Queued != 1 || !strings.Contains(s.LastError, tt.want) || len(p.auths) > 0 {
				t.Errorf("%d mails, logins %q, status %+v; want %q", len(p.got()), p.auths, s, tt.want)
			}
		})
	}
}

func TestWaitsForLineAndClock(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, nil)
	d.put(1)
	for _, n := range []status.Network{{}, {Addresses: []string{"192.0.2.50/24"}}, {ClockSet: true}} {
		d.network(n)
		d.work()
	}
	if err := os.Remove(d.paths.Status(part.Network)); err != nil {
		t.Fatal(err)
	}
	d.work()
	if p.visits() != 0 {
		t.Error("it connected without a line or a clock")
	}
	d.network(status.Network{Addresses: []string{"192.0.2.50/24"}, ClockSet: true})
	d.work()
	if len(p.got()) != 1 {
		t.Error("not delivered")
	}
}

func reply(code int) error {
	return &smtp.SMTPError{Code: code, EnhancedCode: smtp.EnhancedCode{code / 100, 0, 0}, Message: "because\r\nof this"}
}

func TestTemporaryTrouble(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, nil)
	d.put(1)
	var counted atomic.Int32
	p.set(func(stage, _ string) error {
		if stage == "data" {
			counted.Add(1)
			return reply(451)
		}
		return nil
	})
	start := d.now
	for d.now.Sub(start) < 24*time.Hour {
		if s := d.work(); s.Queued != 1 || s.LastError == "" {
			t.Fatalf("status %+v", s)
		}
		d.now = d.now.Add(10 * time.Second)
	}
	if tries := counted.Load(); tries < 18 || tries > 60 {
		t.Errorf("%d tries in a day", tries)
	}
	p.set(nil)
	d.now = d.now.Add(2 * time.Hour)
	if s := d.work(); s.Queued != 0 || s.LastError != "" {
		t.Errorf("status %+v", s)
	}
	// The line came back: no waiting for the old back-off.
	d.put(2)
	p.set(func(string, string) error { return reply(421) })
	d.work()
	p.set(nil)
	d.network(status.Network{Addresses: []string{"198.51.100.9/24"}, ClockSet: true})
	if s := d.work(); s.Queued != 0 {
		t.Errorf("status %+v", s)
	}
}

func TestARefusedMailDoesNotHoldUpTheOthers(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, nil)
	poison, good := d.put(1), d.put(2)
	p.set(func(stage, arg string) error {
		if stage == "data" && strings.Contains(arg, poison) {
			return reply(554)
		}
		return nil
	})
	s := d.work()
	if got := p.got(); len(got) != 1 || !strings.Contains(got[0].Text, good) || s.Queued != 1 {
		t.Errorf("%d mails, status %+v", len(got), s)
	}
	if strings.ContainsAny(d.log.String(), "\r") {
		t.Error("a server's words broke a line of the log")
	}
	visits := p.visits()
	d.now = d.now.Add(time.Hour)
	d.work()
	if p.visits() != visits {
		t.Error("the refused mail is tried again too soon")
	}
	p.set(nil)
	d.now = d.now.Add(rejectedRetry)
	if s := d.work(); s.Queued != 0 || len(p.got()) != 2 {
		t.Errorf("status %+v, %d mails", s, len(p.got()))
	}
}

func TestRecipients(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, func(b *Brief) { b.Mail.To = []string{"good@x.example", "gone@x.example", "slow@x.example"} })
	d.put(1)
	slow := 450
	p.set(func(stage, to string) error {
		switch {
		case stage == "rcpt" && to == "gone@x.example":
			return reply(550)
		case stage == "rcpt" && to == "slow@x.example" && slow != 0:
			return reply(slow)
		}
		return nil
	})
	if s := d.work(); s.Queued != 1 {
		t.Errorf("status %+v", s)
	}
	p.set(nil)
	d.now = d.now.Add(2 * time.Hour)
	s := d.work()
	var to []string
	for _, m := range p.got() {
		to = append(to, m.To...)
	}
	if !slices.Equal(to, []string{"good@x.example", "slow@x.example"}) || s.Queued != 0 || !strings.Contains(s.LastError, "550") {
		t.Errorf("delivered to %v, status %+v", to, s)
	}
	// All refused: it rests and is tried again.
	d.put(2)
	p.set(func(stage, _ string) error {
		if stage == "rcpt" {
			return reply(550)
		}
		return nil
	})
	if s := d.work(); s.Queued != 1 || !strings.Contains(s.LastError, "550") {
		t.Errorf("status %+v", s)
	}
}

func TestWrongPassword(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, nil)
	d.put(1)
	p.set(func(stage, _ string) error {
		if stage == "auth" {
			return smtp.ErrAuthFailed
		}
		return nil
	})
	if s := d.work(); s.Queued != 1 || !strings.Contains(s.LastError, "log in") || len(p.auths) != 1 {
		t.Errorf("status %+v, logins %q", s, p.auths)
	}
	if strings.Contains(d.log.String(), "hush") {
		t.Error("the password is in the log")
	}
}

// The machine dies after the server accepted and before that was noted: the
// mail arrives twice, under one Message-ID; after that never again.
func TestCrashBetweenAcceptanceAndRecord(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, nil)
	id := d.put(1)
	d.work()
	for _, path := range []string{d.c.record(), d.c.public()} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	d.restart()
	d.work()
	got := p.got()
	if len(got) != 2 || got[0].Text != got[1].Text || !strings.Contains(got[0].Text, "Message-ID: <"+id) {
		t.Fatalf("%+v", got)
	}
	d.restart()
	d.work()
	if len(p.got()) != 2 {
		t.Errorf("%d deliveries", len(p.got()))
	}
	// What was sent is public again after a reboot, for whoever prunes.
	if err := os.Remove(d.c.public()); err != nil {
		t.Fatal(err)
	}
	d.restart()
	d.work()
	if sent, err := outbox.ReadSent(d.c.public()); err != nil || !slices.Equal(sent, []string{id}) {
		t.Errorf("%v, %v", sent, err)
	}
}

func TestAStalledServerEndsWithTheContext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	met := make(chan struct{})
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		close(met)
		bufio.NewReader(c).ReadByte() // says nothing, until the client goes
	}()
	for _, kind := range []string{"starttls", "implicit"} {
		s := &sender{settings: settings.Mail{Server: l.Addr().String(), TLS: kind}, clock: func() (time.Time, doubt) { return time.Now(), doubt{} }}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { _, err := s.open(ctx); done <- err }()
		if kind == "starttls" {
			<-met
		}
		cancel()
		if err := <-done; err == nil {
			t.Error("a server that says nothing was logged in to")
		}
	}
}

func TestADeliveryThatHangsEndsThePart(t *testing.T) {
	p := startProvider(t, options{tls: "starttls"})
	d := newDesk(t, p, nil)
	d.c.busy, d.c.started = make(chan struct{}), d.now
	if err := d.c.step(t.Context()); err != nil {
		t.Error(err)
	}
	d.now = d.now.Add(3 * sessionTimeout)
	if err := d.c.step(t.Context()); !errors.Is(err, errHangs) {
		t.Errorf("got %v", err)
	}
}

func TestRun(t *testing.T) {
	p := startProvider(t, options{tls: "implicit"})
	d := newDesk(t, p, func(b *Brief) { b.Mail.TLS = "implicit" })
	env, err := part.New(part.Header{Name: part.Mail, Host: "attic", Paths: d.paths, Firmware: true}, d.brief, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	d.put(1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	arrived := make(chan struct{})
	p.set(func(stage, _ string) error {
		if stage == "data" {
			close(arrived)
		}
		return nil
	})
	done := make(chan error)
	go func() { done <- Run(ctx, env) }()
	<-arrived
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestRoots(t *testing.T) {
	if _, err := roots("not a certificate"); err == nil || !strings.Contains(err.Error(), "root_ca") {
		t.Errorf("got %v", err)
	}
	pool, err := roots("")
	if err != nil || pool.Equal(x509.NewCertPool()) {
		t.Errorf("no built-in authorities, %v", err)
	}
}
