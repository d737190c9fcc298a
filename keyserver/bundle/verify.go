package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"farkeep/keyserver/runbook"
	"farkeep/shared/hint"
	"farkeep/shared/luksheader"
	"farkeep/shared/runsteps"
	"farkeep/shared/secret"
	"farkeep/shared/site"
)

// Verification is what was found about a bundle.
type Verification struct {
	Manifest *Manifest
	Problems []error  // each may carry a hint
	Notes    []string // what is as it should be, and what could not be compared
}

func (v *Verification) problem(err error, next string, args ...any) {
	if next != "" {
		err = hint.Because(err, next, args...)
	}
	v.Problems = append(v.Problems, err)
}

func (v *Verification) note(format string, args ...any) {
	v.Notes = append(v.Notes, fmt.Sprintf(format, args...))
}

// Manifest reads what the bundle says of itself.
func (c *Contents) Manifest() (*Manifest, error) {
	text := c.Data(manifestFile)
	if text == nil {
		return nil, fmt.Errorf("%w: %s is missing", ErrFormat, manifestFile)
	}
	return ParseManifest(text)
}

// Verify checks a bundle: its sums; that each key opens its header, in memory; and,
// with the site's folder, that the headers are the live ones, that every disk and
// every repository's key is there, and that runbook and identities are those of the
// site. live has fingerprints of headers, by UUID, that somebody read just now; they
// win over what site.toml knows.
func (c *Contents) Verify(folder string, live map[string]string) (*Verification, error) {
	m, err := c.Manifest()
	if err != nil {
		return nil, err
	}
	v := &Verification{Manifest: m}
	if sums := c.checkSums(); len(sums) > 0 {
		for _, err := range sums {
			v.problem(err, "take another copy of the bundle, or make a new one")
		}
	} else {
		v.note("%d files, all as their checksums say", len(c.files)-1)
	}
	headers := map[string]*luksheader.Header{}
	for _, d := range m.Disks {
		h, err := c.openDisk(d)
		if err != nil {
			v.problem(fmt.Errorf("the disk of %s: %w", d.Appliance, err), "make a new bundle")
			continue
		}
		headers[d.LUKS] = h
		v.note("%s: the recovery key opens the header", d.Appliance)
	}
	for _, r := range m.Repositories {
		for _, name := range r.Keys {
			key, err := ParseBorgKey(c.Data(name))
			if err == nil && r.ID != "" && key.ID != r.ID {
				err = errors.New("it is of another repository")
			}
			key.Export.Wipe()
			if err != nil {
				v.problem(fmt.Errorf("the Borg key %s: %w", name, err), "make a new bundle")
			}
		}
		switch {
		case r.unreadable():
			v.problem(fmt.Errorf("the repository %s needs a key file that is not in the bundle", r.Name), "farkeep-keyserver bundle borg-keys on the machine that makes its backups, then a new bundle with --borg-keys")
		case r.Key == runbook.KeyUnknown:
			v.note("%s: whether it needs a key file is not known; farkeep-keyserver bundle borg-keys, on its machine, finds out", r.Name)
		}
	}
	if _, err := runsteps.Parse(c.Data(RunbookFile)); err != nil {
		v.problem(err, "make a new bundle")
	}
	if folder == "" {
		v.note("not compared with the site: --site FOLDER does it")
		return v, nil
	}
	doc, err := site.ReadDocument(filepath.Join(folder, "site.toml"))
	if err != nil {
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	c.compare(v, doc.Site(), folder, live, headers)
	return v, nil
}

func (c *Contents) openDisk(d Disk) (*luksheader.Header, error) {
	text, backup := c.Data(keyName(d.LUKS)), c.Data(headerName(d.LUKS))
	if text == nil || backup == nil {
		return nil, errors.New("its key or its header is missing")
	}
	h, volume, err := openHeader(d.LUKS, backup, secret.New(text))
	if err != nil {
		return nil, err
	}
	volume.Wipe()
	if h.Fingerprint() != d.Header {
		return nil, fmt.Errorf("its header is not the one that %s names", manifestFile)
	}
	return h, nil
}

// compare finds what has changed at the site since the bundle was made.
func (c *Contents) compare(v *Verification, s *site.Site, folder string, live map[string]string, headers map[string]*luksheader.Header) {
	m := v.Manifest
	const anew = "make a new bundle: farkeep-keyserver bundle create"
	if s.Name != m.Site {
		v.problem(fmt.Errorf("the bundle is of the site %s, and this is %s", m.Site, s.Name), "name the right one")
		return
	}
	for _, a := range s.Appliances {
		if a.LUKS == "" {
			continue
		}
		now, from := live[a.LUKS], "--live"
		if now == "" {
			now, from = a.LUKSHeader, "site.toml"
		}
		known := ""
		for _, d := range m.Disks {
			if d.LUKS == a.LUKS {
				known = d.Header
			}
		}
		switch {
		case known == "":
			v.problem(fmt.Errorf("%s: its disk %s is not in the bundle", a.Name, a.LUKS), anew)
		case now == "":
			v.note("%s: the live header is not known here; farkeep-pusher status shows its digest, --live UUID=DIGEST compares", a.Name)
		case now != known:
			v.problem(fmt.Errorf("%s: the header in the bundle is not the live one (%s)", a.Name, from), "back the header up again (docs/disk.md), then "+anew)
		case from == "--live":
			v.note("%s: the header is the live one", a.Name)
		default:
			v.note("%s: the header is the one that site.toml names; --live compares with what the disk has", a.Name)
		}
	}
	have := map[string]bool{}
	for _, r := range m.Repositories {
		have[r.Name] = true
	}
	for _, r := range s.Repositories {
		if !have[r.Name] {
			v.problem(fmt.Errorf("the repository %s came after the bundle: whether its key is in it nobody knows", r.Name), anew)
		}
	}
	if len(headers) == len(m.Disks) {
		book := m.Book(s, headers)
		want, err := runbook.Markdown(book)
		if err != nil {
			v.problem(err, "")
		} else if !bytes.Equal(want, c.Data(RunbookFile)) {
			v.problem(errors.New("the runbook is not what this site and this version of Farkeep would write"), anew)
		} else {
			v.note("the runbook is this site's")
		}
	}
	c.compareSite(v, folder)
}

// compareSite compares the site's files with the bundle's copy. In site.toml the
// [bundle] itself does not count.
func (c *Contents) compareSite(v *Verification, folder string) {
	now := newContents()
	defer now.Wipe()
	doc, err := site.ReadDocument(filepath.Join(folder, "site.toml"))
	if err == nil {
		err = siteFiles(folder, nil, now, &Report{})
	}
	if err != nil {
		v.problem(fmt.Errorf("compare the site's files: %w", err), "")
		return
	}
	var changed []string
	for _, name := range now.Names() {
		if name != siteFolder+"/site.toml" && !bytes.Equal(now.Data(name), c.Data(name)) {
			changed = append(changed, strings.TrimPrefix(name, siteFolder+"/"))
		}
	}
	for _, name := range c.Names() {
		if strings.HasPrefix(name, siteFolder+"/") && now.files[name] == nil {
			changed = append(changed, strings.TrimPrefix(name, siteFolder+"/")+" (gone)")
		}
	}
	if was, err := site.ParseDocument("site.toml", c.Data(siteFolder+"/site.toml")); err != nil {
		v.problem(fmt.Errorf("the bundle's %w", err), "make a new bundle")
	} else if !was.SameButBundle(doc) {
		changed = append(changed, "site.toml")
	}
	if len(changed) > 0 {
		v.problem(fmt.Errorf("changed at the site since: %s", strings.Join(changed, ", ")), "make a new bundle: farkeep-keyserver bundle create")
		return
	}
	v.note("what rebuilds home is as the site has it")
}
