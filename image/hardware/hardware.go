// Package hardware says what the image must drive: the modules that no bus
// announces, what each supported board needs, and a check that a set of modules
// covers it. The check works from the boards' own device trees and from the
// aliases in the drivers, so it notices when a kernel update renames, drops or
// splits a driver. It cannot tell whether a driver works.
package hardware

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"farkeep/image/fdt"
	"farkeep/image/kmodules"
	"farkeep/shared/card"
	"farkeep/shared/modname"
)

// AlwaysLoaded lists modules that the appliance loads on every machine, in this
// order, before it looks at any modalias. Each was missed once: nothing in
// depmod's files leads to it.
func AlwaysLoaded() []string {
	return []string{
		"softdog",      // first, so that a machine whose own watchdog is unusable has one
		"phy_generic",  // USB comes 10 s late without it (deferred probe)
		"bcm2835_rng",  // getrandom blocks for 20 s without it on a Pi 3
		"iproc_rng200", // the same on a Pi 4
		"crc32c_generic",
		"ext4",
		"nls_cp437", "nls_iso8859_1", "nls_ascii", "nls_utf8",
		"vfat",
		"dm_mod", "dm_crypt",
		"chacha_neon", "nhpoly1305_neon", "adiantum",
		"aes_neon_blk", "xts",
		"wireguard",
		// Ethernet PHYs: the kernel asks modprobe for them, which does not exist
		// here, and a generic driver that comes first gets the delays wrong.
		"broadcom", "microchip", "smsc",
		"bcm2835_wdt", // also what restarts and powers off a Pi; opening it is what arms it
	}
}

// onDemand lists what is loaded by modalias from buses that a device tree does
// not describe: USB disks and network adapters, PCI, virtio.
func onDemand() []string {
	return []string{
		"usb_storage", "uas", "sd_mod",
		"smsc95xx", "smsc75xx", "lan78xx", // on the Pi 3's own boards
		"r8152", "ax88179_178a", "asix", "cdc_ether", "cdc_ncm", "rndis_host", // adapters for a Zero 2 W or 3 A+, and QEMU's
		"xhci_pci", "i6300esb",
		"virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_scsi",
		"aes_ce_blk", // AES instructions where a machine has them
		"raspberrypi_cpufreq", "cpufreq_dt",
		"ledtrig_timer",
	}
}

// wanted lists the parts of the kernel tree whose drivers go into the image
// when a supported board's device tree asks for them; the rest (graphics,
// sound, cameras, radios) stays out.
var wanted = []string{
	"kernel/drivers/char/hw_random/", "kernel/drivers/clk/", "kernel/drivers/gpio/", "kernel/drivers/hwmon/",
	"kernel/drivers/leds/", "kernel/drivers/mmc/", "kernel/drivers/net/ethernet/", "kernel/drivers/net/mdio/",
	"kernel/drivers/net/phy/", "kernel/drivers/nvmem/", "kernel/drivers/pci/", "kernel/drivers/phy/",
	"kernel/drivers/regulator/", "kernel/drivers/reset/", "kernel/drivers/soc/", "kernel/drivers/thermal/",
	"kernel/drivers/usb/", "kernel/drivers/watchdog/", "kernel/drivers/mfd/", "kernel/drivers/pmdomain/",
}

// Modules returns the modules that belong into the image, closed over their
// dependencies, for boards with the given device trees.
func Modules(ix *kmodules.Index, trees [][]fdt.Node) ([]string, error) {
	roots := append(AlwaysLoaded(), onDemand()...)
	for _, tree := range trees {
		for _, node := range tree {
			modules, _ := ix.Lookup(kmodules.OF(node.Compatible))
			for _, m := range modules {
				if slices.ContainsFunc(wanted, func(dir string) bool { return strings.HasPrefix(ix.Path(m), dir) }) {
					roots = append(roots, m)
				}
			}
		}
	}
	return ix.Closure(roots)
}

