package manifest

import (
	"errors"
	"io"
)

// Relation says how an entry of a new manifest relates to an old one.
type Relation byte

// The relations. Two entries are Unchanged when both are folders, or both are
// files with the same bytes; modes and times may still differ.
const (
	Unchanged Relation = iota
	Changed            // same path, other content or other kind
	New                // only in the new manifest
	Gone               // only in the old manifest
)

// Change is one step of a comparison. Old is zero for New, New is zero for Gone.
type Change struct {
	Relation Relation
	Old, New Entry
	Index    int64 // of New in its manifest; -1 for Gone
}

// Diff compares two manifests in one pass, with the memory of two entries, and
// calls step for every path of either, in order. An old manifest of nil is an
// empty one. Both readers have been read to their checked ends when Diff returns
// nil. An error of step ends the comparison and is returned as it is.
func Diff(old, new *Reader, step func(Change) error) error {
	var a, b Entry
	moreA, err := advance(old, &a)
	if err != nil {
		return &SideError{Old: true, Err: err}
	}
	moreB, err := advance(new, &b)
	if err != nil {
		return &SideError{Err: err}
	}
	for moreA || moreB {
		order := 0
		switch {
		case !moreA:
			order = 1
		case !moreB:
			order = -1
		default:
			order = ComparePaths(a.Path, b.Path)
		}
		var c Change
		switch {
		case order < 0:
			c = Change{Relation: Gone, Old: a, Index: -1}
		case order > 0:
			c = Change{Relation: New, New: b, Index: new.Index()}
		case a.Kind == Folder && b.Kind == Folder || a.SameContent(&b):
			c = Change{Relation: Unchanged, Old: a, New: b, Index: new.Index()}
		default:
			c = Change{Relation: Changed, Old: a, New: b, Index: new.Index()}
		}
		if err := step(c); err != nil {
			return err
		}
		if order <= 0 {
			if moreA, err = advance(old, &a); err != nil {
				return &SideError{Old: true, Err: err}
			}
		}
		if order >= 0 {
			if moreB, err = advance(new, &b); err != nil {
				return &SideError{Err: err}
			}
		}
	}
	return nil
}

// SideError says which of the two manifests of Diff could not be read.
type SideError struct {
	Old bool
	Err error
}

func (e *SideError) Error() string {
	if e.Old {
		return "old " + e.Err.Error()
	}
	return e.Err.Error()
}

// Unwrap returns the cause.
func (e *SideError) Unwrap() error { return e.Err }

func advance(r *Reader, e *Entry) (more bool, err error) {
	if r == nil {
		return false, nil
	}
	*e, err = r.Next()
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	return err == nil, err
}
