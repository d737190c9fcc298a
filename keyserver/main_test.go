package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/image/freeport"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"
	"farkeep/shared/site"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		program: func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			code := run(ctx, os.Args[1:], &Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now})
			stop()
			os.Exit(code)
		},
	})
}

const (
	atticDisk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	shedDisk  = "11111111-2222-3333-4444-555555555555"
)

func TestScripts(t *testing.T) {
	for _, name := range []string{"ssh", "cmp"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is missing: apt install openssh-client diffutils", name)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"await":     await,
			"silent":    silent,
			"replace":   replace,
			"modes":     modes,
			"keep":      keep,
			"tokenless": tokenless,
		},
	})
}

// setup makes what farkeep-image site init would have made: site.toml, the key
// server's secrets, and an identity for each of two appliances.
func setup(env *testscript.Env) error {
	var failed error
	in := func(name string) string { return filepath.Join(env.WorkDir, name) }
	write := func(name, text string) {
		if err := os.MkdirAll(filepath.Dir(in(name)), 0o700); err != nil {
			failed = errors.Join(failed, err)
		}
		failed = errors.Join(failed, os.WriteFile(in(name), []byte(text), 0o600))
	}
	newKey := func(name string) (public string) {
		private, public, err := identity.New(name)
		failed = errors.Join(failed, err)
		write("id/"+name, private.Reveal())
		return public
	}
	wg := func() string {
		_, public, err := identity.NewWireGuard()
		failed = errors.Join(failed, err)
		return public
	}
	free, err := freeport.TCP()
	if err != nil {
		return err
	}
	address := fmt.Sprintf("127.0.0.1:%d", free)
	host := newKey("host")
	s := &site.Site{
		Name:       "home",
		VPN:        site.VPN{Network: netip.MustParsePrefix("10.77.0.0/24"), Endpoints: []string{"home.example.net:51820"}},
		Home:       site.Home{Name: "borg", VPNAddress: netip.MustParseAddr("10.77.0.1"), VPNKey: wg(), PushKey: newKey("push")},
		KeyServers: []site.KeyServer{{Name: "borg", Address: address, HostKey: host}},
		Mail:       site.Mail{Server: "127.0.0.1:1", TLS: "implicit", User: "ks", From: "a@example.net", To: []string{"b@example.net"}},
		Appliances: []site.Appliance{
			{Name: "attic", Board: "pi4", VPNAddress: netip.MustParseAddr("10.77.0.2"), VPNKey: wg(), HostKey: newKey("attic-host"), ClientKey: newKey("attic"), LUKS: atticDisk},
			{Name: "shed", Board: "pi3", VPNAddress: netip.MustParseAddr("10.77.0.3"), VPNKey: wg(), HostKey: newKey("shed-host"), ClientKey: newKey("shed"), LUKS: shedDisk},
		},
	}
	s.DeadMan = settings.DefaultDeadMan()
	s.SetDefaults()
	doc, err := site.NewDocument(s)
	if err != nil {
		return errors.Join(failed, err)
	}
	write("site.toml", string(doc.Text()))
	key, err := os.ReadFile(in("id/host"))
	failed = errors.Join(failed, err)
	write("secrets/ssh_host_key", string(key))
	write("secrets/mail_password", "hush\n")
	failed = errors.Join(failed, os.Mkdir(in("secrets/keys"), 0o700))
	newKey("stranger")

	disk := make([]byte, 64)
	if _, err := rand.Read(disk); err != nil {
		return err
	}
	copy(disk, "MARK-OF-THE-KEY\x00\xff\r\n") // what silent looks for
	write("disk.key", string(disk))

	_, port, err := net.SplitHostPort(address)
	failed = errors.Join(failed, err)
	write("known_hosts", fmt.Sprintf("[127.0.0.1]:%s %s\n", port, host))
	write("ssh_config", strings.Join([]string{
		"Host ks", "HostName 127.0.0.1", "Port " + port, "User ks", "IdentitiesOnly yes", "BatchMode yes",
		"StrictHostKeyChecking yes", "UserKnownHostsFile " + in("known_hosts"), "",
	}, "\n"))
	env.Setenv("ADDRESS", address)
	env.Setenv("ATTIC", atticDisk)
	env.Setenv("SHED", shedDisk)
	env.Setenv("USER", "ada")
	return failed
}

// await waits until something listens on an address.
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: await address")
	}
	deadline := time.Now().Add(time.Minute)
	for {
		conn, err := net.DialTimeout("tcp", args[0], time.Second)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nothing listens on %s: %v", args[0], err)
		}
		time.Sleep(20 * time.Millisecond) // connect is all there is to wait for
	}
}

// silent checks that no key is in any of the files or folders.
func silent(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: silent file...")
	}
	for _, text := range texts(ts, args) {
		if strings.Contains(text, "MARK-OF-THE-KEY") || strings.Contains(text, "4d41524b2d4f46") || strings.Contains(text, "TUFSSy1PRi1USEUtS0VZ") {
			ts.Fatalf("a key is in %v", args)
		}
	}
}

// keep sets TOKEN to the token in a file, as an appliance would, and notes that it
// was handed out.
func keep(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: keep file")
	}
	token := keywire.ParseTokenLine(ts.ReadFile(args[0]))
	if token == "" {
		ts.Fatalf("there is no token in %s", args[0])
	}
	ts.Setenv("TOKEN", token.Reveal())
	ts.Setenv("TOKENS", ts.Getenv("TOKENS")+" "+token.Reveal())
}

// tokenless checks that no token that was kept is in any of the files or folders.
func tokenless(ts *testscript.TestScript, neg bool, args []string) {
	tokens := strings.Fields(ts.Getenv("TOKENS"))
	if neg || len(args) == 0 || len(tokens) == 0 {
		ts.Fatalf("usage, after keep: tokenless file...")
	}
	for _, text := range texts(ts, args) {
		for _, token := range tokens {
			if strings.Contains(text, token) {
				ts.Fatalf("a token was written down")
			}
		}
	}
}

// texts are the contents of files and folders, and of stdout and stderr.
func texts(ts *testscript.TestScript, args []string) (all []string) {
	for _, arg := range args {
		switch arg {
		case "stdout", "stderr":
			all = append(all, ts.ReadFile(arg))
		default:
			ts.Check(filepath.WalkDir(ts.MkAbs(arg), func(path string, d os.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				text, err := os.ReadFile(path)
				all = append(all, string(text))
				return err
			}))
		}
	}
	return all
}

// replace changes the first occurrence of a text in a file.
func replace(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: replace file old new")
	}
	path := ts.MkAbs(args[0])
	info, err := os.Stat(path)
	ts.Check(err)
	text := ts.ReadFile(args[0])
	if !strings.Contains(text, args[1]) {
		ts.Fatalf("%s holds no %q", args[0], args[1])
	}
	ts.Check(os.WriteFile(path, []byte(strings.Replace(text, args[1], args[2], 1)), info.Mode().Perm()))
}

// modes checks that files are private to their owner.
func modes(ts *testscript.TestScript, neg bool, args []string) {
	for _, arg := range args {
		info, err := os.Stat(ts.MkAbs(arg))
		ts.Check(err)
		if private := info.Mode().Perm()&0o077 == 0; private == neg {
			ts.Fatalf("%s has mode %04o", arg, info.Mode().Perm())
		}
	}
}

// TestEveryCommandHasAnExample keeps the help honest: each example names the
// command that it belongs to.
func TestEveryCommandHasAnExample(t *testing.T) {
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Example == "" || !strings.Contains(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s has no example of itself", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(newRootCmd(&Env{}))
}
