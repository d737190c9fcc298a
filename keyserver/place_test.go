package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/sshverb"
	"farkeep/shared/wgtest"

	"github.com/vishvananda/netlink"
	"golang.org/x/crypto/ssh"
	"golang.zx2c4.com/wireguard/conn"
	wgdevice "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// TestPlaceByWireGuard moves an appliance from network to network, with a real
// tunnel, a real "endpoints" and a real "serve": what comes from elsewhere waits
// for a person, at home's key server and at one that asks it.
func TestPlaceByWireGuard(t *testing.T) {
	if !namespace(t) {
		return
	}
	k := prepareKilling(t)
	newKey := func() wgtypes.Key {
		key, err := wgtypes.GeneratePrivateKey()
		k.check(err)
		return key
	}
	home, attic := newKey(), newKey()

	// The site says that attic is judged by where WireGuard sees it.
	path := filepath.Join(k.dir, "site.toml")
	text, err := os.ReadFile(path)
	k.check(err)
	before, after, found := strings.Cut(string(text), "name = \"attic\"")
	lines := strings.SplitAfter(after, "\n")
	placed, keyed := false, false
	for i, line := range lines {
		switch {
		case !placed && strings.HasPrefix(line, "place = "):
			lines[i], placed = "place = \"wireguard\"\n", true
		case !keyed && strings.HasPrefix(line, "vpn_key = "):
			lines[i], keyed = fmt.Sprintf("vpn_key = %q\n", attic.PublicKey()), true
		}
	}
	if !found || !placed || !keyed {
		t.Fatalf("site.toml is not as it was when this test was written:\n%s", text)
	}
	// A second key server, in the cellar, is not where the tunnel ends.
	private, public, err := identity.New("cellar")
	k.check(err)
	k.check(os.MkdirAll(filepath.Join(k.dir, "cellar", "keys"), 0o700))
	k.check(os.WriteFile(filepath.Join(k.dir, "cellar", "ssh_host_key"), []byte(private.Reveal()), 0o600))
	k.check(os.WriteFile(filepath.Join(k.dir, "cellar", "mail_password"), []byte("x\n"), 0o600))
	k.check(os.WriteFile(filepath.Join(k.dir, "cellar", "keys", atticDisk+".key"), k.disk, 0o600))
	site := before + "name = \"attic\"" + strings.Join(lines, "") +
		fmt.Sprintf("\n[[key_server]]\nname = \"cellar\"\naddress = \"10.77.0.1:4023\"\nhost_key = %q\nplace = \"others\"\n", public)
	site = strings.Replace(site, fmt.Sprintf("address = %q", k.address), "address = \"10.77.0.1:4022\"", 1)
	k.check(os.WriteFile(path, []byte(site), 0o600))

	// Home's end, and the addresses that the appliance's line will have.
	lo, err := netlink.LinkByName("lo")
	k.check(err)
	k.check(netlink.LinkSetUp(lo))
	for _, a := range []string{"203.0.113.1", "198.51.100.1", "192.0.2.1", "192.0.2.254"} {
		addr, err := netlink.ParseAddr(a + "/32")
		k.check(err)
		k.check(netlink.AddrAdd(lo, addr))
	}
	wgtest.Interface(t, "farkeep", 1420)
	tunnel, err := netlink.LinkByName("farkeep")
	k.check(err)
	inside, err := netlink.ParseAddr("10.77.0.1/24")
	k.check(err)
	k.check(netlink.AddrAdd(tunnel, inside))
	k.check(netlink.LinkSetUp(tunnel))
	conf := filepath.Join(k.dir, "farkeep.conf")
	k.check(os.WriteFile(conf, fmt.Appendf(nil, "[Interface]\nListenPort = 51820\nPrivateKey = %s\n[Peer]\nPublicKey = %s\nAllowedIPs = 10.77.0.2/32\n", home, attic.PublicKey()), 0o600))
	if out, err := exec.Command("wg", "setconf", "farkeep", conf).CombinedOutput(); err != nil {
		t.Fatalf("wg setconf (apt install wireguard-tools): %v: %s", err, out)
	}

	line := &line{to: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 254), Port: 51820}}
	moveTo := func(address string) { t.Helper(); line.moveTo(t, address) }

	// The appliance's end, without any interface.
	dev, stack, err := netstack.CreateNetTUN([]netip.Addr{netip.MustParseAddr("10.77.0.2")}, nil, 1420)
	k.check(err)
	peer := wgdevice.NewDevice(dev, conn.NewDefaultBind(), wgdevice.NewLogger(wgdevice.LogLevelSilent, ""))
	defer peer.Close()
	homePublic := home.PublicKey()
	k.check(peer.IpcSet(fmt.Sprintf("private_key=%s\npublic_key=%s\nallowed_ip=10.77.0.0/24\n", hex.EncodeToString(attic[:]), hex.EncodeToString(homePublic[:]))))
	k.check(peer.Up())
	k.check(peer.IpcSet(fmt.Sprintf("public_key=%s\nendpoint=%s\n", hex.EncodeToString(homePublic[:]), line.start(t))))

	seen := filepath.Join(k.dir, "endpoints.json")
	endpoints := exec.Command(program, "endpoints", "--file", seen, "--every", "100ms")
	endpoints.Stderr = t.Output()
	k.check(endpoints.Start())
	defer func() { endpoints.Process.Kill(); endpoints.Wait() }()
	stopHome := k.start(k.command("serve", "--listen", "10.77.0.1:4022", "--metrics", "", "--endpoints", seen))
	defer func() { stopHome() }()
	atCellar := func(args ...string) *exec.Cmd {
		cmd := exec.Command(program, append(args, "--site", "site.toml", "--secrets", "cellar", "--state", "cellar-state")...)
		cmd.Dir = k.dir
		return cmd
	}
	defer k.start(atCellar("serve", "--listen", "10.77.0.1:4023", "--metrics", "127.0.0.1:4024"))()
	cellarSigner, err := identity.Signer(private)
	k.check(err)
	tokens := map[string]keywire.Token{}

	askAt := func(port, boot string) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := sshverb.Dial(ctx, sshverb.Peer{
			Address: "10.77.0.1:" + port, User: "farkeep", Identity: k.attic,
			HostKey: map[string]ssh.PublicKey{"4022": k.host, "4023": cellarSigner.PublicKey()}[port],
			DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				return stack.DialContextTCPAddrPort(ctx, netip.MustParseAddrPort(address))
			},
		})
		k.check(err)
		defer c.Close()
		r := keywire.Request{Verb: keywire.Key, UUID: atticDisk, Token: tokens[port], Claims: keywire.Claims{Boot: strings.Repeat(boot, 32)}}
		d, err := c.Start(ctx, r.Line())
		k.check(err)
		d.Stdin.Close()
		out, err := io.ReadAll(d.Stdout)
		k.check(err)
		err = d.Wait()
		if (err == nil) != (string(out) == string(k.disk)) {
			t.Fatalf("%d bytes came with %v", len(out), err)
		}
		if token := keywire.ParseTokenLine(d.Stderr()); token != "" {
			tokens[port] = token
		}
		return err
	}
	ask := func(boot string) error { t.Helper(); return askAt("4022", boot) }
	order := func(args ...string) string {
		t.Helper()
		out, err := k.command(args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		return string(out)
	}

	moveTo("203.0.113.1")
	if err := ask("a"); err != nil {
		t.Fatalf("the first key: %v", err)
	}
	if err := askAt("4023", "a"); err != nil {
		t.Fatalf("the first key of the cellar: %v", err)
	}
	moveTo("198.51.100.1")
	if err := ask("b"); hint.Code(err) != hint.ExitRefused {
		t.Fatalf("from elsewhere, started anew: %v", err)
	}
	if err := askAt("4023", "b"); hint.Code(err) != hint.ExitRefused {
		t.Fatalf("from elsewhere, started anew, in the cellar: %v", err)
	}
	if out, err := atCellar("waiting").CombinedOutput(); err != nil || !strings.Contains(string(out), "198.51.100.1") || !strings.Contains(string(out), "another place than before") {
		t.Errorf("the cellar's waiting: %v\n%s", err, out)
	}
	if out, err := atCellar("check").CombinedOutput(); !strings.Contains(string(out), "endpoints: another key server tells them") {
		t.Errorf("the cellar's check: %v\n%s", err, out)
	}
	waiting, err := k.command("waiting").Output()
	k.check(err)
	if !strings.Contains(string(waiting), "198.51.100.1") || !strings.Contains(string(waiting), "another place than before") {
		t.Errorf("waiting:\n%s", waiting)
	}
	order("approve", "attic", "--reason", "new flat")
	if err := ask("b"); err != nil {
		t.Fatalf("approved: %v", err)
	}
	// Back at once in the network of before: for a while it could be the one card
	// or the other.
	moveTo("203.0.113.1")
	if err := ask("b"); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("to and fro within seconds: %v", err)
	}
	if out := order("audit"); !strings.Contains(out, "198.51.100.1 in 198.51.0.0/16") {
		t.Errorf("the audit log does not say from where:\n%s", out)
	}

	// While nobody tells the cellar, it gives nothing, and says what is wrong.
	stopHome()
	stopHome = func() {}
	if err := askAt("4023", "b"); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("nobody tells the cellar: %v", err)
	}
	if out, err := atCellar("check").CombinedOutput(); hint.Code(err) == 0 || !strings.Contains(string(out), "nobody answers: ask the key server borg where 10.77.0.2 is") {
		t.Errorf("the cellar's check: %v\n%s", err, out)
	}
	health, err := http.Get("http://127.0.0.1:4024/healthz")
	k.check(err)
	defer health.Body.Close()
	if text, err := io.ReadAll(health.Body); err != nil || !strings.Contains(string(text), "endpoints") {
		t.Errorf("the cellar's health: %q, %v", text, err)
	}
}

// line carries the tunnel's packets to home, from whatever address it has.
type line struct {
	to    *net.UDPAddr
	front *net.UDPConn

	mu   sync.Mutex
	back net.Addr     // the appliance's socket
	out  *net.UDPConn // from the line's address
}

// start returns the address that the appliance sends to.
func (l *line) start(t *testing.T) string {
	t.Helper()
	var err error
	if l.front, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.front.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := l.front.ReadFrom(b)
			if err != nil {
				return
			}
			l.mu.Lock()
			l.back = from
			if l.out != nil {
				l.out.WriteTo(b[:n], l.to)
			}
			l.mu.Unlock()
		}
	}()
	return l.front.LocalAddr().String()
}

// moveTo gives the line another address.
func (l *line) moveTo(t *testing.T, address string) {
	t.Helper()
	out, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(address)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	l.mu.Lock()
	if l.out != nil {
		l.out.Close()
	}
	l.out = out
	l.mu.Unlock()
	go func() {
		b := make([]byte, 2048)
		for {
			n, _, err := out.ReadFrom(b) // from whichever of its addresses home answers
			if err != nil {
				return
			}
			l.mu.Lock()
			l.front.WriteTo(b[:n], l.back)
			l.mu.Unlock()
		}
	}()
}
