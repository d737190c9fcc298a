package receiver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"farkeep/appliance/browse"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/logbook"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/sshverb"
)

// MaxWakeWait bounds how long "wake --wait" may wait.
const MaxWakeWait = 30 * time.Minute

// relayBuffer is how much of a peer's input goes to the keeper at once, in bytes.
// SSH packets carry 32 KiB: gathering some spares the keeper wake-ups and the
// peer window messages.
const relayBuffer = 128 << 10

// maxLog bounds what "logs" shows, in bytes: the current file and its
// predecessors as far as they fit.
const maxLog = 2 << 20

type verb struct {
	roles []string
	usage string
	do    func(r *receiver, ctx context.Context, s *sshverb.Session, k Key) error
}

var verbs = map[string]verb{
	"status":      {[]string{RolePush, RoleRestore, RoleAdmin}, "status [--json]", (*receiver).status},
	"wake":        {[]string{RolePush, RoleRestore, RoleAdmin}, "wake [--wait=SECONDS]", (*receiver).wake},
	"sleep":       {[]string{RolePush, RoleAdmin}, "sleep", (*receiver).sleep},
	"offer":       {[]string{RolePush}, "offer REPOSITORY", keeperVerb(keepercall.Offer, 1, 1, true)},
	"upload":      {[]string{RolePush}, "upload PUSH", keeperVerb(keepercall.Upload, 1, 1, true)},
	"commit":      {[]string{RolePush}, "commit PUSH|REPOSITORY", keeperVerb(keepercall.Commit, 1, 1, false)},
	"abort":       {[]string{RolePush}, "abort PUSH|REPOSITORY", keeperVerb(keepercall.Abort, 1, 1, false)},
	"heartbeat":   {[]string{RolePush}, "heartbeat HOST", keeperVerb(keepercall.Heartbeat, 1, 1, true)},
	"generations": {[]string{RolePush, RoleRestore, RoleAdmin}, "generations [--text] [REPOSITORY]", (*receiver).listGenerations},
	"verify":      {[]string{RolePush, RoleRestore, RoleAdmin}, "verify REPOSITORY GENERATION", keeperVerb(keepercall.Verify, 2, 2, false)},
	"logs":        {[]string{RoleAdmin}, "logs", (*receiver).logs},

	"accept":       {[]string{RoleAdmin}, "accept REPOSITORY GENERATION [WHY]", keeperVerb(keepercall.Accept, 2, maxWords, false)},
	"reject":       {[]string{RoleAdmin}, "reject REPOSITORY GENERATION [WHY]", keeperVerb(keepercall.Reject, 2, maxWords, false)},
	"retire":       {[]string{RoleAdmin}, "retire REPOSITORY", keeperVerb(keepercall.Retire, 1, 1, false)},
	"keep":         {[]string{RoleAdmin}, "keep REPOSITORY", keeperVerb(keepercall.Keep, 1, 1, false)},
	"accept-clock": {[]string{RoleAdmin}, "accept-clock", (*receiver).acceptClock},
	"floor":        {[]string{RoleAdmin}, "floor GENERATIONS AGE", (*receiver).floor},
}

// maxWords bounds what an admin says about a decision, in words of the verb's line.
const maxWords = 64

func (r *receiver) exec(ctx context.Context, s *sshverb.Session) error {
	r.count(+1)
	defer r.count(-1)
	k := keyOf(s)
	v, known := verbs[s.Verb]
	// A verb of another role looks like one that does not exist.
	if !known || !slices.Contains(v.roles, k.Role) {
		return &sshverb.Error{Code: hint.ExitRefused, Text: fmt.Sprintf("the key %q (%s) has no verb of that name", k.Name, k.Role), Hint: "it has: " + strings.Join(verbsOf(k.Role), ", ")}
	}
	err := v.do(r, ctx, s, k)
	if errors.Is(err, errUsage) {
		return &sshverb.Error{Code: hint.ExitUsage, Text: "usage: " + v.usage}
	}
	return err
}

