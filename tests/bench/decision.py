"""The decision alone: no process start, no engine; a lock, a ledger, a driver, a disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import world
from timing import Case, Sample, Section, interleaved

DEVICES = 56
BUSY_GPUS = ("8xA100-SXM4-80GB", [f"{gpu}={','.join(['1g.10gb'] * 7)}" for gpu in range(8)])
RECORDS = (0, 56, 1000)
CALL = 300
"""Requests in one call: more than there are devices, so that most are refused."""


def decision(rounds: int) -> Iterator[Section]:
    """One request on servers with ever more records, and many requests in one call."""
    with world.installation(*BUSY_GPUS) as here, world.in_process(here.env):
        from ds01.allocations import Allocations
        from ds01.paths import Paths

        ds01 = Allocations(Paths.from_env(), actor="bench")
        for records in RECORDS:
            _fill(ds01, records)
            yield _one(ds01, here, records, rounds)
        _fill(ds01, 0)
        yield _batch(ds01, here, max(3, rounds // 20))


def _fill(ds01: Any, records: int) -> None:
    """So many records: one device stays free, and what devices do not suffice for is held on GPUs that are gone."""
    taken = min(records, DEVICES - 1)
    ds01.paths.ledger.unlink(missing_ok=True)
    _settled(ds01.apply(_changes("allocated", range(taken))))
    with ds01.store.transaction() as transaction:
        now, time_ = transaction.ledger, ds01.clock()
        model = next(iter(now.allocations.values()), None)
        for number in range(records - taken if model else 0):
            device = replace(model.devices[0], uuid=f"MIG-gone-{number}", gpu_uuid="GPU-gone", id=f"9:{number}")
            gone = replace(model, container=f"p._.gone{number}", user=f"gone{number}", devices=(device,))
            now = now.with_allocation(replace(gone, stopped_at=time_, pending_since=None))
        transaction.commit(now, time_)


def _one(ds01: Any, here: world.Installation, records: int, rounds: int) -> Section:
    """One more request where the others are served; the floor moves a file of just that size."""
    title = f"one decision, in process, {DEVICES} MIG devices, {records} records"
    watch = _Watch(ds01)
    give_back = lambda: _settled(ds01.apply(_changes("released", [DEVICES])))  # noqa: E731
    size = max(200, here.ledger.stat().st_size) if here.ledger.exists() else 200
    decided = f"decide, {records} records"
    cases = [
        Case("DS01", decided, watch.decided, give_back),
        Case("DS01", "the lock held for it", watch.held, give_back),
        Case("DS01", "allocate, from call to return", watch.whole, give_back),
        Case("floor", f"flock, read, write, fsync, rename, fsync: {size / 1000:.0f} KB", _transaction(here, size)),
    ]
    floor = replace(cases[-1], against="the lock held for it")
    return Section(title, interleaved(title, [*cases[:-1], floor], rounds), [f"{rounds} rounds, interleaved"])


class _Watch:
    """An allocation, watched from inside: how long it decided, and how long everybody else had to wait."""

    def __init__(self, ds01: Any) -> None:
        self._ds01 = ds01
        self._plan, self._transaction = ds01._plan, ds01.store.transaction
        self._seconds = {"decided": 0.0, "held": 0.0}
        ds01._plan, ds01.store.transaction = self._timed_plan, self._timed_transaction

    def decided(self) -> Sample:
        return self._allocate("decided")

    def held(self) -> Sample:
        return self._allocate("held")

    def whole(self) -> None:
        self._allocate("held")

    def _allocate(self, what: str) -> Sample:
        computed = time.process_time()
        _settled(self._ds01.apply(_changes("allocated", [DEVICES])))
        return Sample(self._seconds[what], time.process_time() - computed)

    def _timed_plan(self, *args: Any) -> Any:
        began = time.perf_counter()
        plan = self._plan(*args)
        self._seconds["decided"] = time.perf_counter() - began
        return plan

    @contextlib.contextmanager
    def _timed_transaction(self) -> Iterator[Any]:
        with self._transaction() as transaction:
            began = time.perf_counter()
            yield transaction
            self._seconds["held"] = time.perf_counter() - began


def _batch(ds01: Any, here: world.Installation, rounds: int) -> Section:
    title = f"{CALL} requests in one call, in process, {DEVICES} MIG devices"
    taken, given = f"allocate {CALL}", f"release {CALL}"
    cases = [
        Case("DS01", taken, lambda: _answered(ds01.apply(_changes("allocated", range(CALL))))),
        Case("DS01", given, lambda: _settled(ds01.apply(_changes("released", range(CALL))))),
        Case("floor", "one transaction of that size", _transaction(here, 16_000), against=taken),
        Case(
            "before",
            f"one call a request, {CALL} of them",
            lambda: [ds01.apply(_changes("allocated", [number])) for number in range(CALL)],
            lambda: _settled(ds01.apply(_changes("released", range(CALL)))),
            taken,
        ),
    ]
    return Section(title, interleaved(title, cases, rounds), [f"{rounds} rounds, interleaved"])


def _changes(state: str, numbers: Sequence[int]) -> list[Any]:
    from ds01.names import ContainerName
    from ds01.transitions import Change

    profile = "1g.10gb" if state == "allocated" else None
    return [Change(state, ContainerName("p", f"user{n}", f"p._.user{n}"), profile=profile) for n in numbers]


def _settled(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if not outcome.ok:
            raise SystemExit(f"bench: {outcome.message} {outcome.hint}")


def _answered(outcomes: Sequence[Any]) -> None:
    """As many grants as there are devices, and for the others the right refusal."""
    reasons = [outcome.reason for outcome in outcomes]
    if (reasons.count("granted"), reasons.count("no_gpu_available")) != (DEVICES, CALL - DEVICES):
        raise SystemExit(f"bench: {CALL} requests for {DEVICES} devices were answered {sorted(set(reasons))}")


def _transaction(here: world.Installation, size: int) -> Callable[[], None]:
    """What any ledger of that size costs that survives a crash: locked, replaced whole, on the disk."""
    path, lock = here.folder / "floor", here.folder / "floor.lock"
    path.write_bytes(b"x" * size)

    def run() -> None:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            data = path.read_bytes()
            _replace(path, data)

    return run


def _replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)
