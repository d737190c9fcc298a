package redteam

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"farkeep/image/torture/service"
	"farkeep/pusher/target"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

const scratch = "scratch-1" // where attacks may leave something

// line is an entry of a manifest that the real writer would not write.
type line struct {
	path string
	kind manifest.Kind
	size uint64
	mode uint64
	time int64
	sum  manifest.Sum
}

// forge encodes lines as the format says, digest and all, whatever they are.
func forge(lines ...line) (pushwire.Offer, []byte) {
	var out bytes.Buffer
	out.WriteString("FKMANIF1")
	digest := manifest.NewHash()
	io.WriteString(digest, "farkeep manifest 1\n")
	var total uint64
	for _, l := range lines {
		if l.kind == 0 {
			l.kind = manifest.File
		}
		content := binary.AppendUvarint(nil, l.mode)
		var rest []byte
		if l.kind == manifest.File {
			rest = append(binary.AppendUvarint(nil, l.size), l.sum[:]...)
			total += l.size
		}
		out.WriteByte(byte(l.kind))
		out.Write(binary.AppendUvarint([]byte{0}, uint64(len(l.path)))) // shares nothing with the one before
		out.WriteString(l.path)
		out.Write(content)
		out.Write(binary.AppendVarint(nil, l.time))
		out.Write(rest)
		digest.Write([]byte{byte(l.kind)})
		digest.Write(binary.AppendUvarint(nil, uint64(len(l.path))))
		io.WriteString(digest, l.path)
		digest.Write(append(content, rest...))
	}
	sum := manifest.SumOf(digest)
	out.WriteByte('E')
	out.Write(binary.AppendUvarint(nil, uint64(len(lines))))
	out.Write(binary.AppendUvarint(nil, total))
	out.Write(sum[:])
	return pushwire.Offer{Digest: sum.String(), Entries: int64(len(lines)), Bytes: int64(total), Kind: pushwire.KindFiles}, out.Bytes()
}

// forged offers lines, which must be refused.
func forged(words string, lines ...line) func(*world) error {
	return func(w *world) error {
		o, list := forge(lines...)
		_, _, err := w.offer(service.Push, scratch, o, list)
		return refused(err, words)
	}
}

