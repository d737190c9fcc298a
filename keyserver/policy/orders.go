package policy

import (
	"fmt"
	"strings"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/shared/hint"
)

const (
	// ApprovalTime is how long an approval waits for the request that it lets through.
	ApprovalTime = 24 * time.Hour
	// MaxExpect bounds how far ahead a move may be announced.
	MaxExpect = 90 * 24 * time.Hour
)

// Approve lets the next request of the appliance through that is like the waiting
// one with that id; "" stands for the only one. It lasts ApprovalTime.
func Approve(s State, id, by, why string, at moment.Moment) (State, error) {
	w, err := s.waiting(id)
	if err != nil {
		return s, err
	}
	if s.Standing.State != Enabled {
		return s, hint.Because(fmt.Errorf("%s is not enabled", s.Appliance), "farkeep-keyserver allow %s --reason ...", s.Appliance)
	}
	if err := reason(by, why); err != nil {
		return s, err
	}
	s = s.clone()
	s.anchor(at)
	s.Approval = &Approval{Of: w, By: by, Why: why, Given: at, Earliest: s.earliest(at).Wall}
	return s, nil
}

// Deny drops the waiting request with that id ("" for the only one), and an
// approval of it.
func Deny(s State, id, by, why string) (State, error) {
	w, err := s.waiting(id)
	if err != nil {
		return s, err
	}
	if err := reason(by, why); err != nil {
		return s, err
	}
	s = s.clone()
	s.drop(func(one Waiting) bool { return one.ID == w.ID })
	if s.Approval != nil && s.Approval.Of.ID == w.ID {
		s.Approval = nil
	}
	return s, nil
}

// Revoke gives the appliance nothing any more, until Allow. What had been
// approved, expected or asked for is void.
func Revoke(s State, by, why string, at moment.Moment) (State, error) {
	if err := reason(by, why); err != nil {
		return s, err
	}
	s = s.clone()
	s.anchor(at)
	s.Approval, s.Expected, s.Waiting = nil, nil, nil
	if s.Standing.State != Revoked {
		s.Told, s.Dark = moment.Moment{}, moment.Moment{}
	}
	s.Standing = Standing{State: Revoked, Reason: why, By: by, Since: stamp(at)}
	return s, nil
}

// Allow enables the appliance. What is asked of every request is asked of it as
// ever: after a long silence, in another place or with an old token it waits for
// an approval.
func Allow(s State, by, why string, at moment.Moment) (State, error) {
	if err := reason(by, why); err != nil {
		return s, err
	}
	s = s.clone()
	s.anchor(at)
	s.Standing = Standing{State: Enabled, Reason: why, By: by, Since: stamp(at)}
	s.Told, s.Dark = moment.Moment{}, moment.Moment{}
	return s, nil
}

// Expect approves one move beforehand: until then, one request from another
// place, after a silence, from another board or with a token that does not match
// is let through.
func Expect(s State, until time.Time, by, why string, at moment.Moment) (State, error) {
	if err := reason(by, why); err != nil {
		return s, err
	}
	switch {
	case s.Standing.State != Enabled:
		return s, hint.Because(fmt.Errorf("%s is not enabled", s.Appliance), "farkeep-keyserver allow %s --reason ...", s.Appliance)
	case !until.After(at.Wall):
		return s, fmt.Errorf("%s is in the past", until.UTC().Format(time.RFC3339))
	case until.Sub(at.Wall) > MaxExpect:
		return s, fmt.Errorf("%s is more than %d days ahead", until.UTC().Format(time.RFC3339), MaxExpect/(24*time.Hour))
	}
	s = s.clone()
	s.anchor(at)
	s.Expected = &Expectation{Until: until.UTC(), For: until.Sub(at.Wall), By: by, Why: why, Given: at, Earliest: s.earliest(at).Wall}
	return s, nil
}

// waiting finds a waiting request.
func (s State) waiting(id string) (Waiting, error) {
	var ids []string
	for _, w := range s.Waiting {
		if w.ID == id || id == "" && len(s.Waiting) == 1 {
			return w, nil
		}
		ids = append(ids, w.ID)
	}
	switch {
	case len(ids) == 0:
		return Waiting{}, fmt.Errorf("no request of %s is waiting", s.Appliance)
	case id == "":
		return Waiting{}, hint.Because(fmt.Errorf("%d requests of %s are waiting", len(ids), s.Appliance), "name one: %s", strings.Join(ids, ", "))
	default:
		return Waiting{}, hint.Because(fmt.Errorf("no request %q of %s is waiting", id, s.Appliance), "waiting: %s", strings.Join(ids, ", "))
	}
}

func reason(by, why string) error {
	switch {
	case strings.TrimSpace(why) == "":
		return fmt.Errorf("a reason is missing: in a year somebody will ask why")
	case len(why) > maxText || len(by) > maxText:
		return fmt.Errorf("the reason is longer than %d bytes", maxText)
	}
	return nil
}

func stamp(at moment.Moment) time.Time { return at.Wall.UTC().Truncate(time.Second) }
