// Package drill rehearses a recovery on a real site, without touching a disk: the
// bundle is checked, each header in it is opened with its recovery key, and of each
// repository's newest and oldest generation files drawn by lot are fetched over the line with the restore key and
// compared with the sums that were taken at the source.
//
// What it cannot show is that the commands of the runbook work on somebody's
// computer: "farkeep-image drill" runs those, on a stock Debian in an emulated
// machine, with a disk or an image of one attached. Nor does it know Borg's
// passphrases.
//
// What an appliance answers is input from outside: sizes and counts are bounded,
// names are checked before they become paths, nothing is written anywhere.
package drill

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"farkeep/keyserver/bundle"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"
)

// Bounds of what an appliance may answer, and of how long it may take.
const (
	maxStatus      = 1 << 20
	maxGenerations = 1_000_000
	maxSampled     = 64 // files of one repository
	wakeSeconds    = 600
	applianceLimit = 2 * time.Hour
)

// Config says what is drilled.
type Config struct {
	Site       *site.Site
	Folder     string // of the site, to compare the bundle with
	Bundle     *bundle.Contents
	RestoreKey ssh.Signer
	Sample     int64             // bytes to fetch of each repository at most; the smallest file of a generation is fetched in any case
	Addresses  map[string]string // host:port by appliance, instead of what the site says
	Random     *rand.Rand
	Said       func(Step) // called after every step; may be nil
}

// Step is one thing that was done.
type Step struct {
	What   string
	Took   time.Duration
	Detail string
}

// Report is how a drill went. It passed if there is no problem and something was
// sampled.
type Report struct {
	Problems []error // each may carry a hint
	Files    int     // fetched and compared
	Bytes    int64
}

// Passed says whether the site can be recovered as far as a drill can tell.
func (r *Report) Passed() bool { return len(r.Problems) == 0 && r.Files > 0 }

func (r *Report) problem(err error, next string, args ...any) {
	if next != "" && hint.Of(err) == "" {
		err = hint.Because(err, next, args...)
	}
	r.Problems = append(r.Problems, err)
}

// Run drills. An error means that nothing could be tried.
func Run(ctx context.Context, c Config) (*Report, error) {
	if c.Said == nil {
		c.Said = func(Step) {}
	}
	r := &Report{}
	m, err := c.Bundle.Manifest()
	if err != nil {
		return nil, err
	}
	live := map[string]string{}
	for i := range c.Site.Appliances {
		a := &c.Site.Appliances[i]
		if a.LUKS == "" {
			continue
		}
		if !slices.ContainsFunc(m.Disks, func(d bundle.Disk) bool { return d.LUKS == a.LUKS }) {
			continue // Verify names it
		}
		limited, cancel := context.WithTimeout(ctx, applianceLimit)
		err := c.appliance(limited, a, r, live)
		cancel()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			r.problem(fmt.Errorf("%s: %w", a.Name, err), "the drill passes when the appliance answers; farkeep-pusher status says more")
		}
	}
	began := time.Now()
	v, err := c.Bundle.Verify(c.Folder, live)
	if err != nil {
		return nil, err
	}
	r.Problems = append(r.Problems, v.Problems...)
	for _, n := range v.Notes {
		c.Said(Step{"bundle", time.Since(began), n})
	}
	return r, nil
}

// appliance samples what one appliance holds.
func (c *Config) appliance(ctx context.Context, a *site.Appliance, r *Report, live map[string]string) error {
	host, err := identity.ParsePublic(a.HostKey)
	if err != nil {
		return fmt.Errorf("its host key: %w", err)
	}
	address := c.Addresses[a.Name]
	if address == "" {
		address = a.Address
	}
	if address == "" {
		address = netip.AddrPortFrom(a.VPNAddress, 22).String()
	}
	began := time.Now()
	client, err := sshverb.Dial(ctx, sshverb.Peer{Address: address, User: "farkeep", Identity: c.RestoreKey, HostKey: host})
	if err != nil {
		return err
	}
	defer client.Close()
	// The answer to wake and the first status after it come when the disk is open.
	if _, err := client.Run(ctx, fmt.Sprintf("wake --wait=%d", wakeSeconds), nil, maxStatus); err != nil {
		return fmt.Errorf("wake its disk: %w", err)
	}
	text, err := client.Run(ctx, "status --json", nil, maxStatus)
	if err != nil {
		return err
	}
	var status pushwire.Status
	if err := json.Unmarshal(text, &status); err != nil {
		return fmt.Errorf("its status: %w", err)
	}
	if d := status.Disk.HeaderDigest; d != "" {
		live[a.LUKS] = d
	}
	c.Said(Step{a.Name + ": disk open", time.Since(began), ""})
	stream, err := client.Subsystem(ctx, "sftp")
	if err != nil {
		return err
	}
	defer stream.Close()
	files, err := sftp.NewClientPipe(stream, stream)
	if err != nil {
		return hint.Exit(hint.ExitUnreachable, fmt.Errorf("start sftp: %w", err))
	}
	defer files.Close()
	// Not before: while the session above lasts nothing that is listed expires.
	ends, err := goodEnds(ctx, client)
	if err != nil {
		return fmt.Errorf("list its generations: %w", err)
	}
	if len(ends) == 0 {
		return hint.Because(errors.New("it holds no generation that is not suspect"), "push to it")
	}
	of := map[string]int64{}
	for _, g := range ends {
		of[g.Repository]++
	}
	for _, g := range ends {
		began := time.Now()
		n, bytes, err := c.sample(files, g, c.Sample/of[g.Repository])
		r.Files, r.Bytes = r.Files+n, r.Bytes+bytes
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			r.problem(fmt.Errorf("%s: %s %s: %w", a.Name, g.Repository, g.Name, err), "farkeep-pusher restore tries all of it; ssh ... verify has the appliance read it")
			continue
		}
		c.Said(Step{a.Name + ": " + g.Repository, time.Since(began), fmt.Sprintf("%s: %d files drawn by lot, %d of %d bytes, all as at the source", g.Name, n, bytes, g.Bytes)})
	}
	return nil
}

