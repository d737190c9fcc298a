package bundle

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/keyserver/runbook"
	"farkeep/keyserver/seal"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/volumekey"

	"golang.org/x/crypto/ssh"
)

// Kind is how a bundle is laid out.
type Kind string

// The kinds.
const (
	Sealed Kind = "sealed" // under a passphrase
	Clear  Kind = "clear"  // for a safe
	Paper  Kind = "paper"  // one page to print
)

// Options say what bundle is made.
type Options struct {
	Site       string // the operator's site folder
	To         string // the new folder
	Kind       Kind
	Passphrase secret.Bytes // of a sealed one; the caller wipes it
	BorgKeys   []string     // folders with key files, and inventories of other machines
	KnownBy    string       // how the passphrases are known
	Tools      []string     // programs to take along
	VolumeKey  bool         // print the volume keys
	Replace    bool         // an older bundle at To gives way
	Now        time.Time
}

// Report is what was made, and what the operator must know of it.
type Report struct {
	Manifest   *Manifest
	Unreadable []string // repositories that need a key file that is not in the bundle
	Unknown    []string // repositories of which nobody knows whether they need one
	Notes      []string
}

func (r *Report) note(format string, args ...any) {
	r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
}

// Create makes a bundle, and records it in the site's site.toml.
func Create(o Options) (*Report, error) {
	r := &Report{}
	doc, err := site.ReadDocument(filepath.Join(o.Site, "site.toml"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = hint.Because(err, "--site names the folder that farkeep-image site init made")
		}
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	s := doc.Site()
	warnings, err := Placement(s, o.To)
	if err != nil {
		return nil, err
	}
	r.Notes = append(r.Notes, warnings...)
	c := newContents()
	defer c.Wipe()
	d, err := disks(s, o.Site, r)
	if err != nil {
		return nil, err
	}
	defer d.wipe()
	m := &Manifest{Format: formatNow, Site: s.Name, Created: o.Now.UTC().Truncate(time.Second), KnownBy: o.KnownBy, Disks: d.disks}
	r.Manifest = m
	borg, err := borgKeys(s, o.BorgKeys, c, m, r)
	if err != nil {
		return nil, err
	}
	if text, err := m.text(); err != nil {
		return nil, err
	} else if _, err := ParseManifest(text); err != nil {
		return nil, hint.Exit(hint.ExitUsage, err) // --passphrases-known-by, which is the one thing from outside
	}
	public := site.Bundle{Created: m.Created}
	for _, disk := range m.Disks {
		public.Disks = append(public.Disks, site.BundleDisk{LUKS: disk.LUKS, Header: disk.Header})
	}
	if slices.Equal(public.Disks, s.Bundle.Disks) {
		public.Drilled = s.Bundle.Drilled // another bundle of the same keys and headers
	}
	if err := doc.SetBundle(public); err != nil {
		return nil, err
	}
	book := m.Book(s, d.headers)
	page, err := runbook.Page(book, d.secrets(o.VolumeKey, borg))
	if err != nil {
		return nil, err
	}
	if o.Kind == Paper {
		paper := newContents()
		defer paper.Wipe()
		if err := errors.Join(paper.put(PageFile, page), paper.put(startFile, startText(s.Name, Paper))); err != nil {
			return nil, err
		}
		if err := paper.writeFolder(o.To, o.Replace); err != nil {
			return nil, err
		}
		return r, record(o.Site, doc)
	}
	markdown, err := runbook.Markdown(book)
	if err != nil {
		return nil, err
	}
	manifestText, err := m.text()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(c.put(RunbookFile, markdown), c.put(PageFile, page), c.put(manifestFile, manifestText), c.put(startFile, startText(s.Name, Clear)),
		d.put(c), siteFiles(o.Site, doc.Text(), c, r), tools(o.Tools, c, r)); err != nil {
		return nil, err
	}
	if err := c.put(sumsFile, c.sums()); err != nil {
		return nil, err
	}
	if o.Kind == Clear {
		err = c.writeFolder(o.To, o.Replace)
	} else {
		err = c.writeSealed(o, s.Name, m.Created)
	}
	if err != nil {
		return nil, err
	}
	return r, record(o.Site, doc)
}

// record writes site.toml, in which the new bundle stands.
func record(folder string, doc *site.Document) error {
	err := atomicfile.Write(filepath.Join(folder, "site.toml"), doc.Text(), 0o644)
	return hint.Because(err, "the bundle is made; site.toml does not name it yet: make room or rights there, and make it once more with --replace")
}

// writeSealed writes the folder of a sealed bundle: the sealed archive, what it is,
// and our own program for who has no age.
func (c *Contents) writeSealed(o Options, name string, made time.Time) error {
	p, err := seal.NewPassphrase(o.Passphrase)
	if err != nil {
		return err
	}
	return inPlaceOf(o.To, o.Replace, func(new string) error {
		out, err := os.OpenFile(filepath.Join(new, "farkeep-"+name+sealedEnd), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer out.Close()
		sealed, err := p.Writer(out)
		if err != nil {
			return err
		}
		if err := errors.Join(c.writeTar(sealed, made), sealed.Close()); err != nil {
			return err
		}
		if err := errors.Join(out.Sync(), out.Close()); err != nil {
			return err
		}
		text := startText(name, Sealed)
		beside := newContents()
		if err := beside.put(startFile, text); err != nil {
			return err
		}
		for _, file := range c.Names() {
			if isTool(file) && path.Base(file) == "farkeep-keyserver" {
				beside.files[file] = c.files[file]
			}
		}
		for _, file := range beside.Names() {
			if err := beside.files[file].write(filepath.Join(new, filepath.FromSlash(file))); err != nil {
				return err
			}
		}
		return nil
	})
}

// startText is the first thing that a person reads; with the line ends of Windows,
// which every other system bears.
func startText(name string, k Kind) []byte {
	var how string
	switch k {
	case Sealed:
		how = `The file farkeep-` + name + sealedEnd + ` holds everything, under a passphrase. On a Debian or
Ubuntu live stick, as root:

  apt-get update; apt-get install -y age
  mkdir -p /root/farkeep
  age --decrypt farkeep-` + name + sealedEnd + ` | tar -x --no-same-owner -C /root/farkeep

and read /root/farkeep/` + Folder + `/` + RunbookFile + `. Without internet, the program in tools does
the same (linux-amd64 for most computers):

  cp tools/linux-amd64/farkeep-keyserver /root/; chmod 755 /root/farkeep-keyserver
  /root/farkeep-keyserver bundle open farkeep-` + name + sealedEnd + ` --to /root/farkeep/` + Folder + `
`
	case Paper:
		how = "Print " + PageFile + " (any browser, on any system), then destroy this copy of it.\n"
	default:
		how = "Open " + PageFile + " in any browser, on any system: it says what to do, step by step.\n" + RunbookFile + " is the same as a text, without the keys.\n"
	}
	text := "Recovery of the backups of the site " + name + "\n\nThis, and the disk, bring the files back when home is gone.\nWhoever has both can read them: keep this where the disk is not, and away from home.\nIt lies outside the kill switch: revoking an appliance does not void it.\n\n" + how
	return []byte(strings.ReplaceAll(text, "\n", "\r\n"))
}

// Book is the runbook's book for a bundle.
func (m *Manifest) Book(s *site.Site, headers map[string]*luksheader.Header) runbook.Book {
	b := runbook.New(s, m.Created)
	b.KnownBy = m.KnownBy
	for _, d := range m.Disks {
		h := headers[d.LUKS]
		b.Disks = append(b.Disks, runbook.Disk{Appliance: d.Appliance, UUID: d.LUKS, Header: d.Header, Cipher: h.Cipher, KeyBits: h.KeySize * 8, SectorSize: h.SectorSize, DataOffset: h.DataOffset})
	}
	for _, r := range m.Repositories {
		b.Repositories = append(b.Repositories, runbook.Repository{Name: r.Name, Key: r.Key, Held: len(r.Keys) > 0})
	}
	return b
}

// opened are the disks of a site, each with the key that was found to open its header.
type opened struct {
	disks   []Disk
	keys    []secret.Bytes
	volumes []secret.Bytes
	backups [][]byte
	headers map[string]*luksheader.Header
}

func (d *opened) wipe() {
	for i := range d.disks {
		d.keys[i].Wipe()
		d.volumes[i].Wipe()
	}
}

func (d *opened) put(c *Contents) error {
	for i, disk := range d.disks {
		if err := errors.Join(c.put(keyName(disk.LUKS), bytes.Clone(d.keys[i].Reveal())), c.put(headerName(disk.LUKS), d.backups[i])); err != nil {
			return err
		}
	}
	return nil
}

func (d *opened) secrets(volumes bool, borg []runbook.BorgKey) runbook.Secrets {
	s := runbook.Secrets{Borg: borg}
	for i := range d.disks {
		keys := runbook.DiskKeys{Recovery: d.keys[i]}
		if volumes {
			keys.Volume = d.volumes[i]
		}
		s.Keys = append(s.Keys, keys)
	}
	return s
}

func keyName(uuid string) string    { return disksFolder + "/" + uuid + ".recovery.key" }
func headerName(uuid string) string { return disksFolder + "/" + uuid + ".luks-header" }

// disks opens the header of every disk of the site with its recovery key.
func disks(s *site.Site, folder string, r *Report) (*opened, error) {
	d := &opened{headers: map[string]*luksheader.Header{}}
	for _, a := range s.Appliances {
		if a.LUKS == "" {
			r.note("%s has no disk yet", a.Name)
			continue
		}
		if err := d.add(a, folder); err != nil {
			d.wipe()
			return nil, err
		}
	}
	if len(d.disks) == 0 {
		return nil, hint.Because(errors.New("the site has no disk: there is nothing to recover"), "farkeep-image disk prepare, or disk adopt, gives an appliance its disk")
	}
	return d, nil
}

func (d *opened) add(a site.Appliance, folder string) error {
	operator := filepath.Join(folder, "operator")
	text, err := readSmall(filepath.Join(operator, path.Base(keyName(a.LUKS))), keywire.MaxKey)
	if err != nil {
		return hint.Because(fmt.Errorf("the recovery key of %s: %w", a.Name, err), "farkeep-image disk made it beside the header's backup; without it, give the disk a new recovery slot: farkeep-image disk rekey")
	}
	key := secret.New(text)
	backup, err := readSmall(filepath.Join(operator, path.Base(headerName(a.LUKS))), luksheader.MaxArea)
	if err != nil {
		key.Wipe()
		return hint.Because(fmt.Errorf("the header backup of %s: %w", a.Name, err), "with the disk attached: cryptsetup luksHeaderBackup DEVICE --header-backup-file %s", filepath.Join(operator, path.Base(headerName(a.LUKS))))
	}
	h, volume, err := openHeader(a.LUKS, backup, key)
	if err == nil && a.LUKSHeader != "" && a.LUKSHeader != h.Fingerprint() {
		volume.Wipe()
		err = hint.Because(errors.New("it is not the header that site.toml names (luks_header)"), "make a new backup of the disk's header, as docs/disk.md says")
	}
	if err != nil {
		key.Wipe()
		return fmt.Errorf("the header backup of %s: %w", a.Name, err)
	}
	d.disks = append(d.disks, Disk{Appliance: a.Name, LUKS: a.LUKS, Header: h.Fingerprint()})
	d.keys, d.volumes, d.backups, d.headers[a.LUKS] = append(d.keys, key), append(d.volumes, volume), append(d.backups, backup), h
	return nil
}

// openHeader proves, in memory, that key opens a header backup of the disk uuid.
func openHeader(uuid string, backup []byte, key secret.Bytes) (*luksheader.Header, secret.Bytes, error) {
	// A backup ends where the data would begin; how long that is, no header says.
	h, err := luksheader.Check(bytes.NewReader(backup), 1<<50)
	if err != nil {
		return nil, secret.Bytes{}, err
	}
	if h.UUID != uuid {
		return nil, secret.Bytes{}, fmt.Errorf("it is of the disk %s", h.UUID)
	}
	if h.Damage != "" {
		return nil, secret.Bytes{}, hint.Because(fmt.Errorf("it is damaged: %s", h.Damage), "make a new backup: cryptsetup luksHeaderBackup")
	}
	volume, err := volumekey.Open(h, key)
	if err != nil {
		return nil, secret.Bytes{}, err
	}
	return h, volume, nil
}

// borgKeys gathers Borg's keys, and says which repositories lack one.
func borgKeys(s *site.Site, folders []string, c *Contents, m *Manifest, r *Report) ([]runbook.BorgKey, error) {
	hosts := []string{""}
	for _, p := range s.Pushers {
		hosts = append(hosts, p.Name)
	}
	all := &Inventory{}
	defer all.Wipe()
	for i, host := range hosts {
		if i > 0 {
			folders = nil // once is enough
		}
		v := Look(s, host, folders)
		all.Repositories, all.Keys, all.Notes = append(all.Repositories, v.Repositories...), append(all.Keys, v.Keys...), append(all.Notes, v.Notes...)
	}
	r.Notes = append(r.Notes, all.Notes...)
	n, strangers := all.named()
	m.Repositories = n.repositories
	if strangers > 0 {
		r.note("%d key files are of no repository that is known here; they are in the bundle all the same", strangers)
	}
	for _, f := range n.files {
		if err := c.put(f.name, f.data); err != nil {
			return nil, err
		}
	}
	var printed []runbook.BorgKey
	for _, repository := range n.repositories {
		switch {
		case repository.unreadable():
			r.Unreadable = append(r.Unreadable, repository.Name)
		case repository.Key == runbook.KeyUnknown:
			r.Unknown = append(r.Unknown, repository.Name)
		case repository.Key == runbook.KeyFile:
			key, err := ParseBorgKey(c.Data(repository.Keys[0]))
			if err != nil {
				return nil, err
			}
			text, err := key.Paper()
			key.Export.Wipe()
			if err != nil {
				return nil, err
			}
			printed = append(printed, runbook.BorgKey{Repository: repository.Name, Text: text})
		}
	}
	return printed, nil
}

// siteTop are the entries of a site folder that rebuild home.
func siteTop(name string) bool {
	return slices.Contains([]string{"README.txt", "home", "pushers", "appliances", "operator"}, name) || strings.HasPrefix(name, "keyserver-")
}

const maxSiteFile = 1 << 20

// siteFiles takes the site folder along. Recovery keys and header backups are in
// disks/ already, those of disks that are gone nobody needs.
func siteFiles(folder string, siteToml []byte, c *Contents, r *Report) error {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := c.put(siteFolder+"/site.toml", bytes.Clone(siteToml)); err != nil {
		return err
	}
	return fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		top, _, _ := strings.Cut(name, "/")
		switch {
		case err != nil:
			return err
		case name == "." || name == "site.toml":
			return nil
		case !siteTop(top):
			if name == top {
				r.note("%s is no part of a site folder, and was left out", filepath.Join(folder, name))
			}
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		case e.IsDir():
			return nil
		case top == "operator" && (strings.HasSuffix(name, ".recovery.key") || strings.HasSuffix(name, ".luks-header")):
			return nil
		case !e.Type().IsRegular():
			return fmt.Errorf("%s is no regular file", filepath.Join(folder, name))
		}
		data, err := readSmall(filepath.Join(folder, name), maxSiteFile)
		if err != nil {
			return err
		}
		if name == "operator/admin_key" {
			if err := isSealedKey(data); err != nil {
				return hint.Because(fmt.Errorf("%s: %w", filepath.Join(folder, name), err), "seal it: ssh-keygen -p -f %s", filepath.Join(folder, name))
			}
		}
		return c.put(siteFolder+"/"+name, data)
	})
}