func manifestAttacks() []attack {
	const kind = "manifest"
	bad := func(words string, paths ...string) func(*world) error {
		return func(w *world) error {
			for _, path := range paths {
				if err := forged(words, line{path: path, size: 1})(w); err != nil {
					return fmt.Errorf("%.60q: %w", path, err)
				}
			}
			return nil
		}
	}
	return []attack{
		{kind, "names that lead up: ../x, a/../../x", "refused by the one function that every name passes", bad("part|path", "../x", "a/../../x", "..", "a/..", "./a", "a/./b")},
		{kind, "absolute names", "refused", bad("path|absolute|part", "/etc/passwd", "//x")},
		{kind, "names with a newline or NUL, into SUMS.b2", "refused", bad("path|byte|NUL|newline", "a\nb", "a\x00b")},
		{kind, "empty, endless and bottomless names", "refused", bad("path|part|long|deep|bytes|empty", "", "a//b", "a/", strings.Repeat("n", 256), strings.Repeat("d/", 2500)+"x", strings.Repeat("d/", 101)+"x")},
		{kind, "names of the store's own: SUMS.b2, generation.toml, .sequence", "they are files among files/, and touch nothing", func(w *world) error {
			content := tree{"SUMS.b2": "x", "generation.toml": "suspect = false", "MANIFEST": "y", "files/a": "z", ".sequence": "999"}
			name := w.push("scratch-names", content)
			if strings.HasPrefix(name, "000999") {
				return errors.New("the number was taken from the attacker's file")
			}
			return nil
		}},
		{kind, "one name twice", "refused: not in order", forged("order|after|path", line{path: "a", size: 1}, line{path: "a", size: 1})},
		{kind, "a file that is a folder too", "refused", forged("order|folder|path", line{path: "a", size: 1}, line{path: "a/b", size: 1})},
		{kind, "entries of another kind: a link, a device", "refused: files and folders only", func(w *world) error {
			for _, k := range []manifest.Kind{'L', 'C', 'B', 'P'} {
				if err := forged("kind|tag|entry", line{path: "a", kind: k})(w); err != nil {
					return err
				}
			}
			return nil
		}},
		{kind, "set-user-id bits and mode 7777", "kept in the manifest, not on the disk", func(w *world) error {
			o, list := forge(line{path: "suid", mode: 0o7777, sum: sumOf("")})
			answer, to, err := w.offer(service.Push, "scratch-mode", o, list)
			if err != nil {
				return err
			}
			if answer.Answer == pushwire.AnswerSend {
				if _, err := to.Upload(w.Context(), answer.Push, tree{"suid": ""}.stream(answer)); err != nil {
					return err
				}
				if _, err := to.Commit(w.Context(), answer.Push); err != nil {
					return err
				}
			}
			return w.noSetUID("scratch-mode")
		}},
		{kind, "modes beyond 7777", "refused", forged("mode", line{path: "a", mode: 1 << 20})},
		{kind, "times 292 years ago and ahead", "taken, or refused; e2fsck has no complaint in the end", func(w *world) error {
			o, list := forge(line{path: "a", time: -1 << 63, sum: sumOf("")}, line{path: "b", time: 1<<63 - 1, sum: sumOf("")})
			answer, to, err := w.offer(service.Push, "scratch-time", o, list)
			if err != nil {
				return nil
			}
			_, err = to.Upload(w.Context(), answer.Push, tree{"a": "", "b": ""}.stream(answer))
			if err == nil {
				_, err = to.Commit(w.Context(), answer.Push)
			}
			return err
		}},
		{kind, "10^9 files announced", "refused before one is read", func(w *world) error {
			o, list := tree{"a": "x"}.list()
			o.Entries = 1_000_000_000
			_, _, err := w.offer(service.Push, scratch, o, list)
			return refused(err, "entries|files")
		}},
		{kind, "more entries than announced, without end", "refused at the first one too many", func(w *world) error {
			_, list := tree{"a": "x"}.list()
			o := pushwire.Offer{Digest: strings.Repeat("ab", 32), Entries: 1, Bytes: 1, Kind: pushwire.KindFiles}
			body := bytes.TrimSuffix(list, list[len(list)-35:])
			for i := range 200_000 {
				body = append(body, 'D', 0, 8)
				body = fmt.Appendf(body, "b%07d", i)
				body = append(body, 0, 0)
			}
			_, _, err := w.offer(service.Push, scratch, o, body)
			return refused(err, "entries|announced|more")
		}},
		{kind, "a digest that is not the manifest's", "refused", func(w *world) error {
			o, list := tree{"a": "x"}.list()
			o.Digest = strings.Repeat("00", 32)
			_, _, err := w.offer(service.Push, scratch, o, list)
			return refused(err, "digest")
		}},
		{kind, "the digest of what is there, with another manifest behind it", "confirms what is there, nothing else", func(w *world) error {
			o, _ := w.two.list()
			_, list := tree{"evil": "x"}.list()
			answer, _, err := w.offer(service.Push, own, o, list)
			if err != nil || answer.Answer != pushwire.AnswerSame || answer.Generation != w.names[2] {
				return fmt.Errorf("%+v, %w", answer.OfferAnswer, err)
			}
			return nil
		}},
		{kind, "sizes of 16 EiB, and sums that overflow", "refused", func(w *world) error {
			return errors.Join(forged("size|bytes", line{path: "a", size: 1<<64 - 1})(w), forged("size|bytes", line{path: "a", size: 1 << 62}, line{path: "b", size: 1 << 62})(w))
		}},
		{kind, "a file larger than the disk", "refused with numbers, before it is sent", forged("room|quota|free", line{path: "a", size: 1 << 40})},
		{kind, "one file beyond the key's quota", "refused with numbers, before it is sent", forged("quota|room", line{path: "a", size: quota + 1})},
		{kind, "an offer line of garbage, of a megabyte, with unknown keys", "refused", func(w *world) error {
			for _, text := range []string{"\n", "null\n", "[]\n", "{}\n", `{"digest":1}` + "\n", `{"digest":"x","standing":"accepted"}` + "\n", strings.Repeat("[", 60_000) + "\n", strings.Repeat("x", 1<<20), `{"entries":-1,"bytes":-1}` + "\n", `{"digest":"` + strings.Repeat("ab", 32) + `","entries":1,"bytes":1e300,"kind":"files"}` + "\n"} {
				if out, err := w.verb(service.Push, "offer "+scratch, text); err == nil {
					return fmt.Errorf("%.30q was answered %q", text, out)
				}
			}
			return nil
		}},
		{kind, "another Borg repository under an old name", "kept beside the old ones, and suspect", func(w *world) error {
			content := borg("11", "")
			o, list := content.list()
			o.Kind, o.RepositoryID = pushwire.KindBorg1, strings.Repeat("11", 32)
			return w.suspectAfter("scratch-borg", o, list, content, func() (pushwire.Offer, []byte, tree) {
				next := borg("22", "")
				o, list := next.list()
				o.Kind, o.RepositoryID = pushwire.KindBorg1, strings.Repeat("22", 32)
				return o, list, next
			})
		}},
		{kind, "a Borg repository whose segments are noise now", "kept beside the old ones, and suspect", func(w *world) error {
			content := borg("33", "")
			o, list := content.list()
			o.Kind, o.RepositoryID = pushwire.KindBorg1, strings.Repeat("33", 32)
			return w.suspectAfter("scratch-noise", o, list, content, func() (pushwire.Offer, []byte, tree) {
				next := borg("33", noise(5, 4000))
				o, list := next.list()
				o.Kind, o.RepositoryID = pushwire.KindBorg1, strings.Repeat("33", 32)
				return o, list, next
			})
		}},
		{kind, "an empty repository in place of a full one", "kept beside the old ones, and suspect", func(w *world) error {
			content := tree{}
			for i := range 20 {
				content[fmt.Sprintf("file-%d", i)] = noise(byte(i), 1000)
			}
			o, list := content.list()
			return w.suspectAfter("scratch-empty", o, list, content, func() (pushwire.Offer, []byte, tree) {
				next := tree{"file-0": content["file-0"]}
				o, list := next.list()
				return o, list, next
			})
		}},
		{kind, "every file encrypted in place", "kept beside the old ones, and suspect", func(w *world) error {
			content := tree{}
			for i := range 20 {
				content[fmt.Sprintf("file-%d", i)] = noise(byte(i), 1000)
			}
			o, list := content.list()
			return w.suspectAfter("scratch-ransom", o, list, content, func() (pushwire.Offer, []byte, tree) {
				next := tree{}
				for path := range content {
					next[path] = noise(byte(100+len(next)), 1000)
				}
				o, list := next.list()
				return o, list, next
			})
		}},
	}
}

