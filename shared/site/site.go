// Package site is site.toml, the description of one home and its appliances.
//
// It holds names, addresses, public keys and policies, and no secret: it may be
// copied, printed and kept in version control. farkeep-image makes and extends
// it ([Document], which leaves a person's own lines and comments alone),
// farkeep-pusher and farkeep-keyserver read it ([Read]).
package site

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"
)

// Site is the content of site.toml, validated.
type Site struct {
	Name         string       `toml:"name"`
	VPN          VPN          `toml:"vpn"`
	Home         Home         `toml:"home"`
	Pushers      []Pusher     `toml:"pusher"`
	Operator     Operator     `toml:"operator"`
	KeyServers   []KeyServer  `toml:"key_server"`
	Appliances   []Appliance  `toml:"appliance"`
	Repositories []Repository `toml:"repository"`
	Folders      []Folder     `toml:"repository_folder"`
	Directories  []Directory  `toml:"directory_target"`
	Push         Push         `toml:"push"`
	Mail         Mail         `toml:"mail"`
	History      History      `toml:"history"`
	DeadMan      DeadMan      `toml:"dead_man"`
	Clock        Clock        `toml:"clock"`
	Bundle       Bundle       `toml:"bundle"`
}

// VPN is the WireGuard network between home and its appliances.
type VPN struct {
	Network    netip.Prefix `toml:"network"`     // for instance 10.77.0.0/24
	ListenPort int          `toml:"listen_port"` // home's UDP port; default 51820
	Endpoints  []string     `toml:"endpoints"`   // home, as seen from outside and from its own LAN; host:port
}

// Home is the Borg server.
type Home struct {
	Name       string     `toml:"name"` // the host name that heartbeats carry
	VPNAddress netip.Addr `toml:"vpn_address"`
	VPNKey     string     `toml:"vpn_key"`  // WireGuard public key
	PushKey    string     `toml:"push_key"` // the pusher's SSH public key
}

// Pusher is a further Borg server of the same home, with a farkeep-pusher of its
// own. It pushes what carries its name as host and no other: repositories named
// "NAME-...", which is all that the appliances take from its key.
type Pusher struct {
	Name       string     `toml:"name"` // the host name that its heartbeats carry
	VPNAddress netip.Addr `toml:"vpn_address"`
	VPNKey     string     `toml:"vpn_key"`  // WireGuard public key; home is its peer
	PushKey    string     `toml:"push_key"` // its SSH public key
}

// Repositories is the pattern of the repositories that the pusher may push.
func (p Pusher) Repositories() string { return p.prefix() + "*" }

func (p Pusher) prefix() string { return p.Name + "-" }

// Operator is the person. The private halves never lie at home.
type Operator struct {
	AdminKey   string `toml:"admin_key"`   // SSH public key; "" for none
	RestoreKey string `toml:"restore_key"` // SSH public key that may read generations; "" for none
}

// KeyServer is one key server of the site.
type KeyServer struct {
	Name    string `toml:"name"`
	Address string `toml:"address"`  // host:port, as the appliances reach it
	HostKey string `toml:"host_key"` // public, authorized_keys form
	// Place is PlaceOthers for one that is not where the VPN ends and asks the site's
	// other key servers where an appliance is; PlaceNone for one that judges no places;
	// "": it sees them itself.
	Place string `toml:"place"`
}

// Appliance is one Pi elsewhere.
type Appliance struct {
	Name       string     `toml:"name"`
	Board      string     `toml:"board"` // "pi3", "pi4", "zero2w", "virt", or "service"
	VPNAddress netip.Addr `toml:"vpn_address"`
	VPNKey     string     `toml:"vpn_key"`
	Address    string     `toml:"address"`    // host:port of its receiver; default the VPN address, port 22
	HostKey    string     `toml:"host_key"`   // public
	ClientKey  string     `toml:"client_key"` // public; what key servers authorise
	LUKS       string     `toml:"luks_uuid"`  // "" until its disk is prepared
	// LUKSHeader is the fingerprint (luksheader) of the header in the backups, 64
	// hexadecimal digits; "" while there is none. A live header that differs is an alarm.
	LUKSHeader string          `toml:"luks_header"`
	Relay      settings.Relay  `toml:"relay"`
	Window     settings.Window `toml:"window"`
	KeyPolicy  KeyPolicy       `toml:"key_policy"`
}

// Repository is one named directory tree to mirror.
type Repository struct {
	Name string `toml:"name"`
	Path string `toml:"path"`
	// Mount is the mount point that must be mounted for Path to be trusted; ""
	// accepts whatever file system Path was on when it was first pushed.
	Mount string `toml:"mount"`
	Host  string `toml:"host"` // the machine it is on: "" for home, or a pusher's name
}

// Folder is a folder in which every Borg repository is mirrored under its own name.
type Folder struct {
	Path    string   `toml:"path"`
	Prefix  string   `toml:"prefix"`  // put before each repository's name
	Exclude []string `toml:"exclude"` // names directly inside Path that are neither mirrored nor reported
	Mount   string   `toml:"mount"`
	Host    string   `toml:"host"` // as for a repository
}

// Directory is a target that is a local folder: a NAS mount, or a disk that is
// filled at home before it travels.
type Directory struct {
	Name string `toml:"name"`
	Path string `toml:"path"`
	Host string `toml:"host"` // as for a repository
}

