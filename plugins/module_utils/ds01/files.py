"""Files replaced as a whole: readers see the old content or the new, never a part. An adapter."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def replace(path: Path, data: bytes, mode: int, *, durable: bool = False) -> None:
    """Put `data` in place of `path`'s content, with `mode` whatever the umask. Raises OSError.

    `durable` waits until content and name are on the disk.
    """
    temporary = prepare(path, data, mode, durable=durable)
    try:
        temporary.replace(path)
    except OSError:
        _remove(temporary)
        raise
    if durable:
        _sync(path.parent)


def prepare(path: Path, data: bytes, mode: int, *, durable: bool = False) -> Path:
    """Write `data` beside `path`, to be renamed into its place; where it lies. Raises OSError, and leaves nothing.

    The temporary name does not carry the target's ending, so that nobody who reads a whole directory
    takes it for a finished file.
    """
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(fd)
    except OSError:
        _remove(temporary)
        raise
    return temporary


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def probe(path: Path, data: bytes) -> None:
    """Whether `data` could take the place of `path`'s content now. Raises OSError, and leaves nothing."""
    _remove(prepare(path, data, 0o600))


def remedy(exc: OSError) -> str:
    """What helps where a file cannot be written, in a sentence."""
    return "Free space on that file system." if exc.errno in (errno.ENOSPC, errno.EDQUOT) else "Run as root."


def make_directory(path: Path, mode: int) -> None:
    """The directory exists; one that is made here has `mode`, whatever the umask. Raises OSError."""
    if not path.is_dir():
        path.mkdir(mode, parents=True, exist_ok=True)  # whoever dies here leaves nothing wider
        path.chmod(mode)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
