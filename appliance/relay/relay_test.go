package relay_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"farkeep/appliance/relay"
	"farkeep/appliance/relay/relaytest"
	"farkeep/shared/settings"

	"periph.io/x/conn/v3/gpio"
)

func TestPinInMemory(t *testing.T) {
	relaytest.Run(t, func(t *testing.T) (gpio.PinOut, func() gpio.Level) {
		pin := &relaytest.Pin{}
		return pin, pin.Level
	})
}

// The first level that the relay ever sees must be the wanted one.
func TestNoPulse(t *testing.T) {
	for _, activeLow := range []bool{false, true} {
		for _, on := range []bool{false, true} {
			pin := &relaytest.Pin{}
			if _, err := relay.NewSwitch(pin, activeLow, on, time.Now()); err != nil {
				t.Fatal(err)
			}
			if want := []gpio.Level{gpio.Level(on != activeLow)}; !slices.Equal(pin.Levels, want) {
				t.Errorf("active low %v, on %v: levels %v, want %v", activeLow, on, pin.Levels, want)
			}
		}
	}
}

func TestMinimumOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pin := &relaytest.Pin{}
		long := time.Now().Add(-time.Hour)
		sw, err := relay.NewSwitch(pin, false, false, long)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := sw.On(); err != nil || time.Since(begin) != 0 {
			t.Errorf("off for an hour, yet it waited %v, %v", time.Since(begin), err)
		}
		if err := sw.Off(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if err := sw.Off(); err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		if err := sw.On(); err != nil || time.Since(begin) != relay.MinimumOff-2*time.Second {
			t.Errorf("waited %v, %v: a second Off must not begin the pause anew", time.Since(begin), err)
		}
	})
}

func TestPinFails(t *testing.T) {
	pin := &relaytest.Pin{Err: errors.New("no such line")}
	if _, err := relay.NewSwitch(pin, false, false, time.Time{}); err == nil {
		t.Error("a pin that fails makes no switch")
	}
	pin.Err = nil
	sw, err := relay.NewSwitch(pin, false, false, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	pin.Err = errors.New("gone")
	if err := sw.On(); err == nil || sw.IsOn() {
		t.Errorf("on: %v, IsOn %v", err, sw.IsOn())
	}
	pin.Err = nil
	if err := sw.On(); err != nil {
		t.Fatal(err)
	}
	pin.Err = errors.New("gone")
	if err := sw.Off(); err == nil || !sw.IsOn() {
		t.Errorf("off: %v, IsOn %v", err, sw.IsOn())
	}
}

func TestOpen(t *testing.T) {
	sw, err := relay.Open(settings.Relay{Driver: "none"}, false)
	if err != nil || !sw.IsOn() || sw.Switches() || sw.Off() != nil || !sw.IsOn() {
		t.Errorf("none: %v, %v", sw, err)
	}
	if _, err := relay.Open(settings.Relay{Driver: "gpio", Chip: "no-such-chip", Line: 17}, false); err == nil || !strings.Contains(err.Error(), "no-such-chip") {
		t.Errorf("a chip that is not there: %v", err)
	}
	if _, err := relay.Open(settings.Relay{Driver: "usb"}, false); err == nil {
		t.Error("an unknown driver")
	}
}
