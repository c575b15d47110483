#!/opt/ds01/venv/bin/python
"""Runs a module as Ansible's interpreter, and kills it at a chosen moment of its work.

A moment is one of: a GPU was changed (the simulated driver's state is another file, and slow enough to see each), a
file is about to be renamed or removed. DIES_AT=3 kills the process at the third one.
"""

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

DRIVER = Path("/var/lib/nvml-sim/state")
at = int(os.environ["DIES_AT"])
moments = itertools.count(1)


def moment() -> None:
    if next(moments) == at:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event: str, _details: tuple) -> None:
    """An audit hook: the interpreter calls it before each such event."""
    if event in ("os.rename", "os.remove"):
        moment()


def follow() -> None:
    seen = DRIVER.stat().st_mtime_ns
    while True:
        time.sleep(0.002)
        now = DRIVER.stat().st_mtime_ns
        if now != seen:
            seen = now
            moment()


threading.Thread(target=follow, daemon=True).start()
sys.addaudithook(watch)
exec(compile(sys.stdin.read(), "module", "exec"))  # noqa: S102 that is what an interpreter does
