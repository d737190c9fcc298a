package main

import (
	"os"
	"strings"
	"testing"
)

// TestDocsNameEveryCommand finds a command that the docs forgot.
func TestDocsNameEveryCommand(t *testing.T) {
	docs, err := os.ReadFile("../docs/keyserver.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, cmd := range newRootCmd(&Env{}).Commands() {
		if !strings.Contains(string(docs), "farkeep-keyserver "+cmd.Name()) {
			t.Errorf("docs/keyserver.md does not mention %s", cmd.Name())
		}
	}
}
