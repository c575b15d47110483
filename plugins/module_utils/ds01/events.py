"""The audit log: one JSON object a line, appended in a single write. An adapter."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from . import units

MAX_LINE = 4000
"""Bytes. Appends up to a pipe buffer's size are not interleaved with those of other processes."""


class EventLog:
    """Appends events to a file; `actor` is who asked (the login name behind sudo, or AWX's user)."""

    def __init__(self, path: Path, actor: str) -> None:
        self._path = path
        self._actor = actor

    def write(self, event: str, now: datetime, **fields: object) -> None:
        """Append one event. Absent values are left out; an overlong text is cut, never the line."""
        record = {"timestamp": units.format_time(now), "event": event, "actor": self._actor}
        record.update({key: value for key, value in fields.items() if value not in (None, "")})
        line = _encode(record)
        if len(line) > MAX_LINE:
            line = _encode({k: v[:500] if isinstance(v, str) else v for k, v in record.items()})
        self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            if os.fstat(fd).st_size == 0:
                os.fchmod(fd, 0o640)  # whatever the caller's umask
            os.write(fd, line)
        finally:
            os.close(fd)


def _encode(record: dict[str, object]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()


def actor_from_env() -> str:
    """Who is behind this process: whom the playbook names, else sudo's caller, else its own user."""
    return os.environ.get("DS01_ACTOR") or os.environ.get("SUDO_USER") or os.environ.get("USER") or f"uid {os.getuid()}"
