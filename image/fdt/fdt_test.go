package fdt

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// builder assembles a device tree blob, correct or not.
type builder struct{ body, names bytes.Buffer }

func (b *builder) word(w uint32) { b.body.Write(binary.BigEndian.AppendUint32(nil, w)) }

func (b *builder) pad() { b.body.Write(make([]byte, (4-b.body.Len()%4)%4)) }

func (b *builder) node(name string, inside func()) {
	b.word(beginNode)
	b.body.WriteString(name + "\x00")
	b.pad()
	inside()
	b.word(endNode)
}

func (b *builder) prop(name, value string) {
	b.word(property)
	b.word(uint32(len(value)))
	b.word(uint32(b.names.Len()))
	b.names.WriteString(name + "\x00")
	b.body.WriteString(value)
	b.pad()
}

func (b *builder) blob() []byte {
	b.word(end)
	head := make([]byte, 56) // 40 bytes of header, one empty memory reservation
	be := binary.BigEndian
	for i, w := range []int{magic, 56 + b.body.Len() + b.names.Len(), 56, 56 + b.body.Len(), 40, 17, 16, 0, b.names.Len(), b.body.Len()} {
		be.PutUint32(head[i*4:], uint32(w))
	}
	return append(append(head, b.body.Bytes()...), b.names.Bytes()...)
}

func sample() []byte {
	var b builder
	b.node("", func() {
		b.prop("model", "Board\x00")
		b.prop("compatible", "maker,board\x00maker,chip\x00")
		b.node("soc", func() {
			b.node("mmc@1", func() { b.prop("compatible", "maker,mmc\x00"); b.prop("status", "okay\x00") })
			b.word(nop)
			b.node("pcie@2", func() {
				b.prop("status", "disabled\x00")
				b.prop("compatible", "maker,pcie\x00")
				b.node("usb", func() { b.prop("compatible", "maker,usb\x00") })
			})
		})
		b.node("leds", func() { b.prop("compatible", "gpio-leds\x00") })
	})
	return b.blob()
}

func TestParse(t *testing.T) {
	got, err := Parse(sample())
	if err != nil {
		t.Fatal(err)
	}
	want := []Node{
		{"/", []string{"maker,board", "maker,chip"}},
		{"/soc/mmc@1", []string{"maker,mmc"}},
		{"/leds", []string{"gpio-leds"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestParseRefuses(t *testing.T) {
	change := func(at int, w uint32) []byte {
		b := bytes.Clone(sample())
		binary.BigEndian.PutUint32(b[at:], w)
		return b
	}
	deep := func() []byte {
		var b builder
		var nest func(int)
		nest = func(n int) {
			if n > 0 {
				b.node("x", func() { nest(n - 1) })
			}
		}
		nest(maxDepth + 1)
		return b.blob()
	}
	for _, tt := range []struct {
		name, want string
		blob       []byte
	}{
		{"empty", "no header", nil},
		{"magic", "no header", change(0, 1)},
		{"longer than the file", "outside the file", change(4, 1<<20)},
		{"structure outside", "outside the file", change(8, 1<<30)},
		{"names outside", "outside the file", change(12, 1<<30)},
		{"unknown token", "unknown token", change(56, 77)},
		{"ends at once", "ends early", change(36, 0)},
		{"too deep", "levels", deep()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Parse(tt.blob); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
		})
	}
}

// FuzzParse: whatever the bytes, parsing ends, and what it returns was in them.
func FuzzParse(f *testing.F) {
	f.Add(sample())
	f.Add(sample()[:60])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, blob []byte) {
		nodes, err := Parse(blob)
		if err != nil && nodes != nil {
			t.Error("nodes and an error")
		}
		for _, n := range nodes {
			if !strings.HasPrefix(n.Path, "/") {
				t.Errorf("path %q", n.Path)
			}
			for _, c := range n.Compatible {
				if c == "" || !bytes.Contains(blob, []byte(c)) {
					t.Errorf("compatible %q is not in the blob", c)
				}
			}
		}
	})
}
