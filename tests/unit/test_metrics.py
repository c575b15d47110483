"""What Prometheus is told: of a picture of a host, and of what was counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from ds01.limits import resolve
from ds01.metrics import (
    LONGEST_GAP,
    Family,
    Picture,
    Run,
    Totals,
    families,
    job_mapping,
    with_events,
    with_run,
    with_time,
)
from ds01.model import Allocation, Ledger, Process, Request, Ticket, Waiter
from hypothesis import given
from hypothesis import strategies as st
from support import NOW, config_of, machine, taken

MINUTE = timedelta(minutes=1)
SERVER = machine("full", ["2g.20gb", "2g.20gb", "3g.40gb"], sick={"1:2": "suspect"})
INSTANCES = {"MIG-1-0": 3, "MIG-1-1": 5, "MIG-1-2": 1}


def samples(found: Sequence[Family], name: str) -> dict[str, float]:
    """`a=1 b=2` -> value, of one metric; empty where there is none."""
    chosen = [family for family in found if family.name == f"ds01_{name}"]
    return {
        " ".join(f"{k}={v}" for k, v in labels.items()): value for family in chosen for labels, value in family.samples
    }


def told(name: str, picture: Picture | None = None, totals: Totals | None = None) -> dict[str, float]:
    return samples(families(picture or Picture(NOW), totals or Totals()), name)


def picture(ledger: Ledger | None = None, **known: Any) -> Picture:
    """The server with this ledger, and the default limits for everybody in it."""
    its = ledger or Ledger()
    config = config_of(max_gpus=2, max_gpu_equivalents="3/2", max_containers_per_user=None)
    users = {a.user for a in its.allocations.values()}
    allowed = {user: resolve(config, user) for user in users}
    known = {"inventory": SERVER, "instances": INSTANCES, "limits": allowed, **known}
    return Picture(NOW, its, **known)


def held(ledger: Ledger, user: str, since: datetime = NOW) -> Ledger:
    return ledger.with_allocation(replace(ledger.allocations[f"p._.{user}"], stopped_at=since))


def pending(ledger: Ledger, user: str) -> Ledger:
    return ledger.with_allocation(replace(ledger.allocations[f"p._.{user}"], pending_since=NOW))


def waiter(user: str, since: datetime) -> Waiter:
    return Waiter(Request(f"q._.{user}", user), 10, 1, Ticket(since, NOW, Process(1, 1)))


# What there is besides the server itself, and its devices by profile and status (free where nothing is said).
DEVICES: dict[str, tuple[Ledger, Mapping[str, str], str]] = {
    "nobody": (Ledger(), {}, "2g.20gb free 2, 3g.40gb unhealthy 1, full free 1"),
    "one that runs": (taken(SERVER, alice="1:0"), {}, "2g.20gb active 1 free 1, 3g.40gb unhealthy 1, full free 1"),
    "one of each": (
        held(pending(taken(SERVER, alice="1:0", bob="1:1", carol="0"), "bob"), "carol"),
        {},
        "2g.20gb active 1 pending 1, 3g.40gb unhealthy 1, full held 1",
    ),
    "somebody without DS01": (Ledger(), {"GPU-0": "x"}, "2g.20gb free 2, 3g.40gb unhealthy 1, full occupied 1"),
    "a sick one in use": (taken(SERVER, alice="1:2"), {}, "2g.20gb free 2, 3g.40gb active 1, full free 1"),
    "a sick one used without DS01": (Ledger(), {"MIG-1-2": "x"}, "2g.20gb free 2, 3g.40gb occupied 1, full free 1"),
}


@pytest.mark.parametrize(("ledger", "occupied", "expected"), DEVICES.values(), ids=list(DEVICES))
def test_devices_by_profile_and_status(ledger: Ledger, occupied: Mapping[str, str], expected: str) -> None:
    found = told("devices", picture(ledger, occupied=occupied))
    assert len(found) == 3 * 6, "every status is told, also where it is 0"
    assert sum(found.values()) == len(SERVER.devices)
    wanted = {}
    for part in expected.split(", "):
        profile, *counts = part.split()
        for status, count in zip(counts[::2], counts[1::2], strict=True):
            wanted[f"profile={profile} status={status}"] = float(count)
    assert {labels: value for labels, value in found.items() if value} == wanted


# Who has GPU 0, and whether its use counts as somebody's without DS01.
UNMANAGED = {
    "free": (Ledger(), True),
    "of one that runs": (taken(SERVER, alice="0"), False),
    "of one that is about to start": (pending(taken(SERVER, alice="0"), "alice"), False),
    "held": (held(taken(SERVER, alice="0"), "alice"), True),
}


@pytest.mark.parametrize(("ledger", "counts"), UNMANAGED.values(), ids=list(UNMANAGED))
def test_use_without_ds01(ledger: Ledger, counts: bool) -> None:
    used = picture(ledger, occupied={"GPU-0": "process 7 of mallory"})
    assert told("unmanaged_devices", used) == {"": float(counts)}
    info = told("unmanaged_device_info", used)
    assert info == ({"device=0 gpu=0 uuid=GPU-0 gpu_uuid=GPU-0 profile=full": 1} if counts else {})
    assert told("unmanaged_devices", picture(ledger)) == {"": 0}


@pytest.mark.parametrize("health", ["ok", "suspect", "failed", "lost"])
def test_the_health_of_a_gpu_is_one_of_four(health: str) -> None:
    found = told("gpu_health", picture(inventory=machine("full", "full", sick={"1": health})))
    assert len(found) == 8
    assert [labels for labels, value in found.items() if value] == ["gpu=0 health=ok", f"gpu=1 health={health}"]


def test_an_allocation_tells_what_joins_it_with_dcgm() -> None:
    ledger = held(taken(SERVER, alice="1:1 0", bob="1:0"), "bob")
    assert told("allocation_info", picture(ledger)) == {
        "container=p._.alice user=alice status=active device=0 gpu=0 uuid=GPU-0 gpu_uuid=GPU-0"
        " profile=full gpu_instance=": 1,
        "container=p._.alice user=alice status=active device=1:1 gpu=1 uuid=MIG-1-1 gpu_uuid=GPU-1"
        " profile=2g.20gb gpu_instance=5": 1,
        "container=p._.bob user=bob status=held device=1:0 gpu=1 uuid=MIG-1-0 gpu_uuid=GPU-1"
        " profile=2g.20gb gpu_instance=3": 1,
    }


def test_a_device_that_is_gone_is_counted_and_keeps_its_record() -> None:
    gone = picture(taken(SERVER, alice="0 1:0"), inventory=machine("full", []))
    assert told("allocated_devices_missing", gone) == {"": 1}
    assert len(told("allocation_info", gone)) == 2
    assert told("allocated_devices_missing", picture(taken(SERVER, alice="0 1:0"))) == {"": 0}


def test_holds_tell_their_start_and_their_end_where_they_have_one() -> None:
    ledger = held(held(taken(SERVER, alice="0", bob="1:0", carol="1:1"), "alice", NOW - MINUTE), "bob")
    seen = picture(ledger, hold_ends={"p._.alice": NOW + MINUTE})
    now = NOW.timestamp()
    assert told("hold_start_timestamp_seconds", seen) == {
        "container=p._.alice user=alice": now - 60,
        "container=p._.bob user=bob": now,
    }
    assert told("hold_end_timestamp_seconds", seen) == {"container=p._.alice user=alice": now + 60}


def test_the_queue() -> None:
    waiting = picture(queue=[waiter("alice", NOW - MINUTE), waiter("bob", NOW)])
    assert told("queue_requests", waiting) == {"": 2}
    assert told("queue_waiting_since_timestamp_seconds", waiting) == {
        "container=q._.alice user=alice": NOW.timestamp() - 60,
        "container=q._.bob user=bob": NOW.timestamp(),
    }
    assert told("queue_requests", picture()) == {"": 0}


def test_quotas_tell_what_is_used_and_what_is_allowed() -> None:
    ledger = held(taken(SERVER, alice="0 1:0", bob="1:1"), "bob")
    seen = picture(ledger, containers={"alice": 3})
    alice, bob = "user=alice group=student", "user=bob group=student"
    assert told("user_devices", seen) == {alice: 2, bob: 1}
    assert told("user_devices_limit", seen) == {alice: 2, bob: 2}
    assert told("user_gpu_equivalents", seen) == pytest.approx({alice: 9 / 7, bob: 2 / 7})
    assert told("user_gpu_equivalents_limit", seen) == {alice: 1.5, bob: 1.5}
    assert told("user_containers", seen) == {alice: 3, bob: 0}
    assert told("user_containers_limit", seen) == {}, "unlimited"


# What is not known, and the metrics that are not there then.
UNKNOWN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "no driver": (
        {"inventory": None, "instances": None},
        {"gpu_health", "gpu_info", "driver_info", "devices", "unmanaged_devices", "allocated_devices_missing"},
    ),
    "no ledger": (
        {"ledger": None},
        {
            "devices", "unmanaged_devices", "allocation_info", "allocated_devices_missing", "queue_requests",
            "user_devices", "user_gpu_equivalents", "hold_start_timestamp_seconds",
        },
    ),
    "no engine": ({"containers": None}, {"user_containers"}),
}  # fmt: skip


@pytest.mark.parametrize(("change", "missing"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_what_is_not_known_is_not_told(change: dict[str, Any], missing: set[str]) -> None:
    whole = picture(held(taken(SERVER, alice="0"), "alice"), containers={"alice": 1})
    names = [{f.name for f in families(p, Totals())} for p in (whole, replace(whole, **change))]
    assert names[0] - names[1] == {f"ds01_{name}" for name in missing}


def test_parts_of_the_host_that_answer() -> None:
    assert told("component_available", Picture(NOW, available={"ledger": False, "driver": True})) == {
        "component=driver": 1,
        "component=ledger": 0,
    }


# --- what is counted


def events(*told: str) -> Iterable[Mapping[str, object]]:
    for text in told:
        event, _, reason = text.partition(" ")
        yield {"event": event, "reason": reason}


def test_events_and_refusals_are_counted_on() -> None:
    totals = with_events(Totals(), events("gpu.held", "gpu.refused user_at_limit", "gpu.held"))
    totals = with_events(totals, events("gpu.refused user_at_limit", "gpu.refused reserved", "mig.changed"))
    found = told("events_total", totals=totals)
    assert {k: v for k, v in found.items() if v} == {
        "event=gpu.held": 2,
        "event=gpu.refused": 3,
        "event=mig.changed": 1,
    }
    refused = told("refusals_total", totals=totals)
    assert {k: v for k, v in refused.items() if v} == {"reason=reserved": 1, "reason=user_at_limit": 2}


def test_what_never_happened_yet_is_zero_so_that_its_first_time_is_seen() -> None:
    assert told("events_total")["event=gpu.refused"] == 0
    assert told("refusals_total")["reason=no_gpu_available"] == 0


@pytest.mark.parametrize(
    "event",
    [{}, {"event": None}, {"event": 7}, {"event": ["a"]}, {"event": "Käse"}, {"event": "a b"}, {"event": "x" * 99}],
    ids=repr,
)
def test_a_word_that_is_none_of_ds01_s_makes_no_metric(event: dict[str, object]) -> None:
    assert with_events(Totals(), [event, {"event": "gpu.refused", "reason": event.get("event")}]).events == {
        "other": 1,
        "gpu.refused": 1,
    }


def test_words_are_bounded() -> None:
    totals = with_events(Totals(), events(*(f"gpu.refused reason_{n}" for n in range(1000))))
    assert len(totals.refusals) == 101
    assert sum(totals.refusals.values()) == 1000
    totals = with_events(totals, events("gpu.refused reason_7"))
    assert totals.refusals["reason_7"] == 2, "one that is known goes on being counted"


def allocation(begun: timedelta, status: str, devices: int = 1) -> Ledger:
    """alice's, in this status since so long before NOW."""
    ids = " ".join(["0", "1:0", "1:1"][:devices])
    a: Allocation = taken(SERVER, alice=ids).allocations["p._.alice"]
    since = NOW - begun
    changes: dict[str, Any] = {"active": {}, "held": {"stopped_at": since}, "pending": {"pending_since": since}}[status]
    allocated = since if status == "active" else since - timedelta(days=1)
    return Ledger({a.container: replace(a, allocated_at=allocated, **changes)})


