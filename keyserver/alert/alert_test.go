package alert

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"mime/quotedprintable"
	netmail "net/mail"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/shared/courier/couriertest"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// clock is the time, as the test sets it.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// provider has a certificate that outlives what clocks do here.
func provider(t *testing.T) *couriertest.Provider {
	return couriertest.Start(t, couriertest.Options{TLS: "starttls", From: time.Now().AddDate(-1, 0, 0), To: time.Now().AddDate(1, 0, 0)})
}

// work does everything that is due now.
func work(t *testing.T, a *Alerts) {
	t.Helper()
	for range 3 {
		if err := a.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.courier.Wait()
	}
}

func open(t *testing.T, c Config) *Alerts {
	t.Helper()
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func config(t *testing.T, p *couriertest.Provider) (Config, *clock, *bytes.Buffer) {
	t.Helper()
	k, log := &clock{now: time.Now()}, &bytes.Buffer{}
	c := Config{Dir: filepath.Join(t.TempDir(), "mail"), KeyServer: "nas", Now: k.Now, Log: slog.New(slog.NewTextHandler(io.MultiWriter(log, t.Output()), nil))}
	if p != nil {
		c.Mail = settings.Mail{Server: p.Address, TLS: "starttls", User: "nas", Password: "hush", From: "nas@site.example", To: []string{"you@site.example"}, RootCA: string(p.CA)}
	}
	return c, k, log
}

// read decodes a mail as a person's program does.
func read(t *testing.T, text string) (subject, body string) {
	t.Helper()
	m, err := netmail.ReadMessage(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	subject, err = new(mime.WordDecoder).DecodeHeader(m.Header.Get("Subject"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(quotedprintable.NewReader(m.Body))
	if err != nil {
		t.Fatal(err)
	}
	return subject, strings.ReplaceAll(string(b), "\r\n", "\n")
}

func event(appliance, kind string) Event {
	return Event{
		Kind: kind, Appliance: appliance, Disk: "6a1f0000-0000-4000-8000-00000000d15c", From: "10.77.0.11",
		Place: "203.0.113.0/24", Decision: "held", Reason: "another place than before",
	}
}

// Through a real SMTP server: the mail says what a tired person needs.
func TestAMailArrives(t *testing.T) {
	p := provider(t)
	c, _, log := config(t, p)
	a := open(t, c)
	a.Raise(event("attic", Held))
	work(t, a)
	mails := p.Mails()
	if len(mails) != 2 {
		t.Fatalf("%d mails", len(mails))
	}
	if s, _ := read(t, mails[0].Text); s != "[KEY SERVER] the key server can mail" {
		t.Errorf("the first mail is %q", s)
	}
	subject, body := read(t, mails[1].Text)
	if subject != "[KEY SERVER] attic asks for its key, and waits for you" {
		t.Errorf("subject %q", subject)
	}
	for _, want := range []string{
		"nas", "attic", "6a1f0000-0000-4000-8000-00000000d15c", "10.77.0.11", "203.0.113.0/24", "held", "another place than before",
		"farkeep-keyserver approve attic --reason", "farkeep-keyserver revoke attic --reason", "farkeep-keyserver audit",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("the mail does not say %q:\n%s", want, body)
		}
	}
	if r := a.Report(); r.Queued != 0 || r.LastSent.IsZero() || r.LastError != "" {
		t.Errorf("report %+v", r)
	}
	if strings.Contains(log.String(), "hush") {
		t.Error("the password is in the log")
	}
	if ids, err := outbox.List(a.outbox()); err != nil || len(ids) > 0 {
		t.Errorf("left in the outbox: %v, %v", ids, err)
	}
	// A restart mails nothing again, and no second first mail.
	work(t, open(t, c))
	if len(p.Mails()) != 2 {
		t.Errorf("%d mails", len(p.Mails()))
	}
}

var command = regexp.MustCompile(`farkeep-keyserver ([a-z]+)`)

func TestWording(t *testing.T) {
	commands := []string{"waiting", "approve", "deny", "revoke", "allow", "list", "audit", "check", "bundle"}
	for name := range kinds {
		t.Run(name, func(t *testing.T) {
			m := compose(event("attic", name).bounded(t0), "nas")
			if !strings.HasPrefix(m.subject, subjectPrefix) || len(m.subject) > 100 {
				t.Errorf("subject %q", m.subject)
			}
			for _, never := range []string{"://", "www.", "href", "NAME", "DISK"} {
				if strings.Contains(m.subject+m.body, never) {
					t.Errorf("%q is in it:\n%s", never, m.body)
				}
			}
			for _, want := range []string{"attic", "6a1f0000", "10.77.0.11", "203.0.113.0/24", "another place", "2026-03-01 12:00:00 UTC"} {
				if !strings.Contains(m.body, want) {
					t.Errorf("%q is not in it:\n%s", want, m.body)
				}
			}
			for _, c := range command.FindAllStringSubmatch(m.body, -1) {
				if !slices.Contains(commands, c[1]) {
					t.Errorf("it names farkeep-keyserver %s", c[1])
				}
			}
			if kinds[name].revoke != strings.Contains(m.body, "farkeep-keyserver revoke attic --reason \"stolen?\"") {
				t.Errorf("how to revoke:\n%s", m.body)
			}
			for _, l := range strings.Split(m.body, "\n") {
				if len(l) > 240 {
					t.Errorf("a line of %d characters: %s", len(l), l)
				}
			}
		})
	}
	// The server's own commands replace the kind's.
	ev := event("attic", Held)
	ev.Next = []string{"farkeep-keyserver approve h7f3 --reason \"moved\""}
	if m := compose(ev.bounded(t0), "nas"); !strings.Contains(m.body, "approve h7f3") || strings.Contains(m.body, "approve attic") {
		t.Error(m.body)
	}
	// What nobody foresaw is told too.
	if ev := (Event{Kind: "meteor", Reason: "it fell"}).bounded(t0); ev.Kind != RefusedUnexpected || ev.Reason != "meteor: it fell" {
		t.Errorf("%+v", ev)
	}
}

// What a peer could bring in makes no header, no line of its own and no large mail.
func TestHostileWords(t *testing.T) {
	bad := strings.Repeat("\r\nBcc: x@y.example\r\n\r\n\u2028ä𝄞=", 5000)
	ev := Event{Kind: Held, Appliance: bad, Disk: bad, From: bad, Place: bad, Decision: bad, Reason: bad, Next: slices.Repeat([]string{bad}, 100)}.bounded(t0)
	m := compose(ev, "nas")
	if len(m.body) > 20<<10 || strings.Contains(m.body, "\r") {
		t.Errorf("%d bytes", len(m.body))
	}
	var lines []untold
	for i := range 5000 {
		e := ev
		e.Appliance = fmt.Sprint("a", i)
		lines = append(lines, untold{Event: e, Count: 1, Since: t0})
	}
	c, _, _ := config(t, provider(t))
	a := open(t, c)
	if !a.put("held", m) || !a.put("summary", composeSummary(lines, "nas")) {
		t.Error("a mail that is too large for the outbox was made")
	}
}

// Raise never waits, whatever happens, and takes no memory without end.
func TestRaiseNeverWaits(t *testing.T) {
	p := provider(t)
	c, _, _ := config(t, p)
	c.Log = slog.New(slog.DiscardHandler)
	a := open(t, c)
	for i := range 20000 { // nobody runs it
		a.Raise(event(fmt.Sprintf("a%05d", i), Held))
	}
	if len(a.out) > firstsPerDay || len(a.limit.Pairs) > maxPairs+len(kinds) {
		t.Errorf("%d mails, %d pairs in memory", len(a.out), len(a.limit.Pairs))
	}
}

// As serve runs it: nobody pushes it.
func TestRun(t *testing.T) {
	p := provider(t)
	c, _, _ := config(t, p)
	a := open(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	// The first mail ever comes by itself.
	arrived := p.Arrived()
	if len(p.Mails()) == 0 {
		<-arrived
		arrived = p.Arrived()
	}
	a.Raise(event("attic", Dark))
	<-arrived
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWithoutAnAccount(t *testing.T) {
	c, _, log := config(t, nil)
	a := open(t, c)
	a.Raise(event("attic", TokenMismatch))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Run(ctx); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "token-mismatch") {
		t.Error("it is not in the log")
	}
	if _, err := os.Stat(c.Dir); err == nil {
		t.Error("a folder for mails was made")
	}
}

// The provider is down, the machine restarts: what was raised is delivered.
func TestSurvivesARestart(t *testing.T) {
	p := provider(t)
	p.Answer(func(stage, _ string) error { return couriertest.Reply(421) })
	c, k, _ := config(t, p)
	a := open(t, c)
	a.Raise(event("attic", Held))
	work(t, a)
	for range 5 {
		a.Raise(event("attic", Held)) // these wait for a summary
	}
	// What is raised in the last moment is on the disk when Run returns.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Run(ctx); err != nil || len(p.Mails()) != 0 {
		t.Fatal(err, p.Mails())
	}
	k.pass(2 * time.Hour)
	p.Answer(nil)
	work(t, open(t, c))
	if len(p.Mails()) != 3 {
		t.Errorf("%d mails", len(p.Mails()))
	}
	var all string
	for _, m := range p.Mails() {
		s, b := read(t, m.Text)
		all += s + "\n" + b
	}
	for _, want := range []string{"attic asks for its key", "attic: held, 5 times"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in\n%s", want, all)
		}
	}
}

// A memory that cannot be read costs no mail.
func TestDamagedMemory(t *testing.T) {
	for _, text := range []string{"", "{", "{}", `{"version":1,"limit":{"pairs":{"held x":null}}}`, `{"version":1,"limit":{"pairs":{"held x":{"count":3}}}}`, `{"version":2,"limit":{"pairs":{}}}`} {
		p := provider(t)
		c, _, _ := config(t, p)
		if err := os.MkdirAll(c.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(c.Dir, "told.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		a := open(t, c)
		a.Raise(event("attic", Held))
		work(t, a)
		if len(p.Mails()) != 1 {
			t.Errorf("%q: %d mails", text, len(p.Mails()))
		}
	}
}

// An outbox that has no room loses nothing: it is told when there is.
func TestFullOutbox(t *testing.T) {
	p := provider(t)
	c, k, log := config(t, p)
	a := open(t, c)
	for i := range outbox.MaxMails {
		if err := os.WriteFile(filepath.Join(a.outbox(), outbox.ID(uint64(i), "x", 1)+".eml"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a.Raise(event("attic", Held))
	for range 100 { // and it is not tried again and again
		a.queue()
		k.pass(time.Second / 4)
	}
	if n := strings.Count(log.String(), "is not queued"); n != 2 { // one for each event
		t.Errorf("tried %d times in half a minute", n)
	}
	ids, err := outbox.List(a.outbox())
	if err != nil || outbox.Prune(a.outbox(), ids) != nil {
		t.Fatal(err)
	}
	k.pass(2 * time.Hour)
	a.queue()
	ids, err = outbox.List(a.outbox())
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	text, err := outbox.Read(a.outbox(), ids[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, body := read(t, string(text)); !strings.Contains(body, "attic: held, 1 times") {
		t.Error(body)
	}
}

func TestTry(t *testing.T) {
	p := provider(t)
	c, k, _ := config(t, p)
	if err := Try(t.Context(), c.Mail, "nas", k.Now()); err != nil || len(p.Mails()) != 1 {
		t.Errorf("%v, %d mails", err, len(p.Mails()))
	}
	c.Mail.To = append(c.Mail.To, "gone@site.example")
	p.Answer(func(stage, arg string) error {
		if stage == "rcpt" && strings.HasPrefix(arg, "gone") {
			return couriertest.Reply(550)
		}
		return nil
	})
	if err := Try(t.Context(), c.Mail, "nas", k.Now()); err == nil || !strings.Contains(err.Error(), "not every recipient") {
		t.Errorf("one recipient does not exist: %v", err)
	}
	p.Answer(func(string, string) error { return couriertest.Reply(554) })
	if err := Try(t.Context(), c.Mail, "nas", k.Now()); err == nil || !strings.Contains(err.Error(), "554") || strings.Contains(err.Error(), "hush") {
		t.Errorf("refused: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Try(ctx, c.Mail, "nas", k.Now()); err == nil {
		t.Error("a mail was sent after the end")
	}
}

func TestDocsNameEveryKind(t *testing.T) {
	text, err := os.ReadFile("../../docs/keyserver.md")
	if err != nil {
		t.Fatal(err)
	}
	for kind := range kinds {
		if !strings.Contains(string(text), "`"+kind+"`") {
			t.Errorf("docs/keyserver.md does not name %s", kind)
		}
	}
}
