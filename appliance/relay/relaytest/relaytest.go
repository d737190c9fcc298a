// Package relaytest is what every relay must do, whatever switches it, as one
// suite, and a pin in memory to run it over. Tests run it over that pin only: a
// line of a kernel is watched as a whole machine switches its disk with it (see
// package relay's line_test.go).
package relaytest

import (
	"testing"
	"testing/synctest"
	"time"

	"farkeep/appliance/relay"

	"periph.io/x/conn/v3/gpio"
	"periph.io/x/conn/v3/physic"
)

// Pin is a pin in memory that remembers every level it was ever at.
type Pin struct {
	Err    error // what Out returns; the level stays as it was
	Levels []gpio.Level
	Halted bool
}

// Out records a level.
func (p *Pin) Out(l gpio.Level) error {
	if p.Err != nil {
		return p.Err
	}
	p.Levels = append(p.Levels, l)
	return nil
}

// Level is the pin's level now; false before the first Out.
func (p *Pin) Level() gpio.Level {
	if len(p.Levels) == 0 {
		return gpio.Low
	}
	return p.Levels[len(p.Levels)-1]
}

func (p *Pin) PWM(gpio.Duty, physic.Frequency) error { return p.Err }
func (p *Pin) Halt() error                           { p.Halted = true; return nil }
func (p *Pin) String() string                        { return "pin in memory" }
func (p *Pin) Name() string                          { return p.String() }
func (p *Pin) Number() int                           { return 0 }
func (p *Pin) Function() string                      { return "Out" }

// Run drives relays on pins that newPin makes. level reads a pin from outside;
// it is called after every change. Each case runs in a synctest bubble.
func Run(t *testing.T, newPin func(t *testing.T) (pin gpio.PinOut, level func() gpio.Level)) {
	for _, polarity := range []struct {
		name      string
		activeLow bool
		on, off   gpio.Level
	}{
		{"active high", false, gpio.High, gpio.Low},
		{"active low", true, gpio.Low, gpio.High},
	} {
		for _, start := range []bool{false, true} {
			name := polarity.name + ", starts off"
			if start {
				name = polarity.name + ", starts on"
			}
			body := func(t *testing.T) {
				pin, level := newPin(t)
				sw, err := relay.NewSwitch(pin, polarity.activeLow, start, time.Now())
				if err != nil {
					t.Fatal(err)
				}
				want := func(on bool) {
					t.Helper()
					wantLevel := polarity.off
					if on {
						wantLevel = polarity.on
					}
					if sw.IsOn() != on || level() != wantLevel {
						t.Errorf("on is %v, level %v; want %v, %v", sw.IsOn(), level(), on, wantLevel)
					}
				}
				want(start)
				if !sw.Switches() {
					t.Error("a pin switches")
				}
				for range 2 {
					if err := sw.Off(); err != nil {
						t.Fatal(err)
					}
					want(false)
				}
				off := time.Now()
				if err := sw.On(); err != nil {
					t.Fatal(err)
				}
				want(true)
				if pause := time.Since(off); pause < relay.MinimumOff-time.Second {
					t.Errorf("on again after %v", pause)
				}
				before := time.Now()
				if err := sw.On(); err != nil {
					t.Fatal(err)
				}
				if time.Since(before) >= time.Second {
					t.Error("on while on waits")
				}
				want(true)
				if err := sw.Off(); err != nil {
					t.Fatal(err)
				}
				want(false)
				if err := sw.Close(); err != nil {
					t.Fatal(err)
				}
			}
			t.Run(name, func(t *testing.T) { synctest.Test(t, body) })
		}
	}
}
