"""One request at a time for a container. An adapter.

Record locks on one file, a byte a container: they need no file each, and die with their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from . import files
from .errors import Ds01Error

TIMEOUT = 10.0
"""Seconds that a second request waits for the first."""
_PAUSE = 0.05


@contextlib.contextmanager
def alone(path: Path, container: str, timeout: float = TIMEOUT) -> Iterator[None]:
    """Be the only one that works on this container. Raises Ds01Error `container_busy` or `permission_denied`.

    Two names may share a byte: then their requests take turns, which does no harm.
    """
    try:
        files.make_directory(path.parent, 0o750)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as exc:
        raise Ds01Error("permission_denied", f"{path} cannot be opened: {exc.strerror}.", files.remedy(exc)) from None
    try:
        _acquire(lock, container, time.monotonic() + timeout)
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, container: str, deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(container.encode()))
        except OSError:
            if time.monotonic() > deadline:
                message = f"Another request for {container} is at work."
                raise Ds01Error("container_busy", message, "Try again when it is done.") from None
            time.sleep(_PAUSE)
        else:
            return
