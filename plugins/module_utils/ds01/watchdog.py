"""An end for what cannot be interrupted: a call into a driver that hangs never returns. An adapter."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from .errors import EXIT_UNAVAILABLE


@contextlib.contextmanager
def bounded(seconds: float, what: str, report: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """End this process if the block is not done in time, and its locks with it. `report` gets the sentence first."""
    timer = threading.Timer(
        seconds, _end, (f"{what} did not end within {seconds:g} s: the driver or the engine hangs.", report)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(message: str, report: Callable[[str], None]) -> None:
    with contextlib.suppress(Exception):
        report(message)
    print(f"ds01: driver_unavailable: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_UNAVAILABLE)
