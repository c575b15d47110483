"""The slices below ds01.slice: what their cgroups say is in force, and systemd, which alone may change it. An adapter.

Limits are read from the cgroup files, not from systemd: a daemon-reload changes what systemd says at once, and what is
in force only when it next has something to do for the slice.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

from . import services
from .slice_drift import LiveSlice

CGROUPS = Path("/sys/fs/cgroup")
_LEFT_BY_CHANGES = Path("/run/systemd/system.control")
_SCOPE = re.compile(r"docker-([0-9a-f]{64})\.scope")
_NEVER = 2**62
"""Bytes; cgroup v1 writes "no limit" as the largest number of pages."""

_SETTLE = 2.0
"""Seconds that systemd may take to write what it accepted into the cgroup files."""
_PAUSE = 0.02


def live() -> list[LiveSlice]:
    """The slices of groups and users that exist now. None where systemd made none yet."""
    tree = _tree(CGROUPS)
    return [_slice(tree, path) for path in _slices(tree.names)]


def find(unit: str) -> LiveSlice | None:
    """One of them; None where it does not exist now."""
    tree = _tree(CGROUPS)
    path = next((path for path in _slices(tree.names) if path.name == unit), None)
    return _slice(tree, path) if path else None


def change(unit: str, properties: Mapping[str, str]) -> None:
    """Change a slice's limits while it is in use, without a daemon-reload.

    Until the next boot: from then on the drop-ins say it. What their file 50-ds01.conf has also comes after this in
    each daemon-reload. Raises Ds01Error `service_failed`.
    """
    services.set_properties(unit, properties)


def in_force(unit: str, agreed: Callable[[LiveSlice], bool]) -> bool:
    """Whether the slice, as long as it exists, comes to be as agreed: systemd answers before it has written, and says
    nothing of what the kernel refuses."""
    deadline = time.monotonic() + _SETTLE
    while True:
        found = find(unit)
        if found is None or agreed(found):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)


def remove(unit: str) -> bool:
    """Remove an empty slice; False where it is not empty any more: nothing that runs in it is ever stopped.

    Raises Ds01Error `service_failed`.
    """
    services.deactivate(unit)
    left = find(unit)
    if left and left.empty:
        # It was given a limit when nothing ran in it: then there is a cgroup, and no slice to stop.
        services.start(unit)
        services.deactivate(unit)
        left = find(unit)
    if left:
        services.start(unit)  # somebody came in meanwhile
        return False
    # What was changed for those who had it is not for the next one with that name.
    shutil.rmtree(_LEFT_BY_CHANGES / f"{unit}.d", ignore_errors=True)
    return True


def _tree(root: Path) -> _V1 | _V2:
    return _V2(root) if (root / "cgroup.controllers").exists() else _V1(root)


class _V2:
    """One tree with everything. A file that is missing is of a controller that limits nothing here."""

    def __init__(self, root: Path) -> None:
        self.names = root

    def limits(self, path: Path) -> dict[str, Fraction | int | None]:
        place = self.names / path
        quota, _, period = _read(place / "cpu.max").partition(" ")
        return {
            "CPUQuota": Fraction(int(quota), int(period)) if quota.isdecimal() else None,
            "MemoryMax": _number(place / "memory.max"),
            "MemoryHigh": _number(place / "memory.high"),
            "TasksMax": _number(place / "pids.max"),
        }

    def floor(self, path: Path) -> dict[str, Fraction | int]:
        counted = _counters(self.names / path / "memory.stat")
        return {"MemoryMax": counted.get("anon", 0) + counted.get("shmem", 0)}

    def empty(self, path: Path) -> bool:
        return _counters(self.names / path / "cgroup.events").get("populated", 0) == 0


class _V1:
    """A tree for each controller; one that the kernel does not have enforces nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = root / "systemd"

    def limits(self, path: Path) -> dict[str, Fraction | int | None]:
        found: dict[str, Fraction | int | None] = {}
        if (self._root / "cpu").exists():
            found["CPUQuota"] = _v1_quota(self._root / "cpu" / path)
        if (self._root / "memory").exists():
            memory = _number(self._root / "memory" / path / "memory.limit_in_bytes")
            found["MemoryMax"] = None if memory is None or memory >= _NEVER else memory
        if (self._root / "pids").exists():
            found["TasksMax"] = _number(self._root / "pids" / path / "pids.max")
        return found

    def floor(self, path: Path) -> dict[str, Fraction | int]:
        counted = _counters(self._root / "memory" / path / "memory.stat")
        needed: dict[str, Fraction | int] = {"MemoryMax": counted.get("total_rss", 0) + counted.get("total_shmem", 0)}
        inside = (_v1_quota(place) for place in _below(self._root / "cpu" / path))
        largest = max((quota for quota in inside if quota is not None), default=None)
        return needed if largest is None else {**needed, "CPUQuota": largest}

    def empty(self, path: Path) -> bool:
        place = self.names / path
        return not any(_read(here / "cgroup.procs") for here in (place, *_below(place)))


def _slices(root: Path) -> Iterator[Path]:
    """Groups' slices and users' below them, as paths below the root."""
    for group in _directories(root / "ds01.slice", "ds01-*.slice"):
        yield group.relative_to(root)
        yield from (user.relative_to(root) for user in _directories(group, "ds01-*-*.slice"))


def _slice(tree: _V1 | _V2, path: Path) -> LiveSlice:
    scopes = (_SCOPE.fullmatch(place.name) for place in _directories(tree.names / path, "docker-*.scope"))
    return LiveSlice(
        name=path.name,
        limits=tree.limits(path),
        empty=tree.empty(path),
        containers=tuple(sorted(scope[1] for scope in scopes if scope)),
        floor=tree.floor(path),
        page=os.sysconf("SC_PAGE_SIZE"),
    )


def _directories(place: Path, pattern: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in place.glob(pattern) if path.is_dir())
    return []


def _below(place: Path) -> Iterator[Path]:
    for here, directories, _ in os.walk(place):
        yield from (Path(here) / name for name in directories)


def _v1_quota(place: Path) -> Fraction | None:
    quota, period = _read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")
    return Fraction(int(quota), int(period)) if quota.isdecimal() and period.isdecimal() else None


def _number(path: Path) -> int | None:
    """What a cgroup file holds; None for `max`, and where there is no such file."""
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _counters(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read(path: Path) -> str:
    """A cgroup's file; empty where the cgroup went away."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
