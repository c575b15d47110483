"""Many processes at once on one server, each with containers of its own; some of them killed on the way: VICTIMS
of them by the parent at any moment, and of the others each fifth by itself just before or after a ledger write.

A program of its own, so that a thousand forks of it are small: crowd.py FOLDER PROCESSES VICTIMS. Each process
reports to FOLDER/<number>.jsonl what it is about to ask and what it was answered; FOLDER/ends.json says how
each ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import mmap
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pynvml  # noqa: F401 - imported once, for all that are forked from here
from ds01.allocations import Allocations
from ds01.ledger import LedgerStore
from ds01.model import Ledger
from ds01.names import ContainerName
from ds01.paths import Paths
from ds01.transitions import Change

CALLS = 5
USERS = 400
WITH_DEVICES = ("released", "released", "held", "active", "allocated")
WITHOUT = ("allocated",) * 8 + ("released", "held")


class Witness(LedgerStore):
    """A ledger store that remembers what it showed last, and what it wrote after that."""

    seen: Ledger = Ledger()
    wrote: Ledger | None = None
    before_write: Callable[[], None] = staticmethod(lambda: None)
    after_write: Callable[[], None] = staticmethod(lambda: None)

    def read(self) -> Ledger:
        self.seen, self.wrote = super().read(), None
        return self.seen

    def write(self, ledger: Ledger) -> None:
        self.before_write()
        super().write(ledger)
        self.after_write()
        self.wrote = ledger


class Person:
    """One process: somebody who allocates, holds, uses and releases, and reports it."""

    def __init__(self, ds01: Allocations, folder: Path, number: int) -> None:
        self.ds01 = ds01
        self.witness = ds01.store = Witness(ds01.paths.ledger, lock_timeout=300)
        self.folder = folder
        self.user = f"user{number % USERS}"
        self.projects = (f"p{number}a", f"p{number}b")
        self.random = random.Random(number)  # noqa: S311 - anybody may guess it
        self.using: dict[str, list[int]] = {}
        self.report = os.open(folder / f"{number}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def ask(self) -> None:
        project = self.random.choice(self.projects)
        self.call(self.random.choice(WITH_DEVICES if project in self.using else WITHOUT), project)

    def leave(self) -> None:
        """Mostly give back what one still has."""
        for project in list(self.using):
            if self.random.random() < 0.8:
                self.call("released", project)

    def call(self, verb: str, project: str) -> None:
        name = ContainerName(project, self.user, f"{project}._.{self.user}")
        gpus = self.random.choice((1, 1, 1, 2))
        self.say(asked=verb, container=name.full, user=self.user, gpus=gpus)
        if verb == "released":
            self.put_down(project)
        (outcome,) = self.ds01.apply([Change(verb, name, gpus=gpus)])
        uuids = [device.uuid for device in outcome.allocation.devices] if outcome.allocation else []
        clashes = self.use(project, uuids) if outcome.reason == "granted" else []
        self.say(answer=outcome.reason, uuids=uuids, clashes=clashes, **self.ledger())

    def use(self, project: str, uuids: Sequence[str]) -> list[str]:
        """Open the devices as a container would: each can be opened once. Those that somebody has open."""
        self.using[project], clashes = [], []
        for uuid in uuids:
            device = os.open(self.folder / uuid, os.O_WRONLY | os.O_CREAT, 0o644)
            self.using[project].append(device)
            try:
                fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                clashes.append(uuid)
        return clashes

    def put_down(self, project: str) -> None:
        for device in self.using.pop(project, []):
            os.close(device)

    def ledger(self) -> dict[str, Any]:
        """What the decision was made from, and what was written."""
        seen, wrote = self.witness.seen, self.witness.wrote
        return {
            "saw": seen.generation,
            "saw_content": fingerprint(seen),
            "taken": sum(len(a.devices) for a in seen.allocations.values()),
            "mine": sum(len(a.devices) for a in seen.of_user(self.user)),
            "wrote": wrote.generation if wrote else None,
            "wrote_content": fingerprint(wrote) if wrote else None,
        }

    def say(self, **line: object) -> None:
        os.write(self.report, json.dumps(line).encode() + b"\n")


def fingerprint(ledger: Ledger) -> str:
    content = sorted((name, a.status, a.gpu_id) for name, a in ledger.allocations.items())
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def live(ds01: Allocations, folder: Path, number: int, progress: mmap.mmap, doomed: bool) -> None:
    def die() -> None:
        progress[number] = CALLS
        os.kill(os.getpid(), signal.SIGKILL)

    person = Person(ds01, folder, number)
    if doomed:
        setattr(person.witness, "before_write" if number % 2 else "after_write", die)
    for done in range(CALLS):
        person.ask()
        progress[number] = done
    person.leave()


def kill_some(pids: Sequence[int], victims: int, progress: mmap.mmap, lock: Path) -> None:
    """`kill -9` at moments spread over the whole run: about half hit whoever has the ledger's lock then."""
    chance = random.Random(victims)  # noqa: S311
    alive = {pid: number for number, pid in enumerate(pids)}
    for moment in sorted(chance.uniform(0, 0.9) * CALLS * len(pids) for _ in range(victims)):
        while sum(progress[:]) < moment:
            time.sleep(0.002)
        alive = {pid: number for pid, number in alive.items() if progress[number] < CALLS}
        if not alive:
            break
        holder = lock_holder(lock)
        pid = holder if holder in alive and chance.random() < 0.5 else chance.choice(sorted(alive))
        os.kill(pid, signal.SIGKILL)
        progress[alive.pop(pid)] = CALLS  # it makes none of its further calls


def lock_holder(lock: Path) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"\d+", lock.read_text(encoding="ascii"))
        return int(found.group()) if found else 0
    return 0


def main(folder: Path, processes: int, victims: int) -> None:
    ds01 = Allocations(Paths.from_env(), "crowd")
    _ = ds01.config
    progress = mmap.mmap(-1, processes)
    start, go = os.pipe()
    gc.freeze()  # what no child's collector touches stays shared by all
    pids = []
    for number in range(processes):
        pid = os.fork()
        pids.append(pid)
        if pid == 0:
            code = 1
            try:
                os.close(go)
                os.read(start, 1)  # ends for all at the same moment
                live(ds01, folder, number, progress, victims > 0 and number % 5 == 0)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                progress[number] = CALLS
                os._exit(code)
    os.close(go)
    kill_some(pids, victims, progress, ds01.paths.ledger.with_suffix(".lock"))
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (folder / "ends.json").write_text(json.dumps(ends), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
