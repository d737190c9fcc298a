# Asks the Borg that is installed what its prune would keep. Reads one JSON
# document: {"repository": path, "archives": [[name, unix time], ...],
# "cases": [{"options": [...], "glob": "*", "items": null or [[name, unix time], ...]}]}
# and writes for each case one line {"archive": "rule #n"} of what is kept.
#
# Cases without items run "borg prune --dry-run --list" on a real repository with
# the archives. The others run the same command's own body, do_prune, on a list
# instead of a repository, so that thousands take seconds.
import datetime
import json
import logging
import re
import sys

import borg.archiver
from borg.helpers import ArchiveInfo

kept = {}


class Listen(logging.Handler):
    def emit(self, record):
        m = re.match(r"Keeping archive \(rule: (\S+ #\d+)\):\s+(\S+)", record.getMessage())
        if m:
            kept[m.group(2)] = m.group(1)


def borg_command(*args):
    archiver = borg.archiver.Archiver()
    code = archiver.run(archiver.get_args(["borg", *args], None))
    if code != 0:
        sys.exit("borg %s: exit code %d" % (" ".join(args), code))


def utc(t):
    return datetime.datetime.fromtimestamp(t, datetime.timezone.utc)


class NoCache:
    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


class Manifest:
    """Stands for a repository that has these archives."""

    def __init__(self, items):
        self.archives = self
        # In the order in which Borg's own list comes: newest first.
        self.items = [ArchiveInfo(name, b"%032d" % i, utc(t)) for i, (name, t) in enumerate(items)]

    def list(self, **kwargs):
        return self.items


def main():
    given = json.load(sys.stdin)
    repository = given["repository"]
    borg_command("init", "--encryption=none", repository)
    for name, t in given["archives"]:
        borg_command("create", "--timestamp=" + utc(t).strftime("%Y-%m-%dT%H:%M:%S"), repository + "::" + name, given["source"])
    body = borg.archiver.Archiver.do_prune.__wrapped__
    real_cache = borg.archiver.Cache
    archiver = borg.archiver.Archiver()
    archiver.lock_wait = 1
    parser = archiver.build_parser()
    output = logging.getLogger("borg.output.list")
    output.addHandler(Listen())
    for case in given["cases"]:
        kept.clear()
        args = ["prune", "--dry-run", "--list", *case["options"]]
        output.setLevel(logging.INFO)  # as --list does
        if case["items"] is None:
            borg.archiver.Cache = real_cache
            borg_command(*args, "--glob-archives=" + case["glob"], repository)
        else:
            borg.archiver.Cache = NoCache
            parsed = parser.parse_args([*args, repository])
            parser.common_options.resolve(parsed)
            body(archiver, parsed, None, Manifest(case["items"]), None)
        print(json.dumps(kept))


main()
