"""The audit log: one JSON object a line, appended in a single write (event_files). An adapter."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import units
from .errors import Ds01Error
from .event_files import LogFiles

if TYPE_CHECKING:
    from .drift import Action

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
        self.files = LogFiles(path)
        self.problem: str | None = None

    def write(self, event: str, now: datetime, **fields: object) -> None:
        """Append one event. Absent values are left out; an overlong text is cut, never the line."""
        record: dict[str, object] = {"timestamp": units.format_time(now), "event": event, "actor": self._actor}
        record.update({key: value for key, value in fields.items() if value not in (None, "")})
        line = _encode(record)
        for length in (500, 100, 20):
            if len(line) > MAX_LINE:
                line = _encode({key: _shortened(value, length) for key, value in record.items()})
        try:
            self.files.append(line)
        except OSError as exc:
            self.problem = f"The event log {self._path} could not be written: {exc.strerror}."

    def record(self, action: Action, now: datetime) -> None:
        """Append the event of something that was done or reported."""
        self.write(action.kind, now, **action.event())

    def rotate(self, size: int, keep: int) -> None:
        """Set the log aside where it has at least `size` bytes; `keep` older files stay. What stands against it
        is a `problem`: the log goes on as it is."""
        try:
            self.files.rotate(size, keep)
        except OSError as exc:
            self.problem = f"The event log {self._path} could not be set aside: {exc.strerror}."

    def read(
        self, last: int, wanted: Callable[[Mapping[str, Any]], bool], *, follow: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The last wanted events, oldest first, also those of older files; with `follow` also those to come,
        without an end.

        A line that is no event is passed over. Raises Ds01Error `permission_denied`.
        """

        def parse(line: bytes) -> dict[str, Any] | None:
            event = parsed(line)
            return event if event and wanted(event) else None

        try:
            found, position = self.files.tail(last, parse)
            yield from found
            while follow:
                time.sleep(_FOLLOW_EVERY)
                for line, place in self.files.after(position):
                    position, event = place, parse(line)
                    if event:
                        yield event
        except OSError as exc:
            raise Ds01Error(
                "permission_denied", f"The event log {self._path} cannot be read: {exc.strerror}.", "Run as root."
            ) from None


def parsed(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is none."""
    try:
        event = json.loads(line.decode(errors="replace"))
    except ValueError:
        return None
    return event if isinstance(event, dict) and "timestamp" in event and "event" in event else None


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
