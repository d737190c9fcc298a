package settings

import (
	"net"
	"net/mail"
	"regexp"
	"strconv"
)

var (
	namePattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)
	luksUUIDPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// IsName reports whether s may name a site, a machine, a key server or a key:
// small letters, digits, dots and dashes, 63 at most, so that it may be a host
// name and a file name too.
func IsName(s string) bool { return namePattern.MatchString(s) }

// IsLUKSUUID reports whether s is a LUKS UUID as cryptsetup luksUUID prints it.
func IsLUKSUUID(s string) bool { return luksUUIDPattern.MatchString(s) }

// IsHostPort reports whether s is host:port with a port from 1 to 65535.
func IsHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || len(s) > 260 {
		return false
	}
	p, err := strconv.Atoi(port)
	return err == nil && p >= 1 && p <= 65535
}

// IsMailAddress reports whether s is one bare address, without a display name.
func IsMailAddress(s string) bool {
	parsed, err := mail.ParseAddress(s)
	return err == nil && parsed.Address == s
}
