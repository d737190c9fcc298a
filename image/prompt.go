package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strings"

	"golang.org/x/term"

	"farkeep/shared/hint"
	"farkeep/shared/secret"
	"farkeep/shared/usage"
)

// prompt asks a person at a terminal. Without one, whatever would be asked is
// an error that names the flag instead.
type prompt struct {
	env      *Env
	in       *bufio.Reader
	terminal *os.File // nil: nobody to ask
}

func newPrompt(env *Env) *prompt {
	p := &prompt{env: env}
	if f, ok := env.Stdin.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.terminal, p.in = f, bufio.NewReader(f)
	}
	return p
}

func (p *prompt) interactive() bool { return p.terminal != nil }

// line asks a question; an empty answer means fallback, where there is one.
func (p *prompt) line(flag, question, fallback string) (string, error) {
	if !p.interactive() {
		if fallback != "" {
			return fallback, nil
		}
		return "", p.nobody(flag, question)
	}
	for range 3 {
		if fallback != "" {
			fmt.Fprintf(p.env.Stderr, "%s [%s]: ", question, fallback)
		} else {
			fmt.Fprintf(p.env.Stderr, "%s: ", question)
		}
		answer, err := p.in.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("ask for %s: %w", flag, err)
		}
		if answer = strings.TrimSpace(answer); answer != "" {
			return answer, nil
		}
		if fallback != "" {
			return fallback, nil
		}
	}
	return "", hint.Because(usage.Errorf("%s: no answer", flag), "give the flag, or run the command again: nothing was written")
}

// secret asks for something that is not shown while it is typed.
func (p *prompt) secret(flag, question string) (secret.Bytes, error) {
	if !p.interactive() {
		return secret.Bytes{}, p.nobody(flag, question)
	}
	fmt.Fprintf(p.env.Stderr, "%s: ", question)
	typed, err := term.ReadPassword(int(p.terminal.Fd()))
	fmt.Fprintln(p.env.Stderr)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("ask for %s: %w", flag, err)
	}
	return secret.New(typed), nil
}

// newSecret asks twice, because nobody sees a slip of the finger.
func (p *prompt) newSecret(flag, question string) (secret.Bytes, error) {
	first, err := p.secret(flag, question)
	if err != nil {
		return secret.Bytes{}, err
	}
	second, err := p.secret(flag, "Once more")
	defer second.Wipe()
	if err != nil {
		first.Wipe()
		return secret.Bytes{}, err
	}
	if !bytes.Equal(first.Reveal(), second.Reveal()) {
		first.Wipe()
		return secret.Bytes{}, usage.Errorf("the two were not the same")
	}
	return first, nil
}

func (p *prompt) nobody(flag, question string) error {
	return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s is missing: %s", flag, strings.ToLower(question[:1])+question[1:]), "give the flag, or run the command at a terminal, where it asks"))
}
