package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"farkeep/image/freeport"
	"farkeep/shared/runsteps"
	"farkeep/shared/site"
)

// replacing is a site with its key server, in which things are lost and replaced
// by the very commands of docs/operations.md and docs/disk.md. Their / is dir.
type replacing struct {
	*testing.T
	dir     string
	root    string // / of the machine that runs the commands
	port    string // of its key server
	uuid    string
	token   string // what the appliance keeps
	chapter map[string]string
}

func newReplacing(t *testing.T) *replacing {
	t.Helper()
	r := &replacing{T: t, dir: t.TempDir(), chapter: map[string]string{}}
	r.root = r.dir
	for _, doc := range []string{"../docs/operations.md", "../docs/disk.md"} {
		text, err := os.ReadFile(doc)
		r.check(err)
		steps, err := runsteps.Parse(text)
		r.check(err)
		for _, s := range steps {
			r.chapter[s.Name] = s.Script
		}
	}
	for _, name := range []string{"image", "keyserver"} {
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(r.dir, "programs", "farkeep-"+name), "farkeep/"+name).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	r.port = r.freePort()
	r.file("bin/farkeep-keyserver", 0o755, fmt.Sprintf("#!/bin/sh\nexec %[1]s/programs/farkeep-keyserver \"$@\" --site \"$ROOT/etc/farkeep/site.toml\" --secrets \"$ROOT/etc/farkeep/keyserver\" --state \"$ROOT/var/lib/farkeep-keyserver\"\n", r.dir))
	r.file("bin/farkeep-image", 0o755, fmt.Sprintf("#!/bin/sh\nexec %s/programs/farkeep-image \"$@\"\n", r.dir))
	// systemctl, for the one service that must really run.
	r.file("bin/systemctl", 0o755, `#!/bin/sh
cd "$ROOT"
echo "$@" >> systemctl.log
[ "$2" = farkeep-keyserver ] || exit 0
if [ "$1" != start ]; then
	kill "$(cat pid)" && while kill -0 "$(cat pid)" 2>/dev/null; do sleep 0.05; done
fi
if [ "$1" != stop ]; then
	farkeep-keyserver serve --metrics "" >> serve.log 2>&1 & echo $! > pid
fi
`)
	r.file("passphrase", 0o600, "four words and more\n")
	r.file("password", 0o600, "pw\n")
	for _, folder := range []string{"dev", "media/FARKEEP", "etc/wireguard", "etc/farkeep/keyserver", "var/lib"} {
		r.check(os.MkdirAll(filepath.Join(r.dir, folder), 0o700))
	}
	r.disk()
	r.check(os.Rename(emptyCard(t), filepath.Join(r.dir, "farkeep.img")))
	r.sh(`farkeep-image site init my-site --name home --home-name borg --endpoint home.example.net:51820 --mail-server smtp.example.net:465 --mail-user attic \
  --mail-from attic@example.net --mail-to me@example.net --mail-password-file password --admin-passphrase-file passphrase --key-server-address 127.0.0.1:` + r.port + `
farkeep-image site add appliance attic --board pi4 --dir my-site
farkeep-image site add repository photos /srv/photos --dir my-site
farkeep-image disk prepare dev/sdb --dir my-site --appliance attic --size-for 1T --yes`)
	// There is no VPN here whose address could be asked for.
	siteFile := filepath.Join(r.dir, "my-site/site.toml")
	text, err := os.ReadFile(siteFile)
	r.check(err)
	changed := regexp.MustCompile(`(?m)^source = .*$`).ReplaceAllString(string(text), `source = "any"`)
	changed = regexp.MustCompile(`(?m)^place = .*$`).ReplaceAllString(changed, `place = "none"`)
	r.check(os.WriteFile(siteFile, []byte(changed), 0o644))
	r.sh("cp -a my-site/keyserver-borg/. etc/farkeep/keyserver/\ncp my-site/site.toml etc/farkeep/site.toml\nsystemctl start farkeep-keyserver")
	t.Cleanup(func() { r.try("systemctl stop farkeep-keyserver") })
	r.uuid = r.appliance().LUKS
	return r
}

func (r *replacing) freePort() string {
	r.Helper()
	port, err := freeport.TCP()
	r.check(err)
	return fmt.Sprint(port)
}

func (r *replacing) check(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *replacing) file(name string, mode os.FileMode, text string) {
	r.Helper()
	path := filepath.Join(r.dir, name)
	r.check(os.MkdirAll(filepath.Dir(path), 0o755))
	r.check(os.WriteFile(path, []byte(text), mode))
}

// disk puts an empty disk where the commands expect one.
func (r *replacing) disk() {
	r.Helper()
	path := filepath.Join(r.dir, "dev/sdb")
	r.check(errors.Join(os.RemoveAll(path), os.WriteFile(path, nil, 0o600), os.Truncate(path, 64<<20)))
}

