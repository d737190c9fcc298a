package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/history"
	"farkeep/shared/pushwire"
	"farkeep/shared/settings"
	"farkeep/shared/span"
	"farkeep/shared/sshverb"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// The tests below ask the appliance's own confined parts over SSH: who may decide
// about history, what stops it from going, and whether it goes on after a kill.

// historyBench is an appliance with an admin key.
type historyBench struct {
	*benchAppliance
	keys map[string]ssh.Signer
}

// keepTwo lets go of everything but two generations, at once.
func keepTwo() settings.History {
	return settings.History{FloorOnly: true, FloorGenerations: 2, ExpirePerDay: 1000, RetireAfter: span.Duration(time.Hour), WhenFull: history.Refuse, VanishPercent: 20, ChangePercent: 50}
}

func startHistory(t *testing.T, kept settings.History) *historyBench {
	t.Helper()
	dir := benchDir(t)
	private, admin := newIdentity(t, "boss")
	a := &historyBench{keys: map[string]ssh.Signer{}}
	a.benchAppliance = startApplianceWith(t, dir, program(t), "128m", kept, settings.ReceiverKey{Name: "boss", Role: "admin", PublicKey: admin})
	signer, err := ssh.ParsePrivateKey([]byte(private.Reveal()))
	must(t, err)
	a.keys["boss"], a.keys["home"] = signer, a.identity(t)
	text, err := os.ReadFile(a.restore)
	must(t, err)
	a.keys["restore"], err = ssh.ParsePrivateKey(text)
	must(t, err)
	return a
}

func (a *historyBench) ask(t *testing.T, key, verb string) (string, error) {
	t.Helper()
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: a.address(), User: "farkeep", Identity: a.keys[key], HostKey: a.pinned(t)})
	must(t, err)
	defer c.Close()
	out, err := c.Run(t.Context(), verb, nil, 1<<20)
	return string(out), err
}

func (a *historyBench) mustAsk(t *testing.T, key, verb string) string {
	t.Helper()
	out, err := a.ask(t, key, verb)
	if err != nil {
		t.Fatalf("%s: %s: %v, hint %q", key, verb, err, hint.Of(err))
	}
	return out
}

func (a *historyBench) keeper(t *testing.T) *status.Keeper {
	t.Helper()
	k, err := status.Read[status.Keeper](a.paths.Status(part.Keeper))
	must(t, err)
	if k == nil {
		k = &status.Keeper{}
	}
	return k
}

func (a *historyBench) folders(t *testing.T, repository string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(a.paths.Disk(), "generations", repository))
	must(t, err)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names
}

// restart starts the keeper anew, with other settings and after a look at its disk.
func (a *historyBench) restart(t *testing.T, change func()) {
	t.Helper()
	a.kill(t, part.Keeper)
	must(t, os.Remove(a.paths.Status(part.Keeper)))
	change()
	a.startPart(t, a.bin, part.Keeper, a.header, a.settings)
	await(t, "the keeper has the disk", func() bool { return a.keeper(t).DiskReady })
}

// album is many small files, of which change differ from seed to seed.
func album(seed uint64, files, change int) source {
	s := source{}
	for i := range files {
		n := uint64(i)
		if i < change {
			n += 1000 * seed
		}
		s[fmt.Sprintf("photo-%03d", i)] = noise(n, 500)
	}
	return s
}

