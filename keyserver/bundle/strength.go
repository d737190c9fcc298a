package bundle

import (
	"bytes"
	"errors"
	"unicode"
	"unicode/utf8"

	"farkeep/shared/hint"
	"farkeep/shared/secret"
)

// Least that a bundle's passphrase must have. A sealed bundle may be guessed at for
// years, by many machines at once; scrypt makes each guess cost about a second.
const (
	minWords    = 6  // different ones, of three letters or more
	minLength   = 20 // characters, where they are no words
	minDistinct = 10 // different characters among them
)

// Strong refuses a passphrase that is plainly too weak. What passes need not be
// strong: a sentence from a book passes, and is guessed. It is for a person who
// chose in haste, and no measure.
func Strong(passphrase secret.Bytes) error {
	text := bytes.TrimSpace(passphrase.Reveal())
	if !utf8.Valid(text) {
		return errors.New("the passphrase is not text in UTF-8: another system could not type it")
	}
	words, distinct := 0, map[rune]bool{}
	var seen [][]byte
	for _, w := range bytes.FieldsFunc(text, func(r rune) bool { return !unicode.IsLetter(r) }) {
		known := false
		for _, old := range seen {
			known = known || bytes.EqualFold(old, w)
		}
		if !known && utf8.RuneCount(w) >= 3 {
			words++
			seen = append(seen, w)
		}
	}
	length := 0
	for _, r := range string(text) {
		length++
		distinct[r] = true
	}
	if words >= minWords || length >= minLength && len(distinct) >= minDistinct {
		return nil
	}
	return hint.Because(errors.New("the passphrase is too weak for something that can be guessed at for years"),
		"%d words that nobody would guess from each other (dice, a list of words), or %d characters", minWords, minLength)
}
