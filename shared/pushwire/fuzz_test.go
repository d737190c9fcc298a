package pushwire_test

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"farkeep/shared/pushwire"
)

// readsBack is the property of every line that a peer may send: it is read and
// says so again, or it is an error that names what it is; and nothing beyond the
// line is taken from the stream.
func readsBack[T any](t *testing.T, text []byte) {
	t.Helper()
	const rest = "the manifest follows"
	var v T
	r := pushwire.NewReader(io.MultiReader(bytes.NewReader(text), strings.NewReader(rest)))
	err := pushwire.ReadLine(r, &v)
	if err != nil {
		if !errors.Is(err, pushwire.ErrLine) && !errors.Is(err, io.EOF) {
			t.Fatalf("%q: an error of no kind: %v", text, err)
		}
		return
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	if len(line)+1 > pushwire.MaxLine {
		t.Fatalf("a line of %d bytes was read", len(line)+1)
	}
	if len(line) < len(text) {
		if left, err := io.ReadAll(r); err != nil || string(left) != string(text[len(line)+1:])+rest {
			t.Fatalf("after the line %q follow %q, %v", line, left, err)
		}
	}
	var out bytes.Buffer
	if err := pushwire.WriteLine(&out, v); err != nil {
		return // escapes made it longer than a line may be
	}
	var again T
	if err := pushwire.ReadLine(pushwire.NewReader(&out), &again); err != nil {
		t.Fatalf("%q was read, written again, and then not read: %v", text, err)
	}
	if !reflect.DeepEqual(v, again) {
		t.Fatalf("%q was read as %+v and, written again, as %+v", text, v, again)
	}
}

func seed[T any](f *testing.F, v T) {
	f.Helper()
	var out bytes.Buffer
	if err := pushwire.WriteLine(&out, v); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes())
	f.Add(out.Bytes()[:out.Len()-1])
	f.Add(append(out.Bytes(), "FKMANIF1"...))
}

func FuzzOffer(f *testing.F) {
	seed(f, pushwire.Offer{Digest: strings.Repeat("ab", 32), Entries: 3, Bytes: 1 << 40, Kind: pushwire.KindBorg1, RepositoryID: strings.Repeat("0", 64)})
	for _, s := range []string{"", "\n", "{}\n", `{"entries":-1,"bytes":1e300}` + "\n", `{"digest":"x","admin":true}` + "\n", strings.Repeat("[", 1000) + "\n", `{"digest":"\ud800"}` + "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) { readsBack[pushwire.Offer](t, text) })
}

func FuzzHeartbeat(f *testing.F) {
	seed(f, pushwire.Heartbeat{Host: "home", At: time.Unix(1_800_000_000, 0).UTC(), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: strings.Repeat("ab", 32)}}})
	for _, s := range []string{"{}\n", `{"host":"home","at":"never"}` + "\n", `{"host":"home","at":"9999-12-31T23:59:59Z","repositories":[{}]}` + "\n", `{"repositories":null,"host":"\u0000"}` + "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) { readsBack[pushwire.Heartbeat](t, text) })
}

// A name that is taken is one folder, and no other.
func FuzzCheckRepository(f *testing.F) {
	for _, s := range []string{"photos", "a.b-c_d", "..", "", "a/b", ".x", "-x", "x\n", strings.Repeat("n", 129), "ä"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if pushwire.CheckRepository(name) != nil {
			return
		}
		if name == "" || name == "." || name == ".." || len(name) > 128 || name[0] == '.' || name[0] == '-' || strings.ContainsAny(name, "/\\\x00\n\r \"'$`*?~") {
			t.Errorf("%q is taken for a repository's name", name)
		}
	})
}
