"""Services that give way while a GPU's MIG mode changes, and come back whatever happens.

Which ones wait is noted in a file before the first is stopped: what a killed run left stopped, the next
one starts again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import files, processes, services
from .errors import Ds01Error


@contextlib.contextmanager
def paused(units: Sequence[str], note: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Stop these systemd units, in this order, and start them again in the reverse one.

    Raises Ds01Error where one cannot be stopped; one that does not start again is only said.
    """
    if not units:
        yield
        return
    try:
        files.make_directory(note.parent, 0o750)
        content = {"boot_id": processes.boot_id(), "units": list(units)}
        files.replace(note, json.dumps(content).encode(), 0o640, durable=True)
    except OSError as exc:
        raise Ds01Error(
            "permission_denied", f"{note} cannot be written: {exc.strerror}.", "Run as root; nothing was stopped."
        ) from None
    try:
        for unit in units:
            say(f"stop {unit}")
            services.stop(unit)
        yield
    finally:
        resume(note, say)


def resume(note: Path, say: Callable[[str], None]) -> None:
    """Start what is still noted as stopped. After a reboot that is systemd's own business."""
    try:
        noted = json.loads(note.read_bytes())
        units = noted["units"] if noted["boot_id"] == processes.boot_id() else []
    except (OSError, ValueError, KeyError, TypeError):
        return
    for unit in reversed(units):
        say(f"start {unit}")
        try:
            services.start(unit)
        except Ds01Error as exc:
            say(str(exc))
    note.unlink(missing_ok=True)
