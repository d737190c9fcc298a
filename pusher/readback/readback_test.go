package readback

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

func day(n int) time.Time { return time.Date(2026, 5, n, 2, 0, 0, 0, time.UTC) }

// history makes generations 1, 2, ... of these standings, one a day.
func history(standings ...string) (all []pushwire.Generation) {
	for i, s := range standings {
		all = append(all, pushwire.Generation{Repository: "photos", Name: fmt.Sprintf("%06d-%s", i+1, day(i+1).Format("20060102T150405Z")), Committed: day(i + 1), Standing: s})
	}
	return all
}

func TestChoose(t *testing.T) {
	mixed := history("good", "accepted", "suspect", "good", "rejected", "suspect")
	for _, tt := range []struct {
		name   string
		all    []pushwire.Generation
		w      Wanted
		want   int // number; 0: an error
		code   int
		passed int
	}{
		{"newest", history("good", "good"), Wanted{}, 2, 0, 0},
		{"latest", history("good", "good"), Wanted{Name: "latest"}, 2, 0, 0},
		{"latest passes over doubtful ones", mixed, Wanted{Name: "latest"}, 4, 0, 2},
		{"even so", mixed, Wanted{Name: "latest", EvenSuspect: true}, 6, 0, 0},
		{"all doubtful", history("suspect", "rejected"), Wanted{}, 0, hint.ExitRefused, 2},
		{"number", mixed, Wanted{Name: "2"}, 2, 0, 0},
		{"number with zeros", mixed, Wanted{Name: "000002"}, 2, 0, 0},
		{"name", mixed, Wanted{Name: mixed[3].Name}, 4, 0, 0},
		{"suspect by number", mixed, Wanted{Name: "3"}, 0, hint.ExitRefused, 0},
		{"rejected by number", mixed, Wanted{Name: "5"}, 0, hint.ExitRefused, 0},
		{"suspect, knowingly", mixed, Wanted{Name: "3", EvenSuspect: true}, 3, 0, 0},
		{"not there", mixed, Wanted{Name: "7"}, 0, hint.ExitUsage, 0},
		{"no number", mixed, Wanted{Name: "data/0"}, 0, hint.ExitUsage, 0},
		{"a part of a name", mixed, Wanted{Name: "000002-2026"}, 0, hint.ExitUsage, 0},
		{"negative", mixed, Wanted{Name: "-2"}, 0, hint.ExitUsage, 0},
		{"at", mixed, Wanted{At: day(2).Add(time.Hour)}, 2, 0, 0},
		{"at the very moment", mixed, Wanted{At: day(2)}, 2, 0, 0},
		{"at, passing over", mixed, Wanted{At: day(3)}, 2, 0, 1},
		{"before the first", mixed, Wanted{At: day(1).Add(-time.Second)}, 0, hint.ExitUsage, 0},
		{"both", mixed, Wanted{Name: "1", At: day(2)}, 0, hint.ExitUsage, 0},
		{"none", nil, Wanted{}, 0, hint.ExitFailure, 0},
		{"an old appliance's suspect", []pushwire.Generation{{Name: "000001-20260501T020000Z", Suspect: true}}, Wanted{}, 0, hint.ExitRefused, 1},
		{"a standing of tomorrow", history("doubtful"), Wanted{}, 0, hint.ExitRefused, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, passed, err := Choose(tt.all, tt.w)
			if hint.Code(err) != tt.code || len(passed) != tt.passed {
				t.Errorf("%v (code %d, want %d), passed over %d, want %d", err, hint.Code(err), tt.code, len(passed), tt.passed)
			}
			if tt.want > 0 && got.Name != tt.all[tt.want-1].Name {
				t.Errorf("chose %q, want number %d", got.Name, tt.want)
			}
		})
	}
	g := history("suspect")
	g[0].Reasons = []string{"Half of it is gone.", "The id changed."}
	if _, _, err := Choose(g, Wanted{Name: "1"}); !strings.Contains(err.Error(), "Half of it is gone.: The id changed.") || !strings.Contains(hint.Of(err), "--even-suspect") {
		t.Errorf("the refusal says %v", err)
	}
}

// A list is believed only if it is whole, and the one that was announced.
func TestEntries(t *testing.T) {
	var out bytes.Buffer
	w := manifest.NewWriter(&out)
	for _, name := range []string{"a", "b"} {
		if err := w.Add(manifest.Entry{Path: name, Kind: manifest.File, Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	read := func(text []byte, digest string) error {
		got = nil
		_, err := Entries(bytes.NewReader(text), pushwire.Generation{Digest: digest}, func(e manifest.Entry) error {
			got = append(got, e.Path)
			return nil
		})
		return err
	}
	if err := read(out.Bytes(), sum.Digest.String()); err != nil || !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%q, %v", got, err)
	}
	if err := read(out.Bytes(), strings.Repeat("0", 64)); err == nil {
		t.Error("another list than the announced one was believed")
	}
	if err := read(out.Bytes()[:out.Len()-1], sum.Digest.String()); err == nil {
		t.Error("a list that was cut was believed")
	}
	stop := io.ErrClosedPipe
	if _, err := Entries(&out, pushwire.Generation{}, func(manifest.Entry) error { return stop }); err != stop {
		t.Errorf("an error of the reader's: %v", err)
	}
}
