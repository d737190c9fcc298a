package runbook

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"strings"

	"farkeep/shared/secret"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/parser"
	"rsc.io/qr"
)

//go:embed templates/page.html.tmpl
var pageText string

// Secrets are what a page holds beside the runbook.
type Secrets struct {
	Keys []DiskKeys // as Book.Disks, in their order
	Borg []BorgKey
}

// DiskKeys open one disk.
type DiskKeys struct {
	Recovery secret.Bytes
	Volume   secret.Bytes // empty: not on this page
}

// BorgKey is a repository's key as borg key export --paper prints it.
type BorgKey struct {
	Repository string
	Text       secret.Text
}

// maxQR is the most that one code holds, in bytes: version 17, of 85 squares a
// side, which a phone still reads when the printer was tired.
const maxQR = 480

// Page is the page to print, HTML without anything from outside. It ends in the
// runbook, so that a page alone is enough.
func Page(b Book, s Secrets) ([]byte, error) {
	if len(s.Keys) != len(b.Disks) {
		return nil, fmt.Errorf("write the page: %d keys for %d disks", len(s.Keys), len(b.Disks))
	}
	markdown, err := Markdown(b)
	if err != nil {
		return nil, err
	}
	var steps bytes.Buffer
	md := goldmark.New(goldmark.WithExtensions(extension.Table), goldmark.WithParserOptions(parser.WithAutoHeadingID()))
	if err := md.Convert(withoutComments(markdown), &steps); err != nil {
		return nil, fmt.Errorf("write the page: %w", err)
	}
	type code struct {
		Title, Sum string
		Lines      []string
		QR         []template.HTML
	}
	type disk struct {
		Disk
		Codes     []code
		HeaderSum string // in groups
		HeaderQR  template.HTML
	}
	data := struct {
		Book
		Sheets  []disk
		Borg    []code
		Volumes bool
		Steps   template.HTML
	}{Book: b, Steps: template.HTML(steps.String())} // our own text, escaped by goldmark
	for i, d := range b.Disks {
		sheet := disk{Disk: d, HeaderSum: grouped(d.Header, 4)}
		for _, k := range []struct {
			label, title string
			key          secret.Bytes
		}{{"r", "Recovery key", s.Keys[i].Recovery}, {"v", "Volume key, for a header that is gone", s.Keys[i].Volume}} {
			if k.key.Len() == 0 {
				continue
			}
			c := code{Title: k.title, Lines: Lines(k.label, k.key.Reveal()), Sum: grouped(fmt.Sprintf("%x", sha256.Sum256(k.key.Reveal())), 4)}
			if c.QR, err = codes(c.Lines); err != nil {
				return nil, err
			}
			data.Volumes = data.Volumes || k.label == "v"
			sheet.Codes = append(sheet.Codes, c)
		}
		if sheet.HeaderQR, err = svg("header " + d.UUID + " sha256 " + d.Header); err != nil {
			return nil, err
		}
		data.Sheets = append(data.Sheets, sheet)
	}
	for _, k := range s.Borg {
		c := code{Title: k.Repository, Lines: strings.Split(strings.TrimSpace(k.Text.Reveal()), "\n")}
		if c.QR, err = codes(c.Lines); err != nil {
			return nil, err
		}
		data.Borg = append(data.Borg, c)
	}
	t, err := template.New("page").Funcs(template.FuncMap{"join": strings.Join}).Parse(pageText)
	if err != nil {
		return nil, fmt.Errorf("write the page: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, data); err != nil {
		return nil, fmt.Errorf("write the page: %w", err)
	}
	return out.Bytes(), nil
}

// Lines is a key as a page shows it: eight bytes a line, in groups of four
// hexadecimal digits, after the line's label (r1, r2, ...) and before its check: the
// first four digits of the SHA-256 of label and digits. The runbook checks it with
// sha256sum.
func Lines(label string, key []byte) (lines []string) {
	const perLine = 8
	for i := 0; i*perLine < len(key); i++ {
		digits := hex.EncodeToString(key[i*perLine : min((i+1)*perLine, len(key))])
		name := fmt.Sprintf("%s%d", label, i+1)
		sum := sha256.Sum256([]byte(name + digits))
		lines = append(lines, name+" "+grouped(digits, 4)+" "+hex.EncodeToString(sum[:2]))
	}
	return lines
}

// grouped puts a blank after each n characters.
func grouped(s string, n int) string {
	var out strings.Builder
	for i := range s {
		if i > 0 && i%n == 0 {
			out.WriteByte(' ')
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// codes are as many codes as lines need.
func codes(lines []string) (all []template.HTML, err error) {
	var part strings.Builder
	flush := func() {
		if err == nil && part.Len() > 0 {
			var one template.HTML
			if one, err = svg(strings.TrimSuffix(part.String(), "\n")); err == nil {
				all = append(all, one)
			}
			part.Reset()
		}
	}
	for _, line := range lines {
		if part.Len()+len(line)+1 > maxQR {
			flush()
		}
		part.WriteString(line + "\n")
	}
	flush()
	return all, err
}

// svg draws a QR code with the margin that readers want.
func svg(text string) (template.HTML, error) {
	code, err := qr.Encode(text, qr.M)
	if err != nil {
		return "", errors.New("write the page: this is too long for a code") // the error of qr could hold the text
	}
	const margin = 4
	var path strings.Builder
	for y := range code.Size {
		for x := 0; x < code.Size; x++ {
			from := x
			for x < code.Size && code.Black(x, y) {
				x++
			}
			if x > from {
				fmt.Fprintf(&path, "M%d %dh%dv1h-%dz", from+margin, y+margin, x-from, x-from)
			}
		}
	}
	side := code.Size + 2*margin
	return template.HTML(fmt.Sprintf(`<svg class="qr" viewBox="0 0 %d %d" shape-rendering="crispEdges" role="img"><rect width="%d" height="%d" fill="#fff"/><path fill="#000" d="%s"/></svg>`,
		side, side, side, side, path.String())), nil
}

// withoutComments leaves out the names of the steps: they are for the drill.
func withoutComments(markdown []byte) []byte {
	var out bytes.Buffer
	for line := range bytes.Lines(markdown) {
		if !bytes.HasPrefix(bytes.TrimSpace(line), []byte("<!--")) {
			out.Write(line)
		}
	}
	return out.Bytes()
}
