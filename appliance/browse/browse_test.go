package browse

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// generations makes a folder of generations with n files in one of them.
func generations(t *testing.T, n int) string {
	t.Helper()
	dir := t.TempDir()
	for _, repository := range []string{"photos", "secret"} {
		must(t, os.MkdirAll(filepath.Join(dir, repository, "000001-20260101T000000Z", "files"), 0o755))
	}
	for i := range n {
		must(t, os.WriteFile(filepath.Join(dir, "photos", "000001-20260101T000000Z", "files", fmt.Sprint(i)), fmt.Append(nil, "content of ", i), 0o444))
	}
	return dir
}

// serve lets a client browse dir. ended gets what Serve returned.
func serve(t *testing.T, dir string, idle time.Duration) (_ *sftp.Client, ended <-chan error) {
	t.Helper()
	disk, err := Open(dir, func(repository string) bool { return repository == "photos" })
	must(t, err)
	client, server := net.Pipe()
	done := make(chan error, 1)
	go func() {
		err := disk.Serve(server, server, idle, func() { server.Close() })
		disk.Close()
		if n := disk.open.Load(); n != 0 {
			err = errors.Join(err, fmt.Errorf("%d files are still open", n))
		}
		done <- err
	}()
	c, err := sftp.NewClientPipe(client, client)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c, done
}

const files = "/photos/000001-20260101T000000Z/files/"

// A peer holds MaxOpen files and no more, and may open others for those that it
// closed. All are closed with the session.
func TestOpenFilesAreBounded(t *testing.T) {
	c, ended := serve(t, generations(t, 3), time.Hour)
	var open []*sftp.File
	for i := range MaxOpen {
		f, err := c.Open(files + fmt.Sprint(i%3))
		if err != nil {
			t.Fatalf("file %d of %d: %v", i+1, MaxOpen, err)
		}
		open = append(open, f)
	}
	if _, err := c.Open(files + "0"); err == nil {
		t.Errorf("a peer may open more than %d files", MaxOpen)
	}
	must(t, open[0].Close())
	f, err := c.Open(files + "1")
	must(t, err)
	got, err := io.ReadAll(f)
	must(t, err)
	if string(got) != "content of 1" {
		t.Errorf("read %q", got)
	}
	must(t, f.Close())
	// Folders and what is not there count as nothing.
	for range MaxOpen {
		if _, err := c.Open(files + "none"); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("a file that is not there: %v", err)
		}
		if _, err := c.Open(files); err == nil {
			t.Fatal("a folder was opened as a file")
		}
	}
	if _, err = c.Open(files + "1"); err != nil {
		t.Errorf("after failed attempts: %v", err)
	}
	c.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A peer that asks now and then keeps its session, one that asks for nothing
// loses it.
func TestIdlePeerIsSentAway(t *testing.T) {
	dir := generations(t, 1)
	synctest.Test(t, func(t *testing.T) {
		c, ended := serve(t, dir, Idle)
		for range 3 {
			time.Sleep(Idle - time.Second)
			if _, err := c.Stat("/"); err != nil {
				t.Fatalf("a peer that thought for %v: %v", Idle-time.Second, err)
			}
		}
		asked := time.Now()
		if err := <-ended; err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("Serve: %v", err)
		}
		if waited := time.Since(asked); waited != Idle {
			t.Errorf("sent away after %v, not %v", waited, Idle)
		}
		if _, err := c.Stat("/"); err == nil {
			t.Error("the session of an idle peer goes on")
		}
	})
}

// What the peer may not see does not exist, in lists and by name; nothing can be
// changed; links lead nowhere outside.
func TestReadOnlyAndNoFurther(t *testing.T) {
	dir := generations(t, 2)
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "photos", "out")))
	must(t, os.Symlink("../secret", filepath.Join(dir, "photos", "aside")))
	c, ended := serve(t, dir, time.Hour)
	list, err := c.ReadDir("/")
	must(t, err)
	var names []string
	for _, i := range list {
		names = append(names, i.Name())
	}
	if diff := cmp.Diff([]string{"photos"}, names); diff != "" {
		t.Error(diff)
	}
	if list, err = c.ReadDir(files); err != nil || len(list) != 2 {
		t.Errorf("the files: %d, %v", len(list), err)
	}
	for _, path := range []string{"/secret", "/secret/000001-20260101T000000Z", "/../../etc/passwd", "/none"} {
		if _, err := c.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("stat %s: %v", path, err)
		}
	}
	if f, err := c.Open("/photos/out"); err == nil {
		f.Close()
		t.Error("a link led out of the generations")
	}
	for what, do := range map[string]func() error{
		"create":  func() error { _, err := c.Create("/photos/new"); return err },
		"remove":  func() error { return c.Remove(files + "0") },
		"rename":  func() error { return c.Rename(files+"0", files+"9") },
		"posix":   func() error { return c.PosixRename(files+"0", files+"9") },
		"mkdir":   func() error { return c.Mkdir("/photos/new") },
		"rmdir":   func() error { return c.RemoveDirectory("/photos") },
		"chmod":   func() error { return c.Chmod(files+"0", 0o777) },
		"times":   func() error { return c.Chtimes(files+"0", time.Now(), time.Now()) },
		"shorten": func() error { return c.Truncate(files+"0", 0) },
		"symlink": func() error { return c.Symlink("/etc/passwd", "/photos/link") },
		"link":    func() error { return c.Link(files+"0", "/photos/link") },
		"append": func() error {
			_, err := c.OpenFile(files+"0", os.O_WRONLY|os.O_APPEND)
			return err
		},
	} {
		if do() == nil {
			t.Errorf("%s was not refused", what)
		}
	}
	content, err := os.ReadFile(filepath.Join(dir, files, "0"))
	if err != nil || string(content) != "content of 0" {
		t.Errorf("a file after all that: %q, %v", content, err)
	}
	c.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
