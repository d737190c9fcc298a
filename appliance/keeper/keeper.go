// Package keeper is the part of the appliance that keeps generations: it alone
// writes the disk, and it parses everything that a pusher sends.
//
// It answers the receiver, which says whose key a peer proved to have (package
// keepercall), and the disk part, which says when the disk is there. It has no
// network, and no verb that deletes or alters a generation: what goes, and when,
// is package curator's, by rules and records that no peer can change. The admin
// key's verbs decide about what is suspect and may ask a repository to leave,
// which is mailed, takes days and can be cancelled. A receiver that was taken
// over can name any key, and then do what that key may do, no more.
//
// What it promises beyond package generations: one push of a repository at a
// time, freed when its peer stalls; bounds on how much runs at once; a disk
// that is asked for is let go of within ReleaseTimeout; and what is known of
// repositories and heartbeats outlives the disk's dark hours, in its own folder
// on the state partition.
package keeper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"farkeep/appliance/curator"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/appliance/suspect"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/history"
)

// Limits.
const (
	// MaxRunning bounds the verbs at work at once; MaxVerifying those that read
	// whole generations, which a disk does worse for every further one: of keys
	// that push, and of all others, whom a pusher cannot hold up.
	MaxRunning   = 16
	MaxVerifying = 1
	// StallTimeout, TakeoverAfter and IdleTimeout are the defaults of Brief.
	StallTimeout  = 2 * time.Minute
	TakeoverAfter = 20 * time.Second
	IdleTimeout   = 10 * time.Minute
	// ReleaseTimeout is how long verbs at work may take to let go of the disk.
	ReleaseTimeout = 12 * time.Second
	// HeartbeatInterval is how long the same heartbeat of a host is only answered,
	// not written down again.
	HeartbeatInterval = time.Minute
)

const tick = time.Second

// Brief is what the keeper must know.
type Brief struct {
	// Reserve is what pushes leave free on the disk, in bytes; 0 means the
	// default of package generations.
	Reserve int64
	// Stall ends a verb whose peer sends nothing while it should.
	Stall time.Duration
	// Takeover is how long a push must have been silent for another attempt at
	// the same repository to end it: a line that was cut looks silent.
	Takeover time.Duration
	// Idle frees a push between verbs. What was uploaded is kept.
	Idle time.Duration
	// History says what stays on the disk. Its zero value lets nothing go.
	History history.Settings
}

func (b *Brief) setDefaults() {
	b.Stall = cmp.Or(b.Stall, StallTimeout)
	b.Takeover = cmp.Or(b.Takeover, TakeoverAfter)
	b.Idle = cmp.Or(b.Idle, IdleTimeout)
}

// Keeper serves the calls.
type Keeper struct {
	env   *part.Env
	brief Brief
	known *memory

	verifying  map[bool]chan struct{} // by whether the key pushes
	background sync.WaitGroup
	boot       string // names this start of the machine
	uptime     func() time.Duration
	scrubs     scrubState

	attaching sync.Mutex

	mu      sync.Mutex // guards the fields below
	store   *generations.Store
	closing bool
	running map[*running]struct{}
	none    chan struct{} // closed when running became empty; nil while nobody waits
	pushes  map[string]*push
	dirty   bool
	copies  copies
	curator *curator.Curator // of store
	passing bool             // a pass of the curator is under way
	again   bool             // another one is wanted after it
	passed  time.Time        // when the last one began
	looked  time.Time        // at the clock
	doubt   string           // what was seen then
	reading map[*call]string // by whom: keys' names
	commits map[string]time.Time
}

// running is a verb at work.
type running struct{ cancel context.CancelCauseFunc }

// Run serves until ctx ends.
func Run(ctx context.Context, env *part.Env) error { return run(ctx, env, uptime) }

func run(ctx context.Context, env *part.Env, uptime func() time.Duration) error {
	brief, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	brief.setDefaults()
	known, err := openMemory(env.Paths.StateDir(part.Keeper), env.Log)
	if err != nil {
		return err
	}
	k := &Keeper{
		env: env, brief: brief, known: known, running: map[*running]struct{}{}, pushes: map[string]*push{},
		verifying: map[bool]chan struct{}{true: make(chan struct{}, MaxVerifying), false: make(chan struct{}, MaxVerifying)},
		dirty:     true, boot: bootID(env), uptime: uptime, reading: map[*call]string{}, commits: map[string]time.Time{},
	}
	serveCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() {
		err := localcall.Serve(serveCtx, env.Paths.Socket(part.Keeper), []uint32{part.RootUID, part.ReceiverUID}, k.serve)
		cancel()
		served <- err
	}()
	loopErr := env.Loop(serveCtx, tick, func(context.Context) error { return k.step() })
	cancel()
	err = errors.Join(loopErr, k.release(), <-served)
	k.background.Wait()
	return err
}