// isSealedKey refuses an admin key that lies open: a bundle may be read by whom it
// was entrusted to, and the admin key decides about history.
func isSealedKey(text []byte) error {
	_, err := ssh.ParseRawPrivateKey(text)
	var sealed *ssh.PassphraseMissingError
	if errors.As(err, &sealed) {
		return nil
	}
	return errors.New("the admin key is not sealed with a passphrase")
}

// tools takes programs along, each under the processor that it is for.
func tools(files []string, c *Contents, r *Report) error {
	have := map[string]bool{}
	for _, file := range files {
		arch, err := machine(file)
		if err != nil {
			return hint.Exit(hint.ExitUsage, fmt.Errorf("the tool %s: %w", file, err))
		}
		name := filepath.Base(file)
		for _, ending := range []string{"-linux", "-arm64", "-amd64", "-glibc"} {
			if i := strings.Index(name, ending); i > 0 {
				name = name[:i]
			}
		}
		if !settings.IsRepository(name) {
			return hint.Exit(hint.ExitUsage, fmt.Errorf("the tool %s: its name has other characters than letters, digits, dots and dashes", file))
		}
		name = toolsFolder + "/linux-" + arch + "/" + name
		if c.files[name] != nil {
			continue
		}
		in, err := os.Open(file)
		if err != nil {
			return err
		}
		sum, n, err := sumOf(in)
		in.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		if err := c.check(name, n); err != nil {
			return err
		}
		c.files[name], c.total = &File{Name: name, Size: n, Sum: sum, From: file}, c.total+n
		have[path.Base(path.Dir(name))+" "+path.Base(name)] = true
	}
	for _, arch := range []string{"amd64", "arm64"} {
		if !have["linux-"+arch+" farkeep-keyserver"] {
			r.note("no recovery tool for linux-%s is in it: make tools builds it, --tools FILE takes it along. Nothing needs it", arch)
		}
	}
	return nil
}

// machine says what processor a program is for.
func machine(file string) (string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return "", fmt.Errorf("not a Linux program: %w", err)
	}
	defer f.Close()
	switch f.Machine {
	case elf.EM_X86_64:
		return "amd64", nil
	case elf.EM_AARCH64:
		return "arm64", nil
	}
	return "", fmt.Errorf("a program for %s: amd64 and arm64 are what a bundle holds", f.Machine)
}