// borg is the least that is a Borg repository: one segment that commits nothing,
// or holds noise.
func borg(id, noise string) tree {
	segment := "BORG_SEG"
	commit := []byte{9, 0, 0, 0, 2} // size of the entry, tag COMMIT
	segment += string(binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE(commit))) + string(commit)
	if noise != "" {
		segment = noise
	}
	return tree{
		"README":   "This is a Borg Backup repository.\nSee https://borgbackup.readthedocs.io/\n",
		"config":   "[repository]\nversion = 1\nsegments_per_dir = 1000\nmax_segment_size = 524288000\nappend_only = 0\nstorage_quota = 0\nadditional_free_space = 0\nid = " + strings.Repeat(id, 32) + "\n",
		"data/0/1": segment,
	}
}

// suspectAfter pushes a first generation and then what next says, which must be
// kept and marked.
func (w *world) suspectAfter(repository string, o pushwire.Offer, list []byte, content tree, next func() (pushwire.Offer, []byte, tree)) error {
	for round := range 2 {
		if round == 1 {
			o, list, content = next()
		}
		answer, to, err := w.offer(service.Push, repository, o, list)
		if err != nil {
			return err
		}
		if _, err := to.Upload(w.Context(), answer.Push, content.stream(answer)); err != nil {
			return err
		}
		done, err := to.Commit(w.Context(), answer.Push)
		if err != nil {
			return err
		}
		if done.Suspect != (round == 1) {
			return fmt.Errorf("generation %d: suspect %v", round+1, done.Suspect)
		}
	}
	return nil
}

