"""The ledger file: locked, atomic, durable. An adapter.

One JSON file, replaced as a whole (write, fsync, rename, fsync of the directory) while a lock on a
file of its own is held; the previous generation stays beside it. The lock dies with its process,
and one that cannot be had in time is a refusal, never a way around.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from . import files, records
from .errors import Ds01Error
from .model import Ledger

LOCK_TIMEOUT = 30.0
"""Seconds. A decision holds the lock for milliseconds; this is for 1000 callers at once."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
"""Seconds between two attempts to get the lock, the first and the longest."""


class Transaction:
    """The ledger while its lock is held. `commit` writes only what differs."""

    def __init__(self, store: LedgerStore, ledger: Ledger) -> None:
        self._store = store
        self.ledger = ledger

    def commit(self, ledger: Ledger, now: datetime) -> bool:
        """Make `ledger` the truth, durably. False, and the file untouched, when nothing changed."""
        if _content(ledger) == _content(self.ledger):
            return False
        self._write(ledger, now)
        return True

    def renew(self, now: datetime) -> None:
        """The same as a new generation: whoever decided on the one before, for other devices, looks again."""
        self._write(self.ledger, now)

    def _write(self, ledger: Ledger, now: datetime) -> None:
        new = replace(ledger, generation=self.ledger.generation + 1, last_updated=now)
        self._store.write(new)
        self.ledger = new  # not before: what could not be written is not so


def _readable(document: Mapping[str, Any]) -> bytes:
    """The document as JSON, an allocation a line: for eyes and grep, at a third of an indented dump's time."""
    allocations = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in document["allocations"].items()]
    fields = {key: json.dumps(value) for key, value in {**document, "allocations": {}}.items()}
    if allocations:
        fields["allocations"] = "{\n  " + ",\n  ".join(allocations) + "\n }"
    return ("{" + ",\n ".join(f"{json.dumps(key)}: {text}" for key, text in fields.items()) + "}\n").encode()


def _content(ledger: Ledger) -> tuple[object, ...]:
    return ledger.allocations, ledger.queue, ledger.boot_id, ledger.engine_id


class LedgerStore:
    """The ledger file in its directory (mode 0640 in 0750)."""

    def __init__(self, path: Path, lock_timeout: float = LOCK_TIMEOUT) -> None:
        self._path = path
        self._lock_timeout = lock_timeout
        self._parsed: tuple[bytes, Ledger] | None = None

    def read(self) -> Ledger:
        """The present ledger, without the lock: the file is only ever replaced as a whole.

        The same content gives the same object, parsed once. Raises Ds01Error `ledger_unavailable`; a
        missing file is an empty ledger.
        """
        try:
            data = self._path.read_bytes()
            if self._parsed is None or self._parsed[0] != data:
                self._parsed = data, records.from_json(json.loads(data))
            return self._parsed[1]
        except FileNotFoundError:
            return Ledger()
        except OSError as exc:
            raise Ds01Error(
                "ledger_unavailable", f"The ledger {self._path} cannot be read: {exc.strerror}.", "Run as root."
            ) from None
        except (ValueError, RecursionError) as exc:
            raise Ds01Error(
                "ledger_damaged",
                f"The ledger {self._path} cannot be read: {exc}.",
                f"Restore it from the containers with: ds01 rebuild (the generation before is {self._previous.name}).",
            ) from None

    def state(self) -> tuple[int, int] | None:
        """Changes whenever the file is replaced; None when there is none. For those who wait."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @property
    def _previous(self) -> Path:
        return self._path.with_suffix(".json.prev")

    def lost(self) -> bool:
        """Whether there is no ledger to read: the file is gone, or not what was written."""
        try:
            self.read()
        except Ds01Error as exc:
            return exc.reason == "ledger_damaged"
        return not self._path.exists()

    def set_aside(self, now: datetime) -> Path | None:
        """Move a damaged file out of the way, to be looked at; None when there is none. Under the lock."""
        if not (self._path.exists() and self.lost()):
            return None
        kept = self._path.with_name(f"{self._path.name}.damaged-{now:%Y%m%dT%H%M%S.%fZ}")
        self._path.replace(kept)
        return kept

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Hold the lock, and see the ledger as it is. Raises Ds01Error `lock_timeout`."""
        with self.locked():
            yield Transaction(self, self.read())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Raises Ds01Error `lock_timeout`."""
        try:
            files.make_directory(self._path.parent, 0o750)
            lock = os.open(
                self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640
            )
        except OSError as exc:
            raise Ds01Error(
                "permission_denied",
                f"The state directory {self._path.parent} cannot be written: {exc.strerror}.",
                f"{files.remedy(exc)} Or name another directory with DS01_STATE_DIR.",
            ) from None
        try:
            os.fchmod(lock, 0o640)
            self._acquire(lock)
            yield
        finally:
            os.close(lock)

    def _acquire(self, lock: int) -> None:
        """Ask again and again, but ever less often, and not in step: a thousand processes that wait
        must leave a processor to the one they wait for."""
        deadline = time.monotonic() + self._lock_timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._timeout(lock) from None
                time.sleep(min(left, pause * (1 + os.urandom(1)[0] / 255) / 2))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                with contextlib.suppress(OSError):  # a full disk: the note only serves others' messages
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"pid {os.getpid()}".encode(), 0)
                return

    def _timeout(self, lock: int) -> Ds01Error:
        holder = os.pread(lock, 80, 0).decode(errors="replace").strip() or "another process"
        return Ds01Error(
            "lock_timeout",
            f"The ledger's lock was held by {holder} for {self._lock_timeout:g} s.",
            "Try again; nothing was changed.",
        )

    def write(self, ledger: Ledger) -> None:
        """Replace the file durably; the old one becomes `.prev`. Only ever called under the lock."""
        data = _readable(records.to_json(ledger))
        try:
            self._keep_previous()
            files.replace(self._path, data, 0o640, durable=True)
        except OSError as exc:
            raise Ds01Error(
                "ledger_unavailable",
                f"The ledger {self._path} could not be written: {exc.strerror}.",
                "Free space on that file system; the former ledger is unchanged.",
            ) from None

    def _keep_previous(self) -> None:
        link = self._path.with_suffix(".json.link")
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.link(self._path, link)
            link.replace(self._previous)
            # Where a killed writer left both names for one file, rename does nothing and keeps both.
            link.unlink(missing_ok=True)
