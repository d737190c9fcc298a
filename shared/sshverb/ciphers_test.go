package sshverb

import (
	"slices"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"
)

// A processor without AES instructions must not even offer AES-GCM: the other
// side would choose it.
func TestCiphers(t *testing.T) {
	quick := []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305}
	for _, tt := range []struct {
		name       string
		x86, arm64 bool
		want       []string
	}{
		{"Pi 3, Pi 4, Zero 2 W, old x86", false, false, []string{ssh.CipherChaCha20Poly1305}},
		{"x86 with AES", true, false, quick},
		{"arm64 with AES", false, true, quick},
	} {
		if got := ciphers(tt.x86, tt.arm64); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	if got, want := algorithms().Ciphers, ciphers(cpu.X86.HasAES, cpu.ARM64.HasAES); !slices.Equal(got, want) {
		t.Errorf("this processor offers %q, want %q", got, want)
	}
}
