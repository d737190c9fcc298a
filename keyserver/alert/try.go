package alert

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"farkeep/shared/courier"
	"farkeep/shared/letter"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"
)

// Try mails a test straight to the provider and returns when it is accepted. It
// leaves nothing behind and is not counted against any limit: only a person at
// the key server can ask for it.
func Try(ctx context.Context, m settings.Mail, keyServer string, now time.Time) error {
	dir, err := os.MkdirTemp("", "farkeep-test-mail-")
	if err != nil {
		return fmt.Errorf("send a test mail: %w", err)
	}
	defer os.RemoveAll(dir)
	id := outbox.ID(0, "test", uint32(now.UnixNano()))
	text, err := letter.Letter{
		ID: id, Subject: subjectPrefix + "a test mail from " + keyServer, Date: now,
		Body: "Somebody at the key server " + keyServer + " asked for this mail, with \"farkeep-keyserver check --mail\".\nIt arrives: so will the others.\n",
	}.Text(m.From, m.To)
	if err != nil {
		return fmt.Errorf("send a test mail: %w", err)
	}
	if err := outbox.Put(dir, id, text); err != nil {
		return fmt.Errorf("send a test mail: %w", err)
	}
	k, err := courier.New(courier.Config{
		Outbox: dir, Sent: []string{filepath.Join(dir, "sent.json")}, Mail: m,
		Now: func() time.Time { return now }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return fmt.Errorf("send a test mail: %w", err)
	}
	if _, err := k.Step(ctx); err != nil {
		return fmt.Errorf("send a test mail: %w", err)
	}
	k.Wait()
	switch r := k.Report(); {
	case len(k.Sent()) == 1 && r.LastError != "":
		return fmt.Errorf("send a test mail: not every recipient takes it: %s", r.LastError)
	case len(k.Sent()) == 1:
		return nil
	case r.LastError != "":
		return fmt.Errorf("send a test mail: %s", r.LastError)
	}
	return fmt.Errorf("send a test mail: %w", errors.Join(errors.New("it was not accepted"), ctx.Err()))
}
