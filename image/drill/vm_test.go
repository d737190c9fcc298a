//go:build vm

package drill_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/image/debian"
	"farkeep/image/drill"
	"farkeep/image/emulate"
	"farkeep/image/stage"
	"farkeep/image/stage/stagetest"
	"farkeep/image/stockdebian"
	"farkeep/shared/runsteps"
	"farkeep/shared/site"
)

const (
	borgPassphrase   = "what only the household knows"
	bundlePassphrase = "seven words that nobody would ever guess here"
	work             = "/root/farkeep"
	unsealed         = work + "/farkeep-bundle"
	diskSize         = 192 << 20
)

// repository is a Borg repository of the house before it burns.
type repository struct {
	name, encryption string
	path, source     string
	listing          string // of the source, when it was backed up last
}

// house is a home whose appliance has taken a push, and what is left of it.
type house struct {
	t            *testing.T
	ctx          context.Context
	dir          string
	s            *stage.Stage
	vault, barn  *stage.Appliance // AES, pushed to; adiantum, which never ran
	repositories []*repository
	env          []string // of Borg
	bundle       string   // folder of the sealed bundle
	page         string   // the page to print, as text
	book         []byte   // its runbook
	first        string   // folder of a bundle in clear, of the vault alone
	endpoint     uint16   // where appliances look for home, at this machine's loopback
	listenPort   uint16
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// listing tells everything about a folder's files that a backup keeps. It runs at
// the host's shell and at the stick's.
const listing = `cd "$SOURCE"
find . -type f -printf 'f %m %s %T@ %n %p\n' -o -type l -printf 'l %T@ %l %p\n' -o -type d -printf 'd %m %T@ %p\n' | LC_ALL=C sort
find . -type f -exec sha256sum {} + | LC_ALL=C sort
`

func build(t *testing.T) *house {
	dir := t.TempDir()
	h := &house{t: t, ctx: t.Context(), dir: dir}
	log, err := os.Create(filepath.Join(dir, "log"))
	must(t, err)
	t.Cleanup(func() {
		log.Close()
		if b, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("commands and consoles:\n%s", b[max(0, len(b)-20_000):])
		}
	})
	h.s, err = stage.New(h.ctx, stage.Options{Dir: dir, Bin: stagetest.Programs(t), Out: log, Console: log, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	t.Cleanup(func() { h.s.Close() })
	h.env = append(os.Environ(), "BORG_BASE_DIR="+filepath.Join(dir, "borg"), "BORG_PASSPHRASE="+borgPassphrase, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes")
	for _, r := range []*repository{{name: "photos", encryption: "repokey-blake2"}, {name: "letters", encryption: "keyfile"}, {name: "music", encryption: "none"}} {
		r.path, r.source = filepath.Join(dir, "srv", r.name), filepath.Join(dir, "household", r.name)
		must(t, errors.Join(os.MkdirAll(filepath.Dir(r.path), 0o700), os.MkdirAll(filepath.Join(r.source, "folder, with a name"), 0o750)))
		h.borg("init", "--encryption="+r.encryption, r.path)
		h.write(r, "first", 300_000)
		h.backup(r, "monday")
		must(t, os.Remove(filepath.Join(r.source, "first")))
		h.write(r, "second", 200_000)
		h.write(r, "folder, with a name/ünïcode", 70_000)
		h.write(r, "empty", 0)
		must(t, errors.Join(os.Symlink("second", filepath.Join(r.source, "link")), os.Link(filepath.Join(r.source, "second"), filepath.Join(r.source, "twin")), os.Chmod(filepath.Join(r.source, "second"), 0o4711)))
		h.backup(r, "tuesday")
		_, err := h.s.Run(h.ctx, "farkeep-image", "site", "add", "repository", r.name, r.path, "--dir", h.s.Site)
		must(t, err)
		h.repositories = append(h.repositories, r)
	}
	must(t, h.s.BuildImage(h.ctx))
	h.vault, err = h.s.Add(h.ctx, stage.Cast{Name: "vault", Machine: emulate.Generic, DiskSize: diskSize, Relay: emulate.Relay{None: true}, Window: "24h"})
	must(t, err)
	return h
}

func (h *house) borg(args ...string) {
	h.t.Helper()
	cmd := exec.CommandContext(h.ctx, "borg", args...)
	cmd.Env = h.env
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("borg %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func (h *house) write(r *repository, name string, size int64) {
	h.t.Helper()
	f, err := os.Create(filepath.Join(r.source, name))
	must(h.t, err)
	_, err = io.CopyN(f, rand.Reader, size)
	must(h.t, errors.Join(err, f.Close()))
}

func (h *house) backup(r *repository, archive string) {
	h.t.Helper()
	h.borg("create", r.path+"::"+archive, r.source)
	cmd := exec.CommandContext(h.ctx, "sh", "-euc", listing)
	cmd.Env = append(os.Environ(), "SOURCE="+r.source)
	out, err := cmd.Output()
	must(h.t, err)
	r.listing = string(out)
}

// live has the appliance take a push, then makes bundle and page, and burns the house.
func (h *house) live() {
	h.t.Helper()
	must(h.t, h.s.OpenHome(h.ctx))
	must(h.t, h.vault.Boot(h.ctx))
	ctx, cancel := context.WithTimeout(h.ctx, 15*time.Minute)
	defer cancel()
	_, err := h.vault.Mounted(ctx)
	must(h.t, err)
	_, err = h.s.Push(ctx, "--target", "vault")
	must(h.t, err)

	credentials := filepath.Join(h.dir, "credentials")
	must(h.t, errors.Join(os.Mkdir(credentials, 0o700), os.WriteFile(filepath.Join(credentials, "bundle"), []byte(bundlePassphrase+"\n"), 0o600)))
	create := func(kind ...string) {
		h.t.Helper()
		args := []string{"bundle", "create", "--site", h.s.Site, "--borg-keys", filepath.Join(h.dir, "borg", ".config", "borg", "keys"), "--passphrases-known-by", "the household"}
		_, err := h.s.RunWith(h.ctx, []string{"CREDENTIALS_DIRECTORY=" + credentials}, "farkeep-keyserver", append(args, kind...)...)
		must(h.t, err)
	}
	// One bundle as long as there is one appliance, and a drill on the real site.
	h.first = filepath.Join(h.dir, "first")
	create("--to", h.first, "--clear")
	out, err := h.s.Run(ctx, "farkeep-keyserver", "drill", "--site", h.s.Site, "--bundle", h.first)
	must(h.t, err)
	h.t.Logf("farkeep-keyserver drill:\n%s", out)
	described, err := site.Read(filepath.Join(h.s.Site, "site.toml"))
	must(h.t, err)
	if time.Since(described.Bundle.Drilled) > time.Hour {
		h.t.Errorf("the drill is noted for %s", described.Bundle.Drilled)
	}
	h.listenPort = uint16(described.VPN.ListenPort)
	_, endpoint, err := net.SplitHostPort(described.VPN.Endpoints[0])
	must(h.t, err)
	port, err := strconv.ParseUint(endpoint, 10, 16)
	must(h.t, err)
	h.endpoint = uint16(port)
	must(h.t, h.vault.CutPower())

	// A second one, with adiantum, and the bundles of both.
	h.barn, err = h.s.Add(h.ctx, stage.Cast{Name: "barn", Machine: emulate.RaspberryPi3, DiskSize: diskSize, Relay: emulate.Relay{None: true}})
	must(h.t, err)
	h.bundle = filepath.Join(h.dir, "sealed")
	page, open := filepath.Join(h.dir, "paper"), filepath.Join(h.dir, "open")
	create("--to", h.bundle, "--no-tools", "--passphrase=credential:bundle")
	create("--to", page, "--paper")
	create("--to", open, "--clear", "--no-tools")
	text, err := os.ReadFile(filepath.Join(page, "RUNBOOK.html"))
	must(h.t, err)
	h.page = html.UnescapeString(string(text))
	h.book, err = os.ReadFile(filepath.Join(open, "RUNBOOK.md"))
	must(h.t, err)
	must(h.t, h.s.CloseHome())
	// Only the appliance, far away, and the bundle are left.
	for _, gone := range []string{h.s.Site, page, open, credentials, filepath.Join(h.dir, "borg"), filepath.Join(h.dir, "srv"), filepath.Join(h.dir, "household"), filepath.Join(h.dir, "state")} {
		must(h.t, os.RemoveAll(gone))
	}
}

func stick(t *testing.T) *stockdebian.Stick {
	t.Helper()
	cache, err := os.UserCacheDir()
	must(t, err)
	mirror, err := debian.FindMirror(os.DirFS("/etc/apt"))
	must(t, err)
	s, err := stockdebian.Make(t.Context(), filepath.Join(cache, "farkeep"), mirror, slog.New(slog.DiscardHandler))
	must(t, err)
	return s
}

// lines are the numbered lines of a key on the page of one disk.
func (h *house) lines(uuid, label string) string {
	h.t.Helper()
	_, sheet, ok := strings.Cut(h.page, uuid+"</code></td>")
	if !ok {
		h.t.Fatalf("the page has no sheet of %s", uuid)
	}
	sheet, _, _ = strings.Cut(sheet, `<div class="sheet">`)
	found := regexp.MustCompile(`(?m)(?:^|>)(`+label+`\d+ [0-9a-f ]+)(?:<|$)`).FindAllStringSubmatch(sheet, -1)
	var typed strings.Builder
	for i, m := range found {
		line := m[1]
		if i%2 == 1 { // as people type
			line = "  " + strings.ToUpper(line) + " "
		}
		typed.WriteString(line + "\n")
	}
	return typed.String()
}

type world struct {
	*house
	m       *stockdebian.Machine
	r       *drill.Rehearsal
	devices map[string]string
}

// sh does what is no step of the runbook: what a desktop does by itself, what a
// person types into an editor, and what the test wants to see.
func (w *world) sh(t *testing.T, script string) string {
	t.Helper()
	out, err := w.m.Run(t.Context(), script, w.r.Answers...)
	if err != nil {
		t.Fatalf("%s\n%v", script, err)
	}
	return out
}

func (w *world) type_(t *testing.T, path, text string) {
	t.Helper()
	w.sh(t, fmt.Sprintf("cat > %s <<'END'\n%sEND\n", path, text))
}

// restored compares what was extracted with the source, all of it.
func (w *world) restored(t *testing.T, r *repository) {
	t.Helper()
	got := w.sh(t, fmt.Sprintf("( SOURCE='%s/files-of-%s/%s'\n%s)\n", work, r.name, strings.TrimPrefix(r.source, "/"), listing))
	if got != r.listing {
		t.Errorf("%s came back as\n%s\nand was\n%s", r.name, got, r.listing)
	}
}

func (w *world) disk(name, uuid string) drill.Disk {
	return drill.Disk{Device: w.devices[name], UUID: uuid, Bundle: unsealed, Work: work}
}

// TestHouseBurned is the worst day: nothing is left but a disk and a bundle. The
// runbook of that very bundle brings back every file, on a Debian that never heard
// of Farkeep.
func TestHouseBurned(t *testing.T) {
	h := build(t)
	h.live()
	h.worstDay(t)
	t.Run("home again, and the untouched appliance takes pushes", h.homeAgain)
}

func (h *house) worstDay(t *testing.T) {
	// The disks as they are found: one from a Pi with adiantum, filled like the
	// other; the one that the appliance wrote, whose power was cut; and that again,
	// its header destroyed.
	damaged := filepath.Join(h.dir, "damaged.disk")
	must(t, emulate.Copy(t.Context(), h.vault.Disk, damaged))
	f, err := os.OpenFile(damaged, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 4<<20), 0)
	must(t, errors.Join(err, f.Close()))
	memory := filepath.Join(h.dir, "memory.img")
	must(t, stockdebian.MemoryStick(t.Context(), h.bundle, memory))
	disks := []stockdebian.Disk{
		{Path: memory, Serial: "memory"},
		{Path: h.vault.Disk, Serial: "aes"}, {Path: h.barn.Disk, Serial: "adiantum"}, {Path: damaged, Serial: "damaged"},
	}
	log, err := os.Create(filepath.Join(h.dir, "stick.log"))
	must(t, err)
	defer log.Close()
	began := time.Now()
	m, err := stockdebian.Boot(t.Context(), stockdebian.Config{Stick: stick(t), Disks: disks, Console: log})
	must(t, err)
	defer m.Close()
	t.Logf("%8.1f s  the stick boots", m.Booted.Seconds())
	w := &world{house: h, m: m, devices: map[string]string{}}
	for _, d := range disks {
		w.devices[d.Serial] = d.Device()
	}

	var steps int
	w.r, err = drill.New(h.book, m)
	must(t, err)
	w.r.Answers = []stockdebian.Answer{drill.Passphrase(borgPassphrase), {Asked: regexp.MustCompile(`Enter passphrase: ?$`), Text: bundlePassphrase}}
	w.r.Said = func(s runsteps.Step, took time.Duration, _ string) {
		steps++
		t.Logf("%8.1f s  %s: %s", took.Seconds(), s.Chapter, s.Name)
	}
	// The page that hangs on the wall has the same commands.
	all, err := runsteps.Parse(h.book)
	must(t, err)
	for _, s := range all {
		for line := range strings.Lines(s.Script) {
			if !strings.Contains(h.page, strings.TrimSpace(line)) {
				t.Errorf("the page does not have the line %q of step %s", line, s.Name)
			}
		}
	}

	run := func(name string, f func(*testing.T)) {
		if !t.Run(name, f) {
			t.FailNow()
		}
	}
	run("sealed bundle", func(t *testing.T) {
		// A desktop mounts a memory stick by itself.
		w.sh(t, "mkdir -p /media/user/STICK\nmount -o ro "+w.devices["memory"]+" /media/user/STICK\n")
		_, err := w.r.Step(t.Context(), "choose-sealed", drill.Values{"SEALED": "/media/user/STICK/farkeep-demo.tar.age", "WORK": work})
		must(t, err)
		must(t, w.r.Steps(t.Context(), "unseal"))
		if got := w.sh(t, "cat "+unsealed+"/RUNBOOK.md\n"); got != string(h.book) {
			t.Errorf("the bundle's runbook is another one: %s", got)
		}
	})
	run("fill the other disk", func(t *testing.T) { // as farkeep-image disk copy would
		w.sh(t, fmt.Sprintf(`cryptsetup open --key-file %[1]s/disks/%[2]s.recovery.key %[3]s from
cryptsetup open --key-file %[1]s/disks/%[4]s.recovery.key %[5]s to
cryptsetup status to | grep cipher
mkdir -p /mnt/from /mnt/to
mount /dev/mapper/from /mnt/from
mount /dev/mapper/to /mnt/to
cp -a /mnt/from/generations /mnt/to/
umount /mnt/from /mnt/to
cryptsetup close from
cryptsetup close to
`, unsealed, h.vault.LUKS, w.devices["aes"], h.barn.LUKS, w.devices["adiantum"]))
	})
	run("adiantum disk, every repository", func(t *testing.T) {
		must(t, w.r.Steps(t.Context(), "tools", "look"))
		must(t, w.r.Open(t.Context(), w.disk("adiantum", h.barn.LUKS)))
		if out := w.sh(t, "cryptsetup status farkeep\n"); !strings.Contains(out, "xchacha20,aes-adiantum-plain64") {
			t.Errorf("the disk is not encrypted with adiantum: %s", out)
		}
		for _, r := range h.repositories {
			_, err := w.r.Sums(t.Context(), r.name, work)
			must(t, err)
			if r.encryption == "none" {
				// Borg starts slowly here, and has shown its list and its check twice.
				must(t, w.r.Steps(t.Context(), "copy", "borg-keys", "borg-archive", "borg-extract"))
			} else {
				must(t, w.r.Extract(t.Context()))
			}
			w.restored(t, r)
		}
		must(t, w.r.Steps(t.Context(), "close"))
		w.sh(t, fmt.Sprintf("rm -r %[1]s/photos %[1]s/letters %[1]s/music %[1]s/files-of-* %[1]s/borg %[1]s/borg-keys\n", work))
	})
	run("destroyed header, the bundle's in its place", func(t *testing.T) {
		d := w.disk("damaged", h.vault.LUKS)
		if _, err := m.Run(t.Context(), "cryptsetup open --test-passphrase --key-file /dev/null "+d.Device+"\n"); err == nil || !strings.Contains(err.Error(), "not a valid LUKS device") {
			t.Errorf("a disk without header: %v", err)
		}
		must(t, w.r.OpenWithoutHeader(t.Context(), d))
		for _, r := range h.repositories {
			_, err := w.r.Sums(t.Context(), r.name, work)
			must(t, err)
		}
		must(t, w.r.Steps(t.Context(), "layer", "borg-keys", "borg-archive", "borg-extract"))
		w.restored(t, h.repositories[2])
		must(t, w.r.Steps(t.Context(), "close", "header-keep", "header-restore"))
		must(t, w.r.Open(t.Context(), d))
		_, err := w.r.Step(t.Context(), "choose-repository", drill.Values{"REPO": "photos"})
		must(t, err)
		must(t, w.r.Steps(t.Context(), "close"))
	})
	run("only the paper is left", func(t *testing.T) {
		w.sh(t, "cp "+unsealed+"/disks/*.recovery.key /dev/shm/ # for the comparison\nrm -r "+work+"\numount /media/user/STICK\n")
		_, err := w.r.Step(t.Context(), "choose-paper", drill.Values{"DISK": w.devices["aes"], "WORK": work, "PAPER": work + "/paper.txt"})
		must(t, err)
		typed := h.lines(h.vault.LUKS, "r")
		if n := strings.Count(typed, "\n"); n != 8 {
			t.Fatalf("the page has %d lines of the recovery key:\n%s", n, typed)
		}
		digit := strings.LastIndexAny(typed[:len(typed)-10], "0123456789")
		w.type_(t, work+"/paper.txt", typed[:digit]+string('0'+('9'-typed[digit]))+typed[digit+1:])
		if _, err := w.r.Step(t.Context(), "paper-check", nil); err == nil || !strings.Contains(err.Error(), "WRONG") {
			t.Errorf("a mistyped digit was not found: %v", err)
		}
		_, err = w.r.Step(t.Context(), "choose-paper", drill.Values{"DISK": w.devices["aes"], "WORK": work, "PAPER": work + "/paper.txt"})
		must(t, err)
		w.type_(t, work+"/paper.txt", typed)
		must(t, w.r.Steps(t.Context(), "paper-check", "paper-key"))
		w.sh(t, "cmp "+work+"/recovery.key /dev/shm/"+h.vault.LUKS+".recovery.key\n")
		d := w.disk("aes", h.vault.LUKS)
		d.Key = work + "/recovery.key"
		must(t, w.r.Open(t.Context(), d))
		_, err = w.r.Sums(t.Context(), "photos", work)
		must(t, err)
		must(t, w.r.Steps(t.Context(), "copy", "borg-keys", "borg-archive", "borg-extract"))
		w.restored(t, h.repositories[0])
		must(t, w.r.Steps(t.Context(), "close"))
	})
	run("only the paper is left, and the header is gone", func(t *testing.T) {
		_, err := w.r.Step(t.Context(), "choose-paper", drill.Values{"DISK": w.devices["damaged"], "WORK": work, "PAPER": work + "/paper.txt"})
		must(t, err)
		w.sh(t, "dd if=/dev/zero of="+w.devices["damaged"]+" bs=1M count=4 conv=notrunc status=none\n") // it was put back above
		w.type_(t, work+"/paper.txt", h.lines(h.vault.LUKS, "v"))
		must(t, w.r.Steps(t.Context(), "paper-check", "paper-key"))
		values := regexp.MustCompile(`(?s)` + h.vault.LUKS + `.*?<code>([^<]+)</code>, key of (\d+) bits, sectors of (\d+) bytes, data from sector (\d+)`).FindStringSubmatch(h.page)
		if values == nil {
			t.Fatal("the page does not say how the disk is encrypted")
		}
		_, err = w.r.Step(t.Context(), "choose-volume", drill.Values{"CIPHER": values[1], "KEYBITS": values[2], "SECTOR": values[3], "OFFSET": values[4]})
		must(t, err)
		must(t, w.r.Steps(t.Context(), "paper-volume", "volume-open", "volume-mount"))
		_, err = w.r.Step(t.Context(), "choose", drill.Values{"DISK": w.devices["damaged"], "BUNDLE": "/nowhere", "WORK": work})
		must(t, err)
		_, err = w.r.Sums(t.Context(), "letters", work)
		must(t, err)
		must(t, w.r.Steps(t.Context(), "copy", "borg-keys"))
		key := regexp.MustCompile(`(?s)<h3>letters</h3>.*?<div class="key small">(.*?)</div>`).FindStringSubmatch(h.page)
		if key == nil {
			t.Fatal("the page does not have the key of letters")
		}
		w.type_(t, work+"/borg-paper.txt", key[1]+"\n")
		_, err = w.r.Step(t.Context(), "choose-borg-paper", drill.Values{"BORGPAPER": work + "/borg-paper.txt"})
		must(t, err)
		must(t, w.r.Steps(t.Context(), "borg-paper", "borg-archive", "borg-extract"))
		w.restored(t, h.repositories[1])
		must(t, w.r.Steps(t.Context(), "close"))
	})
	run("bad sectors, and void", func(t *testing.T) {
		_, err := w.r.Step(t.Context(), "choose-rescue", drill.Values{"DISK": w.devices["aes"], "IMAGE": work + "/disk.img"})
		must(t, err)
		must(t, w.r.Steps(t.Context(), "rescue", "rescue-rest"))
		w.sh(t, fmt.Sprintf("cryptsetup open --key-file /dev/shm/%s.recovery.key %s/disk.img farkeep\n", h.vault.LUKS, work))
		must(t, w.r.Steps(t.Context(), "rescue-fsck"))
		w.sh(t, "cryptsetup close farkeep\n")
		_, err = w.r.Step(t.Context(), "choose-void", drill.Values{"DISK": w.devices["aes"], "OLD": "/dev/shm/" + h.vault.LUKS + ".recovery.key", "NEW": work + "/new.recovery.key"})
		must(t, err)
		must(t, w.r.Steps(t.Context(), "void-add", "void-remove", "void-proof"))
	})
	// The rest is run elsewhere: home's chapter below on another machine, the primary's by the pusher's tests.
	for _, name := range w.r.NotRun() {
		if !strings.HasPrefix(name, "home-") && !strings.HasPrefix(name, "primary-") && name != "choose-home" {
			t.Errorf("no drill runs the step %s", name)
		}
	}
	t.Logf("%8.1f s  in all, %d steps", time.Since(began).Seconds(), steps)
}

// homeAgain makes a home of a fresh Debian and the bundle. The appliance was cut from
// its power and knows nothing of all this.
func (h *house) homeAgain(t *testing.T) {
	memory := filepath.Join(h.dir, "first.img")
	must(t, stockdebian.MemoryStick(t.Context(), h.first, memory))
	log, err := os.Create(filepath.Join(h.dir, "home.log"))
	must(t, err)
	defer log.Close()
	disk := stockdebian.Disk{Path: memory, Serial: "memory"}
	m, err := stockdebian.Boot(t.Context(), stockdebian.Config{
		Stick: stick(t), Disks: []stockdebian.Disk{disk}, Console: log,
		Network: true, Forward: []emulate.Forward{{UDP: true, HostPort: h.endpoint, GuestPort: h.listenPort}},
	})
	must(t, err)
	defer m.Close()
	sh := func(script string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		out, err := m.Run(ctx, script)
		if err != nil {
			console, _ := os.ReadFile(log.Name())
			t.Fatalf("%s\n%v\n%s", script, err, console[max(0, len(console)-3000):])
		}
		return out
	}
	sh("mkdir -p /media/user/STICK\nmount -o ro " + disk.Device() + " /media/user/STICK\n")
	book, err := os.ReadFile(filepath.Join(h.first, "RUNBOOK.md"))
	must(t, err)
	r, err := drill.New(book, m)
	must(t, err)
	r.Said = func(s runsteps.Step, took time.Duration, _ string) {
		t.Logf("%8.1f s  %s: %s", took.Seconds(), s.Chapter, s.Name)
	}
	_, err = r.Step(t.Context(), "choose-home", drill.Values{"BUNDLE": "/media/user/STICK"})
	must(t, err)
	must(t, r.Steps(t.Context(), "home-programs", "home-identities", "home-keys"))
	// The stage reaches its appliances at this machine's loopback, and sees no places; this
	// home has its own tunnel, which says from where they come.
	sh(fmt.Sprintf("sed -i -e 's/%s/10.77.0.2:22/' -e 's/^place = \"none\"/place = \"wireguard\"/' /etc/farkeep/site.toml\ngrep -q '^place = \"wireguard\"' /etc/farkeep/site.toml\n", h.vault.At))
	must(t, r.Steps(t.Context(), "home-vpn"))
	// The stage's own runbook has no step for places; the one of a site that judges them has.
	text, err := os.ReadFile("../../docs/recovery.md")
	must(t, err)
	placed, err := drill.New(text, m)
	must(t, err)
	must(t, placed.Steps(t.Context(), "home-endpoints"))
	must(t, r.Steps(t.Context(), "home-check", "home-serve"))
	pi, err := emulate.Start(t.Context(), emulate.Config{
		Machine: h.vault.Machine, Image: h.vault.Card, Disk: h.vault.Disk, Relay: h.vault.Relay,
		Append: "farkeep.watchdog=softdog", FollowRestarts: true, Concurrent: true, Console: log, // the turn is the Debian's
	})
	must(t, err)
	defer pi.CutPower()
	began := time.Now()
	sh("install -m 600 /media/user/STICK/site/operator/restore_key /root/restore_key\n")
	// Nothing but the appliance's own handshake tells this home where it is.
	sh("until farkeep-pusher generations vault photos > /dev/null 2>&1; do sleep 1; done\n")
	for _, repository := range h.repositories {
		sh(fmt.Sprintf("mkdir -p %s\nfarkeep-pusher restore vault %s latest --to %s --restore-key /root/restore_key\n", filepath.Dir(repository.path), repository.name, repository.path))
	}
	t.Logf("%8.1f s  the appliance boots, gets its key, and gives the repositories back", time.Since(began).Seconds())
	if out := sh("farkeep-keyserver audit\n"); !strings.Contains(out, " in 10.0.2.0/24") {
		t.Errorf("the key server does not know from where the appliance came:\n%s", out)
	}
	must(t, r.Steps(t.Context(), "home-list", "home-push"))
	count := func() int {
		return strings.Count(sh("farkeep-pusher generations vault music\n"), "vault ")
	}
	if n := count(); n != 1 {
		t.Errorf("a push of what is there already: %d generations", n)
	}
	began = time.Now()
	sh("export BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes BORG_RELOCATED_REPO_ACCESS_IS_OK=yes\nborg create " + h.repositories[2].path + "::again /etc/farkeep/site.toml\nfarkeep-pusher push\n")
	t.Logf("%8.1f s  a new archive is made and pushed", time.Since(began).Seconds())
	if n := count(); n != 2 {
		t.Errorf("after a new archive there are %d generations", n)
	}
}

// block is a block of commands out of a page of docs: the one that has the words.
func block(t *testing.T, page, words string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../docs", page))
	must(t, err)
	for _, m := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		if strings.Contains(m[1], words) {
			return m[1]
		}
	}
	t.Fatalf("docs/%s has no commands with %q", page, words)
	return ""
}

// TestStockClient is a plain Debian, or Raspberry Pi OS, that uses the key server
// without our appliance: the very commands of docs/keyserver.md, with Debian's ssh
// and cryptsetup, against the real key server.
func TestStockClient(t *testing.T) {
	dir := t.TempDir()
	log, err := os.Create(filepath.Join(dir, "log"))
	must(t, err)
	defer func() {
		log.Close()
		if b, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("commands and consoles:\n%s", b[max(0, len(b)-20_000):])
		}
	}()
	s, err := stage.New(t.Context(), stage.Options{Dir: dir, Bin: stagetest.Programs(t), Out: log, Console: log, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer s.Close()
	must(t, s.BuildImage(t.Context()))
	barn, err := s.Add(t.Context(), stage.Cast{Name: "barn", Machine: emulate.RaspberryPi3, DiskSize: diskSize, Relay: emulate.Relay{None: true}})
	must(t, err)
	must(t, s.StartKeyServer(t.Context()))
	keyserver := func(args ...string) string {
		t.Helper()
		out, err := s.Run(t.Context(), "farkeep-keyserver", append(args, s.KeyServerFlags()...)...)
		must(t, err)
		return out
	}
	client, err := os.ReadFile(filepath.Join(s.Site, "appliances", "barn", "identity", "ssh_client_key"))
	must(t, err)
	described, err := site.Read(filepath.Join(s.Site, "site.toml"))
	must(t, err)

	disk := stockdebian.Disk{Path: barn.Disk, Serial: "usb"}
	m, err := stockdebian.Boot(t.Context(), stockdebian.Config{Stick: stick(t), Disks: []stockdebian.Disk{disk}, Network: true, Console: log})
	must(t, err)
	defer m.Close()
	sh := func(script string) (string, error) { return m.Run(t.Context(), script) }
	ok := func(script string) string {
		t.Helper()
		out, err := sh(script)
		if err != nil {
			t.Fatalf("%s\n%v", script, err)
		}
		return out
	}
	// The VPN is played by a rule that leads to this machine's loopback.
	host, port, err := net.SplitHostPort(s.KeyServerAt())
	must(t, err)
	if host != "127.0.0.1" {
		t.Fatalf("the key server is at %s", host)
	}
	ok(fmt.Sprintf("nft 'add table ip vpn; add chain ip vpn out { type nat hook output priority -100; }; add rule ip vpn out ip daddr 10.77.0.1 tcp dport 4022 dnat to %s:%s'\n", emulate.HostAddress, port))
	ok(fmt.Sprintf("mkdir -m 700 /etc/farkeep\n( umask 077; cat > /etc/farkeep/ssh_client_key ) <<'END'\n%sEND\necho '[10.77.0.1]:4022 %s' > /etc/farkeep/known_hosts\n", client, described.KeyServers[0].HostKey))

	fetch := block(t, "keyserver.md", "cryptsetup open --key-file -")
	run := "UUID=" + barn.LUKS + "\nset +e\n" + fetch + "set -e\ntest -e /dev/mapper/farkeep\n" // as in a person's shell
	closing := "cryptsetup close farkeep\n"
	began := time.Now()
	ok(run)
	t.Logf("%8.1f s  stock ssh and cryptsetup open the disk", time.Since(began).Seconds())
	first := ok("e2fsck -p /dev/mapper/farkeep >&2 || test $? -le 1\nmount /dev/mapper/farkeep /mnt\nls /mnt >&2\numount /mnt\n" + closing + "cat /etc/farkeep/token\n")
	lines := strings.Fields(first)
	token := lines[len(lines)-1]
	if len(token) < 40 {
		t.Fatalf("no token was kept: %q", first)
	}
	// With it, the next time; and it is another one then.
	ok(run + closing)
	if now := strings.TrimSpace(ok("stat -c %a /etc/farkeep/token >&2\ncat /etc/farkeep/token\n")); strings.HasSuffix(now, token) || !strings.HasPrefix(now, "600") {
		t.Errorf("the token after the second key: %q, after the first: %q", now, token)
	}
	ok(run + closing)
	// A copy of the card from the beginning shows a token that is two keys old.
	ok("cp /etc/farkeep/token /etc/farkeep/token.kept\necho " + token + " > /etc/farkeep/token\n")
	if out, err := sh(run); err == nil || !strings.Contains(out, "refused") {
		t.Errorf("a cloned card got the key: %v %s", err, out)
	}
	if list := keyserver("waiting"); !strings.Contains(list, "barn") {
		t.Errorf("nothing waits for a person: %q", list)
	}
	ok("cp /etc/farkeep/token.kept /etc/farkeep/token\n")
	keyserver("revoke", "barn", "--reason", "test", "--wait=0s")
	if out, err := sh(run); err == nil || !strings.Contains(out, "refused") {
		t.Errorf("a revoked appliance got the key: %v %s", err, out)
	}
	if out := ok("ls /dev/mapper\n"); strings.Contains(out, "farkeep") {
		t.Errorf("the disk is open: %s", out)
	}
}
