"""Containers ended side by side: none waits for another's time to end by itself. An adapter.

That people's programs take their time is no hang of the engine. Who cannot wait for all of them leaves: an engine
that was asked to end a container goes on with it, and kills it in the end, whether anybody waits or not (moby#45731).
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from . import engine
from .errors import Ds01Error

_AT_ONCE = 32


@dataclass(frozen=True)
class End:
    """What came of one: `over`, `failed` (with its `error`), `under way` where the engine was asked and is not done,
    or `not asked`, for there was no time left."""

    container: str
    fate: Literal["over", "failed", "under way", "not asked"]
    error: Ds01Error | None = None


def ends(graces: Mapping[str, int], patience: float = math.inf) -> Iterator[End]:
    """End these containers (names or ids), each with its seconds between being asked and being killed; what came of
    them, as it comes. One that is gone is over. After `patience` seconds nobody is waited for or asked any more."""
    stops = _Stops(graces, time.monotonic() + patience)
    left = dict.fromkeys(graces)
    try:
        while left and (end := stops.next()):
            del left[end.container]
            yield end
    finally:
        unasked = stops.ask_no_more()
    for container in left:
        yield End(container, "not asked" if container in unasked else "under way")


class _Stops:
    """Threads that end one container after the other; they die with the process, whatever they wait for."""

    def __init__(self, graces: Mapping[str, int], until: float) -> None:
        self._until = until
        self._todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[End | Exception] = queue.SimpleQueue()
        for todo in graces.items():
            self._todo.put(todo)
        for _ in range(min(_AT_ONCE, len(graces))):
            threading.Thread(target=self._work, name="ds01 stop", daemon=True).start()

    def next(self) -> End | None:
        """The next that came to an end; None where it is too late for that."""
        patience = self._until - time.monotonic()
        with contextlib.suppress(queue.Empty):
            found = self._done.get(timeout=max(patience, 0.0) if patience < math.inf else None)
            if isinstance(found, Exception):
                raise found
            return found
        return None

    def ask_no_more(self) -> set[str]:
        """Those that no thread has begun with, and now none will."""
        unasked = set()
        with contextlib.suppress(queue.Empty):
            while True:
                unasked.add(self._todo.get_nowait()[0])
        return unasked

    def _work(self) -> None:
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < self._until:
                self._done.put(_end(*self._todo.get_nowait()))


def _end(container: str, grace: int) -> End | Exception:
    try:
        engine.connect().end(container, grace)  # a connection of its own: they are not made to be shared by threads
    except Ds01Error as exc:
        return End(container, "failed", exc)
    except Exception as exc:
        return exc  # a mistake of ours is for whoever waits for this thread
    return End(container, "over")
