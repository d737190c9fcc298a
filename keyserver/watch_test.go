package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/freeport"
	"farkeep/shared/courier/couriertest"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"
)

// The key server as a process: what it decided shows in a real scrape, and what
// was not expected arrives as a mail at a real SMTP server.
func TestServeMailsAndCounts(t *testing.T) {
	k := prepareKilling(t)
	p := couriertest.Start(t, couriertest.Options{TLS: "starttls"})
	path := filepath.Join(k.dir, "site.toml")
	text, err := os.ReadFile(path)
	k.check(err)
	for _, change := range [][2]string{
		{`"127.0.0.1:1"`, `"` + p.Address + `"`}, {`"implicit"`, `"starttls"`}, {"[mail]\n", "[mail]\nroot_ca = '''\n" + string(p.CA) + "'''\n"},
	} {
		if !bytes.Contains(text, []byte(change[0])) {
			t.Fatalf("site.toml has no %s:\n%s", change[0], text)
		}
		text = bytes.Replace(text, []byte(change[0]), []byte(change[1]), 1)
	}
	k.check(os.WriteFile(path, text, 0o600))
	if _, err := site.Parse(path, text); err != nil {
		t.Fatal(err)
	}
	if out, err := k.command("add", shedDisk, "--key-file", "disk.key").CombinedOutput(); err != nil {
		t.Fatalf("add: %v: %s", err, out)
	}
	port, err := freeport.TCP()
	k.check(err)
	shown := fmt.Sprintf("127.0.0.1:%d", port)
	kill := k.serveWith("--metrics", shown)
	defer kill()

	k.token, _ = k.ask(t.Context(), keywire.Key, func() {})
	k.checkIn(hint.ExitOK)
	if out, err := k.command("revoke", "attic", "--reason", "stolen", "--wait", "0s").CombinedOutput(); err != nil {
		t.Fatalf("revoke: %v: %s", err, out)
	}
	k.checkIn(hint.ExitRefused)

	deadline := time.After(3 * time.Minute)
	for !mailed(p, "attic was told that it is revoked") {
		select {
		case <-p.Arrived():
		case <-time.After(time.Second): // it may have come between the look and the wait
		case <-deadline:
			t.Fatalf("no mail; there are %d", len(p.Mails()))
		}
	}
	metrics := scrape(t, "http://"+shown+"/metrics")
	for _, want := range []string{
		`farkeep_keyserver_requests_total{verb="key",verdict="granted"} 1`,
		`farkeep_keyserver_requests_total{verb="checkin",verdict="granted"} 1`,
		`farkeep_keyserver_requests_total{verb="checkin",verdict="refused"} 1`,
		`farkeep_keyserver_grant_seconds_count 1`,
		`farkeep_keyserver_appliance_revoked{appliance="attic"} 1`,
		`farkeep_keyserver_appliance_revoked{appliance="shed"} 0`,
		`farkeep_keyserver_healthy{check="audit"} 1`,
		`farkeep_keyserver_healthy{check="keys"} 1`,
		`farkeep_keyserver_healthy{check="state"} 1`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("no %s in\n%s", want, metrics)
		}
	}
	if health := scrape(t, "http://"+shown+"/healthz"); health != "ok\n" {
		t.Errorf("healthz: %q", health)
	}
	if out, err := k.command("check", "--mail").CombinedOutput(); err != nil || !mailed(p, "a test mail from borg") {
		t.Errorf("check --mail: %v: %s", err, out)
	}
	for _, secret := range []string{k.token.Reveal(), "hush", "stolen"} {
		if strings.Contains(metrics, secret) {
			t.Errorf("%q is in the metrics", secret)
		}
	}
	for _, m := range p.Mails() {
		if strings.Contains(m.Text, k.token.Reveal()) {
			t.Error("a token was mailed")
		}
	}
}

// checkIn says that the appliance is there, and wants to be answered with code.
func (k *killing) checkIn(code int) {
	k.t.Helper()
	c, err := sshverb.Dial(k.t.Context(), sshverb.Peer{Address: k.address, User: "farkeep", Identity: k.attic, HostKey: k.host})
	k.check(err)
	defer c.Close()
	d, err := c.Start(k.t.Context(), keywire.Request{Verb: keywire.CheckIn, Token: k.token}.Line())
	k.check(err)
	d.Stdin.Close()
	if err := d.Wait(); hint.Code(err) != code {
		k.t.Errorf("check in: %v; want exit %d", err, code)
	}
}

func mailed(p *couriertest.Provider, subject string) bool {
	for _, m := range p.Mails() {
		if strings.Contains(m.Text, "Subject: [KEY SERVER] "+subject) {
			return true
		}
	}
	return false
}

func scrape(t *testing.T, url string) string {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
