// Package layers holds the architecture: who may import whom, and why. It has
// no code but its tests.
package layers

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// A rule forbids packages below from to depend on packages below to, directly or not.
type rule struct{ from, to, reason string }

var rules = []rule{
	{"farkeep/appliance", "farkeep/pusher", "the firmware carries no code of the home it must outlive"},
	{"farkeep/appliance", "farkeep/keyserver", "what a thief finds on a card must not include the code that judges him"},
	{"farkeep/appliance", "farkeep/image", "the appliance never builds images, and its users' secrets are not its business"},
	{"farkeep/pusher", "farkeep/appliance", "the pusher knows the protocol, not the other side's insides"},
	{"farkeep/pusher", "farkeep/keyserver", "whoever takes the pusher must not find the key server in it"},
	{"farkeep/pusher", "farkeep/image", "the operator's tools and the admin key stay off the Borg server"},
	{"farkeep/keyserver", "farkeep/appliance", "the key server parses three verbs and nothing else"},
	{"farkeep/keyserver", "farkeep/pusher", "the key server never sees backups"},
	{"farkeep/keyserver", "farkeep/image", "the operator's tools and the admin key stay off the key server"},
	{"farkeep/image", "farkeep/appliance", "the image takes the appliance as a finished binary, as a user does"},
	{"farkeep/image", "farkeep/pusher", "programs meet through protocols and files alone"},
	{"farkeep/image", "farkeep/keyserver", "programs meet through protocols and files alone"},
	{"farkeep/shared", "farkeep/appliance", "what is shared stands below the programs"},
	{"farkeep/shared", "farkeep/pusher", "what is shared stands below the programs"},
	{"farkeep/shared", "farkeep/keyserver", "what is shared stands below the programs"},
	{"farkeep/shared", "farkeep/image", "what is shared stands below the programs"},

	{"farkeep/appliance/receiver", "os/exec", "nothing that a peer sends reaches a program"},
	{"farkeep/appliance/receiver", "farkeep/shared/generations", "the part that speaks to the network cannot write generations"},
	{"farkeep/appliance/receiver", "github.com/anatol/luks.go", "the part that speaks to the network never sees a LUKS key"},
	{"farkeep/appliance/keeper", "os/exec", "nothing that a pusher sends reaches a program"},
	// Not golang.org/x/crypto/ssh itself: package sftp, which parses what stock clients
	// ask for, brings it along for its own client. The keeper has an empty network
	// namespace besides.
	{"farkeep/appliance/keeper", "farkeep/shared/sshverb", "the part that writes generations does not speak to the network"},
	{"farkeep/appliance/deadman", "net/smtp", "the part that judges does not speak to the network"},
	{"farkeep/appliance/deadman", "github.com/emersion/go-smtp", "the part that judges does not speak to the network"},
	{"farkeep/appliance/mail", "farkeep/shared/sshverb", "the part that mails has no way into the VPN's services"},
	{"farkeep/keyserver", "os/exec", "nothing that an appliance sends reaches a program"},
	{"farkeep/keyserver/alert", "farkeep/keyserver/keystore", "what mails never sees a key"},
	{"farkeep/keyserver/metrics", "farkeep/keyserver/keystore", "what anybody in the VPN may ask never sees a key"},
	{"farkeep/pusher/push", "os/exec", "a push needs no other program, so that none can be put in its place"},
	{"farkeep/pusher/freeze", "os/exec", "a push needs no other program, so that none can be put in its place"},
	{"farkeep/pusher/repository", "os/exec", "a push needs no other program, so that none can be put in its place"},
	{"farkeep/pusher/appliance", "os/exec", "what speaks to appliances starts nothing"},
	{"farkeep/pusher/restore", "os/exec", "a restore needs no other program: not even one that mounts"},
}

type pkg struct {
	ImportPath string
	Deps       []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Deps", "farkeep/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal("go list: ", err)
	}
	var all []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func below(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func TestImports(t *testing.T) {
	all := packages(t)
	for _, r := range rules {
		matched := false
		for _, p := range all {
			// Test twins (borgtest, targettest) are in no program; they may run the real tools.
			if !below(p.ImportPath, r.from) || strings.HasSuffix(p.ImportPath, "test") {
				continue
			}
			matched = true
			for _, dep := range p.Deps {
				if below(dep, r.to) {
					t.Errorf("%s depends on %s: %s", p.ImportPath, dep, r.reason)
				}
			}
		}
		if !matched {
			t.Errorf("the rule %s -> %s matches no package: it protects nothing", r.from, r.to)
		}
	}
}

// What only one program uses belongs to that program.
func TestSharedIsShared(t *testing.T) {
	users := map[string][]string{}
	for _, p := range packages(t) {
		program, _, _ := strings.Cut(strings.TrimPrefix(p.ImportPath, "farkeep/"), "/")
		for _, dep := range append(p.Deps, p.ImportPath) {
			if below(dep, "farkeep/shared") && !slices.Contains(users[dep], program) {
				users[dep] = append(users[dep], program)
			}
		}
	}
	if len(users) == 0 {
		t.Fatal("no shared package was found")
	}
	for name, programs := range users {
		if name == "farkeep/shared/layers" || strings.HasSuffix(name, "test") {
			continue // test twins are in no program
		}
		programs = slices.DeleteFunc(programs, func(p string) bool { return p == "shared" })
		if len(programs) < 2 {
			t.Errorf("%s is used by %v alone: move it there", name, programs)
		}
	}
}

func TestFourPrograms(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{if eq .Name "main"}}{{.ImportPath}}{{end}}`, "farkeep/...").Output()
	if err != nil {
		t.Fatal("go list: ", err)
	}
	var mains []string
	for _, path := range strings.Fields(string(out)) {
		if strings.Count(path, "/") == 1 {
			mains = append(mains, strings.TrimPrefix(path, "farkeep/"))
		}
	}
	if want := []string{"appliance", "image", "keyserver", "pusher"}; !slices.Equal(mains, want) {
		t.Errorf("programs at the top level are %v; want %v", mains, want)
	}
}
