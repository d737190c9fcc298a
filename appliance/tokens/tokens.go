// Package tokens remembers what an appliance must not forget about its key
// servers: the token that each gave with its last key, whether one refuses, and
// which of them have not heard yet that the disk went dark.
//
// The memory is one small file in the state partition, mode 0600, replaced
// durably. It belongs to the card: a new card knows no token and no refusal, and
// the key servers see that it does not. The file's place is the disk part's, and
// nobody else writes it. Servers are told apart by their host keys' fingerprints;
// what is known of one that the settings no longer name is forgotten.
//
// A copied card has a copy of it. That is what tokens are for: the next grant
// goes to one of the two, and the other is found out when it shows the old one.
package tokens

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/keywire"
	"farkeep/shared/plainfile"
	"farkeep/shared/settings"
)

// maxSize bounds the file, in bytes: MaxKeyServers entries take a tenth of it.
const maxSize = 64 << 10

// Fresh are tokens that came with keys, by server. Printed, they are redacted; as
// JSON they are not, because one part hands them to another that way.
type Fresh map[string]keywire.Token

// MarshalJSON implements json.Marshaler.
func (f Fresh) MarshalJSON() ([]byte, error) {
	plain := make(map[string]string, len(f))
	for id, t := range f {
		plain[id] = t.Reveal()
	}
	return json.Marshal(plain)
}

// UnmarshalJSON implements json.Unmarshaler. It accepts tokens only.
func (f *Fresh) UnmarshalJSON(data []byte) error {
	var plain map[string]string
	if err := json.Unmarshal(data, &plain); err != nil {
		return err
	}
	*f = make(Fresh, len(plain))
	for id, t := range plain {
		if !keywire.IsToken(t) {
			return errors.New("tokens: one is malformed")
		}
		(*f)[id] = keywire.Token(t)
	}
	return nil
}

// Server is what is remembered of one key server.
type Server struct {
	Token keywire.Token
	// Refused is since when it refuses, by the appliance's clock; zero: it does
	// not. Until it grants again no other server's key opens the disk.
	Refused time.Time
	// Untold: it has not heard yet that the disk was closed for lack of consent.
	Untold bool
}

// record is a Server in the file.
type record struct {
	Token   string    `json:"token,omitempty"`
	Refused time.Time `json:"refused,omitzero"`
	Untold  bool      `json:"untold,omitempty"`
}

type document struct {
	Version int               `json:"version"`
	Servers map[string]record `json:"servers"`
}

// Book is the memory. It is safe for concurrent use; reading it never waits for
// the card.
type Book struct {
	path  string
	write sync.Mutex // held by the one that changes it

	mu      sync.Mutex // guards servers
	servers map[string]Server
}

// Open reads the memory at path, which may not exist yet, for the servers with
// these ids. A file that cannot be read is an error, and put aside; the Book that
// comes with it is empty and works.
func Open(path string, ids []string) (*Book, error) {
	b := &Book{path: path, servers: map[string]Server{}}
	for _, id := range ids {
		b.servers[id] = Server{}
	}
	d, err := read(path)
	if err != nil {
		return b, errors.Join(err, os.Rename(path, path+".bad"))
	}
	for id, r := range d.Servers {
		if _, known := b.servers[id]; known {
			b.servers[id] = Server{Token: keywire.Token(r.Token), Refused: r.Refused, Untold: r.Untold}
		}
	}
	return b, nil
}

func read(path string) (document, error) {
	var d document
	data, err := plainfile.Read(path, maxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return d, fmt.Errorf("what is known of the key servers: %w", err)
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("what is known of the key servers: %s: %w", path, err)
	}
	if d.Version != 1 || len(d.Servers) > settings.MaxKeyServers {
		return d, fmt.Errorf("what is known of the key servers: %s: version %d with %d servers cannot be read", path, d.Version, len(d.Servers))
	}
	for _, r := range d.Servers {
		if r.Token != "" && !keywire.IsToken(r.Token) {
			return d, fmt.Errorf("what is known of the key servers: %s: a token is malformed", path)
		}
	}
	return d, nil
}

// All returns what is known, by server.
func (b *Book) All() map[string]Server {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.servers)
}

// Tokens are the tokens to show, by server.
func (b *Book) Tokens() map[string]keywire.Token {
	out := map[string]keywire.Token{}
	for id, s := range b.All() {
		if s.Token != "" {
			out[id] = s.Token
		}
	}
	return out
}

// Refusing are the servers that refuse, in order.
func (b *Book) Refusing() []string {
	return b.where(func(s Server) bool { return !s.Refused.IsZero() })
}

// Untold are the servers that have not heard that the disk is dark, in order.
func (b *Book) Untold() []string { return b.where(func(s Server) bool { return s.Untold }) }

func (b *Book) where(is func(Server) bool) []string {
	var ids []string
	for id, s := range b.All() {
		if is(s) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Keep remembers tokens, and that some servers grant again; opened says that the
// disk is open, and none of them has to hear that it was dark. When it fails the
// old tokens stay, in the file and here alike: a token that is shown before it
// is kept would be lost with the next power cut, and the one before void.
func (b *Book) Keep(fresh Fresh, granted []string, opened bool) error {
	return b.change(func(id string, s Server) Server {
		if t, ok := fresh[id]; ok {
			s.Token = t
		}
		if slices.Contains(granted, id) {
			s.Refused = time.Time{}
		}
		s.Untold = s.Untold && !opened
		return s
	}, false)
}

// Close remembers that the disk is closed: refusing are the servers that refuse
// from now on, none where the lease ran out. Every server is to hear of it. It is
// remembered here also when it cannot be written.
func (b *Book) Close(refusing []string, now time.Time) error {
	return b.change(func(id string, s Server) Server {
		if slices.Contains(refusing, id) && s.Refused.IsZero() {
			s.Refused = now.UTC().Truncate(time.Second)
		}
		s.Untold = true
		return s
	}, true)
}

// Told remembers that these servers know that the disk is dark.
func (b *Book) Told(ids []string) error {
	return b.change(func(id string, s Server) Server {
		s.Untold = s.Untold && !slices.Contains(ids, id)
		return s
	}, true)
}

// change applies do to every server and writes the file if that made a
// difference. regardless keeps the difference in memory where writing fails.
func (b *Book) change(do func(id string, s Server) Server, regardless bool) error {
	b.write.Lock()
	defer b.write.Unlock()
	before := b.All()
	next := map[string]Server{}
	d := document{Version: 1, Servers: map[string]record{}}
	for id, s := range before {
		s = do(id, s)
		next[id] = s
		if s != (Server{}) {
			d.Servers[id] = record{s.Token.Reveal(), s.Refused, s.Untold}
		}
	}
	if maps.Equal(next, before) {
		return nil
	}
	if regardless {
		b.set(next)
	}
	data, err := json.Marshal(d)
	if err == nil {
		err = atomicfile.Write(b.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("what is known of the key servers: %w", err)
	}
	b.set(next)
	return nil
}

func (b *Book) set(servers map[string]Server) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.servers = servers
}
