// Package metrics shows how a key server does: GET /metrics in the Prometheus
// text format 0.0.4, and GET /healthz for whoever restarts or calls somebody.
//
// It tells counts, ages and the names of appliances and key servers, no key, no
// token, no reason and no address. It is meant for the VPN address, behind the
// firewall rules that let appliances reach the key server's own port and nothing
// else. The server is bounded: few connections, short times, small requests, and
// a look at the state every few seconds at most, however often it is asked.
package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxConnections = 16
	requestTimeout = 5 * time.Second
	idleTimeout    = 30 * time.Second
	maxHeader      = 4 << 10
	// fresh is how long one look at the state is good for.
	fresh = 3 * time.Second

	contentType = "text/plain; version=0.0.4; charset=utf-8"
)

// Snapshot is the state at one moment.
type Snapshot struct {
	Appliances []Appliance
	Peers      []Peer // the other key servers
	// AuditRecords is the number of the newest record.
	AuditRecords uint64
	Mail         *Mail // nil without an account
	// Checks are what /healthz answers by.
	Checks []Check
}

// Appliance is one of the site.
type Appliance struct {
	Name    string
	Revoked bool
	Waiting int       // requests that wait for a person
	Seen    time.Time // last request that it was known by; zero: never
}

// Peer is another key server.
type Peer struct {
	Name    string
	Pending int // revocations that it was not told yet
}

// Mail is how deliveries go.
type Mail struct {
	Queued   int
	LastSent time.Time // zero: never since the start
	Failing  bool      // the last attempt went wrong
}

// Check is one thing that must be so.
type Check struct {
	Name string // a word
	Err  error  // nil: it is so
}

// Config is what New needs; all of it.
type Config struct {
	// State looks at the state. It is not called more often than every few
	// seconds, and never twice at once.
	State func() Snapshot
	Now   func() time.Time
	Log   *slog.Logger
}

// Metrics counts and answers. Its methods may be called from several goroutines.
type Metrics struct {
	c       Config
	started time.Time

	mu       sync.Mutex // guards the fields below
	requests map[[2]string]uint64
	grants   histogram

	looking sync.Mutex // guards the fields below; held while State runs
	looked  time.Time
	last    Snapshot
}

// New begins to count.
func New(c Config) *Metrics {
	return &Metrics{c: c, started: c.Now(), requests: map[[2]string]uint64{}}
}

// What Observe counts under their own names. Whatever else it is given is "other",
// so that no caller can make it grow.
var (
	verbs    = []string{"key", "lease", "checkin", "dark", "connect", "request", "peer-revoke"}
	verdicts = []string{"granted", "held", "refused", "later", "failed", "malformed"}
)

// Observe counts one request that was decided after took.
func (m *Metrics) Observe(verb, verdict string, took time.Duration) {
	if !slices.Contains(verbs, verb) {
		verb = "other"
	}
	if !slices.Contains(verdicts, verdict) {
		verdict = "other"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[[2]string{verb, verdict}]++
	if verb == "key" && verdict == "granted" {
		m.grants.add(took)
	}
}

func (m *Metrics) snapshot() Snapshot {
	m.looking.Lock()
	defer m.looking.Unlock()
	if now := m.c.Now(); m.looked.IsZero() || now.Sub(m.looked).Abs() >= fresh {
		m.last, m.looked = m.c.State(), now
	}
	return m.last
}

// Handler answers GET /metrics and GET /healthz.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		send(w, http.StatusOK, m.page())
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		code, text := http.StatusOK, "ok\n"
		var failed strings.Builder
		for _, c := range m.snapshot().Checks {
			if c.Err != nil {
				fmt.Fprintf(&failed, "fail %s\n", c.Name)
				m.c.Log.Error("health", "check", c.Name, "err", c.Err)
			}
		}
		if failed.Len() > 0 {
			code, text = http.StatusServiceUnavailable, failed.String()
		}
		send(w, code, []byte(text))
	})
	return mux
}

func send(w http.ResponseWriter, code int, text []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(text)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	w.Write(text) // whoever asked and went away gets nothing
}

