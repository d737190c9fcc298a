package retention_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/retention"

	"github.com/google/go-cmp/cmp"
)

// borgCase is a question to Borg and to us.
type borgCase struct {
	Options []string `json:"options"`
	Glob    string   `json:"glob"`
	Items   [][2]any `json:"items"` // name and time, newest first; nil: the repository's archives that match Glob

	policy retention.Policy
	items  []retention.Item
}

// askBorg answers for each case which archives stay, and by which rule.
func askBorg(t *testing.T, archives []retention.Item, cases []borgCase) []map[string]string {
	t.Helper()
	borg, err := exec.LookPath("borg")
	if err != nil {
		t.Fatal("borg is missing: install the Debian package borgbackup")
	}
	// The interpreter that has Borg's modules is the one that its script names.
	script, err := os.ReadFile(borg)
	first, _, _ := strings.Cut(string(script), "\n")
	python, ok := strings.CutPrefix(first, "#!")
	if err != nil || !ok || !strings.Contains(python, "python") {
		t.Fatalf("%s is no Python script (%v): install the Debian package borgbackup", borg, err)
	}
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	if err := os.Mkdir(source, 0o755); err != nil {
		t.Fatal(err)
	}
	question, err := json.Marshal(map[string]any{
		"repository": filepath.Join(dir, "repo"), "source": source, "archives": pairs(archives), "cases": cases,
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), strings.Fields(python)[0], "testdata/prune.py")
	cmd.Env = append(os.Environ(), "TZ=UTC", "BORG_BASE_DIR="+dir, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes")
	cmd.Stdin = bytes.NewReader(question)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ask borg: %v\n%s", err, said.Bytes()[max(0, said.Len()-3000):])
	}
	var answers []map[string]string
	for line := bufio.NewScanner(bytes.NewReader(out)); line.Scan(); {
		answer := map[string]string{}
		if err := json.Unmarshal(line.Bytes(), &answer); err != nil {
			t.Fatalf("borg's answer %q: %v", line.Text(), err)
		}
		answers = append(answers, answer)
	}
	if len(answers) != len(cases) {
		t.Fatalf("%d answers to %d cases", len(answers), len(cases))
	}
	return answers
}

func pairs(items []retention.Item) [][2]any {
	list := make([][2]any, len(items))
	for i, item := range items {
		list[i] = [2]any{item.Name, item.Committed.Unix()}
	}
	return list
}

// options writes a policy as a user of Borg does.
func options(p retention.Policy) []string {
	var o []string
	if p.Within > 0 {
		o = append(o, fmt.Sprintf("--keep-within=%dH", p.Within/time.Hour))
	}
	for _, rule := range []struct {
		name string
		n    int
	}{{"hourly", p.Hourly}, {"daily", p.Daily}, {"weekly", p.Weekly}, {"monthly", p.Monthly}, {"yearly", p.Yearly}} {
		if rule.n != 0 {
			o = append(o, fmt.Sprintf("--keep-%s=%d", rule.name, rule.n))
		}
	}
	return o
}

// randomPolicy has at least one rule, or Borg would refuse.
func randomPolicy(random *rand.Rand) retention.Policy {
	number := func() int {
		switch random.IntN(6) {
		case 0, 1, 2:
			return 0
		case 3:
			return -1
		}
		return 1 + random.IntN(9)
	}
	for {
		p := retention.Policy{Hourly: number(), Daily: number(), Weekly: number(), Monthly: number(), Yearly: number()}
		if random.IntN(2) == 0 {
			p.Within = time.Duration(1+random.IntN(20*24)) * time.Hour
		}
		if p != (retention.Policy{}) {
			return p
		}
	}
}

// randomItems are n generations, hours to months apart, some at the same second,
// newest first. None lies within a quarter of an hour of a full hour before now,
// so that Borg's clock and ours judge --keep-within alike.
func randomItems(random *rand.Rand, now time.Time, n int) []retention.Item {
	spread := []int{3, 30, 24 * 9, 24 * 70}[random.IntN(4)]
	items := make([]retention.Item, n)
	back := 0
	for i := range items {
		if i == 0 || random.IntN(12) > 0 {
			back += random.IntN(spread)
		}
		at := now.Add(-time.Duration(back)*time.Hour - time.Duration(15+30*(back%7)/6)*time.Minute)
		items[i] = retention.Item{Name: fmt.Sprintf("g%06d", n-i), Sequence: int64(n - i), Committed: at}
	}
	return items
}

// TestKeepsWhatBorgKeeps asks the real borg prune and compares what is kept, and
// why, to the letter.
func TestKeepsWhatBorgKeeps(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	now := time.Now().UTC().Truncate(time.Second)
	var cases []borgCase
	// A real repository; each case sees the archives that a random pattern picks.
	archives := randomItems(random, now, 12)
	slices.SortFunc(archives, func(a, b retention.Item) int { return b.Committed.Compare(a.Committed) })
	for i := range archives {
		archives[i].Name += fmt.Sprintf("-%06b", random.IntN(64))
		archives[i].Committed = archives[i].Committed.Add(-time.Duration(i) * time.Second) // Borg may order equal times as it likes
	}
	for range 8 {
		glob := []byte("g??????-??????")
		for range random.IntN(3) {
			glob[8+random.IntN(6)] = byte('0' + random.IntN(2))
		}
		c := borgCase{Glob: string(glob), policy: randomPolicy(random)}
		for _, a := range archives {
			if ok, _ := filepath.Match(c.Glob, a.Name); ok {
				c.items = append(c.items, a)
			}
		}
		cases = append(cases, c)
	}
	for range 600 {
		c := borgCase{Glob: "*", policy: randomPolicy(random), items: randomItems(random, now, random.IntN(60))}
		c.Items = pairs(c.items)
		cases = append(cases, c)
	}
	for i := range cases {
		cases[i].Options = options(cases[i].policy)
	}
	rules := map[string]int{}
	for i, want := range askBorg(t, archives, cases) {
		c := cases[i]
		got := map[string]string{}
		for _, d := range retention.Plan(now, retention.Rules{Policy: c.policy, PerDay: len(c.items)}, c.items) {
			if d.Keep && d.Why != "newest" { // ours, not Borg's
				got[d.Name] = d.Why
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("case %d, %v of %v:\n-borg +farkeep:\n%s", i, c.Options, pairs(c.items), d)
		}
		for _, why := range want {
			rule, _, _ := strings.Cut(why, " ")
			rules[rule]++
		}
	}
	for _, rule := range []string{"within", "hourly", "daily", "weekly", "monthly", "yearly", "daily[oldest]", "weekly[oldest]", "monthly[oldest]", "yearly[oldest]"} {
		if rules[rule] == 0 {
			t.Errorf("no case was decided by %s", rule)
		}
	}
}
