package part_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
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
