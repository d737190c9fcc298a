package emulate

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"farkeep/image/emulate/bootloader"
)

// Machine names the hardware that is emulated.
type Machine string

const (
	// RaspberryPi3 is a Raspberry Pi 3B: SD card, USB disk, USB network card, GPIO relay, and no clock that
	// survives power loss. Its USB network carries 0.1 to 0.25 MB/s.
	RaspberryPi3 Machine = "raspi3b"
	// Generic is QEMU's "virt" machine with one Cortex-A53: virtio disk and network (about 20 MB/s), a USB
	// disk behind an XHCI controller, a PL061 with eight GPIO lines for the relay, a clock, a watchdog.
	Generic Machine = "virt"
)

// Where the parts of each machine sit, by the names that QEMU's arguments and device_add share.
const (
	diskNode   = "usbdisk"
	diskDevice = "stick"
	gibibyte   = 1 << 30
)

// board is the machine's word in config.txt.
func (m Machine) board() bootloader.Board {
	if m == RaspberryPi3 {
		return bootloader.Pi3B
	}
	return bootloader.Generic
}

// words are added to the image's kernel command line, because of what is emulated differently.
func (m Machine) words() string {
	// The last console= becomes /dev/console; both machines' first serial port is a PL011. On a real Pi 3 it
	// serves Bluetooth, so the image's own command line names another one.
	const console = "console=ttyAMA0,115200"
	if m == RaspberryPi3 {
		// The emulated BCM2835 watchdog resets the machine as soon as it is opened.
		return console + " farkeep.watchdog=softdog"
	}
	return console
}

// memory is where the machine's RAM begins in its physical address space, and its size in bytes.
func (m Machine) memory() (base, size uint64) {
	if m == RaspberryPi3 {
		// Above lie the peripherals, whose registers change when they are read.
		return 0, 0x3f000000
	}
	return gibibyte, gibibyte
}

// diskArguments are device_add's arguments for the USB disk. Explicit ports keep the guest's names stable.
func (m Machine) diskArguments() map[string]any {
	args := map[string]any{
		"driver": "usb-storage",
		"id":     diskDevice,
		"drive":  diskNode,
		"serial": "FARKEEP-EMULATED",
	}
	if m == RaspberryPi3 {
		args["bus"], args["port"] = "usb-bus.0", "1.1"
	} else {
		args["bus"], args["port"] = "xhci.0", "1"
	}
	return args
}

// files are the boot files that a QEMU process reads, outside the image because QEMU wants them so.
type files struct {
	kernel, initramfs, deviceTree string // "" for none
	commandLine                   string
}

// arguments are QEMU's. The machine starts stopped, with its control connection on file descriptor 3 and
// its first serial port on standard output.
func arguments(cfg *Config, f files) []string {
	args := []string{
		"-nodefaults", "-display", "none", "-monitor", "none",
		// One thread for all emulated CPUs: on hosts with few CPUs the threads of "multi" spend their time
		// waiting for each other, and a Pi takes more than twice as long to boot.
		"-accel", "tcg,thread=single",
		// A restart of the guest ends QEMU, because a real boot loader would read its slot afresh.
		"-action", "reboot=shutdown,shutdown=poweroff,panic=none",
		"-S",
		"-chardev", "socket,id=control,fd=3", "-mon", "chardev=control,mode=control",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", f.kernel,
		"-append", f.commandLine,
	}
	if f.initramfs != "" {
		args = append(args, "-initrd", f.initramfs)
	}
	if f.deviceTree != "" {
		args = append(args, "-dtb", f.deviceTree)
	}

	// Both disks skip the host's flushes ("unsafe"): they guard against the host's power loss, and what
	// QEMU has written survives its own death in the host's page cache.
	image := "file=" + escape(cfg.Image) + ",format=raw,cache=unsafe"
	network := "user,id=net"
	for _, fw := range cfg.HostForward {
		network += fmt.Sprintf(",hostfwd=%s:127.0.0.1:%d-:%d", fw.network(), fw.HostPort, fw.GuestPort)
	}
	args = append(args, "-netdev", network)

	switch cfg.Machine {
	case RaspberryPi3:
		args = append(args,
			"-M", "raspi3b", "-smp", "4", "-m", "1G",
			"-serial", "null", // the second serial port, which nobody reads
			"-drive", "if=sd,"+image,
			"-device", "usb-hub,id=hub,bus=usb-bus.0,port=1",
			"-device", "usb-net,netdev=net,bus=usb-bus.0,port=1.2",
		)
	case Generic:
		rtc := "base=utc"
		if !cfg.RTC.IsZero() {
			rtc = "base=" + cfg.RTC.UTC().Format("2006-01-02T15:04:05")
		}
		args = append(args,
			"-M", "virt", "-cpu", "cortex-a53", "-smp", "1", "-m", "1G",
			"-rtc", rtc,
			"-drive", "if=none,id=sd,"+image,
			"-device", "virtio-blk-pci,drive=sd",
			// No boot ROM: it would need the package ipxe-qemu, and nobody boots from the network.
			"-device", "virtio-net-pci,netdev=net,romfile=",
			"-device", "qemu-xhci,id=xhci",
			"-device", "i6300esb", "-action", "watchdog=reset",
		)
	}
	if cfg.DiskServer != "" {
		args = append(args, "-blockdev", "driver=nbd,node-name="+diskNode+",server.type=unix,server.path="+escape(cfg.DiskServer))
	} else if cfg.Disk != "" {
		// -blockdev, because a -drive is deleted together with its device, and this one comes back.
		args = append(args, "-blockdev", "driver=raw,node-name="+diskNode+
			",cache.no-flush=on,file.driver=file,file.cache.no-flush=on,file.filename="+escape(cfg.Disk))
	}
	return args
}

// escape doubles the commas of a file name, as QEMU's option parser wants.
func escape(name string) string {
	out := make([]byte, 0, len(name))
	for i := range len(name) {
		if name[i] == ',' {
			out = append(out, ',')
		}
		out = append(out, name[i])
	}
	return string(out)
}

// Forward makes a port of the guest reachable on the host's loopback, as its LAN would reach it.
type Forward struct {
	UDP       bool // TCP if false
	HostPort  uint16
	GuestPort uint16
}

func (f Forward) network() string {
	if f.UDP {
		return "udp"
	}
	return "tcp"
}

// Address is where the host reaches the guest's port.
func (f Forward) Address() string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(f.HostPort)))
}

// HostAddress is where a guest reaches servers on the host's loopback (QEMU's user network).
const HostAddress = "10.0.2.2"

// pollInterval is how often the relay's line is looked at. A shorter pulse goes unseen.
const pollInterval = 40 * time.Millisecond
