"""The decision alone: no process start, no engine; a lock, a ledger, a driver, a disk."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import world
from timing import Case, Section, interleaved

BUSY_GPUS = ("8xA100-SXM4-80GB", [f"{gpu}={','.join(['1g.10gb'] * 7)}" for gpu in range(8)])
BATCH = 50


def decision(rounds: int) -> Iterator[Section]:
    """One request on a busy server, and many requests in one call."""
    with world.installation(*BUSY_GPUS) as here, world.in_process(here.env):
        from ds01.allocations import Allocations
        from ds01.paths import Paths

        ds01 = Allocations(Paths.from_env(), actor="bench")
        _settled(ds01.apply(_changes("allocated", range(BATCH))))
        yield _one(ds01, here, rounds)
        _settled(ds01.apply(_changes("released", range(BATCH))))
        yield _batch(ds01, here, max(3, rounds // 20))


def _one(ds01: Any, here: world.Installation, rounds: int) -> Section:
    """One more request where fifty others are served; the floor moves a file of just that size."""
    title = f"one decision under the lock, in process, {BATCH} of 56 MIG devices taken"
    taken, given = "allocate", "release"
    size = here.ledger.stat().st_size
    transaction = _transaction(here.folder, size)
    cases = [
        Case("DS01", taken, lambda: _settled(ds01.apply(_changes("allocated", [BATCH])))),
        Case("DS01", given, lambda: _settled(ds01.apply(_changes("released", [BATCH])))),
        Case("floor", f"flock, read, write, fsync, rename, fsync: {size / 1000:.0f} KB", transaction, against=taken),
    ]
    return Section(title, interleaved(title, cases, rounds), [f"{rounds} rounds, interleaved"])


def _batch(ds01: Any, here: world.Installation, rounds: int) -> Section:
    title = f"{BATCH} decisions in one call, in process, 56 MIG devices"
    taken, given = f"allocate {BATCH}", f"release {BATCH}"
    transaction = _transaction(here.folder, 16_000)
    each, back = _one_by_one(ds01, "allocated"), _one_by_one(ds01, "released")
    cases = [
        Case("DS01", taken, lambda: _settled(ds01.apply(_changes("allocated", range(BATCH))))),
        Case("DS01", given, lambda: _settled(ds01.apply(_changes("released", range(BATCH))))),
        Case("floor", "the same transaction once", transaction, against=taken),
        Case("before", f"one call a request, {BATCH} of them", each, back, taken),
    ]
    return Section(title, interleaved(title, cases, rounds), [f"{rounds} rounds, interleaved"])


def _one_by_one(ds01: Any, state: str) -> Callable[[], None]:
    def run() -> None:
        for number in range(BATCH):
            _settled(ds01.apply(_changes(state, [number])))

    return run


def _changes(state: str, numbers: Sequence[int]) -> list[Any]:
    from ds01.names import ContainerName
    from ds01.transitions import Change

    profile = "1g.10gb" if state == "allocated" else None
    return [Change(state, ContainerName("p", f"user{n}", f"p._.user{n}"), profile=profile) for n in numbers]


def _settled(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if not outcome.ok:
            raise SystemExit(f"bench: {outcome.message} {outcome.hint}")


def _transaction(folder: Path, size: int) -> Callable[[], None]:
    """What any ledger of that size costs that survives a crash: locked, replaced whole, on the disk."""
    path, lock = folder / "floor", folder / "floor.lock"
    path.write_bytes(b"x" * size)

    def run() -> None:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            data = path.read_bytes()
            new = path.with_suffix(".new")
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(directory)
            os.close(directory)

    return run