// bytesOf is a stream of these bytes.
func bytesOf(b []byte) func(io.Writer) error {
	return func(out io.Writer) error { _, err := out.Write(b); return err }
}

// badStream begins a push and sends a stream that must be refused; a commit after
// it must be refused as well.
func badStream(words string, content tree, stream func(target.Answer) []byte) func(*world) error {
	return func(w *world) error {
		answer, to, err := w.begin(scratch, content)
		if err != nil {
			return err
		}
		_, err = to.Upload(w.Context(), answer.Push, bytesOf(stream(answer)))
		if err := refused(err, words); err != nil {
			return err
		}
		if _, err := to.Commit(w.Context(), answer.Push); err == nil {
			return errors.New("what was not uploaded was committed")
		}
		return nil
	}
}

// ops builds a recipe stream by hand.
type ops struct{ bytes.Buffer }

func stream() *ops { o := &ops{}; o.WriteString("FKRECIP1"); return o }
func (o *ops) number(n uint64) *ops {
	o.Write(binary.AppendUvarint(nil, n))
	return o
}
func (o *ops) file(i uint64) *ops { o.WriteByte('F'); return o.number(i) }
func (o *ops) keep(n uint64) *ops { o.WriteByte('K'); return o.number(n) }
func (o *ops) data(s string) *ops {
	o.WriteByte('D')
	o.number(uint64(len(s))).WriteString(s)
	return o
}
func (o *ops) copy(path string, at, n uint64) *ops {
	o.WriteByte('C')
	o.number(uint64(len(path))).WriteString(path)
	return o.number(at).number(n)
}
func (o *ops) end(sum manifest.Sum) *ops { o.WriteByte('E'); o.Write(sum[:]); return o }
func (o *ops) close(files uint64) []byte { o.WriteByte('Z'); return o.number(files).Bytes() }
func always(b []byte) func(target.Answer) []byte {
	return func(target.Answer) []byte { return b }
}

