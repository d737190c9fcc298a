package stage

import (
	"os"
	"strings"
	"testing"
)

// The template of site.toml and what the stages change in it must not drift apart.
func TestShortLease(t *testing.T) {
	text, err := os.ReadFile("../../shared/site/site.toml.tmpl")
	if err != nil {
		t.Fatal(err)
	}
	filled := strings.Replace(string(text), "{{q (print .KeyPolicy.Lease)}}", `"24h"`, 1)
	if short := ShortLease(filled); strings.Count(short, "\nlease = \"2m\" #") != 1 {
		t.Error("no lease became short")
	}
}
