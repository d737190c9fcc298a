// Package relay switches the disk's power: a relay on a GPIO line, or none at
// all.
//
// The line gets its level in the same request that makes it an output, so the
// relay does not click when the program starts. What the line does before that
// is the boot loader's business (config.txt, "gpio=17=op,dl"); what it does
// after the program has died is the kernel's: with the module parameter
// pinctrl_bcm2835.persist_gpio_outputs=Y it stays as it was, without it the pin
// becomes an input and the relay falls to its idle position.
//
// A switch keeps the power off for at least [MinimumOff] before it turns it on
// again: a disk that is spinning down when power returns may park its heads
// twice, and a USB bridge whose capacitors never emptied may not start.
package relay

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/gpio"
)

// MinimumOff is how long the power stays off at the least, once off.
const MinimumOff = 5 * time.Second

// Switch turns the disk's power on and off. It is safe for concurrent use.
type Switch interface {
	// On turns the power on. It blocks for what is left of MinimumOff.
	On() error
	// Off turns the power off. The caller has closed the disk before.
	Off() error
	// IsOn says what the switch was told last.
	IsOn() bool
	// Switches says whether Off really cuts the power.
	Switches() bool
	// Close lets go of the line without changing what it was told.
	Close() error
}

// Open returns the switch that s describes, turned on or off as the caller
// found the disk, without a pulse.
func Open(s settings.Relay, on bool) (Switch, error) {
	switch s.Driver {
	case "none":
		return AlwaysOn{}, nil
	case "gpio":
	default:
		return nil, fmt.Errorf("relay: %q is neither gpio nor none", s.Driver)
	}
	line, err := FindLine(s.Chip, s.Line)
	if err != nil {
		return nil, err
	}
	// Off since when? A line that is no output yet has not powered a disk since
	// the machine started; one that is was left so by a process that died.
	offSince := time.Now()
	if used, err := line.IsOutput(); err == nil && !used {
		offSince = offSince.Add(-uptime())
	}
	sw, err := NewSwitch(line, s.Active == "low", on, offSince)
	if err != nil {
		return nil, errors.Join(err, line.Halt())
	}
	return sw, nil
}

func uptime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// AlwaysOn stands for a disk with a supply of its own.
type AlwaysOn struct{}

func (AlwaysOn) On() error      { return nil }
func (AlwaysOn) Off() error     { return nil }
func (AlwaysOn) IsOn() bool     { return true }
func (AlwaysOn) Switches() bool { return false }
func (AlwaysOn) Close() error   { return nil }

// pinSwitch drives a relay on a pin.
type pinSwitch struct {
	pin       gpio.PinOut
	activeLow bool

	mu       sync.Mutex // guards the fields below and the order of levels
	on       bool
	offSince time.Time
}

// NewSwitch drives the relay on pin, starting on or off; offSince is when the
// power went off, for a switch that starts off.
func NewSwitch(pin gpio.PinOut, activeLow, on bool, offSince time.Time) (Switch, error) {
	s := &pinSwitch{pin: pin, activeLow: activeLow, on: on, offSince: offSince}
	if err := pin.Out(s.level(on)); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	return s, nil
}

func (s *pinSwitch) level(on bool) gpio.Level { return gpio.Level(on != s.activeLow) }

func (s *pinSwitch) On() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.on {
		return nil
	}
	time.Sleep(time.Until(s.offSince.Add(MinimumOff)))
	if err := s.pin.Out(s.level(true)); err != nil {
		return fmt.Errorf("turn the relay on: %w", err)
	}
	s.on = true
	return nil
}

func (s *pinSwitch) Off() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Said again even if it is off already: it costs nothing, and dark matters.
	if err := s.pin.Out(s.level(false)); err != nil {
		return fmt.Errorf("turn the relay off: %w", err)
	}
	if s.on {
		s.on, s.offSince = false, time.Now()
	}
	return nil
}

func (s *pinSwitch) IsOn() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.on
}

func (s *pinSwitch) Switches() bool { return true }

func (s *pinSwitch) Close() error { return s.pin.Halt() }
