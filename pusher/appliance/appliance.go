// Package appliance is an appliance as the pusher sees it: a target of package
// target, over SSH with the verbs of package pushwire (docs/protocol.md).
//
// It trusts the appliance with nothing but the pushed bytes: every answer is
// bounded and checked, and a host key other than the pinned one ends the
// conversation before a byte of a repository is sent.
package appliance

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/sshverb"
)

// wakeLasts is how long a disk that was found open is not asked about again. It
// stays open for some minutes after each verb; should it not, the next verb says so.
const wakeLasts = time.Minute

// maxAnswer bounds an answer that is not a line of an offer, in bytes.
const maxAnswer = 1 << 20

// Config says which appliance.
type Config struct {
	Name     string
	Address  string        // host:port of its receiver
	HostKey  ssh.PublicKey // pinned
	Identity ssh.Signer    // the push key
	WakeWait time.Duration // how long its disk may take to open; 0 means 10 minutes
	Log      *slog.Logger
	// DialContext replaces net.Dialer's where the VPN is not the system's own.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
}

// Appliance implements target.Target.
type Appliance struct {
	config Config

	mu     sync.Mutex // guards the fields below
	client *sshverb.Client
	// awake is when a verb last ended that found the disk open; zero: not known.
	awake time.Time
	// needs is how many bytes the push with this name lacks.
	needs struct {
		push  string
		bytes int64
	}
}

var (
	_ target.Target   = (*Appliance)(nil)
	_ target.Finisher = (*Appliance)(nil)
)

// New returns the appliance without connecting to it.
func New(c Config) *Appliance {
	if c.WakeWait == 0 {
		c.WakeWait = 10 * time.Minute
	}
	return &Appliance{config: c}
}

// Name implements target.Target.
func (a *Appliance) Name() string { return a.config.Name }

// Far implements target.Target.
func (a *Appliance) Far() bool { return true }

// Close implements target.Target.
func (a *Appliance) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.client == nil {
		return nil
	}
	err := a.client.Close()
	a.client, a.awake = nil, time.Time{}
	return err
}

// connected returns the connection, which it makes at the first need.
func (a *Appliance) connected(ctx context.Context) (*sshverb.Client, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.client != nil {
		return a.client, nil
	}
	client, err := sshverb.Dial(ctx, sshverb.Peer{
		Address: a.config.Address, User: "farkeep", Identity: a.config.Identity, HostKey: a.config.HostKey, DialContext: a.config.DialContext,
		Ahead: true,
	})
	if err != nil {
		return nil, fmt.Errorf("appliance %s: %w", a.config.Name, err)
	}
	a.config.Log.Debug("connected", "appliance", a.config.Name)
	a.client = client
	return client, nil
}

// ended names the appliance in err, and forgets a connection that broke so that
// the next verb makes a new one.
func (a *Appliance) ended(client *sshverb.Client, err error) error {
	a.foundAwake(err == nil)
	if err == nil {
		return nil
	}
	// A peer that says itself that something is not possible now is there, and may
	// have another verb of ours at work.
	var told *sshverb.Error
	if hint.Code(err) == hint.ExitUnreachable && !errors.As(err, &told) {
		a.mu.Lock()
		if a.client == client {
			a.client = nil
		}
		a.mu.Unlock()
		client.Close()
	}
	return fmt.Errorf("appliance %s: %w", a.config.Name, err)
}

// foundAwake notes whether the verb that just ended found the disk open.
func (a *Appliance) foundAwake(is bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.awake = time.Time{}
	if is {
		a.awake = time.Now() // monotonic
	}
}

func (a *Appliance) isAwake() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.awake.IsZero() && time.Since(a.awake) < wakeLasts
}

// run carries out a verb with a JSON line in (nil for none) and decodes the
// JSON line that comes back into out (nil for none).
func (a *Appliance) run(ctx context.Context, verb string, in, out any) error {
	client, err := a.connected(ctx)
	if err != nil {
		return err
	}
	var input io.Reader
	if in != nil {
		r, w := io.Pipe()
		go func() { w.CloseWithError(pushwire.WriteLine(w, in)) }()
		defer r.Close()
		input = r
	}
	answer, err := client.Run(ctx, verb, input, maxAnswer)
	if err == nil && out != nil {
		if jsonErr := json.Unmarshal(answer, out); jsonErr != nil {
			err = fmt.Errorf("%s: the answer is not understood: %w", verb, jsonErr)
		}
	}
	return a.ended(client, err)
}

