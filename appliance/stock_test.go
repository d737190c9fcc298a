package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
)

// The tests below let the programs that people have fill a repository: OpenSSH's
// sftp and scp, rclone and restic, as Debian ships them, against the appliance's own
// confined parts.

// stock is an appliance and a machine with stock clients.
type stock struct {
	*benchAppliance
	dir    string
	config string // of ssh; the hosts are "pi" with the push key and "read" with a restore key
	known  string
}

// startStock starts an appliance that knows a push key with a quota of 1 MiB, for
// the repository small alone, besides those that every test's knows.
func startStock(t testing.TB, diskSize string) *stock {
	t.Helper()
	dir := benchDir(t)
	self, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	bin := filepath.Join(dir, "farkeep-appliance")
	must(t, os.WriteFile(bin, self, 0o755))
	identity := func(name string) (path, public string) {
		private, public := newIdentity(t, name)
		path = filepath.Join(dir, name+"_key")
		must(t, os.WriteFile(path, []byte(private.Reveal()), 0o600))
		return path, public
	}
	smallKey, smallPublic := identity("small")
	s := &stock{dir: dir, config: filepath.Join(dir, "ssh_config"), known: filepath.Join(dir, "known_hosts")}
	s.benchAppliance = startAppliance(t, dir, bin, diskSize,
		settings.ReceiverKey{Name: "small", Role: "push", PublicKey: smallPublic, Repositories: []string{"small"}, QuotaBytes: 1 << 20})
	must(t, os.WriteFile(s.known, fmt.Appendf(nil, "[127.0.0.1]:%d %s\n", s.port, s.hostKey), 0o600))
	var config strings.Builder
	for _, host := range [][2]string{{"pi", s.key}, {"read", s.restore}, {"small", smallKey}} {
		fmt.Fprintf(&config, "Host %s\n  HostName 127.0.0.1\n  Port %d\n  User farkeep\n  IdentityFile %s\n  IdentitiesOnly yes\n  BatchMode yes\n  LogLevel ERROR\n  UserKnownHostsFile %s\n", host[0], s.port, host[1], s.known)
	}
	must(t, os.WriteFile(s.config, []byte(config.String()), 0o600))
	return s
}

// need fails unless the program is installed, and prints its version.
func need(t testing.TB, program, debianPackage string, version ...string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Fatalf("install %s: %v", debianPackage, err)
	}
	out, err := exec.Command(version[0], version[1:]...).CombinedOutput()
	must(t, err)
	first, _, _ := strings.Cut(string(out), "\n")
	t.Logf("peer: %s", first)
}

// result is what a program did.
type result struct {
	out, err string
	code     int
}

func (s *stock) run(t testing.TB, stdin, program string, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "HOME="+s.dir, "XDG_CACHE_HOME="+s.dir+"/cache", "RESTIC_PASSWORD=secret", "RCLONE_CONFIG="+s.dir+"/rclone.conf")
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// must fails unless the program ended well.
func (r result) must(t testing.TB, what string) result {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s", what, r.code, r.out, r.err)
	}
	return r
}

func (s *stock) sftp(t testing.TB, host, batch string) result {
	t.Helper()
	return s.run(t, batch, "sftp", "-F", s.config, "-b", "-", host)
}

func (s *stock) ssh(t testing.TB, host, verb string) result {
	t.Helper()
	return s.run(t, "", "ssh", "-F", s.config, host, verb)
}

// commit commits a repository as a cron job does.
func (s *stock) commit(t testing.TB, repository string) (c pushwire.CommitAnswer) {
	t.Helper()
	r := s.ssh(t, "pi", "commit "+repository).must(t, "commit "+repository)
	must(t, json.Unmarshal([]byte(r.out), &c))
	return c
}

// write makes a file with its folders, an hour old: what clients compare is times.
func write(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(content), 0o644))
	then := time.Now().Add(-time.Hour).Truncate(time.Second)
	must(t, os.Chtimes(path, then, then))
}

// content is what lies below a folder: files by path.
func content(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		got[rel] = string(data)
		return err
	}))
	return got
}

