// Package spawn runs a short-lived part as the child of another part. It is
// apart from package part because it starts programs, which most parts must not
// even be able to: a test forbids them the import.
package spawn

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

	"farkeep/appliance/part"

	"golang.org/x/sys/unix"
)

// selfExe is how a process starts itself again, whatever was put in place of
// its file meanwhile.
const selfExe = "/proc/self/exe"

// Run runs a part as a child of this part, waits for it, and decodes its result
// into v. The child logs where this process logs. When ctx
// ends it is killed. An error that the child could tell is in its log; here it
// is only said how it ended.
func Run(ctx context.Context, e *part.Env, name string, brief, v any) error {
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
	return run(cmd, h, brief, v)
}

func run(cmd *exec.Cmd, h part.Header, brief, v any) error {
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
	sendErr := part.Send(briefW, h, brief)
	briefW.Close()
	line, readErr := io.ReadAll(io.LimitReader(resultR, part.MaxResult+1))
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("part %s: %w", h.Name, err)
	}
	if err := errors.Join(sendErr, readErr); err != nil {
		return err
	}
	if len(line) > part.MaxResult {
		return fmt.Errorf("part %s: its result is larger than %d bytes", h.Name, part.MaxResult)
	}
	if err := json.Unmarshal(bytes.TrimSpace(line), v); err != nil {
		return fmt.Errorf("part %s: its result: %w", h.Name, err)
	}
	return nil
}
