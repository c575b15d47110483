"""One container's allocation: allocated, held, active, released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from ds01 import lifecycle, units
from ds01.errors import Ds01Error
from ds01.limits import Config, GpuPolicy, Reservation
from ds01.model import Inventory, Ledger
from ds01.names import ContainerName
from ds01.placement import Situation
from ds01.transitions import Change, Outcome, after, decide, device_problem, resolved
from hypothesis import given
from hypothesis import strategies as st
from support import NOW, config_of, machine, taken

HOUR = timedelta(hours=1)
FOUR = machine("full", "full", "full", "full")
EASY = {"max_gpus": 2, "max_gpus_per_container": 2, "allow_full_gpu": True, "priority": 50}


def named(user: str, project: str = "p") -> ContainerName:
    return ContainerName(project, user, f"{project}._.{user}")


def change(state: str, user: str = "alice", project: str = "p", **rest: Any) -> Change:
    return Change(state, named(user, project), **rest)


def situation(ledger: Ledger | None = None, inventory: Inventory = FOUR, **rest: Any) -> Situation:
    return Situation(ledger or Ledger(), inventory, GpuPolicy(), NOW, **rest)


def run(what: Change, ledger: Ledger | None = None, config: Config | None = None, **rest: Any) -> Outcome:
    return decide(what, config or config_of(**EASY), situation(ledger, **rest))


def test_allocated() -> None:
    outcome = run(change("allocated"))
    assert (outcome.ok, outcome.reason, outcome.changed, outcome.before) == (True, "granted", True, None)
    allocation = outcome.allocation
    assert allocation is not None
    assert (allocation.container, allocation.user, allocation.gpu_id) == ("p._.alice", "alice", "0")
    assert (allocation.priority, allocation.allocated_at, allocation.status) == (50, NOW, "pending")
    assert outcome.message == "Allocated 0 (full) to p._.alice."


@pytest.mark.parametrize("state", ["allocated", "held", "active", "released"])
def test_each_change_twice_is_each_change_once(state: str) -> None:
    ledger = taken(FOUR, alice="0") if state != "allocated" else Ledger()
    first = run(change(state), ledger)
    then = after(ledger, first)
    second = run(change(state), then)
    assert first.ok
    assert second.ok
    assert not second.changed
    assert after(then, second) == then


@pytest.mark.parametrize(
    ("wish", "ok"),
    [
        ({}, True),
        ({"gpus": 1}, True),
        ({"profile": "full"}, True),
        ({"gpus": 2}, False),
        ({"gpus": 0}, False),
        ({"profile": "2g.20gb"}, False),
    ],
    ids=str,
)
def test_a_second_allocation_of_another_kind_is_no_silent_yes(wish: dict[str, Any], ok: bool) -> None:
    ledger = taken(FOUR, alice="0")
    outcome = run(change("allocated", **wish), ledger)
    assert (outcome.ok, outcome.reason, outcome.changed) == (ok, "already_allocated", False)
    assert outcome.allocation == ledger.allocations["p._.alice"]


@pytest.mark.parametrize("state", ["allocated", "held", "active", "released"])
def test_an_allocation_under_this_name_that_is_somebody_else_s_is_left_alone(state: str) -> None:
    hers = replace(taken(FOUR, bob="0").allocations["p._.bob"], container="p._.1001")
    ledger = Ledger({"p._.1001": hers})
    outcome = run(Change(state, ContainerName("p", "1001", "p._.1001")), ledger)
    assert (outcome.ok, outcome.changed) == (False, False)
    assert after(ledger, outcome) == ledger


def test_a_refusal_leaves_everything_as_it_was() -> None:
    ledger = taken(FOUR, alice="0 1")
    outcome = run(change("allocated", project="q"), ledger)
    assert (outcome.ok, outcome.reason, outcome.changed) == (False, "user_at_limit", False)
    assert after(ledger, outcome) == ledger


def test_cpu_only_gets_nothing_and_says_so() -> None:
    outcome = run(change("allocated", gpus=0))
    assert (outcome.ok, outcome.reason, outcome.allocation, outcome.changed) == (True, "granted", None, False)
    assert "CPU-only" in outcome.message


def test_a_batch_sees_what_came_before_it() -> None:
    ledger, got = Ledger(), []
    for project in ("a", "b", "c"):
        outcome = run(change("allocated", project=project), ledger)
        ledger = after(ledger, outcome)
        got.append(outcome.allocation.gpu_id if outcome.allocation else outcome.reason)
    assert got == ["0", "1", "user_at_limit"]


@pytest.mark.parametrize(
    ("state", "ok"), [("held", False), ("active", False), ("released", True)], ids=["held", "active", "released"]
)
def test_what_is_not_allocated(state: str, ok: bool) -> None:
    outcome = run(change(state))
    assert (outcome.ok, outcome.reason, outcome.changed) == (ok, "not_allocated", False)


def test_released() -> None:
    ledger = taken(FOUR, alice="0", bob="1")
    outcome = run(change("released"), ledger)
    assert (outcome.ok, outcome.reason, outcome.changed) == (True, "released", True)
    assert set(after(ledger, outcome).allocations) == {"p._.bob"}


# --- hold


@pytest.mark.parametrize(
    ("hold", "reason", "kept", "text"),
    [
        ("24h", "held", True, "until 2025-11-22T10:30:00Z"),
        ("0.25h", "held", True, "until 2025-11-21T10:45:00Z"),
        (None, "held", True, "until it is released"),
        (0, "released", False, "no hold after a stop"),
        ("0", "released", False, "no hold after a stop"),
        ("0h", "released", False, "no hold after a stop"),
    ],
)
def test_hold_of_a_time_of_none_and_without_end(hold: Any, reason: str, kept: bool, text: str) -> None:
    ledger = taken(FOUR, alice="0")
    outcome = run(change("held"), ledger, config_of(**EASY, gpu_hold_after_stop=hold))
    assert (outcome.ok, outcome.reason, outcome.changed) == (True, reason, True)
    assert ("p._.alice" in after(ledger, outcome).allocations) is kept
    assert text in outcome.message
    if outcome.allocation:
        assert (outcome.allocation.status, outcome.allocation.stopped_at) == ("held", NOW)


def test_the_hold_is_the_owner_s() -> None:
    config = config_of(**EASY, gpu_hold_after_stop="24h", user_overrides={"bob": {"gpu_hold_after_stop": 0}})
    ledger = taken(FOUR, alice="0", bob="1")
    assert run(change("held", "alice"), ledger, config).reason == "held"
    assert run(change("held", "bob"), ledger, config).reason == "released"


def test_the_hold_begins_when_the_container_stopped_not_when_somebody_noticed() -> None:
    outcome = run(change("held", stopped_at=NOW - 5 * HOUR), taken(FOUR, alice="0"))
    assert outcome.allocation is not None
    assert outcome.allocation.stopped_at == NOW - 5 * HOUR
    assert "until 2025-11-22T05:30:00Z" in outcome.message


def test_a_second_mark_does_not_prolong_the_hold() -> None:
    ledger = taken(FOUR, alice="0")
    held = run(change("held", stopped_at=NOW - 5 * HOUR), ledger).allocation
    assert held is not None
    ledger = ledger.with_allocation(held)
    again = run(change("held"), ledger)
    assert (again.changed, again.reason) == (False, "held")
    assert "since 2025-11-21T05:30:00Z" in again.message
    exact = run(change("held", stopped_at=NOW - 4 * HOUR), ledger)
    assert exact.changed
    assert exact.allocation is not None
    assert exact.allocation.stopped_at == NOW - 4 * HOUR


def test_docker_s_nanoseconds_do_not_make_a_change_of_every_run() -> None:
    stopped = units.parse_time("2025-11-21T09:15:42.123456789Z")
    ledger = taken(FOUR, alice="0")
    ledger = after(ledger, run(change("held", stopped_at=stopped), ledger))
    assert not run(change("held", stopped_at=stopped), ledger).changed


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
def test_the_hold_ends_at_the_same_moment_in_every_time_zone(zone: str, timezone_of: Callable[[str], None]) -> None:
    timezone_of(zone)
    config = config_of(**EASY, gpu_hold_after_stop="15m")
    ledger = taken(FOUR, alice="0")
    stopped = units.parse_time("2025-11-21T10:29:00.5Z")
    outcome = run(change("held", stopped_at=stopped), ledger, config)
    assert "until 2025-11-21T10:44:00Z" in outcome.message
    assert lifecycle.ends(after(ledger, outcome), config) == {"p._.alice": units.parse_time("2025-11-21T10:44:00Z")}


def test_hold_ends_leaves_out_what_runs_and_what_is_held_without_end() -> None:
    config = config_of(
        **EASY,
        gpu_hold_after_stop="1h",
        user_overrides={"bob": {"gpu_hold_after_stop": None}, "dan": {"gpu_hold_after_stop": 0}},
    )
    ledger = taken(FOUR, alice="0", bob="1", carol="2", dan="3")
    for user in ("alice", "bob", "dan"):
        ledger = ledger.with_allocation(replace(ledger.allocations[f"p._.{user}"], stopped_at=NOW))
    assert lifecycle.ends(ledger, config) == {"p._.alice": NOW + HOUR, "p._.dan": NOW}


# --- active


def test_active_ends_the_hold_and_takes_the_container_s_id() -> None:
    ledger = taken(FOUR, alice="0")
    ledger = ledger.with_allocation(replace(ledger.allocations["p._.alice"], stopped_at=NOW))
    outcome = run(change("active", container_id="beef"), ledger)
    assert (outcome.ok, outcome.reason, outcome.changed) == (True, "active", True)
    assert outcome.allocation is not None
    assert (outcome.allocation.stopped_at, outcome.allocation.container_id) == (None, "beef")
    assert outcome.allocation.status == "active"


def test_what_is_active_is_not_pending_any_more() -> None:
    granted = after(Ledger(), run(change("allocated")))
    outcome = run(change("active"), granted)
    assert (outcome.changed, outcome.allocation and outcome.allocation.status) == (True, "active")


@pytest.mark.parametrize("inventory", [machine(), machine("full", sick={"0": "lost"})], ids=["gone", "lost"])
def test_an_allocation_whose_device_is_gone_is_no_yes(inventory: Inventory) -> None:
    ledger = taken(FOUR, alice="0")
    outcome = run(change("allocated"), ledger, inventory=inventory)
    assert (outcome.ok, outcome.reason, outcome.changed) == (False, "gpu_unhealthy", False)
    assert outcome.hint == "Release it, then allocate again: ds01 release --container p._.alice"


def test_active_keeps_a_known_container_id() -> None:
    outcome = run(change("active"), taken(FOUR, alice="0"))
    assert (outcome.changed, outcome.allocation and outcome.allocation.container_id) == (False, "c0ffee")


# --- what a request may lower, and root may raise


@pytest.mark.parametrize(
    ("limit", "asked", "root", "granted"),
    [
        (2, None, False, True),
        (2, 1, False, False),
        (2, 0, False, False),
        (1, 5, False, False),
        (1, 5, True, True),
        (1, 2, True, True),
        (None, 1, False, False),
        (None, 2, False, True),
        (0, None, True, False),
    ],
)
def test_max_gpus_lowers_and_only_root_raises(limit: int | None, asked: int | None, root: bool, granted: bool) -> None:
    config = config_of(**{**EASY, "max_gpus": limit})
    outcome = run(change("allocated", project="q", max_gpus=asked, may_raise=root), taken(FOUR, alice="0"), config)
    assert outcome.ok is granted
    assert outcome.reason == ("granted" if granted else "user_at_limit")


@pytest.mark.parametrize(
    ("asked", "root", "priority"),
    [(None, False, 50), (10, False, 10), (90, False, 50), (90, True, 90), (10, True, 10), (50, False, 50)],
)
def test_priority_lowers_and_only_root_raises(asked: int | None, root: bool, priority: int) -> None:
    outcome = run(change("allocated", priority=asked, may_raise=root))
    assert outcome.allocation is not None
    assert outcome.allocation.priority == priority


def test_a_request_may_choose_the_strategy() -> None:
    inventory = machine(["2g.20gb"] * 3, ["2g.20gb"] * 3)
    config = config_of(**EASY)
    ledger = taken(inventory, bob="0:0")
    got = []
    for strategy in (None, "packed"):
        outcome = run(change("allocated", profile="2g.20gb", strategy=strategy), ledger, config, inventory=inventory)
        got.append(outcome.allocation and outcome.allocation.gpu_id)
    assert got == ["1:0", "0:1"]


# --- results


def test_result_of_a_grant() -> None:
    result = run(change("allocated")).result()
    assert result["changed"] is True
    assert result["failed"] is False
    assert result["allocation"] == {
        "container": "p._.alice",
        "status": "pending",
        "device": "ds01.io/gpu=p._.alice",
        "user": "alice",
        "gpu_id": "0",
        "priority": 50,
        "allocated_at": "2025-11-21T10:30:00Z",
        "stopped_at": None,
        "devices": [
            {
                "id": "0",
                "uuid": "GPU-0",
                "gpu_uuid": "GPU-0",
                "profile": "full",
                "placement": None,
                "equivalents": "1",
            }
        ],
        "container_id": None,
        "pending_since": "2025-11-21T10:30:00Z",
    }


def test_result_of_a_refusal_says_when_and_what_would_help() -> None:
    booked = [Reservation("bob", (str(n),), NOW - HOUR, NOW + HOUR) for n in range(4)]
    result = run(change("allocated"), reservations=booked).result()
    assert (result["changed"], result["failed"], result["reason"]) == (False, True, "reserved")
    assert (result["allocation"], result["available_at"]) == (None, "2025-11-21T11:30:00Z")
    assert result["msg"].endswith(".")


@pytest.mark.parametrize(
    ("inventory", "problem"),
    [
        (FOUR, None),
        (machine("full", sick={"0": "failed"}), "device 0 is failed"),
        (machine([]), "device 0 (GPU-0) is not on this host any more"),
        (machine(), "device 0 (GPU-0) is not on this host any more"),
    ],
    ids=["fine", "failed", "cut since", "gone"],
)
def test_device_problem(inventory: Inventory, problem: str | None) -> None:
    assert device_problem(taken(FOUR, alice="0").allocations["p._.alice"], inventory) == problem


_STEPS = st.lists(
    st.builds(
        change,
        st.sampled_from(["allocated", "held", "active", "released"]),
        st.sampled_from(["alice", "bob", "carol"]),
        st.sampled_from(["p", "q"]),
        gpus=st.integers(0, 3),
    ),
    max_size=25,
)


@given(_STEPS, st.sampled_from([0, "1h", None]))
def test_no_history_gives_one_device_to_two_containers(steps: list[Change], hold: Any) -> None:
    config = config_of(**EASY, gpu_hold_after_stop=hold)
    ledger = Ledger()
    for step in steps:
        outcome = decide(step, config, situation(ledger))
        following = after(ledger, outcome)
        assert outcome.changed == (following != ledger)
        assert outcome.ok or following == ledger
        others = set(ledger.allocations) - {step.name.full}
        assert all(following.allocations[name] == ledger.allocations[name] for name in others)
        ledger = following
        given_out = [d.uuid for a in ledger.allocations.values() for d in a.devices]
        assert len(given_out) == len(set(given_out))
        for user in ("alice", "bob", "carol"):
            assert sum(len(a.devices) for a in ledger.of_user(user)) <= 2


@pytest.mark.parametrize("state", ["held", "released"])
def test_a_running_container_keeps_its_device(state: str) -> None:
    ledger = taken(FOUR, alice="0")
    outcome = run(change(state), ledger, running={"p._.alice"})
    assert (outcome.ok, outcome.reason, outcome.changed) == (False, "container_running", False)
    assert "container_stop.yml" in outcome.hint
    assert run(change(state), ledger, running={"p._.bob"}).ok


@pytest.mark.parametrize("startable", [True, False])
def test_only_a_stopped_container_is_bound_to_another_device(startable: bool) -> None:
    ledger = taken(FOUR, alice="0")
    without_0 = replace(FOUR, devices=FOUR.devices[1:])
    outcome = run(change("allocated", startable=startable), ledger, inventory=without_0)
    assert outcome.ok is startable
    if startable:
        assert outcome.allocation is not None
        assert (outcome.allocation.gpu_id, outcome.before) == ("1", ledger.allocations["p._.alice"])
    else:
        assert (outcome.reason, outcome.changed) == ("gpu_unhealthy", False)


def test_what_is_asked_beyond_the_limits_is_said_and_not_given() -> None:
    outcome = run(
        change("allocated", priority=99, max_gpus=9), config=config_of(max_gpus=1, priority=10, allow_full_gpu=True)
    )
    assert len(outcome.warnings) == 2
    assert all("needs root" in warning for warning in outcome.warnings)
    raised = change("allocated", priority=99, max_gpus=9, may_raise=True)
    assert run(raised, config=config_of(max_gpus=1, priority=10, allow_full_gpu=True)).warnings == ()


@pytest.mark.parametrize("wish", [{"gpus": -1}, {"max_gpus": -1}, {"priority": 0}, {"priority": 101}], ids=str)
def test_wishes_out_of_range_are_refused(wish: dict[str, int]) -> None:
    with pytest.raises(Ds01Error, match="must be"):
        change("allocated", **wish)


CUT = machine("full", ["2g.20gb", "2g.20gb", "2g.20gb"])


def recut(*order: int) -> Inventory:
    """The same places cut anew: other UUIDs, and the indices in this order."""
    full, *mig = CUT.devices
    return replace(CUT, devices=(full, *(replace(mig[i], uuid=f"NEW-{i}", id=f"1:{n}") for n, i in enumerate(order))))


def test_after_a_reboot_everybody_has_the_place_that_was_theirs() -> None:
    before = taken(CUT, alice="0", bob="1:0", carol="1:2")
    after_boot = resolved(before, recut(2, 1, 0))
    found = {a.user: (a.gpu_id, a.devices[0].uuid) for a in after_boot.allocations.values()}
    assert found == {"alice": ("0", CUT.devices[0].uuid), "bob": ("1:2", "NEW-0"), "carol": ("1:0", "NEW-2")}
    assert resolved(after_boot, recut(2, 1, 0)) == after_boot


def test_what_is_as_recorded_is_not_touched() -> None:
    ledger = taken(CUT, alice="0", bob="1:0")
    assert resolved(ledger, CUT) is ledger


def test_a_device_that_is_gone_stays_as_recorded() -> None:
    ledger = taken(CUT, bob="1:0")
    assert resolved(ledger, recut(1, 2)) == ledger
    assert resolved(ledger, Inventory((), ())) == ledger


def test_a_place_that_another_record_names_is_not_taken_over() -> None:
    new = recut(0, 1, 2)
    ledger = taken(CUT, bob="1:0").with_allocation(taken(new, eve="1:0").allocations["p._.eve"])
    assert resolved(ledger, new).allocations["p._.bob"] == ledger.allocations["p._.bob"]