// holds compares a generation with what it must hold.
func (s *stock) holds(t testing.TB, repository, generation string, want map[string]string) {
	t.Helper()
	if diff := cmp.Diff(want, content(t, s.files(repository, generation))); diff != "" {
		t.Errorf("%s/%s (-want +got):\n%s", repository, generation, diff)
	}
	if v := s.verify(t, repository, generation); len(v.Bad) > 0 {
		t.Errorf("%s/%s: %q", repository, generation, v.Bad)
	}
}

// verify reads a generation as the push key may.
func (s *stock) verify(t testing.TB, repository, generation string) (v pushwire.VerifyAnswer) {
	t.Helper()
	r := s.ssh(t, "pi", "verify "+repository+" "+generation).must(t, "verify")
	must(t, json.Unmarshal([]byte(r.out), &v))
	return v
}

func TestStockOpenSSH(t *testing.T) {
	need(t, "sftp", "openssh-client", "ssh", "-V")
	s := startStock(t, "64m")
	local := filepath.Join(s.dir, "local")
	write(t, local+"/a", "one")
	write(t, local+"/tree/b", "two")
	write(t, local+"/tree/deep/c", "three")
	write(t, local+"/part", "the first half")
	write(t, local+"/whole", "the first half, and the rest")

	s.sftp(t, "pi", `mkdir /photos
put -p local/a /photos/a
put -r local/tree /photos
put local/part /photos/long
reput local/whole /photos/long
put local/a /photos/gone
rename /photos/tree/b /photos/tree/renamed
rm /photos/gone
mkdir /photos/empty
chmod 750 /photos/tree/deep/c
ls -l /photos
df /photos
`).must(t, "sftp")
	if r := s.ssh(t, "pi", "generations photos").must(t, "generations"); r.out != "" {
		t.Errorf("the end of a connection made a generation: %s", r.out)
	}
	first := s.commit(t, "photos")
	want := map[string]string{"a": "one", "tree/renamed": "two", "tree/deep/c": "three", "long": "the first half, and the rest"}
	s.holds(t, "photos", first.Generation, want)
	if again := s.commit(t, "photos"); !again.Same || again.Generation != first.Generation {
		t.Errorf("a commit of what is there already: %+v after %+v", again, first)
	}
	if info, err := os.Stat(filepath.Join(s.files("photos", first.Generation), "tree/deep/c")); err != nil || info.Mode().Perm() != 0o554 {
		t.Errorf("mode on the disk: %v, %v", info.Mode(), err)
	}

	// All of these meet files that history has.
	write(t, local+"/a", "uno")
	s.sftp(t, "pi", `put local/a /photos/a
reput local/whole /photos/tree/renamed
chmod 600 /photos/tree/deep/c
rename /photos/long /photos/longer
put local/part /photos/longer
rm /photos/tree/renamed
get /photos/a local/back
`).must(t, "sftp")
	if back, err := os.ReadFile(local + "/back"); string(back) != "uno" {
		t.Errorf("read back: %q, %v", back, err)
	}
	// scp speaks SFTP since OpenSSH 9.0; -s asks older ones for it.
	s.run(t, "", "scp", "-F", s.config, "-s", "-p", "-r", local+"/tree", "pi:/photos/copied").must(t, "scp")
	s.run(t, "", "scp", "-F", s.config, "-s", "pi:/photos/copied/deep/c", local+"/fetched").must(t, "scp back")
	if r := s.run(t, "", "scp", "-F", s.config, "-O", local+"/a", "pi:/photos/legacy"); r.code == 0 || !strings.Contains(r.err, "no verb of that name") && !strings.Contains(r.err, "not a verb") {
		t.Errorf("scp -O, the old protocol: code %d, %s", r.code, r.err)
	}
	second := s.commit(t, "photos")
	s.holds(t, "photos", second.Generation, map[string]string{
		"a": "uno", "tree/deep/c": "three", "longer": "the first half", "copied/b": "two", "copied/deep/c": "three",
	})
	s.holds(t, "photos", first.Generation, want)

	for _, tt := range []struct{ name, host, batch, want string }{
		{"symbolic link", "pi", "symlink /photos/a /photos/l\n", "links are not kept"},
		{"hard link", "pi", "ln /photos/a /photos/l\n", "links are not kept"},
		{"out by dots", "pi", "put local/a /photos/../../x\n", "Permission denied"},
		{"top folder", "pi", "put local/a /x\n", "the folders at the top are the repositories"},
		{"a repository's folder", "pi", "rmdir /photos\n", "the folders at the top are the repositories"},
		{"another's repository", "small", "ls /photos\n", "not found"},
		{"another's new repository", "small", "mkdir /mine\n", "No such file"},
		{"between repositories", "pi", "mkdir /docs\nrename /photos/a /docs/a\n", "from one repository to another"},
		{"over the quota", "small", "put farkeep-appliance /small/big\n", "disk quota exceeded: key small"},
		{"a name with a newline", "pi", "mkdir \"/photos/x\ny\"\n", ""},
		{"a restore key", "read", "put local/a /photos/x/files/a\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if r := s.sftp(t, tt.host, tt.batch); r.code == 0 || !strings.Contains(strings.ToLower(r.out+r.err), strings.ToLower(tt.want)) {
				t.Errorf("exit code %d, want one, and %q:\n%s%s", r.code, tt.want, r.out, r.err)
			}
		})
	}
	if r := s.sftp(t, "small", "ls /\n").must(t, "ls"); !strings.Contains(r.out, "small") || strings.Contains(r.out, "photos") {
		t.Errorf("a key sees %q", r.out)
	}

	// What is not wanted any more goes with abort; the next copy begins from history.
	s.sftp(t, "pi", "rm /photos/a\nrm /photos/longer\n").must(t, "sftp")
	s.ssh(t, "pi", "abort photos").must(t, "abort")
	if r := s.ssh(t, "pi", "commit photos"); r.code != hint.ExitRefused || !strings.Contains(r.err, "nothing was uploaded by sftp") {
		t.Errorf("a commit after an abort: code %d, %s", r.code, r.err)
	}
	if r := s.sftp(t, "pi", "ls -1 /photos\n").must(t, "ls"); !strings.Contains(r.out, "/photos/a\n") {
		t.Errorf("the next copy holds %s", r.out)
	}
	if c := s.commit(t, "photos"); !c.Same {
		t.Errorf("the next copy is not the newest generation: %+v", c)
	}
	s.holds(t, "photos", first.Generation, want)
}

