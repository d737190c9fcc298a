package receiver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/shared/sshverb"
)

// lastWords is how long a session waits for what it still has to say.
const lastWords = 2 * time.Second

// relaySFTP hands a push key's SFTP to the keeper, byte for byte: the receiver can
// write nothing. The keeper knows when the peer is silent for too long.
func (r *receiver) relaySFTP(ctx context.Context, s *sshverb.Session, k Key) error {
	args := keepercall.Args{Key: k.Name, Role: k.Role, Repositories: k.Repositories, Quota: k.Quota}
	call, err := localcall.Open(ctx, r.env.Paths.Socket(part.Keeper), keepercall.SFTP, args)
	if err != nil {
		return forPeer(err)
	}
	defer call.Close()
	var answer keepercall.Answer
	if err := call.ReadReply(&answer); err != nil {
		return forPeer(err)
	}
	var session keepercall.Session
	if err := json.Unmarshal(answer.Out, &session); err != nil {
		return forPeer(err)
	}
	// The session's words are heard before it begins: it may be over in a millisecond.
	args.Session = session.Session
	words, err := openWords(ctx, r.env.Paths.Socket(part.Keeper), args)
	if err != nil {
		return forPeer(err)
	}
	defer words.Close()
	said := make(chan struct{})
	go func() {
		defer close(said)
		r.relayWords(s, words)
	}()
	// This goroutine ends with the session's channel, which the server closes when
	// this function returns.
	r.mu.Lock()
	u := r.open[s]
	r.mu.Unlock()
	go func() {
		io.CopyBuffer(call, counted{s.Patient(), &u.moved}, make([]byte, relayBuffer))
		call.CloseWrite()
	}()
	_, err = io.Copy(s.Stdout, call)
	select {
	case <-said:
	case <-time.After(lastWords):
	}
	if ctx.Err() != nil {
		return forPeer(ctx.Err())
	}
	return err
}

// openWords opens what the keeper tells the person at the client of an sftp session,
// which keeps its words from this moment on.
func openWords(ctx context.Context, socket string, args keepercall.Args) (*localcall.Conn, error) {
	words, err := localcall.Open(ctx, socket, keepercall.Words, args)
	if err != nil {
		return nil, err
	}
	var begun keepercall.Answer
	if err := words.ReadReply(&begun); err != nil {
		words.Close()
		return nil, err
	}
	return words, nil
}

// relayWords writes them to stderr: SFTP has numbers, and most clients show "Failure"
// for all that is not one of the first few.
func (r *receiver) relayWords(s *sshverb.Session, words *localcall.Conn) {
	for {
		var answer keepercall.Answer
		if err := words.ReadReply(&answer); err != nil || answer.Then != keepercall.ThenLine {
			return
		}
		var text string
		if err := json.Unmarshal(answer.Out, &text); err != nil {
			return
		}
		fmt.Fprintf(s.Stderr, "%s: %s\r\n", r.brief.Appliance, text)
	}
}
