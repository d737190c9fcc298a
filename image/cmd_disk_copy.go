package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"farkeep/image/diskcopy"
	"farkeep/image/luksdisk"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newDiskCopyCmd(env *Env) *cobra.Command {
	var trust bool
	cmd := &cobra.Command{
		Use:   "copy FROM TO",
		Short: "Copy all generations to a larger disk",
		Long: `Copy everything that an appliance keeps from one opened and mounted disk to another,
empty one, with the links between generations. FROM and TO are the folders on which
the disks are mounted. Each file is compared with the hash that was taken at its
source, and read back from the new disk.

A copy that was interrupted goes on when the same command is run again. It stops at
the first file that is not what it should be: "disk salvage" goes on.`,
		Example: `  farkeep-image disk copy /mnt/old /mnt/new`,
		Args:    usage.Args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o := diskcopy.Options{Trust: trust, Progress: progressOf(env), Log: env.Logger()}
			report, err := diskcopy.Copy(cmd.Context(), args[0], args[1], o)
			if err != nil {
				if cmd.Context().Err() == nil && hint.Of(err) == "" {
					err = hint.Because(err, "the generations that are complete stay on the new disk: run it again to go on, or \"disk salvage\" to go on past what is damaged")
				}
				return err
			}
			copied(env, report)
			return nil
		},
	}
	cmd.Flags().BoolVar(&trust, "trust-new-disk", false, "do not read back what was written (the appliance reads everything within scrub_every anyway)")
	return cmd
}

func newDiskSalvageCmd(env *Env) *cobra.Command {
	var trust bool
	var list string
	cmd := &cobra.Command{
		Use:   "salvage FROM TO",
		Short: "Copy what can still be read off a dying disk",
		Long: `Copy as "disk copy" does, and go on past files that cannot be read or are not what
they should be. They are left out, taken from any other copy of the same content on
the disk, and named in the end and in a list. The new disk knows what it lacks: the
next push brings what home still has, in every generation.

Mount the dying disk read-only. Exit code 3 says that something is missing.`,
		Example: `  farkeep-image disk salvage /mnt/old /mnt/new
  farkeep-image disk salvage /mnt/old /mnt/new --list lost.txt`,
		Args: usage.Args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if list == "" {
				list = filepath.Clean(args[1]) + "-lost.txt"
			}
			lost, err := newLossList(list)
			if err != nil {
				return err
			}
			o := diskcopy.Options{Salvage: true, Trust: trust, Progress: progressOf(env), Lost: lost.add, Log: env.Logger()}
			report, err := diskcopy.Copy(cmd.Context(), args[0], args[1], o)
			if err := errors.Join(err, lost.close()); err != nil {
				return err
			}
			copied(env, report)
			if report.Found > 0 {
				fmt.Fprintf(env.Stderr, "%s: %d names were given the same content from elsewhere on the disk\n", program, report.Found)
			}
			if report.Lost == 0 {
				return os.Remove(list)
			}
			for _, line := range lost.first {
				fmt.Fprintln(env.Stdout, line)
			}
			err = fmt.Errorf("%d files or lists are not on the new disk as they should be: all of them are in %s", report.Lost, list)
			return hint.Exit(hint.ExitPartial, hint.Because(err, "give the appliance the new disk and push: what home still has comes back into every generation"))
		},
	}
	cmd.Flags().BoolVar(&trust, "trust-new-disk", false, "do not read back what was written")
	cmd.Flags().StringVar(&list, "list", "", "file for the names of what is lost (default: TO-lost.txt, beside the folder TO)")
	return cmd
}

// progressOf writes a line for each generation and for each step of a long one.
func progressOf(env *Env) func(diskcopy.Progress) {
	return func(p diskcopy.Progress) {
		fmt.Fprintf(env.Stderr, "%s: %s %s: %d of %d generations, %s of about %s, %d files, %d links", program,
			p.Repository, p.Generation, p.Generations, p.Of, luksdisk.Size(p.Bytes), luksdisk.Size(max(p.Total, p.Bytes)), p.Files, p.Links)
		if p.Lost > 0 {
			fmt.Fprintf(env.Stderr, ", %d left out so far", p.Lost)
		}
		fmt.Fprintln(env.Stderr)
	}
}

func copied(env *Env, r *diskcopy.Report) {
	fmt.Fprintf(env.Stderr, "%s: %d generations are on the new disk (%d from an earlier run): %d files, %s, and %d links\n", program,
		r.Generations, r.Skipped, r.Files, luksdisk.Size(r.Bytes), r.Links)
}

// lossList is the file that names what is lost.
type lossList struct {
	f     *os.File
	w     *bufio.Writer
	first []string
	err   error
}

// maxShown bounds the losses that are printed too.
const maxShown = 50

func newLossList(path string) (*lossList, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--list: %w", err)
	}
	return &lossList{f: f, w: bufio.NewWriter(f)}, nil
}

func (l *lossList) add(loss diskcopy.Loss) {
	var line strings.Builder
	for _, word := range []string{loss.Repository, loss.Generation} {
		if word != "" {
			line.WriteString(word + " ")
		}
	}
	if loss.Path != "" {
		fmt.Fprintf(&line, "%q: ", loss.Path)
	}
	line.WriteString(loss.What)
	if len(l.first) < maxShown {
		l.first = append(l.first, line.String())
	}
	if _, err := fmt.Fprintln(l.w, line.String()); err != nil && l.err == nil {
		l.err = err
	}
}

func (l *lossList) close() error { return errors.Join(l.err, l.w.Flush(), l.f.Sync(), l.f.Close()) }
