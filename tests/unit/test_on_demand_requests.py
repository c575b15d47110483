"""Requests that have GPUs cut for them: what counts is what always counts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from ds01 import on_demand, placement, queueing, takeover
from ds01.limits import GpuPolicy, Reservation
from ds01.mig import GpuState, Plan, plan_placed
from ds01.model import (
    FULL,
    Allocation,
    Device,
    Gpu,
    Grant,
    Inventory,
    Ledger,
    Process,
    Refusal,
    Request,
    Ticket,
    Waiter,
)
from ds01.placement import Situation
from hypothesis import given
from hypothesis import strategies as st
from mig_support import A100, gpu
from support import NOW, config_of, limits_of
from test_mig_exact import everything

HOUR = timedelta(hours=1)


def host(*texts: str, stopped: Mapping[str, int] | None = None, **changes: Any) -> Situation:
    """GPUs in a line each, `"2g.20gb@0=alice 1g.10gb@6"`: who has what is in the ledger, as of `stopped` held
    for so many hours; `"full"` is a GPU without MIG."""
    gpus, devices, states, had = [], [], [], {}
    for index, text in enumerate(texts):
        state, uuid = gpu("" if text == FULL else text, index=index, mig=text != FULL), f"GPU-{index}"
        gpus.append(Gpu(index, uuid, "NVIDIA A100", index, state.mig, 81920))
        if text == FULL:
            devices.append(Device(str(index), uuid, uuid, FULL))
            continue
        instances = []
        for number, i in enumerate(state.instances):
            here = (f"MIG-{index}-{number}",) if i.devices else ()
            instances.append(replace(i, devices=here, holders=()))
            share = Fraction(A100.by_name[i.profile].slices, 7)
            if here:
                devices.append(Device(f"{index}:{number}", here[0], uuid, i.profile, i.placement, share))
            for holder in i.holders:
                had.setdefault(holder.user, []).append(devices[-1])
        states.append(replace(state, instances=tuple(instances)))
    held = stopped or {}
    ledger = {
        f"p._.{user}": Allocation(
            f"p._.{user}", user, tuple(its), 10, NOW, NOW - held[user] * HOUR if user in held else None
        )
        for user, its in had.items()
    }
    inventory = Inventory(tuple(gpus), tuple(devices))
    policy = changes.pop("policy", GpuPolicy(mig_strategy="dynamic"))
    return Situation(Ledger(ledger), inventory, policy, NOW, cuttable=tuple(states), **changes)


def ask(situation: Situation, wish: str | None, count: int = 1, user: str = "bob", **limits: Any) -> Grant | Refusal:
    return takeover.decide(Request(f"q._.{user}", user, count, wish), limits_of(user, **limits), situation)


def shown(decision: Grant | Refusal) -> str:
    """`0:new 1:0; 0: 3g.40gb at 4`: the devices, and the cuts; a refusal's reason."""
    if isinstance(decision, Refusal):
        return decision.reason
    cuts = "; ".join(f"{index}: {layout}" for index, layout in sorted(decision.cuts.items()))
    return "; ".join(filter(None, [" ".join(d.id for d in decision.devices), cuts]))


# the GPUs, the wish and how many of it, what becomes of it
ASKED = {
    "what is there is given, and nothing cut": (["2g.20gb@0", ""], "2g.20gb", 1, "0:0"),
    "free room": (["2g.20gb@0=alice"], "3g.40gb", 1, "0:new; 0: 2g.20gb at 0, 3g.40gb at 4"),
    "an unused instance": (["7g.80gb@0"], "3g.40gb", 1, "0:new; 0: 3g.40gb at 4"),
    "one that is there, and one more": (["2g.20gb@0"], "2g.20gb", 2, "0:0 0:new; 0: 2g.20gb at 0, 2g.20gb at 2"),
    "over two GPUs": (
        ["4g.40gb@0=alice", "4g.40gb@0=alice"],
        "3g.40gb",
        2,
        "0:new 1:new; 0: 4g.40gb at 0, 3g.40gb at 4; 1: 4g.40gb at 0, 3g.40gb at 4",
    ),
    "in use": (["4g.40gb@0=alice 3g.40gb@4=carol"], "1g.10gb", 1, "no_gpu_available"),
    "not enough for all": (["4g.40gb@0=alice"], "3g.40gb", 2, "no_gpu_available"),
    "more than the host could ever have": (["4g.40gb@0=alice"], "3g.40gb", 3, "profile_not_available"),
    "no such profile": ([""], "5g.50gb", 1, "profile_not_available"),
    "a whole GPU is never made": ([""], FULL, 1, "profile_not_available"),
    "nor cut": ([FULL, "7g.80gb@0=alice"], "1g.10gb", 1, "no_gpu_available"),
    "without a profile, any device will do, and none is cut": ([""], None, 1, "profile_not_available"),
}


