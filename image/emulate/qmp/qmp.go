// Package qmp speaks the QEMU Machine Protocol (docs/interop/qmp-spec.txt in QEMU's source): JSON
// commands to a running emulator, and events from it.
//
// A Client is safe for concurrent use. Commands are answered in any order; each waits for its own answer
// or its context. Messages of more than 1 MiB end the connection.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

const maxMessage = 1 << 20

// ErrClosed is returned for commands on a connection that has ended, as it does when the emulator exits.
var ErrClosed = errors.New("the emulator has closed its control connection")

// Event is something that happened in the emulator, such as SHUTDOWN or DEVICE_DELETED.
type Event struct {
	Name string
	Data json.RawMessage
}

// Error is the emulator's refusal of a command.
type Error struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc) }

// Client is one control connection.
type Client struct {
	conn   io.ReadWriteCloser
	events func(Event)
	done   chan struct{}

	write sync.Mutex // serialises messages on conn

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan message
	err     error
}

// message is any message from the emulator.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       *uint64         `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *Error          `json:"error"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
}

// New waits for the emulator's greeting on conn and leaves negotiation mode. It calls events, if not
// nil, for every event, one after another: events must not block and must not call Execute.
// The Client owns conn, and closes it if New fails.
func New(ctx context.Context, conn io.ReadWriteCloser, events func(Event)) (*Client, error) {
	c := &Client{
		conn:    conn,
		events:  events,
		done:    make(chan struct{}),
		waiting: map[uint64]chan message{},
	}
	greeted := make(chan struct{})
	go c.read(greeted)
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("wait for the emulator's greeting: %w", c.Err())
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("wait for the emulator's greeting: %w", ctx.Err())
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Close ends the connection; the emulator runs on. It returns when the reader has ended.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

// Done is closed when the connection has ended, whoever ended it.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; nil while it lives.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Execute runs a command and decodes its result into result, if not nil. arguments may be nil.
// A refusal is an *Error.
func (c *Client) Execute(ctx context.Context, command string, arguments, result any) error {
	answer := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, c.err)
	}
	c.next++
	id := c.next
	c.waiting[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()

	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	c.write.Lock()
	_, err = c.conn.Write(append(b, '\n'))
	c.write.Unlock()
	if err != nil {
		return fmt.Errorf("qmp %s: %w: %w", command, ErrClosed, err)
	}

	select {
	case m := <-answer:
		if m.Error != nil {
			m.Error.Command = command
			return m.Error
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("qmp %s: decode its answer: %w", command, err)
		}
		return nil
	case <-c.done:
		return fmt.Errorf("qmp %s: %w", command, c.Err())
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: %w", command, ctx.Err())
	}
}

// Human runs a command of the emulator's monitor for people and returns what it prints.
func (c *Client) Human(ctx context.Context, line string) (string, error) {
	var out string
	err := c.Execute(ctx, "human-monitor-command", map[string]string{"command-line": line}, &out)
	return out, err
}

func (c *Client) read(greeted chan<- struct{}) {
	scan := bufio.NewScanner(c.conn)
	scan.Buffer(make([]byte, 0, 4096), maxMessage)
	err := c.dispatch(scan, greeted)
	c.conn.Close()
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	close(c.done)
}

// dispatch hands out messages until the connection ends, and says why it did.
func (c *Client) dispatch(scan *bufio.Scanner, greeted chan<- struct{}) error {
	for scan.Scan() {
		var m message
		if err := json.Unmarshal(scan.Bytes(), &m); err != nil {
			return fmt.Errorf("message %.80q of the emulator: %w", scan.Bytes(), err)
		}
		switch {
		case m.Greeting != nil:
			if greeted == nil {
				return errors.New("the emulator greets twice")
			}
			close(greeted)
			greeted = nil
		case m.Event != "":
			if c.events != nil {
				c.events(Event{Name: m.Event, Data: m.Data})
			}
		case m.ID != nil:
			c.mu.Lock()
			answer := c.waiting[*m.ID]
			delete(c.waiting, *m.ID)
			c.mu.Unlock()
			if answer != nil {
				answer <- m
			}
		}
	}
	if err := scan.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return ErrClosed
}
