package sshverb

import (
	"testing"
	"time"
)

// First come, first served, and never more at once than there may be.
func TestTurns(t *testing.T) {
	turns := &turns{free: 2, length: time.Hour}
	for range 2 {
		if _, now := turns.queue(); !now {
			t.Fatal("a turn was free")
		}
	}
	var waiting []<-chan struct{}
	for range 5 {
		turn, now := turns.queue()
		if now {
			t.Fatal("a turn too many")
		}
		waiting = append(waiting, turn)
	}
	for i := range waiting {
		done := turns.begin()
		done()
		done() // once is enough
		for j, turn := range waiting {
			select {
			case <-turn:
				if j > i {
					t.Fatalf("after %d turns, number %d has come", i+1, j)
				}
			default:
				if j <= i {
					t.Fatalf("after %d turns, number %d has not come", i+1, j)
				}
			}
		}
	}
	// The two that came last give theirs back.
	turns.next()
	turns.next()
	if _, now := turns.queue(); !now {
		t.Error("a turn was lost")
	}
}

func TestATurnEnds(t *testing.T) {
	turns := &turns{free: 1, length: time.Millisecond}
	turns.queue()
	turn, _ := turns.queue()
	done := turns.begin() // and says nothing
	<-turn
	done()
	if turns.free != 0 {
		t.Error("a turn was given back twice")
	}
}
