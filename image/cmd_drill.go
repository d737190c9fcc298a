package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"farkeep/image/debian"
	"farkeep/image/drill"
	"farkeep/image/stockdebian"
	"farkeep/shared/hint"
	"farkeep/shared/luksheader"
	"farkeep/shared/runsteps"
	"farkeep/shared/usage"
)

// rehearsal is what "farkeep-image drill" is told.
type rehearsal struct {
	bundle, disk, cache, passphrases string
	repositories                     []string
	headerless                       string // the UUID of a disk whose header is destroyed
}

func newDrillCmd(env *Env) *cobra.Command {
	var o rehearsal
	cmd := &cobra.Command{
		Use:   "drill",
		Short: "Run the runbook's own commands on a stock Debian, in an emulated machine",
		Long: `Rehearse the worst day: a stock Debian is booted in an emulated PC, with a disk and a
bundle attached and nothing else, and the commands of the bundle's own runbook are run in
it, word for word: unlock, mount, check sums, and of each repository that is named, copy,
borg check, extract. It says how long each step took.

The disk is an image, or a real one that is attached to this computer and not in use
(/dev/sdb). Nothing is written to it. The bundle is the folder of one in clear: a sealed
one is opened first (farkeep-keyserver bundle open). Copies go into the machine's own
disk, which holds about a gigabyte: name small repositories, or none to stop after the
sums of the newest generation of each.

It needs root, mmdebstrap, qemu-system-x86, dosfstools and mtools, and the first time 150
MB of downloads. The processor is emulated, so that the times are far from a real
computer's.`,
		Example: `  farkeep-image drill --bundle farkeep-bundle --disk /dev/sdb
  farkeep-image drill --bundle farkeep-bundle --disk vault.img --repository letters --passphrase-file letters.txt
  farkeep-image drill --bundle farkeep-bundle --disk vault.img --without-header 0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.bundle == "" || o.disk == "" {
				return usage.Errorf("name the bundle (--bundle) and the disk (--disk)")
			}
			return o.run(cmd.Context(), env)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.bundle, "bundle", "", "the folder of a bundle in clear")
	f.StringVar(&o.disk, "disk", "", "the disk, or an image of it")
	f.StringArrayVar(&o.repositories, "repository", nil, "copy, check and extract this one with Borg; repeat for several")
	f.StringVar(&o.passphrases, "passphrase-file", "", "file with the passphrase that Borg asks for")
	f.StringVar(&o.headerless, "without-header", "", "`UUID` of the disk: its header is destroyed, and the bundle's is taken")
	f.StringVar(&o.cache, "cache", "", "where the stock Debian is kept (default: the user's cache folder)")
	return cmd
}

const (
	drillWork   = "/root/farkeep"
	drillBundle = "/media/user/STICK"
)

func (o *rehearsal) run(ctx context.Context, env *Env) (err error) {
	text, err := os.ReadFile(filepath.Join(o.bundle, "RUNBOOK.md"))
	if err != nil {
		return hint.Exit(hint.ExitUsage, hint.Because(err, "--bundle names a bundle in clear; farkeep-keyserver bundle open unpacks a sealed one"))
	}
	uuid, err := o.uuid()
	if err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	r, err := drill.New(text, nil)
	if err != nil {
		return err
	}
	if o.passphrases != "" {
		words, err := os.ReadFile(o.passphrases)
		if err != nil {
			return hint.Exit(hint.ExitUsage, err)
		}
		r.Answers = append(r.Answers, drill.Passphrase(strings.TrimRight(string(words), "\r\n")))
	}
	if o.cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("where downloads are kept: %w", err)
		}
		o.cache = filepath.Join(dir, "farkeep")
	}
	mirror, err := debian.FindMirror(os.DirFS("/etc/apt"))
	if err != nil {
		return hint.Because(err, "run this on Debian or Ubuntu")
	}
	log := slog.New(slog.NewTextHandler(env.Stderr, nil))
	stick, err := stockdebian.Make(ctx, o.cache, mirror, log)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "farkeep-drill-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	memory := filepath.Join(dir, "memory.img")
	if err := stockdebian.MemoryStick(ctx, o.bundle, memory); err != nil {
		return err
	}
	disks := []stockdebian.Disk{{Path: memory, Serial: "bundle"}, {Path: o.disk, Serial: "disk"}}
	began := time.Now()
	m, err := stockdebian.Boot(ctx, stockdebian.Config{Stick: stick, Disks: disks, Logger: log})
	if err != nil {
		return err
	}
	defer m.Close()
	r.Shell = m
	fmt.Fprintf(env.Stdout, "%8.1f s  a stock Debian %s boots\n", m.Booted.Seconds(), stockdebian.Release)
	if err := o.rehearse(ctx, env, r, disks[0].Device(), disks[1].Device(), uuid); err != nil {
		return err
	}
	fmt.Fprintf(env.Stdout, "%8.1f s  in all\n", time.Since(began).Seconds())
	return nil
}

// rehearse goes through the runbook at the shell of a machine that has the bundle on
// one device, and on another the disk.
func (o *rehearsal) rehearse(ctx context.Context, env *Env, r *drill.Rehearsal, stick, disk, uuid string) error {
	if _, err := r.Shell.Run(ctx, "mkdir -p "+drillBundle+"\nmount -o ro "+stick+" "+drillBundle+"\n"); err != nil {
		return fmt.Errorf("mount the stick with the bundle: %w", err)
	}
	r.Said = func(s runsteps.Step, took time.Duration, _ string) {
		fmt.Fprintf(env.Stdout, "%8.1f s  %s: %s\n", took.Seconds(), s.Chapter, s.Name)
	}
	d := drill.Disk{Device: disk, UUID: uuid, Bundle: drillBundle, Work: drillWork}
	open := r.Open
	if o.headerless != "" {
		open = r.OpenWithoutHeader
	}
	if err := open(ctx, d); err != nil {
		return notWorking(err)
	}
	out, err := r.Shell.Run(ctx, "( cd /mnt/farkeep/generations && ls )\n")
	if err != nil {
		return err
	}
	there := strings.Fields(out)
	if len(there) == 0 {
		return hint.Because(errors.New("the disk opens, and holds no repository: there is nothing to rehearse"), "push to it first")
	}
	for _, wanted := range o.repositories {
		if !slices.Contains(there, wanted) {
			return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("the disk has no repository %s", wanted), "it has %s", strings.Join(there, ", ")))
		}
	}
	for _, name := range there {
		generation, err := r.Sums(ctx, name, drillWork)
		if err != nil {
			return notWorking(err)
		}
		fmt.Fprintf(env.Stdout, "            %s %s: every file is what was written\n", name, strings.TrimSpace(generation))
		if !slices.Contains(o.repositories, name) {
			continue
		}
		if err := r.Extract(ctx); err != nil {
			return notWorking(err)
		}
		fmt.Fprintf(env.Stdout, "            %s: checked by Borg, and its newest archive extracted\n", name)
	}
	if err := r.Steps(ctx, "close"); err != nil {
		return notWorking(err)
	}
	return nil
}

// notWorking adds what to make of a step that failed.
func notWorking(err error) error {
	var step *drill.StepError
	if errors.As(err, &step) {
		return hint.Because(err, "what stands below this step in the runbook says what it may be; farkeep-keyserver bundle verify checks the bundle")
	}
	return err
}

var diskFile = regexp.MustCompile(`^([0-9a-f-]{36})\.recovery\.key$`)

// uuid finds which of the bundle's disks this is: by its header, or by what the user says.
func (o *rehearsal) uuid() (string, error) {
	entries, err := os.ReadDir(filepath.Join(o.bundle, "disks"))
	if err != nil {
		return "", err
	}
	var known []string
	for _, e := range entries {
		if m := diskFile.FindStringSubmatch(e.Name()); m != nil {
			known = append(known, m[1])
		}
	}
	if o.headerless == "" {
		f, err := os.Open(o.disk)
		if err != nil {
			return "", err
		}
		defer f.Close()
		uuid, err := luksheader.Identify(f)
		if err != nil {
			return "", hint.Because(fmt.Errorf("%s: %w", o.disk, err), "--without-header UUID tries the bundle's header")
		}
		if !slices.Contains(known, uuid) {
			return "", fmt.Errorf("the bundle does not open %s, whose UUID is %s", o.disk, uuid)
		}
		return uuid, nil
	}
	if !slices.Contains(known, o.headerless) {
		return "", hint.Because(fmt.Errorf("the bundle opens no disk %s", o.headerless), "it opens %s", strings.Join(known, ", "))
	}
	return o.headerless, nil
}
