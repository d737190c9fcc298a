package site

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"time"

	"farkeep/shared/settings"
)

// Bundle is what is publicly known of the newest recovery bundle: enough to say
// whether it still fits the disks. It holds no secret.
type Bundle struct {
	Created time.Time    `toml:"created"` // zero: there is none
	Drilled time.Time    `toml:"drilled"` // when a drill last passed with it; zero: never
	Disks   []BundleDisk `toml:"disk"`
}

// BundleDisk is a disk that the bundle opens.
type BundleDisk struct {
	LUKS   string `toml:"luks_uuid"`
	Header string `toml:"header"` // fingerprint of the header in the bundle (luksheader)
}

// Header is the fingerprint of the disk's header in the bundle, "" where the
// bundle does not open that disk.
func (b Bundle) Header(uuid string) string {
	for _, d := range b.Disks {
		if d.LUKS == uuid {
			return d.Header
		}
	}
	return ""
}

// Stale says in words why the bundle does not serve a disk whose live header has
// the fingerprint header; "" means that it does. Header "" stands for one that is
// not known now.
func (b Bundle) Stale(uuid, header string) string {
	switch known := b.Header(uuid); {
	case b.Created.IsZero():
		return "there is no bundle"
	case known == "":
		return "the bundle has no key of this disk"
	case header != "" && header != known:
		return "the disk has another header than the one in the bundle"
	}
	return ""
}

func (s *Site) validateBundle(v validator) {
	b := s.Bundle
	v.Check(len(b.Disks) <= MaxAppliances, "bundle", "created", 0, "it opens %d disks: %d are the most", len(b.Disks), MaxAppliances)
	v.Check(!b.Created.IsZero() || len(b.Disks) == 0 && b.Drilled.IsZero(), "bundle", "created", 0, "when the bundle was made is missing")
	disks := unique{}
	for i, d := range b.Disks {
		v.Check(settings.IsLUKSUUID(d.LUKS), "bundle.disk", "luks_uuid", i, "%q is not a LUKS UUID", d.LUKS)
		disks.take(v, d.LUKS, "another disk of the bundle", "bundle.disk", "luks_uuid", i)
		v.Check(len(d.Header) == 64 && strings.Trim(d.Header, "0123456789abcdef") == "", "bundle.disk", "header", i, "%q is not the fingerprint of a LUKS header: 64 hexadecimal digits", d.Header)
	}
}

// SetBundle records the newest bundle in place of an older one.
func (d *Document) SetBundle(b Bundle) error {
	b.Created, b.Drilled = b.Created.UTC().Truncate(time.Second), b.Drilled.UTC().Truncate(time.Second)
	block, err := execute("bundle", b)
	if err != nil {
		return err
	}
	eol := "\n"
	if bytes.Contains(d.text, []byte("\r\n")) {
		eol = "\r\n"
	}
	text := strings.TrimRight(withoutBundle(string(d.text)), "\r\n") + eol + strings.ReplaceAll(string(block), "\n", eol)
	changed, err := ParseDocument(d.name, []byte(text))
	if err == nil {
		was := *changed.site
		was.Bundle = d.site.Bundle
		if !reflect.DeepEqual(&was, d.site) || !sameBundle(changed.site.Bundle, b) {
			err = fmt.Errorf("%s: it would be read in another way", d.name)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: [bundle] is written in a way that cannot be changed safely: remove it by hand, and try again", d.name)
	}
	*d = *changed
	return nil
}

func sameBundle(a, b Bundle) bool {
	if !a.Created.Equal(b.Created) || !a.Drilled.Equal(b.Drilled) || len(a.Disks) != len(b.Disks) {
		return false
	}
	for i := range a.Disks {
		if a.Disks[i] != b.Disks[i] {
			return false
		}
	}
	return true
}

// bundleComment is the line above [bundle], as the template writes it.
const bundleComment = "# The newest recovery bundle: written by farkeep-keyserver bundle and drill, no secret."

// withoutBundle is text without the tables of the bundle, and without our own
// comment above them. What a person wrote below a table's last key stays.
func withoutBundle(text string) string {
	var out strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == bundleComment:
			continue
		case strings.HasPrefix(trimmed, "["):
			header := strings.Trim(trimmed, "[] ")
			inside = header == "bundle" || strings.HasPrefix(header, "bundle.")
		case trimmed == "", strings.HasPrefix(trimmed, "#"):
			out.WriteString(line)
			continue
		}
		if !inside {
			out.WriteString(line)
		}
	}
	return out.String()
}

// SameButBundle reports whether two documents say the same of everything but the bundle.
func (d *Document) SameButBundle(other *Document) bool {
	a, b := *d.site, *other.site
	a.Bundle, b.Bundle = Bundle{}, Bundle{}
	return reflect.DeepEqual(&a, &b)
}