// Wake implements target.Target: it asks for the disk and waits until it is mounted,
// unless a verb just used it.
func (a *Appliance) Wake(ctx context.Context) error {
	if a.isAwake() {
		return nil
	}
	wait := a.config.WakeWait
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	var disk pushwire.DiskState
	if err := a.run(ctx, fmt.Sprintf("wake --wait=%d", max(0, int(wait/time.Second))), nil, &disk); err != nil {
		return err
	}
	if !disk.Mounted {
		a.foundAwake(false)
		why := disk.Error
		if why == "" {
			why = "it gives no reason"
		}
		err := fmt.Errorf("appliance %s: its disk did not open within %v (%s): %s", a.config.Name, wait.Round(time.Second), disk.State, why)
		return hint.Exit(hint.ExitUnreachable, hint.Because(err, "see what it says itself: farkeep-pusher status"))
	}
	return nil
}

// Offer implements target.Target.
func (a *Appliance) Offer(ctx context.Context, repository string, offer pushwire.Offer, list target.List) (target.Answer, error) {
	client, err := a.connected(ctx)
	if err != nil {
		return target.Answer{}, err
	}
	answer, err := a.offer(ctx, client, repository, offer, list)
	a.mu.Lock()
	a.needs.push, a.needs.bytes = answer.Push, answer.NeedBytes
	a.mu.Unlock()
	return answer, a.ended(client, err)
}

// needed is how many bytes a push lacks, by the answer to its offer; 0: not known.
func (a *Appliance) needed(push string) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.needs.push != push {
		return 0
	}
	return a.needs.bytes
}

func (a *Appliance) offer(ctx context.Context, client *sshverb.Client, repository string, offer pushwire.Offer, list target.List) (answer target.Answer, err error) {
	d, err := client.Start(ctx, "offer "+repository)
	if err != nil {
		return answer, err
	}
	defer d.Close()
	r := pushwire.NewReader(d.Stdout)
	if err := send(d, func(w io.Writer) error { return pushwire.WriteLine(w, offer) }); err != nil {
		return answer, err
	}
	if list.Ahead != nil {
		// It fits into the session's window: nothing is waited for. Who has no use for
		// it says so in the answer.
		d.Stdin.Write(list.Ahead)
		d.Stdin.Close()
		client.Widen(stripesAhead(client.RoundTrip(), offer.Bytes))
	}
	if err := receive(d, r, &answer.OfferAnswer); err != nil {
		return answer, err
	}
	if answer.Answer == pushwire.AnswerSendManifest {
		if list.Ahead == nil {
			source, err := list.Open(answer.BaseDigest)
			if err != nil {
				return answer, err
			}
			defer source.Close()
			err = send(d, func(w io.Writer) error {
				_, err := io.Copy(w, source)
				return err
			})
			if err != nil {
				return answer, err
			}
			d.Stdin.Close()
			client.Widen(stripesAhead(client.RoundTrip(), offer.Bytes))
		}
		answer.OfferAnswer = pushwire.OfferAnswer{}
		if err := receive(d, r, &answer.OfferAnswer); err != nil {
			return answer, err
		}
	} else {
		d.Stdin.Close()
	}
	switch answer.Answer {
	case pushwire.AnswerSame:
	case pushwire.AnswerSend:
		if answer.Needed, err = manifest.ReadSet(r, offer.Entries); err != nil {
			return answer, broken(d, fmt.Errorf("the list of needed files: %w", err))
		}
		if answer.Needed.Len() != answer.Need || len(answer.Resume) > pushwire.MaxPartials {
			return answer, fmt.Errorf("offer %s: %d files are said to be needed, %d are listed", repository, answer.Need, answer.Needed.Len())
		}
	default:
		return answer, fmt.Errorf("offer %s: %.40q is no known answer", repository, answer.Answer)
	}
	return answer, d.Wait()
}

// Upload implements target.Target.
func (a *Appliance) Upload(ctx context.Context, push string, write func(io.Writer) error) (answer pushwire.UploadAnswer, err error) {
	_, err = a.Finish(ctx, push, write, target.Ending{
		Commit:   func() bool { return false },
		Uploaded: func(got pushwire.UploadAnswer) { answer = got },
	})
	return answer, err
}

// Finish implements target.Finisher.
func (a *Appliance) Finish(ctx context.Context, push string, write func(io.Writer) error, end target.Ending) (target.Finished, error) {
	client, err := a.connected(ctx)
	if err != nil {
		return target.Finished{}, err
	}
	done, err := a.finish(ctx, client, push, write, end)
	if err == nil && done.BeatErr != nil {
		done.BeatErr = a.ended(client, done.BeatErr)
		return done, nil
	}
	return done, a.ended(client, err)
}

