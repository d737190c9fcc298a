package torture

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"farkeep/image/torture/service"
)

// stockLimit bounds one session of a stock client: one that hangs is a cut.
const stockLimit = time.Minute

// stockThrough brings the folder that is kept by OpenSSH's sftp to the appliance
// until that succeeds, and compares what arrived with home.
func (b *killBench) stockThrough(ctx context.Context) error {
	if err := b.home.write(stockName, 40_000); err != nil {
		return err
	}
	limit, cancel := context.WithTimeoutCause(ctx, pushedWithin, fmt.Errorf("%v are over", pushedWithin))
	defer cancel()
	failures, err := keepPushing(limit, b.stockOnce)
	b.count("sftp sessions that were cut and tried again", failures)
	if err != nil {
		return err
	}
	b.count("sftp sessions with their commit that went through", 1)
	return b.home.arrived(ctx, b.svc.Generations(), stockName)
}

// stockOnce is what a cron job with stock clients does: upload, then commit.
func (b *killBench) stockOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stockLimit)
	defer cancel()
	upload := exec.CommandContext(ctx, "sftp", append(b.svc.OpenSSH(service.Push), "-q", "-b", "-", "attic")...)
	upload.Stdin = strings.NewReader(fmt.Sprintf("-mkdir /%s\nput %s/* /%[1]s/\n", stockName, b.home.path(stockName)))
	commit := exec.CommandContext(ctx, "ssh", append(b.svc.OpenSSH(service.Push), "attic", "commit", stockName)...)
	for _, cmd := range []*exec.Cmd{upload, commit} {
		cmd.WaitDelay = 5 * time.Second
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s (Debian package openssh-client): %w\n%s", cmd.Args[0], err, out)
		}
	}
	return nil
}
