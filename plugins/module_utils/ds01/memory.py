"""What one reconcile run leaves for the next: the clock's pace, and who was already reported. An adapter.

None of it is a truth: without the file, or with a damaged one, things are said again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from . import files
from .errors import Ds01Error

JUMP = 300.0
"""Seconds that the clock may be off its pace before it counts as set: NTP slews less in a minute by far."""

DISTRUST = 3600.0
"""Seconds in which no container is removed for its age after the clock was set, for somebody may set it back, and
after a boot: nothing tells a clock that is ahead from a server that was off, and it may be set only later."""


@dataclass(frozen=True)
class Memory:
    """`offset` is the clock less the time since boot, `distrust_until` a time since boot (seconds, both);
    `unmanaged` says who used which device without DS01, `asked` which processes were asked to end for it (when each
    began, by its number), `notices` what stands in the containers' workspaces."""

    boot_id: str = ""
    offset: float | None = None
    distrust_until: float = 0.0
    unmanaged: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notices: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, int] = field(default_factory=dict)

    def at(self, boot_id: str, now: datetime, since_boot: float) -> Memory:
        """The memory once the clock was read: whether it was set since the run before, or the host booted."""
        offset = now.timestamp() - since_boot
        if boot_id != self.boot_id or self.offset is None:
            return replace(self, boot_id=boot_id, offset=offset, distrust_until=DISTRUST)
        if abs(offset - self.offset) <= JUMP:
            return self
        return replace(self, offset=offset, distrust_until=since_boot + DISTRUST)

    def distrusts(self, since_boot: float) -> bool:
        return since_boot < self.distrust_until


def since_boot() -> float:
    """Seconds since the host started, suspended ones included; no clock that is set changes it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(path: Path) -> Memory:
    """What the last run left; nothing where that cannot be read, or is not what one writes."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        found = Memory(**json.loads(path.read_bytes()))
        if _is_whole(found):
            return found
    return Memory()


def _is_whole(found: Memory) -> bool:
    numbers = all(isinstance(value, (int, float)) for value in (found.offset or 0, found.distrust_until))
    texts = (found.unmanaged, found.notices, found.asked)
    return numbers and isinstance(found.boot_id, str) and all(isinstance(value, dict) for value in texts)


def write(path: Path, memory: Memory) -> None:
    """Replace the file. Raises Ds01Error `permission_denied`."""
    try:
        files.make_directory(path.parent, 0o750)
        files.replace(path, json.dumps(asdict(memory)).encode(), 0o640)
    except OSError as exc:
        raise Ds01Error("permission_denied", f"{path} cannot be written: {exc.strerror}.", files.remedy(exc)) from None
