// Package service runs a whole appliance as a service of this machine: the real
// supervisor, the real parts, each with its own user and confined, a real ext4
// file system in an image behind a loop device, SSH on the loopback interface,
// and the pusher's program at home.
//
// It stands in for systemd, for the disk's hardware and for nothing else. The
// appliance's program is built with the tag "torture", in which the disk is not
// encrypted (there is no dm-crypt where tests run) and parts that end are started
// again at once. It needs root and a kernel with loop devices.
package service

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"farkeep/image/freeport"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Options say what to run.
type Options struct {
	Dir      string // an empty folder, in which other users may go
	Bin      string // farkeep-appliance (built with the tag torture) and farkeep-pusher
	DiskSize int64  // bytes
	Inodes   int64  // of the disk's file system; 0: as many as mke2fs thinks right
	// InMemory puts the image on a file system of its own, in memory.
	InMemory bool
	// Settings changes the appliance's settings before they are written; may be nil.
	Settings func(*settings.Appliance)
	Log      io.Writer // what the appliance says; may be nil
}

// Key names one of the identities that the appliance knows.
type Key string

// The keys: what lies at home, and what does not.
const (
	Push    Key = "home"    // pushes "*"
	Other   Key = "other"   // a second pusher, of repositories that begin with "other-"
	Restore Key = "restore" // the operator's
	Admin   Key = "admin"   // the operator's, sealed
)

// Service is a running appliance.
type Service struct {
	o       Options
	Image   string // of the disk
	Loop    string // its device
	Host    ssh.PublicKey
	port    int
	file    string // settings
	keys    map[Key]ssh.Signer
	public  map[Key]string
	hostKey string
	mounted bool // the image's own file system is mounted

	mu  sync.Mutex // guards the fields below
	cmd *exec.Cmd
	end chan error
}

