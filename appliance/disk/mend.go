package disk

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"

	"farkeep/appliance/status"
)

// e2fsck -p stops where a person could choose, and there is no person where the
// disk stands. Some of what it stops at leaves nothing to choose: when the kernel
// met an error, e2fsck does not walk the list of files that were being removed or
// cut (e2fsck/super.c, release_orphan_inodes: "the orphan list can't be trusted"),
// then finds them one by one, and gives up. So, when -p gave up, e2fsck -n says
// all that it would ask; and only if every line of that is one of those below is
// the answer yes, to all. One line that is not known here is for a person, and the
// disk stays shut.
//
// What belongs here: what touches no name, and no content but that of files which
// were being removed or cut. A file of a generation never is either: it is
// renamed out of sight first.

// mendLimit bounds what e2fsck may say. More is for a person.
const mendLimit = 4 << 20

// remark is a line that e2fsck says, without white space around it
// (e2fsck/problem.c of e2fsprogs 1.47).
type remark struct {
	text *regexp.Regexp // a group, where there is one, is the number of an inode
	// orphan: only of an inode that was on the orphan list.
	orphan bool
}

const answer = ` +(Fix\? (no|yes)|IGNORED\.|FIXED\.)`

// harmless is all that a mend may find.
var harmless = []remark{
	// Not about problems.
	{text: regexp.MustCompile(`^e2fsck \d+\.[\w.]+ \([\w-]+\)$`)},
	{text: regexp.MustCompile(`^Pass (1: Checking inodes, blocks, and sizes|2: Checking directory structure|3: Checking directory connectivity|4: Checking reference counts|5: Checking group summary information)$`)},
	{text: regexp.MustCompile(`^\S+ contains a file system with errors, check forced\.$`)},
	{text: regexp.MustCompile(`^\S+: \*+ (WARNING: Filesystem still has errors|FILE SYSTEM WAS MODIFIED) \*+$`)},
	{text: regexp.MustCompile(`^\S+: \d+/\d+ files \(\d+\.\d% non-contiguous\), \d+/\d+ blocks$`)},
	{text: regexp.MustCompile(`^Fix\? (no|yes)$`)}, // of the line before
	// The orphan list: PR_1_ORPHAN_LIST_REFUGEES, PR_1_LOW_DTIME; its last member
	// has nothing to point to: PR_1_ZERO_DTIME, only for inodes without names, or
	// their names would be complained of in pass 2.
	{text: regexp.MustCompile(`^Inodes that were part of a corrupted orphan linked list found\.` + answer + `$`)},
	{text: onTheList},
	{text: regexp.MustCompile(`^Deleted inode \d+ has zero dtime\.` + answer + `$`)},
	// A file that was being cut: PR_1_SET_DTIME, PR_1_BAD_I_SIZE. It gets the
	// length of the blocks that it still has. Only uploads are ever cut, and they
	// are hashed before anybody believes them.
	{text: regexp.MustCompile(`^Inode (\d+) is in use, but has dtime set\.` + answer + `$`), orphan: true},
	{text: regexp.MustCompile(`^Inode (\d+), i_size is \d+, should be \d+\.` + answer + `$`), orphan: true},
	{text: regexp.MustCompile(`^Inode (\d+), i_blocks is \d+, should be \d+\.` + answer + `$`), orphan: true},
	// What is counted from the rest: PR_4_BAD_REF_COUNT, and pass 5.
	{text: regexp.MustCompile(`^Inode \d+ ref count is \d+, should be \d+\.` + answer + `$`)},
	{text: regexp.MustCompile(`^(Block|Inode) bitmap differences:( +[+-](\d+|\(\d+--\d+\)))+$`)},
	{text: regexp.MustCompile(`^Padding at end of (block|inode) bitmap is not set\.` + answer + `$`)},
	{text: regexp.MustCompile(`^Free (blocks|inodes) count wrong( for group #\d+)? \(\d+, counted=\d+\)\.$`)},
	{text: regexp.MustCompile(`^Directories count wrong for group #\d+ \(\d+, counted=\d+\)\.$`)},
}

var onTheList = regexp.MustCompile(`^Inode (\d+) was part of the orphaned inode list\.` + answer + `$`)

// beyond returns the first line of what e2fsck said that is for a person; "" if
// there is none.
func beyond(said string) string {
	orphans := map[string]bool{}
	for line := range strings.Lines(said) {
		if m := onTheList.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			orphans[m[1]] = true
		}
	}
	for line := range strings.Lines(said) {
		line = strings.TrimSpace(line)
		if line == "" || slices.ContainsFunc(harmless, func(h remark) bool { return h.fits(line, orphans) }) {
			continue
		}
		return fmt.Sprintf("%.200s", line)
	}
	return ""
}

func (r remark) fits(line string, orphans map[string]bool) bool {
	m := r.text.FindStringSubmatch(line)
	return m != nil && (!r.orphan || orphans[m[1]])
}

// mend repairs what e2fsck -p gave up on, if all of it is harmless. stopped is
// what -p said last.
func (c fsck) mend(ctx context.Context, program, node, stopped string) error {
	person := func(why, text string) error {
		return failed(status.ErrorFileSystem, "the file system has errors that need a person (%s): attach the disk to a Linux machine, open it with the recovery key, and run e2fsck: %s", why, text)
	}
	look, err := c.call(ctx, program, mendLimit, "-f", "-n", "-C", "3", node)
	if err != nil {
		return err
	}
	if look.cut || look.code != 0 && look.code != 4 {
		return person(fmt.Sprintf("e2fsck -n ended with code %d", look.code), stopped)
	}
	if line := beyond(look.text); line != "" {
		return person(line, stopped)
	}
	c.log.Warn("the file system has errors that leave nothing to choose, correcting them", "e2fsck", brief(look.text))
	done, err := c.call(ctx, program, mendLimit, "-f", "-y", "-C", "3", node)
	if err != nil {
		return err
	}
	level := slog.LevelWarn
	if done.cut || beyond(done.text) != "" {
		// The correction uncovered what could not be seen before. It is done; the
		// sums of every file say what it did to history.
		level = slog.LevelError
	}
	c.log.Log(ctx, level, "the file system was corrected", "e2fsck", brief(done.text), "code", done.code)
	if done.code&^3 != 0 {
		return person(fmt.Sprintf("e2fsck -y ended with code %d", done.code), brief(done.text))
	}
	if again, err := c.call(ctx, program, mendLimit, "-f", "-n", "-C", "3", node); err != nil {
		return err
	} else if again.code != 0 {
		return person("errors are left after e2fsck -y", brief(again.text))
	}
	return nil
}
