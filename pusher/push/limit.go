package push

import (
	"context"
	"io"
	"time"
)

// slice is the most that passes a limit at once, in bytes. A line that is slower
// than a slice per second still moves.
const slice = 32 << 10

// limit lets bytes pass at a rate: what was written since the start never exceeds
// rate times the time passed by more than one slice. After a pause it does not
// catch up by more than burst.
type limit struct {
	rate int64 // bytes per second
	now  func() time.Time
	wait func(context.Context, time.Duration) error
	due  time.Time // when all that passed is paid for
}

// burst is the longest idle time that may be made up for.
const burst = 100 * time.Millisecond

func (l *limit) pass(ctx context.Context, n int) error {
	now := l.now()
	if earliest := now.Add(-burst); l.due.Before(earliest) {
		l.due = earliest
	}
	if ahead := l.due.Sub(now); ahead > 0 {
		if err := l.wait(ctx, ahead); err != nil {
			return err
		}
	}
	l.due = l.due.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	return nil
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
		n := min(len(p), slice)
		if err := w.l.pass(w.ctx, n); err != nil {
			return written, err
		}
		n, err := w.w.Write(p[:n])
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
