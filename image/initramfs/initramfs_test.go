package initramfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
)

var when = time.Unix(1700000000, 0)

func sample(t *testing.T) *Tree {
	t.Helper()
	var tree Tree
	err := errors.Join(
		tree.File("lib/modules/6.12/kernel/a.ko", 0o644, []byte("module")),
		tree.File("init", 0o755, bytes.Repeat([]byte("x"), 4097)),
		tree.Dir("tmp", 0o1777),
		tree.Char("dev/console", 0o600, 5, 1),
		tree.Dir("dev", 0o755), // made as a parent already: no harm
	)
	if err != nil {
		t.Fatal(err)
	}
	return &tree
}

// Another implementation reads the archive, so that we do not check our own mistakes.
func TestArchiveIsWhatOthersRead(t *testing.T) {
	var b bytes.Buffer
	if err := sample(t).Write(&b, when); err != nil {
		t.Fatal(err)
	}
	var got []string
	r := cpio.NewReader(&b)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(when) || h.Uid != 0 || h.Guid != 0 {
			t.Errorf("%s: time %v, owner %d:%d", h.Name, h.ModTime, h.Uid, h.Guid)
		}
		got = append(got, fmt.Sprintf("%s %o %d", h.Name, h.Mode, len(data)))
	}
	want := []string{
		"dev 40755 0", "dev/console 20600 0", "init 100755 4097", "lib 40755 0", "lib/modules 40755 0",
		"lib/modules/6.12 40755 0", "lib/modules/6.12/kernel 40755 0", "lib/modules/6.12/kernel/a.ko 100644 6", "tmp 41777 0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDeviceNumbers(t *testing.T) {
	var tree Tree
	if err := tree.Char("console", 0o600, 5, 1); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tree.Write(&b, when); err != nil {
		t.Fatal(err)
	}
	// rdevmajor and rdevminor are the 10th and 11th of thirteen 8-digit fields.
	if got := b.String()[6+9*8 : 6+11*8]; got != "0000000500000001" {
		t.Errorf("device number %s", got)
	}
}

func TestCompressIsDeterministicAndComplete(t *testing.T) {
	a, err := sample(t).Compress(when)
	if err != nil {
		t.Fatal(err)
	}
	b, err := sample(t).Compress(when)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the same tree compresses differently")
	}
	var plain bytes.Buffer
	if err := sample(t).Write(&plain, when); err != nil {
		t.Fatal(err)
	}
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	got, err := dec.DecodeAll(a, nil)
	if err != nil || !bytes.Equal(got, plain.Bytes()) {
		t.Errorf("decompressed: %d bytes, %v; want %d", len(got), err, plain.Len())
	}
}

func TestTreeRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		add  func(*Tree) error
		want string
	}{
		{"empty name", func(x *Tree) error { return x.Dir("", 0o755) }, `name ""`},
		{"parent", func(x *Tree) error { return x.File("../x", 0o644, nil) }, "../x"},
		{"dots inside", func(x *Tree) error { return x.File("a/../b", 0o644, nil) }, "a/../b"},
		{"below a file", func(x *Tree) error { return x.File("init/x", 0o644, nil) }, "not a directory"},
		{"twice", func(x *Tree) error { return x.File("init", 0o755, nil) }, "twice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.add(sample(t)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
		})
	}
}
