package benchtest

import (
	"encoding/csv"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// sample has two lines, of which one lacks a rival, and rounds in changing turns.
func sample() *Table {
	t := &Table{Own: "Farkeep", Notes: []string{"two cores"}}
	fast, slow := Line{}, Line{40 * time.Millisecond, 20}
	add := func(line Line, rival string, round int, wall, cpu time.Duration, up int64) {
		t.Add(Run{Case: "First push", Line: line, Rival: rival, Data: "1 MB", Round: round, Cost: Cost{
			Wall: wall, ClientCPU: cpu, ServerCPU: cpu, ClientPeak: 10 << 20, ServerPeak: int64(round) << 20, Up: up, Down: 500}})
	}
	add(fast, "rsync", 1, 2*time.Second, time.Second, 1_000_000)
	add(fast, "Farkeep", 1, time.Second, time.Second, 250_000)
	add(fast, "Farkeep", 2, 3*time.Second, 2*time.Second, 250_000)
	add(fast, "a<b", 2, 12*time.Second, 0, 2000)
	add(fast, "rsync", 2, 4*time.Second, time.Second, 1_000_000)
	add(slow, "Farkeep", 1, 10*time.Millisecond, time.Second, 10)
	return t
}

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   Spread
	}{
		{nil, Spread{}},
		{[]float64{3}, Spread{3, 3, 3}},
		{[]float64{9, 1, 2}, Spread{2, 1, 9}},
		{[]float64{4, 1, 2, 8}, Spread{3, 1, 8}},
	} {
		if got := SpreadOf(tt.values); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.values, got, tt.want)
		}
	}
}

func TestOf(t *testing.T) {
	wall := func(c Cost) float64 { return c.Wall.Seconds() }
	table := sample()
	if got, want := table.Of("First push", Line{}, "rsync", wall), (Spread{3, 2, 4}); got != want {
		t.Errorf("seconds: %v, want %v", got, want)
	}
	if got, want := table.Ratio("First push", Line{}, "rsync", wall), (Spread{0.625, 0.5, 0.75}); got != want {
		t.Errorf("ratio: %v, want %v", got, want)
	}
	for _, missing := range []Spread{table.Of("Second push", Line{}, "rsync", wall), table.Ratio("First push", Line{Mbit: 20}, "rsync", wall)} {
		if missing != (Spread{}) {
			t.Errorf("not measured, and %v", missing)
		}
	}
}

func TestMarkdown(t *testing.T) {
	var got strings.Builder
	if err := sample().Markdown(&got); err != nil {
		t.Fatal(err)
	}
	// The ratios of the rounds are 1/2 and 3/4, their median is not 2/3.
	want := `- two cores

### First push

| seconds | data | rsync | a<b | Farkeep |
|---|---|---:|---:|---:|
| 0 ms, no limit | 1 MB | 3.0 (2.0–4.0) **0.62 (0.50–0.75)** | 12 **0.25** | 2.0 (1.0–3.0) |
| 40 ms, 20 Mbit/s | 1 MB | – | – | 0.01 |

| 0 ms, no limit, 1 MB | bytes up | bytes down | Farkeep / bytes | CPU s, client + server | Farkeep / CPU | MiB client | MiB server |
|---|---:|---:|---:|---:|---:|---:|---:|
| rsync | 1.0 MB | 500 | **0.25** | 1.00 + 1.00 | **1.50 (1.00–2.00)** | 10 | 2 |
| a<b | 2.0 kB | 500 | **100** | 0.00 + 0.00 |  | 10 | 2 |
| Farkeep | 250.0 kB | 500 |  | 1.50 + 1.50 |  | 10 | 2 |
`
	if d := cmp.Diff(want, got.String()); d != "" {
		t.Error(d)
	}
}

func TestCSV(t *testing.T) {
	var got strings.Builder
	if err := sample().CSV(&got); err != nil {
		t.Fatal(err)
	}
	lines, err := csv.NewReader(strings.NewReader(got.String())).ReadAll()
	if err != nil || len(lines) != 5 {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	byName := map[string]string{}
	for i, name := range lines[0] {
		byName[name] = lines[1][i]
	}
	for name, want := range map[string]string{
		"case": "First push", "data": "1 MB", "round_trip_ms": "0", "mbit_per_s": "0", "rival": "rsync", "rounds": "2",
		"seconds": "3", "seconds_least": "2", "seconds_most": "4", "bytes_up": "1000000", "server_peak_bytes_most": "2097152",
		"time_ratio": "0.625", "time_ratio_least": "0.5", "time_ratio_most": "0.75", "cpu_ratio": "1.5", "bytes_ratio": "0.25",
	} {
		if byName[name] != want {
			t.Errorf("%s: %q, want %q", name, byName[name], want)
		}
	}
}

// Every picture is well-formed, stays in its frame, and is readable on both pages.
func TestPlots(t *testing.T) {
	files := map[string]string{}
	err := sample().Save(func(name string) (io.WriteCloser, error) { return &file{files: files, name: name}, nil })
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 || files["table.md"] == "" || files["table.csv"] == "" {
		t.Fatalf("%d files", len(files))
	}
	for _, name := range []string{"first-push-time.svg", "first-push-cost.svg"} {
		picture := files[name]
		var frame struct {
			Width  int `xml:"width,attr"`
			Height int `xml:"height,attr"`
			Rects  []struct {
				X      int `xml:"x,attr"`
				Y      int `xml:"y,attr"`
				Width  int `xml:"width,attr"`
				Height int `xml:"height,attr"`
			} `xml:"rect"`
			Texts []string `xml:"text"`
		}
		if err := xml.Unmarshal([]byte(picture), &frame); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(frame.Rects) < 5 || len(frame.Texts) < 10 || !strings.Contains(picture, "prefers-color-scheme:dark") {
			t.Errorf("%s:\n%s", name, picture)
		}
		for _, r := range frame.Rects {
			if r.X < 0 || r.Y < 0 || r.Width < 1 || r.X+r.Width > frame.Width || r.Y+r.Height > frame.Height {
				t.Errorf("%s: a bar leaves the frame: %+v", name, r)
			}
		}
	}
}

func TestSaveFails(t *testing.T) {
	full := errors.New("no space left")
	if err := sample().Save(func(name string) (io.WriteCloser, error) {
		if strings.HasSuffix(name, ".csv") {
			return nil, full
		}
		return &file{files: map[string]string{}}, nil
	}); !errors.Is(err, full) {
		t.Error(err)
	}
}

type file struct {
	strings.Builder
	files map[string]string
	name  string
}

func (f *file) Close() error {
	f.files[f.name] = f.String()
	return nil
}
