package debian

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
)

// Keyring holds the keys that Debian's archive is signed with (package
// debian-archive-keyring).
const Keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Archive is one Debian release as seen from a private apt.
type Archive struct {
	dir    string
	config string
	log    *slog.Logger
}

// Package is one version of a package.
type Package struct {
	Name, Version, Architecture string
	SHA256                      string // lower-case hexadecimal, from the signed lists
	Depends                     string
	file                        string // the name's last part in the archive
}

// Open prepares a private apt for a release ("trixie") and an architecture
// ("arm64") below dir, which is made. It fetches the package lists if there
// are none yet.
func Open(ctx context.Context, dir string, m Mirror, release, architecture string, log *slog.Logger) (*Archive, error) {
	for _, tool := range []struct{ name, pkg string }{{"apt-get", "apt"}, {"apt-cache", "apt"}, {"dpkg-deb", "dpkg"}} {
		if err := Tool(tool.name, tool.pkg); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(Keyring); err != nil {
		return nil, hint.Because(fmt.Errorf("debian archive keys: %w", err), "install the package debian-archive-keyring")
	}
	for _, uri := range []string{m.Archive, m.Security} {
		if uri == "" && m.Archive != "" {
			continue
		}
		if err := checkURI(uri); err != nil {
			return nil, err
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("apt directory: %w", err)
	}
	if strings.ContainsAny(dir, "\"\n") {
		return nil, fmt.Errorf("apt directory %q: its name cannot be written into apt's configuration", dir)
	}
	for _, d := range []string{"lists/partial", "archives/partial", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("apt directory: %w", err)
		}
	}
	var sources strings.Builder
	add := func(uri, suite string) {
		fmt.Fprintf(&sources, "deb [arch=%s signed-by=%s] %s %s main non-free-firmware\n", architecture, Keyring, uri, suite)
	}
	add(m.Archive, release)
	add(m.Archive, release+"-updates")
	if m.Security != "" {
		add(m.Security, release+"-security")
	}
	a := &Archive{dir: dir, config: filepath.Join(dir, "apt.conf"), log: log}
	// The system's apt.conf.d is read as well: a proxy that the machine needs stays in force.
	conf := fmt.Sprintf(`APT::Architecture "%[2]s";
APT::Architectures { "%[2]s"; };
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Dir::State "%[1]s/state";
Dir::State::status "%[1]s/status";
Dir::State::lists "%[1]s/lists";
Dir::Cache "%[1]s";
Dir::Cache::archives "%[1]s/archives";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
`, dir, architecture)
	old, _ := os.ReadFile(filepath.Join(dir, "sources.list"))
	for name, text := range map[string]string{"apt.conf": conf, "sources.list": sources.String(), "status": ""} {
		if err := atomicfile.Write(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	lists, err := filepath.Glob(filepath.Join(dir, "lists", "*_Packages*"))
	if err != nil {
		return nil, fmt.Errorf("apt lists: %w", err)
	}
	if len(lists) == 0 || string(old) != sources.String() {
		return a, a.Update(ctx)
	}
	return a, nil
}

// Tool says which package to install if a program is missing.
func Tool(name, pkg string) error {
	if _, err := exec.LookPath(name); err != nil {
		return hint.Because(fmt.Errorf("the program %s is missing", name), "install the package %s", pkg)
	}
	return nil
}

// Update fetches the package lists anew.
func (a *Archive) Update(ctx context.Context) error {
	a.log.Info("fetching Debian's package lists")
	// Without Error-Mode=any apt takes an unreachable mirror for a mere warning.
	_, err := a.run(ctx, a.dir, "apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
	if err != nil {
		return hint.Because(fmt.Errorf("update Debian's package lists: %w", err), "see whether the mirror can be reached; --mirror names another")
	}
	return nil
}

// Find returns the newest version of a package.
func (a *Archive) Find(ctx context.Context, name string) (Package, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return Package{}, fmt.Errorf("find package %s: %w", name, err)
	}
	return parsePackage(string(out), name)
}

func parsePackage(text, name string) (Package, error) {
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == "" {
			break
		}
		if key, value, ok := strings.Cut(line, ": "); ok && line[0] != ' ' {
			fields[key] = strings.TrimSpace(value)
		}
	}
	p := Package{
		Name: fields["Package"], Version: fields["Version"], Architecture: fields["Architecture"],
		SHA256: fields["SHA256"], Depends: fields["Depends"], file: filepath.Base(fields["Filename"]),
	}
	if p.Name != name || p.Version == "" || len(p.SHA256) != 64 || p.file == "." {
		return Package{}, fmt.Errorf("find package %s: apt describes it incompletely", name)
	}
	return p, nil
}

// Resolve follows a meta package to the one package that it stands for: the
// dependency whose name begins with prefix.
func (a *Archive) Resolve(ctx context.Context, meta, prefix string) (Package, error) {
	m, err := a.Find(ctx, meta)
	if err != nil {
		return Package{}, err
	}
	name, err := dependency(m.Depends, prefix)
	if err != nil {
		return Package{}, fmt.Errorf("package %s: %w", meta, err)
	}
	return a.Find(ctx, name)
}

func dependency(depends, prefix string) (string, error) {
	var found []string
	for d := range strings.SplitSeq(depends, ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		if strings.HasPrefix(name, prefix) {
			found = append(found, name)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("it depends on %d packages %s*, not on one: %q", len(found), prefix, depends)
	}
	return found[0], nil
}

// Fetch downloads a package unless it is kept from before, checks its SHA-256
// against the signed lists either way, and returns the path of the .deb.
func (a *Archive) Fetch(ctx context.Context, p Package) (string, error) {
	kept := filepath.Join(a.dir, "archives", fmt.Sprintf("%s_%s.deb", p.Name, p.SHA256[:16]))
	if checkSum(kept, p.SHA256) == nil {
		return kept, nil
	}
	// apt names the file after the version with its colons escaped; an empty folder tells which one it is.
	tmp, err := os.MkdirTemp(filepath.Join(a.dir, "archives"), "fetch-")
	if err != nil {
		return "", fmt.Errorf("download %s: %w", p.Name, err)
	}
	defer os.RemoveAll(tmp)
	a.log.Info("downloading", "package", p.Name, "version", p.Version)
	if _, err := a.run(ctx, tmp, "apt-get", "-q", "download", p.Name+"="+p.Version); err != nil {
		return "", fmt.Errorf("download %s %s: %w", p.Name, p.Version, err)
	}
	got, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(got) != 1 {
		return "", fmt.Errorf("download %s: apt left %d files", p.Name, len(got))
	}
	if err := checkSum(got[0], p.SHA256); err != nil {
		return "", fmt.Errorf("download %s: %w", p.Name, err)
	}
	if err := os.Rename(got[0], kept); err != nil {
		return "", fmt.Errorf("download %s: %w", p.Name, err)
	}
	return kept, nil
}

func checkSum(file, want string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s: SHA-256 is %s, the signed lists say %s", filepath.Base(file), got, want)
	}
	return nil
}

// Unpack extracts a package's files below dir.
func (a *Archive) Unpack(ctx context.Context, deb, dir string) error {
	if _, err := a.run(ctx, a.dir, "dpkg-deb", "-x", deb, dir); err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
	}
	return nil
}

// BuildTime returns the time that a package was built from its source: dpkg-deb
// gives it to the members of the package file (SOURCE_DATE_EPOCH, the newest
// entry of the changelog).
func BuildTime(deb string) (time.Time, error) {
	f, err := os.Open(deb)
	if err != nil {
		return time.Time{}, fmt.Errorf("time of the package: %w", err)
	}
	defer f.Close()
	return memberTime(f)
}

// memberTime reads the time of the first member of an ar(5) archive.
func memberTime(r io.Reader) (time.Time, error) {
	head := make([]byte, 8+60)
	if _, err := io.ReadFull(r, head); err != nil {
		return time.Time{}, fmt.Errorf("read package header: %w", err)
	}
	if !bytes.HasPrefix(head, []byte("!<arch>\ndebian-binary")) {
		return time.Time{}, errors.New("not a Debian package")
	}
	var seconds int64
	if _, err := fmt.Sscanf(string(head[8+16:8+28]), "%d", &seconds); err != nil {
		return time.Time{}, fmt.Errorf("time of the package: %w", err)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// run starts a program of the private apt and returns its standard output; its
// messages go into the error.
func (a *Archive) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.WaitDelay = 5 * time.Second
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "LC_") || strings.HasPrefix(v, "LANG")
	}), "APT_CONFIG="+a.config, "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, lastLines(stderr.String(), 3))
	}
	return stdout.Bytes(), nil
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}
