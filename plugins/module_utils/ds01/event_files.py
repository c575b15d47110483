"""The audit log's files: the one that is appended to, and the older ones beside it. An adapter.

`events.jsonl` is set aside as `events.000001.jsonl`, the next one as `events.000002.jsonl`: a file that was set
aside keeps its name and its content until it is removed, and a shell lists them all in the order of time.

Writers share a lock on the file that they append to, and look whether it is still the log once they have it; who
sets it aside has that lock alone. So nothing is appended to a file that was set aside, and readers take no lock.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from . import files

MODE = 0o640
_WAIT = 1.0
"""Seconds. Whoever keeps the lock for longer was stopped in the middle: an event is worth more than its order."""
_PAUSE = 0.002
_Event = TypeVar("_Event")


@dataclass(frozen=True)
class Position:
    """A place between two lines: in the file with this inode whose first line has this checksum, `offset` bytes in.

    It stays right when the file is set aside, and matches no file that comes after one was removed.
    """

    inode: int
    first: int
    offset: int


class LogFiles:
    """The files of one log, named by the one that is appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._older = re.compile(re.escape(path.stem) + r"\.([0-9]{6,18})" + re.escape(path.suffix))

    def append(self, line: bytes) -> None:
        """Append in a single write, all of it or nothing. Raises OSError."""
        files.make_directory(self._path.parent, 0o750)
        fd = self._opened()
        try:
            written = os.write(fd, line)
            if written < len(line):
                # The disk is full. Half a line would take the next one with it: nobody comes after it yet.
                end = os.lseek(fd, 0, os.SEEK_CUR)
                if os.fstat(fd).st_size == end:
                    os.ftruncate(fd, end - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)

    def check(self) -> None:
        """Raise OSError where an event could not be appended now. Writes nothing."""
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC))
        directory = next(parent for parent in self._path.parents if parent.exists())
        if not directory.is_dir() or not os.access(directory, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if os.statvfs(directory).f_bavail == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rotate(self, size: int, keep: int) -> bool:
        """Set the log aside where it has at least `size` bytes, and remove all older files but the newest `keep`.

        Whether it was set aside; one that is in use all the time is left for the next call. Raises OSError.
        """
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            large = os.fstat(fd).st_size >= max(size, 1)
            turned = large and _locked(fd, fcntl.LOCK_EX) and self._is_log(fd)
            if turned:
                self._set_aside(os.fstat(fd))
        finally:
            os.close(fd)
        for path in self._archives()[:-keep]:
            path.unlink(missing_ok=True)
        return turned

    def tail(self, last: int, parse: Callable[[bytes], _Event | None]) -> tuple[list[_Event], Position | None]:
        """The last events that `parse` makes of lines, oldest first, and the log's end. Raises OSError.

        Only as many files are read as it takes.
        """
        found: list[_Event] = []
        end: Position | None = None
        with self._at_one_moment() as opened:
            for open_ in reversed(opened):
                here: collections.deque[_Event] = collections.deque(maxlen=last - len(found))
                reached: Position | None = None
                with open_() as file:
                    for line, place in _lines(file, None):
                        reached, event = place, parse(line)
                        if event is not None:
                            here.append(event)
                end = end or reached
                found[:0] = here
                if end and len(found) >= last:
                    break
        return found, end

    def after(self, position: Position | None) -> Iterator[tuple[bytes, Position]]:
        """Every whole line after `position` with the place after it, across files that were set aside since.

        None, or a place in a file that is gone: every line there is. Raises OSError.
        """
        with self._at_one_moment() as opened:
            newer = []
            for open_ in reversed(opened):
                with open_() as file:
                    if position and _holds(file, position):
                        yield from _lines(file, position)
                        break
                newer.append(open_)
            for open_ in reversed(newer):
                with open_() as file:
                    yield from _lines(file, None)

    def _opened(self) -> int:
        """The log, open and not to be set aside before it is closed."""
        while True:
            fd = self._open_or_create()
            _locked(fd, fcntl.LOCK_SH)
            if self._is_log(fd):
                return fd
            os.close(fd)

    def _open_or_create(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self._path, flags)
            with contextlib.suppress(FileExistsError):
                fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, MODE)
                os.fchmod(fd, MODE)  # whatever the caller's umask
                return fd

    def _is_log(self, fd: int) -> bool:
        return _inode(os.fstat(fd)) == self._current()

    def _current(self) -> tuple[int, int] | None:
        """Which file is the log now."""
        try:
            return _inode(self._path.lstat())
        except FileNotFoundError:
            return None

    def _set_aside(self, its: os.stat_result) -> None:
        """Rename the log, and begin the next with the same mode and owner. Only under its lock."""
        archives = self._archives()
        number = self._number(archives[-1]) + 1 if archives else 1
        self._path.rename(self._path.with_name(f"{self._path.stem}.{number:06d}{self._path.suffix}"))
        with contextlib.suppress(FileExistsError):  # whoever appends was faster
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
            try:
                os.fchown(fd, its.st_uid, its.st_gid)
                os.fchmod(fd, stat.S_IMODE(its.st_mode))
            finally:
                os.close(fd)

    def _archives(self) -> list[Path]:
        """The files that were set aside, the oldest first."""
        try:
            found = [path for path in self._path.parent.iterdir() if self._older.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        return sorted(found, key=self._number)

    def _number(self, archive: Path) -> int:
        matched = self._older.fullmatch(archive.name)
        return int(matched[1]) if matched else 0

    @contextlib.contextmanager
    def _at_one_moment(self) -> Iterator[Sequence[Callable[[], contextlib.AbstractContextManager[BinaryIO]]]]:
        """How to open every file, the oldest first, as they were at one moment: files that are set aside meanwhile
        are neither missed nor read twice."""
        while True:
            with _opened_log(self._path) as log:
                archives = self._archives()
                # As long as it is open, its inode is nobody else's.
                if self._current() == (_inode(os.fstat(log.fileno())) if log else None):
                    yield [
                        *(lambda path=path: _opened_archive(path) for path in archives),
                        *([lambda: contextlib.nullcontext(log)] if log else []),
                    ]
                    return


@contextlib.contextmanager
def _opened_log(path: Path) -> Iterator[BinaryIO | None]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        yield file


def _opened_archive(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return Path(os.devnull).open("rb")  # it was the oldest, and removed meanwhile


def _lines(file: BinaryIO, position: Position | None) -> Iterator[tuple[bytes, Position]]:
    """The whole lines of a file from a place in it (None: the beginning), each with the place after it."""
    file.seek(0)
    first = file.readline()
    checksum, inode, offset = zlib.crc32(first), os.fstat(file.fileno()).st_ino, len(first)
    if position:
        offset = position.offset
        file.seek(offset)
    elif first.endswith(b"\n"):
        yield first, Position(inode, checksum, offset)
    else:
        return
    for line in file:
        if not line.endswith(b"\n"):
            return  # somebody is at it, or the disk was full
        offset += len(line)
        yield line, Position(inode, checksum, offset)


def _holds(file: BinaryIO, position: Position) -> bool:
    """Whether the place is in this file."""
    its = os.fstat(file.fileno())
    if its.st_ino != position.inode or its.st_size < position.offset:
        return False
    file.seek(0)
    return zlib.crc32(file.readline()) == position.first


def _inode(its: os.stat_result) -> tuple[int, int]:
    return its.st_dev, its.st_ino


def _locked(fd: int, kind: int) -> bool:
    """Whether the lock could be had in time; it ends with the descriptor."""
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        except OSError:
            return False  # a file system without locks
        else:
            return True