func verbsOf(role string) []string {
	var names []string
	for name, v := range verbs {
		if slices.Contains(v.roles, role) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (r *receiver) count(n int) {
	r.mu.Lock()
	r.sessions += n
	r.mu.Unlock()
}

// errUsage is returned by a verb whose arguments are not what its usage says.
var errUsage = errors.New("wrong arguments")

// keeperVerb relays a verb with between least and most arguments to the keeper:
// the peer's bytes go in if the verb takes any, the keeper's answers and raw
// bytes come out.
func keeperVerb(name string, least, most int, input bool) func(*receiver, context.Context, *sshverb.Session, Key) error {
	return func(r *receiver, ctx context.Context, s *sshverb.Session, k Key) error {
		if len(s.Args) < least || len(s.Args) > most {
			return errUsage
		}
		args := keepercall.Args{Key: k.Name, Role: k.Role, Repositories: k.Repositories, Quota: k.Quota}
		arg := func(i int) string {
			if i < len(s.Args) {
				return s.Args[i]
			}
			return ""
		}
		switch name {
		case keepercall.Offer, keepercall.Verify, keepercall.Retire, keepercall.Keep:
			args.Repository, args.Generation = arg(0), arg(1)
		case keepercall.Accept, keepercall.Reject:
			args.Repository, args.Generation, args.Why = arg(0), arg(1), strings.Join(s.Args[2:], " ")
		case keepercall.Heartbeat:
			args.Host = arg(0)
		default:
			args.Push = arg(0)
		}
		ctx, done, err := r.hold(ctx, s)
		if err != nil {
			return err
		}
		defer done()
		return r.relay(ctx, s, name, args, input, s.Stdout)
	}
}

func (r *receiver) relay(ctx context.Context, s *sshverb.Session, name string, args keepercall.Args, input bool, out io.Writer) error {
	call, err := localcall.Open(ctx, r.env.Paths.Socket(part.Keeper), name, args)
	if err != nil {
		return forPeer(err)
	}
	defer call.Close()
	if input {
		r.mu.Lock()
		u := r.open[s]
		r.mu.Unlock()
		// The goroutine ends with the session's channel, which the server closes
		// when this function returns: a read from a peer cannot be interrupted.
		// The keeper knows when it waits for the peer and for how long it may: an
		// offer that it thinks about for minutes is not the peer's stall.
		go func() {
			peer := &peerInput{from: counted{s.Patient(), &u.moved}}
			_, err := io.CopyBuffer(call, peer, make([]byte, relayBuffer))
			switch {
			case err == nil:
				call.CloseWrite()
			case peer.failed:
				call.Close() // half an upload must not look like a whole one
			}
			// Else it is the keeper that takes no more: its reason is on the way.
		}()
	} else {
		call.CloseWrite()
	}
	for {
		var answer keepercall.Answer
		if err := call.ReadReply(&answer); err != nil {
			return forPeer(err)
		}
		if answer.Out != nil {
			if _, err := out.Write(append(answer.Out, '\n')); err != nil {
				return err
			}
		}
		switch answer.Then {
		case keepercall.ThenLine:
		case keepercall.ThenRaw:
			_, err := io.Copy(out, call)
			return err
		default:
			return nil
		}
	}
}

// peerInput tells whether it was the peer's side that failed.
type peerInput struct {
	from   io.Reader
	failed bool
}

func (p *peerInput) Read(b []byte) (int, error) {
	n, err := p.from.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		p.failed = true
	}
	return n, err
}

// sftp serves the generations to restore and admin keys, and to push keys, by the
// keeper, what they upload with stock clients.
func (r *receiver) sftp(ctx context.Context, s *sshverb.Session) error {
	r.count(+1)
	defer r.count(-1)
	k := keyOf(s)
	ctx, done, err := r.hold(ctx, s)
	if err != nil {
		return err
	}
	defer done()
	if k.Role == RolePush {
		return r.relaySFTP(ctx, s, k)
	}
	ctx, unpin, err := r.pin(ctx, k)
	if err != nil {
		return err
	}
	defer unpin()
	disk, err := browse.Open(r.generations(), k.mayUse)
	if err != nil {
		return &sshverb.Error{Code: hint.ExitFailure, Text: "there are no generations yet", Err: err}
	}
	defer disk.Close()
	stop := context.AfterFunc(ctx, s.End)
	defer stop()
	return disk.Serve(s.Patient(), s.ReadWriteCloser(), browse.Idle, s.End)
}

// mayUse says whether the key may use the repository.
func (k Key) mayUse(repository string) bool {
	if len(k.Repositories) == 0 {
		return k.Role != RolePush
	}
	return slices.ContainsFunc(k.Repositories, func(pattern string) bool {
		if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
			return strings.HasPrefix(repository, prefix)
		}
		return repository == pattern
	})
}