func streamAttacks() []attack {
	const kind = "stream"
	one := tree{"new": "12345"}
	sum := sumOf("12345")
	return []attack{
		{kind, "copy from ../../other-music, /etc/shadow, SUMS.b2's folder", "refused: a path of the base, nothing else", func(w *world) error {
			for _, path := range []string{"../SUMS.b2", "../../../../other-music/" + w.other + "/files/song", "/etc/shadow", "a/../../generation.toml", "a\x00", ""} {
				if err := badStream(".", one, always(stream().file(0).copy(path, 0, 5).end(sum).close(1)))(w); err != nil {
					return fmt.Errorf("%q: %w", path, err)
				}
			}
			return nil
		}},
		{kind, "copy beyond a file's end, and at 2^63", "refused", func(w *world) error {
			for _, at := range []uint64{1, 1 << 40, 1<<63 - 1, 1<<64 - 1} {
				if err := badStream(".", one, always(stream().file(0).copy("a", at, 5).end(sum).close(1)))(w); err != nil {
					return err
				}
			}
			return nil
		}},
		{kind, "more bytes than announced", "refused at the first one too many", badStream("announced|longer|size|beyond", one, always(stream().file(0).data("123456").end(sum).close(1)))},
		{kind, "fewer bytes than announced", "refused", badStream("announced|short|size|bytes", one, always(stream().file(0).data("1234").end(sum).close(1)))},
		{kind, "other bytes than announced", "refused: the hash is checked", badStream("hash|sum|content", one, always(stream().file(0).data("54321").end(sum).close(1)))},
		{kind, "the right hash claimed for other bytes", "refused: the appliance computes it", badStream("hash|sum|content", one, always(stream().file(0).data("abcde").end(sumOf("abcde")).close(1)))},
		{kind, "files that were not asked for", "refused", badStream(".", one, always(stream().file(7).data("12345").end(sum).close(1)))},
		{kind, "one file twice", "refused: not ascending", badStream(".", one, always(stream().file(0).data("12345").end(sum).file(0).data("54321").end(sum).close(2)))},
		{kind, "keep what was never uploaded", "refused", badStream(".", one, always(stream().file(0).keep(5).end(sum).close(1)))},
		{kind, "a frame of 2^60 bytes", "refused at its head", badStream(".", one, always(append(stream().file(0).Bytes(), append([]byte{'D'}, binary.AppendUvarint(nil, 1<<60)...)...)))},
		{kind, "a million operations that add nothing", "refused at the first", func(w *world) error {
			o := stream().file(0)
			for range 300_000 {
				o.data("")
			}
			return badStream(".", one, always(o.end(sum).close(1)))(w)
		}},
		{kind, "random bytes for a stream", "refused", badStream(".", one, always([]byte(noise(77, 100_000))))},
		{kind, "a stream cut in the middle, then commit", "refused: not everything is there", badStream(".", one, always(stream().file(0).data("123").Bytes()))},
		{kind, "commit without an upload", "refused: not everything is there", func(w *world) error {
			answer, to, err := w.begin(scratch, tree{"new": "never sent"})
			if err != nil {
				return err
			}
			_, err = to.Commit(w.Context(), answer.Push)
			return refused(err, "missing|not|incomplete")
		}},
		{kind, "commit the same push twice", "the same generation twice, made once", func(w *world) error {
			answer, to, err := w.begin("scratch-twice", one)
			if err != nil {
				return err
			}
			if _, err := to.Upload(w.Context(), answer.Push, one.stream(answer)); err != nil {
				return err
			}
			first, err := to.Commit(w.Context(), answer.Push)
			if err != nil {
				return err
			}
			second, err := to.Commit(w.Context(), answer.Push)
			if err != nil || first.Generation != second.Generation {
				return fmt.Errorf("%v, %v: %w", first, second, err)
			}
			return nil
		}},
		{kind, "abort a push that is committed", "refused or nothing to abort: the generation stays", func(w *world) error {
			content := tree{"new": "to be aborted"}
			answer, to, err := w.begin("scratch-abort", content)
			if err != nil {
				return err
			}
			if _, err := to.Upload(w.Context(), answer.Push, content.stream(answer)); err != nil {
				return err
			}
			done, err := to.Commit(w.Context(), answer.Push)
			if err != nil {
				return err
			}
			_ = to.Abort(w.Context(), answer.Push) // whatever it answers
			out, err := w.verb(service.Push, "verify scratch-abort "+done.Generation, "")
			if err != nil || strings.Contains(out, "bad") {
				return fmt.Errorf("%s, %w", out, err)
			}
			return nil
		}},
		{kind, "forty generations at once, to push old ones out", "they are added; the floor keeps the old ones", func(w *world) error {
			for i := range 40 {
				w.push("docs", tree{"letter": fmt.Sprintf("flood %d", i)})
			}
			return nil
		}},
	}
}

