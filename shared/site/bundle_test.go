package site_test

import (
	"strings"
	"testing"
	"time"

	"farkeep/shared/site"
)

var someHeader = strings.Repeat("0123456789abcdef", 4)

func someBundle() site.Bundle {
	return site.Bundle{
		Created: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC),
		Drilled: time.Date(2026, 4, 4, 5, 6, 7, 0, time.UTC),
		Disks:   []site.BundleDisk{{LUKS: disk, Header: someHeader}, {LUKS: strings.Replace(disk, "0b", "0c", 1), Header: strings.Repeat("a", 64)}},
	}
}

func TestSetBundle(t *testing.T) {
	for name, text := range map[string]string{
		"unix": good(t), "windows": strings.ReplaceAll(good(t), "\n", "\r\n"), "no newline at the end": strings.TrimSpace(good(t)),
	} {
		t.Run(name, func(t *testing.T) {
			d := parse(t, text)
			if !d.Site().Bundle.Created.IsZero() || d.Site().Bundle.Stale(disk, "") != "there is no bundle" {
				t.Errorf("before: %+v", d.Site().Bundle)
			}
			b := someBundle()
			length := 0
			for range 3 {
				if err := d.SetBundle(b); err != nil {
					t.Fatal(err)
				}
				if diff := same(&site.Site{Bundle: b}, &site.Site{Bundle: d.Site().Bundle}); diff != "" {
					t.Errorf("-given +read:\n%s", diff)
				}
				if length > 0 && len(d.Text()) != length {
					t.Errorf("writing it again makes %d bytes of %d:\n%s", len(d.Text()), length, d.Text())
				}
				length = len(d.Text())
			}
			if !strings.HasPrefix(string(d.Text()), strings.TrimRight(text, "\r\n")) {
				t.Error("what was there before has changed")
			}
			if name == "windows" && strings.Contains(strings.ReplaceAll(string(d.Text()), "\r\n", ""), "\n") {
				t.Error("two kinds of line end")
			}
			// Others add behind it, and it is replaced all the same.
			if err := d.AddRepository(site.Repository{Name: "docs", Path: "/srv/docs"}); err != nil {
				t.Fatal(err)
			}
			b.Disks, b.Drilled = b.Disks[:1], time.Time{}
			if err := d.SetBundle(b); err != nil {
				t.Fatal(err)
			}
			s := d.Site()
			if len(s.Repositories) != 2 || len(s.Bundle.Disks) != 1 || !s.Bundle.Drilled.IsZero() || strings.Count(string(d.Text()), "[bundle]") != 1 {
				t.Errorf("after: %s", d.Text())
			}
			again, err := site.NewDocument(s)
			if err != nil {
				t.Fatal(err)
			}
			if diff := same(s, again.Site()); diff != "" {
				t.Errorf("-given +read:\n%s", diff)
			}
		})
	}
}

func TestBundleStale(t *testing.T) {
	b := someBundle()
	for _, tt := range []struct{ uuid, header, want string }{
		{disk, someHeader, ""},
		{disk, "", ""},
		{disk, strings.Repeat("b", 64), "another header"},
		{strings.Replace(disk, "0b", "0d", 1), "", "no key of this disk"},
	} {
		got := b.Stale(tt.uuid, tt.header)
		if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s %.8s: %q, want %q", tt.uuid, tt.header, got, tt.want)
		}
	}
}

func TestBundleMistakes(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*site.Bundle)
		want   string
	}{
		"uuid":    {func(b *site.Bundle) { b.Disks[0].LUKS = "x" }, ""},
		"twice":   {func(b *site.Bundle) { b.Disks[1].LUKS = b.Disks[0].LUKS }, ""},
		"header":  {func(b *site.Bundle) { b.Disks[0].Header = "x" }, ""},
		"no date": {func(b *site.Bundle) { b.Created = time.Time{} }, ""},
	} {
		d, b := parse(t, good(t)), someBundle()
		tt.change(&b)
		if err := d.SetBundle(b); err == nil {
			t.Errorf("%s: was written", name)
		}
		if string(d.Text()) != good(t) {
			t.Errorf("%s: the document has changed", name)
		}
	}
	for text, want := range map[string]string{
		"[bundle]\ndrilled = 2026-01-02T03:04:05Z\n":                                       "bundle.created: when the bundle was made is missing",
		"[bundle]\ncreated = 2026-01-02T03:04:05Z\n[[bundle.disk]]\nluks_uuid = \"x\"\n":   `bundle.disk.luks_uuid: "x" is not a LUKS UUID`,
		"[bundle]\ncreated = 2026-01-02T03:04:05Z\nshape = 1\n":                            "unknown key",
		"[[bundle.disk]]\nluks_uuid = \"" + disk + "\"\nheader = \"" + someHeader + "\"\n": "bundle.created: when",
	} {
		if _, err := site.Parse("site.toml", []byte(good(t)+text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want %q", text, err, want)
		}
	}
}
