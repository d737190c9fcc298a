package seal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"farkeep/keyserver/seal"
	"farkeep/shared/secret"

	"filippo.io/age"
	"filippo.io/age/armor"
)

// pair makes an identity and its recipient.
func pair(t testing.TB) (*seal.Identity, seal.Recipients) {
	t.Helper()
	text, recipient, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	id, err := seal.ParseIdentity(text)
	if err != nil {
		t.Fatal(err)
	}
	r, err := seal.ParseRecipients(recipient)
	if err != nil {
		t.Fatal(err)
	}
	return id, r
}

func TestSealAndOpen(t *testing.T) {
	id, r := pair(t)
	for _, size := range []int{0, 1, 64, 8192, seal.MaxSealed - 1} {
		plain := bytes.Repeat([]byte{0, 0xff, 'k'}, size/3+1)[:size]
		sealed, err := r.Seal(plain)
		if err != nil {
			t.Fatal(err)
		}
		dst := make([]byte, size)
		n, err := id.Open(dst, sealed)
		if err != nil || n != size || !bytes.Equal(dst, plain) {
			t.Errorf("%d bytes: %d came back, %v", size, n, err)
		}
		// age itself agrees.
		w, err := id.Reader(bytes.NewReader(sealed))
		if err != nil {
			t.Fatal(err)
		}
		if again, err := io.ReadAll(w); err != nil || !bytes.Equal(again, plain) {
			t.Errorf("%d bytes: age reads something else, %v", size, err)
		}
		if size > 0 {
			if _, err := id.Open(make([]byte, size-1), sealed); err == nil {
				t.Errorf("%d bytes were put where there is no room for them", size)
			}
		}
	}
	if _, err := r.Seal(make([]byte, seal.MaxSealed)); err == nil {
		t.Error("too much was sealed")
	}
	if _, err := (seal.Recipients{}).Seal(nil); err == nil {
		t.Error("something was sealed for nobody")
	}
}

func TestOpenRefuses(t *testing.T) {
	id, r := pair(t)
	other, theirs := pair(t)
	sealed, err := r.Seal([]byte("the key of a disk"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open(make([]byte, 100), sealed); !errors.Is(err, seal.ErrNotForUs) {
		t.Errorf("a stranger: %v", err)
	}
	if _, err := other.Reader(bytes.NewReader(sealed)); !errors.Is(err, seal.ErrNotForUs) {
		t.Errorf("a stranger reads: %v", err)
	}
	both, err := seal.ParseRecipients(r.Text() + "# a comment\n\n" + theirs.Text() + r.Text())
	if err != nil || len(both.Names()) != 2 {
		t.Fatalf("%v, %v", both.Names(), err)
	}
	forBoth, err := both.Seal([]byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range []*seal.Identity{id, other, id.Join(other)} {
		if _, err := one.Open(make([]byte, 1), forBoth); err != nil {
			t.Errorf("sealed for two: %v", err)
		}
	}
	// Any bit that is changed, anything that is cut off or put behind.
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 0x20
		dst := make([]byte, 100)
		if _, err := id.Open(dst, bad); err == nil {
			t.Errorf("byte %d was changed, and nobody noticed", i)
		}
		if !bytes.Equal(dst, make([]byte, 100)) {
			t.Fatalf("byte %d was changed, and something was written", i)
		}
		if _, err := id.Open(dst, sealed[:i]); err == nil {
			t.Errorf("cut to %d bytes, and nobody noticed", i)
		}
	}
	if _, err := id.Open(make([]byte, 100), append(bytes.Clone(sealed), 0)); err == nil {
		t.Error("a byte was put behind, and nobody noticed")
	}
	if _, err := id.Open(nil, make([]byte, seal.MaxHeader+seal.MaxSealed+1)); err == nil || !strings.Contains(err.Error(), "longer") {
		t.Errorf("too long: %v", err)
	}
}

// Two chunks are more than a key can be: age makes them, we refuse them.
func TestOpenRefusesTwoChunks(t *testing.T) {
	id, r := pair(t)
	var b bytes.Buffer
	w, err := r.Writer(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 70<<10)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := id.Open(make([]byte, 128<<10), b.Bytes()); err == nil {
		t.Error("two chunks were opened as one")
	}
}

func TestParseRefusesWithoutTelling(t *testing.T) {
	text, _, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	private := strings.Split(string(text.Reveal()), "\n")[1]
	_, err = seal.ParseRecipients(private)
	if err == nil || strings.Contains(err.Error(), private[:24]) {
		t.Errorf("an identity as a recipient: %v", err)
	}
	for _, bad := range []string{"", "# nothing\n", "age1", "ssh-ed25519 AAAA", "age1yubikey1xxxx"} {
		if _, err := seal.ParseRecipients(bad); err == nil {
			t.Errorf("%q: accepted as recipients", bad)
		}
	}
	var many strings.Builder
	for range seal.MaxRecipients + 1 {
		_, name, err := seal.New()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&many, name)
	}
	if _, err := seal.ParseRecipients(many.String()); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("too many recipients: %v", err)
	}
	for _, bad := range []string{"", "AGE-SECRET-KEY-1", private + "\nx", strings.ToLower(private) + "x"} {
		if _, err := seal.ParseIdentity(secret.New([]byte(bad))); err == nil || strings.Contains(err.Error(), "x") && strings.Contains(err.Error(), private[16:30]) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	id, err := seal.ParseIdentity(text)
	if err != nil {
		t.Fatal(err)
	}
	if s := fmt.Sprintf("%v %+v %#v %s", id, id, id, id); strings.Contains(s, "SECRET") || len(s) > 60 {
		t.Errorf("an identity was printed: %s", s)
	}
}

func TestPostQuantum(t *testing.T) {
	made, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	id, err := seal.ParseIdentity(secret.New([]byte(made.String())))
	if err != nil {
		t.Fatal(err)
	}
	r, err := seal.ParseRecipients(made.Recipient().String())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := r.Seal([]byte("key"))
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, 10)
	if n, err := id.Open(dst, sealed); err != nil || string(dst[:n]) != "key" {
		t.Errorf("%v", err)
	}
	_, classic := pair(t)
	if _, err := seal.ParseRecipients(r.Text() + classic.Text()); err == nil || !strings.Contains(err.Error(), "post-quantum") {
		t.Errorf("both kinds together: %v", err)
	}
}

