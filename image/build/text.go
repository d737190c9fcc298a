package build

// commandLine is the kernel's, but for the words that name card and slot.
//
//   - console: the serial port on the header pins. Upstream device trees of all
//     boards call it serial1; where it does not exist the word does nothing.
//   - init_on_free: freed memory is cleared, so a key does not outlive the
//     process that held it.
//   - cryptomgr.notests: the self-tests of every cipher cost half a second.
//   - panic: a kernel that cannot go on restarts after 10 s.
//   - persist_gpio_outputs: the relay's line stays an output, and the disk as it
//     is, when the process that holds it dies.
//   - fsck and root are the appliance's business: there is no root= on purpose.
const commandLine = "console=ttyS1,115200 quiet init_on_free=1 cryptomgr.notests panic=10 " +
	"pinctrl_bcm2835.persist_gpio_outputs=Y"

// configText is config.txt of a slot: what Debian's raspi-firmware writes, and
// the lines by which boards say that they are not meant. A kernel that does not
// exist makes the firmware blink its "kernel not found" code (seven flashes).
// [pi0] holds on a Zero 2 W as well, hence the order.
const configText = `# Written by farkeep-image. See docs/image.md before changing anything.
arm_64bit=1
enable_uart=1
upstream_kernel=1
disable_splash=1
kernel=vmlinuz
initramfs initramfs.zst followkernel
include relay.txt

[pi1]
kernel=this-board-is-not-supported
[pi2]
kernel=this-board-is-not-supported
[pi5]
kernel=this-board-is-not-supported
[pi0]
kernel=this-board-is-not-supported
[pi02]
kernel=vmlinuz
[all]
`

// readme is README.txt on the selector partition, for whoever holds the card.
const readme = `This is the SD card of a Farkeep appliance: a Raspberry Pi that keeps
encrypted copies of somebody's backups. It holds no photos and no documents.

If it was in a Raspberry Pi at your home: please put it back.

To set an appliance up: copy its farkeep.toml onto this partition, beside this
file. Windows may call it farkeep.toml.txt, which is fine. Then eject the card
properly and put it into the Pi.

If the Pi's green light blinks slowly and evenly and nothing works: put the
card into a computer and read farkeep-error.txt on this partition.
If it blinks seven times, pauses and repeats, the board is not supported: use
a Raspberry Pi 3 (B, B+, A+), 4 B or Zero 2 W. A Raspberry Pi 5 is not
supported yet.

Leave the other files alone: the Pi starts from them.
contents.toml lists what this card was made from.
`
