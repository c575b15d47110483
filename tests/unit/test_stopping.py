"""Containers that end side by side: what came of each, told as it comes, in bounded time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ds01 import engine, stopping
from ds01.errors import Ds01Error
from ds01.stopping import End

Ends = Callable[[str, int], None]


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Callable[[Ends], None]:
    """From now on the engine ends a container so."""

    def connect(end: Ends) -> None:
        monkeypatch.setattr(engine, "connect", lambda: type("Engine", (), {"end": staticmethod(end)}))

    return connect


def test_nobody_to_end() -> None:
    assert list(stopping.ends({})) == []
    assert list(stopping.ends({}, 0.0)) == []


def test_each_has_its_own_grace_and_fate(connects: Any) -> None:
    asked: list[tuple[str, int]] = []
    refused = Ds01Error("engine_error", "It hangs.")

    def end(container: str, grace: int) -> None:
        asked.append((container, grace))
        if container == "b":
            raise refused

    connects(end)
    assert sorted(stopping.ends({"a": 5, "b": 60}), key=lambda end: end.container) == [
        End("a", "over"),
        End("b", "failed", refused),
    ]
    assert sorted(asked) == [("a", 5), ("b", 60)]


def test_whoever_is_done_is_told_before_the_others_are(connects: Any, released: threading.Event) -> None:
    connects(lambda container, _grace: released.wait(10) if container == "slow" else None)
    found = stopping.ends({"slow": 60, "quick": 1})
    assert next(found) == End("quick", "over")
    released.set()
    assert next(found) == End("slow", "over")


def test_after_its_patience_nobody_is_waited_for_or_asked(
    connects: Any, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def waits(container: str, _grace: int) -> None:
        asked.append(container)
        released.wait(10)

    connects(waits)
    monkeypatch.setattr(stopping, "_AT_ONCE", 2)
    found = list(stopping.ends(dict.fromkeys("abc", 600), 0.2))
    assert found == [End("a", "under way"), End("b", "under way"), End("c", "not asked")]
    released.set()
    for thread in threading.enumerate():
        if thread.name == "ds01 stop":
            thread.join(10)
    assert sorted(asked) == ["a", "b"]
    assert list(stopping.ends({"d": 1}, 0.0)) == [End("d", "not asked")]


def test_a_mistake_is_not_lost_in_a_thread(connects: Any) -> None:
    connects(lambda container, grace: container / grace)
    with pytest.raises(TypeError):
        list(stopping.ends({"a": 1}))
