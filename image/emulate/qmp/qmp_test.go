package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/image/emulate/qmp"
)

// emulator plays the other end of the connection: it greets, and answers each command with what reply says.
func emulator(t *testing.T, reply func(id uint64, command string, arguments json.RawMessage) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	var work sync.WaitGroup
	work.Go(func() {
		defer theirs.Close()
		fmt.Fprintf(theirs, "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")
		scan := bufio.NewScanner(theirs)
		for scan.Scan() {
			var m struct {
				ID        uint64
				Execute   string
				Arguments json.RawMessage
			}
			if err := json.Unmarshal(scan.Bytes(), &m); err != nil {
				t.Errorf("command %q: %v", scan.Bytes(), err)
				return
			}
			answer := reply(m.ID, m.Execute, m.Arguments)
			if m.Execute == "qmp_capabilities" {
				answer = fmt.Sprintf("{\"return\": {}, \"id\": %d}", m.ID)
			}
			if answer == "" {
				return
			}
			if _, err := fmt.Fprintf(theirs, "%s\r\n", answer); err != nil {
				return
			}
		}
	})
	t.Cleanup(func() { ours.Close(); work.Wait() })
	return ours
}

func TestExecute(t *testing.T) {
	conn := emulator(t, func(id uint64, command string, arguments json.RawMessage) string {
		switch command {
		case "human-monitor-command":
			var a map[string]string
			if err := json.Unmarshal(arguments, &a); err != nil || a["command-line"] != "xp /1wx 0x10" {
				t.Errorf("arguments %s", arguments)
			}
			return fmt.Sprintf(`{"event": "RESUME", "data": {}}`+"\r\n"+`{"return": "0000000000000010: 0x00000001\r\n", "id": %d}`, id)
		case "device_del":
			return fmt.Sprintf(`{"error": {"class": "DeviceNotFound", "desc": "Device 'stick' not found"}, "id": %d}`, id)
		case "late":
			return fmt.Sprintf(`{"return": {}, "id": %d}`, id+1000)
		}
		return ""
	})
	var events []string
	c, err := qmp.New(t.Context(), conn, func(e qmp.Event) { events = append(events, e.Name) })
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.Human(t.Context(), "xp /1wx 0x10")
	if err != nil || out != "0000000000000010: 0x00000001\r\n" {
		t.Errorf("answer %q, %v", out, err)
	}
	if len(events) != 1 || events[0] != "RESUME" {
		t.Errorf("events %q", events)
	}
	var refusal *qmp.Error
	err = c.Execute(t.Context(), "device_del", map[string]string{"id": "stick"}, nil)
	if !errors.As(err, &refusal) || refusal.Class != "DeviceNotFound" || err.Error() != "qmp device_del: Device 'stick' not found" {
		t.Errorf("a refusal is %v", err)
	}
	// Another command's answer is not ours.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "late", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an answer with another id: %v", err)
	}
	// The emulator ends.
	if err := c.Execute(t.Context(), "quit", nil, nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("the emulator ends: %v", err)
	}
	<-c.Done()
	if err := c.Execute(t.Context(), "stop", nil, nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("a command after the end: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, c := range map[string]struct{ first, want string }{
		"no greeting": {"", "closed"},
		"no JSON":     {"hello\n", "hello"},
		"too long":    {"{\"QMP\": \"" + strings.Repeat("x", 2<<20) + "\"}\n", "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			var work sync.WaitGroup
			work.Go(func() {
				fmt.Fprint(theirs, c.first)
				theirs.Close()
			})
			_, err := qmp.New(t.Context(), ours, nil)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%.200v, want %q", err, c.want)
			}
			ours.Close()
			work.Wait()
		})
	}
	t.Run("silence", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := qmp.New(ctx, ours, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a silent emulator: %v", err)
		}
	})
}
