package metrics_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/keyserver/metrics"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func snapshot() metrics.Snapshot {
	return metrics.Snapshot{
		Appliances: []metrics.Appliance{
			{Name: "attic", Waiting: 1, Seen: t0.Add(-90 * time.Second)},
			{Name: `od"d\name`, Revoked: true, Seen: t0.Add(time.Hour)}, // a clock that was set back
			{Name: "never"},
		},
		Peers:        []metrics.Peer{{Name: "second", Pending: 2}},
		AuditRecords: 1234567,
		Mail:         &metrics.Mail{Queued: 3, Failing: true, LastSent: t0},
		Checks:       []metrics.Check{{Name: "audit"}, {Name: "keys"}},
	}
}

// serve runs a server and returns its address.
func serve(t *testing.T, state func() metrics.Snapshot) (*metrics.Metrics, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := metrics.New(metrics.Config{State: state, Now: func() time.Time { return t0 }, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m, "http://" + l.Addr().String()
}

func get(t *testing.T, url string) (int, http.Header, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, r.Header, string(text)
}

var (
	metaLine   = regexp.MustCompile(`^# (HELP|TYPE) ([a-z_]+) (.+)$`)
	sampleLine = regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="(?:[^"\\\n]|\\["\\n])*"(?:,[a-z_]+="(?:[^"\\\n]|\\["\\n])*")*\})? (\S+)$`)
)

// parse reads the text format strictly: every sample belongs to the type that was
// announced last, no sample comes twice.
func parse(t *testing.T, text string) map[string]float64 {
	t.Helper()
	samples, typed := map[string]float64{}, map[string]bool{}
	family, kind := "", ""
	if !strings.HasSuffix(text, "\n") {
		t.Error("the last line is not finished")
	}
	in := bufio.NewScanner(strings.NewReader(text))
	for in.Scan() {
		l := in.Text()
		if m := metaLine.FindStringSubmatch(l); m != nil {
			if m[1] == "TYPE" {
				if typed[m[2]] {
					t.Errorf("%s is announced twice", m[2])
				}
				typed[m[2]], family, kind = true, m[2], m[3]
			}
			continue
		}
		m := sampleLine.FindStringSubmatch(l)
		if m == nil {
			t.Errorf("not a line of the format: %s", l)
			continue
		}
		name := m[1]
		if kind == "histogram" {
			name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		}
		if name != family {
			t.Errorf("%s comes below %s", m[1], family)
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			t.Error(err)
		}
		if _, twice := samples[m[1]+m[2]]; twice {
			t.Errorf("%s comes twice", m[1]+m[2])
		}
		samples[m[1]+m[2]] = v
	}
	return samples
}

func TestScrape(t *testing.T) {
	m, url := serve(t, snapshot)
	m.Observe("key", "granted", 20*time.Millisecond)
	m.Observe("key", "granted", 2*time.Second)
	m.Observe("key", "held", time.Hour)
	m.Observe("lease", "granted", time.Hour)
	for i := range 1000 {
		m.Observe("made up "+strconv.Itoa(i), "granted", 0)
	}
	code, header, text := get(t, url+"/metrics")
	if code != 200 || header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("status %d, %v", code, header)
	}
	got := parse(t, text)
	for name, want := range map[string]float64{
		`requests_total{verb="key",verdict="granted"}`:      2,
		`requests_total{verb="key",verdict="held"}`:         1,
		`requests_total{verb="lease",verdict="granted"}`:    1,
		`requests_total{verb="other",verdict="granted"}`:    1000,
		`grant_seconds_bucket{le="0.01"}`:                   0,
		`grant_seconds_bucket{le="0.025"}`:                  1,
		`grant_seconds_bucket{le="1"}`:                      1,
		`grant_seconds_bucket{le="2.5"}`:                    2,
		`grant_seconds_bucket{le="+Inf"}`:                   2,
		`grant_seconds_sum`:                                 2.02,
		`grant_seconds_count`:                               2,
		`appliance_revoked{appliance="attic"}`:              0,
		`appliance_revoked{appliance="od\"d\\name"}`:        1,
		`waiting_requests{appliance="attic"}`:               1,
		`appliance_silent_seconds{appliance="attic"}`:       90,
		`appliance_silent_seconds{appliance="od\"d\\name"}`: 0,
		`peer_pending_revocations{key_server="second"}`:     2,
		`audit_records_total`:                               1234567,
		`mail_queued`:                                       3,
		`mail_failing`:                                      1,
		`mail_last_sent_timestamp_seconds`:                  float64(t0.Unix()),
		`healthy{check="audit"}`:                            1,
		`start_timestamp_seconds`:                           float64(t0.Unix()),
	} {
		if v, ok := got["farkeep_keyserver_"+name]; !ok || v != want {
			t.Errorf("%s is %v, there: %v; want %v", name, v, ok, want)
		}
	}
	if _, ok := got[`farkeep_keyserver_appliance_silent_seconds{appliance="never"}`]; ok {
		t.Error("one that was never heard of has an age")
	}
}

func TestHealth(t *testing.T) {
	var broken atomic.Bool
	state := func() metrics.Snapshot {
		s := snapshot()
		if broken.Load() {
			s.Checks = append(s.Checks, metrics.Check{Name: "endpoints", Err: errors.New("10.77.0.11 is at home")})
		}
		return s
	}
	_, url := serve(t, state)
	if code, _, text := get(t, url+"/healthz"); code != 200 || text != "ok\n" {
		t.Errorf("%d %q", code, text)
	}
	broken.Store(true)
	_, url = serve(t, state) // the first one may answer by its last look
	code, _, text := get(t, url+"/healthz")
	if code != 503 || text != "fail endpoints\n" {
		t.Errorf("%d %q", code, text)
	}
	_, _, text = get(t, url+"/metrics")
	if parse(t, text)[`farkeep_keyserver_healthy{check="endpoints"}`] != 0 || strings.Contains(text, "10.77.0.11") {
		t.Error(text)
	}
}

func TestNothingElse(t *testing.T) {
	_, url := serve(t, snapshot)
	for _, path := range []string{"/", "/metrics/", "/debug/pprof/", "/healthz/x", "/../metrics/x"} {
		if code, _, _ := get(t, url+path); code != http.StatusNotFound {
			t.Errorf("%s: %d", path, code)
		}
	}
	r, err := http.Post(url+"/metrics", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", r.StatusCode)
	}
	request, err := http.NewRequest("GET", url+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("X-Long", strings.Repeat("x", 64<<10))
	if r, err := http.DefaultClient.Do(request); err == nil {
		r.Body.Close()
		if r.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("a header of 64 KiB: %d", r.StatusCode)
		}
	}
}

// Many scrapes at once look at the state once; connections that say nothing take
// some places, and a scrape still gets through when they are gone.
func TestBounded(t *testing.T) {
	var looks atomic.Int32
	_, url := serve(t, func() metrics.Snapshot { looks.Add(1); return snapshot() })
	var g sync.WaitGroup
	for range 50 {
		g.Go(func() {
			r, err := http.Get(url + "/metrics")
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Body.Close()
			if n, err := io.Copy(io.Discard, r.Body); n == 0 || err != nil {
				t.Error(n, err)
			}
		})
	}
	g.Wait()
	if looks.Load() != 1 {
		t.Errorf("%d looks at the state", looks.Load())
	}
	http.DefaultClient.CloseIdleConnections()
	address := strings.TrimPrefix(url, "http://")
	var silent []net.Conn
	for range 40 {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	for _, c := range silent {
		c.Close()
	}
	if code, _, _ := get(t, url+"/metrics"); code != 200 {
		t.Error(code)
	}
}
