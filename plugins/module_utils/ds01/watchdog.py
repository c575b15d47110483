"""An end for what cannot be interrupted: a call into a driver that hangs never returns. An adapter.

No signal and no exception reaches a thread that is inside of such a call, so another thread tells what hangs, the
way its door tells everything (`tell`), and ends the process. What it had begun the next run puts right.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .errors import Ds01Error

_T = TypeVar("_T")

_LAST_WORDS = 10
"""Seconds for telling it: nobody may read."""
_HINT = (
    "dmesg shows why (NVRM, Xid); nvidia-smi will hang too. If it stays so, reboot this host. "
    "What was begun, the next ds01 reconcile puts right."
)


def _complain(error: Ds01Error) -> None:
    print(f"ds01: {error.reason}: {error}", file=sys.stderr)


_tells: list[Callable[[Ds01Error], object]] = [_complain]


def tell(report: Callable[[Ds01Error], object]) -> None:
    """How this process tells what hangs: `report` is called from another thread, before the process ends."""
    _tells[:] = [report]


@contextlib.contextmanager
def bounded(seconds: float, late: Callable[[], Ds01Error]) -> Iterator[None]:
    """End this process if the block is not done in time; `late` says then what takes so long."""
    timer = threading.Timer(seconds, lambda: _end(late()))
    _start(timer)
    try:
        yield
    finally:
        timer.cancel()


class Watch:
    """Ends this process if one of its calls does not return; one thread, however many calls there are.

    Inside its block it looks every `period` seconds, so much later at most a call that hangs is noticed. One thread
    at a time may call.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._under_way: tuple[str, float, float] | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        _start(threading.Thread(target=self._look, name="ds01 watch"))
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def watched(self, call: Callable[..., _T], name: str, seconds: float) -> Callable[..., _T]:
        """This function, with `seconds` to return."""

        def watched(*args: object) -> _T:
            self._under_way = (name, seconds, time.monotonic())
            try:
                return call(*args)
            finally:
                self._under_way = None

        return watched

    def _look(self) -> None:
        while not self._over.wait(self._period):
            under_way = self._under_way
            if under_way is None:
                continue
            name, seconds, began = under_way
            if time.monotonic() - began > seconds:
                _end(hangs(f"The NVIDIA driver hangs: {name} has not returned for {seconds:g} s."))


def hangs(sentence: str) -> Ds01Error:
    """The driver hangs, in this sentence, and what to do about it."""
    return Ds01Error("driver_unavailable", sentence, _HINT)


def _start(thread: threading.Thread) -> None:
    """Without signals: what the main thread keeps waiting would be delivered to this one."""
    thread.daemon = True
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(error: Ds01Error) -> None:
    signal.alarm(_LAST_WORDS)
    with contextlib.suppress(BaseException):  # a module's way to fail ends by SystemExit
        _tells[0](error)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(error.exit_code)
