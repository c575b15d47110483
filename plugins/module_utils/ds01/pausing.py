"""Services that give way while a GPU's MIG mode changes, and come back whatever happens.

Which ones wait is noted in a file before the first is stopped, and a lock is held until they run again: what a
killed run left stopped, the next one, or reconcile, starts again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import exclusion, files, interruption, processes, services
from .errors import Ds01Error


@dataclass(frozen=True)
class Resumed:
    """Units that were left stopped: those that run again, and why others do not."""

    started: tuple[str, ...] = ()
    problems: tuple[Ds01Error, ...] = ()


@contextlib.contextmanager
def paused(units: Sequence[str], note: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Stop these systemd units, in this order, and start them again in the reverse one.

    Raises Ds01Error where one cannot be stopped, or another run has services stopped; one that does not start
    again is only said.
    """
    if not units:
        yield
        return
    with _alone(note, exclusion.TIMEOUT):
        try:
            _write(note, list(dict.fromkeys([*_noted(note), *units])))
            for unit in units:
                say(f"stop {unit}")
                services.stop(unit)
            yield
        finally:
            with interruption.deferred():
                _start(note, say)


def left(note: Path) -> tuple[str, ...]:
    """The units that a killed run left stopped, as far as one may know; not those of a run that is at work."""
    with contextlib.suppress(Ds01Error):
        if _noted(note):
            with _alone(note, 0):
                return tuple(reversed(_noted(note)))
    return ()


def resume(note: Path, say: Callable[[str], None]) -> Resumed:
    """Start what a killed run left stopped; nothing while a run is at work. After a reboot that is systemd's
    own business. Raises Ds01Error."""
    if not os.access(note, os.R_OK):  # there is none, or somebody asks who will be refused anyway
        return Resumed()
    try:
        with _alone(note, 0), interruption.deferred():
            return _start(note, say)
    except Ds01Error as exc:
        if exc.reason != "container_busy":
            raise
        return Resumed()


def _alone(note: Path, timeout: float) -> contextlib.AbstractContextManager[None]:
    return exclusion.alone(note.with_suffix(".lock"), "the services that give way", timeout)


def _start(note: Path, say: Callable[[str], None]) -> Resumed:
    started, problems = [], []
    for unit in reversed(_noted(note)):
        say(f"start {unit}")
        try:
            services.start(unit)
            started.append(unit)
        except Ds01Error as exc:
            say(str(exc))
            problems.append(exc)
    note.unlink(missing_ok=True)
    return Resumed(tuple(started), tuple(problems))


def _noted(note: Path) -> list[str]:
    """The units of the note, in the order in which they were stopped; none where it is of another boot."""
    try:
        noted = json.loads(note.read_bytes())
        return list(noted["units"]) if noted["boot_id"] == processes.boot_id() else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(note: Path, units: Sequence[str]) -> None:
    try:
        content = {"boot_id": processes.boot_id(), "units": list(units)}
        files.replace(note, json.dumps(content).encode(), 0o640, durable=True)
    except OSError as exc:
        raise Ds01Error(
            "permission_denied",
            f"{note} cannot be written: {exc.strerror}.",
            f"{files.remedy(exc)} Nothing was stopped.",
        ) from None
