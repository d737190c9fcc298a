package generations

import (
	"log/slog"
	"time"
)

// Owner is who the files shall belong to.
type Owner struct{ UID, GID int }

// Options tune a Store.
type Options struct {
	// Owner is whom everything that the store makes is given to; nil leaves it
	// with the process. It needs root; it is how a disk that is filled at home
	// belongs to the appliance's keeper.
	Owner *Owner
	// Shared lets every user of the machine read the generations (mode 0755 on the
	// store's top folders instead of 0700). The appliance wants it: its receiver
	// reads as another user.
	Shared bool
	// Reserve is how many bytes of the file system pushes leave free. 0 means a
	// fiftieth of it, at least 64 MiB and at most 4 GiB.
	Reserve int64
	// Now is the clock; nil means time.Now. ClockSet says whether it is known to
	// be right; nil means yes.
	Now      func() time.Time
	ClockSet func() bool
	Log      *slog.Logger // nil discards
}