// Start prepares everything and starts the appliance. The caller must Close it.
func Start(ctx context.Context, o Options) (_ *Service, err error) {
	if os.Getuid() != 0 {
		return nil, errors.New("an appliance needs root: its parts get users of their own")
	}
	s := &Service{o: o, Image: filepath.Join(o.Dir, "image", "disk"), file: filepath.Join(o.Dir, "farkeep.toml"), keys: map[Key]ssh.Signer{}, public: map[Key]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	uuid, err := s.makeDisk(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.configure(uuid); err != nil {
		return nil, err
	}
	if err := s.Run(); err != nil {
		return nil, err
	}
	return s, s.AwaitOpen(ctx)
}

func (s *Service) makeDisk(ctx context.Context) (uuid string, err error) {
	if err := os.MkdirAll(filepath.Dir(s.Image), 0o700); err != nil {
		return "", err
	}
	if s.o.InMemory {
		if err := unix.Mount("torture", filepath.Dir(s.Image), "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", s.o.DiskSize+s.o.DiskSize/8)); err != nil {
			return "", fmt.Errorf("mount a tmpfs for the disk's image: %w", err)
		}
		s.mounted = true
	}
	f, err := os.OpenFile(s.Image, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(s.o.DiskSize), f.Close()); err != nil {
		return "", err
	}
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	uuid = fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	args := []string{"-q", "-t", "ext4", "-F", "-m", "0", "-e", "remount-ro", "-U", uuid}
	if s.o.Inodes > 0 {
		args = append(args, "-N", strconv.FormatInt(s.o.Inodes, 10))
	}
	if _, err := Tool(ctx, "e2fsprogs", "mke2fs", append(args, s.Image)...); err != nil {
		return "", err
	}
	s.Loop, err = Tool(ctx, "mount", "losetup", "--find", "--show", s.Image)
	return uuid, err
}

// Tool runs a program of this machine and returns what it printed.
func Tool(ctx context.Context, pkg, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s (Debian package %s): %w\n%s", name, strings.Join(args, " "), pkg, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

func (s *Service) configure(uuid string) error {
	port, err := freeport.TCP()
	if err != nil {
		return err
	}
	s.port = int(port)
	host, hostPublic, err := identity.New("attic")
	if err != nil {
		return err
	}
	client, _, err := identity.New("attic to key servers")
	if err != nil {
		return err
	}
	_, keyServer, err := identity.New("a key server that nobody asks")
	if err != nil {
		return err
	}
	s.hostKey = strings.TrimSpace(hostPublic)
	if s.Host, err = identity.ParsePublic(s.hostKey); err != nil {
		return err
	}
	a := &settings.Appliance{
		Name: "attic", Site: "home",
		Identity:   settings.Identity{HostKey: host, ClientKey: client},
		VPN:        settings.VPN{Interface: "lo"},
		KeyServers: []settings.KeyServer{{Name: "cellar", Address: "127.0.0.1:9", HostKey: strings.TrimSpace(keyServer)}},
		Disk:       settings.Disk{LUKS: uuid, Relay: settings.Relay{Driver: "none", Active: "high"}, Window: settings.Window{Length: settings.Duration(24 * time.Hour)}, IdleClose: settings.Duration(time.Hour)},
		Receiver:   settings.Receiver{Port: s.port},
		DeadMan:    settings.DefaultDeadMan(),
		Mail:       settings.Mail{Server: "127.0.0.1:9", TLS: "starttls", User: "attic", Password: secret.Text("nobody's"), From: "attic@example.org", To: []string{"operator@example.org"}},
	}
	for _, k := range []struct {
		key          Key
		role         string
		repositories []string
	}{{Push, "push", []string{"*"}}, {Other, "push", []string{"other-*"}}, {Restore, "restore", nil}, {Admin, "admin", nil}} {
		private, public, err := identity.New(string(k.key))
		if err != nil {
			return err
		}
		if s.keys[k.key], err = identity.Signer(private); err != nil {
			return err
		}
		s.public[k.key] = strings.TrimSpace(public)
		if err := os.WriteFile(s.KeyFile(k.key), []byte(private.Reveal()), 0o600); err != nil {
			return err
		}
		a.Receiver.Keys = append(a.Receiver.Keys, settings.ReceiverKey{Name: string(k.key), Role: k.role, PublicKey: s.public[k.key], Repositories: k.repositories})
	}
	if s.o.Settings != nil {
		s.o.Settings(a)
	}
	if err := os.WriteFile(s.knownHosts(), []byte("attic "+s.hostKey+"\n"), 0o600); err != nil {
		return err
	}
	text, err := a.Render()
	if err != nil {
		return err
	}
	return os.WriteFile(s.file, text.Reveal(), 0o600)
}

// KeyFile is the file of a private key.
func (s *Service) KeyFile(k Key) string { return filepath.Join(s.o.Dir, string(k)+"_key") }

func (s *Service) knownHosts() string { return filepath.Join(s.o.Dir, "known_hosts") }

// OpenSSH are the options with which OpenSSH's programs reach the appliance,
// which they know as "attic", with one of the keys.
func (s *Service) OpenSSH(k Key) []string {
	flags := []string{"-F", "/dev/null", "-i", s.KeyFile(k)}
	for _, option := range []string{
		"HostName=127.0.0.1", fmt.Sprintf("Port=%d", s.port), "HostKeyAlias=attic", "UserKnownHostsFile=" + s.knownHosts(), "StrictHostKeyChecking=yes",
		"IdentitiesOnly=yes", "BatchMode=yes", "ConnectTimeout=10",
	} {
		flags = append(flags, "-o", option)
	}
	return flags
}

// Address is where the receiver listens.
func (s *Service) Address() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// Disk is where the disk is mounted, as seen from this machine.
func (s *Service) Disk() string { return filepath.Join(s.o.Dir, "media", "disk") }

// Generations is the folder of all generations.
func (s *Service) Generations() string { return filepath.Join(s.Disk(), "generations") }

// RunDir is the folder of the parts' status files and sockets.
func (s *Service) RunDir() string { return filepath.Join(s.o.Dir, "run") }

// StateDir is the folder of what the parts remember.
func (s *Service) StateDir() string { return filepath.Join(s.o.Dir, "state") }

// Run starts the supervisor, as systemd would.
func (s *Service) Run() error {
	cmd := exec.Command(filepath.Join(s.o.Bin, "farkeep-appliance"), "run", "--settings", s.file,
		"--run-dir", s.RunDir(), "--state-dir", s.StateDir(), "--media-dir", filepath.Join(s.o.Dir, "media"))
	cmd.Env = []string{}
	cmd.Stderr = s.o.Log
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	end := make(chan error, 1)
	go func() { end <- cmd.Wait() }()
	s.mu.Lock()
	s.cmd, s.end = cmd, end
	s.mu.Unlock()
	return nil
}

// Parts are the processes of the appliance by their parts' names; the supervisor
// is "supervisor".
func (s *Service) Parts() map[string]int {
	s.mu.Lock()
	cmd := s.cmd
	s.mu.Unlock()
	if cmd == nil {
		return nil
	}
	all := map[string]int{Supervisor: cmd.Process.Pid}
	// Children of every thread: the kernel knows a child's parent thread.
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cmd.Process.Pid))
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		for _, field := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				continue
			}
			words, err := os.ReadFile(filepath.Join("/proc", field, "cmdline"))
			if err != nil {
				continue
			}
			if args := strings.Split(string(words), "\x00"); len(args) > 2 && args[1] == "part" {
				all[args[2]] = pid
			}
		}
	}
	return all
}

// Supervisor is the name of the first process.
const Supervisor = "supervisor"

// Kill kills a process of the appliance with SIGKILL and says whether it was
// there. Killed supervisors are started again together with everything, because
// systemd ends a service's other processes before it starts it again.
func (s *Service) Kill(name string) (bool, error) {
	parts := s.Parts()
	pid, ok := parts[name]
	if !ok {
		return false, nil
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return false, err
	}
	if name != Supervisor {
		return true, gone(pid)
	}
	<-s.end
	for _, pid := range parts {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return true, err
		}
	}
	return true, s.Run()
}

