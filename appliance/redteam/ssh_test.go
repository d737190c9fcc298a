package redteam

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"farkeep/image/torture/service"

	"golang.org/x/crypto/ssh"
)

// session opens one and hands it to do, with what it prints.
func (w *world) session(do func(s *ssh.Session, out *bytes.Buffer) error) error {
	c, err := w.dial(nil)
	if err != nil {
		return err
	}
	s, err := c.NewSession()
	if err != nil {
		return err
	}
	defer s.Close()
	var out bytes.Buffer
	all := &together{w: &out}
	s.Stdout, s.Stderr = all, all
	return do(s, &out)
}

// together lets both outputs of a session write into one buffer.
type together struct {
	mu sync.Mutex
	w  io.Writer
}

func (t *together) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.w.Write(p)
}

// denied sends a channel request that must not be granted.
func denied(name string, payload []byte) func(*world) error {
	return func(w *world) error {
		return w.session(func(s *ssh.Session, _ *bytes.Buffer) error {
			ok, err := s.SendRequest(name, true, payload)
			if err == nil && ok {
				return fmt.Errorf("%s was granted", name)
			}
			return nil
		})
	}
}

// noChannel opens a channel that must be rejected.
func noChannel(kind string, payload []byte) func(*world) error {
	return func(w *world) error {
		c, err := w.dial(nil)
		if err != nil {
			return err
		}
		_, _, err = c.OpenChannel(kind, payload)
		return refused(err, "prohibited|unknown channel|rejected|only sessions")
	}
}

// noLogin tries to log in otherwise.
func noLogin(change func(w *world, c *ssh.ClientConfig)) func(*world) error {
	return func(w *world) error {
		_, err := w.dial(func(c *ssh.ClientConfig) { change(w, c) })
		return refused(err, "unable to authenticate|no common algorithm|handshake failed")
	}
}

func stranger() ssh.Signer {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	s, err := ssh.NewSignerFromKey(private)
	if err != nil {
		panic(err)
	}
	return s
}

// pretender shows somebody else's public key and signs with its own.
type pretender struct {
	ssh.Signer
	shows ssh.PublicKey
}

func (p pretender) PublicKey() ssh.PublicKey { return p.shows }

