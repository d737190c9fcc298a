package audit

// Commits is how often the disk was waited for, for tests.
func (l *Log) Commits() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.commits
}

// Waiting is how many records wait for somebody to write them, for tests.
func (l *Log) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.waiting)
}
