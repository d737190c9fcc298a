// Package household makes the files of a household for tests that need months of
// believable backups: documents that are edited, photos that come in spells and
// are culled later, a mail file that grows and is compacted, a database of which
// some pages change every day, a profile that never stands still.
//
// The same seed makes the same files day by day, whatever the time and the
// machine. What changes in a day is about half a percent of the whole, and a year adds
// about a quarter. Backing up is the caller's.
package household

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Start is the first day of every household, a Saturday.
var Start = time.Date(2025, time.March, 1, 0, 0, 0, 0, time.UTC)

// Household is a folder of files and the day it has come to.
type Household struct {
	dir    string
	seed   uint64
	day    int
	random *rand.Rand
	words  []string
	serial int // of photos and documents
	photos []string
	docs   []string
	err    error // of the first write that was refused
}

// Sizes of a household at its beginning; together about 60 MB, of which Borg
// makes a repository of about 50.
const (
	photos       = 500
	documents    = 200
	mailBytes    = 5 << 20
	databasePage = 4096
	databaseSize = 1 << 20
	profileBytes = 48 << 10
)

// New fills dir with the files of day 0.
func New(dir string, seed uint64) (*Household, error) {
	h := &Household{dir: dir, seed: seed}
	h.random = rand.New(rand.NewPCG(seed, 0))
	h.words = make([]string, 3000)
	for i := range h.words {
		h.words[i] = h.word()
	}
	for range photos {
		h.addPhoto(h.random.IntN(36))
	}
	for range documents {
		h.addDocument()
	}
	var mail strings.Builder
	for mail.Len() < mailBytes {
		mail.WriteString(h.mail())
	}
	h.write("mail/inbox", []byte(mail.String()))
	h.write("lib/database", h.page(databaseSize))
	h.profile()
	return h, h.err
}

// Day is how many days the household is old.
func (h *Household) Day() int { return h.day }

// Date is the day that the files are of, at midnight UTC.
func (h *Household) Date() time.Time { return Start.AddDate(0, 0, h.day) }

// Next makes the changes of the next day.
func (h *Household) Next() error {
	h.day++
	h.random = rand.New(rand.NewPCG(h.seed, uint64(h.day)))
	h.editDocuments()
	h.takePhotos()
	h.receiveMail()
	h.useDatabase()
	h.profile()
	return h.err
}

func (h *Household) editDocuments() {
	if h.weekend() && h.random.IntN(2) == 0 {
		return // nobody wrote anything
	}
	for range 1 + h.random.IntN(4) {
		name := h.docs[h.random.IntN(len(h.docs))]
		text := h.read(name)
		at := h.random.IntN(len(text) + 1)
		switch h.random.IntN(4) {
		case 0: // a paragraph is written anew
			end := min(len(text), at+800)
			text = slices.Concat(text[:at], h.text(700), text[end:])
		case 1: // a paragraph goes
			text = slices.Delete(text, at, min(len(text), at+600))
		default: // one is added
			text = slices.Insert(text, at, h.text(400+h.random.IntN(1200))...)
		}
		h.write(name, text)
	}
	if h.random.IntN(4) == 0 {
		h.addDocument()
	}
	if h.random.IntN(10) == 0 && len(h.docs) > documents/2 {
		i := h.random.IntN(len(h.docs))
		h.remove(h.docs[i])
		h.docs = slices.Delete(h.docs, i, i+1)
	}
}

// takePhotos: one or two at weekends, many in the two holidays of a year, and a
// cull of the last ones once a month.
func (h *Household) takePhotos() {
	month := 36 + h.day/30
	count := 0
	switch yearDay := h.day % 365; {
	case yearDay >= 130 && yearDay < 142, yearDay >= 296 && yearDay < 301:
		count = 4 + h.random.IntN(6)
	case h.weekend():
		count = h.random.IntN(3)
	}
	for range count {
		h.addPhoto(month)
	}
	if h.day%30 == 17 {
		for range min(5, len(h.photos)) {
			i := len(h.photos) - 1 - h.random.IntN(min(40, len(h.photos)))
			h.remove(h.photos[i])
			h.photos = slices.Delete(h.photos, i, i+1)
		}
	}
	if h.day%90 == 45 { // an album is renamed: no content changes
		from := filepath.Join(h.dir, "photos", fmt.Sprintf("album-%03d", h.random.IntN(36)))
		to := fmt.Sprintf("%s-sorted-%d", from, h.day)
		if err := os.Rename(from, to); err == nil {
			for i, name := range h.photos {
				if rest, ok := strings.CutPrefix(filepath.Join(h.dir, name), from+"/"); ok {
					h.photos[i] = filepath.Join("photos", filepath.Base(to), rest)
				}
			}
		}
	}
}