// A commit takes no file that is being written, and says so. What a client left half
// done when it died is as good as what it put there.
func TestStockCommitDuringUpload(t *testing.T) {
	need(t, "sftp", "openssh-client", "ssh", "-V")
	s := startStock(t, "64m")
	write(t, s.dir+"/a", "one")
	write(t, s.dir+"/big", noise(1, 4<<20))
	s.sftp(t, "pi", "mkdir /photos\nput a /photos/a\n").must(t, "sftp")
	// At 64 Kbit/s it uploads for nine minutes.
	client := exec.CommandContext(t.Context(), "sftp", "-F", s.config, "-l", "64", "-b", "-", "pi")
	client.Stdin, client.Dir = strings.NewReader("put big /photos/big\n"), s.dir
	must(t, client.Start())
	staged := filepath.Join(s.paths.Disk(), "staging", "photos", "home", "files")
	await(t, "the upload has begun", func() bool { _, err := os.Stat(staged + "/big"); return err == nil })
	if r := s.ssh(t, "pi", "commit photos"); r.code != hint.ExitUnreachable || !strings.Contains(r.err, "somebody is uploading to it: 1 files are open for writing") || !strings.Contains(r.err, "commit when the upload has ended") {
		t.Errorf("a commit during an upload: code %d, %s", r.code, r.err)
	}
	if r := s.ssh(t, "pi", "abort photos"); r.code != hint.ExitUnreachable {
		t.Errorf("an upload was discarded under its client: code %d, %s", r.code, r.err)
	}
	must(t, client.Process.Kill())
	client.Wait() // it was killed
	var c pushwire.CommitAnswer
	await(t, "the appliance sees that the client is gone", func() bool {
		r := s.ssh(t, "pi", "commit photos")
		return r.code == 0 && json.Unmarshal([]byte(r.out), &c) == nil
	})
	got := content(t, s.files("photos", c.Generation))
	if got["a"] != "one" || !strings.HasPrefix(noise(1, 4<<20), got["big"]) || len(got) != 2 {
		t.Errorf("committed: a %q, big of %d bytes", got["a"], len(got["big"]))
	}
}

