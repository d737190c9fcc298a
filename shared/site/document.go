package site

import (
	"bytes"
	_ "embed"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
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
// another one already, that is replaced: a new disk took its place, and what was
// known of the old one's header goes.
func (d *Document) SetLUKS(appliance, uuid string) error {
	if !settings.IsLUKSUUID(uuid) {
		return fmt.Errorf("record the disk of %s: %q is not a LUKS UUID", appliance, uuid)
	}
	a, ok := d.site.Appliance(appliance)
	if !ok {
		return d.unknown(appliance)
	}
	if a.LUKS == uuid {
		return nil
	}
	was := *d
	err := d.set(appliance, "luks_uuid", uuid, func(a *Appliance) { a.LUKS = uuid })
	if err == nil && a.LUKSHeader != "" {
		err = d.set(appliance, "luks_header", "", func(a *Appliance) { a.LUKSHeader = "" })
	}
	if err != nil {
		*d = was
	}
	return err
}

// SetLUKSHeader records the fingerprint of the header that the backups of an
// appliance's disk hold.
func (d *Document) SetLUKSHeader(appliance, fingerprint string) error {
	return d.set(appliance, "luks_header", fingerprint, func(a *Appliance) { a.LUKSHeader = fingerprint })
}

// SetIdentity gives an appliance other public keys; "" leaves one as it is.
func (d *Document) SetIdentity(appliance, hostKey, clientKey, vpnKey string) error {
	was := *d
	for _, k := range []struct {
		name, value string
		field       func(*Appliance) *string
	}{
		{"host_key", hostKey, func(a *Appliance) *string { return &a.HostKey }},
		{"client_key", clientKey, func(a *Appliance) *string { return &a.ClientKey }},
		{"vpn_key", vpnKey, func(a *Appliance) *string { return &a.VPNKey }},
	} {
		if k.value == "" {
			continue
		}
		if err := d.set(appliance, k.name, k.value, func(a *Appliance) { *k.field(a) = k.value }); err != nil {
			*d = was
			return err
		}
	}
	return nil
}

func (d *Document) unknown(appliance string) error {
	return fmt.Errorf("%s: there is no appliance %q", d.name, appliance)
}

// set gives a key of an appliance's entry a value, and what a person wrote stays.
// mean does to the site what the text is meant to do; if it would be read
// otherwise, nothing is changed.
func (d *Document) set(appliance, key, value string, mean func(*Appliance)) error {
	index := slices.IndexFunc(d.site.Appliances, func(a Appliance) bool { return a.Name == appliance })
	if index < 0 {
		return d.unknown(appliance)
	}
	meant := *d.site
	meant.Appliances = slices.Clone(meant.Appliances)
	mean(&meant.Appliances[index])
	if reflect.DeepEqual(&meant, d.site) {
		return nil
	}
	byHand := fmt.Errorf("%s: the entry of %s is written in a way that cannot be changed safely: set %s = %q there by hand", d.name, appliance, key, value)
	// Line answers with the key's line, or with the header's where there is none.
	n := tomlfile.Line(d.text, "appliance", key, index)
	if n == 0 {
		return byHand
	}
	lines := strings.SplitAfter(string(d.text), "\n")
	isHeader := func(n int) bool { return strings.HasPrefix(strings.TrimSpace(lines[n-1]), "[") }
	below := isHeader(n)
	if below {
		// Below the disk's UUID, where that stands on a line of its own.
		if m := tomlfile.Line(d.text, "appliance", "luks_uuid", index); m > 0 && !isHeader(m) {
			n = m
		}
	}
	line := strings.TrimRight(lines[n-1], "\r\n")
	end := lines[n-1][len(line):]
	assignment := key + " = " + settings.Quote(value)
	if below {
		if end == "" {
			end = "\n"
		}
		lines[n-1] = line + end + assignment + end
	} else {
		lines[n-1] = assignment + end
	}
	changed, err := ParseDocument(d.name, []byte(strings.Join(lines, "")))
	if err != nil || !reflect.DeepEqual(changed.site, &meant) {
		return byHand
	}
	*d = *changed
	return nil
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
