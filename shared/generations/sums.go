package generations

import (
	"strings"

	"farkeep/shared/manifest"
)

// sumsEscaper writes names as b2sum does (coreutils 9, "file name escaping"): a
// backslash before the line says that names are escaped in it.
var sumsEscaper = strings.NewReplacer(`\`, `\\`, "\r", `\r`, "\n", `\n`)

// appendSum appends one line of SUMS.b2, whose names are relative to the
// generation's folder.
func appendSum(b []byte, e *manifest.Entry) []byte {
	escaped := strings.ContainsAny(e.Path, "\\\r\n")
	if escaped {
		b = append(b, '\\')
	}
	b = append(b, e.Sum.String()...)
	b = append(b, "  "+FilesFolder+"/"...)
	if escaped {
		b = append(b, sumsEscaper.Replace(e.Path)...)
	} else {
		b = append(b, e.Path...)
	}
	return append(b, '\n')
}
