// Package borgconfig reads the config file of a Borg 1.x repository: the pusher
// knows a repository by it, the appliance that it still is the same one.
package borgconfig

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// MaxSize bounds a Borg repository's config file, in bytes. With a key in it, it
// has less than 2000.
const MaxSize = 256 << 10

// Config is what Farkeep needs of a Borg repository's config file.
type Config struct {
	ID      string // 64 hexadecimal digits, small
	Version int
}

// Parse reads a config file as Python's configparser does, but for what borg never
// writes: sections in brackets, "key = value" or "key: value" lines, indented
// lines that continue a value, lines that begin with # or ; as comments. Keys
// count in any case.
func Parse(text []byte) (Config, error) {
	var c Config
	if len(text) > MaxSize {
		return c, fmt.Errorf("config is larger than %d bytes", MaxSize)
	}
	section, seen := "", map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, MaxSize+1)
	for lines.Scan() {
		line := lines.Text()
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "", trimmed[0] == '#', trimmed[0] == ';':
		case line[0] == ' ' || line[0] == '\t':
			// The continuation of a value: only the key's, which is none of ours.
		case trimmed[0] == '[':
			section = strings.TrimSuffix(strings.TrimPrefix(trimmed, "["), "]")
		case section == "repository":
			i := strings.IndexAny(line, "=:")
			if i < 0 {
				return c, fmt.Errorf("config: %.40q is no setting", line)
			}
			key := strings.ToLower(strings.TrimSpace(line[:i]))
			if _, twice := seen[key]; twice {
				return c, fmt.Errorf("config: %.40q is set twice", key)
			}
			seen[key] = strings.TrimSpace(line[i+1:])
		}
	}
	if err := lines.Err(); err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	if len(seen) == 0 {
		return c, errors.New("config has no [repository]")
	}
	if _, err := fmt.Sscanf(seen["version"], "%d", &c.Version); err != nil || fmt.Sprint(c.Version) != seen["version"] {
		return c, fmt.Errorf("config: version %.40q is no number", seen["version"])
	}
	c.ID = strings.ToLower(seen["id"])
	if id, err := hex.DecodeString(c.ID); err != nil || len(id) != 32 {
		return c, fmt.Errorf("config: id %.80q does not have 64 hexadecimal digits", seen["id"])
	}
	return c, nil
}
