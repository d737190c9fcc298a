package keywire

import (
	"fmt"
	"strconv"
	"strings"
)

// Values of Claims.Damage: which copy of the LUKS header cannot be read.
const (
	DamagePrimary   = "primary"
	DamageSecondary = "secondary"
)

const (
	// maxUp bounds Claims.Up, in seconds: a hundred years.
	maxUp = 100 * 366 * 24 * 3600
	// maxSlots is the number of key slots that LUKS2 has room for.
	maxSlots = 32
)

// Claims are what an appliance says of itself and of its disk. Zero values are
// not claimed. Nothing proves them.
type Claims struct {
	Boot   string // the kernel's boot id, 32 hexadecimal digits without dashes
	Serial string // of the board, up to 16 hexadecimal digits
	Up     int64  // seconds since the boot
	Header string // fingerprint of the live LUKS header (luksheader), 64 hexadecimal digits
	Damage string // DamagePrimary, DamageSecondary
	Slots  int    // key slots that are in use
}

// claim is one name with how it is read and written. set refuses what the
// protocol does not allow; get returns "" for a value that cannot be sent.
type claim struct {
	name string
	set  func(*Claims, string) bool
	get  func(Claims) string
}

// claims are all that the protocol knows, in the order in which they are sent.
var claims = []claim{
	{"boot",
		func(c *Claims, v string) bool { c.Boot = v; return isHex(v, 32, 32) },
		func(c Claims) string { return c.Boot }},
	{"serial",
		func(c *Claims, v string) bool { c.Serial = v; return isHex(v, 1, 16) },
		func(c Claims) string { return c.Serial }},
	{"up",
		func(c *Claims, v string) (ok bool) { c.Up, ok = number(v, maxUp); return ok },
		func(c Claims) string { return strconv.FormatInt(c.Up, 10) }},
	{"header",
		func(c *Claims, v string) bool { c.Header = v; return isHex(v, 64, 64) },
		func(c Claims) string { return c.Header }},
	{"damage",
		func(c *Claims, v string) bool { c.Damage = v; return v == DamagePrimary || v == DamageSecondary },
		func(c Claims) string { return c.Damage }},
	{"slots",
		func(c *Claims, v string) bool { n, ok := number(v, maxSlots); c.Slots = int(n); return ok },
		func(c Claims) string { return strconv.Itoa(c.Slots) }},
}

// parseClaims reads name=value words, each name once.
func parseClaims(words []string) (Claims, error) {
	var c Claims
	seen := map[string]bool{}
	for _, w := range words {
		name, value, found := strings.Cut(w, "=")
		switch {
		case !found || !isClaimName(name) || value == "":
			return Claims{}, fmt.Errorf("%w: after the token come words like name=value", ErrBadRequest)
		case seen[name]:
			return Claims{}, fmt.Errorf("%w: %s is claimed twice", ErrBadRequest, name)
		}
		seen[name] = true
		for _, k := range claims {
			if k.name == name && !k.set(&c, value) {
				return Claims{}, fmt.Errorf("%w: the value of %s is malformed", ErrBadRequest, name)
			}
		}
	}
	return c, nil
}

// words are the claims that can be sent.
func (c Claims) words() (words []string) {
	for _, k := range claims {
		if v, sent := k.get(c), (Claims{}); v != "" && k.set(&sent, v) {
			words = append(words, k.name+"="+v)
		}
	}
	return words
}

// isClaimName bounds the names that a request may bring into an error or a log.
// String is for logs and the audit log: the claims as they were sent.
func (c Claims) String() string { return strings.Join(c.words(), " ") }

func isClaimName(s string) bool {
	return s != "" && len(s) <= 16 && !strings.ContainsFunc(s, func(r rune) bool { return !('a' <= r && r <= 'z') })
}

func isHex(s string, least, most int) bool {
	return len(s) >= least && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool {
		return !('0' <= r && r <= '9' || 'a' <= r && r <= 'f')
	})
}

// number reads 1 to most, written without sign, point or leading zero.
func number(s string, most int64) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 1 && n <= most && strconv.FormatInt(n, 10) == s
}
