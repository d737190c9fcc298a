package receiver

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/sshverb"
)

// How long one push key may keep the disk open in 24 hours, outside its window: a
// key that was stolen at home must not keep it open, with its key in memory, day
// and night. Bytes that are uploaded do not count as keeping it open, at no less
// than awakeRate of them in a second: a first push of a large repository takes
// days and is what the disk is for.
const (
	awakeLimit = 12 * time.Hour
	awakeRate  = 64 << 10
	// wakeCounts is what one "wake" counts: about what the disk stays open for.
	wakeCounts = 15 * time.Minute
	awakeSlot  = time.Hour
)

// awake counts, for one key, how long it kept the disk open, by hours of the last
// day. It goes by the receiver's own count of time, which no clock setting moves,
// and begins anew with the receiver.
type awake struct {
	slots [24]time.Duration
	last  int64         // the slot that was written last, since the start
	until time.Duration // what is counted already: sessions side by side count once
}

func (a *awake) move(now time.Duration) {
	slot := int64(now / awakeSlot)
	for i := a.last + 1; i <= slot && i <= a.last+int64(len(a.slots)); i++ {
		a.slots[i%int64(len(a.slots))] = 0
	}
	a.last = max(a.last, slot)
}

// add counts, at now, the time between from and to, less what was earned in it.
func (a *awake) add(now, from, to, earned time.Duration) {
	a.move(now)
	d := to - max(from, a.until) - earned
	a.until = max(a.until, to)
	a.slots[a.last%int64(len(a.slots))] += max(0, d)
}

func (a *awake) sum(now time.Duration) (total time.Duration) {
	a.move(now)
	for _, d := range a.slots {
		total += d
	}
	return total
}

// kept counts that the disk is open for k between two moments of the receiver's
// count, in which so many bytes were uploaded.
func (r *receiver) kept(k Key, from, to time.Duration, bytes int64) {
	if k.Role != RolePush || r.inWindow() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.countOf(k).add(r.running(), from, to, time.Duration(bytes/awakeRate)*time.Second)
}

func (r *receiver) countOf(k Key) *awake {
	a := r.awake[k.Name]
	if a == nil {
		a = &awake{}
		r.awake[k.Name] = a
	}
	return a
}

// mayWake refuses a key that kept the disk open for too long today, and counts
// the time that the disk stays open for it otherwise.
func (r *receiver) mayWake(k Key) error {
	if err := r.awakeEnough(k); err != nil {
		return err
	}
	now := r.running()
	r.kept(k, now, now+wakeCounts, 0)
	return nil
}

func (r *receiver) awakeEnough(k Key) error {
	if k.Role != RolePush || r.inWindow() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.countOf(k).sum(r.running()) < awakeLimit {
		return nil
	}
	return &sshverb.Error{
		Code: hint.ExitUnreachable,
		Text: fmt.Sprintf("the key %q kept the disk open for %v in the last 24 hours, which is the most outside its window", k.Name, awakeLimit),
		Hint: "try again later, or in the disk's window; other keys are not concerned",
	}
}

// inWindow says whether the disk is open by itself at this time of day.
func (r *receiver) inWindow() bool {
	w := r.brief.Window
	if w.Length <= 0 {
		return false
	}
	now := r.env.Now().UTC()
	since := now.Sub(now.Truncate(24*time.Hour)) - time.Duration(w.Start)
	if since < 0 {
		since += 24 * time.Hour
	}
	return since < w.Length.Std()
}

// counted counts what is read.
type counted struct {
	io.Reader
	n *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}