type forward struct {
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

func sshAttacks() []attack {
	const kind = "SSH"
	return []attack{
		{kind, "log in with a key of one's own", "refused: unknown key", noLogin(func(_ *world, c *ssh.ClientConfig) {
			c.Auth = []ssh.AuthMethod{ssh.PublicKeys(stranger())}
		})},
		{kind, "show the admin's public key and sign with another", "refused: the signature is checked", noLogin(func(w *world, c *ssh.ClientConfig) {
			c.Auth = []ssh.AuthMethod{ssh.PublicKeys(pretender{stranger(), w.svc.Signer(service.Admin).PublicKey()})}
		})},
		{kind, "log in with a password, or with none", "refused: keys only", noLogin(func(_ *world, c *ssh.ClientConfig) {
			c.Auth = []ssh.AuthMethod{ssh.Password(""), ssh.Password("farkeep"), ssh.KeyboardInteractive(func(_, _ string, q []string, _ []bool) ([]string, error) { return make([]string, len(q)), nil })}
		})},
		{kind, "log in as user admin or root with the push key", "the name means nothing: still a push key", func(w *world) error {
			for _, user := range []string{"admin", "root", "farkeep-image", "../admin"} {
				c, err := w.dial(func(c *ssh.ClientConfig) { c.User = user })
				if err != nil {
					return err
				}
				s, err := c.NewSession()
				if err != nil {
					return err
				}
				out, err := s.CombinedOutput("logs")
				if err == nil || !strings.Contains(string(out), "no verb of that name") {
					return fmt.Errorf("as %s: %q, %w", user, out, err)
				}
			}
			return nil
		}},
		{kind, "agree on broken algorithms", "refused: no common algorithm", noLogin(func(_ *world, c *ssh.ClientConfig) {
			c.KeyExchanges, c.Ciphers, c.MACs = []string{"diffie-hellman-group1-sha1"}, []string{"arcfour128", "3des-cbc"}, []string{"hmac-sha1-96"}
		})},
		{kind, "ask for a shell", "told that there is none", func(w *world) error {
			return w.session(func(s *ssh.Session, out *bytes.Buffer) error {
				in, err := s.StdinPipe()
				if err != nil {
					return err
				}
				if err := s.Shell(); err != nil {
					return err
				}
				io.WriteString(in, "id\nexit 0\n")
				if err := s.Wait(); err == nil || !strings.Contains(out.String(), "no shell") {
					return fmt.Errorf("%q, %w", out.String(), err)
				}
				return nil
			})
		}},
		{kind, "ask for a terminal", "refused", denied("pty-req", ssh.Marshal(struct {
			Term       string
			W, H, X, Y uint32
			Modes      string
		}{"xterm", 80, 24, 0, 0, "\x00"}))},
		{kind, "set LD_PRELOAD and PATH", "refused", denied("env", ssh.Marshal(struct{ Name, Value string }{"LD_PRELOAD", "/tmp/evil.so"}))},
		{kind, "forward the agent", "refused", denied("auth-agent-req@openssh.com", nil)},
		{kind, "forward X11", "refused", denied("x11-req", ssh.Marshal(struct {
			Single   bool
			Protocol string
			Cookie   string
			Screen   uint32
		}{false, "MIT-MAGIC-COOKIE-1", "00", 0}))},
		{kind, "ask for another subsystem", "refused", denied("subsystem", ssh.Marshal(struct{ Name string }{"netconf"}))},
		{kind, "tunnel into the relative's LAN", "refused", noChannel("direct-tcpip", ssh.Marshal(forward{"192.168.1.1", 80, "127.0.0.1", 1}))},
		{kind, "tunnel to the keeper's socket", "refused", func(w *world) error {
			return noChannel("direct-streamlocal@openssh.com", ssh.Marshal(struct {
				Path, Reserved string
				Port           uint32
			}{filepath.Join(w.svc.RunDir(), "keeper", "sock"), "", 0}))(w)
		}},
		{kind, "have the appliance listen on a port", "refused", func(w *world) error {
			c, err := w.dial(nil)
			if err != nil {
				return err
			}
			l, err := c.Listen("tcp", "0.0.0.0:2222")
			if err == nil {
				l.Close()
			}
			return refused(err, "denied|forward")
		}},
		{kind, "two verbs in one session", "the second is refused", func(w *world) error {
			return w.session(func(s *ssh.Session, out *bytes.Buffer) error {
				if err := s.Start("status"); err != nil {
					return err
				}
				ok, _ := s.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"status"}))
				if ok {
					return errors.New("the second verb was granted")
				}
				return nil
			})
		}},
		{kind, "a garbled handshake", "hung up on, at the latest when the time for handshakes is over", func(w *world) error {
			const handshake = 20 * time.Second // sshverb.Limits
			hellos := []string{"GET / HTTP/1.0\r\n\r\n", "SSH-1.5-old\r\n", "SSH-2.0-x\r\n\xff\xff\xff\xff\x00rest", strings.Repeat("x", 300_000)}
			for _, hello := range hellos {
				c, err := net.DialTimeout("tcp", w.svc.Address(), 5*time.Second)
				if err != nil {
					return err
				}
				w.Later(func() error {
					defer c.Close()
					c.SetDeadline(time.Now().Add(handshake + time.Minute))
					io.WriteString(c, hello)
					_, err := io.Copy(io.Discard, c)
					var timeout net.Error
					if errors.As(err, &timeout) && timeout.Timeout() {
						return fmt.Errorf("%.20q was not hung up on", hello)
					}
					return nil
				})
			}
			return nil
		}},
	}
}

// no tries a verb that must be refused in these words.
func no(k service.Key, verb, words string) func(*world) error {
	return func(w *world) error {
		out, err := w.verb(k, verb, "")
		if err == nil {
			return fmt.Errorf("%s printed %q", verb, out)
		}
		return refused(err, words)
	}
}

// raw runs words as a verb without the client's own checks.
func (w *world) raw(command string) (string, error) {
	var text string
	err := w.session(func(s *ssh.Session, out *bytes.Buffer) error {
		err := s.Run(command)
		text = out.String()
		return err
	})
	return text, err
}

