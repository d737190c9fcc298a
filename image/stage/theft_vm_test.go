//go:build vm

package stage_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/mailsink"
	"farkeep/image/stage"
	"farkeep/shared/pushwire"
)

// copies is how often the volume key may lie in a machine's memory: whole, and
// each of its halves. dm-crypt keeps it whole (struct crypt_config); AES-XTS uses
// each half as a key of its own, whose first round keys are its very bytes.
type copies struct{ whole, halves int }

var (
	whileOpen = copies{1, 2}
	whileDark = copies{}
)

// remembers compares what the memory holds with what it may hold. planted is
// known to be there: a search that does not find it proves nothing.
func (w *world) remembers(planted []byte, want copies) {
	w.Helper()
	secrets, err := w.a.Secrets()
	w.must(err)
	half := len(secrets.Volume) / 2
	needles := append([][]byte{secrets.Volume, secrets.Volume[:half], secrets.Volume[half:]}, stage.Forms(secrets.Key)...)
	if planted != nil {
		needles = append(needles, planted)
	}
	counts, err := w.a.Memory(w.Context(), needles...)
	w.must(err)
	if got := (copies{counts[0], counts[1]}); got != want || counts[2] != counts[1] {
		w.Errorf("the volume key lies in memory %d times, its halves %d and %d times, want %+v", counts[0], counts[1], counts[2], want)
	}
	for i, n := range counts[3:7] {
		if n != 0 {
			w.Errorf("form %d of the key that opened the disk is in memory, %d times", i, n)
		}
	}
	if planted != nil && counts[7] == 0 {
		w.Error("the search does not find what is there")
	}
}

// keyServer runs a command of the key server.
func (w *world) keyServer(args ...string) string {
	w.Helper()
	out, err := w.s.Run(w.Context(), "farkeep-keyserver", append(args, w.s.KeyServerFlags()...)...)
	w.must(err)
	return out
}

// mail waits for a mail whose subject holds text.
func (w *world) mail(text string) mailsink.Message {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 5*time.Minute)
	defer cancel()
	m, err := w.s.Mail.Wait(ctx, func(m mailsink.Message) bool { return strings.Contains(m.Subject(), text) })
	w.must(err)
	return m
}

func (w *world) gone() {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 3*time.Minute)
	defer cancel()
	w.must(w.a.Pi.WaitDisk(ctx, false))
}

// What happens to an appliance that falls into other hands, one after the other.
// Its disk is open at the beginning.

func (w *world) searched() {
	planted, err := os.ReadFile(filepath.Join(w.source, "file-00"))
	w.must(err)
	w.remembers(planted[:64], whileOpen)
}

func (w *world) revokedWhileItRuns() {
	w.keyServer("revoke", "barn", "--reason", "stolen", "--wait", "5m") // ends when the disk is dark
	w.gone()
	if out := w.keyServer("list", "--json"); !strings.Contains(out, `"told": "2`) || !strings.Contains(out, `"dark": "2`) {
		w.Errorf("the key server does not show that it has reached the appliance: %s", out)
	}
	st, err := w.a.Status(w.Context())
	w.must(err)
	if d := st.Disk; d.Unlocked || d.Power || d.Dark != "refused" || len(d.RefusedBy) != 1 || !strings.Contains(d.Error, "refused by key server home") {
		w.Errorf("%+v", d)
	}
	if m := w.mail("consent REFUSED"); !strings.Contains(m.Text(), "refused by") || !strings.Contains(m.Text(), "locked, without power") {
		w.Error(m.Text())
	}
	w.remembers(nil, whileDark)
}

func (w *world) stolenAndSwitchedOff() {
	w.must(w.a.CutPower())
	w.must(w.a.Boot(context.WithoutCancel(w.Context())))
	_, err := w.a.SSH(w.Context(), "home/pusher/ssh_key", "wake")
	for err != nil {
		w.await("up", func(pushwire.Status) bool { return true })
		_, err = w.a.SSH(w.Context(), "home/pusher/ssh_key", "wake")
	}
	st := w.await("refused", func(s pushwire.Status) bool { return s.Disk.Dark == "refused" })
	if st.Disk.Unlocked || len(w.a.Pi.RelayEvents()) > 0 {
		w.Errorf("the disk got power: %v, %+v", w.a.Pi.RelayEvents(), st.Disk)
	}
	secrets, err := w.a.Secrets()
	w.must(err)
	counts, err := stage.Occurrences(w.Context(), w.a.Card, append(stage.Forms(secrets.Key), stage.Forms(secrets.Volume)...)...)
	w.must(err)
	for i, n := range counts {
		if n > 0 {
			w.Errorf("form %d of a key is on the card", i)
		}
	}
}

func (w *world) allowedAgain() {
	w.keyServer("allow", "barn", "--reason", "found")
	_, err := w.a.SSH(w.Context(), "home/pusher/ssh_key", "wake")
	w.must(err)
	w.mounted()
}

func (w *world) cardCopied() {
	w.must(w.a.CutPower())
	original, clone := w.a.Card, w.a.Card+".clone"
	copyFile(w.T, original, clone)
	w.must(w.a.Boot(context.WithoutCancel(w.Context())))
	// The first lease shows the new token. Until then the old one counts too, because
	// a power cut may have taken the new one away.
	w.await("open with a lease", func(s pushwire.Status) bool {
		return s.Disk.Mounted && s.Disk.LeaseUntil.Sub(s.Time) < 5*time.Minute
	})
	w.must(w.a.CutPower())
	w.a.Card = clone
	w.must(w.a.Boot(context.WithoutCancel(w.Context())))
	st := w.await("refused", func(s pushwire.Status) bool { return s.Disk.Error != "" })
	if st.Disk.Unlocked || !strings.Contains(st.Disk.Error, "refused") {
		w.Errorf("%+v", st.Disk)
	}
	if out := w.keyServer("waiting"); !strings.Contains(out, "token") || !strings.Contains(out, "barn") {
		w.Errorf("waiting says %q", out)
	}
	w.mail("disk key REFUSED")
	w.must(w.a.CutPower())
	w.a.Card = original
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
}
