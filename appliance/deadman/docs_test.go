package deadman

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/alarms.md's list of alarms anew")

const (
	docs  = "../../docs/alarms.md"
	begin = "<!-- the list is made from the software's own words: go test ./appliance/deadman -update -->\n"
	end   = "<!-- end of the list -->\n"
)

// docs/alarms.md says about every alarm what its mails say.
func TestDocs(t *testing.T) {
	data, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	list, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatal("docs/alarms.md has lost the marks around its list")
	}
	want := documented()
	if list == want {
		return
	}
	if !*update {
		t.Fatal("docs/alarms.md does not say what the mails say; run go test ./appliance/deadman -update")
	}
	if err := os.WriteFile(docs, []byte(before+begin+want+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

func documented() string {
	var b strings.Builder
	for _, e := range catalogue {
		when := "at once"
		if e.after {
			when = "after `unreachable_after` (1 h)"
		}
		if e.wait > 0 {
			when = "after " + span(e.wait)
		}
		switch e.kind {
		case heartbeatStale:
			when = "when a host's last heartbeat is older than `heartbeat_age` (30 h)"
		case unchanged:
			when = "when a repository has not changed for `unchanged_age` (8 days)"
		case diskFull:
			when = "when `disk_full_percent` (95) of the disk are used"
		case restarting:
			when = fmt.Sprintf("after %d restarts within an hour", restartLimit)
		}
		fmt.Fprintf(&b, "\n### %s\n\nSubject: `%s`; all-clear: `%s`. Raised %s", e.kind, e.title, e.clear, when)
		if e.hold > 0 {
			fmt.Fprintf(&b, ", over when it has been over for %s", span(e.hold))
		}
		b.WriteString(".\n\nWhat it could mean:\n\n")
		for _, m := range e.meaning {
			b.WriteString("- " + m + "\n")
		}
		b.WriteString("\nWhat to do:\n\n")
		for _, m := range e.todo {
			b.WriteString("- " + m + "\n")
		}
	}
	b.WriteString("\n## Notices\n\nSome mails tell once that something was decided. They come without an alarm.\n\n| subject | says |\n|---|---|\n")
	for _, n := range notices {
		fmt.Fprintf(&b, "| `%s` | %s |\n", n.title, n.meaning)
	}
	b.WriteString("\n")
	return b.String()
}