func (a *Appliance) finish(ctx context.Context, client *sshverb.Client, push string, write func(io.Writer) error, end target.Ending) (done target.Finished, err error) {
	d, err := client.StartWide(ctx, "upload "+push, stripes(client.RoundTrip(), a.needed(push)))
	if err != nil {
		return done, err
	}
	defer d.Close()
	if err := send(d, write); err != nil {
		return done, err
	}
	commit := client.Knows(pushwire.KnowsEnding) && end.Commit()
	if commit {
		if done.Beaten, err = sendEnding(d, push, end); err != nil {
			return done, err
		}
	}
	d.Stdin.Close()
	r := pushwire.NewReader(d.Stdout)
	var answer pushwire.UploadAnswer
	if err := receive(d, r, &answer); err != nil {
		return done, err
	}
	if !commit {
		err := d.Wait()
		if err == nil {
			end.Uploaded(answer)
		}
		return done, err
	}
	end.Uploaded(answer)
	var committed pushwire.CommitAnswer
	if err := receive(d, r, &committed); err != nil {
		return done, err
	}
	done.Commit = &committed
	if !done.Beaten {
		return done, d.Wait()
	}
	done.BeatErr = receive(d, r, &struct{}{})
	if done.BeatErr == nil {
		done.BeatErr = d.Wait()
	}
	return done, nil
}

// sendEnding sends what is to follow an upload. A heartbeat of too many repositories
// for its line stays behind.
func sendEnding(d *sshverb.Dialogue, push string, end target.Ending) (beaten bool, err error) {
	line := pushwire.Ending{Commit: push}
	if end.Heartbeat != nil {
		h := end.Heartbeat()
		line.Heartbeat = &h
	}
	err = send(d, func(w io.Writer) error { return pushwire.WriteLine(w, line) })
	if errors.Is(err, pushwire.ErrLine) && line.Heartbeat != nil {
		line.Heartbeat = nil
		err = send(d, func(w io.Writer) error { return pushwire.WriteLine(w, line) })
	}
	return line.Heartbeat != nil, err
}

// Commit implements target.Target.
func (a *Appliance) Commit(ctx context.Context, push string) (pushwire.CommitAnswer, error) {
	var answer pushwire.CommitAnswer
	err := a.run(ctx, "commit "+push, nil, &answer)
	return answer, err
}

// Abort implements target.Target.
func (a *Appliance) Abort(ctx context.Context, push string) error {
	return a.run(ctx, "abort "+push, nil, nil)
}

// Heartbeat implements target.Target.
func (a *Appliance) Heartbeat(ctx context.Context, h pushwire.Heartbeat) error {
	return a.run(ctx, "heartbeat "+h.Host, h, nil)
}

// Status implements target.Target.
func (a *Appliance) Status(ctx context.Context) (*pushwire.Status, error) {
	s := &pushwire.Status{}
	err := a.run(ctx, "status --json", nil, s)
	a.foundAwake(false) // it needs no open disk
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Sleep asks the appliance to close its disk when nobody else uses it.
func (a *Appliance) Sleep(ctx context.Context) error {
	err := a.run(ctx, "sleep", nil, nil)
	a.foundAwake(false)
	return err
}

// send writes to a verb. When the peer ended the verb early its reason is the
// error; an error of write itself cuts the verb off.
func send(d *sshverb.Dialogue, write func(io.Writer) error) error {
	line := &lineWriter{w: d.Stdin}
	err := write(line)
	if line.err != nil {
		return broken(d, line.err)
	}
	return err
}

// receive reads one JSON line of a verb's answer.
func receive(d *sshverb.Dialogue, r *bufio.Reader, v any) error {
	if err := pushwire.ReadLine(r, v); err != nil {
		return broken(d, err)
	}
	return nil
}

// broken explains why the line to a verb ended: by the peer's own words where it
// has any.
func broken(d *sshverb.Dialogue, err error) error {
	d.Stdin.Close()
	if told := d.Wait(); told != nil {
		return told
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the appliance ended the verb without an answer: %w", err)
	}
	return err
}

// lineWriter tells the errors of the line from those of whoever writes.
type lineWriter struct {
	w   io.Writer
	err error
}

func (l *lineWriter) Write(p []byte) (int, error) {
	n, err := l.w.Write(p)
	if err != nil {
		l.err = err
	}
	return n, err
}