func (r *replacing) appliance() *site.Appliance {
	r.Helper()
	s, err := site.Read(filepath.Join(r.dir, "my-site/site.toml"))
	r.check(err)
	a, _ := s.Appliance("attic")
	return a
}

func (r *replacing) try(script string, env ...string) (string, error) {
	cmd := exec.Command("sh", "-eu", "-c", script)
	cmd.Dir = r.dir
	cmd.Env = append([]string{"PATH=" + filepath.Join(r.dir, "bin") + ":" + os.Getenv("PATH"), "HOME=" + r.dir, "ROOT=" + r.root}, env...)
	// Not a pipe: the key server goes on when the script has ended.
	out, err := os.Create(filepath.Join(r.dir, "out"))
	if err != nil {
		return "", err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	text, readErr := os.ReadFile(out.Name())
	return string(text), errors.Join(err, readErr)
}

func (r *replacing) sh(script string, env ...string) string {
	r.Helper()
	out, err := r.try(script, env...)
	if err != nil {
		r.Fatalf("%v\n%s\n%s", err, script, out)
	}
	return out
}

// steps runs commands of the docs, by their names.
func (r *replacing) steps(env []string, names ...string) {
	r.Helper()
	for _, name := range names {
		script, ok := r.chapter[name]
		if !ok {
			r.Fatalf("the docs have no step %s", name)
		}
		here := strings.NewReplacer("-C / ", "-C "+r.root+" ", "/etc/", r.root+"/etc/", "/dev/sdb", r.dir+"/dev/sdb", "/media/", r.dir+"/media/",
			"10.77.0.9:4022", "127.0.0.1:"+r.port, "--passphrase", "--passphrase=fd:3 3<passphrase")
		r.sh(here.Replace(script), env...)
	}
}

// ask asks for a key as a stock ssh does. Exit 4 is the key server's refusal, 255
// that it knows no such client.
func (r *replacing) ask(identity, uuid, token string) (key []byte, code int) {
	r.Helper()
	s, err := site.Read(filepath.Join(r.dir, "my-site/site.toml"))
	r.check(err)
	hostKey := ""
	for _, k := range s.KeyServers {
		if k.Address == "127.0.0.1:"+r.port {
			hostKey = k.HostKey
		}
	}
	r.file("known_hosts", 0o600, fmt.Sprintf("[127.0.0.1]:%s %s\n", r.port, hostKey))
	for deadline := time.Now().Add(30 * time.Second); ; {
		c, err := net.Dial("tcp", "127.0.0.1:"+r.port)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(filepath.Join(r.root, "serve.log"))
			r.Fatalf("the key server does not answer: %s", text)
		}
		time.Sleep(20 * time.Millisecond)
	}
	args := []string{"-F", "none", "-i", identity, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=" + filepath.Join(r.dir, "known_hosts"),
		"-p", r.port, "farkeep@127.0.0.1", "key", uuid}
	if token != "" {
		args = append(args, token)
	}
	cmd := exec.CommandContext(r.Context(), "ssh", args...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.Fatalf("ssh (Debian package openssh-client): %v", err)
	}
	if m := regexp.MustCompile(`(?m)^token (\S+)$`).FindStringSubmatch(said.String()); m != nil {
		r.token = m[1]
	}
	return out.Bytes(), cmd.ProcessState.ExitCode()
}

// opens asks as the appliance, with what it keeps, and opens the disk.
func (r *replacing) opens(token string) {
	r.Helper()
	key, code := r.ask(filepath.Join(r.dir, "my-site/appliances/attic/identity/ssh_client_key"), r.uuid, token)
	if code != 0 {
		audit, _ := r.try("farkeep-keyserver audit")
		r.Fatalf("no key for the disk: exit %d\n%s", code, audit)
	}
	cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file", "-", filepath.Join(r.dir, "dev/sdb"))
	cmd.Stdin = bytes.NewReader(key)
	if out, err := cmd.CombinedOutput(); err != nil {
		r.Errorf("the key does not open the disk: %v\n%s", err, out)
	}
}

