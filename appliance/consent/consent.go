// Package consent asks the key servers whether the disk may stay open, or may
// be opened again. It is the whole of the part "consent", a process that lives
// for seconds: the disk part, which has no network of its own, starts one for
// every round.
//
// A round asks every server at the same time: a lease while the disk is open, a
// check-in while it is dark, and, after it was closed for lack of consent, first
// the word that it is dark. A server that refuses a check-in can be asked for the
// key in the same breath (Round.Petition), so that the request is listed there
// and a person can approve it: nothing else is. The disk has no power then, and a
// key that comes is wiped. A server that is dead, slow or half reachable costs
// the round keysource.Answer and no other server anything.
//
// Silence is no refusal, and neither is a machine that is not the pinned one, a
// server in doubt, or one that does not know the appliance: only the pinned
// server's own "refused" is one. What follows from the answers is the caller's.
package consent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"farkeep/appliance/keysource"
	"farkeep/appliance/part"
	"farkeep/appliance/tokens"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// Brief is what the disk part tells the part consent.
type Brief struct {
	Identity   secret.Text
	KeyServers []settings.KeyServer
	Round
}

// Round is what one round asks.
type Round struct {
	UUID string   // of the disk
	Open bool     // the disk is unlocked: renew its lease; otherwise check in
	Dark []string // the servers, by host key, that have to hear that it is dark
	// Petition asks servers that refuse a check-in for the key as well.
	Petition bool
	Tokens   map[string]keywire.Token
	Claims   keywire.Claims
}

// Result is what the servers said, in the order of the settings.
type Result struct {
	Answers []Answer `json:"answers"`
	// Tokens came with keys, by host key.
	Tokens tokens.Fresh `json:"tokens"`
}

// Answer is what one server said.
type Answer struct {
	Server  string `json:"server"`
	ID      string `json:"id"` // its host key's fingerprint
	Granted bool   `json:"granted"`
	Refused bool   `json:"refused"`
	// Until is when the lease ends and Renew when the next is due, both by
	// CLOCK_BOOTTIME, counted from the moment at which the request was sent.
	Until time.Duration `json:"until"`
	Renew time.Duration `json:"renew"`
	Told  bool          `json:"told"`  // it knows that the disk is dark
	Freed bool          `json:"freed"` // it gave a key: what it refused before is over
	Error string        `json:"error"` // "" after an answer
}

// Run is the part consent: one round, one result line.
func Run(ctx context.Context, env *part.Env) error {
	if err := keysource.Confine(); err != nil {
		return err
	}
	brief, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	id, err := identity.Signer(brief.Identity)
	if err != nil {
		return fmt.Errorf("client identity: %w", err)
	}
	servers, err := keysource.Servers(brief.KeyServers, id)
	if err != nil {
		return err
	}
	var asked []Asked
	for _, s := range servers {
		asked = append(asked, s)
	}
	return env.Result(Ask(ctx, asked, brief.Round, Boottime))
}

// Asked is a key server; keysource.Server is one.
type Asked interface {
	// Ask makes a request; its error wraps keysource.ErrRefused where the server refused.
	Ask(ctx context.Context, r keywire.Request) ([]byte, error)
	// Key asks for the key, with the same errors.
	Key(ctx context.Context, r keywire.Request) (keysource.Grant, error)
	ID() string
	String() string
}

// Ask makes one round. boottime is CLOCK_BOOTTIME.
func Ask(ctx context.Context, servers []Asked, r Round, boottime func() time.Duration) Result {
	got := Result{Answers: make([]Answer, len(servers)), Tokens: tokens.Fresh{}}
	fresh := make([]keywire.Token, len(servers))
	var asking sync.WaitGroup
	for i, s := range servers {
		asking.Go(func() { got.Answers[i], fresh[i] = one(ctx, s, r, boottime) })
	}
	asking.Wait()
	for i, t := range fresh {
		if t != "" {
			got.Tokens[servers[i].ID()] = t
		}
	}
	return got
}

func one(ctx context.Context, s Asked, r Round, boottime func() time.Duration) (a Answer, fresh keywire.Token) {
	a = Answer{Server: s.String(), ID: s.ID()}
	if slices.Contains(r.Dark, a.ID) && !r.Open {
		text, err := s.Ask(ctx, keywire.Request{Verb: keywire.Dark, UUID: r.UUID})
		if err == nil {
			_, err = keywire.ParseCheckin(text)
		}
		a.Told = err == nil
	}
	request := keywire.Request{Verb: keywire.CheckIn, Token: r.Tokens[a.ID], Claims: r.Claims}
	if r.Open {
		request.Verb, request.UUID = keywire.Renew, r.UUID
	}
	sent := boottime()
	text, err := s.Ask(ctx, request)
	switch {
	case errors.Is(err, keysource.ErrRefused):
		a.Refused = true
	case err == nil && r.Open:
		var l keywire.Lease
		if l, err = keywire.ParseLease(text); err == nil {
			a.Granted, a.Until, a.Renew = true, sent+l.Duration(), sent+l.Renewal()
		}
	case err == nil:
		_, err = keywire.ParseCheckin(text)
		a.Granted = err == nil
	}
	if a.Refused && r.Petition && !r.Open {
		request.Verb, request.UUID = keywire.Key, r.UUID
		if g, petition := s.Key(ctx, request); petition == nil {
			g.Key.Wipe()
			a.Granted, a.Refused, a.Freed, fresh, err = true, false, true, g.Token, nil
		}
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a, fresh
}

// Boottime is CLOCK_BOOTTIME: the time since the machine started, suspension
// included, whatever happens to the wall clock.
func Boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return math.MaxInt64 // never seen; every lease is over then
	}
	return time.Duration(ts.Nano())
}

// Machine is what this machine claims of itself. What cannot be read is not
// claimed.
func Machine(log *slog.Logger) keywire.Claims {
	return machine(log, "/")
}

func machine(log *slog.Logger, root string) keywire.Claims {
	c := keywire.Claims{Up: int64(Boottime() / time.Second)}
	boot, err := os.ReadFile(filepath.Join(root, "proc/sys/kernel/random/boot_id"))
	if err != nil {
		log.Debug("no boot id", "err", err)
	}
	c.Boot = strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", "")
	// Boards whose boot loader tells it to the kernel have one: all Raspberry Pis.
	serial, err := os.ReadFile(filepath.Join(root, "sys/firmware/devicetree/base/serial-number"))
	if err == nil {
		text := strings.ToLower(strings.Trim(string(serial), "\x00\n "))
		if _, err := strconv.ParseUint(text, 16, 64); err == nil && len(text) <= 16 {
			c.Serial = text
		}
	}
	return c
}