func TestStockRclone(t *testing.T) {
	need(t, "rclone", "rclone", "rclone", "version")
	s := startStock(t, "128m")
	must(t, os.WriteFile(s.dir+"/rclone.conf", fmt.Appendf(nil, `[pi]
type = sftp
host = 127.0.0.1
port = %d
user = farkeep
key_file = %s
known_hosts_file = %s
shell_type = none
`, s.port, s.key, s.known), 0o600))
	rclone := func(args ...string) result {
		t.Helper()
		return s.run(t, "", "rclone", append(args, "-v", "--stats-one-line", "--retries", "1", "--transfers", "2", "--checkers", "2")...).must(t, "rclone "+args[0])
	}
	// What rclone says it sent: "Transferred: 3 / 3, 100%" in files.
	sent := func(r result) int {
		t.Helper()
		return strings.Count(r.err, ": Copied (")
	}
	local := filepath.Join(s.dir, "local")
	want := map[string]string{}
	for i := range 40 {
		path, text := fmt.Sprintf("%d/%03d", i%4, i), noise(uint64(i), 1000+i*997)
		write(t, filepath.Join(local, path), text)
		want[path] = text
	}
	if r := rclone("copy", "local", "pi:/music"); sent(r) != 40 {
		t.Errorf("rclone copy sent %d files:\n%s", sent(r), r.err)
	}
	rclone("check", "--download", "local", "pi:/music")
	first := s.commit(t, "music")
	s.holds(t, "music", first.Generation, want)
	if r := rclone("sync", "local", "pi:/music"); sent(r) != 0 {
		t.Errorf("rclone sync of what is there already sent %d files:\n%s", sent(r), r.err)
	}

	// A day later: one file is new, one changed, one gone.
	old := map[string]string{}
	for path, text := range want {
		old[path] = text
	}
	write(t, local+"/new", "new")
	must(t, os.WriteFile(local+"/1/001", []byte("changed"), 0o644))
	must(t, os.Remove(local+"/2/002"))
	want["new"], want["1/001"] = "new", "changed"
	delete(want, "2/002")
	if r := rclone("sync", "local", "pi:/music"); sent(r) != 2 || !strings.Contains(r.err, "2/002: Deleted") {
		t.Errorf("rclone sync sent %d files:\n%s", sent(r), r.err)
	}
	second := s.commit(t, "music")
	s.holds(t, "music", second.Generation, want)
	s.holds(t, "music", first.Generation, old)
	if r := rclone("sync", "local", "pi:/music"); sent(r) != 0 {
		t.Errorf("rclone sync after the commit sent %d files:\n%s", sent(r), r.err)
	}
	if c := s.commit(t, "music"); !c.Same {
		t.Errorf("nothing changed, yet: %+v", c)
	}
	// A copy that begins anew from history has what rclone compares: names, sizes, times.
	s.ssh(t, "pi", "abort music").must(t, "abort")
	if r := rclone("sync", "local", "pi:/music"); sent(r) != 0 {
		t.Errorf("rclone sync to a fresh copy of history sent %d files:\n%s", sent(r), r.err)
	}
	rclone("check", "--download", "local", "pi:/music")
}

