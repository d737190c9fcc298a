package generations

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"farkeep/shared/manifest"
)

// Target is where pushes go: a folder ([Store.Target]), or an appliance by SSH.
// A Target is safe for concurrent use with different repositories.
type Target interface {
	// Offer says what the repository is now. open is called when the target
	// wants the manifest itself; it may be called more than once, and gives the
	// same bytes each time. With answer "same" there is no Push: the newest
	// generation was confirmed. Refusals are errors.
	Offer(ctx context.Context, repository string, h Header, open func() (io.ReadCloser, error)) (Answer, Push, error)
}

// Push is a push under way. Close must be called; it keeps what was uploaded
// for the next attempt.
type Push interface {
	// Upload has write send a recipe stream of the entries in Answer.Missing. After
	// an error, the way to go on is a new Offer, whose answer is up to date.
	Upload(ctx context.Context, write func(io.Writer) error) (Received, error)
	// Commit makes the generation and returns its name.
	Commit(ctx context.Context) (string, error)
	// Abort gives the push up and discards what was uploaded.
	Abort(ctx context.Context) error
	Close() error
}

// MaxHeader bounds the header's line, in bytes.
const MaxHeader = 4096

// Header is an offer's first line: JSON, then a newline.
type Header struct {
	Digest       manifest.Sum `json:"digest"`
	Entries      int64        `json:"count"` // files and folders
	Bytes        int64        `json:"bytes"`
	RepositoryID string       `json:"repository_id,omitempty"` // Borg's own, 64 hexadecimal digits
	Kind         string       `json:"kind"`                    // KindBorg1, KindTree
}

// The kinds of repositories.
const (
	KindBorg1 = "borg1"
	KindTree  = "tree"
)

// HeaderOf makes the header of a manifest.
func HeaderOf(s manifest.Summary, kind, repositoryID string) Header {
	return Header{Digest: s.Digest, Entries: s.Entries, Bytes: s.Bytes, Kind: kind, RepositoryID: repositoryID}
}

// Check refuses a header that no manifest can have.
func (h Header) Check() error {
	if h.Entries < 0 || h.Entries > manifest.MaxEntries {
		return fmt.Errorf("offer of %d entries: 0 to %d are possible", h.Entries, manifest.MaxEntries)
	}
	if h.Bytes < 0 || h.Bytes > manifest.MaxBytes {
		return fmt.Errorf("offer of %d bytes: 0 to %d are possible", h.Bytes, int64(manifest.MaxBytes))
	}
	if h.Kind != KindBorg1 && h.Kind != KindTree {
		return fmt.Errorf("offer of kind %.32q: %s and %s are known", h.Kind, KindBorg1, KindTree)
	}
	if len(h.RepositoryID) > 64 {
		return errors.New("offer with a repository id of more than 64 characters")
	}
	for _, c := range h.RepositoryID {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return errors.New("offer with a repository id that is not hexadecimal")
		}
	}
	return nil
}

// What an offer can be answered with.
const (
	Same         = "same"          // the newest generation is that; it was confirmed
	SendManifest = "send-manifest" // the other side shall send the manifest
	Send         = "send"          // the other side shall upload what is missing, then commit
)

// Answer is what an offer was answered with: one line of JSON, after "send"
// followed by the set Missing in the encoding of package manifest.
type Answer struct {
	Answer     string    `json:"answer"`
	Generation string    `json:"generation,omitempty"` // Same: the newest
	Push       string    `json:"push,omitempty"`       // Send: the id for upload and commit
	Base       string    `json:"base,omitempty"`       // Send: the generation that recipes copy from; "" for none
	Need       int64     `json:"need"`                 // Send: files to upload
	Bytes      int64     `json:"bytes"`                // Send: their sizes, what is there already not counted
	Resume     []Partial `json:"resume,omitempty"`     // Send: half-built files

	// BaseDigest is the digest of Base's manifest, zero for none: the pusher
	// knows by it whether it remembers what Base holds.
	BaseDigest *manifest.Sum `json:"base_digest,omitempty"`

	// Missing are the files to upload, by their index in the offered manifest.
	Missing *manifest.Set `json:"-"`
}

// Partial is a file of which the receiver has the beginning. A recipe may begin
// with Keep of at most Have bytes.
type Partial struct {
	Index int64 `json:"index"`
	Have  int64 `json:"have"`
}

// MaxPartials bounds Answer.Resume.
const MaxPartials = 16

// Received is what an upload brought: one line of JSON on the wire.
type Received struct {
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"`
}

// Committed is a commit's answer on the wire: one line of JSON.
type Committed struct {
	Generation string `json:"generation"`
}

// ReadHeader reads a header's line, and no byte more than r buffers.
func ReadHeader(r *bufio.Reader) (Header, error) {
	var h Header
	if err := readLine(r, MaxHeader, &h); err != nil {
		return h, fmt.Errorf("read the offer: %w", err)
	}
	return h, h.Check()
}

// WriteHeader writes the line that ReadHeader reads.
func WriteHeader(w io.Writer, h Header) error { return writeLine(w, h) }

// ReadAnswer reads an answer to an offer of a manifest of n entries, with the
// set of missing files where there is one.
func ReadAnswer(r *bufio.Reader, n int64) (Answer, error) {
	var a Answer
	if err := readLine(r, MaxHeader, &a); err != nil {
		return a, fmt.Errorf("read the answer to an offer: %w", err)
	}
	switch a.Answer {
	case Same, SendManifest:
		return a, nil
	case Send:
	default:
		return a, fmt.Errorf("read the answer to an offer: %.64q is no known answer", a.Answer)
	}
	set, err := manifest.ReadSet(r, n)
	if err != nil {
		return a, fmt.Errorf("read the answer to an offer: %w", err)
	}
	if set.Len() != a.Need || len(a.Resume) > MaxPartials {
		return a, fmt.Errorf("read the answer to an offer: %d files are said to be missing, %d are listed", a.Need, set.Len())
	}
	a.Missing = set
	return a, nil
}

// WriteAnswer writes what ReadAnswer reads.
func WriteAnswer(w io.Writer, a Answer) error {
	if err := writeLine(w, a); err != nil {
		return err
	}
	if a.Answer == Send {
		_, err := a.Missing.WriteTo(w)
		return err
	}
	return nil
}

func writeLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// readLine reads one line of JSON of at most limit bytes. Unknown fields are
// left alone, so that a newer side may say more.
func readLine(r *bufio.Reader, limit int, v any) error {
	var line []byte
	for {
		b, err := r.ReadByte()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if b == '\n' {
			break
		}
		if len(line) == limit {
			return fmt.Errorf("a line of more than %d bytes", limit)
		}
		line = append(line, b)
	}
	return json.Unmarshal(line, v)
}
