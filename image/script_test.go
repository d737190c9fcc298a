package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/blake2b"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		program: func() {
			// A careless umask, so that modes which depend on it are found.
			unix.Umask(0)
			os.Exit(run(context.Background(), os.Args[1:], &Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv}))
		},
	})
}

func TestSiteScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/site",
		RequireExplicitExec: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fingerprints": fingerprints,
			"private":      private,
			"secretless":   secretless,
			"replace":      replace,
		},
	})
}

// fingerprints writes the hash of every file below a folder to a file.
func fingerprints(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: fingerprints folder file")
	}
	var lines []string
	ts.Check(filepath.WalkDir(ts.MkAbs(args[0]), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		lines = append(lines, fmt.Sprintf("%x %s", blake2b.Sum256(text), path))
		return err
	}))
	sort.Strings(lines)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(strings.Join(lines, "\n")), 0o600))
}

// private checks that everything below a folder but the READMEs and site.toml
// is for its owner's eyes.
func private(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: private folder")
	}
	n := 0
	ts.Check(filepath.WalkDir(ts.MkAbs(args[0]), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if base := e.Name(); base != "README.txt" && base != "site.toml" && info.Mode().Perm()&0o077 != 0 {
			ts.Fatalf("%s has mode %04o", path, info.Mode().Perm())
		}
		n++
		return nil
	}))
	if n < 5 {
		ts.Fatalf("%s holds %d files: too few to be a site", args[0], n)
	}
}

// secretless checks that no private key, passphrase or password is in the last
// command's output.
func secretless(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: secretless")
	}
	for _, stream := range []string{"stdout", "stderr"} {
		text := ts.ReadFile(stream)
		for _, secret := range []string{"PRIVATE KEY", "correct horse", "four words", "PresharedKey", "PrivateKey"} {
			if strings.Contains(text, secret) {
				ts.Fatalf("%q is in %s", secret, stream)
			}
		}
	}
}

// replace changes the first occurrence of a text in a file.
func replace(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: replace file old new")
	}
	path := ts.MkAbs(args[0])
	info, err := os.Stat(path)
	ts.Check(err)
	text := ts.ReadFile(args[0])
	if !strings.Contains(text, args[1]) {
		ts.Fatalf("%s holds no %q", args[0], args[1])
	}
	ts.Check(os.WriteFile(path, []byte(strings.Replace(text, args[1], args[2], 1)), info.Mode().Perm()))
}
