package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/appliance/benchtest"
	"farkeep/pusher/borgtest"
	"farkeep/shared/linetest"
)

// A cable is a line to both servers, which measures what crosses it.
type cable struct {
	line         benchtest.Line
	ours, theirs *linetest.Proxy // to the receiver, and to sshd
	sshd         *benchSSHD      // by way of theirs
}

func newCable(b testing.TB, line benchtest.Line, a *benchAppliance, sshd *benchSSHD) *cable {
	b.Helper()
	rate := line.Mbit * 1_000_000 / 8
	between := linetest.Line{Delay: line.RoundTrip / 2, Up: rate, Down: rate}
	w := &cable{line: line, ours: linetest.Start(b, a.address(), between), theirs: linetest.Start(b, sshd.address, between)}
	w.sshd = sshd.through(b, w.theirs.Addr())
	return w
}

// count adds to the cost of a run what crossed the line meanwhile.
func count(p *linetest.Proxy, run func() benchtest.Cost) benchtest.Cost {
	p.Reset()
	c := run()
	c.Up, c.Down = p.Sent()
	return c
}

// A mirror is one program's copy of a repository on the other side, with what the
// program remembers of it at home.
type mirror interface {
	// push brings the state over. What it costs is the program's own run; that it
	// succeeded is not yet that the copy is right.
	push(b testing.TB, w *cable, s state) benchtest.Cost
	// same fails the test unless the copy is what the state is.
	same(b testing.TB, s state)
	// remove makes room.
	remove(b testing.TB)
}

// A seeder's copy is made with cp as well as with a first push: it remembers nothing
// at home.
type seeder interface {
	seed(b testing.TB, s state)
}

// A rival makes mirrors: each one of its own, empty.
type rival struct {
	name string
	open func(b testing.TB, at places) mirror
}

// places are where a mirror may keep what it keeps. None of them is there yet but
// disk.
type places struct {
	repository string // a name that nobody had
	target     string // on the server
	memory     string // at home
	scratch    string // of the test, for looking into the copy

	appliance *benchAppliance
}

// Everyone who uses OpenSSH's client gets its quickest cipher, but for the one who
// shows what OpenSSH takes by itself.
func rivals() map[string]rival {
	all := map[string]rival{}
	for _, r := range []rival{
		rsyncRival("rsync", defaultCipher),
		rsyncRival("rsync aes128-gcm", quickCipher),
		rsyncRival("rsync --no-inc-recursive", quickCipher, "--no-inc-recursive"),
		// What --delete takes away at first cannot serve as a base.
		rsyncRival("rsync --fuzzy", quickCipher, "--fuzzy", "--delete-after"),
		{"rclone sftp", func(_ testing.TB, at places) mirror { return &rcloneMirror{at} }},
		{"restic copy", openRestic},
		{"Borg-in-Borg", openBorg},
		{"Farkeep", openFarkeep},
	} {
		all[r.name] = r
	}
	return all
}

func rsyncRival(name, cipher string, options ...string) rival {
	return rival{name, func(_ testing.TB, at places) mirror {
		return &rsyncMirror{at, cipher, append([]string{"--delete"}, options...)}
	}}
}

type rsyncMirror struct {
	at      places
	cipher  string
	options []string
}

func (m *rsyncMirror) push(b testing.TB, w *cable, s state) benchtest.Cost {
	return count(w.theirs, func() benchtest.Cost { return w.sshd.copy(b, s.folder, m.at.target, m.cipher, m.options...) })
}
func (m *rsyncMirror) same(b testing.TB, s state) { sameFiles(b, s.want, m.at.target) }
func (m *rsyncMirror) remove(b testing.TB)        { m.at.clear(b) }

func (m *rsyncMirror) seed(b testing.TB, s state) { m.at.seed(b, s) }

func (at places) seed(b testing.TB, s state) {
	b.Helper()
	if out, err := exec.Command("cp", "-a", s.folder, at.target).CombinedOutput(); err != nil {
		b.Fatalf("cp: %v\n%s", err, out)
	}
}

func (at places) clear(b testing.TB) {
	must(b, os.RemoveAll(at.target))
	must(b, os.RemoveAll(at.memory))
}

// rclone as its documentation tells to set it up; it has an SSH client of its own.
type rcloneMirror struct{ at places }

func (m *rcloneMirror) push(b testing.TB, w *cable, s state) benchtest.Cost {
	_, port, _ := strings.Cut(w.sshd.address, ":")
	cmd := exec.Command("rclone", "sync", "--config", filepath.Join(m.at.memory, "rclone.conf"), "--cache-dir", m.at.memory,
		"--sftp-host", "127.0.0.1", "--sftp-port", port, "--sftp-user", "root", "--sftp-key-file", w.sshd.key, "--sftp-known-hosts-file", w.sshd.known,
		s.folder, ":sftp:"+m.at.target)
	return count(w.theirs, func() benchtest.Cost {
		c, _ := measure(b, cmd, w.sshd.pid)
		return c
	})
}
func (m *rcloneMirror) seed(b testing.TB, s state) { m.at.seed(b, s) }
func (m *rcloneMirror) same(b testing.TB, s state) { sameFiles(b, s.want, m.at.target) }
func (m *rcloneMirror) remove(b testing.TB)        { m.at.clear(b) }