func verbAttacks() []attack {
	const kind = "verbs"
	push := service.Push
	unknown := "no verb of that name"
	return []attack{
		{kind, "delete, rm, prune, expire, rename, mv", "refused: there is no such verb", func(w *world) error {
			for _, verb := range []string{"delete photos", "rm -rf /", "prune photos", "expire photos 000001", "rename photos x", "mv photos x", "truncate photos", "gc", "compact", "exec sh", "config", "update", "reboot", "sh", "bash -c id"} {
				if err := no(push, verb, unknown)(w); err != nil {
					return fmt.Errorf("%s: %w", verb, err)
				}
			}
			return nil
		}},
		{kind, "accept a suspect generation", "refused: an admin's verb", func(w *world) error { return no(push, "accept photos "+w.names[0], unknown)(w) }},
		{kind, "reject a good generation", "refused: an admin's verb", func(w *world) error { return no(push, "reject photos "+w.names[2], unknown)(w) }},
		{kind, "retire a repository", "refused: an admin's verb", no(push, "retire photos", unknown)},
		{kind, "lower the floor", "refused: an admin's verb", no(push, "floor 1 1s", unknown)},
		{kind, "accept the clock", "refused: an admin's verb", no(push, "accept-clock", unknown)},
		{kind, "call off another's retirement", "refused: an admin's verb", no(push, "keep photos", unknown)},
		{kind, "read the logs", "refused: an admin's verb", no(push, "logs", unknown)},
		{kind, "shell characters in a verb", "refused: nothing is a shell", func(w *world) error {
			for _, command := range []string{"offer photos; rm -rf /", "offer $(id)", "offer `id`", "generations photos | sh", "commit photos && reboot", "status\nlogs", "status\x00logs"} {
				if out, err := w.raw(command); err == nil {
					return fmt.Errorf("%q printed %q", command, out)
				}
			}
			return nil
		}},
		{kind, "an empty verb, one of a mebibyte, one of 10,000 words", "refused", func(w *world) error {
			for _, command := range []string{"", " ", strings.Repeat("x", 200_000), "status " + strings.Repeat("a ", 10_000)} {
				if out, err := w.raw(command); err == nil {
					return fmt.Errorf("%.20q printed %q", command, out)
				}
			}
			return nil
		}},
		{kind, "terminal escapes in a verb, for whoever reads the log", "refused, and printable in the log", func(w *world) error {
			const evil = "status\x1b]0;owned\x07\x1b[2J"
			if out, err := w.raw(evil); err == nil {
				return fmt.Errorf("it printed %q", out)
			}
			logs, err := w.verb(service.Admin, "logs", "")
			if err != nil {
				return err
			}
			if strings.ContainsAny(logs, "\x1b\x07") {
				return errors.New("the log holds the escapes")
			}
			return nil
		}},
		{kind, "repositories named ../x, /etc, .hidden", "refused: not a name", func(w *world) error {
			for _, name := range []string{"../other-music", "photos/../other-music", "/etc", ".farkeep", ".", "..", "photos/000001", "-photos", strings.Repeat("n", 129)} {
				for _, verb := range []string{"offer", "generations", "commit"} {
					if err := no(push, verb+" "+name, ".")(w); err != nil {
						return fmt.Errorf("%s %s: %w", verb, name, err)
					}
				}
			}
			return nil
		}},
		{kind, "offer to another key's repository", "refused: not this key's", no(push, "offer "+foreign, "may not use")},
		{kind, "list another key's generations", "refused: not this key's", no(push, "generations "+foreign, "may not use")},
		{kind, "verify another key's generation", "refused: not this key's", func(w *world) error { return no(push, "verify "+foreign+" "+w.other, "may not use")(w) }},
		{kind, "learn other repositories' names from status and generations", "they are not in it", func(w *world) error {
			for _, verb := range []string{"status", "status --json", "generations", "generations --text"} {
				out, err := w.verb(push, verb, "")
				if err != nil {
					return err
				}
				if strings.Contains(out, foreign) {
					return fmt.Errorf("%s names %s", verb, foreign)
				}
				if !strings.Contains(out, own) {
					return fmt.Errorf("%s does not even name %s", verb, own)
				}
			}
			return nil
		}},
		{kind, "learn from refusals whether a repository exists", "both refusals are the same", func(w *world) error {
			_, is := w.verb(push, "generations other-music", "")
			_, isNot := w.verb(push, "generations other-nosuch", "")
			if is == nil || isNot == nil || strings.ReplaceAll(is.Error(), "other-music", "X") != strings.ReplaceAll(isNot.Error(), "other-nosuch", "X") {
				return fmt.Errorf("%w; %w", is, isNot)
			}
			return nil
		}},
		{kind, "commit, abort and upload another key's push", "refused", func(w *world) error {
			o, list := tree{"x": "other's"}.list()
			answer, to, err := w.offer(service.Other, "other-push", o, list)
			if err != nil {
				return err
			}
			for _, verb := range []string{"commit ", "abort ", "upload "} {
				if err := no(push, verb+answer.Push, "may not use|not open")(w); err != nil {
					return err
				}
			}
			return to.Abort(w.Context(), answer.Push)
		}},
		{kind, "commit and abort pushes with made-up names", "refused", func(w *world) error {
			for _, id := range []string{"photos/x", "photos/../docs/1", "photos/" + w.names[0], "/photos", "photos/", strings.Repeat("p", 100) + "/1"} {
				for _, verb := range []string{"commit ", "abort ", "upload "} {
					if err := no(push, verb+id, ".")(w); err != nil {
						return fmt.Errorf("%s%s: %w", verb, id, err)
					}
				}
			}
			return nil
		}},
		{kind, "verify generations with made-up names", "refused", func(w *world) error {
			for _, name := range []string{"../docs", "..", "../../incoming", "000001-20200101T000000Z", ".sequence", "x/y"} {
				if err := no(push, "verify photos "+name, ".")(w); err != nil {
					return fmt.Errorf("verify %s: %w", name, err)
				}
			}
			return nil
		}},
	}
}