// Need is one function that a board must be able to do.
type Need struct {
	Function string // "SD card", "USB", "network", "GPIO", "watchdog", "random numbers"
	// Device is what the board announces: a "compatible" name that its device
	// tree must hold, or a modalias of a bus that the tree does not describe.
	Device string
	// Builtin names the driver in the kernel where it carries no alias. For a
	// "compatible" name it counts only if the kernel image holds that name too.
	Builtin string
}

// Needs returns what a supported board must be able to do.
func Needs(b card.Board) []Need {
	const (
		sdhost   = "brcm,bcm2835-sdhost"
		dwc2     = "brcm,bcm2835-usb"
		wdt      = "platform:bcm2835-wdt" // made by bcm2835_pm
		pinctrl  = "pinctrl-bcm2835"
		diskUSB  = "usb:v0000p0000d0000dc00dsc00dp00ic08isc06ip50in00" // any USB mass storage, bulk only
		diskUAS  = "usb:v0000p0000d0000dc00dsc00dp00ic08isc06ip62in00"
		diskSCSI = "scsi:t-0x00"
	)
	disk := []Need{{"USB", diskUSB, ""}, {"USB", diskUAS, ""}, {"USB", diskSCSI, ""}}
	bcm2837 := append([]Need{
		{"SD card", sdhost, ""}, {"SD card", "brcm,bcm2835-sdhci", ""},
		{"USB", dwc2, ""}, {"USB", "usb-nop-xceiv", ""},
		{"GPIO", "brcm,bcm2835-gpio", pinctrl},
		{"watchdog", "brcm,bcm2835-pm", "bcm2835-pm"}, {"watchdog", wdt, ""},
		{"random numbers", "brcm,bcm2835-rng", ""},
	}, disk...)
	// A USB Ethernet adapter is the only wire on boards without a socket; these
	// are the Realtek and ASIX chips that most adapters have.
	adapter := []Need{
		{"network", "usb:v0BDAp8152d2000dc00dsc00dp00icFFiscFFip00in00", ""},
		{"network", "usb:v0B95p1790d0100dcFFdscFFdp00icFFiscFFip00in00", ""},
	}
	switch b.Compatible {
	case "raspberrypi,3-model-b":
		return append(bcm2837, Need{"network", "usb424,ec00", ""},
			// QEMU's usb-net, in place of the chip that it does not emulate.
			Need{"network", "usb:v0525pA4A2d0000dc02dsc00dp00ic02isc06ip00in00", ""})
	case "raspberrypi,3-model-b-plus":
		return append(bcm2837, Need{"network", "usb424,7800", ""})
	case "raspberrypi,3-model-a-plus", "raspberrypi,model-zero-2-w":
		return append(bcm2837, adapter...)
	case "raspberrypi,4-model-b":
		return append([]Need{
			{"SD card", "brcm,bcm2711-emmc2", ""},
			{"USB", "brcm,bcm2711-pcie", "pcie-brcmstb"}, {"USB", "raspberrypi,firmware-reset", ""},
			{"USB", "pci:v00001106d00003483sv00001106sd00003483bc0Csc03i30", ""}, // the VL805 behind it
			{"network", "brcm,bcm2711-genet-v5", ""}, {"network", "brcm,genet-mdio-v5", ""},
			{"network", "mdio:01100000000011011000010010100010", ""}, // BCM54213PE PHY, id 0x600d84a2
			{"GPIO", "brcm,bcm2711-gpio", pinctrl},
			{"watchdog", "brcm,bcm2711-pm", "bcm2835-pm"}, {"watchdog", wdt, ""},
			{"random numbers", "brcm,bcm2711-rng200", ""},
		}, disk...)
	case "linux,dummy-virt":
		return append([]Need{
			{"SD card", "virtio:d00000002v00000000", ""}, // a disk plays the card
			{"SD card", "virtio,mmio", ""},
			{"USB", "pci-host-ecam-generic", "pci-host-generic"},
			{"USB", "pci:v00001B36d0000000Dsv00001AF4sd00001100bc0Csc03i30", ""}, // qemu-xhci
			{"network", "virtio:d00000001v00000000", ""},
			{"network", "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00", "virtio_pci"},
			{"GPIO", "amba:00041061", "gpio-pl061"},
			{"watchdog", "pci:v00008086d000025ABsv00001AF4sd00001100bc08sc80i00", ""}, // i6300esb
			{"random numbers", "virtio:d00000004v00000000", ""},
		}, disk...)
	}
	return nil
}

