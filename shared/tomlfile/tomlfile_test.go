package tomlfile_test

import (
	"errors"
	"strings"
	"testing"

	"farkeep/shared/tomlfile"
)

type config struct {
	Name string `toml:"name"`
	Disk struct {
		Percent int `toml:"percent"`
	} `toml:"disk"`
}

func TestParse(t *testing.T) {
	tests := []struct{ name, text, wantErr string }{
		{"plain", "name = 'a'\n[disk]\npercent = 95\n", ""},
		{"byte order mark and CRLF", "\xef\xbb\xbfname = 'a'\r\n[disk]\r\npercent = 95\r\n", ""},
		{"unknown key", "name = 'a'\n\n[disk]\npercnt = 95\n", "f.toml:4: disk.percnt: unknown key"},
		{"unknown table", "name = 'a'\n[disc]\nx = 1\n", "f.toml:2: disc: unknown key"},
		{"wrong type", "name = 'a'\n[disk]\npercent = 'many'\n", "f.toml:3: disk.percent: a whole number is wanted here, this is a TOML string"},
		{"wrong type for a text", "name = 1\n", "f.toml:1: name: a text in quotes is wanted here, this is a TOML integer"},
		{"wrong type for a table", "disk = true\n", "f.toml:1: disk: a table is wanted here, this is a TOML boolean"},
		{"syntax", "name = 'a\n", "f.toml:1: "},
		{"set twice", "name = 'a'\nname = 'b'\n", "f.toml"},
		{"too large", strings.Repeat("# comment\n", tomlfile.MaxSize/10+1), "larger than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var c config
			err := tomlfile.Parse("f.toml", []byte(tt.text), &c)
			if tt.wantErr == "" {
				if err != nil || c.Name != "a" || c.Disk.Percent != 95 {
					t.Fatalf("got %+v, %v", c, err)
				}
				return
			}
			var e *tomlfile.Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.wantErr) {
				t.Fatalf("got %v; want it to contain %q", err, tt.wantErr)
			}
		})
	}
}

func TestLine(t *testing.T) {
	text := []byte("name = 1\n[one]\nname = 2\n[[peer]] # first\nname = 3\n[[peer]]\n[peer.route]\nto = 4\n[[peer]]\nname = 5\n")
	for _, tt := range []struct {
		table, key string
		n, want    int
	}{
		{"", "name", 0, 1}, {"one", "name", 0, 3}, {"peer", "name", 0, 5}, {"peer", "name", 2, 10},
		{"peer", "name", 1, 6}, // not set there: the header
		{"peer.route", "to", 1, 8}, {"peer.route", "to", 0, 0},
		{"one", "none", 0, 2}, {"peer", "name", 3, 0}, {"", "none", 0, 0},
	} {
		if got := tomlfile.Line(text, tt.table, tt.key, tt.n); got != tt.want {
			t.Errorf("Line(%q, %q, %d) = %d; want %d", tt.table, tt.key, tt.n, got, tt.want)
		}
	}
}

func TestChecker(t *testing.T) {
	c := tomlfile.NewChecker("f.toml", []byte("name = 'a'\n[disk]\npercent = 95\n"))
	c.Check(true, "", "name", 0, "not told")
	if err := c.Err(); err != nil {
		t.Fatalf("without a mistake: %v", err)
	}
	c.Check(false, "disk", "percent", 0, "%d is too many", 95)
	c.Check(false, "", "name", 0, "a later one")
	var e *tomlfile.Error
	if err := c.Err(); !errors.As(err, &e) || err.Error() != "f.toml:3: disk.percent: 95 is too many" {
		t.Errorf("got %v; want the first mistake", err)
	}
	c = tomlfile.NewChecker("f.toml", nil)
	c.Check(false, "", "name", 0, "is missing")
	if got, want := c.Err().Error(), "f.toml: name: is missing"; got != want {
		t.Errorf("got %q; want %q", got, want)
	}
}
