package boot

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"farkeep/shared/card"
	"farkeep/shared/settings"
)

func TestRelayFile(t *testing.T) {
	for _, tt := range []struct {
		name  string
		relay settings.Relay
		want  string
	}{
		{"active high idles low", settings.Relay{Driver: "gpio", Line: 17, Active: "high"}, "gpio=17=op,dl\n"},
		{"active low idles high", settings.Relay{Driver: "gpio", Line: 4, Active: "low"}, "gpio=4=op,dh\n"},
		{"no relay drives nothing", settings.Relay{Driver: "none", Line: 17}, "# no relay\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), card.RelayFile)
			if err := os.WriteFile(path, card.RelayConfig(-1, true), 0o600); err != nil {
				t.Fatal(err)
			}
			before, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := overwrite(path, relayConfig(tt.relay)); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Contains(got, []byte(tt.want)) {
				t.Errorf("relay.txt is %q, %v", got, err)
			}
			after, err := os.Stat(path)
			if err != nil || !os.SameFile(before, after) || after.Size() != before.Size() {
				t.Errorf("the file was not overwritten in place: %v, %v", after, err)
			}
		})
	}
	odd := filepath.Join(t.TempDir(), card.RelayFile)
	if err := os.WriteFile(odd, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := overwrite(odd, card.RelayConfig(17, true)); err == nil {
		t.Error("a file of another size was overwritten")
	}
}
