// Package usage turns what is wrong with a command line into errors that carry
// hint.ExitUsage and lead to the command's help. What is right is the
// command's to say.
package usage

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"farkeep/shared/hint"
)

// ExitCodes ends a root command's help: the codes of shared/hint, in words.
const ExitCodes = `Exit codes: 0 done, 1 failed, 2 wrong command line or configuration, 3 partly
done, 4 refused by the other side, 5 out of reach, 130 interrupted.`

// Args gives check's complaint about arguments the exit code and the hint of
// one about flags.
func Args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error { return Flags(cmd, check(cmd, args)) }
}

// Flags is a root command's FlagErrorFunc. It returns nil for a nil err. What is
// not a number is told in words, where pflag would name a function of Go.
func Flags(cmd *cobra.Command, err error) error {
	var bad *pflag.InvalidValueError
	if errors.As(err, &bad) && errors.Is(err, strconv.ErrSyntax) && strings.HasPrefix(bad.GetFlag().Value.Type(), "int") {
		err = fmt.Errorf("--%s: %q is not a whole number", bad.GetFlag().Name, bad.GetValue())
	}
	return hint.Exit(hint.ExitUsage, hint.Because(err, "%s --help", cmd.CommandPath()))
}

// Errorf is fmt.Errorf for a mistake in the command line.
func Errorf(format string, args ...any) error {
	return hint.Exit(hint.ExitUsage, fmt.Errorf(format, args...))
}
