//go:build vm

package torture_test

import (
	"log/slog"
	"os"
	"testing"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/stage/stagetest"
	"farkeep/image/torture"
)

// What a long run is told besides: until when cuts may begin (RFC 3339), and an
// image that was built already.
const (
	untilVariable = "FARKEEP_TORTURE_UNTIL"
	imageVariable = "FARKEEP_TORTURE_IMAGE"
	boardVariable = "FARKEEP_TORTURE_BOARD"
)

// TestPowerCuts cuts the power of an emulated appliance in the middle of pushes.
// What its disk had not been told to flush may be lost with it.
func TestPowerCuts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test mounts disk images: run it as root")
	}
	plan := torture.CutPlan{Machine: emulate.Generic, Cuts: 2, Image: os.Getenv(imageVariable)}
	if n := number(t, cutsVariable); n > 0 {
		t.Parallel()
		plan.Cuts, plan.Faults = int(n), int(n)/8
	}
	if board := os.Getenv(boardVariable); board != "" {
		plan.Machine = emulate.Machine(board)
	}
	if text := os.Getenv(untilVariable); text != "" {
		var err error
		if plan.Until, err = time.Parse(time.RFC3339, text); err != nil {
			t.Fatalf("%s: %v", untilVariable, err)
		}
	}
	log := newTail(t)
	figures, err := torture.Cut(t.Context(), torture.Options{
		Seed: seed(t), Dir: open(t), Bin: stagetest.Programs(t), Out: t.Output(), Log: log, Stage: slog.New(slog.NewTextHandler(log, nil)),
	}, plan)
	t.Logf("figures:\n%s", figures)
	if err != nil {
		t.Logf("the stage said:\n%s", log)
		t.Fatal(err)
	}
}
