package ntpserver

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/beevik/ntp"
)

// A client that others wrote agrees with what we say.
func TestClientReadsOffset(t *testing.T) {
	s, err := Listen("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	query := func() (*ntp.Response, error) {
		return ntp.QueryWithOptions(s.Addr().String(), ntp.QueryOptions{Timeout: 2 * time.Second})
	}
	for _, offset := range []time.Duration{0, 90 * time.Second, -200 * time.Hour, 5 * 365 * 24 * time.Hour} {
		s.SetOffset(offset)
		r, err := query()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Validate(); err != nil {
			t.Errorf("offset %s: %v", offset, err)
		}
		if d := r.ClockOffset - offset; d.Abs() > time.Second {
			t.Errorf("offset %s: the client computes %s", offset, r.ClockOffset)
		}
	}
	if s.Served() != 4 {
		t.Errorf("answered %d requests, not 4", s.Served())
	}
	s.SetUnsynchronised(true)
	if r, err := query(); err != nil || r.Validate() == nil {
		t.Errorf("an unsynchronised server passes for a good one: %v", err)
	}
	s.SetSilent(true)
	if _, err := ntp.QueryWithOptions(s.Addr().String(), ntp.QueryOptions{Timeout: 50 * time.Millisecond}); err == nil {
		t.Error("a silent server answers")
	}
}

func TestIgnoresOthers(t *testing.T) {
	good := make([]byte, packetSize)
	good[0] = 4<<3 | modeClient
	for name, request := range map[string][]byte{
		"empty": nil, "short": good[:47],
		"server":  append([]byte{4<<3 | modeServer}, good[1:]...),
		"version": append([]byte{7<<3 | modeClient}, good[1:]...),
	} {
		if _, ok := answer(request, time.Now(), false); ok {
			t.Errorf("answers a request that is %s", name)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	good := make([]byte, packetSize)
	good[0] = 4<<3 | modeClient
	f.Add(good, int64(0))
	f.Add([]byte{0x1b}, int64(1e18))
	f.Fuzz(func(t *testing.T, request []byte, ns int64) {
		at := time.Unix(0, ns)
		reply, ok := answer(request, at, false)
		if !ok {
			return
		}
		// A reply is never larger than the request: no amplification. It returns the client's stamp.
		if len(reply) > len(request) || string(reply[24:32]) != string(request[40:48]) {
			t.Errorf("reply %x to %x", reply, request)
		}
		seconds := binary.BigEndian.Uint32(reply[40:])
		if want := uint32(at.Unix() - epoch.Unix()); seconds != want {
			t.Errorf("says second %d, want %d", seconds, want)
		}
	})
}
