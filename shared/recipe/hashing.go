package recipe

import (
	"hash"
	"runtime"

	"farkeep/shared/manifest"
)

// hashBeside is the size in bytes from which a file is hashed beside the reading
// and writing of it: below it a goroutine costs more than it saves.
const hashBeside = 2 * maxPiece

// hashing makes a file's hash. Of a long file it hashes one piece of data while
// the piece is written and the next one is read, on another processor, where there
// is one: hashing takes as long as everything else that the receiver of an upload
// does.
type hashing struct {
	h    hash.Hash
	work chan []byte   // nil: everything is hashed at once
	done chan struct{} // one for each piece
	busy bool          // with a piece that done did not tell of yet
}

func newHashing(size int64) *hashing {
	s := &hashing{h: manifest.NewHash()}
	if size < hashBeside || runtime.GOMAXPROCS(0) == 1 {
		return s
	}
	s.work, s.done = make(chan []byte), make(chan struct{})
	go func() {
		for p := range s.work {
			s.h.Write(p)
			s.done <- struct{}{}
		}
	}()
	return s
}

// beside hashes p, which must stay as it is until the next call of any method.
func (s *hashing) beside(p []byte) {
	if s.work == nil {
		s.h.Write(p)
		return
	}
	s.wait()
	s.work <- p
	s.busy = true
}

// Write hashes p at once.
func (s *hashing) Write(p []byte) (int, error) {
	s.wait()
	return s.h.Write(p)
}

func (s *hashing) sum() manifest.Sum {
	s.wait()
	return manifest.SumOf(s.h)
}

func (s *hashing) wait() {
	if s.busy {
		<-s.done
		s.busy = false
	}
}

// close ends the goroutine.
func (s *hashing) close() {
	s.wait()
	if s.work != nil {
		close(s.work)
	}
}
