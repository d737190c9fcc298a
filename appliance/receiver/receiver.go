// Package receiver is the part of the appliance that speaks to the network: an
// SSH server on the VPN interface with the verbs of docs/protocol.md.
//
// It authenticates keys, checks roles, parses verb lines and relays bytes to
// the keeper, which alone reads manifests and streams and writes the disk. It
// reads generations for SFTP, and writes nothing but its own status. Whoever
// takes it over can do what any push key can do, read what lies open, and
// delete nothing.
package receiver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"
)

// The roles of keys.
const (
	RolePush    = "push"    // makes generations of its repositories
	RoleRestore = "restore" // reads generations
	RoleAdmin   = "admin"   // reads generations and logs
)

// Key is one authorised SSH key.
type Key struct {
	Name         string
	Role         string
	PublicKey    string   // authorized_keys form
	Repositories []string // names, a trailing "*" matches the rest; empty means none for push, all otherwise
	Quota        int64    // bytes; 0: none
}

// Brief is what the receiver must know.
type Brief struct {
	Appliance string
	HostKey   secret.Text // OpenSSH private key
	Interface string      // the VPN's; nothing is served on any other
	Port      int
	Keys      []Key
	Window    settings.Window // in which the disk is open by itself
}

// use is a session that uses the disk.
type use struct {
	cancel context.CancelFunc
	moved  atomic.Int64 // bytes uploaded
}

type receiver struct {
	env   *part.Env
	brief Brief
	keys  map[string]Key // by the key's wire form

	// open counts and cancels the sessions that hold files of the disk open.
	mu       sync.Mutex
	open     map[*sshverb.Session]*use
	idle     *sync.Cond // open became empty
	sessions int
	address  string            // "" while not listening
	awake    map[string]*awake // by the key's name
	started  time.Time

	pinning sync.Mutex
	pins    map[string]*pinned // by the key's name
}

// running is the receiver's own count of time.
func (r *receiver) running() time.Duration { return time.Since(r.started) }

// Run serves until ctx ends.
func Run(ctx context.Context, env *part.Env) error {
	// SSH makes garbage of every packet and little is alive: at Go's own 100 % a
	// collection comes with every 4 MiB of upload.
	defer debug.SetGCPercent(debug.SetGCPercent(200))
	// But not at any price: where bursts come quicker than it is cleared up, more often.
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(memoryLimit))
	brief, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	host, err := ssh.ParsePrivateKey([]byte(brief.HostKey.Reveal()))
	if err != nil {
		return errors.New("the host key cannot be read") // never print the parser's words about a key
	}
	r := &receiver{env: env, brief: brief, keys: map[string]Key{}, open: map[*sshverb.Session]*use{},
		awake: map[string]*awake{}, pins: map[string]*pinned{}, started: time.Now()}
	r.idle = sync.NewCond(&r.mu)
	for _, k := range brief.Keys {
		pub, _, _, _, err := ssh.ParseAuthorizedKey([]byte(k.PublicKey))
		if err != nil {
			return fmt.Errorf("key %s: %w", k.Name, err)
		}
		r.keys[string(pub.Marshal())] = k
	}
	server := &sshverb.Server{
		HostKey:    host,
		Authorise:  r.authorise,
		Exec:       r.exec,
		Subsystems: map[string]sshverb.Handler{"sftp": r.sftp},
		Knows:      []string{pushwire.KnowsEnding},
		Limits:     sshverb.Limits{Stripes: stripes},
		Log:        env.Log,
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 2)
	var group sync.WaitGroup
	group.Go(func() {
		failed <- localcall.Serve(ctx, env.Paths.Socket(part.Receiver), []uint32{part.RootUID}, r.local)
		cancel()
	})
	group.Go(func() {
		failed <- r.listen(ctx, server)
		cancel()
	})
	loopErr := env.Loop(ctx, 5*time.Second, func(context.Context) error { return r.report() })
	cancel()
	group.Wait()
	return errors.Join(loopErr, <-failed, <-failed)
}

// memoryLimit is what the Go runtime tries to stay below, in bytes. Sessions that
// need more get it, and pay for it with time.
const memoryLimit = 16 << 20

// stripes bounds what uploads may have under way beside their sessions, in windows of
// 2 MiB: they are in memory when the disk is slower than the line. One upload may have
// them all; who finds none uses its session alone. With all of them full there is little
// room below memoryLimit for garbage: our own pusher uses no more than two for an upload
// that is long enough to keep them so.
const stripes = 4

// muchMoved is how many bytes make so much garbage that it is given back at once.
const muchMoved = 1 << 20

// maxHolds bounds the sessions of one key that use the disk at once.
const maxHolds = 16

const keyExtension = "farkeep-key"

func (r *receiver) authorise(key ssh.PublicKey, _ net.Addr) (*ssh.Permissions, error) {
	k, ok := r.keys[string(key.Marshal())]
	if !ok {
		return nil, fmt.Errorf("the key %s is not authorised", ssh.FingerprintSHA256(key))
	}
	return &ssh.Permissions{
		Extensions: map[string]string{"role": k.Role},
		ExtraData:  map[any]any{keyExtension: k},
	}, nil
}

func keyOf(s *sshverb.Session) Key { return s.Permissions.ExtraData[keyExtension].(Key) }

