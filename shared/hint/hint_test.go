package hint_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"farkeep/shared/hint"
)

func TestReport(t *testing.T) {
	base := errors.New("host key changed for vault")
	tests := []struct {
		name string
		err  error
		out  string
		code int
	}{
		{"nil", nil, "", hint.ExitOK},
		{"plain", base, "p: error: host key changed for vault\n", hint.ExitFailure},
		{"hinted", hint.Because(base, "compare it with the %s", "sticker"),
			"p: error: host key changed for vault\np: hint: compare it with the sticker\n", hint.ExitFailure},
		{"hint and code, wrapped", fmt.Errorf("push: %w", hint.Exit(hint.ExitRefused, hint.Because(base, "h"))),
			"p: error: push: host key changed for vault\np: hint: h\n", hint.ExitRefused},
		{"outermost hint wins", hint.Because(hint.Because(base, "inner"), "outer"),
			"p: error: host key changed for vault\np: hint: outer\n", hint.ExitFailure},
		{"cancelled", fmt.Errorf("push: %w", context.Canceled), "p: error: push: context canceled\n", hint.ExitCancelled},
		{"joined", errors.Join(base, hint.Exit(hint.ExitUsage, errors.New("b"))), "p: error: host key changed for vault\nb\n", hint.ExitUsage},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			if code := hint.Report(&out, "p", tt.err); code != tt.code || out.String() != tt.out {
				t.Errorf("got %d %q; want %d %q", code, out.String(), tt.code, tt.out)
			}
		})
	}
}