func (r *receiver) wake(ctx context.Context, s *sshverb.Session, k Key) error {
	if err := r.mayWake(k); err != nil {
		return err
	}
	wait := time.Duration(0)
	for _, arg := range s.Args {
		seconds, ok := strings.CutPrefix(arg, "--wait=")
		n, err := strconv.Atoi(seconds)
		if !ok || err != nil || n < 0 || n > int(MaxWakeWait/time.Second) {
			return errUsage
		}
		wait = time.Duration(n) * time.Second
	}
	if err := localcall.Call(ctx, r.env.Paths.Socket(part.Disk), "wake", nil, nil); err != nil {
		return forPeer(err)
	}
	deadline := time.Now().Add(wait) // monotonic
	for {
		disk, err := status.Read[status.Disk](r.env.Paths.Status(part.Disk))
		if err != nil {
			return err
		}
		if disk == nil {
			disk = &status.Disk{State: "unknown"}
		}
		if disk.Mounted || !time.Now().Before(deadline) {
			if wait > 0 && !disk.Mounted {
				s.Log.Warn("the disk did not open in time", "state", disk.State, "err", disk.Error)
			}
			return pushwire.WriteLine(s.Stdout, diskState(disk))
		}
		sleep(ctx, 250*time.Millisecond)
		if ctx.Err() != nil {
			return forPeer(ctx.Err())
		}
	}
}

func (r *receiver) sleep(ctx context.Context, s *sshverb.Session, _ Key) error {
	if len(s.Args) != 0 {
		return errUsage
	}
	if err := localcall.Call(ctx, r.env.Paths.Socket(part.Disk), "sleep", nil, nil); err != nil {
		return forPeer(err)
	}
	disk, err := status.Read[status.Disk](r.env.Paths.Status(part.Disk))
	if err != nil || disk == nil {
		return errors.Join(errors.New("the disk's state is not known"), err)
	}
	return pushwire.WriteLine(s.Stdout, diskState(disk))
}

// logs shows the newest lines of the log, those of rotated files too, maxLog
// bytes at most.
func (r *receiver) logs(_ context.Context, s *sshverb.Session, _ Key) error {
	if len(s.Args) != 0 {
		return errUsage
	}
	if err := logbook.Read(s.Stdout, filepath.Join(r.env.Paths.State, "log"), maxLog); err != nil {
		return &sshverb.Error{Code: hint.ExitFailure, Text: "the log cannot be read", Err: err}
	}
	return nil
}

func (r *receiver) status(_ context.Context, s *sshverb.Session, k Key) error {
	asJSON := slices.Equal(s.Args, []string{"--json"})
	if len(s.Args) != 0 && !asJSON {
		return errUsage
	}
	now := r.collect(k)
	if asJSON {
		return json.NewEncoder(s.Stdout).Encode(now)
	}
	_, err := io.WriteString(s.Stdout, describe(now))
	return err
}
