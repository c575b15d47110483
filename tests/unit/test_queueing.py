"""Who waits, in which order, and what is kept for them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from ds01 import queueing
from ds01.limits import GpuPolicy
from ds01.model import FULL, Inventory, Process, Request, Ticket, Waiter
from ds01.placement import Situation
from support import NOW, config_of, machine, taken

HOUR = timedelta(hours=1)
CONFIG = config_of(max_gpus=9, max_gpus_per_container=9, allow_full_gpu=True)
MIXED = machine("full", "full", ["2g.20gb", "2g.20gb"])


def waiter(user: str, priority: int = 10, gpus: int = 1, profile: str = FULL, pid: int = 1, hours: int = 1) -> Waiter:
    request = Request(f"p._.{user}", user, gpus, profile)
    return Waiter(request, priority, 9, Ticket(NOW - HOUR, NOW + hours * HOUR, Process(pid, 7)))


def users(waiters: Any) -> list[str]:
    return [w.request.user for w in waiters]


def test_those_whose_process_or_time_is_over_drop_out() -> None:
    queue = [waiter("alive"), waiter("dead", pid=2), waiter("late", hours=0)]
    assert users(queueing.alive(queue, NOW, lambda process: process.pid == 1)) == ["alive"]


def test_the_higher_priority_comes_first_then_who_came_first() -> None:
    queue = [waiter("b"), waiter("a"), waiter("high", 50), waiter("c")]
    assert users(queueing.ordered(queue)) == ["high", "b", "a", "c"]


@pytest.mark.parametrize(
    ("container", "priority", "ahead"),
    [
        ("p._.new", 10, ["high", "b", "a"]),
        ("p._.new", 11, ["high"]),
        ("p._.new", 50, ["high"]),
        ("p._.new", 51, []),
        ("p._.a", 10, ["high", "b"]),
        ("p._.high", 50, []),
        ("p._.new", 1, ["high", "b", "a"]),
    ],
    ids=[
        "last of its priority",
        "between",
        "behind its equal",
        "the highest",
        "in its place",
        "the first",
        "the lowest",
    ],
)
def test_who_is_served_before(container: str, priority: int, ahead: list[str]) -> None:
    queue = [waiter("b"), waiter("a"), waiter("high", 50)]
    assert users(queueing.ahead_of(container, priority, queue)) == ahead


@pytest.mark.parametrize(
    ("waiters", "gone", "kept"),
    [
        ([], {}, set()),
        ([waiter("a")], {}, {"GPU-0"}),
        ([waiter("a"), waiter("b")], {}, {"GPU-0", "GPU-1"}),
        ([waiter("a", gpus=2)], {"x": "0"}, {"GPU-1"}),
        ([waiter("a", profile="2g.20gb")], {}, {"MIG-2-0"}),
        ([waiter("a", gpus=3)], {}, set()),
        ([waiter("a", profile="9g.99gb"), waiter("b")], {}, {"GPU-0"}),
        ([waiter("a"), waiter("b", profile="2g.20gb")], {"x": "0 1"}, {"MIG-2-0"}),
    ],
    ids=[
        "nobody waits",
        "what he could have now",
        "two who could both be served",
        "one of the two he needs is free",
        "another profile is another matter",
        "more than there is will never come",
        "who cannot be served keeps nothing",
        "nothing of his is free",
    ],
)
def test_what_is_kept_for_those_who_wait(waiters: list[Waiter], gone: dict[str, str], kept: set[str]) -> None:
    found = Situation(taken(MIXED, **gone), MIXED, GpuPolicy(), NOW)
    assert set(queueing.keeping(waiters, CONFIG, found).kept) == kept


def test_a_waiter_above_his_own_limit_keeps_nothing() -> None:
    config = config_of(max_gpus=1, allow_full_gpu=True)
    found = Situation(taken(MIXED, a="0"), MIXED, GpuPolicy(), NOW)
    mine = Waiter(Request("q._.a", "a", 1, FULL), 10, 1, Ticket(NOW, NOW + HOUR, Process(1, 1)))
    assert not queueing.keeping([mine], config, found).kept


def test_no_devices_no_keeping() -> None:
    found = Situation(taken(MIXED), Inventory((), ()), GpuPolicy(), NOW)
    assert not queueing.keeping([waiter("a")], CONFIG, found).kept
