package luksfile

import "farkeep/shared/volumekey"

// ErrWrongKey means that a key opens none of a volume's slots.
var ErrWrongKey = volumekey.ErrWrongKey