// Functions are the ones that every board must have.
func Functions() []string {
	return []string{"SD card", "USB", "network", "GPIO", "watchdog", "random numbers"}
}

// Driver is what satisfies a need.
type Driver struct {
	Need
	Modules []string // in the image
	Builtin []string // in the kernel
}

// Check shows for every need of a board which module of the image or which
// built-in driver satisfies it, or says what is missing. ix is the index of the
// image's modules, kernel the raw kernel image, tree the board's device tree;
// a board that brings its own tree may have none here (nil), then the tree is
// not asked whether it announces the device.
func Check(b card.Board, tree []fdt.Node, ix *kmodules.Index, kernel []byte) ([]Driver, error) {
	needs := Needs(b)
	var drivers []Driver
	var missing []error
	for _, function := range Functions() {
		if !slices.ContainsFunc(needs, func(n Need) bool { return n.Function == function }) {
			missing = append(missing, fmt.Errorf("%s: nothing is known about its %s", b.Name, function))
		}
	}
	for _, need := range needs {
		d, err := check(need, tree, ix, kernel)
		if err != nil {
			missing = append(missing, fmt.Errorf("%s: %s: %w", b.Name, need.Function, err))
			continue
		}
		drivers = append(drivers, d)
	}
	return drivers, errors.Join(missing...)
}

func check(need Need, tree []fdt.Node, ix *kmodules.Index, kernel []byte) (Driver, error) {
	d := Driver{Need: need}
	modalias := need.Device
	if !isModalias(need.Device) {
		modalias = kmodules.OF([]string{need.Device})
		if tree != nil {
			i := slices.IndexFunc(tree, func(n fdt.Node) bool { return slices.Contains(n.Compatible, need.Device) })
			if i < 0 {
				return d, fmt.Errorf("the device tree does not announce %s", need.Device)
			}
			modalias = kmodules.OF(tree[i].Compatible)
		}
		if usb, ok := usbID(need.Device); ok {
			modalias = usb
		}
	}
	d.Modules, d.Builtin = ix.Lookup(modalias)
	if len(d.Modules)+len(d.Builtin) > 0 {
		return d, nil
	}
	named := isModalias(need.Device) || bytes.Contains(kernel, []byte(need.Device+"\x00"))
	if need.Builtin != "" && ix.Builtin(need.Builtin) && named {
		d.Builtin = []string{modname.Canonical(need.Builtin)}
		return d, nil
	}
	return d, fmt.Errorf("no module of the image and no built-in driver claims %s", modalias)
}

func isModalias(device string) bool {
	bus, _, ok := strings.Cut(device, ":")
	return ok && !strings.Contains(bus, ",")
}

// usbID turns the "compatible" name of a soldered USB device, usbVID,PID, into
// the modalias that the USB bus will announce.
func usbID(compatible string) (string, bool) {
	id, ok := strings.CutPrefix(compatible, "usb")
	vendor, product, ok2 := strings.Cut(id, ",")
	if !ok || !ok2 || len(vendor) > 4 || len(product) > 4 {
		return "", false
	}
	return fmt.Sprintf("usb:v%04sp%04sd0000dcFFdsc00dp01icFFisc00ipFFin00",
		strings.ToUpper(vendor), strings.ToUpper(product)), true
}
