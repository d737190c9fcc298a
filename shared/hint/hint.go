// Package hint turns errors into what a person needs at a terminal: one line
// that says what went wrong, one that says what to do next, and an exit code
// that scripts can rely on.
//
// The layer that knows the way out attaches it with [Because]; [Report], called
// once by main, prints it.
package hint

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Exit codes of every Farkeep program; docs/operations.md lists them for users.
const (
	ExitOK          = 0   // everything that was asked for was done
	ExitFailure     = 1   // it was not done; the message says why
	ExitUsage       = 2   // the command line or a configuration file is wrong
	ExitPartial     = 3   // some repositories or targets succeeded, others did not
	ExitRefused     = 4   // the other side refused: identity, policy, revoked
	ExitUnreachable = 5   // the other side did not answer
	ExitCancelled   = 130 // interrupted by a signal
)

type hinted struct {
	err  error
	hint string
	code int
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

// Because attaches to err what to do next. It returns nil for a nil err. The
// outermost hint wins.
func Because(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hinted{err: err, hint: fmt.Sprintf(format, args...)}
}

// Exit attaches an exit code to err. The outermost code wins.
func Exit(code int, err error) error {
	if err == nil {
		return nil
	}
	return &hinted{err: err, code: code}
}

// Of returns the hint that err carries, "" for none.
func Of(err error) string {
	h := outermost(err, func(h *hinted) bool { return h.hint != "" })
	if h == nil {
		return ""
	}
	return h.hint
}

// Code returns the exit code for err: the one attached, ExitCancelled for a
// cancelled context, ExitFailure otherwise, ExitOK for nil.
func Code(err error) int {
	if err == nil {
		return ExitOK
	}
	if h := outermost(err, func(h *hinted) bool { return h.code != 0 }); h != nil {
		return h.code
	}
	if errors.Is(err, context.Canceled) {
		return ExitCancelled
	}
	return ExitFailure
}

// Report prints err and its hint to w, prefixed with the program's name, and
// returns the exit code. It prints nothing for a nil err.
func Report(w io.Writer, program string, err error) int {
	if err == nil {
		return ExitOK
	}
	fmt.Fprintf(w, "%s: error: %v\n", program, err)
	if h := Of(err); h != "" {
		fmt.Fprintf(w, "%s: hint: %s\n", program, h)
	}
	return Code(err)
}

func outermost(err error, match func(*hinted) bool) *hinted {
	for err != nil {
		var h *hinted
		if !errors.As(err, &h) {
			return nil
		}
		if match(h) {
			return h
		}
		err = h.err
	}
	return nil
}
