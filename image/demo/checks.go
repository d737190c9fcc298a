package demo

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/image/luksfile"
	"farkeep/image/mailsink"
	"farkeep/image/stage"
	"farkeep/shared/pushwire"
	"farkeep/shared/secret"
	"farkeep/shared/volumekey"
)

// push runs the pusher, which must succeed.
func (d *show) push(ctx context.Context, what, target string) error {
	return d.step(what, func() error {
		out, err := d.s.Push(ctx, "--target", target)
		d.lastPush = time.Now()
		if err == nil {
			d.say("%s", out)
		}
		return err
	})
}

// uploading waits until so many bytes have gone to the appliance since now.
func (d *show) uploading(ctx context.Context, a *stage.Appliance, bytes uint64) error {
	return within(ctx, 5*time.Minute, func(ctx context.Context) error {
		start, err := d.s.Sent(a.Name)
		if err != nil {
			return err
		}
		for {
			now, err := d.s.Sent(a.Name)
			if err != nil || now-start >= bytes {
				return err
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("only %d bytes went to %s: %w", now-start, a.Name, ctx.Err())
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
}

func (d *show) generations(ctx context.Context, a *stage.Appliance) ([]pushwire.Generation, error) {
	text, err := a.SSH(ctx, "home/pusher/ssh_key", "generations")
	if err != nil {
		return nil, err
	}
	var all []pushwire.Generation
	dec := json.NewDecoder(strings.NewReader(text))
	for {
		var g pushwire.Generation
		err := dec.Decode(&g)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("generations of %s: %w", a.Name, err)
		}
		all = append(all, g)
	}
}

func sameGenerations(before, after []pushwire.Generation) error {
	for _, g := range before {
		// Why it is kept may be told otherwise as days pass; what it is may not.
		same := func(o pushwire.Generation) bool {
			return o.Repository == g.Repository && o.Name == g.Name && o.Digest == g.Digest && o.Bytes == g.Bytes && o.Committed.Equal(g.Committed)
		}
		if !slices.ContainsFunc(after, same) {
			return fmt.Errorf("%s %s is gone or changed", g.Repository, g.Name)
		}
	}
	if len(before) == 0 {
		return errors.New("there was no generation to compare")
	}
	return nil
}

// mail waits for a mail that came after since.
func (d *show) mail(ctx context.Context, wait time.Duration, since time.Time, match func(mailsink.Message) bool) (m mailsink.Message, err error) {
	err = within(ctx, wait, func(ctx context.Context) error {
		m, err = d.s.Mail.Wait(ctx, func(m mailsink.Message) bool { return m.At.After(since) && match(m) })
		return err
	})
	if err != nil {
		var subjects []string
		for _, m := range d.s.Mail.Messages() {
			subjects = append(subjects, m.Subject())
		}
		err = fmt.Errorf("%w; mails so far: %q", err, subjects)
	}
	return m, err
}

// refused tries what the appliance must not allow.
func (d *show) refused(ctx context.Context) error {
	for _, try := range []struct{ identity, verb string }{
		{"home/pusher/ssh_key", "logs"},
		{"home/pusher/ssh_key", "retire notes"},
		{"operator/restore_key", "commit x"},
		{"operator/restore_key", "floor 1 0s"},
	} {
		verb, identity := try.verb, try.identity
		out, err := d.vault.SSH(ctx, identity, strings.Fields(verb)...)
		var failed *stage.CommandError
		if !errors.As(err, &failed) || failed.Code() != 4 || out != "" {
			return fmt.Errorf("%s with %s: %q, %v", verb, identity, out, err)
		}
		d.say("%s: %s", verb, firstLine(failed.Diagnostics))
	}
	batch := filepath.Join(d.dir, "sftp.forbidden")
	if err := os.WriteFile(batch, []byte("put "+batch+" /notes/planted\n"), 0o600); err != nil {
		return err
	}
	if _, err := d.vault.SFTP(ctx, batch); err == nil {
		return errors.New("sftp could write")
	}
	return nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// checkBorg proves that a copy is the repository: by Borg's own full check, and
// by comparing what it extracts with the source.
func (d *show) checkBorg(ctx context.Context, what string, b *borg, copied string) error {
	return d.step(what, func() error {
		c := b.at(copied)
		if err := c.verify(ctx); err != nil {
			return err
		}
		archives, err := d.s.RunWith(ctx, c.env, "borg", "list", "--short", c.path)
		if err != nil {
			return err
		}
		names := strings.Fields(archives)
		if len(names) == 0 {
			return errors.New("the copy holds no archive")
		}
		out := copied + ".extracted"
		if err := os.MkdirAll(out, 0o700); err != nil {
			return err
		}
		shell := fmt.Sprintf("cd '%s' && borg extract '%s::%s'", out, c.path, names[len(names)-1])
		if _, err := d.s.RunWith(ctx, c.env, "sh", "-c", shell); err != nil {
			return err
		}
		_, err = d.s.Run(ctx, "diff", "-r", b.source, filepath.Join(out, b.source))
		if err == nil {
			d.say("archive %s equals its source", names[len(names)-1])
		}
		return err
	})
}

// outside reads an appliance's disk as a stranger with the recovery key would:
// no appliance, no key server, stock tools for everything but the decryption,
// which this machine's kernel may not be able to do. It returns the folder of
// generations that came out.
func (d *show) outside(ctx context.Context, a *stage.Appliance) (string, error) {
	dump := filepath.Join(d.dir, "outside", a.Name)
	err := d.step("decrypt the disk of "+a.Name+", e2fsck it, copy the generations out with debugfs", func() error {
		key, err := os.ReadFile(d.recoveryKey(a))
		if err != nil {
			return err
		}
		plain := filepath.Join(d.dir, a.Name+".plain")
		if err := luksfile.Decrypt(ctx, a.Disk, key, plain); err != nil {
			return err
		}
		// The power was cut while it was mounted: the journal is replayed first, as
		// mounting it would.
		_, err = d.s.Run(ctx, "e2fsck", "-p", plain)
		var corrected *stage.CommandError
		if errors.As(err, &corrected) && corrected.Code() == 1 {
			err = nil
		}
		if err != nil {
			return err
		}
		if _, err := d.s.Run(ctx, "e2fsck", "-fn", plain); err != nil {
			return err
		}
		if err := os.MkdirAll(dump, 0o700); err != nil {
			return err
		}
		_, err = d.s.Run(ctx, "debugfs", "-R", fmt.Sprintf("rdump /generations %s", dump), plain)
		return err
	})
	return filepath.Join(dump, "generations"), err
}

// sums has b2sum check every file of every generation in a folder that outside
// returned, and returns the generations' folders.
func (d *show) sums(ctx context.Context, dump, repository string) ([]string, error) {
	folders, err := filepath.Glob(filepath.Join(dump, repository, "[0-9]*-*Z"))
	if err != nil {
		return nil, err
	}
	return folders, d.step(fmt.Sprintf("b2sum -c every file of every generation of %s", repository), func() error {
		if len(folders) == 0 {
			return errors.New("there is none")
		}
		for _, folder := range folders {
			if _, err := d.s.Run(ctx, "sh", "-c", fmt.Sprintf("cd '%s' && b2sum -l 256 --strict --quiet -c SUMS.b2", folder)); err != nil {
				return err
			}
		}
		return nil
	})
}

// verified has the appliance itself read every generation again.
func (d *show) verified(ctx context.Context, a *stage.Appliance, all []pushwire.Generation) error {
	for _, g := range all {
		text, err := a.SSH(ctx, "home/pusher/ssh_key", "verify", g.Repository, g.Name)
		if err != nil {
			return err
		}
		var answer pushwire.VerifyAnswer
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			return err
		}
		if len(answer.Bad) > 0 || answer.Files == 0 || answer.Bytes != g.Bytes {
			return fmt.Errorf("verify %s %s: %+v", g.Repository, g.Name, answer)
		}
	}
	return nil
}

func (d *show) recoveryKey(a *stage.Appliance) string {
	return filepath.Join(d.s.Site, "operator", a.LUKS+".recovery.key")
}

// memory searches all of a running machine's memory: for the key that the key
// server gave, which must be nowhere, and for the volume key, which the kernel
// holds while the disk is open and at no other time.
func (d *show) memory(ctx context.Context, a *stage.Appliance, open bool) error {
	secrets, err := a.Secrets()
	if err != nil {
		return err
	}
	needles := append([][]byte{secrets.Volume}, stage.Forms(secrets.Key)...)
	counts, err := a.Memory(ctx, needles...)
	if err != nil {
		return err
	}
	for _, n := range counts[1:] {
		if n > 0 {
			return fmt.Errorf("the key that opened the disk is in memory: %v", counts[1:])
		}
	}
	// dm-crypt's own copy, and the one that Adiantum's stream cipher works with. That
	// they are found shows that the search finds what is there.
	want := 0
	if open {
		want = 2
	}
	if counts[0] != want {
		return fmt.Errorf("the volume key is in memory %d times, expected %d", counts[0], want)
	}
	d.say("the key server's key: nowhere; the volume key: %d times", counts[0])
	return nil
}

// search looks for the LUKS keys, and for the volume key that they guard,
// wherever a thief could.
func (d *show) search(ctx context.Context) error {
	d.chapter("9. What the thief has")
	return d.step("search the cards and the disks for every key, in any form", func() error {
		for _, a := range []*stage.Appliance{d.vault, d.barn} {
			header, err := luksfile.Header(a.Disk)
			if err != nil {
				return err
			}
			var keys [][]byte
			for _, path := range []string{filepath.Join(d.s.KeyServerSecrets(), "keys", a.LUKS+".key"), d.recoveryKey(a)} {
				key, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				volume, err := volumekey.Open(header, secret.New(bytes.Clone(key)))
				if err != nil {
					return err
				}
				keys = append(keys, key, volume.Reveal())
			}
			for _, key := range keys {
				if err := d.findsPlanted(ctx, key); err != nil {
					return err
				}
				for _, image := range []string{a.Card, a.Disk} {
					found, err := searchFile(ctx, image, key)
					if err != nil {
						return err
					}
					if found {
						return fmt.Errorf("%s holds a key", image)
					}
				}
			}
		}
		return nil
	})
}

// findsPlanted makes sure that the search finds a key that is there, also where
// two reads meet.
func (d *show) findsPlanted(ctx context.Context, key []byte) error {
	path := filepath.Join(d.dir, "planted")
	for _, form := range [][]byte{key, []byte(hex.EncodeToString(key)), []byte(base64.StdEncoding.EncodeToString(key))} {
		if err := os.WriteFile(path, append(make([]byte, searchBlock-len(form)/2), form...), 0o600); err != nil {
			return err
		}
		found, err := searchFile(ctx, path, key)
		if err = errors.Join(err, os.Remove(path)); err != nil {
			return err
		}
		if !found {
			return errors.New("the search does not find a key that is there")
		}
	}
	return nil
}

// searchBlock is how much of a file the search looks at in one go, in bytes.
const searchBlock = 4 << 20

// searchFile says whether the file holds the key, or half of it, raw, in
// hexadecimal or in base64.
func searchFile(ctx context.Context, path string, key []byte) (bool, error) {
	if len(key) < 32 {
		return false, fmt.Errorf("half of a key of %d bytes would be found by chance", len(key))
	}
	half := key[:len(key)/2]
	needles := [][]byte{
		half, key[len(key)/2:],
		[]byte(hex.EncodeToString(half)), []byte(strings.ToUpper(hex.EncodeToString(half))),
		[]byte(base64.StdEncoding.EncodeToString(key)[:40]),
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	const overlap = 256 // longer than any needle
	buf := make([]byte, overlap+searchBlock)
	kept := 0
	for ctx.Err() == nil {
		n, err := io.ReadFull(f, buf[kept:])
		seen := buf[:kept+n]
		for _, needle := range needles {
			if bytes.Contains(seen, needle) {
				return true, nil
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		kept = copy(buf, seen[len(seen)-overlap:])
	}
	return false, ctx.Err()
}
