package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"farkeep/appliance/consent"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/keysource"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/relay"
	"farkeep/appliance/status"
	"farkeep/appliance/tokens"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/sync/errgroup"
)

// The part's verbs, for package localcall. "wake" and "sleep" answer with
// status.Disk at once; "hold" answers with nothing, and holds until the caller
// closes the call.
const (
	VerbWake  = "wake"
	VerbSleep = "sleep"
	VerbHold  = "hold"
)

// Brief is what the supervisor tells the part.
type Brief struct {
	Disk       settings.Disk
	Identity   secret.Text // the client key, for the part unlock
	KeyServers []settings.KeyServer
}

// Run is the part disk. It needs root, for mounting and mapping, and speaks to
// the network only through its child, the part unlock.
func Run(ctx context.Context, env *part.Env) error {
	brief, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	before := status.Disk{}
	if s, err := status.Read[status.Disk](env.Paths.Status(part.Disk)); err != nil {
		env.Log.Warn("what an earlier run reported", "err", err)
	} else if s != nil {
		before = *s
	}
	servers, err := keysource.Names(brief.KeyServers)
	if err != nil {
		return err
	}
	book, err := tokens.Open(filepath.Join(env.Paths.StateDir(part.Disk), "key-servers.json"), slices.Collect(maps.Keys(servers)))
	if err != nil {
		// Without tokens the key servers will hold the next request, and tell a person.
		env.Log.Error("starting without what was remembered", "err", err)
	}
	d := New(Config{
		Before:    before,
		Servers:   servers,
		Book:      book,
		Boottime:  consent.Boottime,
		UUID:      brief.Disk.LUKS,
		Window:    brief.Disk.Window,
		IdleClose: brief.Disk.IdleClose.Std(),
		OpenRelay: func(on bool) (relay.Switch, error) { return relay.Open(brief.Disk.Relay, on) },
		System: system(&linux{
			env: env, uuid: brief.Disk.LUKS, identity: brief.Identity, keyServers: brief.KeyServers,
			target: env.Paths.Disk(), owner: part.KeeperUID, sys: "/sys", log: env.Log,
		}),
		Neighbours: neighbours{env.Paths},
		Memory:     checkFile(filepath.Join(env.Paths.StateDir(part.Disk), "check-wanted")),
		ClockSet:   func() bool { return !env.Firmware || network(env).ClockSet },
		VPNUp:      func() bool { return !env.Firmware || network(env).VPNUp },
		Alive:      env.Alive,
		Report: func(s status.Disk) {
			if err := status.Write(env.Paths.Status(part.Disk), s); err != nil {
				env.Log.Warn("status", "err", err)
			}
		},
		Log: env.Log,
	})
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return d.Run(ctx) })
	group.Go(func() error {
		return localcall.Serve(ctx, env.Paths.Socket(part.Disk), []uint32{part.RootUID, part.ReceiverUID, part.KeeperUID}, d.Handle)
	})
	return group.Wait()
}

// NotOpen is what "hold" is refused with. It passes, and its code says so: a push
// that hears it wakes the disk and asks again.
func NotOpen(state string) error {
	err := hint.Because(fmt.Errorf("the disk is not open (%s)", state), `"wake" opens it; try again when "status" says that it is mounted`)
	return hint.Exit(hint.ExitUnreachable, err)
}

// Handle serves the part's verbs.
func (d *Disk) Handle(_ context.Context, req localcall.Request, conn *localcall.Conn) error {
	var none struct{}
	if len(req.Args) > 0 && string(req.Args) != "null" {
		if err := req.Decode(&none); err != nil {
			return err
		}
	}
	switch req.Verb {
	case VerbWake:
		return conn.Reply(d.Wake())
	case VerbSleep:
		return conn.Reply(d.Sleep())
	case VerbHold:
		release, ok := d.Hold()
		if !ok {
			return NotOpen(d.Status().State)
		}
		defer release()
		if err := conn.Reply(none); err != nil {
			return err
		}
		// Until the caller hangs up, or this part ends.
		_, err := io.Copy(io.Discard, conn)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		return nil
	default:
		return hint.Exit(hint.ExitUsage, fmt.Errorf("the disk has no verb %.40q", req.Verb))
	}
}

// network is what the network part says; nothing is up or set until it has
// spoken. In service mode clock and VPN are the system's business, and believed.
func network(env *part.Env) status.Network {
	s, err := status.Read[status.Network](env.Paths.Status(part.Network))
	if err != nil || s == nil {
		return status.Network{}
	}
	return *s
}

// neighbours are the receiver and the keeper.
type neighbours struct{ paths part.Paths }

func (n neighbours) Attach(ctx context.Context) error {
	return localcall.Call(ctx, n.paths.Socket(part.Keeper), keepercall.Attach, nil, nil)
}

// Release ends the receiver's sessions first: they use the keeper. A part that
// does not run holds nothing. The receiver may take half of the time: one that
// waits for a peer whose line is dead must not keep the keeper from hearing.
func (n neighbours) Release(ctx context.Context) error {
	first, cancel := ctx, context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		first, cancel = context.WithTimeout(ctx, time.Until(deadline)/2)
	}
	defer cancel()
	return errors.Join(n.release(first, part.Receiver), n.release(ctx, part.Keeper))
}

func (n neighbours) release(ctx context.Context, name string) error {
	err := localcall.Call(ctx, n.paths.Socket(name), keepercall.Release, nil, nil)
	var answer *localcall.Error
	if errors.As(err, &answer) || ctx.Err() != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// checkFile remembers by its existence that the file system must be checked.
type checkFile string

func (f checkFile) CheckWanted() bool {
	_, err := os.Stat(string(f))
	return err == nil
}

func (f checkFile) WantCheck(wanted bool) error {
	if !wanted {
		if err := os.Remove(string(f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return atomicfile.SyncDir(filepath.Dir(string(f)))
	}
	return atomicfile.Write(string(f), []byte("the disk failed while it was open\n"), 0o600)
}