// Push tunes the pusher.
type Push struct {
	LockWait  settings.Duration `toml:"lock_wait"`  // how long to wait for Borg's lock; default 1h
	RateLimit int64             `toml:"rate_limit"` // bytes per second and appliance; 0: none
	Rates     []Rate            `toml:"rate"`       // at some hours another one; the first that fits counts
	WakeWait  settings.Duration `toml:"wake_wait"`  // how long a disk may take to open; default 10m
	// RereadEvery is how often every file is read again although it did not
	// change; 0, the default: never.
	RereadEvery settings.Duration `toml:"reread_every"`
}

// Rate is the limit of some hours of each day.
type Rate struct {
	Hours     Hours `toml:"hours"`      // UTC, "07:00-23:00"
	RateLimit int64 `toml:"rate_limit"` // bytes per second and appliance; 0: none
}

// RateAt is the limit that holds at t, in bytes per second; 0: none.
func (p Push) RateAt(t time.Time) int64 {
	for _, r := range p.Rates {
		if r.Hours.Contain(t) {
			return r.RateLimit
		}
	}
	return p.RateLimit
}

// Mail is how appliances send mail; the password is in the secrets folders.
type Mail struct {
	Server string   `toml:"server"`
	TLS    string   `toml:"tls"`
	User   string   `toml:"user"`
	From   string   `toml:"from"`
	To     []string `toml:"to"`
	RootCA string   `toml:"root_ca"`
}

// History says which generations the appliances keep; what is not named keeps its default.
type History = settings.History

// DeadMan sets the appliances' alarm thresholds; what is not named keeps its default.
type DeadMan = settings.DeadMan

// Clock names the time sources of the appliances.
type Clock = settings.Clock

// Read reads and validates the file at path.
func Read(path string) (*Site, error) {
	text, err := tomlfile.ReadText(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, text)
}

// Parse validates a site.toml; name stands for it in errors, which are of type
// *tomlfile.Error.
func Parse(name string, text []byte) (*Site, error) {
	// Before the file is read, so that an explicit 0 stays 0.
	s := &Site{History: settings.DefaultHistory(), DeadMan: settings.DefaultDeadMan()}
	if err := tomlfile.Parse(name, text, s); err != nil {
		return nil, err
	}
	s.SetDefaults()
	v := validator{tomlfile.NewChecker(name, text)}
	s.validate(v)
	if err := v.Err(); err != nil {
		return nil, err
	}
	return s, nil
}

// Appliance finds an appliance by its name.
func (s *Site) Appliance(name string) (*Appliance, bool) {
	for i := range s.Appliances {
		if s.Appliances[i].Name == name {
			return &s.Appliances[i], true
		}
	}
	return nil, false
}

// SeenBy is the site as one of its key servers can judge it. It shares everything
// else with s.
func (s *Site) SeenBy(k KeyServer) *Site {
	if k.Place != PlaceNone {
		return s
	}
	own := *s
	own.Appliances = slices.Clone(s.Appliances)
	for i := range own.Appliances {
		own.Appliances[i].KeyPolicy.Place = PlaceNone
	}
	return &own
}

// Owner is the host that a repository of this name belongs to: the pusher whose
// name and a dash it begins with, or else "", home.
func (s *Site) Owner(repository string) string {
	for _, p := range s.Pushers {
		if strings.HasPrefix(repository, p.prefix()) {
			return p.Name
		}
	}
	return ""
}

// Of is the site with the sources and directory targets of one host only: "" for
// home, or a pusher's name. It shares everything else with s.
func (s *Site) Of(host string) *Site {
	own := *s
	own.Repositories = only(s.Repositories, func(r Repository) bool { return r.Host == host })
	own.Folders = only(s.Folders, func(f Folder) bool { return f.Host == host })
	own.Directories = only(s.Directories, func(d Directory) bool { return d.Host == host })
	return &own
}

func only[T any](all []T, wanted func(T) bool) (some []T) {
	for _, one := range all {
		if wanted(one) {
			some = append(some, one)
		}
	}
	return some
}

// SetDefaults fills in what a file may leave out, in a Site that was not read
// from one.
func (s *Site) SetDefaults() {
	setDefault(&s.VPN.ListenPort, 51820)
	setDefault(&s.Push.LockWait, settings.Duration(time.Hour))
	setDefault(&s.Push.WakeWait, settings.Duration(10*time.Minute))
	for i := range s.Appliances {
		s.Appliances[i].SetDefaults()
	}
	if s.Mail.TLS == "" && s.Mail.Server != "" {
		s.Mail.TLS = "starttls"
		if strings.HasSuffix(s.Mail.Server, ":465") {
			s.Mail.TLS = "implicit"
		}
	}
}

// SetDefaults fills in what a file may leave out.
func (a *Appliance) SetDefaults() {
	setDefault(&a.Relay.Driver, "none")
	setDefault(&a.Relay.Active, "high")
	a.KeyPolicy.setDefaults()
	if a.Address == "" && a.VPNAddress.IsValid() {
		a.Address = netip.AddrPortFrom(a.VPNAddress, 22).String()
	}
}

func setDefault[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}
