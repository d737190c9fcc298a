package sshverb_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"

	"farkeep/shared/sshverb"
)

// What the servers of appliance and key server offer, in the order of the wire
// (RFC 4253 §7.1). Every change here is a decision: docs/threat-model.md says why
// each of these is there.
var (
	offeredKex     = []string{"mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org", "kex-strict-s-v00@openssh.com"}
	offeredHostKey = []string{"ssh-ed25519"}
	offeredCiphers = []string{"aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"}
	offeredSlow    = []string{"chacha20-poly1305@openssh.com"} // without AES instructions
	offeredMACs    = []string{"hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com"}
	offeredNone    = []string{"none"} // compression
)

func ciphersHere() []string {
	if cpu.X86.HasAES || cpu.ARM64.HasAES {
		return offeredCiphers
	}
	return offeredSlow
}

func TestOfferedAlgorithms(t *testing.T) {
	ts := startServer(t, sshverb.Limits{})
	conn, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "SSH-2.0-test\r\n"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	if banner, err := in.ReadString('\n'); err != nil || banner != "SSH-2.0-Farkeep\r\n" {
		t.Fatalf("banner %q, %v", banner, err)
	}
	got, err := nameLists(in)
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{
		offeredKex, offeredHostKey, ciphersHere(), ciphersHere(), offeredMACs, offeredMACs, offeredNone, offeredNone, nil, nil,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// nameLists reads a KEXINIT packet.
func nameLists(in io.Reader) ([][]string, error) {
	var head [5]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, err
	}
	length, padding := binary.BigEndian.Uint32(head[:]), int(head[4])
	if length > 35000 || int(length) < padding+1+17 {
		return nil, errors.New("a packet of an impossible length")
	}
	body := make([]byte, length-1)
	if _, err := io.ReadFull(in, body); err != nil {
		return nil, err
	}
	if body[0] != 20 { // SSH_MSG_KEXINIT
		return nil, errors.New("no KEXINIT")
	}
	rest := body[17 : len(body)-padding] // past the cookie
	var lists [][]string
	for range 10 {
		if len(rest) < 4 || uint64(len(rest)-4) < uint64(binary.BigEndian.Uint32(rest)) {
			return nil, errors.New("a name list is cut off")
		}
		n := binary.BigEndian.Uint32(rest)
		var names []string
		if n > 0 {
			names = strings.Split(string(rest[4:4+n]), ",")
		}
		lists, rest = append(lists, names), rest[4+n:]
	}
	return lists, nil
}

// The other side of the same list: what a client of ours would agree to with a
// server that offers everything that x/crypto/ssh has, old things too.
func TestClientTakesNothingElse(t *testing.T) {
	all := ssh.SupportedAlgorithms()
	old := ssh.InsecureAlgorithms()
	for name, config := range map[string]ssh.Config{
		"old key exchange": {KeyExchanges: old.KeyExchanges},
		"old ciphers":      {KeyExchanges: all.KeyExchanges, Ciphers: old.Ciphers},
		"old MACs":         {KeyExchanges: all.KeyExchanges, Ciphers: []string{ssh.CipherAES128CTR}, MACs: old.MACs},
	} {
		t.Run(name, func(t *testing.T) {
			host, _ := newSigner(t)
			client, _ := newSigner(t)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			served := make(chan error, 1)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					served <- err
					return
				}
				defer conn.Close()
				server := &ssh.ServerConfig{Config: config, NoClientAuth: true}
				server.AddHostKey(host)
				_, _, _, err = ssh.NewServerConn(conn, server)
				served <- err
			}()
			_, err = sshverb.Dial(t.Context(), sshverb.Peer{Address: l.Addr().String(), User: "x", Identity: client, HostKey: host.PublicKey()})
			var none *ssh.AlgorithmNegotiationError
			if !errors.As(err, &none) {
				t.Errorf("got %v; want that nothing is common", err)
			}
			if err := <-served; err == nil {
				t.Error("the server was content")
			}
		})
	}
}

// What ssh-audit of Debian 12 says: nothing failed, and of what it warns, only
// two names that are younger than it is.
func TestSSHAudit(t *testing.T) {
	tool, err := exec.LookPath("ssh-audit")
	if err != nil {
		t.Fatal("ssh-audit is missing: apt-get install ssh-audit")
	}
	ts := startServer(t, sshverb.Limits{})
	_, port, err := net.SplitHostPort(ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	// Its exit status is 2 for a warning, as for the two.
	out, _ := exec.Command(tool, "-n", "-p", port, "127.0.0.1").Output()
	var bad []string
	for _, l := range strings.Split(string(out), "\n") {
		if strings.Contains(l, "[fail]") || strings.Contains(l, "[warn]") {
			fields := strings.Fields(l)
			known := len(fields) > 1 && slices.Contains([]string{"mlkem768x25519-sha256", "kex-strict-s-v00@openssh.com"}, fields[1]) && strings.Contains(l, "unknown algorithm")
			if !known {
				bad = append(bad, l)
			}
		}
	}
	if len(bad) > 0 || !strings.Contains(string(out), "SSH-2.0-Farkeep") {
		t.Errorf("ssh-audit says:\n%s", out)
	}
	out, _ = exec.Command(tool, "-j", "-p", port, "127.0.0.1").Output()
	var report struct{ Enc, Mac []string }
	if err := json.Unmarshal(out, &report); err != nil || !slices.Equal(report.Enc, ciphersHere()) || !slices.Equal(report.Mac, offeredMACs) {
		t.Errorf("its report: %+v, %v", report, err)
	}
}
