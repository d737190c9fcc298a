package push

import (
	"context"
	"fmt"
	"io"
	"time"

	"farkeep/pusher/progress"
	"farkeep/shared/pushwire"
)

// slowAfter is how long a push may take without giving a reason.
const slowAfter = 5 * time.Minute

// Spent is what the time of a push went into, as seen by whoever sends. What is
// left of Outcome.Took are the exchanges.
type Spent struct {
	Lock   time.Duration // freezing, which waits for Borg's lock
	Source time.Duration // reading and listing here
	Work   time.Duration // hashing and compressing here
	Limit  time.Duration // the rate limit
	Line   time.Duration // bytes that the line did not take
	Store  time.Duration // bytes that the target did not take, and its commit
	Away   time.Duration // a target that was out of reach, or busy, or dark
}

// clock adds to what a push spent. It is used by one goroutine at a time.
type clock struct {
	Spent
	now func() time.Time
}

// spend adds the time from now until the returned func is called to one of c's.
func (c *clock) spend(on *time.Duration) (done func()) {
	begun := c.now()
	return func() { *on += max(0, c.now().Sub(begun)) }
}

// uploading takes the times of one upload: of what stands between whoever makes
// the stream and the target.
type uploading struct {
	c             *clock
	sleep         func(context.Context, time.Duration) error
	limit, behind time.Duration // waited for the limit; for what is behind it
	source        time.Duration // of making the stream: reading
	making        time.Duration // the stream, all of the above in it
	bytes         int64         // went out
}

// wait waits for the limit.
func (u *uploading) wait(ctx context.Context, d time.Duration) error {
	defer u.c.spend(&u.limit)()
	return u.sleep(ctx, d)
}

// writer takes the time that w needs.
func (u *uploading) writer(w io.Writer) io.Writer { return timed{u, w} }

type timed struct {
	u *uploading
	w io.Writer
}

func (t timed) Write(p []byte) (int, error) {
	defer t.u.c.spend(&t.u.behind)()
	n, err := t.w.Write(p)
	t.u.bytes += int64(n)
	return n, err
}

// The line is slower than compressing, with room to spare, if it takes less than
// packRate. It is tried first with packTrial bytes, which costs the processor some
// hundredths of a second where it is not.
const (
	packRate  = 25_000_000 // bytes per second
	packTrial = 4 << 20
)

// pays says whether it is worth the processor's time to make what goes out shorter.
func (u *uploading) pays() bool {
	return u.bytes < packTrial || (u.limit+u.behind).Seconds()*packRate > float64(u.bytes)
}

// ended charges the upload, which took so long altogether, to the push. What the
// target says of it tells a slow line from a slow target: one that waits for the
// line has time to spare.
func (u *uploading) ended(took time.Duration, got pushwire.UploadAnswer, far bool) {
	s := &u.c.Spent
	s.Limit += u.limit
	s.Source += u.source
	s.Work += max(0, u.making-u.limit-u.behind-u.source)
	behind := u.behind + max(0, took-u.making) // the answer comes when the last byte is on the disk
	if busy := got.Took - got.Waited; !far || busy >= behind/2 {
		s.Store += behind
	} else {
		s.Line += behind
	}
}

// why says in a clause what a push of took spent most of its time on; "" if it was
// not slow. rate is the limit that holds, in bytes per second.
func (s Spent) why(took time.Duration, bytes, rate int64) string {
	if took < slowAfter {
		return ""
	}
	per := func(d time.Duration) string {
		return progress.Bytes(int64(float64(bytes)/max(d.Seconds(), 1))) + "/s"
	}
	limit := "waiting for the rate limit"
	if rate > 0 {
		limit += " of " + progress.Bytes(rate) + "/s"
	}
	most, what := time.Duration(0), ""
	for _, c := range []struct {
		spent time.Duration
		what  string
	}{
		{s.Lock, "waiting for Borg's lock"},
		{s.Source, "reading the source"},
		{s.Work, "hashing and compressing here"},
		{s.Limit, limit},
		{s.Line, "waiting for the line (" + per(s.Line) + ")"},
		{s.Store, "waiting for the target's disk and processor"},
		{s.Away, "waiting for the target to be there"},
	} {
		if c.spent > most {
			most, what = c.spent, c.what
		}
	}
	if what == "" {
		return ""
	}
	return fmt.Sprintf("%.0f %% of %v %s", 100*min(1, most.Seconds()/took.Seconds()), took.Round(time.Second), what)
}