# Since when it has the status, when it was counted last, and the seconds that are counted now.
SPENT: dict[str, tuple[timedelta, timedelta | None, int]] = {
    "the whole minute": (timedelta(hours=5), MINUTE, 60),
    "begun in between": (timedelta(seconds=20), MINUTE, 20),
    "the first time": (timedelta(hours=5), None, 0),
    "looked at again at once": (timedelta(hours=5), timedelta(0), 0),
    "just not too long": (timedelta(hours=5), LONGEST_GAP, 600),
    "after a day without a look": (timedelta(hours=5), timedelta(days=1), 600),
    "the clock was set back": (timedelta(hours=5), timedelta(days=-1), 0),
    "begun in the future": (timedelta(hours=-5), MINUTE, 0),
}


@pytest.mark.parametrize("status", ["pending", "active", "held"])
@pytest.mark.parametrize(("begun", "last", "spent"), SPENT.values(), ids=list(SPENT))
def test_the_time_of_devices(begun: timedelta, last: timedelta | None, spent: int, status: str) -> None:
    before = Totals(seconds={("bob", "held"): 7.0}, counted_until=None if last is None else NOW - last)
    totals = with_time(before, allocation(begun, status), {}, NOW)
    assert totals.seconds == {("bob", "held"): 7.0, ("alice", status): spent}
    assert totals.counted_until == NOW