func TestStockRestic(t *testing.T) {
	need(t, "restic", "restic", "restic", "version")
	s := startStock(t, "256m")
	restic := func(host, repository string, args ...string) result {
		t.Helper()
		command := fmt.Sprintf("sftp.command=ssh -F %s %s -s sftp", s.config, host)
		return s.run(t, "", "restic", append([]string{"-o", command, "-r", "sftp:" + host + ":" + repository, "--no-cache"}, args...)...)
	}
	local := filepath.Join(s.dir, "local")
	write(t, local+"/a", "one")
	write(t, local+"/noise", noise(1, 2<<20))
	monday := content(t, local)
	restic("pi", "/restic", "init").must(t, "restic init")
	restic("pi", "/restic", "backup", "local").must(t, "restic backup")
	first := s.commit(t, "restic")
	if r := s.ssh(t, "pi", "commit restic").must(t, "commit"); !strings.Contains(r.out, `"same":true`) {
		t.Errorf("nothing changed, yet: %s", r.out)
	}
	kept := content(t, s.files("restic", first.Generation))

	write(t, local+"/a", "two")
	write(t, local+"/noise", noise(2, 2<<20))
	restic("pi", "/restic", "backup", "local").must(t, "restic backup")
	restic("pi", "/restic", "forget", "--keep-last", "1", "--prune").must(t, "restic forget --prune")
	restic("pi", "/restic", "check", "--read-data").must(t, "restic check")
	second := s.commit(t, "restic")
	if second.Same || second.Generation == first.Generation {
		t.Errorf("after backup and prune: %+v", second)
	}

	// The prune has removed Monday at home and in the copy; history still has it.
	s.holds(t, "restic", first.Generation, kept)
	for generation, want := range map[string]map[string]string{first.Generation: monday, second.Generation: content(t, local)} {
		at := "/restic/" + generation + "/files"
		restic("read", at, "--no-lock", "check", "--read-data").must(t, "restic check of a generation")
		out := filepath.Join(s.dir, "restored", generation)
		restic("read", at, "--no-lock", "restore", "latest", "--target", out).must(t, "restic restore")
		if diff := cmp.Diff(want, content(t, out+"/local")); diff != "" {
			t.Errorf("restored from %s: %d files differ", generation, strings.Count(diff, "\n"))
		}
	}

	// Ransomware at home finds the mount: the copy's files become others, and one that is
	// new is not what its name says.
	var pack string
	for path := range content(t, s.files("restic", second.Generation)) {
		if strings.HasPrefix(path, "data/") {
			pack = path
		}
	}
	write(t, s.dir+"/junk", "encrypted")
	s.sftp(t, "pi", "chmod 600 /restic/"+pack+"\nput junk /restic/"+pack+"\nput junk /restic/snapshots/"+strings.Repeat("ab", 32)+"\n").must(t, "sftp")
	third := s.commit(t, "restic")
	all := s.generations(t, "restic")
	reasons := strings.Join(all[len(all)-1].Reasons, "\n")
	if !third.Suspect || !strings.Contains(reasons, "1 file, named by what is in them, have other content than before (such as data/") || !strings.Contains(reasons, "1 of 1 new files are not what their names say (snapshots/abab") {
		t.Errorf("%+v: %s", third, reasons)
	}
}

// One repository takes one push at a time, whoever makes it: a commit of a staging
// copy waits for no upload of the pusher, and says why.
func TestStockCommitDuringPush(t *testing.T) {
	s := startStock(t, "64m")
	write(t, s.dir+"/a", "one")
	s.sftp(t, "pi", "mkdir /photos\nput a /photos/a\n").must(t, "sftp")
	to := s.client(t, &line{})
	must(t, to.Wake(t.Context()))
	pushed := source{"b": noise(1, 200_000)}
	answer, err := pushed.offer(t, to, "photos")
	must(t, err)
	uploading, goOn := make(chan struct{}), make(chan struct{})
	uploaded := make(chan error, 1)
	go func() {
		_, _, entries := pushed.list(t)
		_, err := to.Upload(t.Context(), answer.Push, func(w io.Writer) error {
			e := recipe.NewEncoder(w)
			if err := e.File(0); err != nil {
				return err
			}
			if _, err := io.WriteString(e, pushed["b"][:100_000]); err != nil {
				return err
			}
			close(uploading)
			<-goOn
			if _, err := io.WriteString(e, pushed["b"][100_000:]); err != nil {
				return err
			}
			if err := e.End(entries[0].Sum); err != nil {
				return err
			}
			return e.Close()
		})
		uploaded <- err
	}()
	<-uploading
	if r := s.ssh(t, "pi", "commit photos"); r.code != hint.ExitUnreachable || !strings.Contains(r.err, "another push of this repository is under way") {
		t.Errorf("a commit during a push: code %d, %s", r.code, r.err)
	}
	close(goOn)
	must(t, <-uploaded)
	c, err := to.Commit(t.Context(), answer.Push)
	must(t, err)
	s.holds(t, "photos", c.Generation, pushed)
	// Then it is the copy's turn, which is what its client put there.
	second := s.commit(t, "photos")
	s.holds(t, "photos", second.Generation, map[string]string{"a": "one"})
	s.holds(t, "photos", c.Generation, pushed)
}
