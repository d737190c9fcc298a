package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"farkeep/pusher/appliance"
	"farkeep/pusher/directory"
	"farkeep/pusher/readback"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/pushwire"
	"farkeep/shared/secret"
	"farkeep/shared/site"
)

// reading says how generations are read: the flags of the commands that do.
type reading struct {
	key, address string
	at           string
	evenSuspect  bool
	// listOnly makes do with the push key, which may list its repositories.
	listOnly bool
}

// reach adds the flags that say how to reach a target.
func (r *reading) reach(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.key, "restore-key", "", "the SSH key that may read generations (default operator/restore_key beside the site)")
	f.StringVar(&r.address, "address", "", "reach the appliance at this HOST:PORT, a tunnel for instance; its host key stays the site's")
}

// choose adds the flags that say which generation.
func (r *reading) choose(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.at, "at", "", "the newest generation of that time or before: 2026-05-01 (the end of that day), \"2026-05-01 14:30\", or RFC 3339")
	f.BoolVar(&r.evenSuspect, "even-suspect", false, "take a generation that is suspect or was rejected as well")
}

// wanted is the generation that was asked for.
func (r *reading) wanted(name string) (readback.Wanted, error) {
	w := readback.Wanted{Name: name, EvenSuspect: r.evenSuspect}
	if r.at == "" {
		return w, nil
	}
	if t, err := time.Parse(time.RFC3339, r.at); err == nil {
		w.At = t
		return w, nil
	}
	for _, form := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04"} {
		if t, err := time.ParseInLocation(form, r.at, time.Local); err == nil {
			w.At = t
			return w, nil
		}
	}
	t, err := time.ParseInLocation(time.DateOnly, r.at, time.Local)
	if err != nil {
		return w, hint.Exit(hint.ExitUsage, fmt.Errorf("--at %q is not a time: write 2026-05-01, \"2026-05-01 14:30\" or 2026-05-01T14:30:00Z", r.at))
	}
	w.At = t.AddDate(0, 0, 1).Add(-time.Nanosecond)
	return w, nil
}

// split splits what a command was told into the generation and the rest. A
// generation cannot be left out where paths follow, unless --at names it.
func (r *reading) split(args []string) (generation string, rest []string) {
	if len(args) == 0 || r.at != "" {
		return "", args
	}
	return args[0], args[1:]
}

// isPath says whether a target is meant as a folder rather than as a name of the site's.
func isPath(target string) bool { return strings.ContainsRune(target, '/') || target == "." }

// sources makes the sources with these names; none means all of the site.
func (at *places) sources(r *reading, names []string, env *Env, log *slog.Logger) ([]readback.Source, error) {
	if len(names) == 1 && isPath(names[0]) {
		return []readback.Source{directory.NewReader(names[0], names[0])}, nil
	}
	s, err := at.readSite()
	if err != nil {
		return nil, err
	}
	wanted := func(name string) bool { return len(names) == 0 || slices.Contains(names, name) }
	var all []readback.Source
	var known []string
	var signer ssh.Signer
	for _, a := range s.Appliances {
		known = append(known, a.Name)
		if !wanted(a.Name) {
			continue
		}
		if signer == nil {
			if signer, err = at.readRestoreKey(r, env); err != nil {
				return nil, err
			}
		}
		key, err := identity.ParsePublic(a.HostKey)
		if err != nil {
			return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("%s: host key of %s: %w", at.site, a.Name, err))
		}
		address := a.Address
		if r.address != "" {
			address = r.address
		}
		all = append(all, appliance.New(appliance.Config{
			Name: a.Name, Address: address, HostKey: key, Identity: signer, WakeWait: time.Duration(s.Push.WakeWait), Log: log,
		}))
	}
	for _, d := range s.Directories {
		known = append(known, d.Name)
		// Those of another pusher are on another machine.
		if len(names) == 0 && !isHere(d) {
			continue
		}
		if wanted(d.Name) {
			all = append(all, directory.NewReader(d.Name, d.Path))
		}
	}
	if err := at.knows(known, names, "one of %s, or a folder: ./NAME"); err != nil {
		return nil, err
	}
	if len(all) > 1 && r.address != "" {
		return nil, hint.Exit(hint.ExitUsage, errors.New("--address is for one appliance: name it"))
	}
	if len(all) == 0 {
		return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s names no target that can be read here", at.site), `"farkeep-image site add appliance" adds one`))
	}
	return all, nil
}

func isHere(d site.Directory) bool {
	_, err := filepath.EvalSymlinks(d.Path)
	return err == nil
}

// readRestoreKey reads the key that may read generations.
func (at *places) readRestoreKey(r *reading, env *Env) (ssh.Signer, error) {
	path := r.key
	if path == "" {
		path = filepath.Join(filepath.Dir(at.site), "operator", "restore_key")
	}
	text, err := identity.ReadPrivate(path)
	if errors.Is(err, fs.ErrNotExist) && r.key == "" && r.listOnly {
		text, err = identity.ReadPrivate(at.identity)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = hint.Because(err, `generations are read with the restore key, which "site init" made: it lies in operator/ of the site's folder, not at home. Name it: --restore-key FILE`)
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	if err != nil {
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	signer, err := identity.Signer(text)
	if errors.Is(err, identity.ErrSealed) && env.Passphrase != nil {
		var passphrase secret.Bytes
		if passphrase, err = env.Passphrase(path); err == nil {
			defer passphrase.Wipe()
			signer, err = identity.Unseal(text, passphrase)
		}
	}
	if err != nil {
		return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("read the key %s: %w", path, err))
	}
	return signer, nil
}

// one is a generation of a source, found.
type one struct {
	source     readback.Source
	generation pushwire.Generation
}

// find finds the generation that a command is about. The caller closes the source.
func (at *places) find(cmd *cobra.Command, r *reading, target, repository, generation string, env *Env, log *slog.Logger) (*one, error) {
	w, err := r.wanted(generation)
	if err != nil {
		return nil, err
	}
	if err := pushwire.CheckRepository(repository); err != nil {
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	all, err := at.sources(r, []string{target}, env, log)
	if err != nil {
		return nil, err
	}
	source := all[0]
	chosen, err := choose(cmd, source, repository, w, env.Stderr)
	if err != nil {
		source.Close()
		return nil, err
	}
	return &one{source, chosen}, nil
}

func choose(cmd *cobra.Command, source readback.Source, repository string, w readback.Wanted, say io.Writer) (pushwire.Generation, error) {
	ctx := cmd.Context()
	if err := source.Wake(ctx); err != nil {
		return pushwire.Generation{}, err
	}
	list, err := source.Generations(ctx, repository)
	if err != nil {
		return pushwire.Generation{}, err
	}
	chosen, passed, err := readback.Choose(list, w)
	if err != nil {
		return chosen, fmt.Errorf("%s of %s: %w", repository, source.Name(), err)
	}
	for _, g := range passed {
		fmt.Fprintf(say, "%s: passed over: generation %s of %s is %s\n", program, g.Name, repository, standing(g))
	}
	if readback.Doubtful(chosen) {
		fmt.Fprintf(say, "%s: generation %s of %s is %s\n", program, chosen.Name, repository, standing(chosen))
		for _, reason := range chosen.Reasons {
			fmt.Fprintf(say, "%s: %s\n", program, reason)
		}
	}
	return chosen, nil
}

// standing is a generation's, in a word.
func standing(g pushwire.Generation) string {
	switch {
	case g.Standing != "":
		return g.Standing
	case g.Suspect:
		return "suspect"
	}
	return "good"
}
