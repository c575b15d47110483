"""What one reconcile run leaves for the next: the clock's pace, and who was already reported. An adapter.

None of it is a truth: without the file, or with a damaged one, things are said again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from . import files
from .errors import Ds01Error

JUMP = 300.0
"""Seconds that the clock may be off its pace before it counts as set: NTP slews less in a minute by far."""

DISTRUST = 3600.0
"""Seconds in which nothing is removed for its age after the clock was set: somebody may set it back."""


@dataclass(frozen=True)
class Memory:
    """`offset` is the clock less the time since boot, `distrust_until` a time since boot (seconds, both);
    `unmanaged` says who used which device without DS01, `notices` what stands in the containers' workspaces."""

    boot_id: str = ""
    offset: float | None = None
    distrust_until: float = 0.0
    unmanaged: Mapping[str, str] = field(default_factory=dict)
    notices: Mapping[str, str] = field(default_factory=dict)

    def at(self, boot_id: str, now: datetime, since_boot: float) -> Memory:
        """The memory once the clock was read: whether it was set since the run before."""
        offset = now.timestamp() - since_boot
        if boot_id != self.boot_id or self.offset is None:
            return replace(self, boot_id=boot_id, offset=offset, distrust_until=0.0)
        if abs(offset - self.offset) <= JUMP:
            return self
        return replace(self, offset=offset, distrust_until=since_boot + DISTRUST)

    def distrusts(self, since_boot: float) -> bool:
        return since_boot < self.distrust_until


def since_boot() -> float:
    """Seconds since the host started, suspended ones included; no clock that is set changes it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(path: Path) -> Memory:
    """What the last run left; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Memory(**json.loads(path.read_bytes()))
    return Memory()


def write(path: Path, memory: Memory) -> None:
    """Replace the file. Raises Ds01Error `permission_denied`."""
    try:
        files.make_directory(path.parent, 0o750)
        files.replace(path, json.dumps(asdict(memory)).encode(), 0o640)
    except OSError as exc:
        raise Ds01Error("permission_denied", f"{path} cannot be written: {exc.strerror}.", files.remedy(exc)) from None