func TestWhoDecidesAboutHistory(t *testing.T) {
	a := startHistory(t, keepTwo())
	to := a.client(t, &line{})
	whole := album(1, 200, 1)
	first := whole.push(t, to, "photos")
	second := album(2, 200, 1).push(t, to, "photos")
	bad := source{"README": "pay"}.push(t, to, "photos")

	for _, verb := range []string{
		"accept photos " + bad, "reject photos " + bad, "retire photos", "keep photos", "accept-clock", "floor 1 0s",
		"reading", "remove photos", "expire photos", "delete photos " + first, "release", "attach",
	} {
		for _, key := range []string{"home", "restore"} {
			if _, err := a.ask(t, key, verb); hint.Code(err) != hint.ExitRefused {
				t.Errorf("%s may %s: %v", key, verb, err)
			}
		}
	}
	await(t, "it is suspect", func() bool {
		k := a.keeper(t)
		return len(k.Repositories) == 1 && len(k.Repositories[0].Suspects) == 1 && len(k.Frozen) == 1
	})
	if got := a.folders(t, "photos"); len(got) != 3 {
		t.Errorf("%v", got)
	}
	text := a.mustAsk(t, "home", "generations --text photos")
	if !regexp.MustCompile(`(?m)^photos +`+bad+` .* suspect +suspect`).MatchString(text) || !strings.Contains(text, "  suspect: ") {
		t.Errorf("%s", text)
	}
	text = a.mustAsk(t, "boss", "status")
	for _, want := range []string{"SUSPECT photos", bad, "nothing expires", "room"} {
		if !strings.Contains(text, want) {
			t.Errorf("status lacks %q:\n%s", want, text)
		}
	}

	if _, err := a.ask(t, "boss", "accept photos "+second); err == nil {
		t.Error("accepted what nobody suspected")
	}
	if _, err := a.ask(t, "boss", "accept photos ../../etc"); err == nil {
		t.Error("accepted what is none")
	}
	a.mustAsk(t, "boss", "reject photos "+bad+" ransom note")
	await(t, "expiry goes on", func() bool { k := a.keeper(t); return len(k.Frozen) == 0 && !k.Repositories[0].Suspect })
	for _, g := range a.generations(t, "photos") {
		if g.Name == bad && g.Standing != "rejected" {
			t.Errorf("%+v", g)
		}
	}
	a.mustAsk(t, "boss", "accept photos "+bad+" it was me after all")
	await(t, "two are left", func() bool { return slices.Equal(a.folders(t, "photos"), []string{second, bad}) })

	var r pushwire.Retiring
	must(t, json.Unmarshal([]byte(a.mustAsk(t, "boss", "retire photos")), &r))
	if r.Repository != "photos" || r.By != "boss" || r.Due.Sub(r.Asked) != time.Hour {
		t.Errorf("%+v", r)
	}
	if _, err := whole.offer(t, to, "photos"); err == nil || !strings.Contains(err.Error(), "being retired") {
		t.Errorf("a push to what is retiring: %v", err)
	}
	a.mustAsk(t, "boss", "keep photos")
	whole.push(t, to, "photos")
	var clock pushwire.ClockAnswer
	must(t, json.Unmarshal([]byte(a.mustAsk(t, "boss", "accept-clock")), &clock))
	if clock.Now.IsZero() || clock.Was.IsZero() {
		t.Errorf("%+v", clock)
	}
	a.mustAsk(t, "boss", "floor 3 1d")
	var kinds []string
	for _, e := range a.keeper(t).Events {
		if e.By != "boss" || e.ID == "" {
			t.Errorf("%+v", e)
		}
		kinds = append(kinds, e.Kind)
	}
	if want := []string{"rejected", "accepted", "retire", "kept", "clock-accepted", "floor"}; !slices.Equal(kinds, want) {
		t.Errorf("events %v, want %v", kinds, want)
	}
}

// The disk remembers the time and its floor; a card with a fresh state folder and
// no rules, and whatever its clock says, changes nothing.
func TestAnotherCardOverSSH(t *testing.T) {
	kept := keepTwo()
	kept.FloorGenerations = 4
	a := startHistory(t, kept)
	to := a.client(t, &line{})
	for i := range 6 {
		album(uint64(i), 20, 1).push(t, to, "photos")
	}
	await(t, "four are left", func() bool { return len(a.folders(t, "photos")) == 4 })
	record := filepath.Join(a.paths.Disk(), ".farkeep/clock.toml")
	latest := regexp.MustCompile(`(?m)^latest = .*$`)
	for name, seen := range map[string]time.Time{ // what the disk has seen: the same as a clock that is thrown the other way
		"set back":         time.Now().Add(10 * time.Minute),
		"forward 49 h":     time.Now().Add(-49 * time.Hour),
		"forward 30 years": time.Now().AddDate(-30, 0, 0),
	} {
		a.restart(t, func() {
			text, err := os.ReadFile(record)
			must(t, err)
			text = latest.ReplaceAll(text, []byte("latest = "+seen.UTC().Format(time.RFC3339)))
			text = regexp.MustCompile(`(?m)^boot = .*$`).ReplaceAll(text, []byte(`boot = "another"`))
			text = regexp.MustCompile(`(?m)^uptime_seconds = .*$`).ReplaceAll(text, []byte(`uptime_seconds = 0`))
			// The machine's own count explains what it has been running.
			if name == "forward 49 h" {
				up, err := os.ReadFile("/proc/uptime")
				must(t, err)
				var seconds float64
				_, err = fmt.Sscan(string(up), &seconds)
				must(t, err)
				text = latest.ReplaceAll(text, []byte("latest = "+seen.Add(-time.Duration(seconds)*time.Second).UTC().Format(time.RFC3339)))
			}
			must(t, os.WriteFile(record, text, 0o600))
			must(t, os.RemoveAll(a.paths.StateDir(part.Keeper)))
			must(t, (&system{header: a.header}).makeFolders())
			a.settings.History = settings.History{FloorOnly: true, FloorGenerations: 1, ExpirePerDay: 1000, RetireAfter: span.Duration(time.Second), WhenFull: history.Thin}
		})
		await(t, name+": frozen", func() bool { k := a.keeper(t); return k.ClockDoubt != "" && len(k.Frozen) == 1 && k.Room != nil })
		if got := a.folders(t, "photos"); len(got) != 4 {
			t.Fatalf("%s: %v", name, got)
		}
		if _, err := a.ask(t, "boss", "retire photos"); err == nil {
			t.Errorf("%s: a delay began by a clock that is in doubt", name)
		}
	}
	a.mustAsk(t, "boss", "accept-clock")
	await(t, "not frozen", func() bool { k := a.keeper(t); return len(k.Frozen) == 0 && k.ClockDoubt == "" })
	if got := a.folders(t, "photos"); len(got) != 4 {
		t.Fatalf("the floor was forgotten with the card: %v", got)
	}
	a.mustAsk(t, "boss", "floor 1 0s")
	await(t, "the card's floor", func() bool { return len(a.folders(t, "photos")) == 1 })
}