// restic copy brings over what restic backed up: from a repository at home into
// one on the server. That is no mirror of a Borg repository, and the best that a
// user of restic can do.
type resticMirror struct{ at places }

func openRestic(b testing.TB, at places) mirror {
	b.Helper()
	resticTool(b, at.memory, "/", "init", "--repo", at.target)
	return &resticMirror{at}
}

func (m *resticMirror) push(b testing.TB, w *cable, s state) benchtest.Cost {
	cmd := exec.Command("restic", "--cache-dir", m.at.memory, "--quiet", "--repo", "sftp:bench:"+m.at.target,
		"-o", "sftp.command="+w.sshd.shell(quickCipher)+" bench -s sftp", "copy", "--from-repo", s.restic)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+resticPassword, "RESTIC_FROM_PASSWORD="+resticPassword)
	return count(w.theirs, func() benchtest.Cost {
		c, _ := measure(b, cmd, w.sshd.pid)
		return c
	})
}

func (m *resticMirror) same(b testing.TB, s state) {
	defer os.RemoveAll(m.at.scratch)
	resticTool(b, m.at.memory, "/", "--repo", m.at.target, "restore", "latest", "--target", m.at.scratch)
	sameFiles(b, s.backed, m.at.scratch)
}
func (m *resticMirror) remove(b testing.TB) { m.at.clear(b) }

// borgMirror is a Borg repository on the server, into which the repository's
// folder is backed up as any other folder. What is in it is encrypted already.
type borgMirror struct {
	at     places
	pushes int
}

func openBorg(b testing.TB, at places) mirror {
	b.Helper()
	m := &borgMirror{at: at}
	m.local(b, "/", "init", "--encryption=none", at.target)
	return m
}

func (m *borgMirror) env() []string { return borgtest.Env(m.at.memory) }

func (m *borgMirror) local(b testing.TB, dir string, args ...string) {
	b.Helper()
	cmd := exec.Command("borg", args...)
	cmd.Dir, cmd.Env = dir, m.env()
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("borg %s (Debian package borgbackup): %v\n%s", args, err, out)
	}
}

func (m *borgMirror) push(b testing.TB, w *cable, s state) benchtest.Cost {
	m.pushes++
	args := []string{"create", "--compression=none"}
	if s.small {
		args = append(args, "--chunker-params="+householdChunks)
	}
	cmd := exec.Command("borg", append(args, fmt.Sprintf("ssh://bench%s::%d", m.at.target, m.pushes), ".")...)
	cmd.Dir, cmd.Env = s.folder, append(m.env(), "BORG_RSH="+w.sshd.shell(quickCipher))
	return count(w.theirs, func() benchtest.Cost {
		c, _ := measure(b, cmd, w.sshd.pid)
		return c
	})
}

func (m *borgMirror) same(b testing.TB, s state) {
	defer os.RemoveAll(m.at.scratch)
	must(b, os.Mkdir(m.at.scratch, 0o700))
	m.local(b, m.at.scratch, "extract", fmt.Sprintf("%s::%d", m.at.target, m.pushes))
	sameFiles(b, s.want, m.at.scratch)
}
func (m *borgMirror) remove(b testing.TB) { m.at.clear(b) }

type farkeepMirror struct {
	at     places
	site   *benchSite
	folder string // that the site names
	newest string
	pushes int // that made a generation
}

func openFarkeep(_ testing.TB, at places) mirror { return &farkeepMirror{at: at} }

func (m *farkeepMirror) push(b testing.TB, w *cable, s state) benchtest.Cost {
	if m.site == nil {
		m.site, m.folder = m.at.appliance.site(b, m.at.memory, m.at.repository, s.folder), s.folder
	}
	if s.folder != m.folder {
		b.Fatalf("%s is pushed after %s: a repository stays where it is", s.folder, m.folder)
	}
	m.site.through(b, w.ours.Addr())
	result := "new"
	if s.want == m.newest {
		result = "unchanged"
	} else {
		m.pushes++
	}
	m.newest = s.want
	return count(w.ours, func() benchtest.Cost { return m.site.push(b, result) })
}

func (m *farkeepMirror) same(b testing.TB, s state) {
	sameGeneration(b, s.want, m.site.generation(b, m.pushes))
}

// remove makes room, and no more: the keeper goes on without noticing.
func (m *farkeepMirror) remove(b testing.TB) {
	m.at.clear(b)
	all, err := filepath.Glob(filepath.Join(m.at.appliance.paths.Disk(), "generations", m.at.repository, "*-*", "files"))
	must(b, err)
	for _, files := range all {
		must(b, os.RemoveAll(files))
	}
}
