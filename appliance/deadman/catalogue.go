package deadman

import (
	"time"

	"farkeep/appliance/status"
)

// The kinds of alarms. They are part of mails' ids and of the status file.
const (
	heartbeatStale = "heartbeat-stale"
	unchanged      = "unchanged"
	diskFull       = "disk-full"
	diskMissing    = "disk-missing"
	diskHung       = "disk-hung"
	diskFailing    = "disk-failing"
	unlockRefused  = "unlock-refused"
	leaseRefused   = "lease-refused"
	leaseExpired   = "lease-expired"
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
	suspect        = "suspect"
	untrue         = "heartbeat-untrue"
	rotten         = "rot"
	scrubOverdue   = "scrub-overdue"
	diskFilling    = "disk-filling"
	retiring       = "retiring"
	frozen         = "expiry-frozen"
	clockRecord    = "clock-record"
)

// ofRepositories are the kinds whose subject is a repository.
var ofRepositories = []string{unchanged, suspect, rotten, retiring}

// frozenAfter is how long expiry may rest before that is an alarm.
const frozenAfter = 7 * 24 * time.Hour

// entry is what is said about one kind of alarm, and how quick it is. Mails and
// docs/alarms.md are made from it.
type entry struct {
	kind string
	// title and clear follow the name of what it is about in the mail's subject.
	title, clear string
	// after says that it waits for settings.DeadMan.UnreachableAfter; wait is a
	// delay that no setting changes.
	after bool
	wait  time.Duration
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
			"Plan a larger disk (docs/disk.md tells how the content moves), or push less.",
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
			"Have a new disk ready: docs/disk.md.",
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
			"The key server knows this appliance and does not give it the key: it was revoked, its policy does not allow this request, or a person has to approve it, because the appliance was silent for long, is in another place, or showed an old token.",
			"Somebody made a copy of the SD card and used it: then one of the two is told so.",
			"If it was revoked by you: the appliance stays dark, as it should. It keeps asking, and it keeps this alarm.",
		},
		todo: []string{
			"On the key server run `farkeep-keyserver list` and `farkeep-keyserver audit`: they say what waits, what was refused, and why.",
			"If the appliance is where it belongs: `farkeep-keyserver approve NAME --reason WHY`, or `farkeep-keyserver allow NAME` if it was revoked.",
			"If it is not, revoke it, and void its other identities (docs/threat-model.md lists them).",
		},
	},
	{
		kind: leaseRefused, title: "disk was closed: consent REFUSED", clear: "disk is open again with consent",
		meaning: []string{
			"The key server that is named above no longer agrees that this disk is open. Sessions were ended, the file system was unmounted, the key left the kernel and the disk has no power, unless something else is said above.",
			"The appliance was revoked: if that was you, this mail says that it worked.",
			"The appliance is in another place than before, or showed an old token: its card was copied.",
			"No other key server's key opens the disk until this one grants again; the SD card remembers that.",
		},
		todo: []string{
			"On the key server run `farkeep-keyserver list` and `farkeep-keyserver audit`: they say who decided what, and why.",
			"If the appliance is where it belongs: `farkeep-keyserver allow NAME`, then `ssh APPLIANCE wake`.",
			"If it was stolen, void its other identities too (docs/threat-model.md lists them).",
		},
	},
	{
		kind: leaseExpired, title: "disk was closed: nobody renewed its lease", clear: "disk is open again with consent",
		meaning: []string{
			"No key server has answered for as long as a lease lasts (`key_policy.lease` in site.toml, 24 h). The disk was closed in order and has no power.",
			"Home has no line or no power, the VPN is down, or the key server does not run.",
			"Somebody took the running appliance away from its line.",
		},
		todo: []string{
			"At home: is `farkeep-keyserver serve` running, and does `wg show` know the appliance's handshake?",
			"The disk is opened again, in its window or by a push, when any key server consents; nothing is to be done at the appliance.",
			"If nobody knows where the appliance is: `farkeep-keyserver revoke NAME`.",
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
			"If the appliance was off or travelled that long, accept the time (docs/history.md says how).",
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
	{
		kind: suspect, title: "has a SUSPECT generation", clear: "has no suspect generation any more",
		meaning: []string{
			"What was pushed last differs from the generation before in a way that backups do not explain; the lines above say in words what changed. It was kept, beside everything that was there before, and nothing of this repository expires until you decide.",
			"Home was taken over, and the repository was encrypted, emptied or swapped.",
			"The disk at home is dying, or the repository there was repaired, recreated or deleted by somebody who may.",
		},
		todo: []string{
			"Do not touch the repository at home yet. Look at the generations, the one before is whole: docs/history.md tells how.",
			"If you know what changed and it is right, accept it; if it is not, reject it. Both want the admin key, and the commands stand above.",
			"If it is not right, the enemy may be in your machines: docs/recovery.md.",
		},
	},
	{
		kind: untrue, title: "sent an untrue heartbeat", clear: "sends true heartbeats", hold: time.Hour,
		meaning: []string{
			"A pusher said that everything had arrived, and named a content that was never committed here. The heartbeat did not count.",
			"Somebody with the pusher's key hides that the backups stopped.",
			"Two pushers push one repository, or this disk was replaced by an older one.",
		},
		todo: []string{
			"At home run `farkeep-pusher push` by hand and look at what it says.",
			"If it pushes well and the alarm comes again, void the pusher's key and make a new one: docs/site.md.",
		},
	},
	{
		kind: rotten, title: "has ROTTEN files", clear: "has no rotten files any more",
		meaning: []string{
			"Files on the disk do not have the content that they had at their commit, or cannot be read at all. They are named above with the generations that share them.",
			"The disk is dying, or its supply is too weak.",
			"Somebody wrote to the disk while it was open.",
		},
		todo: []string{
			"Run a push: files that home still has with the same content are sent again, and every generation that shares them is healed.",
			"If more come, copy everything to a new disk while this one reads: docs/rot.md.",
		},
	},
	{
		kind: scrubOverdue, title: "disk was not read through in time", clear: "disk was read through again",
		meaning: []string{
			"All content should be read again within `scrub_every`, and it was not: the disk is open for too few hours, too slow, or busy with pushes.",
		},
		todo: []string{
			"Look at `ssh APPLIANCE status`: it says how far the reading came, and what holds it up.",
			"Make the disk's window longer, or `scrub_every` larger, in farkeep.toml.",
		},
	},
	{
		kind: diskFilling, title: "disk will be full soon", clear: "disk has room for longer again",
		meaning: []string{
			"At the pace of the last days the disk has no room for one more of its worst days within 30 days, or not even now.",
			"Much was added lately: a large import, or an enemy at home who fills the disk. Nothing that is there is removed to make room, unless `when_full` says so, and never below the floor.",
		},
		todo: []string{
			"Look at `ssh APPLIANCE generations`: it says which hold how much.",
			"Keep fewer generations (docs/retention.md), retire what is not needed (docs/history.md), or plan a larger disk (docs/disk.md).",
		},
	},
	{
		kind: retiring, title: "is being RETIRED", clear: "is not retiring any more",
		meaning: []string{
			"The admin key asked for this repository to leave this disk with all its generations. The day is given above; until then nothing is lost, and pushes of it are refused.",
		},
		todo: []string{
			"If it was you: there is nothing to do.",
			"If it was not, cancel it now with the command above, and replace the admin key: whoever has it was about to remove your backups.",
		},
	},
	{
		kind: frozen, title: "has not expired all that is due for a week", clear: "expires generations again", wait: frozenAfter,
		meaning: []string{
			"Old generations should have gone, and something forbids it; the reasons are above. Nothing is lost by it, but the disk fills.",
			"A generation is suspect and nobody decided. The clock is in doubt and nobody accepted it.",
			"A session with a restore or admin key reads generations day and night: a mount that was forgotten, or a key in the wrong hands.",
			"More generations are pushed in a day than `expire_per_day` lets go in one, or the rules were made much shorter.",
		},
		todo: []string{
			"Take away the reasons: decide about what is suspect, accept the time if it is right, end the session (docs/history.md).",
			"Set `expire_per_day` above the number of pushes of a day (docs/retention.md), unless a change of the rules is just being carried out.",
		},
	},
	{
		kind: clockRecord, title: "clock does not fit the disk", clear: "clock fits the disk again", hold: time.Minute,
		meaning: []string{
			"The disk remembers the time by itself, and the appliance's clock shows one that cannot follow from it. Nothing expires until they agree or you accept the time.",
			"The disk or the appliance lay switched off for more than two days: then the time is right.",
			"Somebody on the LAN there answers in the name of the time sources, or put a new card with another time into the appliance.",
		},
		todo: []string{
			"Compare the time above with your watch. If it is right: `ssh APPLIANCE accept-clock` with the admin key while the disk is open.",
			"If it is wrong, find out who answers NTP in that LAN. The freeze ends by itself when the time fits again.",
		},
	},
}

// notice is what is said about something that was decided.
type notice struct {
	kind    string // of status.Event
	title   string // follows the name of what it is about
	meaning string
}

// notices lists them. It is never changed.
var notices = []notice{
	{status.EventAccepted, "generation was accepted", "The admin key declared a suspect generation good. It counts like any other from now on, and expiry goes on."},
	{status.EventRejected, "generation was rejected", "The admin key declared a suspect generation bad. It stays until it is older than the floor's age, counts for no rule, and expiry goes on."},
	{status.EventRetire, "retirement was asked for", "The admin key wants a repository to leave. It can be cancelled until the day that is given."},
	{status.EventKept, "retirement was cancelled", "The repository stays, and pushes of it are taken again."},
	{status.EventRetired, "was RETIRED", "The time was over: the repository and all its generations were removed from the disk."},
	{status.EventClockAccepted, "time was accepted", "The admin key took the appliance's time for right, whatever the disk remembered."},
	{status.EventFloor, "floor was changed", "The admin key changed the floor that the disk remembers. The higher one of that and farkeep.toml's counts."},
	{status.EventThinned, "generation went to make room", "`when_full` says thin, and the disk had no room for one worst day: a generation above the floor went before its time."},
}

func noticeOf(kind string) (notice, bool) {
	for _, n := range notices {
		if n.kind == kind {
			return n, true
		}
	}
	return notice{}, false
}

func entryOf(kind string) (entry, bool) {
	for _, e := range catalogue {
		if e.kind == kind {
			return e, true
		}
	}
	return entry{}, false
}
