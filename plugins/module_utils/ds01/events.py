"""The audit log: one JSON object a line, appended in a single write. An adapter."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from . import files, units
from .errors import Ds01Error

_FOLLOW_EVERY = 0.5
MAX_LINE = 4000
"""Bytes. Appends up to a pipe buffer's size are not interleaved with those of other processes."""


class EventLog:
    """Appends events to a file; `actor` is who asked.

    A log that cannot be written does not undo what was done: `problem` says so afterwards.
    """

    def __init__(self, path: Path, actor: str) -> None:
        self._path = path
        self._actor = actor
        self.problem: str | None = None

    def write(self, event: str, now: datetime, **fields: object) -> None:
        """Append one event. Absent values are left out; an overlong text is cut, never the line."""
        record = {"timestamp": units.format_time(now), "event": event, "actor": self._actor}
        record.update({key: value for key, value in fields.items() if value not in (None, "")})
        line = _encode(record)
        for length in (500, 100, 20):
            if len(line) > MAX_LINE:
                line = _encode({key: _shortened(value, length) for key, value in record.items()})
        try:
            self._append(line)
        except OSError as exc:
            self.problem = f"The event log {self._path} could not be written: {exc.strerror}."

    def read(
        self, last: int, wanted: Callable[[Mapping[str, Any]], bool], *, follow: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The last wanted events, oldest first; with `follow` also those to come, without an end.

        A line that is no event is passed over. Raises Ds01Error `permission_denied`.
        """
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                yield from collections.deque(filter(wanted, _parsed(file)), maxlen=last)
                while follow:
                    line = file.readline()
                    yield from filter(wanted, _parsed([line]))
                    if not line:
                        time.sleep(_FOLLOW_EVERY)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise Ds01Error(
                "permission_denied", f"The event log {self._path} cannot be read: {exc.strerror}.", "Run as root."
            ) from None

    def _append(self, line: bytes) -> None:
        files.make_directory(self._path.parent, 0o750)
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            if os.fstat(fd).st_size == 0:
                os.fchmod(fd, 0o640)  # whatever the caller's umask
            written = os.write(fd, line)
            if written < len(line):
                # The disk is full. Half a line would take the next one with it: nobody comes after it yet.
                end = os.lseek(fd, 0, os.SEEK_CUR)
                if os.fstat(fd).st_size == end:
                    os.ftruncate(fd, end - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "timestamp" in event and "event" in event:
                yield event


def _encode(record: dict[str, object]) -> bytes:
    # A lone surrogate (a name that is not UTF-8) becomes its JSON escape.
    return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace")


def _shortened(value: object, length: int) -> object:
    """A text's beginning; of a list's records only their ids."""
    if isinstance(value, list):
        value = ",".join(str(item.get("id") if isinstance(item, dict) else item) for item in value)
    return value[:length] if isinstance(value, str) else value


def actor_from_env() -> str:
    """Who is behind this process: whom the playbook names, else sudo's caller, else its own user."""
    return os.environ.get("DS01_ACTOR") or os.environ.get("SUDO_USER") or os.environ.get("USER") or f"uid {os.getuid()}"
