"""Which devices a request gets, or why not."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from ds01 import records
from ds01.limits import GpuPolicy, Limits, Reservation
from ds01.model import FULL, Allocation, Device, Grant, Inventory, Ledger, Refusal, Request
from ds01.placement import Situation, decide, wanted_profile
from hypothesis import given
from hypothesis import strategies as st
from support import NOW, limits_of, machine, taken

HOUR = timedelta(hours=1)
TWO = "2g.20gb"
THREE_SLICES = [TWO, TWO, TWO]


def situation(inventory: Inventory, ledger: Ledger | None = None, **changes: Any) -> Situation:
    policy = GpuPolicy(
        strategy=changes.pop("strategy", "least_allocated"),
        enable_mig=changes.pop("enable_mig", True),
        mig_profile=changes.pop("mig_profile", None),
    )
    return Situation(ledger or Ledger(), inventory, policy, NOW, **changes)


def ask(gpus: int = 1, profile: str | None = None, user: str = "alice") -> Request:
    return Request(f"new._.{user}", user, gpus, profile)


def ids(decision: Grant | Refusal) -> str:
    assert isinstance(decision, Grant), decision
    return " ".join(d.id for d in decision.devices)


def refusal(decision: Grant | Refusal) -> Refusal:
    assert isinstance(decision, Refusal), decision
    return decision


# --- what is asked for


@pytest.mark.parametrize(
    ("gpus", "asked", "policy", "wanted"),
    [
        (["full", "full"], None, {"mig_profile": TWO}, FULL),
        ([THREE_SLICES, "full"], None, {"mig_profile": TWO}, TWO),
        ([THREE_SLICES, "full"], None, {}, "any"),
        ([THREE_SLICES], None, {"mig_profile": TWO, "enable_mig": False}, FULL),
        ([THREE_SLICES], "1g.10gb", {"mig_profile": TWO}, "1g.10gb"),
        ([THREE_SLICES], FULL, {"mig_profile": TWO}, FULL),
        (["full"], TWO, {}, TWO),
        ([[], "full"], None, {"mig_profile": TWO}, TWO),
        ([], None, {"mig_profile": TWO}, FULL),
    ],
    ids=[
        "no MIG: a whole GPU",
        "MIG: the configured profile",
        "MIG, none configured: any",
        "MIG not enabled: a whole GPU",
        "own profile",
        "own whole GPU",
        "a profile where MIG is off",
        "MIG mode, not cut: still the profile",
        "no GPU at all",
    ],
)
def test_wanted_profile(gpus: list[Any], asked: str | None, policy: dict[str, Any], wanted: str) -> None:
    assert wanted_profile(ask(profile=asked), situation(machine(*gpus), **policy)) == wanted


MIXED = machine(THREE_SLICES, "full", ["3g.40gb", "1g.10gb"], "full")


@pytest.mark.parametrize(
    ("asked", "got"),
    [(TWO, "0:0"), ("3g.40gb", "2:0"), ("1g.10gb", "2:1"), (FULL, "1")],
)
def test_a_profile_is_answered_with_exactly_that_profile(asked: str, got: str) -> None:
    assert ids(decide(ask(profile=asked), limits_of(), situation(MIXED))) == got


@pytest.mark.parametrize(
    ("inventory", "asked", "policy"),
    [
        (machine("full", "full"), TWO, {}),
        (machine(["3g.40gb"], "full"), None, {"mig_profile": TWO}),
        (machine([], "full"), None, {"mig_profile": TWO}),
        (machine(THREE_SLICES), FULL, {}),
        (machine(THREE_SLICES), "2g.10gb", {}),
        (machine([]), FULL, {}),
        (machine(), FULL, {}),
    ],
    ids=[
        "MIG asked, whole GPUs only",
        "MIG configured, another cut and a whole GPU",
        "MIG configured, not cut, and a whole GPU",
        "whole GPU asked, all cut",
        "a profile that is nearly there",
        "MIG mode without instances is no whole GPU",
        "no GPU",
    ],
)
def test_the_wish_is_never_widened(inventory: Inventory, asked: str | None, policy: dict[str, Any]) -> None:
    found = refusal(decide(ask(profile=asked), limits_of(), situation(inventory, **policy)))
    assert found.reason == "profile_not_available"


def test_a_taken_profile_is_not_answered_with_a_whole_gpu() -> None:
    inventory = machine([TWO], "full")
    found = refusal(decide(ask(profile=TWO), limits_of(), situation(inventory, taken(inventory, bob="0:0"))))
    assert found.reason == "no_gpu_available"
    assert "1 of 1 in use" in found.message


def test_any_means_the_smallest_first() -> None:
    inventory = machine("full", ["3g.40gb", "1g.10gb", TWO])
    assert ids(decide(ask(), limits_of(), situation(inventory))) == "1:1"
    assert ids(decide(ask(3), limits_of(), situation(inventory))) == "1:0 1:1 1:2"
    assert ids(decide(ask(4), limits_of(), situation(inventory))) == "0 1:0 1:1 1:2"


def test_any_includes_no_whole_gpu_for_who_may_not_have_one() -> None:
    inventory = machine("full", [TWO])
    limits = limits_of(allow_full_gpu=False)
    assert ids(decide(ask(), limits, situation(inventory))) == "1:0"
    assert (
        refusal(decide(ask(), limits, situation(inventory, taken(inventory, bob="1:0")))).reason == "no_gpu_available"
    )


@pytest.mark.parametrize("asked", [None, FULL])
def test_a_whole_gpu_needs_permission(asked: str | None) -> None:
    found = refusal(decide(ask(profile=asked), limits_of(allow_full_gpu=False), situation(machine("full"))))
    assert found.reason == "full_gpu_not_allowed"
    assert found.hint


# --- which one


@pytest.mark.parametrize(
    ("strategy", "holdings", "got"),
    [
        ("least_allocated", {}, "0:0"),
        ("least_allocated", {"bob": "0:0"}, "1:0"),
        ("least_allocated", {"bob": "0:0", "carol": "1:0"}, "0:1"),
        ("least_allocated", {"bob": "0:0 0:1", "carol": "1:0"}, "1:1"),
        ("least_allocated", {"bob": "1:0"}, "0:0"),
        ("packed", {}, "0:0"),
        ("packed", {"bob": "1:1"}, "1:0"),
        ("packed", {"bob": "0:0", "carol": "1:0 1:1"}, "1:2"),
        ("packed", {"bob": "0:0", "carol": "1:0"}, "0:1"),
        ("packed", {"bob": "1:0 1:1 1:2", "carol": "0:2"}, "0:0"),
    ],
)
def test_strategy(strategy: str, holdings: dict[str, str], got: str) -> None:
    inventory = machine(THREE_SLICES, THREE_SLICES)
    found = decide(ask(profile=TWO), limits_of(), situation(inventory, taken(inventory, **holdings), strategy=strategy))
    assert ids(found) == got


@pytest.mark.parametrize(
    ("strategy", "count", "got"),
    [
        ("least_allocated", 2, "0:0 1:0"),
        ("least_allocated", 3, "0:0 0:1 1:0"),
        ("packed", 2, "0:0 0:1"),
        ("packed", 4, "0:0 0:1 0:2 1:0"),
    ],
)
def test_several_devices_are_distinct_and_follow_the_strategy(strategy: str, count: int, got: str) -> None:
    inventory = machine(THREE_SLICES, THREE_SLICES)
    assert ids(decide(ask(count, TWO), limits_of(), situation(inventory, strategy=strategy))) == got


def test_gpu_2_comes_before_gpu_10() -> None:
    inventory = machine(*["full"] * 11)
    others = " ".join(str(n) for n in range(11) if n not in (2, 10))
    found = decide(ask(profile=FULL), limits_of(), situation(inventory, taken(inventory, bob=others)))
    assert ids(found) == "2"


def test_mig_device_2_comes_before_10() -> None:
    inventory = machine(["1g.5gb"] * 12)
    others = " ".join(f"0:{n}" for n in range(12) if n not in (2, 10))
    found = decide(ask(profile="1g.5gb"), limits_of(), situation(inventory, taken(inventory, bob=others)))
    assert ids(found) == "0:2"


def test_all_or_none() -> None:
    inventory = machine("full", "full")
    found = refusal(decide(ask(2, FULL), limits_of(), situation(inventory, taken(inventory, bob="0"))))
    assert found.reason == "no_gpu_available"
    assert "2 x whole GPU" in found.message


ROOM: dict[str, tuple[str, tuple[int, int] | None, str | None]] = {
    "the whole GPU": ("full", None, None),
    "the same slices": ("3g.40gb", (0, 4), None),
    "the last of them": ("1g.10gb", (3, 1), None),
    "the next ones": ("1g.10gb", (4, 1), "0:0"),
    "another GPU": ("other", None, "1"),
}


@pytest.mark.parametrize("name", ROOM)
def test_the_room_of_a_device_that_is_missing_is_nobody_else_s(name: str) -> None:
    """bob's half of GPU 0 went with the driver's reset, and may be cut again."""
    profile, placement, got = ROOM[name]
    gone = Device("0:0", "MIG-gone", "GPU-0", "3g.40gb", (0, 4), Fraction(3, 7))
    whole = Device("1", "GPU-1", "GPU-1", FULL)
    here = Device("0" if profile == FULL else "0:0", "MIG-new", "GPU-0", profile, placement)
    inventory = replace(machine(FULL, FULL), devices=(whole,) if name == "another GPU" else (here,))
    ledger = Ledger({"p._.bob": Allocation("p._.bob", "bob", (gone,), 10, NOW, stopped_at=NOW)})
    found = decide(ask(profile=FULL if got == "1" else profile), limits_of(), situation(inventory, ledger))
    if got:
        assert ids(found) == got
    else:
        assert refusal(found).reason == "no_gpu_available"
        assert "has the room of 3g.40gb that p._.bob has and that is missing" in refusal(found).message
        assert ids(decide(ask(profile=profile), limits_of(), situation(inventory, Ledger()))) == here.id


def test_a_device_of_the_replaced_system_s_ledger_is_taken_though_it_has_no_uuid() -> None:
    old = {"allocations": {"p._.bob": {"user": "bob", "gpu_id": "0", "allocated_at": "2025-11-21T10:30:00"}}}
    ledger = records.from_json(old)
    assert ids(decide(ask(profile=FULL), limits_of(), situation(machine("full", "full"), ledger))) == "1"
    assert isinstance(decide(ask(profile=FULL), limits_of(), situation(machine("full"), ledger)), Refusal)


# --- how much


@pytest.mark.parametrize(
    ("limits", "count", "holdings", "reason"),
    [
        ({"max_gpus": 1}, 1, {}, None),
        ({"max_gpus": 1}, 2, {}, "user_at_limit"),
        ({"max_gpus": 1}, 1, {"alice": "0"}, "user_at_limit"),
        ({"max_gpus": 1}, 1, {"bob": "0"}, None),
        ({"max_gpus": 2}, 1, {"alice": "0"}, None),
        ({"max_gpus": 3}, 2, {"alice": "0 1"}, "user_at_limit"),
        ({"max_gpus": 0}, 1, {}, "user_at_limit"),
        ({"max_gpus": 0}, 0, {}, None),
        ({"max_gpus": None}, 3, {"alice": "0"}, None),
        ({"max_gpus_per_container": 1}, 2, {}, "container_limit"),
        ({"max_gpus_per_container": 1}, 1, {"alice": "0 1"}, None),
        ({"max_gpus_per_container": 0}, 1, {}, "container_limit"),
        ({"max_gpus_per_container": 0}, 0, {}, None),
        ({"max_gpus_per_container": None}, 4, {}, None),
        ({"max_gpu_equivalents": 1}, 1, {}, None),
        ({"max_gpu_equivalents": 1}, 1, {"alice": "0"}, "user_at_limit"),
        ({"max_gpu_equivalents": 0}, 1, {}, "user_at_limit"),
        ({"max_gpu_equivalents": 0.5}, 1, {}, "user_at_limit"),
        ({"max_gpu_equivalents": None}, 4, {}, None),
    ],
    ids=str,
)
def test_quota(limits: dict[str, Any], count: int, holdings: dict[str, str], reason: str | None) -> None:
    inventory = machine("full", "full", "full", "full")
    found = decide(ask(count, FULL), limits_of(**limits), situation(inventory, taken(inventory, **holdings)))
    assert (found.reason if isinstance(found, Refusal) else None) == reason


@pytest.mark.parametrize(
    ("allowed", "have", "asked", "granted"),
    [
        ("2/7", "", TWO, True),
        ("1/7", "", TWO, False),
        ("4/7", "0:0", TWO, True),
        ("3/7", "0:0", TWO, False),
        ("6/7", "0:0 0:1", TWO, True),
        ("9/7", "0:0", FULL, True),
        ("8/7", "0:0", FULL, False),
        (1.2857142857142858, "0:0", FULL, True),
        (1.2857142857142856, "0:0", FULL, False),
        (0.3, "", TWO, True),
        (0.28, "", TWO, False),
    ],
)
def test_gpu_equivalents_are_exact_fractions(allowed: Any, have: str, asked: str, granted: bool) -> None:
    inventory = machine(THREE_SLICES, "full")
    ledger = taken(inventory, alice=have) if have else Ledger()
    found = decide(ask(profile=asked), limits_of(max_gpu_equivalents=allowed), situation(inventory, ledger))
    assert isinstance(found, Grant) is granted
    if not granted:
        assert refusal(found).reason == "user_at_limit"


@pytest.mark.parametrize("status", ["pending", "active", "held"])
def test_quota_counts_an_allocation_in_any_state(status: str) -> None:
    inventory = machine("full", "full")
    ledger = taken(inventory, alice="0")
    mine = replace(
        ledger.allocations["p._.alice"],
        pending_since=NOW if status == "pending" else None,
        stopped_at=NOW if status == "held" else None,
    )
    assert mine.status == status
    found = refusal(decide(ask(), limits_of(max_gpus=1), situation(inventory, ledger.with_allocation(mine))))
    assert found.reason == "user_at_limit"
    assert f"alice has 1 of 1 devices (0 in p._.alice, {status})" in found.message
    free = "Free one with: ds01 release --container p._.alice."
    running = "Stop and remove one, such as p._.alice: playbooks/container_remove.yml."
    assert found.hint == (running if status == "active" else free)


@pytest.mark.parametrize(
    ("allowed", "containers", "granted"), [(3, 2, True), (3, 3, False), (0, 0, False), (None, 99, True), (1, 5, False)]
)
@pytest.mark.parametrize("gpus", [0, 1])
def test_container_count(allowed: int | None, containers: int, granted: bool, gpus: int) -> None:
    limits = replace(limits_of(), max_containers_per_user=allowed)
    found = decide(ask(gpus), limits, situation(machine("full"), containers=containers))
    assert isinstance(found, Grant) is granted
    if not granted:
        assert refusal(found).reason == "container_limit"


def test_a_cpu_only_container_needs_no_device() -> None:
    assert decide(ask(0), limits_of(max_gpus=0, allow_full_gpu=False), situation(machine())) == Grant(())


# --- what may not be given


@pytest.mark.parametrize("health", ["suspect", "failed", "lost"])
def test_an_unhealthy_device_is_passed_over_and_named(health: str) -> None:
    inventory = machine("full", "full", sick={"0": health})
    assert ids(decide(ask(profile=FULL), limits_of(), situation(inventory))) == "1"
    found = refusal(decide(ask(profile=FULL), limits_of(), situation(inventory, taken(inventory, bob="1"))))
    assert found.reason == "gpu_unhealthy"
    assert f"0 ({health})" in found.message


@pytest.mark.parametrize(
    ("gpus", "got"), [([[], "full"], "1"), (["full", []], "0"), ([[], THREE_SLICES], "1:0"), ([[], []], None)]
)
def test_a_gpu_in_mig_mode_without_instances_is_never_offered(gpus: list[Any], got: str | None) -> None:
    found = decide(ask(), limits_of(), situation(machine(*gpus)))
    assert (ids(found) if isinstance(found, Grant) else None) == got


def book(user: str, *devices: str, start: int = -1, end: int = 1) -> Reservation:
    return Reservation(user, devices, NOW + start * HOUR, NOW + end * HOUR)


@pytest.mark.parametrize(
    ("reservations", "got"),
    [
        ([book("bob", "0")], "1:0"),
        ([book("bob", "0:0")], "0:1"),
        ([book("bob", "0", "1:0")], "1:1"),
        ([book("alice", "0", "1")], "0:0"),
        ([book("bob", "0", start=168, end=169)], "0:0"),
        ([book("bob", "0", start=167, end=169)], "1:0"),
        ([book("bob", "0", start=-2, end=0)], "0:0"),
        ([book("bob", "0", start=0, end=1)], "1:0"),
        ([book("bob", "0:0"), book("carol", "0:1")], "0:2"),
        ([book("bob", "9")], "0:0"),
    ],
    ids=[
        "a GPU books its MIG devices",
        "one MIG device",
        "a GPU and a MIG device",
        "booked by the user",
        "not before the longest run is over",
        "a run could meet it",
        "no longer (the end is exclusive)",
        "just now (the start is inclusive)",
        "two bookings",
        "a device that is not there",
    ],
)
def test_reservations(reservations: list[Reservation], got: str) -> None:
    inventory = machine(THREE_SLICES, THREE_SLICES)
    assert ids(decide(ask(profile=TWO), limits_of(), situation(inventory, reservations=reservations))) == got


def test_everything_reserved_says_until_when() -> None:
    booked = [book("bob", "0", end=5), book("carol", "1", end=3)]
    found = refusal(decide(ask(profile=FULL), limits_of(), situation(machine("full", "full"), reservations=booked)))
    assert (found.reason, found.available_at) == ("reserved", NOW + 3 * HOUR)


def test_the_user_s_own_reservation_does_not_say_when_a_device_comes_free() -> None:
    booked = [book("bob", "0", end=5), book("alice", "1", end=1)]
    inventory = machine("full", "full")
    found = refusal(
        decide(ask(profile=FULL), limits_of(), situation(inventory, taken(inventory, alice="1"), reservations=booked))
    )
    assert (found.reason, found.available_at) == ("reserved", NOW + 5 * HOUR)


def test_the_earliest_hold_of_a_matching_device_is_told() -> None:
    inventory = machine("full", "full", [TWO])
    ledger = taken(inventory, bob="0", carol="1", dan="2:0")
    ends = {"p._.bob": NOW + 5 * HOUR, "p._.carol": NOW + 3 * HOUR, "p._.dan": NOW + HOUR}
    found = refusal(
        decide(ask(profile=FULL), limits_of(), situation(inventory, ledger, hold_end=lambda a: ends[a.container]))
    )
    assert (found.reason, found.available_at) == ("no_gpu_available", NOW + 3 * HOUR)


def test_running_containers_give_no_time() -> None:
    inventory = machine("full")
    found = refusal(decide(ask(), limits_of(), situation(inventory, taken(inventory, bob="0"))))
    assert (found.reason, found.available_at) == ("no_gpu_available", None)


# --- whatever the machine and the request


_CUTS = st.sampled_from(["full", [], THREE_SLICES, ["3g.40gb", TWO, "1g.10gb"], ["1g.10gb"] * 7])
_HEALTH = st.sampled_from(["ok", "ok", "ok", "suspect", "failed", "lost"])


@st.composite
def situations(draw: st.DrawFn) -> tuple[Request, Limits, Situation]:
    inventory = machine(*draw(st.lists(_CUTS, max_size=4)))
    devices = tuple(replace(d, health=draw(_HEALTH)) for d in inventory.devices)
    inventory = replace(inventory, devices=devices)
    owners = {d.id: draw(st.sampled_from(["", "", "alice", "bob"])) for d in devices}
    holdings = {u: " ".join(i for i, o in owners.items() if o == u) for u in ("alice", "bob") if u in owners.values()}
    booked = [d.id for d in devices if draw(st.integers(0, 4)) == 0]
    profiles = [None, FULL, TWO, "1g.10gb", "3g.40gb", "4g.40gb"]
    request = ask(draw(st.integers(0, 4)), draw(st.sampled_from(profiles)))
    limits = replace(
        limits_of(allow_full_gpu=draw(st.booleans())),
        max_gpus=draw(st.none() | st.integers(0, 6)),
        max_gpus_per_container=draw(st.none() | st.integers(0, 4)),
        max_gpu_equivalents=draw(st.none() | st.builds(Fraction, st.integers(0, 20), st.just(7))),
        max_containers_per_user=draw(st.none() | st.integers(0, 4)),
    )
    found = situation(
        inventory,
        taken(inventory, **holdings),
        strategy=draw(st.sampled_from(["least_allocated", "packed"])),
        mig_profile=draw(st.sampled_from([None, TWO])),
        enable_mig=draw(st.booleans()),
        reservations=[book(draw(st.sampled_from(["alice", "bob"])), i) for i in booked],
        containers=draw(st.integers(0, 3)),
    )
    return request, limits, found


@given(situations())
def test_granted_devices_are_free_healthy_distinct_and_allowed(case: tuple[Request, Limits, Situation]) -> None:
    request, limits, now = case
    decision = decide(request, limits, now)
    if isinstance(decision, Refusal):
        assert decision.reason in {
            "user_at_limit",
            "container_limit",
            "full_gpu_not_allowed",
            "no_gpu_available",
            "profile_not_available",
            "reserved",
            "gpu_unhealthy",
        }
        assert decision.message.endswith(".")
        return
    granted = decision.devices
    assert len(granted) == request.gpus, "all or none"
    assert len({d.uuid for d in granted}) == len(granted)
    assert list(granted) == sorted(granted, key=lambda d: d.index)
    booked = {i for r in now.reservations if r.user != "alice" for i in r.devices}
    for device in granted:
        assert device in now.inventory.devices
        assert now.ledger.holder_of(device) is None
        assert device.health == "ok"
        assert device.id not in booked
        assert request.profile in (None, device.profile)
        assert limits.allow_full_gpu or not device.is_full
    mine = [d for a in now.ledger.of_user("alice") for d in a.devices] + list(granted)
    if granted:
        assert limits.max_gpus is None or len(mine) <= limits.max_gpus
        assert limits.max_gpus_per_container is None or len(granted) <= limits.max_gpus_per_container
        allowed = limits.max_gpu_equivalents
        assert allowed is None or sum(d.equivalents for d in mine) <= allowed


@given(situations())
def test_a_refusal_for_want_of_devices_means_that_there_are_too_few(case: tuple[Request, Limits, Situation]) -> None:
    request, limits, now = case
    decision = decide(request, limits, now)
    if not isinstance(decision, Refusal) or decision.reason not in {"no_gpu_available", "reserved", "gpu_unhealthy"}:
        return
    wish = wanted_profile(request, now)
    booked = {i for r in now.reservations if r.user != "alice" for i in r.devices}
    usable = [
        d
        for d in now.inventory.devices
        if (wish == d.profile or (wish == "any" and (limits.allow_full_gpu or not d.is_full)))
        and d.health == "ok"
        and d.id not in booked
        and now.ledger.holder_of(d) is None
    ]
    assert len(usable) < request.gpus


@given(situations())
def test_the_same_situation_gives_the_same_answer(case: tuple[Request, Limits, Situation]) -> None:
    request, limits, now = case
    backwards = replace(now, inventory=replace(now.inventory, devices=now.inventory.devices[::-1]))
    assert decide(request, limits, now) == decide(request, limits, backwards)
