package site_test

import (
	"net/netip"
	"strings"
	"testing"

	"farkeep/shared/identity"
	"farkeep/shared/site"

	"github.com/google/go-cmp/cmp"
)

// tower is a pusher with keys of its own.
func tower(t testing.TB) site.Pusher {
	t.Helper()
	p := site.Pusher{Name: "tower", VPNAddress: netip.MustParseAddr("10.77.0.3")}
	var err error
	if _, p.PushKey, err = identity.New("pusher of tower"); err != nil {
		t.Fatal(err)
	}
	if _, p.VPNKey, err = identity.NewWireGuard(); err != nil {
		t.Fatal(err)
	}
	return p
}

// withTower is the fixture with the pusher tower, which has one of everything.
func withTower(t testing.TB) *site.Document {
	t.Helper()
	d := parse(t, good(t))
	for _, err := range []error{
		d.AddPusher(tower(t)),
		// Another machine's path may be the same.
		d.AddRepository(site.Repository{Name: "tower-photos", Path: "/srv/borg/photos", Host: "tower"}),
		d.AddFolder(site.Folder{Path: "/srv/more", Prefix: "tower-", Host: "tower"}),
		d.AddDirectory(site.Directory{Name: "travel", Path: "/mnt/travel", Host: "tower"}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestPushersHaveTheirOwn(t *testing.T) {
	d := withTower(t)
	if !strings.HasPrefix(string(d.Text()), strings.TrimRight(good(t), "\n")) {
		t.Error("what was there before has changed")
	}
	again, err := site.NewDocument(d.Site())
	if err != nil {
		t.Fatal(err)
	}
	if diff := same(d.Site(), again.Site()); diff != "" {
		t.Errorf("-given +read:\n%s", diff)
	}
	s := d.Site()
	for host, want := range map[string][]string{"": {"photos", "/srv/more", "", "nas"}, "tower": {"tower-photos", "/srv/more", "tower-", "travel"}} {
		own := s.Of(host)
		if len(own.Repositories) != 1 || len(own.Folders) != 1 || len(own.Directories) != 1 {
			t.Fatalf("%q has %+v", host, own)
		}
		got := []string{own.Repositories[0].Name, own.Folders[0].Path, own.Folders[0].Prefix, own.Directories[0].Name}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q -want +got:\n%s", host, diff)
		}
	}
	for name, want := range map[string]string{"photos": "", "tower": "", "towers": "", "tower-": "tower", "tower-x": "tower"} {
		if got := s.Owner(name); got != want {
			t.Errorf("%s belongs to %q, want %q", name, got, want)
		}
	}
	if a, err := s.FreeAddress(); err != nil || a.String() != "10.77.0.4" {
		t.Errorf("the next free address: %v, %v", a, err)
	}
	if got := s.Pushers[0].Repositories(); got != "tower-*" {
		t.Errorf("tower may push %s", got)
	}
}

func TestPusherMistakes(t *testing.T) {
	base := parse(t, good(t)).Site()
	change := func(f func(*site.Pusher)) func(*site.Document) error {
		return func(d *site.Document) error {
			p := tower(t)
			p.Name, p.VPNAddress = "annex", netip.MustParseAddr("10.77.0.4")
			f(&p)
			return d.AddPusher(p)
		}
	}
	repository := func(r site.Repository) func(*site.Document) error {
		r.Path = "/srv/one"
		return func(d *site.Document) error { return d.AddRepository(r) }
	}
	folder := func(f site.Folder) func(*site.Document) error {
		f.Path = "/srv/one"
		return func(d *site.Document) error { return d.AddFolder(f) }
	}
	for name, tt := range map[string]struct {
		add  func(*site.Document) error
		want string
	}{
		"name":             {change(func(p *site.Pusher) { p.Name = "Annex" }), `pusher.name: "Annex" is not a name`},
		"name twice":       {change(func(p *site.Pusher) { p.Name = "tower" }), "pusher.name: another pusher has it already"},
		"home's name":      {change(func(p *site.Pusher) { p.Name = "borg" }), "pusher.name: home has it already"},
		"operator's name":  {change(func(p *site.Pusher) { p.Name = "operator" }), "pusher.name: the operator's key has it already"},
		"name in a name":   {change(func(p *site.Pusher) { p.Name = "tower-2" }), `pusher.name: "tower-2" would have the repositories of tower`},
		"push key":         {change(func(p *site.Pusher) { p.PushKey = "x" }), "pusher.push_key: this is not an SSH public key"},
		"home's push key":  {change(func(p *site.Pusher) { p.PushKey = base.Home.PushKey }), "pusher.push_key: home has it already"},
		"admin's key":      {change(func(p *site.Pusher) { p.PushKey = base.Operator.AdminKey }), "pusher.push_key: the operator has it already"},
		"VPN key":          {change(func(p *site.Pusher) { p.VPNKey = "" }), "pusher.vpn_key: this is not a WireGuard key"},
		"attic's VPN key":  {change(func(p *site.Pusher) { p.VPNKey = base.Appliances[0].VPNKey }), "pusher.vpn_key: attic has it already"},
		"no address":       {change(func(p *site.Pusher) { p.VPNAddress = netip.Addr{} }), "pusher.vpn_key"}, // the writer leaves both out
		"foreign address":  {change(func(p *site.Pusher) { p.VPNAddress = netip.MustParseAddr("10.1.0.4") }), "pusher.vpn_address: 10.1.0.4 is no address of"},
		"home's address":   {change(func(p *site.Pusher) { p.VPNAddress = base.Home.VPNAddress }), "pusher.vpn_address: home has it already"},
		"attic's address":  {change(func(p *site.Pusher) { p.VPNAddress = base.Appliances[0].VPNAddress }), "pusher.vpn_address: attic has it already"},
		"tower's address":  {change(func(p *site.Pusher) { p.VPNAddress = netip.MustParseAddr("10.77.0.3") }), "pusher.vpn_address: tower has it already"},
		"unknown host":     {repository(site.Repository{Name: "cellar-x", Host: "cellar"}), `repository.host: there is no pusher "cellar"`},
		"home by name":     {repository(site.Repository{Name: "x", Host: "borg"}), `leave host out for home`},
		"no prefix":        {repository(site.Repository{Name: "x", Host: "tower"}), `repository.name: "x" does not begin with "tower-"`},
		"tower's at home":  {repository(site.Repository{Name: "tower-x"}), `repository.name: what begins with "tower-" is for the pusher tower`},
		"folder's host":    {folder(site.Folder{Prefix: "cellar-", Host: "cellar"}), "repository_folder.host: there is no pusher"},
		"folder's prefix":  {folder(site.Folder{Host: "tower"}), `repository_folder.prefix: "" does not begin with "tower-"`},
		"folder's at home": {folder(site.Folder{Prefix: "tower-more-"}), "repository_folder.prefix: what begins with"},
		"directory's host": {func(d *site.Document) error {
			return d.AddDirectory(site.Directory{Name: "d", Path: "/d", Host: "cellar"})
		}, "directory_target.host: there is no pusher"},
		"name over two hosts": {repository(site.Repository{Name: "tower-photos", Host: "tower"}), "repository.name: another repository has it already"},
	} {
		t.Run(name, func(t *testing.T) {
			d := withTower(t)
			before := string(d.Text())
			if err := tt.add(d); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want it to contain %q", err, tt.want)
			}
			if string(d.Text()) != before {
				t.Error("the document has changed")
			}
		})
	}
}

func TestPusherWithoutAVPNOfOurs(t *testing.T) {
	p := tower(t)
	text := `name = "x"
[home]
name = "borg"
push_key = "` + parse(t, good(t)).Site().Home.PushKey + `"
[[key_server]]
name = "borg"
address = "192.0.2.1:4022"
host_key = "` + p.PushKey + `"
[[pusher]]
name = "tower"
push_key = "` + p.PushKey + `"
`
	parse(t, text)
	if _, err := site.Parse("site.toml", []byte(text+`vpn_address = "10.77.0.3"`)); err == nil || !strings.Contains(err.Error(), "pusher.vpn_address: there is no [vpn] for it") {
		t.Errorf("an address in no VPN: %v", err)
	}
}