// step is the main loop's: it looks for a disk that was mounted before the
// keeper came (back), frees pushes that idle, and reports.
func (k *Keeper) step() error {
	k.mu.Lock()
	attached, closing, running := k.store != nil, k.closing, len(k.running)
	k.mu.Unlock()
	var err error
	switch {
	case closing && running == 0:
		// A release ran out of time, and the disk part may not ask again: an open
		// file would keep the mapping alive, and with it the key in the kernel.
		err = k.release()
	case !attached && !closing && k.mounted():
		err = k.attach()
		// The disk part may have asked for the disk between the look and the
		// attach, and was told that nobody has it.
		if !k.mounted() {
			err = errors.Join(err, k.release())
		}
	}
	if err != nil {
		k.env.Log.Warn("the disk", "err", err)
	}
	k.freeIdle(k.brief.Idle)
	k.curateInTime()
	return k.report(false)
}

// mounted says whether the disk part says that the disk can be used.
func (k *Keeper) mounted() bool {
	disk, err := status.Read[status.Disk](k.env.Paths.Status(part.Disk))
	return err == nil && disk != nil && disk.State == status.DiskMounted && disk.Mounted
}

// attach opens the store on the disk. It may be repeated.
func (k *Keeper) attach() error {
	// The disk part's call and the keeper's own look may come at once, and two who
	// make the same files stumble over each other.
	k.attaching.Lock()
	defer k.attaching.Unlock()
	k.mu.Lock()
	attached, closing := k.store != nil, k.closing
	k.mu.Unlock()
	if closing {
		// An earlier release ran out of time: this may be another mount by now.
		if err := k.release(); err != nil {
			return err
		}
	} else if attached {
		return nil
	}
	path := k.env.Paths.Disk()
	// Nothing is written into the folder below a disk that is not mounted.
	mounted, err := part.MountPoint(path)
	if err == nil && !mounted {
		err = fmt.Errorf("no disk is mounted on %s", path)
	}
	if err != nil {
		return hint.Because(fmt.Errorf("attach: %w", err), "this is the disk part's to solve; nothing was written")
	}
	store, err := generations.Open(path, generations.Options{
		Shared: true, Reserve: k.brief.Reserve, Now: k.env.Now, ClockSet: k.believed, Log: k.env.Log,
		Judge: suspect.New(suspect.Config{Limits: k.brief.History.Suspicion, Now: k.env.Now}, k.env.Log),
	})
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	cur, err := k.newCurator(store)
	if err != nil {
		return errors.Join(fmt.Errorf("attach: %w", err), store.Close())
	}
	k.known.newDisk()
	k.mu.Lock()
	if k.store != nil { // two at once
		k.mu.Unlock()
		return store.Close()
	}
	k.store, k.curator, k.closing = store, cur, false
	k.mu.Unlock()
	k.env.Log.Info("the disk is there", "free", free(store))
	k.background.Go(func() {
		k.refresh()
		k.curate()
	})
	k.background.Go(k.scrub)
	return k.report(true)
}

// refresh reads what the disk holds. The disk part does not wait for it: a long
// history on a cold disk takes many seconds.
func (k *Keeper) refresh() {
	ctx, store, leave, err := k.enter(context.Background())
	if err != nil {
		return // the disk is wanted back already
	}
	defer leave()
	if err := k.known.refresh(ctx, store); err != nil {
		k.env.Log.Error("the disk's generations cannot be listed", "err", err)
	}
	k.changed()
}

func free(store *generations.Store) int64 {
	free, _, _, err := store.Space()
	if err != nil {
		return -1
	}
	return free
}

// clockSet says whether commit times can be believed.
func (k *Keeper) clockSet() bool {
	network, err := status.Read[status.Network](k.env.Paths.Status(part.Network))
	if err != nil || network == nil {
		return !k.env.Firmware // under another system that system sets the clock
	}
	return network.ClockSet && network.ClockJump == ""
}

var (
	errClosing = errors.New("the disk is closing")
	errDark    = errors.New("the disk is dark")
	errOpening = errors.New("the disk is mounted, and its generations are still being opened")
)

// readyWait bounds for how long a verb waits for a mounted disk's generations to
// be opened: what an interrupted push left is put in order then, on a cold disk.
const (
	readyWait = time.Minute
	readyPoll = 50 * time.Millisecond
)

// refuseDark tells a peer that the disk is not there, as something that passes.
func refuseDark(err error) error {
	return hint.Exit(hint.ExitUnreachable, hint.Because(err, "wake it first: farkeep-pusher does, and so does ssh APPLIANCE wake --wait=600"))
}

