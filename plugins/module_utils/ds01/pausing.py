"""Services that give way while a GPU's MIG mode changes, and come back whatever happens.

Which ones wait is noted in a file before the first is stopped, and a lock is held until they run again. Whatever
still waits then (the run was killed, or systemd did not start it) the next one, or reconcile, starts again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import exclusion, files, interruption, processes, services
from .errors import Ds01Error


@dataclass(frozen=True)
class Unstarted:
    """A unit that did not start again, and why. `known`: it was told before, and is tried again and again."""

    unit: str
    problem: Ds01Error
    known: bool = False


@dataclass(frozen=True)
class Resumed:
    """Units that were left stopped: those that run again, and those that do not."""

    started: tuple[str, ...] = ()
    unstarted: tuple[Unstarted, ...] = ()


@contextlib.contextmanager
def paused(units: Sequence[str], note: Path, say: Callable[[str], None], unstarted: list[Unstarted]) -> Iterator[None]:
    """Stop these systemd units, in this order, and start them again in the reverse one.

    `unstarted` then becomes those that do not start, of these and of earlier runs; they stay noted, for `resume`.
    Raises Ds01Error where one cannot be stopped, or another run has services stopped.
    """
    if not units:
        yield
        return
    with _alone(note, exclusion.TIMEOUT):
        try:
            before = _read(note)
            _write(note, replace(before, units=tuple(dict.fromkeys([*before.units, *units]))))
            for unit in units:
                say(f"stop {unit}")
                services.stop(unit)
            yield
        finally:
            with interruption.deferred():
                unstarted[:] = _start(note, say).unstarted


def left(note: Path) -> tuple[str, ...]:
    """The units that an earlier run left stopped, as far as one may know; not those of a run that is at work."""
    with contextlib.suppress(Ds01Error):
        if _read(note).units:
            with _alone(note, 0):
                return tuple(_stopped(reversed(_read(note).units)))
    return ()


def resume(note: Path, say: Callable[[str], None]) -> Resumed:
    """Start what an earlier run left stopped; nothing while a run is at work. After a reboot that is systemd's
    own business. Raises Ds01Error."""
    if not os.access(note, os.R_OK):  # there is none, or somebody asks who will be refused anyway
        return Resumed()
    try:
        with _alone(note, 0), interruption.deferred():
            stopped = set(_stopped(_read(note).units))  # whoever runs by now was started by somebody else
            resumed = _start(note, say)
            return replace(resumed, started=tuple(unit for unit in resumed.started if unit in stopped))
    except Ds01Error as exc:
        if exc.reason != "container_busy":
            raise
        return Resumed()


def _alone(note: Path, timeout: float) -> contextlib.AbstractContextManager[None]:
    return exclusion.alone(note.with_suffix(".lock"), "the services that give way", timeout)


def _stopped(units: Iterable[str]) -> Iterator[str]:
    """Those that do not run; also where systemd does not say so."""
    for unit in units:
        runs = False
        with contextlib.suppress(Ds01Error):
            runs = services.runs(unit)
        if not runs:
            yield unit


def _start(note: Path, say: Callable[[str], None]) -> Resumed:
    """Start what is noted. Whatever does not start stays noted, unless systemd has it no more."""
    noted = _read(note)
    started, unstarted, gone = [], [], []
    for unit in reversed(noted.units):
        say(f"start {unit}")
        try:
            services.start(unit)
            started.append(unit)
        except Ds01Error as exc:
            startable = _startable(unit)
            unstarted.append(Unstarted(unit, _told(unit, exc, startable), unit in noted.failed))
            gone.extend([] if startable else [unit])
    waiting = [found.unit for found in unstarted if found.unit not in gone]
    after = _Note(tuple(unit for unit in noted.units if unit in waiting), tuple(waiting))
    if not waiting:
        note.unlink(missing_ok=True)
    elif after != noted:
        with contextlib.suppress(Ds01Error):  # as it is, it names them all, and one that runs is started without harm
            _write(note, after)
    return Resumed(tuple(started), tuple(unstarted))


def _startable(unit: str) -> bool:
    """Whether systemd could start it some day; also where systemd does not say so."""
    try:
        return services.startable(unit)
    except Ds01Error:
        return True


def _told(unit: str, exc: Ds01Error, startable: bool) -> Ds01Error:
    """Why it was not started, and what becomes of it."""
    if not startable:
        return Ds01Error(exc.reason, exc.message, "The unit is masked or gone, so it is not tried again.")
    again = f"It is tried again each minute (ds01 reconcile) until it runs or is masked (systemctl mask {unit})."
    return Ds01Error(exc.reason, exc.message, f"{exc.hint}. {again}")


@dataclass(frozen=True)
class _Note:
    """The units that wait, in the order in which they were stopped, and those of them that did not start again."""

    units: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def _read(note: Path) -> _Note:
    """What is noted; nothing where it is of another boot."""
    try:
        noted = json.loads(note.read_bytes())
        if noted["boot_id"] == processes.boot_id():
            return _Note(tuple(noted["units"]), tuple(noted.get("failed", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return _Note()


def _write(note: Path, noted: _Note) -> None:
    try:
        content = {"boot_id": processes.boot_id(), "units": noted.units, "failed": noted.failed}
        files.replace(note, json.dumps(content).encode(), 0o640, durable=True)
    except OSError as exc:
        raise Ds01Error(
            "permission_denied",
            f"{note} cannot be written: {exc.strerror}.",
            f"{files.remedy(exc)} Nothing was stopped.",
        ) from None
