package usage_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/spf13/cobra"

	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func TestMistakes(t *testing.T) {
	tests := []struct {
		name string
		args []string
		code int
		hint string
	}{
		{"in order", []string{"sub", "one"}, hint.ExitOK, ""},
		{"an argument too few", []string{"sub"}, hint.ExitUsage, "prog sub --help"},
		{"an argument too many", []string{"sub", "one", "two"}, hint.ExitUsage, "prog sub --help"},
		{"an unknown flag", []string{"sub", "--nonsense"}, hint.ExitUsage, "prog sub --help"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := &cobra.Command{Use: "prog", SilenceUsage: true, SilenceErrors: true}
			root.SetFlagErrorFunc(usage.Flags)
			root.AddCommand(&cobra.Command{Use: "sub", Args: usage.Args(cobra.ExactArgs(1)), RunE: func(*cobra.Command, []string) error { return nil }})
			root.SetOut(io.Discard)
			root.SetErr(io.Discard)
			root.SetArgs(tt.args)
			err := root.Execute()
			if got := hint.Report(new(bytes.Buffer), "prog", err); got != tt.code {
				t.Errorf("exit code %d; want %d (%v)", got, tt.code, err)
			}
			if got := hint.Of(err); got != tt.hint {
				t.Errorf("hint %q; want %q", got, tt.hint)
			}
		})
	}
}

func TestErrorf(t *testing.T) {
	cause := errors.New("no number")
	err := usage.Errorf("--size: %w", cause)
	if !errors.Is(err, cause) || err.Error() != "--size: no number" {
		t.Errorf("got %v", err)
	}
	if got := hint.Report(io.Discard, "prog", err); got != hint.ExitUsage {
		t.Errorf("exit code %d; want %d", got, hint.ExitUsage)
	}
}
