package redteam

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/image/torture/service"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// sftp opens a session with one of the keys.
func (w *world) sftp(k service.Key) (*sftp.Client, error) {
	c, err := w.dial(func(c *ssh.ClientConfig) { c.Auth = []ssh.AuthMethod{ssh.PublicKeys(w.svc.Signer(k))} })
	if err != nil {
		return nil, err
	}
	s, err := sftp.NewClient(c)
	if err == nil {
		w.Cleanup(func() { s.Close() })
	}
	return s, err
}

// staged is an attack over the push key's SFTP.
func staged(do func(w *world, s *sftp.Client) error) func(*world) error {
	return func(w *world) error {
		s, err := w.sftp(service.Push)
		if err != nil {
			return err
		}
		defer s.Close()
		return do(w, s)
	}
}

// noSetUID looks at every file of a repository on the disk.
func (w *world) noSetUID(repository string) error {
	found := false
	err := filepath.Walk(filepath.Join(w.svc.Generations(), repository), func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		found = found || info.Mode().IsRegular()
		if info.Mode()&(os.ModeSetuid|os.ModeSetgid) != 0 || info.Mode().IsRegular() && info.Mode().Perm()&0o222 != 0 && filepath.Base(filepath.Dir(path)) == "files" {
			return fmt.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
	if err == nil && !found {
		err = errors.New("there is no file to look at")
	}
	return err
}

// packet is one raw SFTP request.
func packet(kind byte, id uint32, fields ...any) []byte {
	body := binary.BigEndian.AppendUint32([]byte{kind}, id)
	for _, f := range fields {
		switch f := f.(type) {
		case string:
			body = binary.BigEndian.AppendUint32(body, uint32(len(f)))
			body = append(body, f...)
		case uint32:
			body = binary.BigEndian.AppendUint32(body, f)
		case uint64:
			body = binary.BigEndian.AppendUint64(body, f)
		}
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

// rawSFTP sends bytes to the subsystem and waits for its end, or for one answer.
func (w *world) rawSFTP(k service.Key, send []byte) ([]byte, error) {
	c, err := w.dial(func(c *ssh.ClientConfig) { c.Auth = []ssh.AuthMethod{ssh.PublicKeys(w.svc.Signer(k))} })
	if err != nil {
		return nil, err
	}
	defer c.Close()
	s, err := c.NewSession()
	if err != nil {
		return nil, err
	}
	defer s.Close()
	in, err := s.StdinPipe()
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	s.Stdout = &out
	if err := s.RequestSubsystem("sftp"); err != nil {
		return nil, err
	}
	in.Write(append([]byte{0, 0, 0, 5, 1, 0, 0, 0, 3}, send...))
	in.Close()
	done := make(chan struct{})
	go func() { s.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		return nil, errors.New("the session goes on after its input has ended")
	}
	return out.Bytes(), nil
}

// fresh is a repository that has a generation, and its staging copy a link to it.
func (w *world) fresh(s *sftp.Client, repository string) error {
	if _, err := os.Stat(filepath.Join(w.svc.Generations(), repository)); err != nil {
		w.push(repository, tree{"kept": "committed bytes", "dir/kept": "as well"})
	}
	_, err := s.ReadDir("/" + repository)
	return err
}

func sftpAttacks() []attack {
	const kind = "SFTP"
	const name = "scratch-sftp"
	all := []attack{
		{kind, "climb out: /../../generations, /photos/../../.farkeep", "there is nothing above the staging copies", staged(func(w *world, s *sftp.Client) error {
			for _, path := range []string{"/../../generations", "../../../../etc/passwd", "/photos/../../.farkeep", "/photos/../../generations/photos", "/etc/passwd", "/proc/self/environ"} {
				if f, err := s.Open(path); err == nil {
					f.Close()
					return fmt.Errorf("%s was opened", path)
				}
				if err := s.Remove(path); err == nil {
					return fmt.Errorf("%s was removed", path)
				}
			}
			return nil
		})},
		{kind, "list and enter other keys' repositories", "they do not exist for it", staged(func(w *world, s *sftp.Client) error {
			entries, err := s.ReadDir("/")
			if err != nil {
				return err
			}
			for _, e := range entries {
				if strings.HasPrefix(e.Name(), "other-") {
					return fmt.Errorf("the root lists %s", e.Name())
				}
			}
			if _, err := s.ReadDir("/" + foreign); err == nil {
				return errors.New("another key's repository can be listed")
			}
			f, err := s.OpenFile("/"+foreign+"/song", os.O_WRONLY|os.O_CREATE)
			if err == nil {
				f.Close()
				return errors.New("another key's repository can be written to")
			}
			return nil
		})},
		{kind, "write into a file that a generation shares", "the staging copy gets a file of its own", staged(func(w *world, s *sftp.Client) error {
			if err := w.fresh(s, name); err != nil {
				return err
			}
			f, err := s.OpenFile("/"+name+"/kept", os.O_WRONLY)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte("OWNED"), 0)
			return errors.Join(err, f.Close())
		})},
		{kind, "truncate a shared file, by open and by setstat", "the same", staged(func(w *world, s *sftp.Client) error {
			if err := w.fresh(s, name); err != nil {
				return err
			}
			f, err := s.OpenFile("/"+name+"/dir/kept", os.O_WRONLY|os.O_TRUNC)
			if err == nil {
				f.Close()
			}
			return s.Truncate("/"+name+"/kept", 1)
		})},
		{kind, "chmod, chown and utimes on a shared file", "the same, or refused", staged(func(w *world, s *sftp.Client) error {
			if err := w.fresh(s, name); err != nil {
				return err
			}
			s.Chmod("/"+name+"/kept", 0o6777)
			s.Chown("/"+name+"/kept", 0, 0)
			s.Chtimes("/"+name+"/kept", time.Unix(1, 0), time.Unix(1, 0))
			return nil
		})},
		{kind, "setstat on an open handle of a shared file", "the same", staged(func(w *world, s *sftp.Client) error {
			w.push("scratch-handle", tree{"kept": "committed bytes"})
			f, err := s.OpenFile("/scratch-handle/kept", os.O_RDWR)
			if err != nil {
				return err
			}
			defer f.Close()
			f.Truncate(3)
			f.Chmod(0o777)
			f.Chown(0, 0)
			return nil
		})},
		{kind, "make symbolic links", "refused", staged(func(w *world, s *sftp.Client) error {
			for _, to := range []string{"/etc/passwd", "../../../generations/photos", "kept"} {
				if err := s.Symlink(to, "/"+name+"/link"); err == nil {
					return fmt.Errorf("a link to %s was made", to)
				}
			}
			return nil
		})},
		{kind, "make hard links to what is committed, and write through them", "refused, or a copy's own file", staged(func(w *world, s *sftp.Client) error {
			w.push("scratch-link", tree{"kept": "committed bytes"})
			for _, from := range []string{"/scratch-link/kept", "/../../generations/photos/" + w.names[0] + "/files/a"} {
				if err := s.Link(from, "/scratch-link/evil"); err != nil {
					continue
				}
				f, err := s.OpenFile("/scratch-link/evil", os.O_WRONLY|os.O_TRUNC)
				if err == nil {
					f.Write([]byte("OWNED"))
					f.Close()
				}
			}
			return nil
		})},
		{kind, "rename across repositories and over the top", "refused", staged(func(w *world, s *sftp.Client) error {
			for _, r := range [][2]string{{"/photos", "/docs"}, {"/photos", "/other-music"}, {"/photos/a", "/docs/../../x"}, {"/", "/x"}, {"/photos/a", "/../generations/photos/x"}} {
				if err := s.Rename(r[0], r[1]); err == nil {
					return fmt.Errorf("%s was renamed to %s", r[0], r[1])
				}
				if err := s.PosixRename(r[0], r[1]); err == nil && r[0] != "/photos/a" {
					return fmt.Errorf("%s was renamed over %s", r[0], r[1])
				}
			}
			return nil
		})},
		{kind, "empty the staging copy and commit it", "kept beside the old ones, and suspect", staged(func(w *world, s *sftp.Client) error {
			const name = "scratch-wipe"
			content := tree{}
			for i := range 60 {
				content[fmt.Sprintf("file-%02d", i)] = noise(byte(i), 900)
			}
			w.push(name, content)
			for path := range content {
				if path != "file-00" {
					if err := s.Remove("/" + name + "/" + path); err != nil {
						return err
					}
				}
			}
			s.Close()
			out, err := w.verb(service.Push, "commit "+name, "")
			if err != nil || !strings.Contains(out, `"suspect":true`) {
				return fmt.Errorf("%s, %w", out, err)
			}
			return nil
		})},
		{kind, "end the connection in the middle of an upload", "nothing is committed by that", staged(func(w *world, s *sftp.Client) error {
			s.Mkdir("/scratch-cut") // it may be there already
			f, err := s.Create("/scratch-cut/half")
			if err != nil {
				return err
			}
			f.Write([]byte(noise(3, 100_000)))
			s.Close()
			if _, err := os.Stat(filepath.Join(w.svc.Generations(), "scratch-cut")); err == nil {
				all, _ := filepath.Glob(filepath.Join(w.svc.Generations(), "scratch-cut", "0*"))
				if len(all) > 0 {
					return fmt.Errorf("there is %q", all)
				}
			}
			return nil
		})},
		{kind, "names with newlines, of 300 bytes, a thousand folders deep", "refused where a commit would refuse them", staged(func(w *world, s *sftp.Client) error {
			for _, bad := range []string{"a\nb", strings.Repeat("n", 300), "a\x00b", strings.Repeat("d/", 1000) + "x"} {
				if f, err := s.Create("/" + name + "/" + bad); err == nil {
					f.Close()
					return fmt.Errorf("%.20q was made", bad)
				}
			}
			return nil
		})},
		{kind, "a file of 2^62 bytes by one write at its end", "refused: quota", staged(func(w *world, s *sftp.Client) error {
			f, err := s.Create("/" + name + "/sparse")
			if err != nil {
				return err
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("x"), 1<<62); err == nil {
				return errors.New("it was written")
			}
			if err := s.Truncate("/"+name+"/sparse", 1<<62); err == nil {
				return errors.New("it was grown")
			}
			return nil
		})},
		{kind, "hold a thousand files open", "bounded", staged(func(w *world, s *sftp.Client) error {
			if err := w.fresh(s, name); err != nil {
				return err
			}
			opened := 0
			for range 1000 {
				if _, err := s.Open("/" + name + "/kept"); err != nil {
					break
				}
				opened++
			}
			if opened == 1000 {
				return errors.New("all of them were opened")
			}
			return nil
		})},
		{kind, "packets of 4 GiB, of nothing, of an unknown kind", "the session ends", func(w *world) error {
			for _, send := range [][]byte{{0xff, 0xff, 0xff, 0xff, 3}, {0, 0, 0, 0}, packet(99, 1, "x"), {0, 0, 0, 1, 3}, packet(3, 1, uint32(1<<31)), []byte(noise(8, 5000))} {
				if _, err := w.rawSFTP(service.Push, send); err != nil {
					return fmt.Errorf("%.10x: %w", send, err)
				}
			}
			return nil
		}},
		{kind, "handles that were never given out", "refused", func(w *world) error {
			for _, handle := range []string{"", "0", "1", "../x", strings.Repeat("h", 1000)} {
				send := bytes.Join([][]byte{packet(5, 1, handle, uint64(0), uint32(100)), packet(6, 2, handle, uint64(0), "x"), packet(10, 3, handle, uint32(1), uint64(0)), packet(4, 4, handle)}, nil)
				if _, err := w.rawSFTP(service.Push, send); err != nil {
					return err
				}
			}
			return nil
		}},
		{kind, "extensions: statvfs, fsync, copy-data, lsetstat", "refused, or harmless", func(w *world) error {
			for _, name := range []string{"statvfs@openssh.com", "fsync@openssh.com", "copy-data", "lsetstat@openssh.com", "hardlink@openssh.com", "posix-rename@openssh.com", "expand-path@openssh.com", "limits@openssh.com", "users-groups-by-id@openssh.com"} {
				if _, err := w.rawSFTP(service.Push, packet(200, 1, name, "/photos/a", "/docs/letter")); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
			return nil
		}},
		{kind, "commit a repository while its upload goes on", "refused, or what was closed: never half a file", staged(func(w *world, s *sftp.Client) error {
			w.push("scratch-busy", tree{"kept": "committed bytes"})
			f, err := s.OpenFile("/scratch-busy/kept", os.O_WRONLY)
			if err != nil {
				return err
			}
			f.Write([]byte("half"))
			w.verb(service.Push, "commit scratch-busy", "")
			f.Close()
			return w.verified("scratch-busy")
		})},
	}
	return all
}

// reading is an attack over the restore key's SFTP, each of whose attempts must
// fail.
func reading(attempts func(s *sftp.Client, path string) map[string]error) func(*world) error {
	return func(w *world) error {
		s, err := w.sftp(service.Restore)
		if err != nil {
			return err
		}
		defer s.Close()
		for what, err := range attempts(s, "/"+own+"/"+w.names[1]) {
			if err == nil {
				return fmt.Errorf("%s was done", what)
			}
		}
		return nil
	}
}

func restoreAttacks() []attack {
	const kind = "restore key"
	return []attack{
		{kind, "remove, rename, make and empty files of a generation", "refused: it reads", reading(func(s *sftp.Client, g string) map[string]error {
			_, create := s.Create(g + "/files/new")
			_, truncate := s.OpenFile(g+"/files/a", os.O_WRONLY|os.O_TRUNC)
			_, both := s.OpenFile(g+"/files/a", os.O_RDWR)
			_, appending := s.OpenFile(g+"/files/a", os.O_WRONLY|os.O_APPEND)
			return map[string]error{"remove": s.Remove(g + "/files/a"), "rename": s.Rename(g, g+"x"), "posix rename": s.PosixRename(g+"/files/a", g+"/files/b"), "create": create, "truncate": truncate, "read and write": both, "append": appending, "rmdir": s.RemoveDirectory(g), "mkdir": s.Mkdir(g + "/new")}
		})},
		{kind, "change modes, owners, times and sizes", "refused: it reads", reading(func(s *sftp.Client, g string) map[string]error {
			return map[string]error{"chmod": s.Chmod(g+"/files/a", 0o777), "chown": s.Chown(g+"/files/a", 0, 0), "times": s.Chtimes(g+"/files/a", time.Now(), time.Now()), "size": s.Truncate(g+"/files/a", 0), "link": s.Link(g+"/files/a", g+"/files/z"), "symlink": s.Symlink("/etc/passwd", g+"/files/z")}
		})},
		{kind, "read /etc/shadow, the keeper's records, other folders of the disk", "they do not exist for it", reading(func(s *sftp.Client, g string) map[string]error {
			all := map[string]error{}
			for _, path := range []string{"/etc/shadow", "/../.farkeep", "/../../../etc/passwd", g + "/../../../.farkeep/clock.toml", "/../incoming", "/../staging", "/proc/self/mem"} {
				f, err := s.Open(path)
				if err == nil {
					var b [1]byte
					_, err = io.ReadFull(f, b[:])
					f.Close()
				}
				all[path] = err
			}
			return all
		})},
		{kind, "push, commit, abort, heartbeat with it", "refused: no such verb for it", func(w *world) error {
			for _, verb := range []string{"offer photos", "upload photos/x", "commit photos", "abort photos", "heartbeat home", "sleep", "logs", "accept photos " + w.names[0], "reject photos " + w.names[0], "retire photos", "floor 1 1s"} {
				if err := no(service.Restore, verb, "no verb of that name")(w); err != nil {
					return fmt.Errorf("%s: %w", verb, err)
				}
			}
			return nil
		}},
		{kind, "a symbolic link on the disk, planted by whoever had it in hand", "never followed", func(w *world) error {
			link := filepath.Join(w.svc.Disk(), "generations", "planted")
			if err := os.Symlink("/etc", link); err != nil {
				return err
			}
			defer os.Remove(link)
			s, err := w.sftp(service.Restore)
			if err != nil {
				return err
			}
			defer s.Close()
			if f, err := s.Open("/planted/passwd"); err == nil {
				f.Close()
				return errors.New("it was followed")
			}
			return nil
		}},
		{kind, "read everything at once in sixteen sessions", "bounded by key: pushes go on", func(w *world) error {
			for range 16 {
				s, err := w.sftp(service.Restore)
				if err != nil {
					break
				}
				defer s.Close()
				go s.ReadDir("/")
			}
			w.push("scratch-busy2", tree{"a": fmt.Sprint(time.Now().UnixNano())})
			return nil
		}},
	}
}
