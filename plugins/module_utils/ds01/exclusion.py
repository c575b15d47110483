"""One at a time: a request for a container, a run that may not overlap with another. An adapter.

Record locks on one file, a byte a name: they need no file each, and die with their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from . import files
from .errors import Ds01Error

TIMEOUT = 10.0
"""Seconds that a second request waits for the first."""
_PAUSE = 0.05


_FLOCK = "hhqqi"
"""The kernel's record of a lock: type, whence, start, length, pid."""


def alone(path: Path, container: str, timeout: float = TIMEOUT) -> contextlib.AbstractContextManager[None]:
    """Be the only one that works on this container. Raises Ds01Error `container_busy` or `permission_denied`."""
    return only(path, container, timeout, lambda holder: _busy(container, holder))


@contextlib.contextmanager
def only(path: Path, name: str, timeout: float, busy: Callable[[str], Ds01Error]) -> Iterator[None]:
    """Be the only one of this name. Raises what `busy` makes of the one who is, such as "pid 4711", where that one is
    not done within `timeout` seconds; Ds01Error `permission_denied`.

    Two names may share a byte: then they take turns, which does no harm.
    """
    try:
        files.make_directory(path.parent, 0o750)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as exc:
        raise Ds01Error("permission_denied", f"{path} cannot be opened: {exc.strerror}.", files.remedy(exc)) from None
    try:
        if not _acquired(lock, name, time.monotonic() + timeout):
            raise busy(_holder(lock, name) or "just done")
        yield
    finally:
        os.close(lock)


def is_busy(path: Path, container: str) -> bool:
    """Whether a request works on this container now. Writes nothing, and is in nobody's way. Not
    for whoever has such a lock: closing the file gives it up."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False  # nobody ever did, or whoever tries to is told why not
    try:
        return bool(_holder(lock, container))
    finally:
        os.close(lock)


def _busy(container: str, holder: str) -> Ds01Error:
    return Ds01Error(
        "container_busy", f"Another request for {container} is at work ({holder}).", "Try again when it is done."
    )


def _acquired(lock: int, name: str, deadline: float) -> bool:
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        else:
            return True


def _holder(lock: int, name: str) -> str:
    """The process that has it, such as "pid 4711"; empty where nobody has."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _byte(name), 1, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(lock, fcntl.F_GETLK, asked))
    return "" if kind == fcntl.F_UNLCK else f"pid {pid}"


def _byte(name: str) -> int:
    return zlib.crc32(name.encode())
