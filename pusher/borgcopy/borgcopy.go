// Package borgcopy runs the user's own borg against a generation that is mounted
// read-only: a copy of a repository, at another place and older than the one that
// the user's Borg remembers.
//
// Borg refuses such a copy, or would write down what it saw of it. So it gets a
// base, a cache and a security folder of its own, which are thrown away; only the
// user's keys folder stays, so that keyfile repositories work. Its lock is left
// out, which the read-only mount could not hold.
//
// [Check] lets through only subcommands that read. Borg 1.x encrypts with
// AES-CTR: whoever writes to a copy from an older state without care uses counter
// values a second time, and then no key is needed any more to read what was
// written under both (docs/recovery.md, "A generation as the new repository").
package borgcopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"farkeep/shared/hint"
)

// reads are the subcommands that only read and that take --bypass-lock (Borg
// 1.2, archiver.py, bypass_allowed), each with what else it is given.
var reads = map[string][]string{
	"check": {}, "diff": {}, "export-tar": {}, "extract": {}, "info": {}, "list": {},
	// In the foreground: the generation goes away with this program.
	"mount": {"--foreground"},
}

// Reads lists the subcommands that Check lets through.
func Reads() []string {
	var all []string
	for name := range reads {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// Check refuses what would write to the repository. Its errors say why.
func Check(args []string) error {
	if len(args) == 0 {
		return refuse(errors.New("no borg subcommand was given"), "for instance: -- list")
	}
	name := args[0]
	if strings.HasPrefix(name, "-") {
		return refuse(fmt.Errorf("%q stands before borg's subcommand", name), "put borg's options after its subcommand, which is looked at here")
	}
	if _, ok := reads[name]; !ok {
		err := fmt.Errorf("borg %s is not run on a generation: only %s are, which read and need no lock", name, strings.Join(Reads(), ", "))
		return refuse(err, "%s", nonces)
	}
	if name == "check" {
		for _, a := range args[1:] {
			// argparse takes every unambiguous beginning of an option.
			option, _, _ := strings.Cut(a, "=")
			if len(option) > len("--r") && strings.HasPrefix("--repair", option) {
				return refuse(errors.New("borg check --repair writes to the repository"), "%s", nonces)
			}
		}
	}
	return nil
}

const nonces = `a copy that is written to goes on from an older state and uses encryption counters a second time, which breaks the encryption. ` +
	`Restore it, and follow "A generation as the new repository" in docs/recovery.md`

func refuse(err error, format string, args ...any) error {
	return hint.Exit(hint.ExitUsage, hint.Because(err, format, args...))
}

// ExitError is borg's own exit code. Borg has said what is wrong.
type ExitError struct{ Code int }

func (e *ExitError) Error() string { return fmt.Sprintf("borg ended with exit code %d", e.Code) }

// Run is one run of borg.
type Run struct {
	Repository     string   // where the generation is mounted
	Private        string   // an empty folder for what Borg writes
	Environ        []string // the user's environment
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Unmount unmounts a folder at once, whoever uses it.
	Unmount func(folder string) error
}

// Borg finds the user's borg.
func Borg() (string, error) {
	path, err := exec.LookPath("borg")
	if err != nil {
		return "", hint.Because(err, `install it: apt install borgbackup. Or bring the files to a machine that has it: farkeep-pusher restore`)
	}
	return path, nil
}

// grace is how long borg may take to end by itself when it was interrupted: the
// terminal has told it too.
const grace = 2 * time.Second

// Start runs borg and waits for it. Check must have let args through.
func (r Run) Start(ctx context.Context, args []string) error {
	if err := Check(args); err != nil {
		return err
	}
	borg, err := Borg()
	if err != nil {
		return err
	}
	environ, err := r.environ()
	if err != nil {
		return err
	}
	line := slices.Concat(args[:1], []string{"--bypass-lock"}, reads[args[0]], args[1:])
	cmd := exec.CommandContext(ctx, borg, line...)
	cmd.Env = environ
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r.Stdin, r.Stdout, r.Stderr
	cmd.Cancel = func() error {
		// Borg 1.2 with pyfuse3 does not end at SIGINT, and does not unmount at
		// SIGTERM; what it has mounted ends it in order by going away.
		var err error
		for _, folder := range mounts(args) {
			err = errors.Join(err, r.Unmount(folder))
		}
		time.AfterFunc(grace, func() { cmd.Process.Signal(syscall.SIGTERM) })
		return err
	}
	cmd.WaitDelay = 10 * grace
	err = cmd.Run()
	if err != nil && ctx.Err() != nil {
		return &ExitError{hint.ExitCancelled}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return &ExitError{exit.ExitCode()}
	}
	if err != nil {
		return fmt.Errorf("run borg: %w", err)
	}
	return nil
}

// mounts returns those of a run's arguments on which borg has mounted archives.
func mounts(args []string) (folders []string) {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "borgfs" {
			continue
		}
		// proc(5): a space and its like are written as octal numbers.
		where := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(f[1])
		for _, a := range args {
			if abs, err := filepath.Abs(a); err == nil && abs == where {
				folders = append(folders, a)
			}
		}
	}
	return folders
}

// own are Borg's variables that say where things are and what is asked; the
// user's are about the repository at home.
var own = []string{
	"BORG_REPO", "BORG_BASE_DIR", "BORG_CACHE_DIR", "BORG_CONFIG_DIR", "BORG_SECURITY_DIR", "BORG_KEYS_DIR",
	"BORG_RELOCATED_REPO_ACCESS_IS_OK", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK",
}

func (r Run) environ() ([]string, error) {
	user := map[string]string{}
	var all []string
	for _, v := range r.Environ {
		name, value, _ := strings.Cut(v, "=")
		user[name] = value
		if !slices.Contains(own, name) {
			all = append(all, v)
		}
	}
	keys, err := keysFolder(user)
	if err != nil {
		return nil, err
	}
	return append(all,
		"BORG_REPO="+r.Repository,
		"BORG_BASE_DIR="+r.Private,
		"BORG_CACHE_DIR="+filepath.Join(r.Private, "cache"),
		"BORG_CONFIG_DIR="+filepath.Join(r.Private, "config"),
		"BORG_SECURITY_DIR="+filepath.Join(r.Private, "security"),
		"BORG_KEYS_DIR="+keys,
		"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes",
		"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
	), nil
}

// keysFolder is where the user's Borg looks for key files (Borg 1.2, helpers/fs.py,
// get_keys_dir).
func keysFolder(env map[string]string) (string, error) {
	if dir := env["BORG_KEYS_DIR"]; dir != "" {
		return dir, nil
	}
	if dir := env["BORG_CONFIG_DIR"]; dir != "" {
		return filepath.Join(dir, "keys"), nil
	}
	if dir := env["BORG_BASE_DIR"]; dir != "" {
		return filepath.Join(dir, ".config", "borg", "keys"), nil
	}
	if dir := env["XDG_CONFIG_HOME"]; dir != "" {
		return filepath.Join(dir, "borg", "keys"), nil
	}
	home := env["HOME"]
	if home == "" {
		var err error
		if home, err = os.UserHomeDir(); err != nil {
			return "", fmt.Errorf("find borg's keys folder: %w", err)
		}
	}
	return filepath.Join(home, ".config", "borg", "keys"), nil
}
