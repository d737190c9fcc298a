package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/policy"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/sshverb"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh"
)

// killing is a key server that is killed again and again, and an appliance that
// asks it.
type killing struct {
	t       *testing.T
	dir     string
	address string
	host    ssh.PublicKey
	attic   ssh.Signer
	disk    []byte
	token   keywire.Token // what the appliance has kept
	got     int           // keys that came whole
}

func prepareKilling(t *testing.T) *killing {
	t.Helper()
	k := &killing{t: t, dir: t.TempDir()}
	env := &testscript.Env{WorkDir: k.dir}
	k.check(setup(env))
	for _, v := range env.Vars {
		if address, ok := strings.CutPrefix(v, "ADDRESS="); ok {
			k.address = address
		}
	}
	signer := func(name string) ssh.Signer {
		text, err := os.ReadFile(filepath.Join(k.dir, "id", name))
		k.check(err)
		s, err := identity.Signer(secret.Text(text))
		k.check(err)
		return s
	}
	k.attic, k.host = signer("attic"), signer("host").PublicKey()
	var err error
	k.disk, err = os.ReadFile(filepath.Join(k.dir, "disk.key"))
	k.check(err)
	// As many keys as the test may want.
	path := filepath.Join(k.dir, "site.toml")
	text, err := os.ReadFile(path)
	k.check(err)
	if !bytes.Contains(text, []byte("keys_per_day = 48\n")) {
		t.Fatal("site.toml has no keys_per_day = 48")
	}
	k.check(os.WriteFile(path, bytes.ReplaceAll(text, []byte("keys_per_day = 48\n"), []byte("keys_per_day = 1440\n")), 0o600))
	if out, err := k.command("add", atticDisk, "--key-file", "disk.key").CombinedOutput(); err != nil {
		t.Fatalf("add: %v: %s", err, out)
	}
	return k
}

func (k *killing) check(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

func (k *killing) state() string { return filepath.Join(k.dir, "state") }

func (k *killing) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program, append(args, "--site", "site.toml", "--secrets", "secrets", "--state", "state")...)
	cmd.Dir = k.dir
	return cmd
}

// serve starts a real process and waits until it listens. kill ends it, without
// a warning.
func (k *killing) serve() (kill func()) { return k.serveWith() }

func (k *killing) serveWith(flags ...string) (kill func()) {
	k.t.Helper()
	return k.start(k.command(append([]string{"serve", "--listen", k.address}, flags...)...))
}

// start starts a serve and waits until it listens.
func (k *killing) start(cmd *exec.Cmd) (kill func()) {
	k.t.Helper()
	said, err := cmd.StderrPipe()
	k.check(err)
	k.check(cmd.Start())
	lines := bufio.NewScanner(said)
	var all strings.Builder
	for lines.Scan() {
		fmt.Fprintln(&all, lines.Text())
		if strings.Contains(lines.Text(), "msg=serving") {
			drained := make(chan struct{})
			go func() { io.Copy(io.Discard, said); close(drained) }()
			return func() {
				cmd.Process.Kill()
				<-drained
				cmd.Wait()
			}
		}
	}
	cmd.Wait()
	k.t.Fatalf("serve did not start:\n%s", all.String())
	return nil
}

// ask sends one request as the appliance does. answered is false when the server
// went away before it had answered in full.
func (k *killing) ask(ctx context.Context, verb keywire.Verb, sent func()) (token keywire.Token, answered bool) {
	k.t.Helper()
	c, err := sshverb.Dial(ctx, sshverb.Peer{Address: k.address, User: "farkeep", Identity: k.attic, HostKey: k.host})
	k.check(err)
	defer c.Close()
	r := keywire.Request{Verb: verb, UUID: atticDisk, Token: k.token}
	sent()
	d, err := c.Start(ctx, r.Line())
	if err != nil {
		return "", false
	}
	d.Stdin.Close()
	out, _ := io.ReadAll(io.LimitReader(d.Stdout, keywire.MaxKey))
	if verb == keywire.Key && len(out) > 0 {
		if !bytes.Equal(out, k.disk[:len(out)]) {
			k.t.Fatal("what came is not the key")
		}
		// Even a part of a key must be on record; a whole one may come without its
		// exit status.
		k.got++
	}
	err = d.Wait()
	if code := hint.Code(err); err != nil && code != hint.ExitUnreachable {
		k.t.Fatalf("%s: %v (exit %d): an appliance that did all it should was not answered", verb, err, code)
	}
	return keywire.ParseTokenLine(d.Stderr()), err == nil
}