// While somebody restores, nothing goes; when the session ends, it does.
func TestRestoreHoldsHistory(t *testing.T) {
	kept := keepTwo()
	kept.ExpirePerDay = 0
	a := startHistory(t, kept)
	to := a.client(t, &line{})
	for i := range 5 {
		album(uint64(i), 20, 1).push(t, to, "photos")
	}
	a.restart(t, func() { a.settings.History.FloorGenerations = 5 })
	conn, err := ssh.Dial("tcp", a.address(), &ssh.ClientConfig{User: "farkeep", Auth: []ssh.AuthMethod{ssh.PublicKeys(a.keys["restore"])}, HostKeyCallback: ssh.FixedHostKey(a.pinned(t))})
	must(t, err)
	defer conn.Close()
	reader, err := sftp.NewClient(conn)
	must(t, err)
	defer reader.Close()
	// A reader of before the keeper's crash is told so, by its session's end.
	a.restart(t, func() {
		a.settings.History = keepTwo()
		must(t, os.Remove(filepath.Join(a.paths.Disk(), ".farkeep/floor.toml")))
	})
	if err := reader.Wait(); err == nil {
		t.Log("the session ended in order")
	}
	await(t, "two are left", func() bool { return len(a.folders(t, "photos")) == 2 })

	reader, err = sftp.NewClient(must1(ssh.Dial("tcp", a.address(), &ssh.ClientConfig{User: "farkeep", Auth: []ssh.AuthMethod{ssh.PublicKeys(a.keys["restore"])}, HostKeyCallback: ssh.FixedHostKey(a.pinned(t))}))(t))
	must(t, err)
	defer reader.Close()
	last := album(9, 20, 1).push(t, to, "photos")
	await(t, "frozen by the reader", func() bool {
		k := a.keeper(t)
		return len(k.Frozen) == 1 && strings.Contains(k.Frozen[0], "key restore") && k.Repositories[0].Newest == last
	})
	if got := a.folders(t, "photos"); len(got) != 3 {
		t.Errorf("%v", got)
	}
	must(t, reader.Close())
	await(t, "it went when the reader did", func() bool { return len(a.folders(t, "photos")) == 2 && len(a.keeper(t).Frozen) == 0 })
}

func must1[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		must(t, err)
		return v
	}
}

// A keeper that is killed at any instant while generations go comes back, finishes,
// and what stays is whole.
func TestKilledWhileGenerationsGo(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	kept := keepTwo()
	kept.ExpirePerDay = 0
	a := startHistory(t, kept)
	to := a.client(t, &line{})
	for i := range 15 {
		album(uint64(i), 200, 10).push(t, to, "photos")
	}
	want := a.folders(t, "photos")[13:]
	kills := 0
	for kept := keepTwo(); len(a.folders(t, "photos")) > 2 && kills < 100; kills++ {
		a.restart(t, func() { a.settings.History = kept })
		time.Sleep(time.Duration(random.IntN(20_000)) * time.Microsecond)
	}
	a.restart(t, func() {})
	going := filepath.Join(a.paths.Disk(), ".farkeep/going")
	await(t, "everything went", func() bool {
		left, err := os.ReadDir(going)
		return err == nil && len(left) == 0 && slices.Equal(a.folders(t, "photos"), want) && a.keeper(t).Repositories[0].Generations == 2
	})
	t.Logf("%d kills", kills)
	for i, name := range want {
		if v := a.verify(t, "photos", name); len(v.Bad) > 0 || v.Files != 200 {
			t.Errorf("%s: %+v", name, v)
		}
		album(uint64(13+i), 200, 10).lies(t, a.benchAppliance, "photos", name)
	}
}
