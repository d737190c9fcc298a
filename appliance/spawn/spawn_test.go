package spawn_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/spawn"
	"farkeep/shared/secret"

	"github.com/google/go-cmp/cmp"
)

type brief struct {
	Password secret.Text
	Mode     string
}

// TestMain lets Run start this test binary as a part.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "part" {
		if err := child(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(name string) error {
	e, err := part.Attach(name, os.Stderr)
	if err != nil {
		return err
	}
	b, err := part.Brief[brief](e)
	if err != nil {
		return err
	}
	e.Alive()
	switch b.Mode {
	case "hang":
		time.Sleep(time.Hour)
	case "long":
		return e.Result(strings.Repeat("x", part.MaxResult))
	case "silent":
		return nil
	case "fail":
		return errors.New("this is how it failed")
	}
	return e.Result(map[string]any{"password": b.Password.Reveal(), "name": e.Name, "env": len(os.Environ())})
}

func TestRun(t *testing.T) {
	e, err := part.New(part.Header{Name: "disk", Host: "attic", Paths: part.FirmwarePaths()}, brief{}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	try := func(mode string, timeout time.Duration) (map[string]any, error) {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		var got map[string]any
		err := spawn.Run(ctx, e, "unlock", brief{Password: "hush", Mode: mode}, &got)
		return got, err
	}
	got, err := try("", time.Minute)
	want := map[string]any{"password": "hush", "name": "unlock", "env": 0.0}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	for _, tt := range []struct {
		mode    string
		timeout time.Duration
		want    string
	}{
		{"hang", 2 * time.Second, "killed"},
		{"long", time.Minute, "exit status 1"},
		{"silent", time.Minute, "unexpected end of JSON"},
		{"fail", time.Minute, "exit status 1"},
	} {
		if _, err := try(tt.mode, tt.timeout); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v; want %q", tt.mode, err, tt.want)
		}
	}
}