// granted counts the keys on record.
func (k *killing) granted() (n int) {
	k.t.Helper()
	if _, err := audit.Verify(k.state()); err != nil {
		k.t.Fatalf("the audit log after a kill: %v", err)
	}
	k.check(audit.Read(k.state(), func(_ []byte, r audit.Record) error {
		if r.Event == "key" && r.Decision == "granted" {
			n++
		}
		return nil
	}))
	return n
}

// TestServeKilledAtAnyInstant kills a key server between request and answer, at
// a random moment each time. No key may have come without a record, the chain
// must be whole, and an appliance that keeps what tokens it gets, and now and
// then loses one as a power cut would, is never refused nor held.
func TestServeKilledAtAnyInstant(t *testing.T) {
	k := prepareKilling(t)
	rounds := 25
	if os.Getenv("FARKEEP_LONG") != "" {
		rounds = 1000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed) // where the kill hits depends on the machine as well
	chance := rand.New(rand.NewPCG(seed, 4))
	cut, whole := 0, 0
	for range rounds {
		kill := k.serve()
		after := time.Duration(chance.Int64N(int64(20 * time.Millisecond)))
		killed := make(chan struct{})
		verb := keywire.Key
		if chance.IntN(4) == 0 {
			verb = keywire.Renew
		}
		token, answered := k.ask(t.Context(), verb, func() {
			go func() {
				time.Sleep(after) // the instant, not a wait for anything
				kill()
				close(killed)
			}()
		})
		if answered {
			whole++
		} else {
			cut++
		}
		<-killed
		if token != "" && chance.IntN(3) > 0 {
			k.token = token // otherwise the appliance lost its power before it was stored
		}
		if n := k.granted(); n < k.got {
			t.Fatalf("%d keys came, %d are on record", k.got, n)
		}
	}
	// And in the end it still gets its key.
	kill := k.serve()
	defer kill()
	if _, answered := k.ask(t.Context(), keywire.Key, func() {}); !answered {
		t.Error("no key after all that")
	}
	t.Logf("%d rounds: %d answers came whole, %d were cut off, %d keys, %d on record", rounds, whole, cut, k.got, k.granted())
}

// TestOrdersKilledAtAnyInstant kills the command line in the middle of orders. A
// revocation that was reported counts and is on record; one that was cut off can
// be given again; and nothing that was cut off leaves the state or the chain broken.
func TestOrdersKilledAtAnyInstant(t *testing.T) {
	k := prepareKilling(t)
	kill := k.serve()
	if _, answered := k.ask(t.Context(), keywire.Key, func() {}); !answered {
		t.Fatal("no key from the start")
	}
	kill()
	policies := policy.Open(k.state())
	rounds := 12
	if os.Getenv("FARKEEP_LONG") != "" {
		rounds = 500
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 5))
	cut := 0
	for n := range rounds {
		order := []string{"revoke", "attic", "--reason", "stolen", "--wait", "0"}
		want := policy.Revoked
		if n%2 == 1 {
			order, want = []string{"allow", "attic", "--reason", "found"}, policy.Enabled
		}
		cmd := k.command(order...)
		k.check(cmd.Start())
		killer := time.AfterFunc(time.Duration(chance.Int64N(int64(60*time.Millisecond))), func() { cmd.Process.Kill() })
		err := cmd.Wait()
		killer.Stop()
		s, readErr := policies.Read("attic")
		k.check(readErr)
		if err == nil && s.Standing.State != want {
			t.Fatalf("%s was reported, and attic is %s", order[0], s.Standing.State)
		}
		if err != nil {
			cut++
			if out, err := k.command(order...).CombinedOutput(); err != nil {
				t.Fatalf("%s, given again: %v: %s", order[0], err, out)
			}
		}
		k.granted()
		last, err := orders.LastOrders(k.state())
		k.check(err)
		if s, err = policies.Read("attic"); err != nil || s.Standing.State != want || last["attic"] != order[0] {
			t.Fatalf("after %s: attic is %s, the record's last word is %s, %v", order[0], s.Standing.State, last["attic"], err)
		}
	}
	t.Logf("%d orders, %d cut off", rounds, cut)
}
