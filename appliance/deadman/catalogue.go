package deadman

import "time"

// The kinds of alarms. They are part of mails' ids and of the status file.
const (
	heartbeatStale = "heartbeat-stale"
	unchanged      = "unchanged"
	diskFull       = "disk-full"
	diskMissing    = "disk-missing"
	diskHung       = "disk-hung"
	diskFailing    = "disk-failing"
	unlockRefused  = "unlock-refused"
	unreachable    = "key-server-unreachable"
	wrongKey       = "wrong-key"
	badHeader      = "bad-header"
	fileSystem     = "file-system"
	clockUnset     = "clock-unset"
	clockJump      = "clock-jump"
	undervoltage   = "undervoltage"
	stateLost      = "state-lost"
	restarting     = "restarting"
	degraded       = "degraded"
)

// entry is what is said about one kind of alarm, and how quick it is. Mails and
// docs/alarms.md are made from it.
type entry struct {
	kind string
	// title and clear follow the name of what it is about in the mail's subject.
	title, clear string
	// after says that it waits for settings.DeadMan.UnreachableAfter.
	after bool
	// hold is how long it must be over before the all-clear.
	hold    time.Duration
	meaning []string
	todo    []string
}

// catalogue lists every alarm. It is never changed.
var catalogue = []entry{
	{
		kind: heartbeatStale, title: "heartbeat STALE", clear: "heartbeat is back",
		meaning: []string{
			"No push was finished, or finished and verified, within the threshold: the copy here grows old.",
			"The Borg server is off, hangs, or has no internet line.",
			"The backups at home fail, or Borg's lock is never released, so that nothing can be pushed.",
			"The VPN is down: home's address changed, or its WireGuard lost the appliance.",
			"Home was taken over, and the enemy stopped the backups. Everything that was pushed before is still here.",
		},
		todo: []string{
			"At home run `farkeep-pusher status`: it says which repository and which target fails, and why.",
			"Run `farkeep-pusher push`; the all-clear comes with the next heartbeat.",
			"If home does not answer, call somebody who can look at the machine.",
			"If the host was retired, its last heartbeat stays stale; see docs/alarms.md.",
		},
	},
	{
		kind: unchanged, title: "has not changed", clear: "changes again",
		meaning: []string{
			"Pushes arrive, and bring the same content again and again: nothing new is being backed up.",
			"Borg at home writes to another repository, or not at all.",
			"The machine whose backups these are is off or was retired.",
		},
		todo: []string{
			"At home look at the newest archive's date: `borg list --last 1 REPOSITORY`.",
			"If the repository is not meant to change any more, raise `unchanged_age` in farkeep.toml.",
		},
	},
	{
		kind: diskFull, title: "disk is nearly full", clear: "disk has room again",
		meaning: []string{
			"History and new data have filled the disk. When it is full the next push is refused; nothing that is there is ever removed to make room.",
		},
		todo: []string{
			"Look at `ssh APPLIANCE generations`: it says which repository holds how much.",
			"Plan a larger disk (docs/recovery.md tells how the content moves), or push less.",
		},
	},
	{
		kind: diskMissing, title: "disk is missing", clear: "disk is there again", after: true,
		meaning: []string{
			"The disk did not appear after its power was switched on.",
			"Its cable or plug came loose, its supply or the relay is broken, or the disk is.",
			"Somebody took it. It is encrypted, and the key is not on the appliance.",
		},
		todo: []string{
			"Ask the people there to look: is the disk's light on, are cable and plug in place?",
			"If a different disk was attached on purpose: its LUKS UUID belongs into farkeep.toml.",
		},
	},
	{
		kind: diskHung, title: "disk hangs", clear: "disk answers again", after: true,
		meaning: []string{
			"The disk stopped answering while it was in use, and a power cycle has not helped.",
			"A dying disk, a weak supply, or a USB bridge that crashed.",
		},
		todo: []string{
			"Look at `ssh APPLIANCE logs` for USB and I/O errors, and at the supply (alarm undervoltage).",
			"Have a new disk ready: docs/recovery.md.",
		},
	},
	{
		kind: diskFailing, title: "disk cannot be opened", clear: "disk opens again", after: true,
		meaning: []string{"Opening the disk fails for the reason that is given above."},
		todo:    []string{"Look at `ssh APPLIANCE status` and `ssh APPLIANCE logs`."},
	},
	{
		kind: unlockRefused, title: "disk key REFUSED", clear: "disk key is granted again",
		meaning: []string{
			"The key server knows this appliance and does not give it the key: it was revoked, or its policy does not allow this request.",
			"If that was you: the appliance stays dark, as it should. It keeps asking, and it keeps this alarm.",
		},
		todo: []string{
			"On the key server read its audit log: it says what was refused, and why.",
			"If the appliance is where it belongs: `farkeep-keyserver allow NAME`.",
			"If it is not, leave it revoked, and void its other identities (docs/threat-model.md lists them).",
		},
	},
	{
		kind: unreachable, title: "key server is out of reach", clear: "key server is back", after: true,
		meaning: []string{
			"None of the key servers answered. The disk stays locked until one does.",
			"The VPN is down, the key server is off, or its SSH host key is not the one that farkeep.toml names.",
		},
		todo: []string{
			"At home: is `farkeep-keyserver serve` running, and does `wg show` know the appliance's handshake?",
			"The appliance goes on asking; nothing is to be done there.",
		},
	},
	{
		kind: wrongKey, title: "disk key does not fit", clear: "disk key fits again",
		meaning: []string{
			"The key server gave a key, and it opens no slot of this disk's header.",
			"The key server holds another disk's key under this UUID, or the disk's key slot was changed.",
		},
		todo: []string{
			"Compare the LUKS UUID in farkeep.toml with the key server's `farkeep-keyserver list`.",
			"The recovery slot's key in the bundle opens the disk on any Linux machine: docs/recovery.md.",
		},
	},
	{
		kind: badHeader, title: "disk header is damaged", clear: "disk header is whole again",
		meaning: []string{
			"The LUKS header, or one of its two copies, does not have the content that it should. Without a header the data cannot be read by anybody.",
			"A dying disk, or somebody who wrote to it.",
		},
		todo: []string{
			"Do not write to the disk. Attach it to a Linux machine and restore the header from the bundle's backup: docs/recovery.md.",
		},
	},
	{
		kind: fileSystem, title: "file system is damaged", clear: "file system is whole again",
		meaning: []string{
			"The disk opens, and its file system has errors that are not repaired without a person.",
		},
		todo: []string{
			"Make an image of the disk before any repair if you can: docs/recovery.md.",
			"Then run e2fsck on a Linux machine, and `ssh APPLIANCE verify` afterwards.",
		},
	},
	{
		kind: clockUnset, title: "clock is not set", clear: "clock is set", after: true,
		meaning: []string{
			"The time sources do not answer or do not agree; the appliance goes on from the last known time. Ages of heartbeats count only the time it has been running, and nothing expires.",
			"The LAN or the provider blocks NTP (UDP port 123), or there is no internet line.",
		},
		todo: []string{
			"Allow outgoing NTP in the router there, or name a time source inside the LAN in farkeep.toml (`[clock] servers`).",
		},
	},
	{
		kind: clockJump, title: "clock JUMPED", clear: "clock is plausible again",
		meaning: []string{
			"The time sources agree on a time that cannot be explained by a short power cut. Expiry is frozen, so that no lie about the time can remove history.",
			"The appliance was off for more than two days: then the time is right.",
			"Somebody on the LAN there answers in the name of the time sources.",
		},
		todo: []string{
			"If the appliance was off or travelled that long, accept the time (docs/network.md says how).",
			"If not, find out who answers NTP in that LAN. The freeze ends by itself when the time is plausible again.",
		},
	},
	{
		kind: undervoltage, title: "supply voltage is too low", clear: "supply voltage is fine again", hold: time.Hour,
		meaning: []string{"The supply, or its cable, is too weak: the next step is a disk that drops out and files that break."},
		todo:    []string{"Replace supply and cable by the board's official ones, and give the disk a supply of its own."},
	},
	{
		kind: stateLost, title: "state is kept in memory only", clear: "state is kept on the card again",
		meaning: []string{
			"The SD card's state partition does not work. Alarms, queue and last known time are lost at the next power cut. Generations are not concerned: they lie on the disk.",
			"The SD card is dying.",
		},
		todo: []string{"Prepare a new SD card for this appliance (`farkeep-image personalise`) and have it swapped."},
	},
	{
		kind: restarting, title: "part keeps restarting", clear: "part runs steadily", hold: time.Hour,
		meaning: []string{"A part of the appliance crashed or was ended several times within an hour. It is started again each time; the others go on."},
		todo:    []string{"Look at `ssh APPLIANCE logs`: the reason is in the lines before each start. Please report it."},
	},
	{
		kind: degraded, title: "works only in part", clear: "works in full again", hold: 10 * time.Minute,
		meaning: []string{"A step of the start failed, or a part does not run; what it was is given above."},
		todo:    []string{"Look at `ssh APPLIANCE logs`."},
	},
}

func entryOf(kind string) (entry, bool) {
	for _, e := range catalogue {
		if e.kind == kind {
			return e, true
		}
	}
	return entry{}, false
}
