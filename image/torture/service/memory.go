package service

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Memory is what each of the appliance's processes has in memory now, in bytes, by
// their parts' names: its proportional set size (proc_pid_smaps(5)), in which pages
// that several processes share, the program's own for instance, count once in all.
// What a part has started counts as the part's.
func (s *Service) Memory() map[string]int64 {
	parts := s.Parts()
	all := map[string]int64{}
	for name, pid := range parts {
		all[name] = pss(pid)
		if name == Supervisor {
			continue // its children are the parts
		}
		for _, child := range descendants(pid) {
			all[name] += pss(child)
		}
	}
	return all
}

// descendants are the processes that pid started, and those that these started.
func descendants(pid int) (all []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for _, field := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(append(all, child), descendants(child)...)
			}
		}
	}
	return all
}

// pss is 0 for a process that has ended.
func pss(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			if err != nil {
				return 0
			}
			return kib << 10
		}
	}
	return 0
}