func (h *Household) receiveMail() {
	var mail strings.Builder
	for range 2 + h.random.IntN(8) {
		mail.WriteString(h.mail())
	}
	if h.day%30 != 9 {
		h.append("mail/inbox", mail.String())
		return
	}
	// What was deleted over the month leaves the file.
	all := strings.Split(string(h.read("mail/inbox"))+mail.String(), "\nFrom ")
	kept := all[:1]
	for _, m := range all[1:] {
		if h.random.IntN(25) > 0 {
			kept = append(kept, m)
		}
	}
	h.write("mail/inbox", []byte(strings.Join(kept, "\nFrom ")))
}

func (h *Household) useDatabase() {
	data := h.read("lib/database")
	for range 2 + h.random.IntN(6) {
		page := h.random.IntN(len(data) / databasePage)
		copy(data[page*databasePage:], h.page(databasePage))
	}
	if h.day%3 == 0 {
		data = append(data, h.page(databasePage)...)
	}
	h.write("lib/database", data)
}

func (h *Household) profile() {
	h.write("lib/profile", h.page(profileBytes))
}

func (h *Household) weekend() bool {
	d := h.Date().Weekday()
	return d == time.Saturday || d == time.Sunday
}

func (h *Household) addPhoto(album int) {
	h.serial++
	name := fmt.Sprintf("photos/album-%03d/%05d.jpg", album, h.serial)
	h.write(name, h.noise(50<<10+h.random.IntN(80<<10)))
	h.photos = append(h.photos, name)
}

func (h *Household) addDocument() {
	h.serial++
	name := fmt.Sprintf("documents/%02d/%05d.txt", h.random.IntN(20), h.serial)
	h.write(name, h.text(4<<10+h.random.IntN(72<<10)))
	h.docs = append(h.docs, name)
}

// mail is a message as an mbox file has it, one of six with an attachment.
func (h *Household) mail() string {
	text := fmt.Sprintf("\nFrom %s@example.net\nSubject: %s\n\n%s\n", h.pick(), h.pick(), h.text(300+h.random.IntN(1500)))
	if h.random.IntN(6) == 0 {
		text += base64.StdEncoding.EncodeToString(h.noise(2000+h.random.IntN(20_000))) + "\n"
	}
	return text
}

// page is what databases and profiles hold: half of it compresses.
func (h *Household) page(size int) []byte {
	b := h.noise(size)
	for at := 0; at+512 <= size; at += 1024 {
		copy(b[at:at+512], h.text(512))
	}
	return b
}

func (h *Household) noise(size int) []byte {
	b := make([]byte, size)
	for i := 0; i < size; i += 8 {
		v := h.random.Uint64()
		for k := i; k < min(i+8, size); k++ {
			b[k] = byte(v)
			v >>= 8
		}
	}
	return b
}

func (h *Household) text(size int) []byte {
	b := make([]byte, 0, size+16)
	for len(b) < size {
		b = append(b, h.pick()...)
		b = append(b, ' ')
		if h.random.IntN(12) == 0 {
			b[len(b)-1] = '\n'
		}
	}
	return b[:size]
}

func (h *Household) pick() string {
	// Some words are far more frequent than others.
	return h.words[h.random.IntN(1+h.random.IntN(len(h.words)))]
}

func (h *Household) word() string {
	const consonants, vowels = "bdfghklmnprstvw", "aeiou"
	var b strings.Builder
	for range 1 + h.random.IntN(4) {
		b.WriteByte(consonants[h.random.IntN(len(consonants))])
		b.WriteByte(vowels[h.random.IntN(len(vowels))])
	}
	return b.String()
}

// The first error of the file system ends a household: what follows changes nothing.

func (h *Household) write(name string, data []byte) {
	if h.err != nil {
		return
	}
	path := filepath.Join(h.dir, name)
	if h.err = os.MkdirAll(filepath.Dir(path), 0o755); h.err == nil {
		h.err = os.WriteFile(path, data, 0o644)
	}
}

func (h *Household) append(name, text string) {
	if h.err != nil {
		return
	}
	f, err := os.OpenFile(filepath.Join(h.dir, name), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	h.err = err
}

func (h *Household) read(name string) []byte {
	if h.err != nil {
		return make([]byte, databasePage)
	}
	var data []byte
	data, h.err = os.ReadFile(filepath.Join(h.dir, name))
	if h.err != nil {
		return make([]byte, databasePage)
	}
	return data
}

func (h *Household) remove(name string) {
	if h.err == nil {
		h.err = os.Remove(filepath.Join(h.dir, name))
	}
}
