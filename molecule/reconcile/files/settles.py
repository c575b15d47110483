#!/opt/ds01/venv/bin/python -I
"""Reconciles as `ds01 reconcile` does, twice at each look, and tells what each did and which files the second changed,
and how many seconds they took.

Looks are named by the seconds that have passed by then; SET_BY is by how many the calendar was set. The clocks are
this process's own: the machine's are those of every lab host. They stand still during a look, however long it takes:
else the time for another sample of a container's use could come between the two runs.
"""

import hashlib
import json
import os
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, "/opt/ds01/lib")

from ds01 import reconcile, usage
from ds01.allocations import Allocations
from ds01.drift import REPORTS
from ds01.paths import Paths

KEPT = [Path(path) for path in ("/var/lib/ds01", "/var/log/ds01", "/run/cdi", "/etc/ds01", "/home")]
set_by = timedelta(seconds=int(os.environ.get("SET_BY", "0")))
passed = timedelta()
took = {}
since_boot = time.clock_gettime_ns


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return began.astimezone(tz) + set_by + passed


time.clock_gettime_ns = lambda _: began_since_boot + int(passed.total_seconds()) * 10**9
time.clock_gettime = lambda clock: time.clock_gettime_ns(clock) / 10**9
usage.datetime = Clock


def files():
    found = (path for top in KEPT for path in top.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found}


def run(verb):
    start = time.perf_counter()
    found = verb(Allocations(Paths.from_env(), "the test", lambda: Clock.now(timezone.utc)))
    took[verb.__name__] = [*took.get(verb.__name__, ()), round(time.perf_counter() - start, 2)]
    return found


def look():
    took.clear()
    before = files()
    foreseen = run(reconcile.foresee)
    touched = before.items() ^ files().items()
    done = run(reconcile.reconcile)
    before = files()
    again = run(reconcile.reconcile)
    return {
        "did": [f"{action.kind} {action.subject}" for action in done.actions],
        "said": [action.message for action in done.actions],
        "problems": [dict(problem) for problem in (*foreseen.problems, *done.problems, *again.problems)],
        "again": [action.message for action in again.actions if action.kind not in REPORTS],
        "touched": sorted({path for path, _ in touched | (before.items() ^ files().items())}),
        "foreseen": [f"{action.kind} {action.subject}" for action in foreseen.actions],
        "msg": again.summary(),
        "took": dict(took),
    }


looks = []
for argument in sys.argv[1:] or ["0"]:
    passed = timedelta(seconds=int(argument))
    began, began_since_boot = datetime.now(timezone.utc), since_boot(time.CLOCK_BOOTTIME)
    looks.append(look())
print(json.dumps(looks))