func raceAttacks() []attack {
	const kind = "races"
	return []attack{
		{kind, "two pushes of one repository at once", "one of them ends, the other is whole", func(w *world) error {
			var all sync.WaitGroup
			errs := make([]error, 4)
			for i := range errs {
				all.Go(func() {
					content := tree{"racer": noise(byte(i), 200_000)}
					answer, to, err := w.begin("scratch-race", content)
					if err == nil {
						_, err = to.Upload(w.Context(), answer.Push, content.stream(answer))
					}
					if err == nil {
						_, err = to.Commit(w.Context(), answer.Push)
					}
					errs[i] = err
				})
			}
			all.Wait()
			return anyOf(errs...)
		}},
		{kind, "commit, abort and offer at the same instant, twenty times", "a generation or none, never half of one", func(w *world) error {
			for i := range 20 {
				content := tree{"racer": fmt.Sprint("round ", i)}
				answer, to, err := w.begin("scratch-race", content)
				if err != nil {
					return err
				}
				if _, err := to.Upload(w.Context(), answer.Push, content.stream(answer)); err != nil {
					return err
				}
				var all sync.WaitGroup
				for _, verb := range []string{"commit ", "abort ", "commit "} {
					all.Go(func() { w.verb(service.Push, verb+answer.Push, "") })
				}
				all.Wait()
				to.Close()
			}
			return w.verified("scratch-race")
		}},
		{kind, "hang up in the middle of a commit", "a whole generation or none", func(w *world) error {
			for i := range 6 {
				content := tree{}
				for n := range 60 {
					content[fmt.Sprint(n)] = noise(byte(i+n), 3000)
				}
				answer, to, err := w.begin("scratch-hang", content)
				if err != nil {
					return err
				}
				if _, err := to.Upload(w.Context(), answer.Push, content.stream(answer)); err != nil {
					return err
				}
				ctx, cancel := context.WithTimeout(w.Context(), time.Duration(i)*4*time.Millisecond)
				to.Commit(ctx, answer.Push)
				cancel()
				to.Close()
			}
			return w.verified("scratch-hang")
		}},
		{kind, "two uploads into one push", "one is refused or ends; what is committed is right", func(w *world) error {
			content := tree{"racer": noise(50, 400_000)}
			answer, to, err := w.begin("scratch-race", content)
			if err != nil {
				return err
			}
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() {
					other := w.client(service.Push)
					defer other.Close()
					other.Upload(w.Context(), answer.Push, content.stream(answer))
				})
			}
			all.Wait()
			to.Commit(w.Context(), answer.Push)
			return w.verified("scratch-race")
		}},
		{kind, "sleep and wake a hundred times, in the middle of pushes", "cut pushes, whole history", func(w *world) error {
			// A disk that is always on, as here, stays open in its window.
			content := tree{"racer": noise(51, 300_000)}
			answer, to, err := w.begin("scratch-race", content)
			if err != nil {
				return err
			}
			var all sync.WaitGroup
			all.Go(func() { to.Upload(w.Context(), answer.Push, content.stream(answer)) })
			c, err := w.svc.Dial(w.Context(), service.Push)
			if err != nil {
				return err
			}
			defer c.Close()
			for range 20 {
				c.Run(w.Context(), "sleep", nil, 1<<16)
				c.Run(w.Context(), "wake", nil, 1<<16)
			}
			all.Wait()
			wait, cancel := context.WithTimeout(w.Context(), time.Minute)
			defer cancel()
			_, err = w.svc.Verb(wait, service.Push, "wake --wait=50", nil)
			return errors.Join(err, w.svc.AwaitOpen(wait))
		}},
	}
}

// verified lets the appliance verify every generation of a repository.
func (w *world) verified(repository string) error {
	all, err := w.client(service.Push).Generations(w.Context(), repository)
	if err != nil {
		return err
	}
	for _, g := range all {
		out, err := w.verb(service.Push, "verify "+repository+" "+g.Name, "")
		if err != nil || strings.Contains(out, `"bad"`) {
			return fmt.Errorf("verify %s: %s, %w", g.Name, out, err)
		}
	}
	return nil
}

