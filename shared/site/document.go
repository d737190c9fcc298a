package site

import (
	"bytes"
	_ "embed"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"text/template"
	"time"

	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"
)

//go:embed site.toml.tmpl
var fileTemplate string

// Document is a site.toml as a text that people edit too. Changes are made to
// the text, so that comments, order and whatever else a person wrote stay as
// they are; after each change the text is parsed again, and a change that would
// not be read back as meant is refused and leaves the document as it was.
type Document struct {
	name string
	text []byte
	site *Site
}

// NewDocument writes a site for the first time, with comments.
func NewDocument(s *Site) (*Document, error) {
	text, err := execute("site", s)
	if err != nil {
		return nil, err
	}
	return ParseDocument("site.toml", text)
}

// ReadDocument reads and validates the file at path.
func ReadDocument(path string) (*Document, error) {
	text, err := tomlfile.ReadText(path)
	if err != nil {
		return nil, err
	}
	return ParseDocument(path, text)
}

// ParseDocument validates text; name stands for it in errors.
func ParseDocument(name string, text []byte) (*Document, error) {
	s, err := Parse(name, text)
	if err != nil {
		return nil, err
	}
	return &Document{name: name, text: bytes.Clone(text), site: s}, nil
}

// Site is what the document says. It must not be changed.
func (d *Document) Site() *Site { return d.site }

// Text is the document itself. It must not be changed.
func (d *Document) Text() []byte { return d.text }

// AddAppliance appends an appliance.
func (d *Document) AddAppliance(a Appliance) error { return d.add("appliance", a) }

// AddKeyServer appends a key server.
func (d *Document) AddKeyServer(k KeyServer) error { return d.add("key_server", k) }

// AddPusher appends a further pusher.
func (d *Document) AddPusher(p Pusher) error { return d.add("pusher", p) }

// AddRepository appends a repository.
func (d *Document) AddRepository(r Repository) error { return d.add("repository", r) }

// AddFolder appends a folder of repositories.
func (d *Document) AddFolder(f Folder) error { return d.add("repository_folder", f) }

// AddDirectory appends a directory target.
func (d *Document) AddDirectory(t Directory) error { return d.add("directory_target", t) }

// add appends an element of an array of tables: TOML allows that at the end of
// a file, whatever stands before it.
func (d *Document) add(table string, element any) error {
	block, err := execute(table, element)
	if err != nil {
		return err
	}
	text := bytes.TrimRight(d.text, "\n")
	eol := "\n"
	if bytes.Contains(text, []byte("\r\n")) {
		eol = "\r\n" // whoever edits the file on Windows keeps one kind of line end
		text = bytes.TrimRight(text, "\r\n")
	}
	whole := string(text) + eol + strings.ReplaceAll(string(block), "\n", eol)
	return d.replace([]byte(whole))
}

func (d *Document) replace(text []byte) error {
	changed, err := ParseDocument(d.name, text)
	if err != nil {
		return err
	}
	*d = *changed
	return nil
}

// SetLUKS records the LUKS UUID of an appliance's disk. Where the appliance has
// another one already, that is replaced: a new disk took its place.
func (d *Document) SetLUKS(appliance, uuid string) error {
	index := -1
	for i, a := range d.site.Appliances {
		if a.Name == appliance {
			index = i
		}
	}
	if index < 0 {
		return fmt.Errorf("%s: there is no appliance %q", d.name, appliance)
	}
	if !settings.IsLUKSUUID(uuid) {
		return fmt.Errorf("record the disk of %s: %q is not a LUKS UUID", appliance, uuid)
	}
	if d.site.Appliances[index].LUKS == uuid {
		return nil
	}
	// Line answers with the key's line, or with the header's where there is none.
	n := tomlfile.Line(d.text, "appliance", "luks_uuid", index)
	if n == 0 {
		return d.byHand(appliance, uuid)
	}
	lines := strings.SplitAfter(string(d.text), "\n")
	line, end := strings.TrimRight(lines[n-1], "\r\n"), lines[n-1][len(strings.TrimRight(lines[n-1], "\r\n")):]
	assignment := "luks_uuid = " + settings.Quote(uuid)
	if strings.HasPrefix(strings.TrimSpace(line), "[") {
		if end == "" {
			end = "\n"
		}
		lines[n-1] = line + end + assignment + end
	} else {
		lines[n-1] = assignment + end
	}
	changed, err := ParseDocument(d.name, []byte(strings.Join(lines, "")))
	if err != nil || !d.differsOnlyIn(changed, index, uuid) {
		return d.byHand(appliance, uuid)
	}
	*d = *changed
	return nil
}

func (d *Document) byHand(appliance, uuid string) error {
	return fmt.Errorf("%s: the entry of %s is written in a way that cannot be changed safely: set luks_uuid = %q there by hand", d.name, appliance, uuid)
}

// differsOnlyIn reports whether changed says what d says but for one LUKS UUID.
func (d *Document) differsOnlyIn(changed *Document, index int, uuid string) bool {
	if len(changed.site.Appliances) != len(d.site.Appliances) || changed.site.Appliances[index].LUKS != uuid {
		return false
	}
	was := *changed.site
	was.Appliances = append([]Appliance(nil), was.Appliances...)
	was.Appliances[index].LUKS = d.site.Appliances[index].LUKS
	return reflect.DeepEqual(&was, d.site)
}

// FreeAddress is the lowest address of the VPN that nobody has.
func (s *Site) FreeAddress() (netip.Addr, error) {
	taken := map[netip.Addr]bool{s.Home.VPNAddress: true}
	for _, a := range s.Appliances {
		taken[a.VPNAddress] = true
	}
	for _, p := range s.Pushers {
		taken[p.VPNAddress] = true
	}
	for a := s.VPN.Network.Masked().Addr().Next(); usable(s.VPN.Network, a); a = a.Next() {
		if !taken[a] {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("no address is free in %v", s.VPN.Network)
}

func execute(name string, data any) ([]byte, error) {
	t, err := template.New("").Funcs(template.FuncMap{
		"q": settings.Quote, "list": settings.QuoteList[string],
		"time": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	}).Parse(fileTemplate)
	if err != nil {
		return nil, fmt.Errorf("write site.toml: %w", err)
	}
	var out bytes.Buffer
	if err := t.ExecuteTemplate(&out, name, data); err != nil {
		return nil, fmt.Errorf("write site.toml: %w", err)
	}
	return out.Bytes(), nil
}
