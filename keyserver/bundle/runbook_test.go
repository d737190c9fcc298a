package bundle

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"farkeep/shared/luksheader"
	"farkeep/shared/runsteps"
	"farkeep/shared/secret"
	"farkeep/shared/volumekey"
)

// steps are the runbook's, as they stand in a bundle, by name.
func steps(t *testing.T, markdown []byte) map[string]runsteps.Step {
	t.Helper()
	all, err := runsteps.Parse(markdown)
	check(t, err)
	byName := map[string]runsteps.Step{}
	for _, s := range all {
		byName[s.Name] = s
	}
	return byName
}

// shell is one shell that runs steps one after the other, in a mount namespace of its
// own, where what the device mapper would show is put into a folder.
type shell struct {
	t     *testing.T
	h     *home
	steps map[string]runsteps.Step
	text  strings.Builder
}

// step appends a step, with other values for some of its variables.
func (s *shell) step(name string, values ...string) {
	s.t.Helper()
	step, ok := s.steps[name]
	if !ok {
		s.t.Fatalf("the runbook has no step %s", name)
	}
	set := map[string]string{}
	for i := 0; i < len(values); i += 2 {
		set[values[i]] = values[i+1]
	}
	step, err := step.Set(set)
	check(s.t, err)
	s.text.WriteString("echo '== " + name + "'\n" + step.Script)
}

// run runs what was appended and returns what it said.
func (s *shell) run() (string, error) {
	need(s.t, "unshare", "borg", "cryptsetup", "b2sum")
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-euc",
		"mount -t tmpfs none /mnt\nmkdir -p /dev/mapper\nmount -t tmpfs none /dev/mapper\nmount -t tmpfs none /dev/shm\n"+s.text.String())
	cmd.Dir = s.h.dir
	cmd.Env = []string{"PATH=" + filepath.Join(s.h.dir, "bin") + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + filepath.Join(s.h.dir, "stranger"), "LANG=C.UTF-8", "BORG_PASSPHRASE=" + borgWords}
	out, err := cmd.CombinedOutput()
	s.text.Reset()
	return string(out), err
}

