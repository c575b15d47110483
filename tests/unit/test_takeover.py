"""Holds that give way: to a higher priority, to their owner's new request, to a reservation."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from ds01.limits import GpuPolicy, Reservation
from ds01.model import FULL, Grant, Ledger, Refusal, Request
from ds01.placement import Situation
from ds01.takeover import decide
from support import NOW, limits_of, machine, taken

HOUR = timedelta(hours=1)
THREE = machine("full", "full", "full")


def holds(inventory: Any = THREE, priority: int = 10, **hours: tuple[str, float]) -> Ledger:
    """user=("0", 5): the user's container stopped 5 hours ago and holds device 0."""
    ledger = taken(inventory, **{user: ids for user, (ids, _) in hours.items()})
    for user, (_, ago) in hours.items():
        mine = ledger.allocations[f"p._.{user}"]
        ledger = ledger.with_allocation(replace(mine, stopped_at=NOW - ago * HOUR, priority=priority))
    return ledger


def ask(
    ledger: Ledger, user: str = "bob", gpus: int = 1, reuse: bool = False, priority: int = 50, **rest: Any
) -> Grant | Refusal:
    own = {key: rest.pop(key) for key in ("max_gpus", "max_gpu_equivalents") if key in rest}
    found = Situation(ledger, rest.pop("inventory", THREE), GpuPolicy(), NOW, **rest)
    request = Request(f"new._.{user}", user, gpus, rest.get("profile", FULL))
    return decide(request, limits_of(user, priority=priority, **own), found, reuse_held=reuse)


def told(decision: Grant | Refusal) -> tuple[str, ...]:
    """What was granted, and whose holds gave way; or the reason."""
    if isinstance(decision, Refusal):
        return (decision.reason,)
    return (",".join(d.id for d in decision.devices), *(a.user for a in decision.given_up))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"priority": 50}, ("1", "eve")),
        ({"priority": 11}, ("1", "eve")),
        ({"priority": 10}, ("no_gpu_available",)),
        ({"priority": 9}, ("no_gpu_available",)),
        ({"reclaim": False}, ("no_gpu_available",)),
        ({"gpus": 2}, ("0,1", "eve", "alice")),
        ({"gpus": 3}, ("0,1,2", "eve", "alice", "dan")),
        ({"running": {"p._.eve"}}, ("0", "alice")),
        ({"running": {"p._.eve", "p._.alice", "p._.dan"}}, ("no_gpu_available",)),
        ({"kept": {"GPU-1"}}, ("0", "alice")),
        ({"occupied": {"GPU-1": "process 4711"}}, ("0", "alice")),
        ({"inventory": machine("full", "full", "full", sick={"1": "failed"})}, ("0", "alice")),
    ],
    ids=[
        "the longest-held goes first",
        "one above is strictly higher",
        "an equal priority takes nothing",
        "nor does a lower one",
        "policies.reclaim_holds: never",
        "two",
        "all of them",
        "never from a running container",
        "all run",
        "what is kept for a waiter is passed over",
        "what something else uses is passed over",
        "a sick device is passed over",
    ],
)
def test_a_hold_of_lower_priority_gives_way(case: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert told(ask(holds(alice=("0", 2), eve=("1", 5), dan=("2", 1)), **case)) == expected


def test_nothing_is_taken_over_while_something_is_free() -> None:
    assert told(ask(holds(alice=("0", 5), eve=("2", 5)))) == ("1",)


def test_only_what_is_missing_is_taken_over() -> None:
    assert told(ask(holds(alice=("0", 5), eve=("2", 4)), gpus=2)) == ("0,1", "alice")


def test_all_or_nothing() -> None:
    ledger = holds(alice=("0", 5)).with_allocation(taken(THREE, eve="1 2").allocations["p._.eve"])
    assert told(ask(ledger, gpus=2)) == ("no_gpu_available",)


def test_the_longest_held_is_used_and_not_only_given_up() -> None:
    inventory = machine(["1g.10gb", "3g.40gb"], ["1g.10gb"])
    ledger = holds(inventory, alice=("0:1", 9), eve=("0:0 1:0", 1))
    found = Situation(ledger, inventory, GpuPolicy(), NOW)
    decision = decide(Request("new._.bob", "bob", 2), limits_of("bob", priority=50), found)
    assert told(decision) == ("0:1,1:0", "alice", "eve")


def test_a_hold_that_does_not_fit_is_left_alone() -> None:
    inventory = machine("full", ["2g.20gb"])
    ledger = holds(inventory, alice=("1:0", 9), eve=("0", 1))
    assert told(ask(ledger, inventory=inventory)) == ("0", "eve")


# --- the user's own


@pytest.mark.parametrize("limit", [{"max_gpus": 1}, {"max_gpu_equivalents": 1}], ids=str)
def test_a_user_at_the_limit_is_offered_the_held_device(limit: dict[str, int]) -> None:
    ledger = holds(bob=("2", 1))
    refusal = ask(ledger, hold_end=lambda _: NOW + HOUR, **limit)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "user_at_limit"
    assert refusal.hint.startswith("You hold 2 of p._.bob until 2025-11-21T11:30:00Z: take it over with --reuse-held (")
    assert told(ask(ledger, reuse=True, **limit)) == ("2", "bob")


def test_the_own_hold_is_only_given_up_where_that_helps() -> None:
    assert told(ask(holds(bob=("2", 1)), reuse=True)) == ("0",)
    assert told(ask(holds(bob=("0", 1)), gpus=4, reuse=True, max_gpus=3)) == ("user_at_limit",)


def test_a_held_device_that_does_not_fit_is_not_offered() -> None:
    inventory = machine("full", ["2g.20gb"])
    ledger = holds(inventory, bob=("1:0", 9))
    refusal = ask(ledger, inventory=inventory, max_gpus=1)
    assert isinstance(refusal, Refusal)
    assert "--reuse-held" not in refusal.hint
    assert told(ask(ledger, inventory=inventory, max_gpus=1, reuse=True)) == ("user_at_limit",)


def test_the_own_hold_is_offered_where_nothing_else_is_free() -> None:
    ledger = holds(priority=50, bob=("0", 1), alice=("1", 1), eve=("2", 1))
    refusal = ask(ledger)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "no_gpu_available"
    assert "take it over with --reuse-held" in refusal.hint
    assert told(ask(ledger, reuse=True)) == ("0", "bob")


def test_the_own_hold_is_not_taken_without_a_word_even_at_a_lower_priority() -> None:
    assert told(ask(holds(priority=1, bob=("0 1 2", 1)), priority=99)) == ("no_gpu_available",)


# --- reservations


def test_inside_the_window_a_hold_on_a_booked_device_gives_way_whatever_its_priority() -> None:
    ledger = holds(priority=99, alice=("0", 1), eve=("1", 9), dan=("2", 9))
    window = Reservation("bob", ("0",), NOW - HOUR, NOW + HOUR)
    assert told(ask(ledger, reservations=[window], reclaim=False)) == ("0", "alice")
    later = replace(window, start=NOW + HOUR, end=NOW + 2 * HOUR)
    assert told(ask(ledger, reservations=[later])) == ("no_gpu_available",)
