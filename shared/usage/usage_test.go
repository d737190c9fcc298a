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

func TestNumbers(t *testing.T) {
	for value, want := range map[string]string{
		"--rate=1M":                   `--rate: "1M" is not a whole number`,
		"--rate=99999999999999999999": `invalid argument "99999999999999999999" for "--rate" flag: strconv.ParseInt: parsing "99999999999999999999": value out of range`,
		"--json=perhaps":              `invalid argument "perhaps" for "--json" flag: strconv.ParseBool: parsing "perhaps": invalid syntax`,
	} {
		root := &cobra.Command{Use: "prog", SilenceUsage: true, SilenceErrors: true, RunE: func(*cobra.Command, []string) error { return nil }}
		root.Flags().Int64("rate", 0, "")
		root.Flags().Bool("json", false, "")
		root.SetFlagErrorFunc(usage.Flags)
		root.SetArgs([]string{value})
		if err := root.Execute(); err == nil || err.Error() != want || hint.Of(err) != "prog --help" {
			t.Errorf("%s: %v, hint %q", value, err, hint.Of(err))
		}
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
