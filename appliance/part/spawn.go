package part

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// selfExe is how a process starts itself again, whatever was put in place of
// its file meanwhile.
const selfExe = "/proc/self/exe"

// Spawn runs a short-lived part as a child of this part, waits for it, and
// decodes its result into v. The child logs where this process logs. When ctx
// ends it is killed. An error that the child could tell is in its log; here it
// is only said how it ended.
func Spawn(ctx context.Context, e *Env, name string, brief, v any) error {
	h := e.Header
	h.Name = name
	cmd := exec.CommandContext(ctx, selfExe, "part", name)
	cmd.Env = []string{}
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = 5 * time.Second
	// The child must not outlive this part: it may hold a key. The kernel ties
	// that to the thread that forks, so this goroutine keeps its thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return spawn(cmd, h, brief, v)
}

func spawn(cmd *exec.Cmd, h Header, brief, v any) error {
	briefR, briefW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start part %s: %w", h.Name, err)
	}
	defer briefW.Close()
	resultR, resultW, err := os.Pipe()
	if err != nil {
		briefR.Close()
		return fmt.Errorf("start part %s: %w", h.Name, err)
	}
	defer resultR.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		briefR.Close()
		resultW.Close()
		return fmt.Errorf("start part %s: %w", h.Name, err)
	}
	cmd.ExtraFiles = []*os.File{briefR, null, resultW}
	err = cmd.Start()
	briefR.Close()
	null.Close()
	resultW.Close()
	if err != nil {
		return fmt.Errorf("start part %s: %w", h.Name, err)
	}
	sendErr := Send(briefW, h, brief)
	briefW.Close()
	line, readErr := io.ReadAll(io.LimitReader(resultR, MaxResult+1))
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("part %s: %w", h.Name, err)
	}
	if err := errors.Join(sendErr, readErr); err != nil {
		return err
	}
	if len(line) > MaxResult {
		return fmt.Errorf("part %s: its result is larger than %d bytes", h.Name, MaxResult)
	}
	if err := json.Unmarshal(bytes.TrimSpace(line), v); err != nil {
		return fmt.Errorf("part %s: its result: %w", h.Name, err)
	}
	return nil
}

// inherited returns descriptor fd if it is a pipe that somebody gave to this
// process, and nil otherwise. The kind matters: without an inherited
// descriptor there the Go runtime has put one of its own in that place.
func inherited(fd int, name string) *os.File {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}