@pytest.mark.parametrize(("gpus", "wish", "count", "expected"), ASKED.values(), ids=ASKED)
def test_asked(gpus: list[str], wish: str | None, count: int, expected: str) -> None:
    assert shown(ask(host(*gpus), wish, count)) == expected


def test_the_configured_profile_is_cut_for_who_names_none() -> None:
    policy = GpuPolicy(mig_profile="2g.20gb", mig_strategy="dynamic")
    assert shown(ask(host("", policy=policy), None)) == "0:new; 0: 2g.20gb at 0"


def test_nothing_is_cut_where_gpus_stay_as_they_are() -> None:
    static = replace(host("2g.20gb@0=alice"), cuttable=())
    assert shown(ask(static, "3g.40gb")) == "profile_not_available"
    assert shown(ask(static, "2g.20gb")) == "no_gpu_available"


def test_a_refusal_says_that_nothing_can_be_cut_and_can_wait() -> None:
    refusal = ask(host("4g.40gb@0=alice 3g.40gb@4=carol"), "3g.40gb")
    assert isinstance(refusal, Refusal)
    assert refusal.retry
    assert refusal.message == "No 3g.40gb device is free: 1 of 1 in use, no GPU has unused room for it."
    refusal = ask(host("7g.80gb@0=alice"), "3g.40gb")
    assert isinstance(refusal, Refusal)
    assert (refusal.message, refusal.retry) == ("No 3g.40gb device is free: no GPU has unused room for it.", True)


LIMITS = {
    "devices": ({"max_gpus": 0}, "user_at_limit"),
    "devices in a container": ({"max_gpus_per_container": 0}, "container_limit"),
    "GPU-equivalents": ({"max_gpu_equivalents": "2/7"}, "no_gpu_available"),
    "just enough of them": ({"max_gpu_equivalents": "3/7"}, "0:new; 0: 2g.20gb at 0, 3g.40gb at 4"),
    "containers": ({"max_containers_per_user": 0}, "container_limit"),
    "MIG devices alone": ({"allow_full_gpu": False}, "0:new; 0: 2g.20gb at 0, 3g.40gb at 4"),
}


@pytest.mark.parametrize(("limits", "expected"), LIMITS.values(), ids=LIMITS)
def test_limits_count(limits: dict[str, Any], expected: str) -> None:
    assert shown(ask(host("2g.20gb@0=alice"), "3g.40gb", **limits)) == expected


WHOLE = {
    "cut on demand": ([""], "7g.80gb", 1, "full_gpu_not_allowed"),
    "that is there": (["7g.80gb@0"], "7g.80gb", 1, "full_gpu_not_allowed"),
    "that is there, and none is cuttable": (["7g.80gb@0", FULL], "7g.80gb", 1, "full_gpu_not_allowed"),
    "as any device": (["7g.80gb@0"], None, 1, "full_gpu_not_allowed"),
    "any smaller one": (["7g.80gb@0", "4g.40gb@0"], None, 1, "1:0"),
    "is dissolved for a smaller one": (["7g.80gb@0"], "4g.40gb", 1, "0:new; 0: 4g.40gb at 0"),
    "in use is no room": (["7g.80gb@0=alice"], "4g.40gb", 1, "no_gpu_available"),
}


@pytest.mark.parametrize(("gpus", "wish", "count", "expected"), WHOLE.values(), ids=WHOLE)
def test_a_mig_device_that_is_all_of_a_gpu(gpus: list[str], wish: str | None, count: int, expected: str) -> None:
    """For who may not have a whole GPU."""
    decision = ask(host(*gpus), wish, count, allow_full_gpu=False)
    assert shown(decision) == expected
    if expected == "full_gpu_not_allowed" and wish:
        assert isinstance(decision, Refusal)
        assert decision.message == "bob (student) may not have a whole GPU, and a 7g.80gb device is all of one."
    allowed = ask(host(*gpus), wish, count)
    assert isinstance(allowed, Grant) or expected == "no_gpu_available"


