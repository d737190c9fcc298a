package disk

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/appliance/status"
)

// fragile makes a file system with two files of 74 blocks, "one" (inode 12) and
// "two" (inode 13), and marks it as one in which errors were met.
func fragile(t *testing.T, commands ...string) string {
	t.Helper()
	image := fileSystem(t)
	content := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(content, []byte(strings.Repeat("content", 43_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	debugfs(t, image, "write "+content+" one")
	debugfs(t, image, "write "+content+" two")
	for _, c := range append(commands, "ssv state 2") {
		debugfs(t, image, c)
	}
	return image
}

// TestMend: what leaves nothing to choose is corrected, and all else is left as
// it is, bit for bit behind the journal.
func TestMend(t *testing.T) {
	for _, tc := range []struct {
		name     string
		commands []string
		person   string // "": mended
	}{
		{"removed and never freed", []string{"unlink two", "sif <13> links_count 0", "sif <13> dtime 15"}, ""},
		{"cut, and still longer", []string{"sif one dtime 15", "sif one size 4096"}, ""},
		{"both, and counts", []string{"unlink two", "sif <13> links_count 0", "sif <13> dtime 12", "sif one dtime 15", "ssv free_blocks_count 5", "ssv free_inodes_count 5", "freeb 3000 20"}, ""},
		{"a block of two files", []string{"sif two block[5] 3615"}, "Running additional passes"},
		{"a block of two files, and orphans", []string{"sif two block[5] 3615", "sif one dtime 15"}, "Running additional passes"},
		{"an orphan that has a name", []string{"sif two links_count 0", "sif two dtime 15"}, "Entry 'two' in /"},
		{"no root folder", []string{"sif <11> block[0] 0", "clri <2>"}, "oot"},
		{"a length that nobody cut", []string{"sif one dtime 15", "sif two size 4096"}, "Inode 13, i_size is 4096"},
		{"a name lost", []string{"unlink two", "sif one dtime 15"}, "Unattached inode 13"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			image := fragile(t, tc.commands...)
			check := fsck{log: slog.New(slog.DiscardHandler), programs: fsckPrograms}
			_, err := check.run(t.Context(), image, true)
			if tc.person == "" {
				if err != nil {
					t.Fatal(err)
				}
				tool(t, "e2fsprogs", "e2fsck", "-fn", image)
				return
			}
			if kindOf(err) != status.ErrorFileSystem || !strings.Contains(err.Error(), "person") || !strings.Contains(err.Error(), tc.person) {
				t.Fatalf("%v", err)
			}
			before, _ := os.ReadFile(image)
			if _, err := check.run(t.Context(), image, true); err == nil {
				t.Error("the second time it was corrected")
			}
			if after, _ := os.ReadFile(image); string(after[8192:]) != string(before[8192:]) {
				t.Error("what is for a person was changed")
			}
		})
	}
}

// What e2fsck says is never taken for more harmless than it is.
func TestBeyond(t *testing.T) {
	const quiet = "e2fsck 1.47.2 (1-Jan-2025)\nPass 1: Checking inodes, blocks, and sizes\nPass 5: Checking group summary information\n"
	for _, tc := range []struct {
		said, want string
	}{
		{"", ""},
		{quiet, ""},
		{quiet + "Block bitmap differences:  -(32896--32969) +7\nFix? no\n\n", ""},
		{quiet + "Inode 12 was part of the orphaned inode list.  IGNORED.\nInode 12, i_size is 4096, should be 303104.  Fix? no\n", ""},
		{quiet + "Inode 13, i_size is 4096, should be 303104.  Fix? no\nInode 12 was part of the orphaned inode list.  IGNORED.\n", "Inode 13, i_size"},
		{"Warning: skipping journal recovery because doing a read-only filesystem check.\n" + quiet, "Warning: skipping"},
		{quiet + "Entry 'x' in /generations (2) has deleted/unused inode 13.  Clear? no\n", "Entry 'x'"},
		{quiet + "Fix? no Delete file? yes\n", "Fix? no Delete"},
		{quiet + "Inode 12 has illegal block(s).  Clear? no\n", "Inode 12 has"},
		{quiet + "Inode bitmap differences:  Group 0 inode bitmap does not match checksum.\nIGNORED.\n", "Inode bitmap differences:"},
		{quiet + strings.Repeat("x", 5000) + "\n", strings.Repeat("x", 200)},
	} {
		if got := beyond(tc.said); !strings.HasPrefix(got, tc.want) || (got == "") != (tc.want == "") || len(got) > 200 {
			t.Errorf("%.300q: %q, want %q", tc.said, got, tc.want)
		}
	}
}

// FuzzBeyond: a line more never makes what e2fsck said harmless, but for one that
// names an orphan.
func FuzzBeyond(f *testing.F) {
	for _, seed := range []string{
		"", "Fix? no", "Inode 12 was part of the orphaned inode list.  IGNORED.", "Inode 12, i_size is 1, should be 2.  Fix? no", "Delete file? no",
	} {
		f.Add(seed, "Pass 2: Checking directory structure")
		f.Add("Inode 12, i_size is 1, should be 2.  Fix? no", seed)
	}
	f.Fuzz(func(t *testing.T, said, more string) {
		before := beyond(said)
		after := beyond(said + "\n" + more)
		if before != "" && after == "" && !strings.Contains(more, "was part of the orphaned inode list") {
			t.Errorf("%q is harmless after %q", said, more)
		}
		if strings.Contains(fmt.Sprint(said, more), "Delete file") && after == "" {
			t.Errorf("files may be deleted: %q %q", said, more)
		}
	})
}
