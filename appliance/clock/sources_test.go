package clock

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/clock/clocktest"
)

func TestAgree(t *testing.T) {
	const ms = time.Millisecond
	s := func(port int, offset, distance time.Duration) Sample {
		return Sample{Source: fmt.Sprint(port), Address: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(port)), Offset: offset, Distance: distance}
	}
	year := 365 * 24 * time.Hour
	for _, tt := range []struct {
		name       string
		samples    []Sample
		configured int
		offset     time.Duration
		agreeing   int
		err        error
	}{
		{"all silent", nil, 3, 0, 0, ErrTooFew},
		{"one of three", []Sample{s(1, 0, 10*ms)}, 3, 0, 0, ErrTooFew},
		{"one, and only one is configured", []Sample{s(1, time.Hour, 10*ms)}, 1, time.Hour, 1, nil},
		{"two agree", []Sample{s(1, 10*ms, 10*ms), s(2, 20*ms, 10*ms)}, 2, 15 * ms, 2, nil},
		{"two disagree", []Sample{s(1, 0, 10*ms), s(2, time.Minute, 10*ms)}, 2, 0, 1, ErrDisagree},
		{"one liar of three", []Sample{s(1, 0, 10*ms), s(2, 3*year, 10*ms), s(3, 0, 10*ms)}, 3, 0, 2, nil},
		{"two against two", []Sample{s(1, 0, ms), s(2, 0, ms), s(3, year, ms), s(4, year, ms)}, 4, 0, 2, ErrDisagree},
		{"three against two", []Sample{s(1, 0, ms), s(2, 0, ms), s(3, year, ms), s(4, year, ms), s(5, 0, ms)}, 5, 0, 3, nil},
		{"the same machine twice", []Sample{s(1, year, ms), s(1, year, ms)}, 3, 0, 0, ErrTooFew},
		{"the same machine cannot outvote", []Sample{s(1, year, ms), s(1, year, ms), s(2, 0, ms)}, 3, 0, 1, ErrDisagree},
		{"wide bounds hold a narrow one", []Sample{s(1, 2*time.Second, 3*time.Second), s(2, 0, ms), s(3, 0, ms)}, 3, 0, 3, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			offset, agreeing, err := Agree(tt.samples, tt.configured)
			if !errors.Is(err, tt.err) || agreeing != tt.agreeing || (offset-tt.offset).Abs() > 60*ms {
				t.Errorf("got %v, %d, %v; want %v, %d, %v", offset, agreeing, err, tt.offset, tt.agreeing, tt.err)
			}
		})
	}
}

func TestAsk(t *testing.T) {
	for _, tt := range []struct {
		name   string
		behave clocktest.Behaviour
		now    func() time.Time
		offset time.Duration
		want   string
	}{
		{"honest", clocktest.Behaviour{}, time.Now, 0, ""},
		{"an hour ahead", clocktest.Behaviour{Offset: time.Hour}, time.Now, time.Hour, ""},
		{"asked from 1970", clocktest.Behaviour{Now: func() time.Time { return t0 }}, func() time.Time { return time.Unix(7, 0) }, t0.Sub(time.Unix(7, 0)), ""},
		{"after 2036", clocktest.Behaviour{Now: func() time.Time { return t0.AddDate(12, 0, 0) }}, func() time.Time { return t0 }, t0.AddDate(12, 0, 0).Sub(t0), ""},
		{"told to go away", clocktest.Behaviour{Kiss: "DENY"}, time.Now, 0, "kiss of death"},
		{"not synchronised", clocktest.Behaviour{Unsynced: true}, time.Now, 0, "leap"},
		{"vague", clocktest.Behaviour{Dispersion: 5 * time.Second}, time.Now, 0, "error bound"},
		{"very vague", clocktest.Behaviour{Dispersion: 20 * time.Second}, time.Now, 0, "dispersion"},
		{"garbage", clocktest.Behaviour{Garbage: []byte("hello")}, time.Now, 0, "time source"},
		{"garbage of the right length", clocktest.Behaviour{Garbage: make([]byte, 48)}, time.Now, 0, "time source"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := clocktest.Start(t, tt.behave)
			s, err := Ask(t.Context(), server.Address, tt.now)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v; want %q", err, tt.want)
				}
				return
			}
			if err != nil || (s.Offset-tt.offset).Abs() > time.Second {
				t.Errorf("offset %v, %v; want %v", s.Offset, err, tt.offset)
			}
		})
	}
}

func TestAskEndsWithItsContext(t *testing.T) {
	server := clocktest.Start(t, clocktest.Behaviour{Silent: true})
	var took time.Duration
	for range 3 { // a host that is busy may keep one waiting
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		start := time.Now()
		_, err := Ask(ctx, server.Address, time.Now)
		took = time.Since(start)
		cancel()
		if err == nil {
			t.Error("an answer from a server that says nothing")
		}
		if took < queryTimeout/2 {
			return
		}
	}
	t.Errorf("it took %v every time", took)
}

func TestSourceNames(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7":          "192.0.2.7:123",
		"192.0.2.7:1123":     "192.0.2.7:1123",
		"2001:db8::7":        "[2001:db8::7]:123",
		"[2001:db8::7]":      "[2001:db8::7]:123",
		"[2001:db8::7]:1123": "[2001:db8::7]:1123",
	} {
		got, err := resolve(t.Context(), in)
		if err != nil || len(got) != 1 || got[0].String() != want {
			t.Errorf("%s: %v, %v; want %s", in, got, err, want)
		}
	}
	if _, err := resolve(t.Context(), "192.0.2.7:nonsense"); err == nil {
		t.Error("a port that is none was accepted")
	}
}
