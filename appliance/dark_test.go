package main

import "testing"

// A push of plain files does not ask whether the disk is open, and one of a disk that
// was open may meet it closing: what it hears then is to wake it, not that it failed.
func TestPushWakesADarkDisk(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	h := newHome(t, a.client(t, &line{}))
	h.write(map[string]string{"letter": noise(1, 100_000)})
	a.closed.Store(1)
	if o := h.push(); o.Err != nil || !o.New {
		t.Errorf("%+v", o)
	}
	if a.closed.Load() >= 0 {
		t.Error("the disk was never found closed, and asked for again")
	}
}
