package localcall_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/appliance/localcall"
	"farkeep/shared/hint"
)

// TestMain lets a test call as another user: this binary, started again.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "call" {
		os.Exit(hint.Report(os.Stdout, "child", localcall.Call(context.Background(), os.Args[2], "echo", "x", nil)))
	}
	os.Exit(m.Run())
}

// serve starts a part and returns its socket. It has ended when the test ends.
func serve(t *testing.T, allow []uint32, h localcall.Handler) string {
	t.Helper()
	dir := t.TempDir()
	// Go makes test folders 0700; parts' folders are 0755.
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "sock")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- localcall.Serve(ctx, path, allow, h) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	for {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return path
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("Serve: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

func echo(_ context.Context, req localcall.Request, conn *localcall.Conn) error {
	var s string
	if err := req.Decode(&s); err != nil {
		return err
	}
	switch req.Verb {
	case "echo":
		return conn.Reply(s)
	case "nothing":
		return nil
	case "refuse":
		return hint.Exit(hint.ExitRefused, hint.Because(fmt.Errorf("no %s here", s), "buy some"))
	case "long":
		return errors.New(strings.Repeat("\x01", localcall.MaxLine))
	case "twice":
		if err := conn.Reply("one"); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			return err
		}
		return errors.New("then it broke")
	case "upload":
		n, err := io.Copy(io.Discard, conn)
		if err != nil {
			return err
		}
		if err := conn.Reply(n); err != nil {
			return err
		}
		_, err = conn.Write([]byte("raw\n{}"))
		return err
	}
	return hint.Exit(hint.ExitUsage, fmt.Errorf("no verb %q", req.Verb))
}

func me() []uint32 { return []uint32{uint32(os.Getuid())} }

func TestCall(t *testing.T) {
	path := serve(t, me(), echo)
	var got string
	if err := localcall.Call(t.Context(), path, "echo", "hello", &got); err != nil || got != "hello" {
		t.Errorf("echo: %q, %v", got, err)
	}
	if err := localcall.Call(t.Context(), path, "nothing", nil, nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
	for _, tt := range []struct {
		verb string
		args any
		want string
		hint string
		code int
	}{
		{"refuse", "soup", "refuse: no soup here", "buy some", hint.ExitRefused},
		{"dance", nil, `dance: no verb "dance"`, "", hint.ExitUsage},
		{"echo", 7, "arguments: ", "", hint.ExitUsage},
		{"echo", strings.Repeat("x", localcall.MaxLine), "a line of more than", "", hint.ExitFailure},
		{"long", nil, "long: ", "", hint.ExitFailure},
	} {
		err := localcall.Call(t.Context(), path, tt.verb, tt.args, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) || hint.Of(err) != tt.hint || hint.Code(err) != tt.code {
			t.Errorf("%s: %.100v, hint %q, code %d", tt.verb, err, hint.Of(err), hint.Code(err))
		}
	}
	var answer *localcall.Error
	if err := localcall.Call(t.Context(), path, "refuse", "soup", nil); !errors.As(err, &answer) || answer.Code != hint.ExitRefused {
		t.Errorf("got %v", err)
	}
}

func TestStreams(t *testing.T) {
	path := serve(t, me(), echo)
	c, err := localcall.Open(t.Context(), path, "upload", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const size = 5 << 20
	if _, err := io.Copy(c, io.LimitReader(zeros{}, size)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var n int64
	if err := c.ReadReply(&n); err != nil || n != size {
		t.Errorf("%d bytes, %v", n, err)
	}
	if rest, err := io.ReadAll(c); err != nil || string(rest) != "raw\n{}" {
		t.Errorf("%q, %v", rest, err)
	}

	c, err = localcall.Open(t.Context(), path, "twice", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var first string
	if err := c.ReadReply(&first); err != nil || first != "one" {
		t.Errorf("%q, %v", first, err)
	}
	c.CloseWrite()
	if err := c.ReadReply(nil); err == nil || err.Error() != "then it broke" {
		t.Errorf("second reply: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// The kernel says who calls; what the caller says does not matter.
func TestOnlyAllowedUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to call as another user")
	}
	path := serve(t, []uint32{65533}, echo)
	err := localcall.Call(t.Context(), path, "echo", "x", nil)
	if hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "user 0 may not call") {
		t.Errorf("as root: %v", err)
	}
	self := filepath.Join(filepath.Dir(path), "self")
	if err := copyFile(self); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]int{65533: hint.ExitOK, 65532: hint.ExitRefused} {
		cmd := exec.Command(self, "call", path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("as %d: exit code %d, %v: %s", uid, code, err, out)
		}
	}
}

// copyFile puts this binary where any user may start it.
func copyFile(to string) error {
	in, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	return os.WriteFile(to, in, 0o755)
}

func TestCallsAreBoundedPerUser(t *testing.T) {
	entered := make(chan struct{}, localcall.MaxCalls)
	path := serve(t, me(), func(ctx context.Context, _ localcall.Request, c *localcall.Conn) error {
		entered <- struct{}{}
		_, err := io.Copy(io.Discard, c)
		return err
	})
	for range localcall.MaxCallsPerUID {
		c, err := localcall.Open(t.Context(), path, "hold", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		<-entered
	}
	err := localcall.Call(t.Context(), path, "hold", nil, nil)
	if err == nil || !strings.Contains(err.Error(), "too many calls") {
		t.Errorf("got %v", err)
	}
}

func TestContextEndsACall(t *testing.T) {
	ended := make(chan error, 1)
	path := serve(t, me(), func(ctx context.Context, _ localcall.Request, c *localcall.Conn) error {
		_, err := io.Copy(io.Discard, c)
		ended <- err
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := localcall.Call(ctx, path, "hang", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	<-ended // the handler saw the connection end
}

// Serve must come back although callers hold their connections.
func TestServeStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := localcall.Serve(t.Context(), path, nil, echo); err == nil {
		t.Error("a plain file in the way was replaced")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second finds the first one's socket
		ctx, cancel := context.WithCancel(t.Context())
		entered := make(chan struct{})
		done := make(chan error, 1)
		go func() {
			done <- localcall.Serve(ctx, path, me(), func(ctx context.Context, _ localcall.Request, c *localcall.Conn) error {
				close(entered)
				_, err := io.Copy(io.Discard, c)
				return err
			})
		}()
		var c *localcall.Conn
		for c == nil {
			c, _ = localcall.Open(t.Context(), path, "hold", nil)
		}
		<-entered
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		c.Close()
	}
}

func TestBadRequests(t *testing.T) {
	path := serve(t, me(), echo)
	for in, want := range map[string]string{
		"hello\n":                              "invalid character",
		`{"verb":"echo","uid":0}` + "\n":       "unknown field",
		`{"verb":"echo"} {}` + "\n":            "more than one value",
		strings.Repeat("x", localcall.MaxLine): "a line of more than",
		`{"verb":"echo","args":"cut off`:       "EOF",
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, in); err != nil {
			t.Fatal(err)
		}
		c.(*net.UnixConn).CloseWrite()
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil || !strings.Contains(line, want) {
			t.Errorf("%.40q: %q, %v", in, line, err)
		}
		c.Close()
	}
}
