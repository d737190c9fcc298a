package staging

import (
	"errors"
	"fmt"
	"io/fs"

	"farkeep/shared/manifest"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// refusal is an answer with words of ours and a number of SFTP's.
type refusal struct {
	text  string
	code  error // of package sftp
	quiet bool  // clients ask on purpose, and know what it means
}

func (r *refusal) Error() string { return r.text }

// Unwrap lets package sftp find the number.
func (r *refusal) Unwrap() error { return r.code }

// refuse makes an answer that is neither "no such file" nor "permission denied".
func refuse(format string, args ...any) error {
	return &refusal{text: fmt.Sprintf(format, args...), code: sftp.ErrSSHFxFailure}
}

func deny(format string, args ...any) error {
	return &refusal{text: fmt.Sprintf(format, args...), code: sftp.ErrSSHFxPermissionDenied}
}

// errCommitting is the answer to whoever changes a copy during its commit.
var errCommitting = refuse("the repository is being committed: try again when that is done")

// errLinks is the answer to links.
var errLinks = deny("links are not kept: upload what the link points to")

// answer turns an error into what a peer may learn: nothing about the appliance's
// own paths.
func answer(err error) error {
	var told *refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &told):
		return told
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return sftp.ErrSSHFxNoSuchFile
	case errors.Is(err, fs.ErrPermission):
		return sftp.ErrSSHFxPermissionDenied
	case errors.Is(err, fs.ErrExist), errors.Is(err, unix.ENOTEMPTY):
		return &refusal{text: "there is something of that name already, or the folder is not empty", code: sftp.ErrSSHFxFailure, quiet: true}
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return refuse("no space left on the appliance's disk")
	case errors.Is(err, manifest.ErrPath):
		return refuse("%v", err)
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
		return deny("there is a link or a mount in the path")
	case errors.Is(err, unix.EISDIR):
		return refuse("it is a folder")
	case errors.Is(err, unix.EINVAL):
		return refuse("that is not possible")
	}
	return refuse("the appliance could not do it; its log says why")
}