def test_every_device_counts() -> None:
    totals = with_time(Totals(counted_until=NOW - MINUTE), allocation(timedelta(hours=1), "held", 3), {}, NOW)
    assert told("allocated_device_seconds_total", totals=totals) == {"user=alice status=held": 180}


@given(st.lists(st.integers(0, 600), max_size=20))
def test_however_often_it_is_counted_the_sum_is_the_same(pauses: list[int]) -> None:
    ledger = allocation(timedelta(hours=1), "active", 2)
    totals, now = Totals(counted_until=NOW), NOW
    for pause in pauses:
        now += timedelta(seconds=pause)
        totals = with_time(totals, ledger, {}, now)
    assert totals.seconds.get(("alice", "active"), 0.0) == pytest.approx(2 * sum(pauses))


# Status of alice's two devices, how long her container is idle (None: in use, or not known), and the idle time of a
# minute.
IDLE: dict[str, tuple[str, timedelta | None, float | None]] = {
    "for long": ("active", timedelta(hours=5), 120),
    "just now": ("active", timedelta(seconds=20), 40),
    "in use": ("active", None, None),
    "stopped": ("held", timedelta(hours=5), None),
    "about to start": ("pending", timedelta(hours=5), None),
}


@pytest.mark.parametrize(("status", "idle", "spent"), IDLE.values(), ids=IDLE)
def test_a_running_container_that_uses_nothing_counts(status: str, idle: timedelta | None, spent: float | None) -> None:
    ledger, known = allocation(timedelta(hours=1), status, 2), {} if idle is None else {"p._.alice": idle}
    totals = with_time(Totals(idle={"bob": 7.0}, counted_until=NOW - MINUTE), ledger, known, NOW)
    mine = {} if spent is None else {"user=alice": spent}
    assert told("idle_device_seconds_total", totals=totals) == {"user=bob": 7.0, **mine}
    gauge = told("container_idle_seconds", picture(ledger, idle=known))
    assert gauge == ({"container=p._.alice user=alice": idle.total_seconds()} if spent and idle else {})