def test_where_gpus_stay_as_they_are_it_is_a_mig_device_like_any_other() -> None:
    static = replace(host("7g.80gb@0", policy=GpuPolicy()), cuttable=())
    assert shown(ask(static, "7g.80gb", allow_full_gpu=False)) == "0:0"
    assert shown(ask(static, None, allow_full_gpu=False)) == "0:0"


def test_nothing_is_kept_for_who_may_not_have_it() -> None:
    """Waiting for what became forbidden keeps no GPU from others."""
    limits = limits_of("bob", allow_full_gpu=False)
    request = Request("q._.bob", "bob", 1, "7g.80gb")
    situation = host("1g.10gb@0=alice")
    refusal = takeover.decide(request, limits, situation)
    assert isinstance(refusal, Refusal)
    assert on_demand.room_kept(request, limits, situation, refusal) == frozenset()


# --- holds


def test_a_cut_comes_before_a_hold_of_somebody_else() -> None:
    situation = host("3g.40gb@0=alice", stopped={"alice": 5})
    decision = ask(situation, "3g.40gb", priority=50)
    assert shown(decision) == "0:new; 0: 3g.40gb at 0, 3g.40gb at 4"
    assert isinstance(decision, Grant)
    assert decision.given_up == ()


def test_a_hold_gives_way_where_no_cut_helps() -> None:
    situation = host("3g.40gb@0=alice 3g.40gb@4=carol", stopped={"alice": 5})
    decision = ask(situation, "3g.40gb", priority=50)
    assert isinstance(decision, Grant)
    assert [a.user for a in decision.given_up] == ["alice"]
    assert decision.cuts == {}


def test_a_hold_is_never_dissolved() -> None:
    situation = host("3g.40gb@0=alice 3g.40gb@4=carol", stopped={"alice": 5})
    assert shown(ask(situation, "2g.20gb", priority=50)) == "no_gpu_available"


# --- others


def test_what_is_used_without_ds01_stays() -> None:
    situation = host("3g.40gb@0 3g.40gb@4=alice", occupied={"MIG-0-0": "container x (--gpus all)"})
    assert shown(ask(situation, "2g.20gb")) == "no_gpu_available"
    assert shown(ask(replace(situation, occupied={}), "2g.20gb")).startswith("0:new; 0: 2g.20gb at 0")


def test_a_gpu_with_a_device_missing_waits_for_what_belongs_there() -> None:
    """After a reboot, before the layout is restored."""
    situation = host("2g.20gb@0=alice", "2g.20gb@0=carol")
    gone = replace(situation.inventory, devices=situation.inventory.devices[1:])
    empty = replace(situation.cuttable[0], instances=())
    rebooted = replace(situation, inventory=gone, cuttable=(empty, situation.cuttable[1]))
    assert shown(ask(rebooted, "3g.40gb")) == "1:new; 1: 2g.20gb at 0, 3g.40gb at 4"
    alone = replace(rebooted, cuttable=(empty,))
    assert shown(ask(alone, "3g.40gb")) == "no_gpu_available"


def booking(user: str, device: str, start: int = -1, end: int = 1) -> Reservation:
    return Reservation(user, (device,), NOW + start * HOUR, NOW + end * HOUR)


BOOKED = {
    "by somebody else": ([booking("eve", "0")], "1:new; 1: 3g.40gb at 4"),
    "under its UUID": ([booking("eve", "GPU-0")], "1:new; 1: 3g.40gb at 4"),
    "soon": ([booking("eve", "0", 2, 3)], "1:new; 1: 3g.40gb at 4"),
    "not any more": ([booking("eve", "0", -2, 0)], "0:new; 0: 3g.40gb at 4"),
    "all of them": ([booking("eve", "0"), booking("eve", "1")], "no_gpu_available"),
    "for this user: first": ([booking("bob", "1")], "1:new; 1: 3g.40gb at 4"),
    "one of its MIG devices, whoever has it": ([booking("bob", "0:3", 2, 3)], "1:new; 1: 3g.40gb at 4"),
}


