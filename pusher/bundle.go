package main

import (
	"fmt"
	"io"
	"time"

	"farkeep/shared/site"
)

// drillOverdue is the age from which the last drill is a warning.
const drillOverdue = 366 * 24 * time.Hour

// bundleStatus is what is known here of the newest recovery bundle: what site.toml
// says of it, beside what the appliances said of their disks.
type bundleStatus struct {
	Created  time.Time `json:"created,omitzero"`
	Drilled  time.Time `json:"drilled,omitzero"`
	Stale    []string  `json:"stale,omitempty"`    // disks that it does not open, with why
	Warnings []string  `json:"warnings,omitempty"` // what else a person should do
}

// bundleOf judges the bundle of a site; nil where no appliance has a disk.
func bundleOf(s *site.Site, targets []targetStatus, now time.Time) *bundleStatus {
	live := map[string]string{}
	for _, t := range targets {
		if t.Status != nil {
			live[t.Name] = t.Status.Disk.HeaderDigest
		}
	}
	b := &bundleStatus{Created: s.Bundle.Created, Drilled: s.Bundle.Drilled}
	disks := 0
	for _, a := range s.Appliances {
		if a.LUKS == "" {
			continue
		}
		disks++
		if why := s.Bundle.Stale(a.LUKS, live[a.Name]); why != "" && !b.Created.IsZero() {
			b.Stale = append(b.Stale, a.Name+": "+why)
		}
	}
	switch {
	case disks == 0:
		return nil
	case b.Created.IsZero():
		b.Warnings = append(b.Warnings, "there is none: if home burned today, who could open the disks? farkeep-keyserver bundle create, on the laptop")
	case b.Drilled.IsZero():
		b.Warnings = append(b.Warnings, "it was never rehearsed: farkeep-keyserver drill, on the laptop")
	case now.Sub(b.Drilled) > drillOverdue:
		b.Warnings = append(b.Warnings, fmt.Sprintf("the last drill was %s: farkeep-keyserver drill, on the laptop", ago(now, b.Drilled)))
	}
	return b
}

func (b *bundleStatus) show(w io.Writer, now time.Time) {
	if b == nil {
		return
	}
	fmt.Fprintln(w, "\nrecovery bundle")
	if !b.Created.IsZero() {
		fmt.Fprintf(w, "  made %s, rehearsed %s\n", ago(now, b.Created), ago(now, b.Drilled))
	}
	for _, s := range b.Stale {
		fmt.Fprintf(w, "  STALE %s\n", s)
	}
	if len(b.Stale) > 0 {
		fmt.Fprintln(w, "  make a new one: farkeep-keyserver bundle create, on the laptop; then copy site.toml here")
	}
	for _, s := range b.Warnings {
		fmt.Fprintf(w, "  WARNING %s\n", s)
	}
}
