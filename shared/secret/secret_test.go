package secret_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"farkeep/shared/secret"
)

func TestSecretsNeverPrint(t *testing.T) {
	const clear = "correct horse"
	var log bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&log, nil))
	b, txt := secret.New([]byte(clear)), secret.Text(clear)
	holder := struct {
		B secret.Bytes
		T secret.Text
	}{b, txt}

	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+" "+verb+" "+verb+"\n", b, txt, holder)
	}
	j, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	logger.Info("x", "b", b, "t", txt, "h", holder)
	out.Write(log.Bytes())
	if s := out.String(); strings.Contains(s, clear) || strings.Contains(s, fmt.Sprintf("%x", clear)) {
		t.Errorf("a secret was printed: %s", s)
	}
	if string(b.Reveal()) != clear || txt.Reveal() != clear {
		t.Error("Reveal does not return the secret")
	}
	b.Wipe()
	if !bytes.Equal(b.Reveal(), make([]byte, len(clear))) {
		t.Error("Wipe left bytes behind")
	}
}

func TestReadAllIsBounded(t *testing.T) {
	got, err := secret.ReadAll(strings.NewReader("12345678"), 8)
	if err != nil || string(got.Reveal()) != "12345678" {
		t.Errorf("at the limit: %q, %v", got.Reveal(), err)
	}
	if _, err := secret.ReadAll(strings.NewReader("123456789"), 8); !errors.Is(err, secret.ErrTooLong) {
		t.Errorf("over the limit: %v", err)
	}
}
