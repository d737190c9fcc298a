// Package target says what the pusher needs of a place that keeps generations:
// an appliance, or a local folder.
//
// A push is Offer, then, unless the answer is "same", Upload and Commit, which a
// [Finisher] takes in one. Until Commit returns nil nothing has changed for a reader
// of the target; after it the new generation is durable. Every operation may be repeated: an offer that
// was cut is offered again, and the answer then asks only for what is still
// missing; a commit that was cut is committed again and names the same generation.
//
// Errors say themselves what to do with them: [Temporary] ones are worth another
// attempt of the whole push, with the same manifest; all others are final.
package target

import (
	"context"
	"errors"
	"io"

	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// Target keeps generations. One push at a time may be under way; Status may be
// called at any time. Cancelling ctx ends an operation soon.
type Target interface {
	// Name is the target's name in site.toml.
	Name() string

	// Far says that a line is between here and the target, where bytes are dearer
	// than processor time.
	Far() bool

	// Wake makes the target ready to take a push, and waits for that, as long as
	// ctx allows: an appliance opens its disk. It is cheap when all is ready.
	Wake(ctx context.Context) error

	// Offer says what the repository looks like now, and list has the manifest whose
	// summary the offer repeats. It may be called beside Wake.
	Offer(ctx context.Context, repository string, offer pushwire.Offer, list List) (Answer, error)

	// Upload sends one recipe stream (package shared/recipe) with the needed files,
	// in ascending order of their manifest indexes. write produces the stream; an
	// error of write ends the upload and is returned as it is. Files that were
	// complete before a cut stay with the push.
	Upload(ctx context.Context, push string, write func(w io.Writer) error) (pushwire.UploadAnswer, error)

	// Commit makes the generation of a push whose files are all there.
	Commit(ctx context.Context, push string) (pushwire.CommitAnswer, error)

	// Abort forgets a push and what was uploaded for it.
	Abort(ctx context.Context, push string) error

	// Heartbeat says that these are the newest generations of all repositories. The
	// target refuses one that is not true.
	Heartbeat(ctx context.Context, h pushwire.Heartbeat) error

	// Status asks how the target is. It needs no open disk.
	Status(ctx context.Context) (*pushwire.Status, error)

	// Close ends the connection.
	Close() error
}

// A Finisher is a target to which a push can be sent to its end without waiting for
// an answer between the steps. A target that is none is called step by step.
type Finisher interface {
	// Finish is Upload, and what end asks for behind it. Nothing of that is done
	// unless the upload was complete, nor a heartbeat counted whose push was not
	// committed. An error is the upload's, until end.Uploaded was called; after that
	// it is the commit's.
	Finish(ctx context.Context, push string, write func(w io.Writer) error, end Ending) (Finished, error)
}

// Ending is what follows an upload. Its functions are called by whoever called Finish.
type Ending struct {
	// Commit is asked once at most, after the last byte went out and before the upload
	// is answered: may the push be committed? If not, Finish is an Upload.
	Commit func() bool
	// Heartbeat makes the one to send behind the commit; nil: none.
	Heartbeat func() pushwire.Heartbeat
	// Uploaded is called when the answer to the upload is there.
	Uploaded func(pushwire.UploadAnswer)
}

// Finished is how far Finish came.
type Finished struct {
	// Commit is nil when nothing was committed behind the upload: it was not asked
	// for, or the target knows only one step at a time.
	Commit *pushwire.CommitAnswer
	// Beaten says that a heartbeat was sent behind Commit; BeatErr is what became of it.
	Beaten  bool
	BeatErr error
}

// MaxAhead bounds List.Ahead, in bytes.
const MaxAhead = 128 << 10

// List is a manifest.
type List struct {
	// Open opens the manifest, or a delta of the one with the digest base, hex, which
	// the target has; "": none. It is called only when the target asks.
	Open func(base string) (io.ReadCloser, error)
	// Ahead, if it is not nil, is what the target is likely to ask for. It may be sent
	// before it does, and Open is not called then.
	Ahead []byte
}

// Answer is the answer to an offer.
type Answer struct {
	pushwire.OfferAnswer
	// Needed are the entries to upload, for pushwire.AnswerSend; nil otherwise.
	Needed *manifest.Set
}

// Temporary reports whether another attempt may succeed where err came: the
// other side was out of reach, or the line was cut.
func Temporary(err error) bool {
	return err != nil && hint.Code(err) == hint.ExitUnreachable && !errors.Is(err, context.Canceled)
}
