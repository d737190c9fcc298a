package place

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// TailscaleSocket is where tailscaled answers on Linux.
const TailscaleSocket = "/run/tailscale/tailscaled.sock"

const (
	maxStatus     = 8 << 20
	tailscaleTime = 5 * time.Second
)

// Tailscale asks tailscaled, by the socket and the request by which `tailscale
// status --json` asks.
type Tailscale struct{ client *http.Client }

// OpenTailscale names tailscaled's socket. Nothing is asked yet.
func OpenTailscale(socket string) *Tailscale {
	return &Tailscale{&http.Client{
		Timeout: tailscaleTime,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			},
			DisableKeepAlives: true, // so that a tailscaled that was restarted is found
		},
	}}
}

// Observe says what Tailscale knows of its peers.
func (t *Tailscale) Observe(ctx context.Context) ([]Observation, error) {
	// The name is the one that tailscaled wants to see; nothing resolves it.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://local-tailscaled.sock/localapi/v0/status", nil)
	if err != nil {
		return nil, fmt.Errorf("ask Tailscale for its peers: %w", err)
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask Tailscale for its peers: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask Tailscale for its peers: %s", resp.Status)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxStatus+1))
	if err == nil {
		var all []Observation
		if all, err = ParseTailscale(text); err == nil {
			return all, nil
		}
	}
	return nil, fmt.Errorf("read what Tailscale says of its peers: %w", err)
}

// ParseTailscale reads what `tailscale status --json` prints, as far as it says
// where peers are (ipnstate.Status and ipnstate.PeerStatus in Tailscale's source).
// A peer's own word (its Addrs) is not evidence and is passed over. A peer that
// makes no sense is left out: nothing is known of it then.
func ParseTailscale(text []byte) ([]Observation, error) {
	if len(text) > maxStatus {
		return nil, fmt.Errorf("larger than %d bytes", maxStatus)
	}
	var status struct {
		BackendState string
		Peer         map[string]*struct {
			PublicKey    string
			TailscaleIPs []netip.Addr
			CurAddr      string
			Relay        string
			PeerRelay    string
			RxBytes      int64
		}
	}
	if err := json.Unmarshal(text, &status); err != nil {
		return nil, err
	}
	if status.BackendState == "" {
		return nil, errors.New("it is not a status of Tailscale")
	}
	all := []Observation{}
	if status.BackendState != "Running" {
		return all, nil
	}
	for key, p := range status.Peer {
		if p == nil || key == "" || p.PublicKey != key || len(key) > 128 || len(p.TailscaleIPs) > maxAllowed || p.RxBytes < 0 {
			continue
		}
		o := Observation{Source: SourceTailscale, Peer: key, Received: uint64(p.RxBytes)}
		for _, a := range p.TailscaleIPs {
			if a.IsValid() {
				o.Allowed = append(o.Allowed, netip.PrefixFrom(a.Unmap().WithZone(""), a.Unmap().BitLen()))
			}
		}
		endpoint, err := netip.ParseAddrPort(p.CurAddr)
		switch {
		case p.CurAddr != "" && err == nil && endpoint.Port() != 0:
			o.Endpoint = endpoint
		case p.CurAddr != "":
			continue
		case p.PeerRelay != "":
			o.Relay = "peer" // another machine of the tailnet forwards
		default:
			o.Relay = p.Relay
		}
		all = append(all, o)
	}
	return all, nil
}
