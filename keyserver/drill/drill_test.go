package drill

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"farkeep/shared/identity"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"
)

const luks = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"

// vault is what an appliance shows to a restore key.
type vault struct {
	files       map[string][]byte // by sftp path
	generations []pushwire.Generation
	header      string
	woken       bool
}

func (v *vault) Fileread(r *sftp.Request) (io.ReaderAt, error) {
	b, ok := v.files[r.Filepath]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return bytes.NewReader(b), nil
}
func (v *vault) Filewrite(*sftp.Request) (io.WriterAt, error) { return nil, fs.ErrPermission }
func (v *vault) Filecmd(*sftp.Request) error                  { return fs.ErrPermission }
func (v *vault) Filelist(*sftp.Request) (sftp.ListerAt, error) {
	return nil, fs.ErrPermission
}

func (v *vault) exec(_ context.Context, s *sshverb.Session) error {
	switch s.Verb {
	case "wake":
		v.woken = true
		_, err := io.WriteString(s.Stdout, "{}\n")
		return err
	case "status":
		return json.NewEncoder(s.Stdout).Encode(pushwire.Status{Disk: pushwire.DiskState{HeaderDigest: v.header}})
	case "generations":
		for _, g := range v.generations {
			if err := json.NewEncoder(s.Stdout).Encode(g); err != nil {
				return err
			}
		}
		return nil
	}
	return sshverb.Refuse(nil, "no such verb")
}

// add makes a generation of files, by path.
func (v *vault) add(t *testing.T, repository, name string, suspect bool, files map[string]string) string {
	t.Helper()
	var list bytes.Buffer
	w := manifest.NewWriter(&list)
	for _, path := range sorted(files) {
		h := manifest.NewHash()
		io.WriteString(h, files[path])
		if err := w.Add(manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o600, Size: int64(len(files[path])), Sum: manifest.SumOf(h)}); err != nil {
			t.Fatal(err)
		}
		v.files["/"+repository+"/"+name+"/files/"+path] = []byte(files[path])
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	v.files["/"+repository+"/"+name+"/MANIFEST"] = list.Bytes()
	v.generations = append(v.generations, pushwire.Generation{Repository: repository, Name: name, Suspect: suspect, Entries: sum.Entries, Bytes: sum.Bytes, Digest: sum.Digest.String()})
	return "/" + repository + "/" + name
}

func sorted(files map[string]string) (paths []string) {
	for p := range files {
		i := 0
		for i < len(paths) && manifest.ComparePaths(paths[i], p) < 0 {
			i++
		}
		paths = append(paths[:i], append([]string{p}, paths[i:]...)...)
	}
	return paths
}

