// Package mailsink is a mail server for tests and demonstrations: it takes mail as a provider's submission
// server does, over STARTTLS (RFC 3207) or implicit TLS (RFC 8314), after AUTH PLAIN, and keeps it in
// memory for whoever asks. It passes nothing on. It can refuse or stall on demand, as providers do on
// their bad days.
//
// Its certificate comes from a certificate authority that is made with it and exists nowhere else. It keeps the
// newest 1000 messages of at most 1 MiB each.
package mailsink

import (
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"mime/quotedprintable"
	"net"
	"net/mail"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"farkeep/shared/secret"
)

const (
	maxMessages = 1000
	maxBytes    = 1 << 20
)

// Config is a mail server.
type Config struct {
	Address     string   // to listen on, such as "127.0.0.1:0"
	ImplicitTLS bool     // TLS from the first byte; otherwise STARTTLS
	Names       []string // host names and IP addresses that its certificate is for
	User        string
	Password    secret.Text
	Logger      *slog.Logger // may be nil
}

// Message is a mail that has been taken.
type Message struct {
	From string
	To   []string
	Data []byte // as it came: headers, empty line, body
	At   time.Time
}

// Subject is the decoded subject, "" if the message has none or is no message.
func (m Message) Subject() string {
	parsed, err := mail.ReadMessage(bytes.NewReader(m.Data))
	if err != nil {
		return ""
	}
	s, err := new(mime.WordDecoder).DecodeHeader(parsed.Header.Get("Subject"))
	if err != nil {
		return parsed.Header.Get("Subject")
	}
	return s
}

// Text is the decoded body of a mail in plain text (quoted-printable or as it
// is), "" if the message is none.
func (m Message) Text() string {
	parsed, err := mail.ReadMessage(bytes.NewReader(m.Data))
	if err != nil {
		return ""
	}
	var body io.Reader = parsed.Body
	if strings.EqualFold(parsed.Header.Get("Content-Transfer-Encoding"), "quoted-printable") {
		body = quotedprintable.NewReader(body)
	}
	text, err := io.ReadAll(body)
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}

// Sink is a running mail server.
type Sink struct {
	cfg    Config
	log    *slog.Logger
	listen net.Listener
	server *smtp.Server
	ca     []byte
	work   sync.WaitGroup
	closed chan struct{}

	mu       sync.Mutex
	messages []Message
	dropped  int // messages that are no longer kept
	refusal  error
	stall    chan struct{} // closed when the sink goes on; nil if it does not stall
	changed  chan struct{} // closed and replaced at every message
}

// Start starts a mail server.
func Start(cfg Config) (*Sink, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Names) == 0 {
		return nil, errors.New("start a mail server: its certificate needs a name")
	}
	ca, certificate, err := newCertificate(cfg.Names)
	if err != nil {
		return nil, fmt.Errorf("start a mail server: %w", err)
	}
	s := &Sink{cfg: cfg, log: cfg.Logger, ca: ca, closed: make(chan struct{}), changed: make(chan struct{})}
	settings := &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	if s.listen, err = net.Listen("tcp", cfg.Address); err != nil {
		return nil, fmt.Errorf("start a mail server: %w", err)
	}
	s.server = smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) { return &session{sink: s}, nil }))
	s.server.Domain = cfg.Names[0]
	s.server.TLSConfig = settings
	s.server.MaxMessageBytes = maxBytes
	s.server.MaxRecipients = 100
	s.server.ReadTimeout = 5 * time.Minute // RFC 5321 §4.5.3.2.7
	s.server.WriteTimeout = 5 * time.Minute
	s.server.ErrorLog = errorLog{s.log}
	listener := s.listen
	if cfg.ImplicitTLS {
		listener = tls.NewListener(listener, settings)
	}
	s.work.Go(func() {
		if err := s.server.Serve(listener); err != nil && !errors.Is(err, smtp.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.log.Error("mail server", "error", err)
		}
	})
	return s, nil
}

