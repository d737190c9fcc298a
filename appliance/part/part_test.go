package part_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
)

type brief struct {
	Password secret.Text
	Age      settings.Duration
	Mode     string
}

// TestMain lets Spawn start this test binary as a part.
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
		select {}
	case "long":
		return e.Result(strings.Repeat("x", part.MaxResult))
	case "silent":
		return nil
	case "fail":
		return errors.New("this is how it failed")
	}
	return e.Result(map[string]any{"password": b.Password.Reveal(), "name": e.Name, "env": len(os.Environ())})
}

func header() part.Header {
	return part.Header{Name: "unlock", Host: "attic", Paths: part.FirmwarePaths(), Firmware: true}
}

func TestBriefArrivesOnce(t *testing.T) {
	want := brief{Password: "hush", Age: settings.Duration(time.Hour), Mode: "x"}
	var pipe bytes.Buffer
	if err := part.Send(&pipe, header(), want); err != nil {
		t.Fatal(err)
	}
	e, err := part.Receive(&pipe)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(header(), e.Header); diff != "" {
		t.Error(diff)
	}
	got, err := part.Brief[brief](e)
	if err != nil || got != want {
		t.Errorf("got %#v, %v", got, err)
	}
	if _, err := part.Brief[brief](e); err == nil {
		t.Error("the brief was given twice")
	}
}

func TestBadBriefs(t *testing.T) {
	named := func(name string) part.Header { h := header(); h.Name = name; return h }
	relative := header()
	relative.Paths.State = "state"
	for _, tt := range []struct {
		name  string
		h     part.Header
		brief any
		want  string
	}{
		{"name", named("../x"), brief{}, "is not the name of a part"},
		{"folder", relative, brief{}, "not an absolute folder"},
		{"nothing exported", header(), secret.New(nil), "no exported fields"},
		{"too long", header(), brief{Mode: strings.Repeat("x", part.MaxBrief)}, "more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := part.Send(io.Discard, tt.h, tt.brief)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want %q", err, tt.want)
			}
		})
	}
	for _, in := range []string{"", "garbage", strings.Repeat("x", part.MaxBrief+1)} {
		if _, err := part.Receive(strings.NewReader(in)); err == nil {
			t.Errorf("%d bytes of garbage were accepted", len(in))
		}
	}
}

func TestAliveIsCheapAndNeverFails(t *testing.T) {
	var beats bytes.Buffer
	e, err := part.New(header(), brief{}, slog.New(slog.DiscardHandler), &beats)
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		e.Alive()
	}
	if beats.Len() != 1 {
		t.Errorf("%d bytes in an instant", beats.Len())
	}
	r, w := io.Pipe()
	r.Close()
	gone, err := part.New(header(), brief{}, slog.New(slog.DiscardHandler), w)
	if err != nil {
		t.Fatal(err)
	}
	gone.Alive()
	gone.Alive()
}

func TestLoopBeatsAndStops(t *testing.T) {
	var beats bytes.Buffer
	e, err := part.New(header(), brief{}, slog.New(slog.DiscardHandler), &beats)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	if err := e.Loop(ctx, time.Millisecond, func(context.Context) error {
		if n++; n == 3 {
			cancel()
		}
		return nil
	}); err != nil || n != 3 || beats.Len() == 0 {
		t.Errorf("%d steps, %d beats, %v", n, beats.Len(), err)
	}
	broken := errors.New("broken")
	if err := e.Loop(t.Context(), time.Hour, func(context.Context) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

func TestSpawn(t *testing.T) {
	e, err := part.New(header(), brief{}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	spawn := func(mode string, timeout time.Duration) (map[string]any, error) {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		var got map[string]any
		err := part.Spawn(ctx, e, "unlock", brief{Password: "hush", Mode: mode}, &got)
		return got, err
	}
	got, err := spawn("", 20*time.Second)
	want := map[string]any{"password": "hush", "name": "unlock", "env": 0.0}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	for _, tt := range []struct {
		mode    string
		timeout time.Duration
		want    string
	}{
		{"hang", 300 * time.Millisecond, "killed"},
		{"long", 20 * time.Second, "exit status 1"},
		{"silent", 20 * time.Second, "unexpected end of JSON"},
		{"fail", 20 * time.Second, "exit status 1"},
	} {
		if _, err := spawn(tt.mode, tt.timeout); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v; want %q", tt.mode, err, tt.want)
		}
	}
}

func TestByHandIsRefused(t *testing.T) {
	if _, err := part.Attach("unlock", io.Discard); err == nil || !strings.Contains(err.Error(), "started by the supervisor") {
		t.Errorf("got %v", err)
	}
}

func FuzzReceive(f *testing.F) {
	var ok bytes.Buffer
	if err := part.Send(&ok, header(), brief{Mode: "x"}); err != nil {
		f.Fatal(err)
	}
	f.Add(ok.Bytes())
	f.Add(ok.Bytes()[:ok.Len()/2])
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := part.Receive(bytes.NewReader(in))
		if err != nil {
			return
		}
		// Whatever is accepted can be sent on: names and folders were checked.
		if err := part.Send(io.Discard, e.Header, brief{}); err != nil {
			t.Error(err)
		}
	})
}
