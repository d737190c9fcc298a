package generations_test

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/shared/generations"
)

// An upload's answer tells what it waited for bytes from what it did with them.
func TestUploadTellsWhatItWaitedFor(t *testing.T) {
	var mu sync.Mutex
	now := time.Unix(1e9, 0)
	move := func(d time.Duration) time.Time {
		mu.Lock()
		defer mu.Unlock()
		now = now.Add(d)
		return now
	}
	each := time.Duration(0) // what a look at the clock takes: work, as far as the store knows
	s := open(t, t.TempDir(), generations.Options{Now: func() time.Time { return move(each) }})
	home := tree{}.add("a", strings.Repeat("a", 1<<20)).add("b", "b")
	answer, tx, err := begin(t, s, "photos", home)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	var stream bytes.Buffer
	if err := home.write(&stream, answer); err != nil {
		t.Fatal(err)
	}
	pieces := 0
	got, err := tx.Receive(t.Context(), readerFunc(func(p []byte) (int, error) {
		pieces++
		move(time.Minute)
		return stream.Read(p)
	}))
	if want := time.Duration(pieces) * time.Minute; err != nil || got.Waited != want || got.Took != want {
		t.Errorf("a slow line: %+v, %v", got, err)
	}
	if _, err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	tx.Close()

	home.add("c", "c")
	if answer, tx, err = begin(t, s, "photos", home); err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	each = time.Second
	if got, err = tx.Upload(t.Context(), func(w io.Writer) error { return home.write(w, answer) }); err != nil || got.Waited >= got.Took || got.Waited == 0 {
		t.Errorf("a slow store: %+v, %v", got, err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
