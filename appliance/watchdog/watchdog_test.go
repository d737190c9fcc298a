package watchdog

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFindAndChoose(t *testing.T) {
	root := t.TempDir()
	for name, id := range map[string]string{"watchdog0": software, "watchdog1": "Broadcom BCM2835 Watchdog timer"} {
		dir := filepath.Join(root, "sys/class/watchdog", name)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "identity"), []byte(id+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Find(root)
	if err != nil {
		t.Fatal(err)
	}
	want := []Device{
		{"Broadcom BCM2835 Watchdog timer", filepath.Join(root, "dev/watchdog1")},
		{software, filepath.Join(root, "dev/watchdog0")},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	for word, identity := range map[string]string{"": want[0].Identity, "softdog": software} {
		if d, err := Choose(got, word); err != nil || d.Identity != identity {
			t.Errorf("%q: %v, %v", word, d, err)
		}
	}
	for _, tt := range []struct {
		devices []Device
		word    string
	}{{got, "none"}, {nil, ""}, {want[:1], "softdog"}} {
		if d, err := Choose(tt.devices, tt.word); !errors.Is(err, ErrNone) {
			t.Errorf("%v %q: %v, %v", tt.devices, tt.word, d, err)
		}
	}
	if d, err := Choose(want[1:], ""); err != nil || d.Identity != software {
		t.Errorf("softdog is better than none: %v, %v", d, err)
	}
}

func TestNotFedWhileUnhealthy(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var log strings.Builder
	tick := make(chan time.Time)
	health := []error{nil, errors.New("keeper is down"), errors.New("keeper is down"), nil}
	var fed []int
	n := 0
	done := make(chan struct{})
	go func() {
		defer close(done)
		feed(ctx, tick, func() error { n++; return health[n-1] }, func() error { fed = append(fed, n); return nil },
			slog.New(slog.NewTextHandler(&log, nil)))
	}()
	for range len(health) - 1 {
		tick <- time.Time{}
	}
	cancel()
	<-done
	if diff := cmp.Diff([]int{1, 4}, fed); diff != "" {
		t.Error("fed in rounds: ", diff)
	}
	if strings.Count(log.String(), "keeper is down") != 1 {
		t.Errorf("the log says it not exactly once: %s", log.String())
	}
}

// Closing must not write the byte that disarms.
func TestCloseLeavesItArmed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "watchdog0")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := &Watchdog{f: f, log: slog.New(slog.DiscardHandler)}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); strings.ContainsRune(string(got), 'V') {
		t.Errorf("wrote %q", got)
	}
}
