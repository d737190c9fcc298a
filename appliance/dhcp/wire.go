package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
)

// errRefused says that the server does not grant this address any more (NAK).
var errRefused = errors.New("the server refused the address")

// wire speaks DHCP on one interface through a packet socket (CAP_NET_RAW), so
// that neither an address nor a free port 68 is needed. It is open only while
// something is asked: the socket sees all IPv4 frames of the interface.
type wire struct {
	name   string
	accept func(Lease) error
}

const (
	answerTimeout = 2 * time.Second
	answerTries   = 3 // 2 + 4 + 8 s
)

func (w *wire) open() (*nclient4.Client, error) {
	c, err := nclient4.New(w.name, nclient4.WithTimeout(answerTimeout), nclient4.WithRetry(answerTries))
	if err != nil {
		return nil, fmt.Errorf("dhcp on %s: %w", w.name, err)
	}
	return c, nil
}

var options = dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer,
	dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue)

// acquire makes a new lease, of the address had if that is possible (RFC 2131
// §3.1). Of several servers the first with a usable offer wins.
func (w *wire) acquire(ctx context.Context, had netip.Addr) (Lease, error) {
	c, err := w.open()
	if err != nil {
		return Lease{}, err
	}
	defer c.Close()
	size := dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(nclient4.MaxMessageSize))
	modifiers := []dhcpv4.Modifier{options, size}
	if had.Is4() {
		modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(had.AsSlice())))
	}
	discover, err := dhcpv4.NewDiscovery(c.InterfaceAddr(), modifiers...)
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp on %s: %w", w.name, err)
	}
	var refusal error
	offer, err := c.SendAndRead(ctx, c.RemoteAddr(), discover, func(m *dhcpv4.DHCPv4) bool {
		if m.MessageType() != dhcpv4.MessageTypeOffer {
			return false
		}
		_, err := w.check(m)
		if err != nil {
			refusal = err
		}
		return err == nil
	})
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp on %s: no usable offer: %w", w.name, errors.Join(err, refusal))
	}
	lease, err := c.RequestFromOffer(ctx, offer, options)
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp on %s: %w", w.name, nak(err))
	}
	return w.check(lease.ACK)
}

// renew extends a lease. The request is broadcast even while RFC 2131 would
// have it unicast: the server hears it all the same, and no socket on port 68
// is needed. anyServer says whether another server's answer counts (rebinding).
func (w *wire) renew(ctx context.Context, l Lease, anyServer bool) (Lease, error) {
	c, err := w.open()
	if err != nil {
		return Lease{}, err
	}
	defer c.Close()
	request, err := dhcpv4.New(dhcpv4.WithHwAddr(c.InterfaceAddr()), dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest),
		dhcpv4.WithClientIP(l.Address.Addr().AsSlice()), options, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(nclient4.MaxMessageSize)))
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp on %s: %w", w.name, err)
	}
	answer, err := c.SendAndRead(ctx, c.RemoteAddr(), request, func(m *dhcpv4.DHCPv4) bool {
		kind := m.MessageType()
		return (kind == dhcpv4.MessageTypeAck || kind == dhcpv4.MessageTypeNak) &&
			(anyServer || m.ServerIdentifier().Equal(l.Server.AsSlice()))
	})
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp on %s: renew: %w", w.name, err)
	}
	if answer.MessageType() == dhcpv4.MessageTypeNak {
		return Lease{}, fmt.Errorf("dhcp on %s: renew: %w", w.name, errRefused)
	}
	return w.check(answer)
}

func (w *wire) check(m *dhcpv4.DHCPv4) (Lease, error) {
	l, err := parse(m)
	if err == nil {
		err = w.accept(l)
	}
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp on %s: %w", w.name, err)
	}
	return l, nil
}

func nak(err error) error {
	var n *nclient4.ErrNak
	if errors.As(err, &n) {
		return errRefused // the server's own words are not repeated in the log
	}
	return err
}
