package modname_test

import (
	"strings"
	"testing"

	"farkeep/shared/modname"
)

func TestCanonical(t *testing.T) {
	for s, want := range map[string]string{
		"ext4": "ext4", "usb-storage": "usb_storage", "phy_generic": "phy_generic",
		"kernel/drivers/usb/storage/usb-storage.ko": "usb_storage", "kernel/fs/ext4/ext4.ko.xz": "ext4", ".ko": ".ko",
	} {
		if got := modname.Canonical(s); got != want {
			t.Errorf("Canonical(%q) = %q; want %q", s, got, want)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"", "x", false}, {"*", "", true}, {"*", "anything", true}, {"a*c", "abbbc", true}, {"a*c", "abbb", false},
		{"a?c", "abc", true}, {"a?c", "ac", false}, {"[a-c]x", "bx", true}, {"[a-c]x", "dx", false}, {"[abc]x", "cx", true},
		{"[0-9]*[0-9]", "1x2", true}, {"a[", "a[", true}, {"a[", "ab", false}, {"**a**", "bab", true}, {"*.ko", "x.ko.ko", true},
		{strings.Repeat("a*", 200) + "b", strings.Repeat("a", 5000), false}, // would never end if it backtracked
		{"a", "", false},
		{"", "a", false},
		{"of:N*T*Cbrcm,bcm2835-gpio", "of:NTCbrcm,bcm2835-gpio", true},
		{"of:N*T*Cbrcm,bcm2835-gpio", "of:NgpioT(null)Cbrcm,bcm2711-gpioCbrcm,bcm2835-gpio", true},
		{"of:N*T*Cbrcm,bcm2835-gpio", "of:NTCbrcm,bcm2835-gpio-x", false},
		{"usb:v0424pEC00d*dc*", "usb:v0424pEC00d0200dcFF", true},
		{"pci:v*d*sv*sd*bc0Csc03i30*", "pci:v00001106d00003483sv00001106sd00003483bc0Csc03i30", true},
		{"pci:v*d*sv*sd*bc0Csc03i30*", "pci:v00001106d00003483sv00001106sd00003483bc0Csc03i20", false},
		{"acpi*:[A-F]?:x", "acpi7:C1:x", true},
		{"acpi*:[A-F]?:x", "acpi7:G1:x", false},
		{"mdio:0110????", "mdio:01101010", true},
		{"[", "[", true},
		{"a*b*c", "aXXbYYc", true},
		{"a*b*c", "aXXbYY", false},
	} {
		if got := modname.Match(tt.pattern, tt.s); got != tt.want {
			t.Errorf("Match(%.20q, %.20q) = %v", tt.pattern, tt.s, got)
		}
	}
}

func TestMatchTakesBoundedTime(t *testing.T) {
	// Exponential matchers do not come back from this one.
	if modname.Match(strings.Repeat("a*", 50)+"b", strings.Repeat("a", 5000)) {
		t.Error("matched")
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("a*[b-d]?", "axxcz")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		// What has no special characters matches itself alone.
		if !strings.ContainsAny(pattern, "*?[") && modname.Match(pattern, s) != (pattern == s) {
			t.Errorf("Match(%q, %q)", pattern, s)
		}
		if !modname.Match("*"+s[:0]+"*", s) {
			t.Errorf("** does not match %q", s)
		}
		if modname.Match(pattern, s) && !modname.Match("*"+pattern, "x"+s) {
			t.Errorf("Match(%q, %q), but not with a star before", pattern, s)
		}
	})
}
