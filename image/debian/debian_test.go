package debian

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func apt(files map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for name, text := range files {
		m[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return m
}

func TestFindMirror(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  Mirror
		err   string
	}{
		{"deb822", map[string]string{"sources.list.d/debian.sources": `Types: deb deb-src
# a comment inside
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main contrib
`}, Mirror{"http://mirror.example/debian", "http://mirror.example/debian-security"}, ""},
		{"one-line", map[string]string{"sources.list": `# deb http://old.example/debian sid main
deb-src http://src.example/debian trixie main
deb [arch=amd64 signed-by=/x.gpg] https://mirror.example/debian/	trixie main non-free-firmware # ours
deb https://security.example/ trixie-security main
`}, Mirror{"https://mirror.example/debian/", "https://security.example/"}, ""},
		{"first wins", map[string]string{
			"sources.list":           "deb http://first.example/debian stable main\n",
			"sources.list.d/b.list":  "deb http://second.example/debian stable main\n",
			"sources.list.d/c.bogus": "deb http://third.example/debian stable main\n",
		}, Mirror{"http://first.example/debian", ""}, ""},
		{"folded field", map[string]string{"sources.list.d/a.sources": "Types: deb\nURIs:\n http://mirror.example/debian\nSuites: trixie\nComponents: main\n"},
			Mirror{"http://mirror.example/debian", ""}, ""},
		{"disabled", map[string]string{"sources.list.d/a.sources": "Enabled: no\nTypes: deb\nURIs: http://m.example/debian\nSuites: trixie\nComponents: main\n"},
			Mirror{}, "names no Debian mirror"},
		{"other people's archives", map[string]string{
			"sources.list":             "deb http://ubuntu.example/ubuntu noble main\ndeb cdrom:[Debian]/ trixie main\n",
			"sources.list.d/node.list": "deb https://node.example/node_20.x nodistro main\n",
			"sources.list.d/own.list":  "deb https://own.example/ trixie contrib\ndeb [unfinished http://x.example trixie main\n",
		}, Mirror{}, "names no Debian mirror"},
		{"nothing", nil, Mirror{}, "names no Debian mirror"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := FindMirror(apt(tt.files))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v does not say %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCheckURI(t *testing.T) {
	for uri, ok := range map[string]bool{
		"http://m.example/debian": true, "https://m.example": true, "file:/srv/debian": true, "mirror+file:/etc/m": true,
		"cdrom:[x]": false, "m.example/debian": false, "http://m.example/ trixie": false, "http://m.example/\ndeb x": false, "": false, "copy:/x": false,
	} {
		if err := checkURI(uri); (err == nil) != ok {
			t.Errorf("checkURI(%q) = %v", uri, err)
		}
	}
}

func TestParsePackage(t *testing.T) {
	const sum = "90a83fd1735f14840ca8805f9528f517d4fbb93e7c39c421a2e0e68a22c20067"
	text := "Package: linux-image-arm64\nVersion: 6.12.107-1\nArchitecture: arm64\nDepends: linux-image-6.12.107+deb13-arm64 (= 6.12.107-1)\n" +
		"Description: kernel\n Version: not this one\nFilename: pool/main/l/linux-image-arm64_6.12.107-1_arm64.deb\nSHA256: " + sum + "\n\nPackage: older\n"
	p, err := parsePackage(text, "linux-image-arm64")
	if err != nil {
		t.Fatal(err)
	}
	if p.Version != "6.12.107-1" || p.SHA256 != sum || p.Architecture != "arm64" {
		t.Errorf("package %+v", p)
	}
	name, err := dependency(p.Depends, "linux-image-")
	if err != nil || name != "linux-image-6.12.107+deb13-arm64" {
		t.Errorf("dependency %q, %v", name, err)
	}
	for _, bad := range []string{"", "Package: other\n", strings.Replace(text, sum, "abc", 1)} {
		if _, err := parsePackage(bad, "linux-image-arm64"); err == nil {
			t.Errorf("%.40q is a description", bad)
		}
	}
	for _, bad := range []string{"", "libc6", "linux-image-1, linux-image-2 (>= 3)"} {
		if _, err := dependency(bad, "linux-image-"); err == nil {
			t.Errorf("%q names one kernel", bad)
		}
	}
}

func TestMemberTime(t *testing.T) {
	head := "!<arch>\ndebian-binary   1756441140  0     0     100644  4         `\n2.0\n"
	got, err := memberTime(strings.NewReader(head))
	if err != nil || !got.Equal(time.Unix(1756441140, 0)) {
		t.Errorf("time %v, %v", got, err)
	}
	for _, bad := range []string{"", head[:20], strings.Replace(head, "debian-binary", "something-else", 1), strings.Replace(head, "1756441140", "x         ", 1)} {
		if _, err := memberTime(strings.NewReader(bad)); err == nil {
			t.Errorf("%.40q has a time", bad)
		}
	}
}

func TestCheckSum(t *testing.T) {
	name := filepath.Join(t.TempDir(), "x.deb")
	if err := os.WriteFile(name, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	if err := checkSum(name, abc); err != nil {
		t.Error(err)
	}
	if err := checkSum(name, strings.Repeat("0", 64)); err == nil || !strings.Contains(err.Error(), abc) {
		t.Errorf("a wrong sum: %v", err)
	}
}

// FuzzParsers: whatever stands in a sources file, a mirror that is found can be
// written as one word into ours.
func FuzzParsers(f *testing.F) {
	f.Add("deb [arch=arm64] http://m.example/debian trixie main")
	f.Add("Types: deb\nURIs: http://m.example/debian\nSuites: trixie\nComponents: main\n")
	f.Add("deb http://m.example/debian\u2028 trixie main")
	f.Fuzz(func(t *testing.T, text string) {
		for _, name := range []string{"sources.list", "sources.list.d/x.sources"} {
			m, err := FindMirror(apt(map[string]string{name: text}))
			if err != nil {
				continue
			}
			if m.Archive == "" || len(bytes.Fields([]byte(m.Archive))) != 1 || len(strings.Fields(m.Security)) > 1 {
				t.Errorf("mirror %q", m)
			}
		}
	})
}
