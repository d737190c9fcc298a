package seal

// Light makes a passphrase cheap, for tests.
func Light(p Passphrase) Passphrase {
	p.work = 10
	return p
}
