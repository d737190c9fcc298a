//go:build vm

package mail_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	netmail "net/mail"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"farkeep/image/build"
	"farkeep/image/debian"
	"farkeep/image/emulate"
	"farkeep/image/hometunnel"
	"farkeep/image/mailsink"
	"farkeep/image/ntpserver"
	"farkeep/image/sdcard"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/crypto/ssh"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// outside is the world as an appliance sees it: time sources, home, a mail
// provider.
type outside struct {
	t       *testing.T
	sources []*ntpserver.Server
	home    *hometunnel.Home
	mail    *mailsink.Sink
	device  wgtypes.Key // the appliance's
	image   string
	console *bytes.Buffer
}

// The real thing on the emulated Pi, whose clock starts in 1970: DHCP, time
// sources of which one lies, kernel WireGuard with a dead endpoint, and mails.
func TestEmulatedPi(t *testing.T) {
	w := newOutside(t)
	before := time.Now()
	pi := w.boot()
	up := w.await("[WATCHDOG] attic is up")
	for _, want := range []string{"Raspberry Pi 3", "10.0.2.", "[23] of [34] sources agree", `VPN +up`} {
		if !regexp.MustCompile(want).Match(up.Data) {
			t.Errorf("the first mail does not say %q:\n%s", want, up.Data)
		}
	}
	w.sentNow(up)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := w.home.WaitHandshake(ctx, w.device.PublicKey().String(), before); err != nil {
		t.Error(err)
	}
	w.sentNow(w.await("[WATCHDOG] home heartbeat STALE"))
	w.await("[WATCHDOG] attic disk is missing")

	// The power goes. When it is back, all time sources lie by years: nothing is
	// believed, the VPN works, and the mail about it comes through.
	if err := pi.CutPower(); err != nil {
		t.Fatal(err)
	}
	for _, s := range w.sources {
		s.SetOffset(3 * 365 * 24 * time.Hour)
	}
	cut := time.Now()
	pi = w.boot()
	jumped := w.await("[WATCHDOG] attic clock JUMPED")
	if !strings.Contains(string(jumped.Data), "not set") {
		t.Errorf("%s", jumped.Data)
	}
	if m, err := netmail.ReadMessage(bytes.NewReader(jumped.Data)); err != nil {
		t.Error(err)
	} else if date, err := m.Header.Date(); err != nil || date.Sub(cut).Abs() > 20*time.Minute {
		t.Errorf("the clock went to %v, %v; want the last known time", date, err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := w.home.WaitHandshake(ctx, w.device.PublicKey().String(), cut); err != nil {
		t.Error("after the power cut: ", err)
	}
	for _, l := range pi.LastLines(3000) {
		for _, hidden := range []string{"hush", w.device.String()} {
			if strings.Contains(l, hidden) {
				t.Errorf("a secret is on the console: %s", l)
			}
		}
	}
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	w := &outside{t: t, console: &bytes.Buffer{}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var servers []string
	for i := range 4 {
		s, err := ntpserver.Listen("127.0.0.1:0", nil)
		must(err)
		t.Cleanup(func() { s.Close() })
		if i == 3 {
			s.SetOffset(90 * time.Minute)
		}
		w.sources = append(w.sources, s)
		servers = append(servers, fmt.Sprintf("%s:%d", emulate.HostAddress, s.Addr().Port))
	}
	homeKey, err := wgtypes.GeneratePrivateKey()
	must(err)
	w.device, err = wgtypes.GeneratePrivateKey()
	must(err)
	w.home, err = hometunnel.Start(hometunnel.Config{
		PrivateKey: secret.Text(homeKey.String()), Address: netip.MustParseAddr("10.77.0.1"),
		Peers: []hometunnel.Peer{{PublicKey: w.device.PublicKey().String(), AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32")}}},
	})
	must(err)
	t.Cleanup(func() { w.home.Close() })
	w.mail, err = mailsink.Start(mailsink.Config{Address: "127.0.0.1:0", Names: []string{emulate.HostAddress}, User: "attic", Password: "hush"})
	must(err)
	t.Cleanup(func() { w.mail.Close() })

	hostKey, _ := identity(t)
	clientKey, _ := identity(t)
	_, keyServer := identity(t)
	set := settings.DefaultDeadMan()
	set.HeartbeatAge, set.UnreachableAfter, set.CheckInterval = settings.Duration(90*time.Second), settings.Duration(5*time.Second), settings.Duration(time.Second)
	a := settings.Appliance{
		Name: "attic", Site: "home",
		Identity: settings.Identity{HostKey: hostKey, ClientKey: clientKey},
		Clock:    settings.Clock{Servers: servers},
		VPN: settings.VPN{
			Interface: "farkeep0", PrivateKey: secret.Text(w.device.String()), Address: netip.MustParsePrefix("10.77.0.2/24"),
			Peers: []settings.Peer{{
				Name: "home", PublicKey: homeKey.PublicKey().String(), Keepalive: settings.Duration(5 * time.Second),
				Endpoints:  []string{emulate.HostAddress + ":1", fmt.Sprintf("%s:%d", emulate.HostAddress, w.home.Port())},
				AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32")},
			}},
		},
		KeyServers: []settings.KeyServer{{Name: "cellar", Address: "10.77.0.1:2222", HostKey: keyServer}},
		Disk: settings.Disk{
			LUKS: "01234567-89ab-cdef-0123-456789abcdef", IdleClose: settings.Duration(time.Minute),
			Relay:  settings.Relay{Driver: "none", Active: "high"},
			Window: settings.Window{Length: settings.Duration(24 * time.Hour)},
		},
		Receiver: settings.Receiver{Port: 22},
		DeadMan:  set,
		Mail: settings.Mail{
			Server: fmt.Sprintf("%s:%d", emulate.HostAddress, w.mail.Addr().Port), TLS: "starttls", User: "attic", Password: "hush",
			From: "attic@site.example", To: []string{"operator@site.example"}, RootCA: string(w.mail.CA()),
		},
	}
	text, err := a.Render()
	must(err)
	w.image = filepath.Join(t.TempDir(), "card.img")
	must(sdcard.Personalise(t.Context(), buildImage(t), w.image, sdcard.Personal{Settings: text.Reveal(), RelayLine: -1}))
	return w
}

func identity(t *testing.T) (private secret.Text, public string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	sshPub, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Text(pem.EncodeToMemory(block)), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPub)))
}

func buildImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	bin := filepath.Join(dir, "farkeep-appliance-arm64")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "farkeep/appliance")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=arm64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	mirror := debian.Mirror{Archive: os.Getenv("FARKEEP_APT_MIRROR")}
	if mirror.Archive == "" {
		var err error
		if mirror, err = debian.FindMirror(os.DirFS("/etc/apt")); err != nil {
			t.Fatalf("%v: set FARKEEP_APT_MIRROR", err)
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "farkeep.img")
	if _, err := build.Build(t.Context(), build.Options{
		Appliance: bin, Out: image, Cache: filepath.Join(cache, "farkeep"), Mirror: mirror, Log: slog.New(slog.DiscardHandler),
	}); err != nil {
		t.Fatal(err)
	}
	return image
}

func (w *outside) boot() *emulate.Pi {
	w.t.Helper()
	pi, err := emulate.Start(w.t.Context(), emulate.Config{
		Machine: emulate.RaspberryPi3, Image: w.image, Console: w.console,
		// The watchdog of a host that has no time for its machine fires: a board boots again.
		Append: "farkeep.watchdog=softdog", FollowRestarts: true,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := pi.CutPower(); err != nil {
			w.t.Error(err)
		}
		if w.t.Failed() || testing.Verbose() {
			io.Copy(w.t.Output(), w.console)
		}
	})
	return pi
}

func (w *outside) await(subject string) mailsink.Message {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Minute)
	defer cancel()
	m, err := w.mail.Wait(ctx, func(m mailsink.Message) bool { return m.Subject() == subject })
	if err != nil {
		var got []string
		for _, m := range w.mail.Messages() {
			got = append(got, m.Subject())
		}
		w.t.Fatalf("waiting for %q: %v; there are %q", subject, err, got)
	}
	return m
}

// sentNow checks that the appliance knows what time it is: neither that of 1970 nor the
// liar's, an hour and a half away. A mail may have waited in the queue.
func (w *outside) sentNow(m mailsink.Message) {
	w.t.Helper()
	parsed, err := netmail.ReadMessage(bytes.NewReader(m.Data))
	if err != nil {
		w.t.Fatal(err)
	}
	if date, err := parsed.Header.Date(); err != nil || m.At.Sub(date).Abs() > 20*time.Minute {
		w.t.Errorf("%s: sent %v, arrived %v, %v", m.Subject(), date, m.At, err)
	}
}
