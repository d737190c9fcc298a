// Package debian fetches verified packages of one Debian release for another
// architecture, with the machine's own apt but in private directories: no root
// is needed and the system is not touched. apt checks every byte against
// Debian's archive keys; nothing is used that it did not verify.
//
// Downloads are kept. A second run needs no network, until it is told to look
// for newer packages or the mirror no longer has what the kept lists name.
package debian

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path"
	"slices"
	"strings"
)

// Mirror is where a Debian archive is fetched from.
type Mirror struct {
	Archive  string // the archive proper
	Security string // its security updates; "" for none
}

// entry is one source of an apt configuration.
type entry struct {
	uris, suites, components []string
}

// codenames are the suites of Debian's archive proper that a machine may be
// set up for. They tell a Debian mirror from other people's archives.
var codenames = []string{
	"bullseye", "bookworm", "trixie", "forky", "duke", "sid",
	"oldoldstable", "oldstable", "stable", "testing", "unstable",
}

// FindMirror takes the mirror from an apt configuration folder (/etc/apt): the
// first enabled entry that serves Debian's main archive, and the first that
// serves its security updates.
func FindMirror(etcApt fs.FS) (Mirror, error) {
	var m Mirror
	files := []string{"sources.list"}
	parts, err := fs.ReadDir(etcApt, "sources.list.d")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, fmt.Errorf("read apt sources: %w", err)
	}
	for _, p := range parts {
		if ext := path.Ext(p.Name()); ext == ".list" || ext == ".sources" {
			files = append(files, "sources.list.d/"+p.Name())
		}
	}
	for _, name := range files {
		text, err := fs.ReadFile(etcApt, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return m, fmt.Errorf("read apt sources: %w", err)
		}
		parse := parseList
		if path.Ext(name) == ".sources" {
			parse = parseDeb822
		}
		for _, e := range parse(string(text)) {
			m.consider(e)
		}
	}
	if m.Archive == "" {
		return m, errors.New("the machine's apt configuration names no Debian mirror")
	}
	return m, nil
}

func (m *Mirror) consider(e entry) {
	if !slices.Contains(e.components, "main") {
		return
	}
	for _, uri := range e.uris {
		if checkURI(uri) != nil {
			continue
		}
		for _, suite := range e.suites {
			base, security := strings.CutSuffix(suite, "-security")
			switch {
			case !slices.Contains(codenames, base):
			case security && m.Security == "":
				m.Security = uri
			case !security && m.Archive == "":
				m.Archive = uri
			}
		}
	}
}

// checkURI accepts what can be written into a sources file as one word and
// fetched without asking a person for a disc.
func checkURI(uri string) error {
	u, err := url.Parse(uri)
	if err != nil || strings.ContainsAny(uri, " \t\r\n[]") {
		return fmt.Errorf("%q is not an address of a mirror", uri)
	}
	switch u.Scheme {
	case "http", "https", "file", "mirror", "mirror+file", "tor+http", "tor+https":
		return nil
	}
	return fmt.Errorf("%q is not an address of a mirror, which begins with http://, https:// or file: and names a folder", uri)
}

// parseList reads the one-line format of sources.list(5).
func parseList(text string) []entry {
	var entries []entry
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		kind, rest, _ := strings.Cut(strings.TrimSpace(strings.ReplaceAll(line, "\t", " ")), " ")
		if kind != "deb" {
			continue
		}
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			_, after, ok := strings.Cut(rest, "]")
			if !ok {
				continue
			}
			rest = after
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue
		}
		entries = append(entries, entry{f[:1], f[1:2], f[2:]})
	}
	return entries
}

// parseDeb822 reads the paragraphs of a .sources file: sources.list(5), DEB822-STYLE FORMAT.
func parseDeb822(text string) []entry {
	var entries []entry
	fields := map[string][]string{}
	flush := func() {
		on := len(fields["enabled"]) == 0 || !slices.Contains([]string{"no", "false", "without", "off", "disable"}, strings.ToLower(fields["enabled"][0]))
		if on && slices.Contains(fields["types"], "deb") {
			entries = append(entries, entry{fields["uris"], fields["suites"], fields["components"]})
		}
		fields = map[string][]string{}
	}
	last := ""
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
			last = ""
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				fields[last] = append(fields[last], strings.Fields(line)...)
			}
		default:
			key, value, ok := strings.Cut(line, ":")
			if !ok {
				continue
			}
			last = strings.ToLower(key)
			fields[last] = strings.Fields(value)
		}
	}
	flush()
	return entries
}
