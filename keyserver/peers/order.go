package peers

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"farkeep/shared/settings"
)

const (
	// Verb is the only order that one key server may give another: to revoke an
	// appliance. There is no verb that allows one.
	Verb = "peer-revoke"
	// MaxOrder bounds an order on the wire, in bytes.
	MaxOrder = 4 << 10
	// MaxText bounds the reason and the name of the person, in bytes.
	MaxText = 300
)

// Order is a person's order to revoke an appliance.
type Order struct {
	ID        string    `json:"id"` // 32 hexadecimal digits, the same on every server
	Appliance string    `json:"appliance"`
	Reason    string    `json:"reason"`
	By        string    `json:"by"`    // the person at the terminal
	From      string    `json:"from"`  // the key server at which it was typed
	Since     time.Time `json:"since"` // by that server's clock
}

// NewOrder makes an order with an ID of its own.
func NewOrder(appliance, reason, by, from string, since time.Time) Order {
	id := make([]byte, 16)
	rand.Read(id) // never fails
	return Order{ID: hex.EncodeToString(id), Appliance: appliance, Reason: clip(reason), By: clip(by), From: from, Since: since.UTC().Truncate(time.Second)}
}

// clip makes a text what check accepts.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return -1
	}, s)
	if len(s) > MaxText {
		s = strings.ToValidUTF8(s[:MaxText], "")
	}
	return s
}

// ErrBadOrder is wrapped by every error of ParseOrder.
var ErrBadOrder = errors.New("not an order between key servers")

// ParseOrder reads an order from the wire: its verb's arguments, and what comes
// on standard input, which may be nothing. Keys that it does not know are left
// out: servers are not updated all at once.
func ParseOrder(args []string, in io.Reader) (Order, error) {
	if len(args) != 1 || !settings.IsName(args[0]) {
		return Order{}, fmt.Errorf("%w: %s wants the name of an appliance", ErrBadOrder, Verb)
	}
	text, err := io.ReadAll(io.LimitReader(in, MaxOrder+1))
	if err != nil {
		return Order{}, fmt.Errorf("read an order: %w", err)
	}
	if len(text) > MaxOrder {
		return Order{}, fmt.Errorf("%w: longer than %d bytes", ErrBadOrder, MaxOrder)
	}
	o := Order{Appliance: args[0]}
	if len(bytes.TrimSpace(text)) == 0 {
		return o, nil
	}
	if err := json.Unmarshal(text, &o); err != nil {
		return Order{}, fmt.Errorf("%w: %w", ErrBadOrder, err)
	}
	if o.Appliance != args[0] {
		return Order{}, fmt.Errorf("%w: it is about two appliances", ErrBadOrder)
	}
	if err := o.check(); err != nil {
		return Order{}, err
	}
	return o, nil
}

func (o Order) check() error {
	id, err := hex.DecodeString(o.ID)
	switch {
	case o.ID != "" && (err != nil || len(id) != 16):
		return fmt.Errorf("%w: the id is malformed", ErrBadOrder)
	case !settings.IsName(o.Appliance):
		return fmt.Errorf("%w: %q is not the name of an appliance", ErrBadOrder, o.Appliance)
	case o.From != "" && !settings.IsName(o.From):
		return fmt.Errorf("%w: %q is not the name of a key server", ErrBadOrder, o.From)
	case o.Reason != clip(o.Reason), o.By != clip(o.By):
		return fmt.Errorf("%w: a text is too long, or not for people", ErrBadOrder)
	}
	return nil
}

// receipt is the answer to an order that was carried out.
type receipt struct {
	Revoked string `json:"revoked"` // the appliance
	ID      string `json:"id"`      // of the order
}

// maxReceipt bounds a receipt on the wire, in bytes.
const maxReceipt = 512

// check reads a receipt. Anything else than the very words means that the order
// does not count as taken.
func (o Order) checkReceipt(answer []byte) error {
	var r receipt
	if err := json.Unmarshal(answer, &r); err != nil {
		return fmt.Errorf("read the receipt: %w", err)
	}
	if r.Revoked != o.Appliance || r.ID != o.ID {
		return errors.New("read the receipt: it is of another order")
	}
	return nil
}