@pytest.mark.parametrize(("reservations", "expected"), BOOKED.values(), ids=BOOKED)
def test_reservations_count(reservations: list[Reservation], expected: str) -> None:
    assert shown(ask(host("", "", reservations=reservations), "3g.40gb")) == expected


def test_a_booked_device_is_neither_dissolved_nor_called_otherwise() -> None:
    situation = host("1g.10gb@0 1g.10gb@6=alice", reservations=[booking("eve", "MIG-0-0", 100, 101)])
    assert shown(ask(situation, "3g.40gb", max_runtime="1h")) == "no_gpu_available"
    assert shown(ask(replace(situation, reservations=[]), "3g.40gb")).startswith("0:new")


def test_strategies() -> None:
    situation = host("2g.20gb@0=alice", "")
    assert shown(ask(situation, "2g.20gb")) == "1:new; 1: 2g.20gb at 0"
    packed = replace(situation, policy=GpuPolicy("packed", mig_strategy="dynamic"))
    assert shown(ask(packed, "2g.20gb")) == "0:new; 0: 2g.20gb at 0, 2g.20gb at 2"


# --- the queue


CONFIG = config_of(max_gpus=9, max_gpus_per_container=9, allow_full_gpu=True)


def behind(situation: Situation, *waiters: tuple[str, int]) -> Situation:
    """The situation for who comes after these: (profile, number of devices)."""
    ticket = Ticket(NOW - HOUR, NOW + HOUR, Process(1, 7))
    queue = [
        Waiter(Request(f"w._.w{number}", f"w{number}", count, profile), 10, 9, ticket)
        for number, (profile, count) in enumerate(waiters)
    ]
    return queueing.keeping(queue, CONFIG, situation)


WAITING = {
    "nobody": (["4g.40gb@0=alice"], [], "3g.40gb", "0:new; 0: 4g.40gb at 0, 3g.40gb at 4"),
    "what could be cut for who waits": (["4g.40gb@0=alice"], [("3g.40gb", 1)], "1g.10gb", "no_gpu_available"),
    "and what would be dissolved for it": (
        ["4g.40gb@0=alice 1g.10gb@6"],
        [("3g.40gb", 1)],
        "1g.10gb",
        "no_gpu_available",
    ),
    "other GPUs are for others": (
        ["4g.40gb@0=alice", "2g.20gb@0=alice"],
        [("3g.40gb", 1)],
        "1g.10gb",
        "1:new; 1: 2g.20gb at 0, 1g.10gb at 2",
    ),
    "a GPU becomes empty for who waits": (
        ["1g.10gb@0=alice 1g.10gb@3", "1g.10gb@0=alice 1g.10gb@1=alice 1g.10gb@2"],
        [("7g.80gb", 1)],
        "1g.10gb",
        "1:2",
    ),
    "and nothing is cut from it": (["1g.10gb@0=alice"], [("7g.80gb", 1)], "2g.20gb", "no_gpu_available"),
    "one for each that waits": (
        ["1g.10gb@0=alice", "1g.10gb@0=alice"],
        [("7g.80gb", 1), ("7g.80gb", 1)],
        "2g.20gb",
        "no_gpu_available",
    ),
    "one who waits for a whole GPU is not in the way": (
        [FULL, "1g.10gb@0=alice"],
        [(FULL, 2)],
        "2g.20gb",
        "1:new; 1: 1g.10gb at 0, 2g.20gb at 2",
    ),
}


@pytest.mark.parametrize(("gpus", "waiters", "wish", "expected"), WAITING.values(), ids=WAITING)
def test_who_waits_is_not_delayed(
    gpus: list[str], waiters: Sequence[tuple[str, int]], wish: str, expected: str
) -> None:
    decision = ask(behind(host(*gpus), *waiters), wish)
    assert shown(decision) == expected
    if isinstance(decision, Refusal):
        assert decision.retry
        assert "kept for requests that wait" in decision.message