// TestReplacing loses one thing after the other, and runs the docs' commands.
func TestReplacing(t *testing.T) {
	r := newReplacing(t)
	own := filepath.Join(r.dir, "my-site/appliances/attic/identity/ssh_client_key")
	with := func(t *testing.T, f func(r *replacing)) {
		t.Helper()
		here := *r
		here.T = t
		f(&here)
		r.uuid, r.token = here.uuid, here.token
	}
	t.Run("before", func(t *testing.T) {
		with(t, func(r *replacing) {
			r.opens("")
			r.opens(r.token)
		})
	})
	t.Run("another key", func(t *testing.T) {
		with(t, func(r *replacing) {
			before := r.appliance().LUKSHeader
			r.steps([]string{"UUID=" + r.uuid}, "rekey", "rekey-server")
			if now := r.appliance().LUKSHeader; now == before || now == "" {
				t.Errorf("the header in site.toml was %q, is %q", before, now)
			}
			r.opens(r.token)
		})
	})
	t.Run("a laptop that was stolen", func(t *testing.T) {
		with(t, func(r *replacing) {
			r.sh("cp -p my-site/operator/" + r.uuid + ".recovery.key stolen.recovery.key && rm my-site/keyserver-borg/keys/*.old")
			r.steps([]string{"UUID=" + r.uuid}, "laptop-recovery", "rekey", "rekey-server")
			r.sh("cryptsetup open --test-passphrase --key-file my-site/operator/" + r.uuid + ".recovery.key dev/sdb")
			if out, err := r.try("cryptsetup open --test-passphrase --key-file stolen.recovery.key dev/sdb"); err == nil {
				t.Errorf("the stolen recovery key opens the disk: %s", out)
			}
			r.opens(r.token)
		})
	})
	t.Run("a key server that moves", func(t *testing.T) {
		with(t, func(r *replacing) {
			r.steps(nil, "server-move")
			r.sh("mkdir gone && mv etc/farkeep var/lib/farkeep-keyserver gone/ && mkdir -p etc")
			r.steps(nil, "server-arrive")
			r.opens(r.token) // it knows the token, so the state came along
			if _, code := r.ask(own, r.uuid, "another"); code != 4 {
				t.Errorf("a wrong token: exit %d", code)
			}
			r.sh(`farkeep-keyserver deny attic --reason test`)
		})
	})
	t.Run("a disk that was lost", func(t *testing.T) {
		with(t, func(r *replacing) {
			r.file("media/FARKEEP/autoboot.txt", 0o644, "[all]\ntryboot_a_b=1\nboot_partition=2\n")
			old := r.uuid
			r.disk()
			r.steps(nil, "disk-prepare")
			r.uuid = r.appliance().LUKS
			if r.uuid == old {
				t.Fatal("the new disk has the old one's UUID")
			}
			r.steps([]string{"UUID=" + r.uuid, "OLD=" + old}, "disk-key", "disk-card")
			r.opens(r.token)
			if _, code := r.ask(own, old, r.token); code != 4 {
				t.Errorf("the lost disk's key: exit %d", code)
			}
			if text, err := os.ReadFile(filepath.Join(r.dir, "media/FARKEEP/farkeep.toml")); err != nil || !strings.Contains(string(text), r.uuid) {
				t.Errorf("the card does not know its new disk: %v", err)
			}
		})
	})
	t.Run("a card that was lost", func(t *testing.T) {
		with(t, func(r *replacing) {
			lost := filepath.Join(r.dir, "lost")
			r.sh("cp -p " + own + " lost")
			stolen := r.token
			r.steps(nil, "card-revoke")
			if _, code := r.ask(lost, r.uuid, stolen); code != 4 {
				t.Errorf("the lost card, revoked: exit %d", code)
			}
			r.steps(nil, "card-replace", "card-site", "card-vpn", "card-allow")
			if _, code := r.ask(lost, r.uuid, stolen); code != 255 {
				t.Errorf("the lost card, replaced: exit %d", code)
			}
			r.opens("") // the new card has no token yet
			r.opens(r.token)
			if _, code := r.ask(own, r.uuid, ""); code != 4 {
				t.Errorf("once more without a token: exit %d", code)
			}
			if log := r.sh("cat systemctl.log"); !strings.Contains(log, "restart wg-quick@farkeep") {
				t.Errorf("the tunnel was not told: %s", log)
			}
		})
	})
	t.Run("a further key server", func(t *testing.T) {
		with(t, func(r *replacing) {
			second := *r
			second.port, second.root = r.freePort(), filepath.Join(r.dir, "cabin")
			r.check(os.MkdirAll(filepath.Join(second.root, "var/lib"), 0o700))
			second.steps(nil, "further-add")
			r.steps(nil, "further-export")
			second.steps(nil, "further-import")
			t.Cleanup(func() { second.try("systemctl stop farkeep-keyserver") })
			second.opens("")
			second.opens(second.token)
			r.opens(r.token)
			if text, err := os.ReadFile(filepath.Join(r.dir, "my-site/appliances/attic/farkeep.toml")); err != nil || !strings.Contains(string(text), "127.0.0.1:"+second.port) {
				t.Errorf("the appliance does not know the new key server: %v", err)
			}
		})
	})
}