func resourceAttacks() []attack {
	const kind = "resources"
	return []attack{
		{kind, "three hundred connections that say nothing", "a restore key still gets in", func(w *world) error {
			for range 300 {
				raw, err := net.DialTimeout("tcp", w.svc.Address(), 2*time.Second)
				if err != nil {
					break
				}
				defer raw.Close()
			}
			return w.restoreGetsIn()
		}},
		{kind, "sixty-four connections with the push key", "half of the places at most: a restore key still gets in", func(w *world) error {
			for range 64 {
				c, err := w.svc.Dial(w.Context(), service.Push)
				if err != nil {
					break
				}
				defer c.Close()
			}
			return w.restoreGetsIn()
		}},
		{kind, "a hundred sessions in one connection", "bounded: a restore key still gets in", func(w *world) error {
			c, err := w.dial(nil)
			if err != nil {
				return err
			}
			opened := 0
			for range 100 {
				s, err := c.NewSession()
				if err != nil {
					break
				}
				defer s.Close()
				opened++
			}
			if opened == 100 {
				return errors.New("all hundred were opened")
			}
			return w.restoreGetsIn()
		}},
		{kind, "a stalled upload, to hold a repository", "the next attempt goes through", func(w *world) error {
			content := tree{"slow": noise(60, 100_000)}
			answer, to, err := w.begin("scratch-stall", content)
			if err != nil {
				return err
			}
			hang := make(chan struct{})
			started := make(chan struct{})
			var all sync.WaitGroup
			all.Go(func() {
				to.Upload(w.Context(), answer.Push, func(out io.Writer) error {
					out.Write([]byte("FKRECIP1"))
					close(started)
					<-hang
					return errors.New("never")
				})
			})
			<-started
			defer func() { close(hang); to.Close(); all.Wait() }()
			// It is busy at first, and is told so; it need not wait to be believed.
			o, list := content.list()
			other := w.client(service.Push)
			defer other.Close()
			_, err = other.Offer(w.Context(), "scratch-stall", o, opener(list))
			if err != nil && !target.Temporary(err) {
				return err
			}
			return w.restoreGetsIn()
		}},
		{kind, "answers that are never read", "the session ends; others do not wait", func(w *world) error {
			c, err := w.dial(nil)
			if err != nil {
				return err
			}
			for range 6 {
				s, err := c.NewSession()
				if err != nil {
					break
				}
				defer s.Close()
				if _, err := s.StdoutPipe(); err != nil { // and nobody reads it
					return err
				}
				s.Start("generations docs")
			}
			return w.restoreGetsIn()
		}},
		{kind, "verify everything all the time", "one at a time: other keys' pushes go on", func(w *world) error {
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() { w.verb(service.Push, "verify photos "+w.names[2], "") })
			}
			defer all.Wait()
			other := w.client(service.Other)
			defer other.Close()
			pushTo(w.ctx, w.T, other, "other-verify", tree{"a": "it goes on"})
			return nil
		}},
		{kind, "fill the key's quota", "refused with numbers when it is full", func(w *world) error {
			var last error
			for i := range 8 {
				content := tree{"bulk": noise(byte(i), 12<<20)}
				answer, to, err := w.begin(fmt.Sprintf("scratch-bulk-%d", i), content)
				if err != nil {
					last = err
					break
				}
				if _, err := to.Upload(w.Context(), answer.Push, content.stream(answer)); err != nil {
					return err
				}
				if _, err := to.Commit(w.Context(), answer.Push); err != nil {
					return err
				}
				to.Close()
			}
			return refused(last, "quota|room")
		}},
		{kind, "a push larger than the disk", "refused with numbers; every generation stays", forged("room|quota", line{path: "a", size: 300 << 20})},
		{kind, "more files than the disk has inodes", "refused, or the push ends; history stays", func(w *world) error {
			// 192 MiB of ext4 have 49,152 inodes.
			content := make([]line, 0, 60_000)
			for i := range 60_000 {
				content = append(content, line{path: fmt.Sprintf("%06d", i), kind: manifest.Folder})
			}
			o, list := forge(content...)
			answer, to, err := w.offer(service.Push, "scratch-inodes", o, list)
			if err == nil && answer.Answer == pushwire.AnswerSend {
				_, err = to.Upload(w.Context(), answer.Push, tree{}.stream(answer))
				if err == nil {
					_, err = to.Commit(w.Context(), answer.Push)
				}
			}
			if err == nil {
				return errors.New("60,000 folders were made of 49,152 inodes")
			}
			w.push("scratch-after", tree{"a": "it goes on"})
			return nil
		}},
	}
}

func (w *world) restoreGetsIn() error {
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	out, err := w.svc.Verb(ctx, service.Restore, "generations photos", nil)
	if err != nil {
		return fmt.Errorf("the restore key: %w", err)
	}
	if !strings.Contains(string(out), w.names[0]) {
		return fmt.Errorf("the restore key sees %q", out)
	}
	return nil
}