// enter registers a verb that uses the disk. leave must be called; ctx ends when
// the disk is wanted back. The disk part says that the disk is mounted before
// the keeper has opened what lies there: whoever comes between the two waits.
func (k *Keeper) enter(ctx context.Context) (_ context.Context, store *generations.Store, leave func(), err error) {
	for deadline := time.Now().Add(readyWait); ; {
		within, store, leave, err := k.enterNow(ctx)
		if !errors.Is(err, errDark) || !k.mounted() {
			return within, store, leave, err
		}
		if !time.Now().Before(deadline) {
			return nil, nil, nil, hint.Exit(hint.ExitUnreachable, hint.Because(errOpening, "try again in a minute; the appliance's log says what it waits for: ssh APPLIANCE logs"))
		}
		select {
		case <-ctx.Done():
			return nil, nil, nil, context.Cause(ctx)
		case <-time.After(readyPoll):
		}
	}
}

func (k *Keeper) enterNow(ctx context.Context) (_ context.Context, store *generations.Store, leave func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &running{cancel}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.closing:
		err = refuseDark(errClosing)
	case k.store == nil:
		err = refuseDark(errDark)
	case len(k.running) >= MaxRunning:
		err = hint.Exit(hint.ExitUnreachable, hint.Because(errors.New("the appliance is busy with as much as it can do"), "try again in a minute"))
	}
	if err != nil {
		cancel(err)
		return nil, nil, nil, err
	}
	k.running[r] = struct{}{}
	return ctx, k.store, func() {
		cancel(nil)
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.running, r)
		if len(k.running) == 0 && k.none != nil {
			close(k.none)
			k.none = nil
		}
	}, nil
}

// release ends what is at work and lets go of the disk.
func (k *Keeper) release() error {
	k.mu.Lock()
	if k.store == nil {
		k.closing = false
		k.mu.Unlock()
		return nil
	}
	k.closing = true
	for r := range k.running {
		r.cancel(errClosing)
	}
	var none chan struct{}
	if len(k.running) > 0 {
		if k.none == nil {
			k.none = make(chan struct{})
		}
		none = k.none
	}
	k.mu.Unlock()
	if none != nil {
		select {
		case <-none:
		case <-time.After(ReleaseTimeout):
			return errors.New("release: the keeper still writes to the disk: ask again")
		}
	}
	k.freeIdle(0)
	k.mu.Lock()
	store, cur := k.store, k.curator
	k.store, k.curator, k.closing = nil, nil, false
	k.mu.Unlock()
	if store == nil {
		return nil
	}
	if err := cur.Observe(true); err != nil {
		k.env.Log.Warn("the disk", "err", err)
	}
	k.env.Log.Info("the disk was let go of")
	return errors.Join(store.Close(), k.report(true))
}

// report writes the status file when something changed, or now and then.
func (k *Keeper) report(changed bool) error {
	k.mu.Lock()
	ready := k.store != nil && !k.closing
	changed, k.dirty = changed || k.dirty, false
	k.mu.Unlock()
	if !changed {
		return nil
	}
	s := k.known.status()
	k.tellHistory(&s)
	s.DiskReady, s.Updated = ready, k.env.Now()
	return status.Write(k.env.Paths.Status(part.Keeper), s)
}

func (k *Keeper) changed() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dirty = true
}

// serve answers one local call.
func (k *Keeper) serve(ctx context.Context, req localcall.Request, conn *localcall.Conn) error {
	switch req.Verb {
	case keepercall.Attach, keepercall.Release:
		if req.UID != part.RootUID {
			return hint.Exit(hint.ExitRefused, fmt.Errorf("%s: only the disk part asks for that", req.Verb))
		}
		if req.Verb == keepercall.Attach {
			return k.attach()
		}
		return k.release()
	}
	verb, ok := verbs[req.Verb]
	if !ok {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("the keeper has no verb %.32q", req.Verb))
	}
	var args keepercall.Args
	if err := req.Decode(&args); err != nil {
		return err
	}
	c := &call{Keeper: k, args: args, conn: conn, log: k.env.Log.With("verb", req.Verb, "key", args.Key)}
	start := k.env.Now()
	err := verb(ctx, c)
	if err != nil {
		c.log.Warn("refused or failed", "repository", args.Repository, "push", args.Push, "err", err)
	} else {
		c.log.Info("done", "repository", args.Repository, "push", args.Push, "seconds", k.env.Now().Sub(start).Seconds())
	}
	k.changed()
	return forPeer(err)
}

// forPeer keeps the appliance's own paths and words out of answers where they
// say nothing to the peer, and gives codes to what it can act upon.
func forPeer(err error) error {
	if err == nil {
		return nil
	}
	var space *generations.SpaceError
	var quota *generations.QuotaError
	switch {
	case errors.As(err, &space):
		err = hint.Exit(hint.ExitRefused, hint.Because(err, "a larger disk, or fewer repositories: nothing here is deleted to make room"))
	case errors.As(err, &quota):
		err = hint.Exit(hint.ExitRefused, hint.Because(err, "raise quota_bytes of this key in the appliance's farkeep.toml"))
	case errors.Is(err, generations.ErrBusy):
		err = hint.Exit(hint.ExitUnreachable, err)
	case errors.Is(err, errClosing), errors.Is(err, context.Canceled):
		err = refuseDark(errClosing)
	}
	return err
}
