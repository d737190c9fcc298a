// Package runbook writes what a person follows on the worst day: from a disk and a
// bundle to files, on any Linux that has cryptsetup and Borg.
//
// There is one text, a template. [Markdown] fills it with a site's own names, for
// the bundle; [Doc] with an example's, for docs/recovery.md, so that the two cannot
// differ; [Page] makes of it, and of the secrets that are given to it, one page of
// HTML to print. The commands are plain sh that stock Debian runs: package runsteps
// reads them out again, and the drill runs them.
//
// Markdown and Doc hold no secret. Page holds the keys: whoever has it and the disk
// reads the disk.
package runbook

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"text/template"
	"time"

	"farkeep/shared/site"
)

//go:embed templates/runbook.md.tmpl
var text string

// Book is what the runbook of a site says beside the commands.
type Book struct {
	Site         string
	Made         time.Time
	Disks        []Disk
	Repositories []Repository
	KnownBy      string // how the passphrases are known, in the operator's words; "" if he said nothing
	Home         string // name of the Borg server
	KeyServer    string // name of the first key server
	VPN          bool   // our own WireGuard
	Places       bool   // the key server judges where appliances are, by what the VPN says
	ListenPort   int
	Endpoints    []string
}

// Disk is a disk that the bundle opens. The values are of its LUKS header.
type Disk struct {
	Appliance  string
	UUID       string
	Cipher     string
	KeyBits    int // length of the volume key
	SectorSize int // encryption sector, bytes
	DataOffset int64
	Header     string // fingerprint of the header, as package luksheader makes it
}

// OffsetSectors is where the data begins, in the sectors of 512 bytes that cryptsetup counts in.
func (d Disk) OffsetSectors() int64 { return d.DataOffset / 512 }

// Where a repository's Borg key is.
const (
	KeyInRepository = "repokey"     // in the repository itself, under its passphrase
	KeyFile         = "keyfile"     // in a file on the machines that make its backups, under its passphrase
	KeyNone         = "none"        // not encrypted by Borg
	KeyUnknown      = "unknown"     // nobody has looked
	KeyNoBorg       = "directories" // no Borg repository
)

// Repository is a repository as the bundle knows it.
type Repository struct {
	Name string
	Key  string // one of the constants
	Held bool   // the bundle has its key: for a key file what counts, for a repokey a second copy
}

// New is the book of a site; its disks and repositories are added by the caller.
func New(s *site.Site, made time.Time) Book {
	b := Book{Site: s.Name, Made: made.UTC(), Home: s.Home.Name, VPN: s.VPN.Network.IsValid(), ListenPort: s.VPN.ListenPort}
	if len(s.KeyServers) > 0 {
		b.KeyServer = s.KeyServers[0].Name
	}
	for _, a := range s.Appliances {
		b.Places = b.Places || a.KeyPolicy.Place != site.PlaceNone
	}
	for _, e := range s.VPN.Endpoints {
		// A private address is of the house that burned.
		if at, err := netip.ParseAddrPort(e); err != nil || !at.Addr().IsPrivate() {
			b.Endpoints = append(b.Endpoints, e)
		}
	}
	return b
}

// Example is the book of docs/recovery.md: the fixture's site, and a disk for a Pi 4.
func Example(s *site.Site) Book {
	b := New(s, time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC))
	b.Places = true
	b.Disks = []Disk{{Appliance: "attic", UUID: "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11", Cipher: "xchacha20,aes-adiantum-plain64", KeyBits: 256, SectorSize: 4096, DataOffset: 16 << 20}}
	b.Repositories = []Repository{{"photos", KeyInRepository, true}, {"letters", KeyFile, true}}
	return b
}

// Markdown is RUNBOOK.md of a bundle.
func Markdown(b Book) ([]byte, error) { return b.render("intro-bundle") }

// Doc is docs/recovery.md.
func Doc(b Book) ([]byte, error) { return b.render("intro-doc") }

func (b Book) render(intro string) ([]byte, error) {
	if len(b.Disks) == 0 {
		return nil, errors.New("write the runbook: there is no disk to open")
	}
	if len(b.Repositories) == 0 {
		// Which ones there are shows when the disk is open.
		b.Repositories = []Repository{{Name: "NAME", Key: KeyUnknown}}
	}
	t, err := template.New("").Funcs(template.FuncMap{
		"date":            func(t time.Time) string { return t.Format(time.DateOnly) },
		"join":            strings.Join,
		"keyWords":        keyWords,
		"passphraseWords": passphraseWords,
	}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("write the runbook: %w", err)
	}
	var out bytes.Buffer
	for _, part := range []string{intro, "body", "new-primary", "void"} {
		if err := t.ExecuteTemplate(&out, part, b); err != nil {
			return nil, fmt.Errorf("write the runbook: %w", err)
		}
	}
	return out.Bytes(), nil
}

func keyWords(r Repository) string {
	switch r.Key {
	case KeyInRepository:
		if r.Held {
			return "in the repository; a second copy in the bundle"
		}
		return "in the repository"
	case KeyFile:
		if r.Held {
			return "a key file, in the bundle"
		}
		return "**a key file that is not in the bundle: unreadable without it**"
	case KeyNone:
		return "none: Borg did not encrypt it"
	case KeyNoBorg:
		return "none: plain files"
	}
	return "not known when the bundle was made"
}

func passphraseWords(r Repository) string {
	switch r.Key {
	case KeyNone, KeyNoBorg:
		return "none"
	}
	return "needed; Farkeep has never seen it"
}