func (s *shell) mustRun() string {
	s.t.Helper()
	out, err := s.run()
	if err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// decrypted puts a stand-in for "cryptsetup open" before the real one: the key is tried
// by cryptsetup itself, and what the device mapper would show is an image of what is
// inside. Not every kernel that runs tests has one; the drill has, with real disks.
func (h *home) decrypted(t *testing.T, plain string) {
	t.Helper()
	script := `#!/bin/sh
set -eu
case "$1" in
open)
    case "$*" in *--test-passphrase*) exec /usr/sbin/cryptsetup "$@" ;; esac
    for last in "$@"; do :; done
    n=$#
    i=0
    for a in "$@"; do
        shift
        i=$((i+1))
        if [ $i -lt $n ]; then set -- "$@" "$a"; fi
    done
    shift
    /usr/sbin/cryptsetup open --test-passphrase "$@"
    ln -s ` + plain + ` "/dev/mapper/$last" ;;
close) rm "/dev/mapper/$2" ;;
*) exec /usr/sbin/cryptsetup "$@" ;;
esac
`
	path := filepath.Join(h.dir, "bin/cryptsetup")
	write(t, path, []byte(script))
	check(t, os.Chmod(path, 0o700))
}

// generations makes a disk's content: two generations of each repository, the newer
// one suspect of the first.
func (h *home) generations(t *testing.T, names ...string) (plain string) {
	t.Helper()
	root := filepath.Join(h.dir, "root")
	for i, name := range names {
		for n, suspect := range map[string]bool{"000009-20260501T000000Z": false, "000010-20260502T000000Z": i == 0} {
			g := filepath.Join(root, "generations", name, n)
			check(t, os.MkdirAll(g, 0o700))
			tool(t, h.dir, "cp", "-r", "srv/"+name, filepath.Join(g, "files"))
			write(t, filepath.Join(g, "generation.toml"), fmt.Appendf(nil, "format = 1\nsuspect = %v\n", suspect))
			tool(t, g, "sh", "-c", "find files -type f | sort | xargs b2sum -l 256 > SUMS.b2; chmod -R a-w files")
		}
	}
	plain = filepath.Join(h.dir, "plain.img")
	tool(t, h.dir, "mke2fs", "-q", "-t", "ext4", "-d", root, plain, "64M")
	return plain
}

// TestRunbook follows the runbook of a bundle from the disk to the files: repositories
// with their key inside, in a file, and none, with and without room for a copy, and a
// header that is destroyed.
func TestRunbook(t *testing.T) {
	h := newHome(t, "photos=repokey", "letters=keyfile-blake2", "pictures=none")
	path, _ := h.create(t, Clear, "bundle")
	h.decrypted(t, h.generations(t, "photos", "letters", "pictures"))
	check(t, os.RemoveAll(h.keys), os.Rename(filepath.Join(h.dir, "srv"), filepath.Join(h.dir, "burned")))
	s := &shell{t: t, h: h, steps: steps(t, read(t, filepath.Join(path, RunbookFile)))}
	work := filepath.Join(h.dir, "work")
	open := func() {
		s.step("tools")
		s.step("choose", "DISK", h.disk, "BUNDLE", path, "WORK", work)
		for _, name := range []string{"bundle-sums", "right-disk", "unlock", "fsck", "mount"} {
			s.step(name)
		}
	}
	open()
	for _, name := range []string{"photos", "letters", "pictures"} {
		s.step("choose-repository", "REPO", name)
		for _, step := range []string{"newest", "sums", map[bool]string{true: "layer", false: "copy"}[name == "letters"], "borg-keys", "borg-list", "borg-check", "borg-archive", "borg-extract"} {
			s.step(step)
		}
	}
	s.step("close")
	// What was layered over one generation is not laid over another one.
	s.text.WriteString("cat \"$FROM/files/config\" > /dev/null 2>&1 && exit 1\n")
	open()
	s.step("choose-repository", "REPO", "letters", "COPY", filepath.Join(work, "again"))
	s.step("newest", "GENERATION", "000009-20260501T000000Z")
	s.step("layer")
	s.text.WriteString("echo left > \"$COPY/left\"\n")
	s.step("newest")
	s.step("layer")
	s.text.WriteString("test ! -e \"$COPY/left\"\n")
	s.step("borg-keys")
	s.step("borg-list")
	s.step("close")
	out := s.mustRun()
	if !strings.Contains(out, "000009-20260501T000000Z\n== sums") || strings.Count(out, "000010-20260502T000000Z\n== sums") != 2 || strings.Count(out, "monday ") != 4 {
		t.Errorf("not the newest generation that is not suspect:\n%s", out)
	}
	for _, name := range []string{"photos", "letters", "pictures"} {
		got := read(t, filepath.Join(work, "files-of-"+name, "documents", name))
		if !bytes.Equal(got, read(t, filepath.Join(h.dir, "documents", name))) {
			t.Errorf("%s is not what was backed up", name)
		}
	}

	// Another disk, and a damaged file, are found.
	open()
	s.text.Reset()
	s.step("choose", "DISK", h.disk, "BUNDLE", path, "WORK", work, "UUID", "11111111-2222-3333-4444-555555555555")
	s.step("right-disk")
	if out, err := s.run(); err == nil || !strings.Contains(out, "ANOTHER disk") {
		t.Errorf("another disk: %v\n%s", err, out)
	}
	key := filepath.Join(path, "disks", atticDisk+".recovery.key")
	was := read(t, key)
	write(t, key, was[1:])
	s.step("choose", "DISK", h.disk, "BUNDLE", path, "WORK", work)
	s.step("bundle-sums")
	if out, err := s.run(); err == nil || !strings.Contains(out, "FAILED") {
		t.Errorf("a damaged bundle: %v\n%s", err, out)
	}
	write(t, key, was)

	// The header is gone: first without a change to the disk, then put back.
	before := read(t, h.disk)
	check(t, os.WriteFile(h.disk, append(bytes.Repeat([]byte{0xff}, 4<<20), before[4<<20:]...), 0o600))
	noise := sha256.Sum256(read(t, h.disk))
	s.step("choose-header", "DISK", h.disk, "BUNDLE", path, "WORK", work)
	for _, name := range []string{"header-key", "header-detached", "fsck", "mount", "choose-repository", "newest", "close"} {
		s.step(name)
	}
	if out := s.mustRun(); !strings.Contains(out, "the key opens this header") || sha256.Sum256(read(t, h.disk)) != noise {
		t.Errorf("the disk was changed, or:\n%s", out)
	}
	s.step("choose-header", "DISK", h.disk, "BUNDLE", path, "WORK", work)
	s.step("header-keep")
	s.step("header-restore")
	open()
	s.step("choose-repository")
	s.step("close")
	s.mustRun()
	if kept := read(t, filepath.Join(work, "header-as-found")); !bytes.Equal(kept[:1<<20], bytes.Repeat([]byte{0xff}, 1<<20)) {
		t.Error("what was there before was not kept")
	}

	// Bad sectors: what ddrescue makes of a disk opens like it.
	need(t, "ddrescue")
	image := filepath.Join(h.dir, "rescued.img")
	s.step("choose-rescue", "DISK", h.disk, "IMAGE", image)
	for _, name := range []string{"rescue", "rescue-rest"} {
		s.step(name)
	}
	s.step("choose", "DISK", image, "BUNDLE", path, "WORK", work)
	for _, name := range []string{"right-disk", "unlock", "rescue-fsck", "mount", "choose-repository", "close"} {
		s.step(name)
	}
	s.mustRun()
	if !bytes.Equal(read(t, image), read(t, h.disk)) {
		t.Error("the image is not the disk")
	}

	// And the bundle is voided: the old key opens nothing, the new one and the key
	// server's do.
	s.step("choose-void", "DISK", h.disk, "OLD", key, "NEW", filepath.Join(h.dir, "new.key"))
	for _, name := range []string{"void-add", "void-remove", "void-proof"} {
		s.step(name)
	}
	s.mustRun()
	for _, k := range []string{filepath.Join(h.dir, "new.key"), filepath.Join(h.site, "keyserver-borg/keys", atticDisk+".key")} {
		tool(t, h.dir, "cryptsetup", "open", "--test-passphrase", "--key-file", k, h.disk)
	}
	tool(t, h.dir, "cryptsetup", "open", "--test-passphrase", "--header", filepath.Join(h.dir, "new.key.luks-header"), "--key-file", filepath.Join(h.dir, "new.key"), h.disk)
	// What the runbook warns of: the old header in the bundle still opens with the old key.
	tool(t, h.dir, "cryptsetup", "open", "--test-passphrase", "--header", filepath.Join(path, "disks", atticDisk+".luks-header"), "--key-file", key, h.disk)
}

var (
	keyBlock = regexp.MustCompile(`(?s)<div class="key[^"]*">(.*?)</div>`)
	svgPath  = regexp.MustCompile(`viewBox="0 0 (\d+) \d+".*? d="([^"]*)"`)
	svgMove  = regexp.MustCompile(`M(\d+) (\d+)h(\d+)v1h-\d+z`)
)

// codesOf draws the codes of a page and lets zbar read them.
func codesOf(t *testing.T, page []byte) (texts []string) {
	t.Helper()
	need(t, "zbarimg")
	const zoom = 5
	for i, m := range svgPath.FindAllSubmatch(page, -1) {
		side, err := strconv.Atoi(string(m[1]))
		check(t, err)
		img := image.NewGray(image.Rect(0, 0, side*zoom, side*zoom))
		for j := range img.Pix {
			img.Pix[j] = 255
		}
		for _, p := range svgMove.FindAllSubmatch(m[2], -1) {
			var n [3]int
			for k := range n {
				n[k], err = strconv.Atoi(string(p[k+1]))
				check(t, err)
			}
			for x := n[0] * zoom; x < (n[0]+n[2])*zoom; x++ {
				for y := n[1] * zoom; y < (n[1]+1)*zoom; y++ {
					img.SetGray(x, y, color.Gray{})
				}
			}
		}
		path := filepath.Join(t.TempDir(), fmt.Sprintf("%d.png", i))
		f, err := os.Create(path)
		check(t, err, png.Encode(f, img), f.Close())
		out, err := exec.Command("zbarimg", "--quiet", "--raw", path).Output() // it complains about D-Bus besides
		check(t, err)
		texts = append(texts, strings.TrimSuffix(string(out), "\n"))
	}
	return texts
}

// TestPaper: with the page alone, typed or scanned, the key comes back to the last
// bit, a mistyped line is named, Borg takes its key, and the volume key is the one that
// the kernel would have.
func TestPaper(t *testing.T) {
	h := newHome(t, "letters=keyfile-blake2")
	path, r := h.create(t, Paper, "paper")
	if entries, err := os.ReadDir(path); err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
	page := read(t, filepath.Join(path, PageFile))
	if bytes.Contains(page, []byte("http://")) || bytes.Contains(page, []byte("src=")) || bytes.Contains(page, []byte("<script")) {
		t.Error("the page needs something from outside")
	}
	var blocks []string
	for _, m := range keyBlock.FindAllSubmatch(page, -1) {
		blocks = append(blocks, html.UnescapeString(string(m[1])))
	}
	if len(blocks) != 3 {
		t.Fatalf("the page has %d keys: recovery, volume and Borg's are expected", len(blocks))
	}
	// What the codes say is what stands beside them; Borg's needs more than one.
	scanned := codesOf(t, page)
	if len(scanned) < 5 || scanned[0] != blocks[0] || scanned[1] != blocks[1] || strings.Join(scanned[3:], "\n") != blocks[2] {
		t.Errorf("scanned: %q\nprinted: %q", scanned, blocks)
	}
	if want := "header " + atticDisk + " sha256 " + r.Manifest.Disks[0].Header; scanned[2] != want {
		t.Errorf("the header's code says %q", scanned[2])
	}

	o := h.options(Clear, "bundle")
	_, err := Create(o)
	check(t, err)
	work := filepath.Join(h.dir, "work")
	s := &shell{t: t, h: h, steps: steps(t, read(t, filepath.Join(o.To, RunbookFile)))}
	paper := filepath.Join(h.dir, "paper.txt")
	typed := func(text string) (string, error) {
		write(t, paper, []byte(text))
		s.step("choose-paper", "WORK", work, "PAPER", paper)
		s.step("paper-check")
		s.step("paper-key")
		s.step("choose-volume")
		s.step("paper-volume")
		return s.run()
	}
	// As a person types: capitals, other gaps, Windows' line ends, empty lines, another order.
	lines := strings.Split(blocks[0]+"\n"+blocks[1], "\n")
	slices.Reverse(lines)
	sloppy := strings.ReplaceAll(strings.ToUpper(strings.Join(lines, "\r\n\r\n  ")), " ", "  ") + " \r\n"
	for name, text := range map[string]string{"scanned": scanned[0] + "\n" + scanned[1] + "\n", "typed": sloppy} {
		out, err := typed(text)
		if err != nil || strings.Contains(out, "WRONG") {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		key := read(t, filepath.Join(work, "recovery.key"))
		if !bytes.Equal(key, read(t, filepath.Join(h.site, "operator", atticDisk+".recovery.key"))) {
			t.Errorf("%s: another key", name)
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(key)); !strings.Contains(strings.ReplaceAll(string(page), " ", ""), sum) || !strings.Contains(out, sum) {
			t.Errorf("%s: the page has another SHA-256 than the key", name)
		}
		header, err := luksheader.Check(bytes.NewReader(read(t, h.disk)), 24<<20)
		check(t, err)
		volume, err := volumekey.Open(header, secret.New(bytes.Clone(key)))
		if err != nil || !bytes.Equal(volume.Reveal(), read(t, filepath.Join(work, "volume.key"))) {
			t.Errorf("%s: another volume key (%v)", name, err)
		}
		for _, want := range []string{"CIPHER=" + header.Cipher + "\n", fmt.Sprintf("KEYBITS=%d\n", header.KeySize*8), fmt.Sprintf("SECTOR=%d\n", header.SectorSize), fmt.Sprintf("OFFSET=%d\n", header.DataOffset/512)} {
			if !strings.Contains(s.steps["choose-volume"].Script, want) {
				t.Errorf("the step has not %q", want)
			}
		}
	}
	// Each mistake is found, in its line: a wrong digit, two swapped, a line twice, one that is another's.
	for _, mistake := range []func(string) string{
		func(l string) string { return strings.Replace(l, "r3 ", "r4 ", 1) },
		func(l string) string { return l[:3] + string(rune('a'+(l[3]-'0')%6)) + l[4:] },
		func(l string) string { b := []byte(l); b[4], b[5] = b[5]^1, b[4]; return string(b) },
		func(l string) string { return l[:len(l)-7] + l[len(l)-5:] },
	} {
		wrong := strings.Split(blocks[0], "\n")
		wrong[2] = mistake(wrong[2])
		out, err := typed(strings.Join(wrong, "\n"))
		if err == nil || strings.Count(out, "WRONG") != 1 || strings.Count(out, "right") != len(wrong)-1 {
			t.Errorf("%q was taken: %v\n%s", wrong[2], err, out)
		}
	}
	if out, err := typed(""); err == nil {
		t.Errorf("an empty file was taken: %s", out)
	}

	// Borg's key, typed from the page into a Borg that has none.
	check(t, os.RemoveAll(h.keys))
	borg := filepath.Join(h.dir, "borg.txt")
	write(t, borg, []byte(strings.ReplaceAll(blocks[2], "\n", "\r\n")))
	s.step("choose", "DISK", h.disk, "BUNDLE", "/nonexistent", "WORK", work)
	s.step("bundle-sums")
	s.step("choose-repository", "REPO", "letters", "COPY", filepath.Join(h.dir, "srv/letters"))
	s.step("borg-keys")
	s.step("choose-borg-paper", "BORGPAPER", borg)
	s.step("borg-paper")
	s.step("borg-list")
	if out := s.mustRun(); !strings.Contains(out, "monday") {
		t.Errorf("borg does not list the archive:\n%s", out)
	}
}