def test_a_large_request_is_served_in_the_end() -> None:
    """Small ones come and go, and never get the one GPU that is to become empty."""
    situation, chance = host("1g.10gb@0=a 1g.10gb@1=b 1g.10gb@2=c", "1g.10gb@0=d 1g.10gb@1=e"), random.Random(1)  # noqa: S311
    for turn in range(40):
        decision = ask(situation, "7g.80gb", user="large")
        if isinstance(decision, Grant):
            break
        running = sorted(situation.ledger.allocations)
        if running and chance.random() < 0.6:
            situation = replace(situation, ledger=situation.ledger.without(chance.choice(running)))
        small = ask(behind(situation, ("7g.80gb", 1)), "1g.10gb", user=f"s{turn}")
        if isinstance(small, Grant):
            situation = on_demand.imagined(situation, small.cuts)
            granted = Allocation(f"p._.s{turn}", f"s{turn}", small.devices, 10, NOW)
            situation = replace(situation, ledger=situation.ledger.with_allocation(granted))
    assert isinstance(decision, Grant)


# --- as if it were cut


def test_the_imagined_devices() -> None:
    situation = host("2g.20gb@0=alice 1g.10gb@6", "")
    decision = ask(situation, "4g.40gb", 1)
    assert shown(decision) == "1:new; 1: 4g.40gb at 0"
    decision = ask(replace(situation, kept={"GPU-1"}), "3g.40gb")
    assert isinstance(decision, Grant)
    after = on_demand.imagined(situation, decision.cuts)
    assert [(d.id, d.profile, d.placement) for d in after.inventory.devices] == [
        ("0:0", "2g.20gb", (0, 2)),
        ("0:new", "3g.40gb", (4, 4)),
    ]
    new = after.inventory.devices[1]
    assert (new.equivalents, new.health, new.gpu_uuid, new.index[0]) == (Fraction(3, 7), "ok", "GPU-0", 0)
    assert after.cuttable[0].instances[1].devices == (new.uuid,)
    assert after.ledger == situation.ledger


@given(st.data())
def test_whatever_is_asked(data: st.DataObject) -> None:
    """What is granted is free or new, in the number and the profile asked for; nothing in use is gone; the cuts
    can be carried out; and without a cut it was not to be had."""
    layouts = everything("A100-SXM4-80GB").layouts
    texts = []
    for _ in range(data.draw(st.integers(1, 3))):
        places = sorted(data.draw(st.sampled_from(layouts)), key=lambda place: place[1])
        marks = [data.draw(st.sampled_from(["", "", "=alice", "=carol", "=bob", "?"])) for _ in places]
        texts.append(" ".join(f"{name}@{start}{mark}" for (name, start), mark in zip(places, marks, strict=True)))
    situation = host(*texts, stopped=data.draw(st.sampled_from([{}, {"alice": 3}])))
    uuids = sorted(d.uuid for d in situation.inventory.devices)
    situation = replace(
        situation,
        kept=data.draw(st.sets(st.sampled_from([*uuids, "GPU-0"]), max_size=2)),
        occupied=dict.fromkeys(data.draw(st.sets(st.sampled_from(uuids), max_size=2)) if uuids else (), "x"),
    )
    wish, count = data.draw(st.sampled_from([p.name for p in A100.profiles])), data.draw(st.integers(1, 4))
    decision = ask(situation, wish, count)
    if isinstance(decision, Refusal) or not decision.cuts:
        return
    assert isinstance(ask(replace(situation, cuttable=()), wish, count), Refusal)
    assert len({d.uuid for d in decision.devices}) == count
    assert {d.profile for d in decision.devices} == {wish}
    after = on_demand.imagined(situation, decision.cuts)
    there = {d.uuid for d in after.inventory.devices}
    assert {d.uuid for d in decision.devices} <= there
    for device in situation.inventory.devices:
        busy = situation.ledger.holder_of(device) or device.uuid in {*situation.kept, *situation.occupied}
        assert device.uuid in there or not busy
        assert device not in decision.devices or not busy
    for state in situation.cuttable:
        if state.index in decision.cuts:
            assert state.uuid not in situation.kept
            assert isinstance(plan_placed(in_use(state, situation), decision.cuts[state.index]), Plan)
    static = placement.decide(Request("q._.bob", "bob", count, wish), limits_of("bob"), replace(after, cuttable=()))
    assert isinstance(static, Grant)


def in_use(state: GpuState, situation: Situation) -> GpuState:
    """As partitions.host marks it."""
    used = {d.uuid for a in situation.ledger.allocations.values() for d in a.devices} | set(situation.occupied)
    holders = on_demand._IN_USE
    return replace(
        state,
        instances=tuple(replace(i, holders=holders if used.intersection(i.devices) else ()) for i in state.instances),
    )