def test_a_run_that_failed_leaves_when_one_was_last_all_right() -> None:
    totals = with_run(with_run(Totals(), Run(NOW, 0.5, ok=True)), Run(NOW + MINUTE, 1.5, ok=False))
    assert told("reconcile_last_run_timestamp_seconds", totals=totals) == {"": NOW.timestamp() + 60}
    assert told("reconcile_last_success_timestamp_seconds", totals=totals) == {"": NOW.timestamp()}
    assert told("reconcile_last_run_duration_seconds", totals=totals) == {"": 1.5}
    assert told("reconcile_last_run_timestamp_seconds") == {}
    assert told("reconcile_last_success_timestamp_seconds", totals=with_run(Totals(), Run(NOW, 1, ok=False))) == {}


# --- dcgm-exporter's job mapping


MAPPINGS: dict[str, tuple[Picture, dict[str, str] | None]] = {
    "nobody": (picture(), {}),
    "a GPU": (picture(taken(SERVER, alice="0")), {"0": "alice:p._.alice\n"}),
    "a MIG device by its GPU instance": (picture(taken(SERVER, alice="1:1")), {"1.5": "alice:p._.alice\n"}),
    "several": (
        picture(taken(SERVER, alice="0 1:0", bob="1:1")),
        {"0": "alice:p._.alice\n", "1.3": "alice:p._.alice\n", "1.5": "bob:p._.bob\n"},
    ),
    "held": (picture(held(taken(SERVER, alice="0"), "alice")), {"0": "alice:p._.alice\n"}),
    "one that is gone": (
        picture(taken(SERVER, alice="0 1:0"), inventory=machine("full", [])),
        {"0": "alice:p._.alice\n"},
    ),
    "an instance that nobody knows": (picture(taken(SERVER, alice="1:0"), instances={}), {}),
    "no driver": (picture(inventory=None), None),
    "instances not known": (picture(instances=None), None),
    "no ledger": (replace(picture(), ledger=None), None),
}


@pytest.mark.parametrize(("seen", "expected"), MAPPINGS.values(), ids=list(MAPPINGS))
def test_jobs_of_devices(seen: Picture, expected: dict[str, str] | None) -> None:
    assert job_mapping(seen) == expected


def test_a_gpu_that_got_another_index_is_named_by_that() -> None:
    ledger = taken(SERVER, alice="0")
    swapped = machine("full", "full")
    gpus = [replace(d, uuid=u, gpu_uuid=u) for d, u in zip(swapped.devices, ("GPU-1", "GPU-0"), strict=True)]
    assert job_mapping(picture(ledger, inventory=replace(swapped, devices=tuple(gpus)))) == {"1": "alice:p._.alice\n"}
