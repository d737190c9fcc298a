package orders_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/policy"

	"golang.org/x/sys/unix"
)

var now = moment.Moment{Wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Boot: strings.Repeat("0b", 16), Up: time.Hour}

func newBook(t *testing.T, dir string) *orders.Book {
	t.Helper()
	log, err := audit.Open(dir, func() time.Time { return now.Wall })
	if err != nil {
		t.Fatal(err)
	}
	return &orders.Book{Dir: dir, Policy: policy.Open(dir), Audit: log, Now: func() (moment.Moment, error) { return now, nil }}
}

func order(why string) orders.Order { return orders.Order{Appliance: "attic", By: "ada", Why: why} }

func state(t *testing.T, b *orders.Book) policy.State {
	t.Helper()
	s, err := b.Policy.Read("attic")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// events are the audit log's, oldest first.
func events(t *testing.T, dir string) (all []string) {
	t.Helper()
	if err := audit.Read(dir, func(_ []byte, r audit.Record) error {
		all = append(all, r.Event+" "+r.Appliance+" "+r.By+": "+r.Reason)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestOrders(t *testing.T) {
	b := newBook(t, t.TempDir())
	if again, err := b.Adopt("attic", ""); err != nil || again || state(t, b).Standing.State != policy.Enabled {
		t.Fatalf("a new appliance: %v, %+v", err, state(t, b).Standing)
	}
	for n := range 2 {
		if known, err := b.Revoke(order("stolen")); err != nil || known != (n == 1) {
			t.Fatalf("revoke, time %d: %v, %v", n, known, err)
		}
	}
	if s := state(t, b).Standing; s.State != policy.Revoked || s.Reason != "stolen" || s.By != "ada" {
		t.Errorf("%+v", s)
	}
	if err := b.Expect(order("new flat"), now.Wall.Add(time.Hour)); err == nil {
		t.Error("a revoked appliance may move")
	}
	if err := b.Allow(order("found")); err != nil || state(t, b).Standing.State != policy.Enabled {
		t.Error(err)
	}
	if err := b.Expect(order("new flat"), now.Wall.Add(time.Hour)); err != nil || state(t, b).Expected == nil {
		t.Error(err)
	}
	for _, err := range []error{b.Approve(order("x"), ""), b.Deny(order("x"), "abc"), b.Allow(order(""))} {
		if err == nil {
			t.Error("carried out")
		}
	}
	o := order("stolen there")
	o.From = "cellar"
	if known, err := b.Revoke(o); err != nil || known {
		t.Error(known, err)
	}
	want := []string{"allow attic farkeep-keyserver: new in site.toml", "revoke attic ada: stolen", "allow attic ada: found",
		"expect attic ada: until 2026-03-01T13:00:00Z: new flat", "revoke attic ada at cellar: stolen there"}
	if got := events(t, b.Dir); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("on record:\n%s", strings.Join(got, "\n"))
	}
	last, err := orders.LastOrders(b.Dir)
	if err != nil || last["attic"] != orders.EventRevoke {
		t.Errorf("%v, %v", last, err)
	}
}

// A revocation outlives its file, and an old copy of it.
func TestAdoptRevokesAgain(t *testing.T) {
	b := newBook(t, t.TempDir())
	if _, err := b.Adopt("attic", ""); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.Dir, "appliances", "attic.json")
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Revoke(order("stolen")); err != nil {
		t.Fatal(err)
	}
	for name, harm := range map[string]func() error{
		"lost":     func() error { return os.Remove(path) },
		"old copy": func() error { return os.WriteFile(path, old, 0o600) },
	} {
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		last, err := orders.LastOrders(b.Dir)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := b.Adopt("attic", last["attic"]); err != nil || !again || state(t, b).Standing.State != policy.Revoked {
			t.Errorf("%s: %v, %v, %+v", name, again, err, state(t, b).Standing)
		}
	}
}

// A state that cannot be read gives no key, and a revocation of it is not lost.
func TestRevokeWithADamagedState(t *testing.T) {
	b := newBook(t, t.TempDir())
	if _, err := b.Adopt("attic", ""); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.Dir, "appliances", "attic.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Revoke(order("stolen")); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
	last, err := orders.LastOrders(b.Dir)
	if err != nil || last["attic"] != orders.EventRevoke {
		t.Errorf("%v, %v", last, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if again, err := b.Adopt("attic", last["attic"]); err != nil || !again || state(t, b).Standing.State != policy.Revoked {
		t.Errorf("%v, %v", again, err)
	}
}

// On a full disk a revocation counts and says that it is not on record; what opens
// does not happen.
func TestOrdersOnAFullDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount a small tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	b := newBook(t, dir)
	if _, err := b.Adopt("attic", ""); err != nil {
		t.Fatal(err)
	}
	// The log cannot grow, and the small state can still be written: the worse of two cases.
	log, err := os.OpenFile(filepath.Join(dir, "audit.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	room := filepath.Join(dir, "room")
	if err := os.WriteFile(room, make([]byte, 8<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	filler, err := os.Create(filepath.Join(dir, "filler"))
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	filler.Close()
	info, err := log.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(log.Name(), info.Size()); err != nil {
		t.Fatal(err)
	}
	log.Close()
	// Fill the log's last page as well.
	for range 40 {
		if _, err := b.Audit.Append(audit.Record{Event: "checkin", Decision: "granted"}); err != nil {
			break
		}
	}
	if err := b.Allow(order("found")); err == nil {
		t.Error("allowed without a record")
	}
	if err := os.Remove(room); err != nil {
		t.Fatal(err)
	}
	fill := func() {
		f, err := os.OpenFile(room, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err == nil {
			_, err = f.Write(make([]byte, 4096))
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	fill() // one page is left: for the state, and then for nothing
	known, err := b.Revoke(order("stolen"))
	var unrecorded *orders.Unrecorded
	if err != nil && !errors.As(err, &unrecorded) {
		t.Fatalf("revoke: %v, %v", known, err)
	}
	if state(t, b).Standing.State != policy.Revoked {
		t.Error("not revoked")
	}
	if err := errors.Join(os.Remove(room), os.Remove(filler.Name())); err != nil {
		t.Fatal(err)
	}
	// Given again with room, it is on record, once.
	if known, err := b.Revoke(order("stolen")); err != nil || !known {
		t.Errorf("revoke again: %v, %v", known, err)
	}
	n := 0
	for _, e := range events(t, dir) {
		if strings.HasPrefix(e, "revoke attic") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d revocations on record", n)
	}
}

func TestVoidKeys(t *testing.T) {
	b := newBook(t, t.TempDir())
	void := func(fingerprint string) bool {
		t.Helper()
		v, err := orders.IsVoid(b.Dir, "attic", fingerprint)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if void("SHA256:a") {
		t.Error("void from the start")
	}
	for n := range 2 {
		if known, err := b.VoidKey(order("stolen"), "SHA256:a"); err != nil || known != (n == 1) {
			t.Errorf("void, time %d: %v, %v", n, known, err)
		}
	}
	if !void("SHA256:a") || void("SHA256:b") {
		t.Error("the wrong key is void")
	}
	for n := range 2 {
		if was, err := b.UnvoidKey(order("found"), "SHA256:a"); err != nil || was != (n == 0) {
			t.Errorf("unvoid, time %d: %v, %v", n, was, err)
		}
	}
	if void("SHA256:a") {
		t.Error("void for ever")
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "void", "attic.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := orders.IsVoid(b.Dir, "attic", "SHA256:a"); err == nil {
		t.Error("what cannot be read is no error")
	}
	if _, err := orders.IsVoid(b.Dir, "../attic", "SHA256:a"); err == nil {
		t.Error("a name leaves the folder")
	}
}