func (m *Metrics) page() []byte {
	s, now := m.snapshot(), m.c.Now()
	p := &page{}
	m.mu.Lock()
	p.head("requests_total", "counter", "Requests by verb and verdict.")
	for _, verb := range append(slices.Clone(verbs), "other") {
		for _, verdict := range append(slices.Clone(verdicts), "other") {
			if n, ok := m.requests[[2]string{verb, verdict}]; ok {
				p.line("requests_total", float64(n), "verb", verb, "verdict", verdict)
			}
		}
	}
	m.grants.write(p, "grant_seconds", "Time from a request for a key to its answer, of those granted.")
	m.mu.Unlock()

	p.head("appliance_revoked", "gauge", "1 where a person has revoked the appliance.")
	for _, a := range s.Appliances {
		p.line("appliance_revoked", truth(a.Revoked), "appliance", a.Name)
	}
	p.head("waiting_requests", "gauge", "Requests that wait for a person.")
	for _, a := range s.Appliances {
		p.line("waiting_requests", float64(a.Waiting), "appliance", a.Name)
	}
	p.head("appliance_silent_seconds", "gauge", "Time since the appliance was heard of; none where it never was.")
	for _, a := range s.Appliances {
		if !a.Seen.IsZero() {
			p.line("appliance_silent_seconds", max(0, now.Sub(a.Seen).Seconds()), "appliance", a.Name)
		}
	}
	p.head("peer_pending_revocations", "gauge", "Revocations that another key server was not told yet.")
	for _, k := range s.Peers {
		p.line("peer_pending_revocations", float64(k.Pending), "key_server", k.Name)
	}
	p.one("audit_records_total", "counter", "Number of the newest record of the audit log.", float64(s.AuditRecords))
	if s.Mail != nil {
		p.one("mail_queued", "gauge", "Mails that wait for the provider.", float64(s.Mail.Queued))
		p.one("mail_failing", "gauge", "1 when the last attempt to mail went wrong.", truth(s.Mail.Failing))
		if !s.Mail.LastSent.IsZero() {
			p.one("mail_last_sent_timestamp_seconds", "gauge", "When a mail was last accepted.", float64(s.Mail.LastSent.Unix()))
		}
	}
	p.head("healthy", "gauge", "1 for each check of /healthz that holds.")
	for _, c := range s.Checks {
		p.line("healthy", truth(c.Err == nil), "check", c.Name)
	}
	p.one("start_timestamp_seconds", "gauge", "When this process began.", float64(m.started.Unix()))
	return p.Bytes()
}

// Serve answers on l until ctx ends.
func (m *Metrics) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler:           m.Handler(),
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      2 * requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(m.c.Log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(limited(l, maxConnections))
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve metrics: %w", err)
}

// page is text in the exposition format.
type page struct{ bytes.Buffer }

const prefix = "farkeep_keyserver_"

func (p *page) head(name, kind, help string) {
	fmt.Fprintf(p, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, help, prefix, name, kind)
}

// labelValue escapes a label's value as the format asks.
var labelValue = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func (p *page) line(name string, value float64, labels ...string) {
	p.WriteString(prefix + name)
	for i := 0; i < len(labels); i += 2 {
		p.WriteString(string("{,"[min(i, 1)]) + labels[i] + `="` + labelValue.Replace(labels[i+1]) + `"`)
	}
	if len(labels) > 0 {
		p.WriteByte('}')
	}
	p.WriteString(" " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
}

func (p *page) one(name, kind, help string, value float64) {
	p.head(name, kind, help)
	p.line(name, value)
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// bounds are the histogram's, in seconds: an SSH exchange takes tens of
// milliseconds, five hundred at once some seconds.
var bounds = [...]float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}

type histogram struct {
	buckets [len(bounds)]uint64 // cumulative, as they are shown
	count   uint64
	sum     float64
}

func (h *histogram) add(d time.Duration) {
	s := d.Seconds()
	for i, b := range bounds {
		if s <= b {
			h.buckets[i]++
		}
	}
	h.count++
	h.sum += s
}

func (h *histogram) write(p *page, name, help string) {
	p.head(name, "histogram", help)
	for i, b := range bounds {
		p.line(name+"_bucket", float64(h.buckets[i]), "le", strconv.FormatFloat(b, 'g', -1, 64))
	}
	p.line(name+"_bucket", float64(h.count), "le", "+Inf")
	p.line(name+"_sum", h.sum)
	p.line(name+"_count", float64(h.count))
}