func signer(t *testing.T) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// drilled runs the part of the drill that one appliance sees.
func drilled(t *testing.T, v *vault, sample int64) (*Report, map[string]string, []Step, error) {
	t.Helper()
	host, client := signer(t), signer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &sshverb.Server{
		HostKey: host, Exec: v.exec, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Subsystems: map[string]sshverb.Handler{"sftp": func(_ context.Context, s *sshverb.Session) error {
			if err := sftp.NewRequestServer(s.ReadWriteCloser(), sftp.Handlers{FileGet: v, FilePut: v, FileCmd: v, FileList: v}).Serve(); err != nil && err != io.EOF {
				return err
			}
			return nil
		}},
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { server.Serve(ctx, l); close(done) }()
	defer func() { stop(); <-done }()
	var steps []Step
	c := &Config{RestoreKey: client, Sample: sample, Random: mathrand.New(mathrand.NewPCG(1, 2)), Said: func(s Step) { steps = append(steps, s) }}
	r, live := &Report{}, map[string]string{}
	err = c.appliance(t.Context(), &site.Appliance{Name: "attic", LUKS: luks, Address: l.Addr().String(), HostKey: identity.Line(host.PublicKey(), "")}, r, live)
	return r, live, steps, err
}

func newVault() *vault { return &vault{files: map[string][]byte{}, header: strings.Repeat("a", 64)} }

func TestSamplesWhatIsGood(t *testing.T) {
	v := newVault()
	many := map[string]string{}
	for i := range 200 {
		many[fmt.Sprintf("segment-%03d", i)] = strings.Repeat("x", 100+i)
	}
	v.add(t, "photos", "000001-20260101T000000Z", false, map[string]string{"config": "old"})
	v.add(t, "photos", "000002-20260102T000000Z", false, many)
	bad := v.add(t, "photos", "000003-20260103T000000Z", true, map[string]string{"config": "odd"})
	delete(v.files, bad+"/MANIFEST") // a suspect one is not looked at
	v.add(t, "letters", "000001-20260101T000000Z", false, map[string]string{"large": strings.Repeat("y", 9000), "larger": strings.Repeat("y", 9001), "empty": ""})
	r, live, steps, err := drilled(t, v, 3000)
	if err != nil || len(r.Problems) > 0 || !r.Passed() || !v.woken {
		t.Fatalf("%v, %+v", err, r)
	}
	if live[luks] != v.header {
		t.Errorf("live headers: %v", live)
	}
	// Of photos as many as fit into half, and what there is of the oldest; of letters the empty one fits.
	if r.Files < 6 || r.Files > maxSampled+2 || r.Bytes > 1503 || r.Bytes < 1000 {
		t.Errorf("sampled %d files, %d bytes", r.Files, r.Bytes)
	}
	if len(steps) != 4 || steps[1].What != "attic: letters" || !strings.Contains(steps[2].Detail, "000002-") || !strings.Contains(steps[3].Detail, "000001-") {
		t.Errorf("steps %+v", steps)
	}
}

// A file that is larger than the sample is fetched all the same where nothing else
// would be.
func TestSmallestIsAlwaysFetched(t *testing.T) {
	v := newVault()
	v.add(t, "photos", "000001-20260101T000000Z", false, map[string]string{"a": strings.Repeat("y", 9000), "b": strings.Repeat("y", 800)})
	r, _, _, err := drilled(t, v, 10)
	if err != nil || !r.Passed() || r.Files != 1 || r.Bytes != 800 {
		t.Errorf("%v, %+v", err, r)
	}
}

func TestFindsWhatIsNotAsAtTheSource(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(v *vault, top string)
		want  string
	}{
		"another byte":    {func(v *vault, top string) { v.files[top+"/files/a"] = []byte("hellO") }, `"a" is not what it was at the source`},
		"shorter":         {func(v *vault, top string) { v.files[top+"/files/a"] = []byte("hell") }, `"a" is not what it was at the source`},
		"longer":          {func(v *vault, top string) { v.files[top+"/files/a"] = []byte("hello, world") }, `"a" is not what it was at the source`},
		"gone":            {func(v *vault, top string) { delete(v.files, top+"/files/a") }, `"a": `},
		"no list":         {func(v *vault, top string) { delete(v.files, top+"/MANIFEST") }, "its list of files"},
		"list is damaged": {func(v *vault, top string) { v.files[top+"/MANIFEST"] = v.files[top+"/MANIFEST"][:10] }, "its list of files"},
		"another list":    {func(v *vault, top string) { v.generations[0].Digest = strings.Repeat("0", 64) }, "its list of files is another one"},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVault()
			top := v.add(t, "photos", "000001-20260101T000000Z", false, map[string]string{"a": "hello"})
			tt.spoil(v, top)
			r, _, _, err := drilled(t, v, 1000)
			if err != nil || r.Passed() || len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Error(), tt.want) {
				t.Errorf("%v, problems %v; want %q", err, r.Problems, tt.want)
			}
		})
	}
}

// TestOldestIsRehearsedToo: what is kept the longest is found when it is not what it was.
func TestOldestIsRehearsedToo(t *testing.T) {
	v := newVault()
	old := v.add(t, "photos", "000001-20190101T000000Z", false, map[string]string{"a": "of 2019"})
	v.add(t, "photos", "000400-20260101T000000Z", false, map[string]string{"a": "between"})
	v.add(t, "photos", "000401-20260102T000000Z", false, map[string]string{"a": "of today"})
	if r, _, _, err := drilled(t, v, 1000); err != nil || !r.Passed() || r.Files != 2 {
		t.Errorf("%v, %+v", err, r)
	}
	v.files[old+"/files/a"] = []byte("of 2O19")
	r, _, _, err := drilled(t, v, 1000)
	if err != nil || r.Passed() || len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Error(), "000001-20190101T000000Z") {
		t.Errorf("%v, problems %v", err, r.Problems)
	}
}

func TestRefusesOddAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(v *vault)
		want  string
	}{
		"nothing":       {func(v *vault) { v.generations = nil }, "no generation"},
		"suspect only":  {func(v *vault) { v.generations[0].Suspect = true }, "no generation"},
		"odd name":      {func(v *vault) { v.generations[0].Name = "../../etc" }, "no list of generations"},
		"odd place":     {func(v *vault) { v.generations[0].Repository = "../x" }, "no list of generations"},
		"another place": {func(v *vault) { v.generations[0].Repository = "" }, "no list of generations"},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVault()
			v.add(t, "photos", "000001-20260101T000000Z", false, map[string]string{"a": "hello"})
			tt.spoil(v)
			r, _, _, err := drilled(t, v, 1000)
			if err == nil || r.Passed() || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
		})
	}
}
