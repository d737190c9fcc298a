package clock

import (
	"testing"
	"time"
)

// The kernel's clock is only read here: the emulated Pi shows that it is set.
func TestKernel(t *testing.T) {
	k := Kernel{}
	if d := time.Since(k.Now()).Abs(); d > time.Minute {
		t.Errorf("the clock is %v off", d)
	}
	first := k.Uptime()
	if second := k.Uptime(); first <= 0 || second < first {
		t.Errorf("uptime %v, then %v", first, second)
	}
	if _, err := Synchronised(); err != nil {
		t.Error(err)
	}
}