func TestPassphrase(t *testing.T) {
	pass := func(s string) seal.Passphrase {
		p, err := seal.NewPassphrase(secret.New([]byte(s)))
		if err != nil {
			t.Fatal(err)
		}
		return seal.Light(p)
	}
	text, recipient, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := pass("four words and more").SealFile(text)
	if err != nil {
		t.Fatal(err)
	}
	if !seal.IsSealed(sealed) || seal.IsSealed(text.Reveal()) {
		t.Error("sealed and not sealed look alike")
	}
	if _, err := seal.ParseIdentity(secret.New(sealed)); !errors.Is(err, seal.ErrPassphrase) {
		t.Errorf("without the passphrase: %v", err)
	}
	if _, err := pass("another").Unseal(sealed); !errors.Is(err, seal.ErrWrongPassphrase) {
		t.Errorf("with another passphrase: %v", err)
	}
	var armoured bytes.Buffer
	w := armor.NewWriter(&armoured)
	if _, err := w.Write(sealed); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for _, file := range [][]byte{sealed, armoured.Bytes()} {
		id, err := pass("four words and more").Unseal(file)
		if err != nil || len(id.Recipients()) != 1 || id.Recipients()[0] != recipient {
			t.Errorf("with the passphrase: %v", err)
		}
	}
	for _, bad := range []string{"", strings.Repeat("x", 1025)} {
		if _, err := seal.NewPassphrase(secret.New([]byte(bad))); err == nil {
			t.Errorf("a passphrase of %d bytes was accepted", len(bad))
		}
	}
	_, r := pair(t)
	notWords, err := r.Seal([]byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pass("x").Unseal(notWords); !errors.Is(err, seal.ErrNotForUs) {
		t.Errorf("a file that has no passphrase: %v", err)
	}
}

// FuzzOpen: whatever is opened is what age opens.
func FuzzOpen(f *testing.F) {
	id, r := pair(f)
	sealed, err := r.Seal([]byte("key"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add(sealed[:len(sealed)-1])
	f.Add([]byte("age-encryption.org/v1\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, text []byte) {
		dst := make([]byte, seal.MaxSealed)
		n, err := id.Open(dst, text)
		if err != nil {
			return
		}
		w, err := id.Reader(bytes.NewReader(text))
		if err != nil {
			t.Fatalf("we open what age does not: %v", err)
		}
		if plain, err := io.ReadAll(w); err != nil || !bytes.Equal(plain, dst[:n]) {
			t.Fatalf("age reads something else: %v", err)
		}
	})
}
