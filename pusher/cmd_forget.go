package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"farkeep/pusher/push"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newForgetCmd(env *Env, at *places) *cobra.Command {
	return &cobra.Command{
		Use:   "forget REPOSITORY...",
		Short: "Forget what a repository was like",
		Long: `forget drops what the pusher remembers of a repository: where it was mounted
and which Borg id it had. The next push takes what is there for the repository.
Generations on targets are not touched: no command of this program can do that.`,
		Example: `  # the repository was removed, moved or made anew on purpose
  farkeep-pusher forget photos`,
		Args: usage.Args(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, names []string) error {
			state, err := push.Open(at.state, env.Now())
			if err != nil {
				return err
			}
			defer state.Close()
			memory := at.memory()
			for _, name := range names {
				err := memory.Forget(name)
				if errors.Is(err, fs.ErrNotExist) {
					return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("nothing is remembered of %q", name), `"farkeep-pusher status" lists what is`))
				}
				if err == nil {
					err = os.Remove(filepath.Join(at.state, "cache", name))
				}
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				fmt.Fprintf(env.Stdout, "forgot %s\n", name)
			}
			return nil
		},
	}
}
