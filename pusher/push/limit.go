package push

import (
	"context"
	"io"
	"time"
)

// slice is the most that passes a limit at once, in bytes. A line that is slower
// than a slice per second still moves.
const slice = 32 << 10

// limit lets bytes pass at a rate, which may change from hour to hour: what was
// written since the start never exceeds rate times the time passed by more than
// one slice. After a pause it does not catch up by more than burst.
type limit struct {
	rate func(now time.Time) int64 // bytes per second; 0: none
	now  func() time.Time
	wait func(context.Context, time.Duration) error
	due  time.Time // when all that passed is paid for
}

// burst is the longest idle time that may be made up for.
const burst = 100 * time.Millisecond

// pass waits until the next bytes may pass, and says how many of n.
func (l *limit) pass(ctx context.Context, n int) (int, error) {
	now := l.now()
	if earliest := now.Add(-burst); l.due.Before(earliest) {
		l.due = earliest
	}
	if ahead := l.due.Sub(now); ahead > 0 {
		if err := l.wait(ctx, ahead); err != nil {
			return 0, err
		}
		now = l.due
	}
	if rate := l.rate(now); rate > 0 {
		n = min(n, slice)
		l.due = l.due.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	}
	return n, nil
}

// limited is a writer behind a limit.
type limited struct {
	ctx context.Context
	w   io.Writer
	l   *limit
}

func (w *limited) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		n, err := w.l.pass(w.ctx, len(p))
		if err != nil {
			return written, err
		}
		n, err = w.w.Write(p[:n])
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