// gone waits until a killed process runs no more: it is no child any more, or one
// that its parent has not heard of yet.
func gone(pid int) error {
	for limit := time.Now().Add(10 * time.Second); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		if words, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || len(words) == 0 {
			return nil
		}
	}
	return fmt.Errorf("process %d does not end of SIGKILL: it hangs in the kernel", pid)
}

// Expected are the parts that a healthy appliance has.
var Expected = []string{Supervisor, "network", "disk", "keeper", "receiver", "deadman", "mail"}

// AwaitOpen waits until every part runs and a client is answered from the disk.
func (s *Service) AwaitOpen(ctx context.Context) error {
	for {
		err := s.open(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the appliance did not come back: %w (last: %w)", context.Cause(ctx), err)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

func (s *Service) open(ctx context.Context) error {
	parts := s.Parts()
	for _, name := range Expected {
		if parts[name] == 0 {
			return fmt.Errorf("part %s does not run", name)
		}
	}
	attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := s.Verb(attempt, Restore, "generations", nil)
	return err
}

// Dial opens an SSH connection with one of the keys.
func (s *Service) Dial(ctx context.Context, k Key) (*sshverb.Client, error) {
	return sshverb.Dial(ctx, sshverb.Peer{Address: s.Address(), User: "farkeep", Identity: s.keys[k], HostKey: s.Host, Connect: 10 * time.Second})
}

// Signer is one of the keys.
func (s *Service) Signer(k Key) ssh.Signer { return s.keys[k] }

// Verb runs one verb.
func (s *Service) Verb(ctx context.Context, k Key, verb string, in io.Reader) ([]byte, error) {
	c, err := s.Dial(ctx, k)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Run(ctx, verb, in, 4<<20)
}

// Site writes a site.toml for the pusher, with these repositories (name, path),
// below dir, and returns the flags that name it, its key and its state.
func (s *Service) Site(dir string, repositories ...[2]string) ([]string, error) {
	_, server, err := identity.New("key server")
	if err != nil {
		return nil, err
	}
	_, client, err := identity.New("client")
	if err != nil {
		return nil, err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "name = \"home\"\n[home]\nname = \"home\"\npush_key = %q\n[[key_server]]\nname = \"cellar\"\naddress = \"127.0.0.1:9\"\nhost_key = %q\n"+
		"[[appliance]]\nname = \"attic\"\nboard = \"service\"\naddress = %q\nhost_key = %q\nclient_key = %q\n",
		s.public[Push], strings.TrimSpace(server), s.Address(), s.hostKey, strings.TrimSpace(client))
	for _, r := range repositories {
		fmt.Fprintf(&text, "[[repository]]\nname = %q\npath = %q\n", r[0], r[1])
	}
	file := filepath.Join(dir, "site.toml")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(file, []byte(text.String()), 0o600)); err != nil {
		return nil, err
	}
	return []string{"--site", file, "--identity", s.KeyFile(Push), "--state", filepath.Join(dir, "state")}, nil
}

// Stop ends the appliance in order; its disk is closed then.
func (s *Service) Stop() error {
	s.mu.Lock()
	cmd, end := s.cmd, s.end
	s.cmd, s.end = nil, nil
	s.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-end:
		return err
	case <-time.After(2 * time.Minute):
		cmd.Process.Kill()
		<-end
		return errors.New("the appliance did not stop within two minutes")
	}
}

// Close ends everything and lets go of the disk. Options.Dir is the caller's.
func (s *Service) Close() error {
	err := s.Stop()
	if unmount := unix.Unmount(s.Disk(), unix.MNT_DETACH); unmount == nil {
		err = errors.Join(err, errors.New("the appliance stopped and left its disk mounted"))
	}
	if s.Loop != "" {
		_, detach := Tool(context.Background(), "mount", "losetup", "--detach", s.Loop)
		err = errors.Join(err, detach)
		s.Loop = ""
	}
	if s.mounted {
		err = errors.Join(err, unix.Unmount(filepath.Dir(s.Image), unix.MNT_DETACH))
		s.mounted = false
	}
	return err
}

// CheckFileSystem runs e2fsck on the disk of a stopped appliance: it must find
// nothing, nor change anything. It waits until the kernel has let go of the disk: a
// process that began a mount namespace meanwhile holds it a moment longer.
func (s *Service) CheckFileSystem(ctx context.Context) error {
	for limit := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		f, err := os.OpenFile(s.Loop, os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			f.Close()
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(limit) {
			return fmt.Errorf("look at the disk after its end: %w", err)
		}
	}
	_, err := Tool(ctx, "e2fsprogs", "e2fsck", "-f", "-n", s.Loop)
	return err
}