var generationName = regexp.MustCompile(`^[0-9]{6,}-[0-9]{8}T[0-9]{6}Z$`)

// goodEnds lists of each repository the newest generation in which nothing is odd, as
// the runbook takes it, and the oldest, if that is another: it is kept the longest, and
// nobody else looks into it.
func goodEnds(ctx context.Context, client *sshverb.Client) ([]pushwire.Generation, error) {
	d, err := client.Start(ctx, "generations")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	d.Stdin.Close()
	lines := pushwire.NewReader(d.Stdout)
	newest, oldest := map[string]pushwire.Generation{}, map[string]pushwire.Generation{}
	for n := 0; ; n++ {
		var g pushwire.Generation
		err := pushwire.ReadLine(lines, &g)
		if errors.Is(err, io.EOF) && !errors.Is(err, pushwire.ErrLine) {
			break
		}
		if err != nil {
			return nil, err
		}
		if n == maxGenerations || !generationName.MatchString(g.Name) || pushwire.CheckRepository(g.Repository) != nil {
			return nil, errors.New("the answer is no list of generations")
		}
		if g.Suspect {
			continue
		}
		if g.Name > newest[g.Repository].Name {
			newest[g.Repository] = g
		}
		if first := oldest[g.Repository].Name; first == "" || g.Name < first {
			oldest[g.Repository] = g
		}
	}
	if err := d.Wait(); err != nil {
		return nil, err
	}
	var all []pushwire.Generation
	for repository, g := range newest {
		all = append(all, g)
		if first := oldest[repository]; first.Name != g.Name {
			all = append(all, first)
		}
	}
	slices.SortFunc(all, func(a, b pushwire.Generation) int {
		return cmp.Or(strings.Compare(a.Repository, b.Repository), -strings.Compare(a.Name, b.Name))
	})
	return all, nil
}

// sample fetches files of a generation, at most so many bytes but one file in any case,
// and compares their sums.
func (c *Config) sample(files *sftp.Client, g pushwire.Generation, most int64) (n int, fetched int64, err error) {
	top := "/" + g.Repository + "/" + g.Name
	chosen, err := c.draw(files, top, g.Digest, most)
	if err != nil {
		return 0, 0, err
	}
	for _, e := range chosen {
		f, err := files.Open(top + "/files/" + e.Path)
		if err != nil {
			return n, fetched, fmt.Errorf("%q: %w", e.Path, err)
		}
		h := manifest.NewHash()
		// One byte more than it should have shows a file that has grown.
		got, err := io.Copy(h, io.LimitReader(f, e.Size+1))
		f.Close()
		fetched += got
		if err != nil {
			return n, fetched, fmt.Errorf("%q: %w", e.Path, err)
		}
		if sum := manifest.SumOf(h); got != e.Size || sum != e.Sum {
			return n, fetched, fmt.Errorf("%q is not what it was at the source: %d bytes, %s; then %d bytes, %s", e.Path, got, sum, e.Size, e.Sum)
		}
		n++
	}
	return n, fetched, nil
}

// draw chooses files by lot from the generation's list: as many as fit into the
// sample, and in any case the smallest. The list must have the digest that the
// appliance's keeper gave.
func (c *Config) draw(files *sftp.Client, top, digest string, most int64) ([]manifest.Entry, error) {
	f, err := files.Open(top + "/MANIFEST")
	if err != nil {
		return nil, fmt.Errorf("its list of files: %w", err)
	}
	defer f.Close()
	list := manifest.NewReader(bufio.NewReaderSize(f, 256<<10))
	var pool []manifest.Entry   // uniformly drawn (reservoir sampling)
	var smallest manifest.Entry // that is not empty
	fitting := 0
	for {
		e, err := list.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("its list of files: %w", err)
		}
		if e.Kind != manifest.File {
			continue
		}
		if e.Size > 0 && (smallest.Path == "" || e.Size < smallest.Size) {
			smallest = e
		}
		if e.Size > most {
			continue
		}
		if fitting++; len(pool) < maxSampled {
			pool = append(pool, e)
		} else if i := c.Random.IntN(fitting); i < maxSampled {
			pool[i] = e
		}
	}
	if got := list.Summary().Digest.String(); got != digest {
		return nil, fmt.Errorf("its list of files is another one: digest %s, expected %s", got, digest)
	}
	c.Random.Shuffle(len(pool), func(i, j int) { pool[i], pool[j] = pool[j], pool[i] })
	var chosen []manifest.Entry
	left := most
	for _, e := range pool {
		if e.Size <= left {
			chosen, left = append(chosen, e), left-e.Size
		}
	}
	if len(chosen) == 0 && smallest.Path != "" {
		chosen = append(chosen, smallest)
	}
	return chosen, nil
}
