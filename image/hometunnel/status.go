package hometunnel

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// parseStatus reads the peers out of an answer of WireGuard's configuration protocol.
func parseStatus(text string) ([]PeerStatus, error) {
	var peers []PeerStatus
	var seconds, nanoseconds int64
	for line := range strings.SplitSeq(text, "\n") {
		name, value, _ := strings.Cut(line, "=")
		if name == "public_key" {
			raw, err := hex.DecodeString(value)
			if err != nil {
				return nil, fmt.Errorf("public key of a peer: %w", err)
			}
			peers = append(peers, PeerStatus{PublicKey: base64.StdEncoding.EncodeToString(raw)})
			continue
		}
		if len(peers) == 0 {
			continue
		}
		p := &peers[len(peers)-1]
		var err error
		switch name {
		case "endpoint":
			p.Endpoint = value
		case "rx_bytes":
			p.Received, err = strconv.ParseUint(value, 10, 64)
		case "tx_bytes":
			p.Sent, err = strconv.ParseUint(value, 10, 64)
		case "last_handshake_time_sec":
			seconds, err = strconv.ParseInt(value, 10, 64)
		case "last_handshake_time_nsec":
			// It follows the seconds.
			nanoseconds, err = strconv.ParseInt(value, 10, 64)
			if seconds != 0 || nanoseconds != 0 {
				p.LastHandshake = time.Unix(seconds, nanoseconds)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s of a peer: %w", name, err)
		}
	}
	return peers, nil
}
