// Package drill rehearses the worst day: it takes the commands out of a runbook,
// word for word, and runs them at the shell of a stock Debian to which a disk and a
// bundle are attached, and nothing else. It chooses what the runbook lets a person
// choose (which disk, which repository), types what programs ask for, and measures
// each step.
//
// What the runbook says is what runs: a step that was renamed, or that lost a
// variable, is an error here before any command runs, and a command that no longer
// works is an error when it does. Covered tells which steps no rehearsal reaches.
package drill

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"time"

	"farkeep/image/stockdebian"
	"farkeep/shared/runsteps"
)

// Shell is where commands are pasted. stockdebian.Machine is one.
type Shell interface {
	Run(ctx context.Context, script string, answers ...stockdebian.Answer) (output string, err error)
}

// StepError is a step of the runbook that does not do what it should.
type StepError struct {
	Step runsteps.Step
	Err  error
}

func (e *StepError) Error() string {
	return fmt.Sprintf("the runbook's step %q (%s): %v", e.Step.Name, e.Step.Chapter, e.Err)
}

func (e *StepError) Unwrap() error { return e.Err }

// Rehearsal is one going through a runbook.
type Rehearsal struct {
	Shell   Shell
	Answers []stockdebian.Answer // to what may be asked for at any step
	// Said is called after every step, with what it printed; may be nil.
	Said func(step runsteps.Step, took time.Duration, output string)

	steps map[string]runsteps.Step
	done  map[string]bool
	order []string
}

// limit bounds one step on an emulated processor.
const limit = 20 * time.Minute

// New takes the commands out of a runbook.
func New(runbook []byte, shell Shell) (*Rehearsal, error) {
	steps, err := runsteps.Parse(runbook)
	if err != nil {
		return nil, err
	}
	r := &Rehearsal{Shell: shell, steps: map[string]runsteps.Step{}, done: map[string]bool{}}
	for _, s := range steps {
		r.steps[s.Name] = s
		r.order = append(r.order, s.Name)
	}
	return r, nil
}

// Values are what a person writes behind the names of a step that lets him choose.
type Values map[string]string

// Step runs one step, with the values, and returns what it printed.
func (r *Rehearsal) Step(ctx context.Context, name string, v Values) (string, error) {
	s, ok := r.steps[name]
	if !ok {
		return "", fmt.Errorf("the runbook has no step %q any more: a person finds no such commands, and the drill cannot run them", name)
	}
	set, err := s.Set(v)
	if err != nil {
		return "", &StepError{s, err}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	out, err := r.Shell.Run(ctx, set.Script, r.Answers...)
	if err != nil {
		return out, &StepError{s, err}
	}
	r.done[name] = true
	if r.Said != nil {
		r.Said(s, time.Since(began), out)
	}
	return out, nil
}

// Steps runs steps without anything to choose, one after the other.
func (r *Rehearsal) Steps(ctx context.Context, names ...string) error {
	for _, name := range names {
		if _, err := r.Step(ctx, name, nil); err != nil {
			return err
		}
	}
	return nil
}

// NotRun are the steps of the runbook that this rehearsal has not run.
func (r *Rehearsal) NotRun() []string {
	return slices.DeleteFunc(slices.Clone(r.order), func(name string) bool { return r.done[name] })
}

// Disk says which disk is meant, and where bundle and copies are.
type Disk struct {
	Device, UUID string // at the shell
	Bundle, Work string // folders at the shell
	Key          string // "" for the bundle's
}

// Open is the chapter "Open the disk": to a disk that is mounted read-only.
func (r *Rehearsal) Open(ctx context.Context, d Disk) error {
	if err := r.choose(ctx, d); err != nil {
		return err
	}
	return r.Steps(ctx, "bundle-sums", "right-disk", "unlock", "fsck", "mount")
}

func (r *Rehearsal) choose(ctx context.Context, d Disk) error {
	v := Values{"DISK": d.Device, "UUID": d.UUID, "BUNDLE": d.Bundle, "WORK": d.Work}
	if d.Key != "" {
		v["KEY"] = d.Key
	}
	_, err := r.Step(ctx, "choose", v)
	return err
}

// OpenWithoutHeader is "When the header is damaged": a disk is opened with the
// bundle's header, and not written to.
func (r *Rehearsal) OpenWithoutHeader(ctx context.Context, d Disk) error {
	if _, err := r.Step(ctx, "choose-header", Values{"DISK": d.Device, "UUID": d.UUID, "BUNDLE": d.Bundle, "WORK": d.Work}); err != nil {
		return err
	}
	return r.Steps(ctx, "header-key", "header-detached", "fsck", "mount")
}

// Sums is "Check a repository": its newest generation's sums. It returns the
// generation's name.
func (r *Rehearsal) Sums(ctx context.Context, repository, work string) (string, error) {
	if _, err := r.Step(ctx, "choose-repository", Values{"REPO": repository, "COPY": work + "/" + repository, "OUT": work + "/files-of-" + repository}); err != nil {
		return "", err
	}
	generation, err := r.Step(ctx, "newest", nil)
	if err != nil {
		return "", err
	}
	_, err = r.Step(ctx, "sums", nil)
	return generation, err
}

// Extract is "Copy it" and "Read it with Borg", after Sums: to the files of the
// newest archive, in work/files-of-REPOSITORY.
func (r *Rehearsal) Extract(ctx context.Context) error {
	return r.Steps(ctx, "copy", "borg-keys", "borg-list", "borg-check", "borg-archive", "borg-extract")
}

// Passphrase answers Borg's question for it.
func Passphrase(text string) stockdebian.Answer {
	return stockdebian.Answer{Asked: regexp.MustCompile(`Enter passphrase for key [^\n]*: ?$`), Text: text}
}
