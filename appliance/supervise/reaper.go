package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reaper starts processes and waits for every process that ends: its own and,
// as PID 1 or child subreaper, the orphans of others.
//
// It owns all waits of this process. os/exec must not be used beside it: both
// would ask the kernel for the same children, wait4(-1) would take the status
// that Cmd.Wait wants, and asking for single pids leaves orphans as zombies.
// A pid stays reserved until Reaper has collected it, so a signal that Kill
// sends, under the same lock, never reaches a stranger.
type Reaper struct {
	mu       sync.Mutex // guards the fields below; held while forking
	children map[int]*Process
}

// Process is a child that Reaper started.
type Process struct {
	Pid    int
	r      *Reaper
	done   chan struct{}
	status syscall.WaitStatus // valid after done is closed
}

// NewReaper begins to reap. It makes this process the reaper of its orphaned
// descendants (PR_SET_CHILD_SUBREAPER), which PID 1 is anyway. It stops, for
// tests, when ctx ends.
func NewReaper(ctx context.Context) (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become the reaper of orphans: %w", err)
	}
	r := &Reaper{children: map[int]*Process{}}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	go func() {
		defer signal.Stop(sig)
		for {
			r.reap()
			select {
			case <-ctx.Done():
				return
			case <-sig: // one signal may stand for many children
			}
		}
	}()
	return r, nil
}

func (r *Reaper) reap() {
	for {
		r.mu.Lock()
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			r.mu.Unlock()
			continue
		}
		if err != nil || pid <= 0 {
			r.mu.Unlock()
			return
		}
		if p := r.children[pid]; p != nil {
			delete(r.children, pid)
			p.status = status
			close(p.done)
		}
		r.mu.Unlock()
	}
}

// Start runs file with arguments args (args[0] included) and an empty
// environment. files become descriptors 0, 1, 2, ...; the caller closes its
// copies.
func (r *Reaper) Start(file string, args []string, files []*os.File, attr *syscall.SysProcAttr) (*Process, error) {
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fds[i] = f.Fd()
	}
	// With the lock held, the child cannot be collected before it is known.
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(file, args, &syscall.ProcAttr{Env: []string{}, Files: fds, Sys: attr})
	runtime.KeepAlive(files) // their finalizers would close the descriptors
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", file, err)
	}
	p := &Process{Pid: pid, r: r, done: make(chan struct{})}
	r.children[pid] = p
	return p, nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Status says how the process ended. It is valid after Done.
func (p *Process) Status() syscall.WaitStatus { return p.status }

// Kill sends a signal, or does nothing if the process has ended.
func (p *Process) Kill(sig syscall.Signal) {
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	if p.r.children[p.Pid] == p {
		// It cannot have been collected: the only possible error is EPERM for a
		// process that became somebody else's, which ours cannot.
		_ = syscall.Kill(p.Pid, sig)
	}
}

// How describes a wait status for a log.
func How(s syscall.WaitStatus) string {
	switch {
	case s.Signaled() && s.CoreDump():
		return fmt.Sprintf("signal %v, core dumped", s.Signal())
	case s.Signaled():
		return fmt.Sprintf("signal %v", s.Signal())
	default:
		return fmt.Sprintf("exit status %d", s.ExitStatus())
	}
}

// Run runs a program to its end and returns its exit status; its output goes to
// out. When ctx ends the program is killed.
func (r *Reaper) Run(ctx context.Context, out *os.File, file string, args ...string) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, fmt.Errorf("run %s: %w", file, err)
	}
	defer null.Close()
	p, err := r.Start(file, append([]string{file}, args...), []*os.File{null, out, out}, nil)
	if err != nil {
		return 0, err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Kill(syscall.SIGKILL)
		<-p.Done()
		return 0, fmt.Errorf("run %s: %w", file, ctx.Err())
	}
	if p.Status().Signaled() {
		return 0, fmt.Errorf("run %s: %s", file, How(p.Status()))
	}
	return p.Status().ExitStatus(), nil
}

// KillOthers ends every other process of the machine (PID 1 only), so that
// nothing holds a file system open at shutdown.
func KillOthers(sig syscall.Signal) error {
	if os.Getpid() != 1 {
		return errors.New("only PID 1 may end all processes")
	}
	if err := syscall.Kill(-1, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end all processes: %w", err)
	}
	return nil
}
