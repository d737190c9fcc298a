package courier

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/courier/couriertest"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"
)

func open(t *testing.T, p *couriertest.Provider, now *time.Time) (*Courier, Config) {
	t.Helper()
	dir := t.TempDir()
	c := Config{
		Outbox: filepath.Join(dir, "outbox"), Sent: []string{filepath.Join(dir, "sent.json"), filepath.Join(dir, "copy.json")},
		Mail: settings.Mail{Server: p.Address, TLS: "starttls", User: "u", Password: "hush", From: "attic@site.example", To: []string{"you@site.example"}, RootCA: string(p.CA)},
		Now:  time.Now, Wall: func() time.Time { return *now }, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if err := os.Mkdir(c.Outbox, 0o700); err != nil {
		t.Fatal(err)
	}
	k, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return k, c
}

func put(t *testing.T, c Config, serial uint64) string {
	t.Helper()
	id := outbox.ID(serial, "held", 7)
	if err := outbox.Put(c.Outbox, id, []byte("Subject: x\r\n\r\n"+id+"\r\n")); err != nil {
		t.Fatal(err)
	}
	return id
}

// The appliance's part is tested with every kind of trouble; here is what the
// owner of an outbox relies on.
func TestDeliversOnceAndSaysSo(t *testing.T) {
	now := time.Now()
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	k, c := open(t, p, &now)
	first := put(t, c, 1)
	if busy, err := k.Step(t.Context()); !busy || err != nil {
		t.Fatal(busy, err)
	}
	k.Wait()
	if busy, err := k.Step(t.Context()); busy || err != nil {
		t.Fatal(busy, err)
	}
	if r := k.Report(); r.Queued != 0 || r.LastSent.IsZero() || r.LastError != "" {
		t.Errorf("report %+v", r)
	}
	if !slices.Equal(k.Sent(), []string{first}) {
		t.Errorf("sent %v", k.Sent())
	}
	// Another process over the same files sends nothing again.
	again, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if busy, err := again.Step(t.Context()); busy || err != nil {
		t.Fatal(busy, err)
	}
	for _, path := range c.Sent {
		if sent, err := outbox.ReadSent(path); err != nil || !slices.Equal(sent, []string{first}) {
			t.Errorf("%s: %v, %v", path, sent, err)
		}
	}
	if err := outbox.Prune(c.Outbox, again.Sent()); err != nil {
		t.Fatal(err)
	}
	if _, err := again.Step(t.Context()); err != nil || len(again.Sent()) != 0 || len(p.Mails()) != 1 {
		t.Errorf("%v, sent %v, %d mails", err, again.Sent(), len(p.Mails()))
	}
}

func TestNoWayNoAttempt(t *testing.T) {
	now := time.Now()
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	_, c := open(t, p, &now)
	ready := false
	c.Line = func() (string, bool) { return "", ready }
	k, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	put(t, c, 1)
	if busy, err := k.Step(t.Context()); busy || err != nil || p.Sessions() != 0 {
		t.Errorf("%v, %v, %d sessions", busy, err, p.Sessions())
	}
	ready = true
	if busy, err := k.Step(t.Context()); !busy || err != nil {
		t.Errorf("%v, %v", busy, err)
	}
	k.Wait()
	if len(p.Mails()) != 1 {
		t.Error("not delivered")
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
		s := &sender{settings: settings.Mail{Server: l.Addr().String(), TLS: kind}, clock: func() (time.Time, Doubt) { return time.Now(), Doubt{} }}
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
func TestADeliveryThatHangsIsReported(t *testing.T) {
	now := time.Now()
	k, _ := open(t, couriertest.Start(t, couriertest.Options{TLS: "starttls"}), &now)
	k.busy, k.started = make(chan struct{}), now
	if busy, err := k.Step(t.Context()); !busy || err != nil {
		t.Error(busy, err)
	}
	now = now.Add(3 * sessionTimeout)
	if _, err := k.Step(t.Context()); !errors.Is(err, ErrHangs) {
		t.Errorf("got %v", err)
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
