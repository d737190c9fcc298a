package settings

import (
	"bytes"
	_ "embed"
	"fmt"
	"net/netip"
	"strings"
	"text/template"

	"farkeep/shared/secret"
)

//go:embed farkeep.toml.tmpl
var fileTemplate string

// Render writes a as a farkeep.toml with comments for the person who opens it,
// secrets included: the caller keeps the result out of logs and writes it with
// mode 0600. Parse reads the same settings back; Render checks that it does, so
// that no file leaves this package that an appliance would refuse.
func (a *Appliance) Render() (secret.Bytes, error) {
	t, err := template.New("farkeep.toml").Funcs(template.FuncMap{
		"q": Quote, "list": quoteAny, "pem": block,
		"reveal": func(t secret.Text) string { return t.Reveal() },
	}).Parse(fileTemplate)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("render settings of %s: %w", a.Name, err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, a); err != nil {
		return secret.Bytes{}, fmt.Errorf("render settings of %s: %w", a.Name, err)
	}
	if _, err := Parse("farkeep.toml", out.Bytes()); err != nil {
		clear(out.Bytes())
		return secret.Bytes{}, fmt.Errorf("render settings of %s: %w", a.Name, err)
	}
	return secret.New(out.Bytes()), nil
}

// Quote writes s as a TOML basic string (TOML 1.0, "String").
func Quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// QuoteList writes a TOML array of strings; the elements may be of any type
// that prints itself.
func QuoteList[T any](list []T) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = Quote(fmt.Sprint(s))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func quoteAny(list any) (string, error) {
	switch l := list.(type) {
	case []string:
		return QuoteList(l), nil
	case []netip.Addr:
		return QuoteList(l), nil
	case []netip.Prefix:
		return QuoteList(l), nil
	}
	return "", fmt.Errorf("no TOML form for a %T", list)
}

// block writes a text of several lines, a PEM block, so that it stays readable.
func block(s string) string {
	if strings.Contains(s, "'''") || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\n' || r == 0x7f }) {
		return Quote(s)
	}
	return "'''\n" + s + "'''"
}
