package mail

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/courier"
	"farkeep/shared/courier/couriertest"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"github.com/google/go-cmp/cmp"
)

// desk is the part with everything around it.
type desk struct {
	t     *testing.T
	m     *mailer
	paths part.Paths
	brief Brief
	log   *bytes.Buffer
	now   time.Time
}

func newDesk(t *testing.T, p *couriertest.Provider, change func(*Brief)) *desk {
	t.Helper()
	dir := t.TempDir()
	d := &desk{t: t, paths: part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}, log: &bytes.Buffer{}, now: time.Now()}
	for _, f := range []string{d.paths.RunDir(part.Mail), d.paths.StateDir(part.Mail), d.paths.RunDir(part.Network), d.paths.Outbox()} {
		if err := os.MkdirAll(f, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d.brief = Brief{Mail: settings.Mail{Server: p.Address, TLS: "starttls", User: "attic", Password: "hush", From: "attic@site.example", To: []string{"op@site.example"}, RootCA: string(p.CA)}}
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
	if d.m, err = newMailer(env, b, func() time.Time { return d.now }); err != nil {
		d.t.Fatal(err)
	}
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
		if err := d.m.step(d.t.Context()); err != nil {
			d.t.Fatal(err)
		}
		d.m.courier.Wait()
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
		o    couriertest.Options
	}{
		{"starttls, plain", couriertest.Options{TLS: "starttls"}},
		{"implicit, plain", couriertest.Options{TLS: "implicit"}},
		{"starttls, login", couriertest.Options{TLS: "starttls", Mechanism: sasl.Login}},
		{"implicit, login", couriertest.Options{TLS: "implicit", Mechanism: sasl.Login}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := couriertest.Start(t, tt.o)
			d := newDesk(t, p, func(b *Brief) { b.Mail.TLS = tt.o.TLS; b.Mail.To = append(b.Mail.To, "second@site.example") })
			first, second := d.put(1), d.put(2)
			s := d.work()
			if s.Queued != 0 || s.LastSent.IsZero() || s.LastError != "" {
				t.Errorf("status %+v", s)
			}
			want := couriertest.Mail{From: "attic@site.example", To: []string{"op@site.example", "second@site.example"}}
			got := p.Mails()
			if len(got) != 2 || p.Sessions() < 1 {
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
			if !slices.Equal(p.Logins(), []string{"attic:hush"}) {
				t.Errorf("logins %q", p.Logins())
			}
			for _, path := range []string{d.m.record(), d.m.public()} {
				if sent, err := outbox.ReadSent(path); err != nil || !slices.Equal(sent, []string{first, second}) {
					t.Errorf("%s: %v, %v", path, sent, err)
				}
			}
			// Pruned by the outbox's owner: forgotten.
			if err := outbox.Prune(d.paths.Outbox(), []string{first}); err != nil {
				t.Fatal(err)
			}
			d.work()
			if sent, _ := outbox.ReadSent(d.m.record()); !slices.Equal(sent, []string{second}) || len(p.Mails()) != 2 {
				t.Errorf("sent %v, %d mails", sent, len(p.Mails()))
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
		o      couriertest.Options
		change func(*Brief)
		net    status.Network // in addition to an address
		want   string         // "" means delivered
	}{
		{"another authority", couriertest.Options{TLS: "starttls"}, func(b *Brief) { b.Mail.RootCA = "" }, status.Network{ClockSet: true}, "unknown authority"},
		{"another authority, implicit", couriertest.Options{TLS: "implicit"}, func(b *Brief) { b.Mail.RootCA, b.Mail.TLS = "", "implicit" }, status.Network{ClockSet: true}, "unknown authority"},
		{"another name", couriertest.Options{TLS: "starttls", Name: "other.example"}, nil, status.Network{ClockSet: true}, "other.example"},
		{"a server without TLS", couriertest.Options{TLS: "none"}, nil, status.Network{ClockSet: true}, "STARTTLS"},
		{"expired", couriertest.Options{TLS: "starttls", From: past, To: past.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true}, "expired"},
		{"not yet valid", couriertest.Options{TLS: "starttls", From: future, To: future.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true}, "not yet valid"},
		{"expired, by a clock that jumped", couriertest.Options{TLS: "starttls", From: past, To: past.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true, ClockJump: "a month ahead"}, ""},
		{"not yet valid, by the last known time", couriertest.Options{TLS: "starttls", From: future, To: future.AddDate(0, 1, 0)}, nil, status.Network{ClockSource: "last known time"}, ""},
		{"expired, by the last known time", couriertest.Options{TLS: "starttls", From: past, To: past.AddDate(0, 1, 0)}, nil, status.Network{ClockSource: "last known time"}, "expired"},
		{"not yet valid, by a clock that jumped", couriertest.Options{TLS: "starttls", From: future, To: future.AddDate(0, 1, 0)}, nil, status.Network{ClockSet: true, ClockJump: "a month ahead"}, "not yet valid"},
		{"inside the VPN", couriertest.Options{TLS: "starttls"}, func(b *Brief) {
			b.VPN = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::/0")}
		}, status.Network{ClockSet: true}, "belongs to the VPN"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := couriertest.Start(t, tt.o)
			d := newDesk(t, p, tt.change)
			tt.net.Addresses = []string{"192.0.2.50/24"}
			d.network(tt.net)
			d.put(1)
			s := d.work()
			if tt.want == "" {
				if len(p.Mails()) != 1 {
					t.Errorf("%d mails, status %+v", len(p.Mails()), s)
				}
				return
			}
			if len(p.Mails()) != 0 || s.Queued != 1 || !strings.Contains(s.LastError, tt.want) || len(p.Logins()) > 0 {
				t.Errorf("%d mails, logins %q, status %+v; want %q", len(p.Mails()), p.Logins(), s, tt.want)
			}
		})
	}
}

func TestWaitsForLineAndClock(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
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
	if p.Sessions() != 0 {
		t.Error("it connected without a line or a clock")
	}
	d.network(status.Network{Addresses: []string{"192.0.2.50/24"}, ClockSet: true})
	d.work()
	if len(p.Mails()) != 1 {
		t.Error("not delivered")
	}
}

func TestTemporaryTrouble(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	d := newDesk(t, p, nil)
	d.put(1)
	var counted atomic.Int32
	p.Answer(func(stage, _ string) error {
		if stage == "data" {
			counted.Add(1)
			return couriertest.Reply(451)
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
	p.Answer(nil)
	d.now = d.now.Add(2 * time.Hour)
	if s := d.work(); s.Queued != 0 || s.LastError != "" {
		t.Errorf("status %+v", s)
	}
	// The line came back: no waiting for the old back-off.
	d.put(2)
	p.Answer(func(string, string) error { return couriertest.Reply(421) })
	d.work()
	p.Answer(nil)
	d.network(status.Network{Addresses: []string{"198.51.100.9/24"}, ClockSet: true})
	if s := d.work(); s.Queued != 0 {
		t.Errorf("status %+v", s)
	}
}

func TestARefusedMailDoesNotHoldUpTheOthers(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	d := newDesk(t, p, nil)
	poison, good := d.put(1), d.put(2)
	p.Answer(func(stage, arg string) error {
		if stage == "data" && strings.Contains(arg, poison) {
			return couriertest.Reply(554)
		}
		return nil
	})
	s := d.work()
	if got := p.Mails(); len(got) != 1 || !strings.Contains(got[0].Text, good) || s.Queued != 1 {
		t.Errorf("%d mails, status %+v", len(got), s)
	}
	if strings.ContainsAny(d.log.String(), "\r") {
		t.Error("a server's words broke a line of the log")
	}
	visits := p.Sessions()
	d.now = d.now.Add(time.Hour)
	d.work()
	if p.Sessions() != visits {
		t.Error("the refused mail is tried again too soon")
	}
	p.Answer(nil)
	d.now = d.now.Add(courier.RejectedRetry)
	if s := d.work(); s.Queued != 0 || len(p.Mails()) != 2 {
		t.Errorf("status %+v, %d mails", s, len(p.Mails()))
	}
}

func TestRecipients(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	d := newDesk(t, p, func(b *Brief) { b.Mail.To = []string{"good@x.example", "gone@x.example", "slow@x.example"} })
	d.put(1)
	slow := 450
	p.Answer(func(stage, to string) error {
		switch {
		case stage == "rcpt" && to == "gone@x.example":
			return couriertest.Reply(550)
		case stage == "rcpt" && to == "slow@x.example" && slow != 0:
			return couriertest.Reply(slow)
		}
		return nil
	})
	if s := d.work(); s.Queued != 1 {
		t.Errorf("status %+v", s)
	}
	p.Answer(nil)
	d.now = d.now.Add(2 * time.Hour)
	s := d.work()
	var to []string
	for _, m := range p.Mails() {
		to = append(to, m.To...)
	}
	if !slices.Equal(to, []string{"good@x.example", "slow@x.example"}) || s.Queued != 0 || !strings.Contains(s.LastError, "550") {
		t.Errorf("delivered to %v, status %+v", to, s)
	}
	// All refused: it rests and is tried again.
	d.put(2)
	p.Answer(func(stage, _ string) error {
		if stage == "rcpt" {
			return couriertest.Reply(550)
		}
		return nil
	})
	if s := d.work(); s.Queued != 1 || !strings.Contains(s.LastError, "550") {
		t.Errorf("status %+v", s)
	}
}

func TestWrongPassword(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	d := newDesk(t, p, nil)
	d.put(1)
	p.Answer(func(stage, _ string) error {
		if stage == "auth" {
			return smtp.ErrAuthFailed
		}
		return nil
	})
	if s := d.work(); s.Queued != 1 || !strings.Contains(s.LastError, "log in") || len(p.Logins()) != 1 {
		t.Errorf("status %+v, logins %q", s, p.Logins())
	}
	if strings.Contains(d.log.String(), "hush") {
		t.Error("the password is in the log")
	}
}

// The machine dies after the server accepted and before that was noted: the
// mail arrives twice, under one Message-ID; after that never again.
func TestCrashBetweenAcceptanceAndRecord(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	d := newDesk(t, p, nil)
	id := d.put(1)
	d.work()
	for _, path := range []string{d.m.record(), d.m.public()} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	d.restart()
	d.work()
	got := p.Mails()
	if len(got) != 2 || got[0].Text != got[1].Text || !strings.Contains(got[0].Text, "Message-ID: <"+id) {
		t.Fatalf("%+v", got)
	}
	d.restart()
	d.work()
	if len(p.Mails()) != 2 {
		t.Errorf("%d deliveries", len(p.Mails()))
	}
	// What was sent is public again after a reboot, for whoever prunes.
	if err := os.Remove(d.m.public()); err != nil {
		t.Fatal(err)
	}
	d.restart()
	d.work()
	if sent, err := outbox.ReadSent(d.m.public()); err != nil || !slices.Equal(sent, []string{id}) {
		t.Errorf("%v, %v", sent, err)
	}
}

func TestRun(t *testing.T) {
	p := couriertest.Start(t, couriertest.Options{TLS: "implicit"})
	d := newDesk(t, p, func(b *Brief) { b.Mail.TLS = "implicit" })
	env, err := part.New(part.Header{Name: part.Mail, Host: "attic", Paths: d.paths, Firmware: true}, d.brief, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	d.put(1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	arrived := make(chan struct{})
	p.Answer(func(stage, _ string) error {
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