// Addr is where the server listens.
func (s *Sink) Addr() *net.TCPAddr { return s.listen.Addr().(*net.TCPAddr) }

// CA is the certificate of the authority that a client has to trust, in PEM.
func (s *Sink) CA() []byte { return s.ca }

// Messages returns what is kept, oldest first.
func (s *Sink) Messages() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.messages)
}

// Wait returns the first message that match accepts, among those that have come since Start and those that come.
// match must not call the Sink.
func (s *Sink) Wait(ctx context.Context, match func(Message) bool) (Message, error) {
	next := 0
	for {
		s.mu.Lock()
		fresh := s.messages[max(0, next-s.dropped):]
		next = s.dropped + len(s.messages)
		changed := s.changed
		var subjects []string
		for _, m := range s.messages {
			subjects = append(subjects, m.Subject())
		}
		s.mu.Unlock()
		if i := slices.IndexFunc(fresh, match); i >= 0 {
			return fresh[i], nil
		}
		select {
		case <-changed:
		case <-s.closed:
			return Message{}, fmt.Errorf("wait for a mail: %w; these came: %q", net.ErrClosed, subjects)
		case <-ctx.Done():
			return Message{}, fmt.Errorf("wait for a mail: %w; these came: %q", ctx.Err(), subjects)
		}
	}
}

// Refuse makes the server refuse every sender with an SMTP code such as 450 or 550, or take mail again if code is 0.
func (s *Sink) Refuse(code int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusal = nil
	if code != 0 {
		s.refusal = &smtp.SMTPError{Code: code, EnhancedCode: smtp.EnhancedCode{code / 100, 7, 1}, Message: "not today"}
	}
}

// Stall makes the server leave clients without an answer when they name the sender, or go on.
func (s *Sink) Stall(stall bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case stall && s.stall == nil:
		s.stall = make(chan struct{})
	case !stall && s.stall != nil:
		close(s.stall)
		s.stall = nil
	}
}

// Close stops the server and ends its connections.
func (s *Sink) Close() error {
	s.Stall(false)
	err := s.server.Close()
	s.work.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.closed:
	default:
		close(s.closed)
	}
	return err
}

func (s *Sink) take(m Message) {
	s.log.Info("mail taken", "from", m.From, "to", m.To, "subject", m.Subject(), "bytes", len(m.Data))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = append(s.messages, m)
	if len(s.messages) > maxMessages {
		s.messages = s.messages[1:]
		s.dropped++
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// session is one client's connection.
type session struct {
	sink *Sink
	user string // "" before AUTH
	from string
	to   []string
}

func (c *session) AuthMechanisms() []string { return []string{sasl.Plain} }

func (c *session) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		want := c.sink.cfg
		if user != want.User || subtle.ConstantTimeCompare([]byte(password), []byte(want.Password.Reveal())) != 1 {
			return smtp.ErrAuthFailed
		}
		c.user = user
		return nil
	}), nil
}

func (c *session) Mail(from string, _ *smtp.MailOptions) error {
	if c.user == "" {
		return smtp.ErrAuthRequired
	}
	c.sink.mu.Lock()
	stall, refusal := c.sink.stall, c.sink.refusal
	c.sink.mu.Unlock()
	if stall != nil {
		<-stall // Close ends it too
	}
	c.from = from
	return refusal
}

func (c *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	c.to = append(c.to, to)
	return nil
}

func (c *session) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	c.sink.take(Message{From: c.from, To: slices.Clone(c.to), Data: b, At: time.Now()})
	return nil
}

func (c *session) Reset()        { c.from, c.to = "", nil }
func (c *session) Logout() error { return nil }

// errorLog is go-smtp's view of our log.
type errorLog struct{ log *slog.Logger }

func (l errorLog) Printf(format string, args ...any) {
	l.log.Debug("smtp: " + fmt.Sprintf(format, args...))
}
func (l errorLog) Println(args ...any) { l.log.Debug("smtp: " + fmt.Sprintln(args...)) }
