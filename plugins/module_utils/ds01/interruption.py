"""Signals that end a process, while a change is under way: what was done is undone first. An adapter.

A door turns them into an exception (`as_exception`); around what must not be cut in two they wait (`deferred`),
at most until a moment where it can be undone (`moment`). Nothing helps against SIGKILL but the next run.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """One of the signals came. `signal_number` is its number, as in the exit code of a shell (128 + number)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"Interrupted by {signal.Signals(signal_number).name}.")
        self.signal_number = signal_number


@contextlib.contextmanager
def as_exception() -> Iterator[None]:
    """The first signal raises Interrupted in the block; while that is undone no other one does anything.

    What is ignored from the start stays so (nohup). For the main thread.
    """
    caught = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _: FrameType | None) -> None:
    for other in _SIGNALS:
        if signal.getsignal(other) != signal.SIG_IGN:
            signal.signal(other, _do_nothing)
    _wait.came = number
    if not _wait.depth:
        _count()


def _do_nothing(_: int, __: FrameType | None) -> None:
    pass


@dataclass
class _Wait:
    """How many `deferred` blocks are open, and the signal that waits for their end."""

    depth: int = 0
    came: int | None = None


_wait = _Wait()


def _count() -> None:
    """Raise Interrupted if a signal waits."""
    number, _wait.came = _wait.came, None
    if number is not None:
        raise Interrupted(number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """What comes in the block counts after it. The mask keeps it from the programs that are run, too, and
    from a process without `as_exception`; where another thread takes the signal, the handler waits."""
    before = _blocked()
    _wait.depth += 1
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        _wait.depth -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if not _wait.depth:
            _count()


def _blocked() -> set[int]:
    """Asked beforehand: the call that changes it may itself end by an exception."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def moment() -> None:
    """In a `deferred` block: what came so far counts now, if it is an exception by which the block can undo."""
    came = [number for number in signal.sigpending() if number in _SIGNALS and callable(signal.getsignal(number))]
    before = _blocked()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, came)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _count()