// listen serves on the VPN interface, and again whenever the interface was made
// anew: a socket bound to a device is bound to its index.
func (r *receiver) listen(ctx context.Context, server *sshverb.Server) error {
	address := net.JoinHostPort("", strconv.Itoa(r.brief.Port))
	waiting := false
	for ctx.Err() == nil {
		device, err := net.InterfaceByName(r.brief.Interface)
		var l net.Listener
		if err == nil {
			config := net.ListenConfig{Control: bindTo(r.brief.Interface)}
			l, err = config.Listen(ctx, "tcp", address)
		}
		if err != nil {
			if !waiting {
				r.env.Log.Info("waiting for the VPN interface", "interface", r.brief.Interface, "err", err)
				waiting = true
			}
			sleep(ctx, time.Second)
			continue
		}
		waiting = false
		r.env.Log.Info("listening", "interface", r.brief.Interface, "port", r.brief.Port)
		r.setAddress(fmt.Sprintf("%s%%%s", l.Addr(), r.brief.Interface))
		epoch, cancel := context.WithCancel(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			r.watch(epoch, device.Index)
			cancel()
		}()
		err = server.Serve(epoch, l)
		cancel()
		<-watched
		r.setAddress("")
		if err != nil {
			r.env.Log.Warn("listening ended", "err", err)
			sleep(ctx, time.Second)
		}
	}
	return nil
}

// watch returns when the interface with index is gone or ctx ends.
func (r *receiver) watch(ctx context.Context, index int) {
	for ctx.Err() == nil {
		sleep(ctx, 2*time.Second)
		if device, err := net.InterfaceByName(r.brief.Interface); err != nil || device.Index != index {
			return
		}
	}
}

// bindTo makes a socket deaf to every other interface, whatever address the
// packets carry (socket(7), SO_BINDTODEVICE).
func bindTo(device string) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var bindErr error
		err := c.Control(func(fd uintptr) { bindErr = unix.BindToDevice(int(fd), device) })
		return errors.Join(err, bindErr)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// hold keeps the disk open for a session, and registers it to be ended when the
// disk must close. The returned context ends then; the caller must call done.
func (r *receiver) hold(ctx context.Context, s *sshverb.Session) (_ context.Context, done func(), err error) {
	k := keyOf(s)
	if err := r.awakeEnough(k); err != nil {
		return nil, nil, err
	}
	began := r.running()
	ctx, cancel := context.WithCancel(ctx)
	r.mu.Lock()
	own := 0
	for other := range r.open {
		if bytes.Equal(other.Key.Marshal(), s.Key.Marshal()) {
			own++
		}
	}
	if own >= maxHolds { // somebody else may want to restore
		r.mu.Unlock()
		cancel()
		return nil, nil, &sshverb.Error{Code: hint.ExitRefused, Text: fmt.Sprintf("this key uses the disk in %d sessions already", own), Hint: "end some of them"}
	}
	// Registered before the disk part is asked: otherwise a disk that grants the
	// hold and closes at once would not find this session.
	u := &use{cancel: cancel}
	r.open[s] = u
	r.mu.Unlock()
	var call *localcall.Conn
	done = func() {
		cancel()
		r.kept(k, began, r.running(), u.moved.Load())
		if u.moved.Load() > muchMoved {
			// The keeper's turn: it links and judges what has come.
			go debug.FreeOSMemory()
		}
		if call != nil {
			call.Close()
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.open, s)
		if len(r.open) == 0 {
			r.idle.Broadcast()
		}
	}
	call, err = localcall.Open(ctx, r.env.Paths.Socket(part.Disk), "hold", nil)
	if err == nil {
		err = call.ReadReply(nil)
	}
	if err != nil {
		done()
		return nil, nil, forPeer(err)
	}
	return ctx, done, nil
}

// local answers the disk part: "release" ends the sessions that hold files of
// the disk and returns when all of them are gone.
func (r *receiver) local(ctx context.Context, req localcall.Request, _ *localcall.Conn) error {
	if req.Verb != "release" {
		return fmt.Errorf("unknown verb %q", req.Verb)
	}
	stop := context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.idle.Broadcast()
	})
	defer stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.open); n > 0 {
		r.env.Log.Info("the disk closes, ending its sessions", "sessions", n)
	}
	for len(r.open) > 0 && ctx.Err() == nil {
		for _, u := range r.open {
			u.cancel()
		}
		r.idle.Wait()
	}
	return ctx.Err()
}

func (r *receiver) setAddress(address string) {
	r.mu.Lock()
	r.address = address
	r.mu.Unlock()
	if err := r.report(); err != nil {
		r.env.Log.Warn("status", "err", err)
	}
}

func (r *receiver) report() error {
	r.mu.Lock()
	now := status.Receiver{Listening: r.address != "", Address: r.address, Sessions: r.sessions, Updated: r.env.Now()}
	r.mu.Unlock()
	return status.Write(r.env.Paths.Status(part.Receiver), now)
}

func (r *receiver) generations() string { return filepath.Join(r.env.Paths.Disk(), "generations") }

// forPeer lets the words of another part through to the peer, and nothing else.
func forPeer(err error) error {
	if err == nil {
		return nil
	}
	var told *localcall.Error
	if errors.As(err, &told) {
		return &sshverb.Error{Code: hint.Code(err), Text: told.Text, Hint: told.Hint, Err: err}
	}
	if errors.Is(err, context.Canceled) {
		return &sshverb.Error{Code: hint.ExitUnreachable, Text: "cut off: the disk closes or the appliance stops", Hint: "try again when it is back; what was uploaded is kept", Err: err}
	}
	return &sshverb.Error{Code: hint.ExitUnreachable, Text: "a part of the appliance does not answer", Hint: "it is restarted by itself: try again in a minute", Err: err}
}
