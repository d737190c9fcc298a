package policy_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/keyserver/policy"
	"farkeep/shared/hint"

	"github.com/google/go-cmp/cmp"
)

// childFolder makes the test binary a process that changes a state for ever.
const childFolder = "FARKEEP_TEST_POLICY_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childFolder); dir != "" {
		s := policy.Open(dir)
		for {
			if err := count(s); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			fmt.Println("one more")
		}
	}
	os.Exit(m.Run())
}

// count adds one key to what is remembered of attic, and never more than 1000.
func count(s *policy.Store) error {
	return s.Update("attic", func(state policy.State) (policy.State, error) {
		if len(state.Keys) == 1000 {
			return state, nil
		}
		at := newWorld().now
		at.Up += time.Duration(len(state.Keys))
		state.Keys = append(state.Keys, at)
		return state, nil
	})
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s := policy.Open(dir)
	blank, err := s.Read("attic")
	if err != nil || blank.Appliance != "attic" || blank.Standing.State != "" {
		t.Errorf("nothing on file: %+v, %v", blank, err)
	}
	w := newWorld()
	w.expect(time.Hour)
	elsewhere(w)
	w.must(policy.Grant)
	w.expect(time.Hour)
	w.at(thief)
	oldToken(w)
	if err := s.Update("attic", func(policy.State) (policy.State, error) { return w.s, nil }); err != nil {
		t.Fatal(err)
	}
	got, err := policy.Open(dir).Read("attic") // a restart
	w.s.Version = 1
	if err != nil || mustJSON(t, got) != mustJSON(t, w.s) {
		t.Errorf("%v\n%s", err, cmp.Diff(w.s, got))
	}
	info, err := os.Stat(filepath.Join(dir, "appliances", "attic.json"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}

	// What fails changes nothing.
	refused := errors.New("refused")
	if err := s.Update("attic", func(policy.State) (policy.State, error) { return policy.State{}, refused }); !errors.Is(err, refused) {
		t.Errorf("%v", err)
	}
	bad := got
	bad.Standing.State = "perhaps"
	if err := s.Update("attic", func(policy.State) (policy.State, error) { return bad, nil }); err == nil {
		t.Error("a state that no program understands was written")
	}
	if again, err := s.Read("attic"); err != nil || mustJSON(t, again) != mustJSON(t, got) {
		t.Errorf("it changed: %v", err)
	}

	for name, text := range map[string]string{
		"empty": "", "garbage": "{", "another appliance's": `{"version":1,"appliance":"shed"}`, "older or newer": `{"version":2,"appliance":"attic"}`, "no version": `{"appliance":"attic"}`,
		"another standing": `{"version":1,"appliance":"attic","standing":{"state":"maybe"}}`, "an unknown key": `{"version":1,"appliance":"attic","hold":true}`,
		"something behind it": `{"version":1,"appliance":"attic"}{}`, "a token": `{"version":1,"appliance":"attic","tokens":{"shown":"x"}}`,
		"a network": `{"version":1,"appliance":"attic","networks":[{"name":"84.0.0.1/8"}]}`, "a waiting request": `{"version":1,"appliance":"attic","waiting":[{"id":""}]}`,
		"an approval": `{"version":1,"appliance":"attic","approval":{"of":{}}}`, "too large": `{"version":1,"appliance":"attic"}` + strings.Repeat(" ", 600<<10),
	} {
		if err := os.WriteFile(filepath.Join(dir, "appliances", "attic.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if v, err := s.Read("attic"); err == nil {
			t.Errorf("%s: read as %+v", name, v)
		}
		if err := s.Update("attic", func(s policy.State) (policy.State, error) { return s, nil }); err == nil {
			t.Errorf("%s: changed", name)
		}
	}
	for _, bad := range []string{"", "..", "../x", "a/b", "A"} {
		if _, err := s.Read(bad); err == nil {
			t.Errorf("%q has a state", bad)
		}
		if err := s.Update(bad, func(s policy.State) (policy.State, error) { return s, nil }); err == nil {
			t.Errorf("%q was given a state", bad)
		}
	}
}

// TestTogether changes one state from several places at once: no change is lost.
func TestTogether(t *testing.T) {
	dir := t.TempDir()
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			s := policy.Open(dir) // as a process of its own would
			for range 25 {
				if err := count(s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	g.Wait()
	if s, err := policy.Open(dir).Read("attic"); err != nil || len(s.Keys) != 100 {
		t.Errorf("%d of 100 changes, %v", len(s.Keys), err)
	}
}

// TestKilled kills a process that changes a state, again and again: the state can
// always be read, holds what was reported as done, and can be changed at once.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	done := 0
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childFolder+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range 3 + round {
			if !lines.Scan() || lines.Text() != "one more" {
				t.Fatalf("the process says %q", lines.Text())
			}
			done++
		}
		cmd.Process.Kill()
		cmd.Wait()
		s, err := policy.Open(dir).Read("attic")
		if err != nil || len(s.Keys) < done {
			t.Fatalf("%d of %d changes, %v", len(s.Keys), done, err)
		}
		if err := count(policy.Open(dir)); err != nil {
			t.Fatal(err)
		}
		done = len(s.Keys) + 1
	}
}

func TestOrders(t *testing.T) {
	w := newWorld()
	elsewhere(w)
	if _, err := policy.Approve(w.s, "", "ada", "me", w.now); err == nil {
		t.Error("approved, and nothing waits")
	}
	w.must(policy.Hold)
	id := w.s.Waiting[0].ID
	for _, tt := range []struct {
		name string
		do   func() (policy.State, error)
		want string
	}{
		{"no reason", func() (policy.State, error) { return policy.Approve(w.s, id, "ada", " ", w.now) }, "reason"},
		{"a long reason", func() (policy.State, error) { return policy.Revoke(w.s, "ada", strings.Repeat("x", 301), w.now) }, "300 bytes"},
		{"no such request", func() (policy.State, error) { return policy.Deny(w.s, "aaaaaa", "ada", "x") }, "no request"},
		{"in the past", func() (policy.State, error) { return policy.Expect(w.s, w.now.Wall, "ada", "x", w.now) }, "in the past"},
		{"too far ahead", func() (policy.State, error) {
			return policy.Expect(w.s, w.now.Wall.Add(91*24*time.Hour), "ada", "x", w.now)
		}, "90 days"},
		{"revoked", func() (policy.State, error) {
			s, err := policy.Revoke(w.s, "ada", "stolen", w.now)
			if err != nil {
				return s, err
			}
			return policy.Expect(s, w.now.Wall.Add(time.Hour), "ada", "x", w.now)
		}, "not enabled"},
	} {
		before := mustJSON(t, w.s)
		s, err := tt.do()
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %+v, %v", tt.name, s, err)
		}
		if mustJSON(t, w.s) != before {
			t.Errorf("%s: it changed what it was given", tt.name)
		}
	}
	// Of two, one must be named.
	w.at(homeAgain)
	oldToken(w)
	w.must(policy.Hold)
	if _, err := policy.Approve(w.s, "", "ada", "me", w.now); err == nil || !strings.Contains(hint.Of(err), id) {
		t.Errorf("approved one of two: %v, %s", err, hint.Of(err))
	}
	s, err := policy.Deny(w.s, id, "ada", "not me")
	if err != nil || len(s.Waiting) != 1 || s.Waiting[0].ID == id {
		t.Errorf("%+v, %v", s.Waiting, err)
	}
}

// Told once: the same is not said again within a day, whatever a thief varies.
func TestOneMailADay(t *testing.T) {
	w := newWorld()
	elsewhere(w)
	told := 0
	for range 50 {
		w.again("key")
		w.f.Request.Token = w.f.NewToken
		w.f.Request.Claims.Boot = fmt.Sprintf("%032x", w.count)
		if d := w.decide(); d.Unexpected {
			told++
		}
		w.pass(20 * time.Minute)
		w.shift(20 * time.Minute)
	}
	if told != 1 || len(w.s.Waiting) != 1 || w.s.Waiting[0].Count != 50 {
		t.Errorf("told %d times; waiting %+v", told, w.s.Waiting)
	}
	// A hundred networks in a day.
	for i := range 100 {
		w.again("key")
		oldToken(w)
		w.f.Place = w.sighting(w.visit(thief, time.Minute, 0))
		w.f.Place.Trail[0].Network.Name = fmt.Sprintf("100.%d.0.0/16", i)
		w.must(policy.Hold)
	}
	if len(w.s.Waiting) > 8 || len(w.s.Warned) > 16 {
		t.Errorf("%d waiting, %d warnings", len(w.s.Waiting), len(w.s.Warned))
	}
}

func TestRevokedIsTold(t *testing.T) {
	w := newWorld()
	w.revoke()
	if !w.s.Told.IsZero() {
		t.Error("told before it asked")
	}
	lease(w)
	if d := w.decide(); d.Verdict != policy.Refuse || d.Unexpected || w.s.Told.IsZero() {
		t.Errorf("%+v", d)
	}
	first := w.s.Told
	w.pass(time.Minute)
	w.must(policy.Refuse)
	w.f.Request.Verb, w.f.Request.UUID = "dark", disk
	w.must(policy.Grant)
	if w.s.Told != first || w.s.Dark.IsZero() {
		t.Errorf("told %v, dark %v", w.s.Told, w.s.Dark)
	}
	w.revoke() // again: what was told stays told
	if w.s.Told != first || w.s.Dark.IsZero() {
		t.Error("a second revocation forgot the first")
	}
	w.allow()
	if !w.s.Told.IsZero() || !w.s.Dark.IsZero() {
		t.Error("allowed, and still told")
	}
}

func TestHeaderAlarms(t *testing.T) {
	backedUp, other := strings.Repeat("a", 64), strings.Repeat("b", 64)
	w := newWorld()
	w.a.LUKSHeader = backedUp
	say := func(header, damage string, slots int, want ...string) {
		t.Helper()
		w.again("key")
		w.f.Request.Claims.Header, w.f.Request.Claims.Damage, w.f.Request.Claims.Slots = header, damage, slots
		d := w.decide()
		if diff := cmp.Diff(want, d.Alarms); diff != "" || d.Verdict != policy.Grant {
			t.Errorf("%s\n%s", d.Verdict, diff)
		}
	}
	say(backedUp, "", 2)
	say("", "", 0)
	say(other, "", 2, policy.AlarmHeader)
	say(other, "", 2)
	say(backedUp, "primary", 2, policy.AlarmDamage)
	say(backedUp, "primary", 2)
	say(backedUp, "secondary", 2, policy.AlarmDamage)
	say(backedUp, "", 3, policy.AlarmSlots)
	say(backedUp, "", 3)
	say(backedUp, "", 2)
	say(backedUp, "primary", 3, policy.AlarmDamage, policy.AlarmSlots)
	w.a.LUKSHeader = "" // no backup is known: only a change is worth a word
	say(backedUp, "", 2)
	say(other, "", 2, policy.AlarmHeader)
}

func TestLastingSilenceOfTheVPN(t *testing.T) {
	w := newWorld()
	unknown(w)
	var told []int
	for minute := range 60 {
		d := w.decide()
		if d.Verdict != policy.Later {
			t.Fatalf("%s", d.Verdict)
		}
		if d.Unexpected {
			told = append(told, minute)
		}
		w.pass(time.Minute)
	}
	if diff := cmp.Diff([]int{15}, told); diff != "" {
		t.Error(diff)
	}
	w.again("key")
	w.at(home)
	w.must(policy.Grant)
	if !w.s.Unplaced.IsZero() {
		t.Error("it is known again, and it is not")
	}
}

func FuzzState(f *testing.F) {
	w := newWorld()
	f.Add([]byte(mustJSON(f, reread(w.s))))
	elsewhere(w)
	w.must(policy.Hold)
	w.approve()
	w.expect(time.Hour)
	f.Add([]byte(mustJSON(f, reread(w.s))))
	w.revoke()
	f.Add([]byte(mustJSON(f, reread(w.s))))
	f.Add([]byte(`{"version":1,"appliance":"attic","waiting":[{"id":"a","asks":["x"]}],"tokens":{"issued":"` + strings.Repeat("ab", 32) + `"}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := policy.Parse("attic", text)
		if err != nil {
			return
		}
		again, err := json.Marshal(s)
		if err != nil {
			return // a time that JSON cannot hold: Update refuses it too
		}
		same, err := policy.Parse("attic", again)
		if err != nil {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
		if third, _ := json.Marshal(same); !bytes.Equal(third, again) {
			t.Errorf("%s\n%s", again, third)
		}
		// Whatever it says: a revoked appliance gets nothing, and one that was not
		// allowed neither; and what follows can be written.
		w := newWorld()
		w.s = s
		d := policy.Decide(w.a, s, w.f)
		if d.Verdict == policy.Grant && s.Standing.State != policy.Enabled {
			t.Errorf("granted under the standing %q", s.Standing.State)
		}
		d.Next.Version = 1
		if out, err := json.Marshal(d.Next); err == nil {
			if _, err := policy.Parse("attic", out); err != nil {
				t.Errorf("what follows cannot be read: %v", err)
			}
		}
	})
}
