package redteam

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/crypto/ssh"
)

// The words of shared/sshverb for channels that carry a part of a session's input.
const (
	stripeChannel  = "stripe@farkeep"
	stripesRequest = "stripes@farkeep"
)

// stripe opens one beside the sessions of a connection.
func stripe(c *ssh.Client, number uint32) (ssh.Channel, error) {
	channel, requests, err := c.OpenChannel(stripeChannel, binary.BigEndian.AppendUint32(nil, number))
	if err == nil {
		go ssh.DiscardRequests(requests)
	}
	return channel, err
}

// freeStripe is stripe, when those of the attack before have been let go.
func freeStripe(c *ssh.Client, number uint32) (ssh.Channel, error) {
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		channel, err := stripe(c, number)
		var no *ssh.OpenChannelError
		if err == nil || !errors.As(err, &no) || no.Reason != ssh.ResourceShortage || time.Now().After(limit) {
			return channel, err
		}
	}
}

// wide starts an upload whose input is dealt over the session and one stripe, and
// returns its input and how to wait for its end, with what was said.
func (w *world) wide(c *ssh.Client, push string, number uint32) (io.WriteCloser, func() error, error) {
	s, err := c.NewSession()
	if err != nil {
		return nil, nil, err
	}
	w.Cleanup(func() { s.Close() })
	var said bytes.Buffer
	s.Stderr = &said
	in, err := s.StdinPipe()
	if err == nil {
		_, err = s.SendRequest(stripesRequest, false, binary.BigEndian.AppendUint32(nil, number))
	}
	if err == nil {
		err = s.Start("upload " + push)
	}
	end := func() error {
		if err := s.Wait(); err != nil {
			return fmt.Errorf("%w: %s", err, &said)
		}
		return nil
	}
	return in, end, err
}

// badDeal uploads what deal writes into the session and its stripe; it must be refused,
// and nothing be committed of it.
func badDeal(words string, deal func(session, stripe io.WriteCloser)) func(*world) error {
	content := tree{"new": "12345"}
	return func(w *world) error {
		answer, to, err := w.begin(scratch, content)
		if err != nil {
			return err
		}
		c, err := w.dial(nil)
		if err != nil {
			return err
		}
		one, err := freeStripe(c, 1)
		if err != nil {
			return fmt.Errorf("no stripe to attack with: %w", err)
		}
		in, end, err := w.wide(c, answer.Push, 1)
		if err != nil {
			return err
		}
		deal(in, one) // who is refused at the first block cannot write the second
		if err := refused(end(), words); err != nil {
			return err
		}
		if _, err := to.Commit(w.Context(), answer.Push); err == nil {
			return errors.New("what was not uploaded was committed")
		}
		return nil
	}
}

func dealt(p []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(p))), p...)
}

func stripeAttacks() []attack {
	const kind = "stripes"
	whole := stream().file(0).data("12345").end(sumOf("12345")).close(1)
	return []attack{
		{kind, "a hundred channels beside the sessions, in five connections", "bounded for all together: pushes go on without them, and a restore key gets in", func(w *world) error {
			opened := 0
			for range 5 {
				c, err := w.dial(nil)
				if err != nil {
					return err
				}
				for n := range uint32(20) {
					if one, err := stripe(c, n); err == nil {
						defer one.Close()
						opened++
					}
				}
			}
			if opened == 0 || opened > 16 {
				return fmt.Errorf("%d were opened", opened)
			}
			w.push("scratch-narrow", tree{"a": noise(91, 300_000)})
			return w.restoreGetsIn()
		}},
		{kind, "name a channel of another connection", "refused: it is not open here", func(w *world) error {
			answer, to, err := w.begin(scratch, tree{"new": "12345"})
			if err != nil {
				return err
			}
			var c [2]*ssh.Client
			for i := range c {
				if c[i], err = w.dial(nil); err != nil {
					return err
				}
			}
			if _, err := freeStripe(c[0], 7); err != nil {
				return err
			}
			in, end, err := w.wide(c[1], answer.Push, 7)
			if err != nil {
				return err
			}
			in.Write(dealt(whole))
			in.Close()
			if err := refused(end(), "not open any more"); err != nil {
				return err
			}
			_, err = to.Commit(w.Context(), answer.Push)
			return refused(err, "missing|not|incomplete")
		}},
		{kind, "a block of four gibibytes", "refused at its head", badDeal("a block of 4294967295 bytes|does not answer|unexpected EOF", func(session, _ io.WriteCloser) {
			session.Write([]byte{0xff, 0xff, 0xff, 0xff, 'F'})
		})},
		{kind, "a channel that is cut off before the stream ends", "refused: not everything is there", badDeal("channel 1 ended before the stream did|does not answer|unexpected EOF", func(session, stripe io.WriteCloser) {
			session.Write(dealt(whole[:12]))
			stripe.Close()
			session.Close()
		})},
		{kind, "the halves of a stream the wrong way round", "refused", badDeal(".", func(session, stripe io.WriteCloser) {
			session.Write(dealt(whole[12:]))
			stripe.Write(dealt(whole[:12]))
			session.Write(make([]byte, 4))
			stripe.Close()
			session.Close()
		})},
	}
}
