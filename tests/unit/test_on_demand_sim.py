"""Requests that cut GPUs, carried out: on the simulated driver, with NVIDIA's tools, ledger, CDI devices and all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from ds01.model import Process, Ticket
from ds01.processes import current
from ds01.transitions import Outcome
from sim_server import LIMITS, Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from test_allocations import change

pytestmark = needs_sim

A100S = "2xA100-SXM4-80GB"
DYNAMIC = LIMITS.replace("strategy: packed", "strategy: packed, mig_strategy: dynamic")


def dynamic(start: Start, gpus: str = A100S, limits: str = DYNAMIC, **cut: str) -> Server:  # noqa: F811
    server = start(gpus, **cut)
    server.host.limits(limits)
    return server


def preview(server: Server, *changes: Any) -> Sequence[Outcome]:
    return server.ds01().preview(changes)


def events(server: Server, name: str) -> list[dict[str, Any]]:
    lines = server.host.events.read_text(encoding="utf-8").splitlines() if server.host.events.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_free_room_is_cut_beside_what_is_in_use(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="2g.20gb,1g.10gb", g1="7g.80gb")
    server.allocate("p._.alice", "2g.20gb")
    alices = server.ledger()["p._.alice"]
    server.calls.clear()
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert (outcome.ok, outcome.reason) == (True, "granted")
    assert outcome.message == (
        "Allocated 0:0 (3g.40gb) to p._.bob. GPU 0 is cut for it: 2g.20gb at 0, 1g.10gb at 2, 3g.40gb at 4."
    )
    assert server.cuts() == ["2g.20gb@0 1g.10gb@2 3g.40gb@4", "7g.80gb@0"]
    assert sorted(set(server.calls.writes)) == [
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        "nvmlGpuInstanceCreateComputeInstance",
    ]
    assert server.ledger() == {"p._.alice": alices, "p._.bob": (server.uuids(0)["3g.40gb@4"],)}
    server.check_all_done()
    assert [e["message"] for e in events(server, "mig.changed")] == ["GPU 0: create 3g.40gb at 4-7."]
    assert [e["devices"][0]["id"] for e in events(server, "gpu.allocated")] == ["0:0", "0:0"]


def test_what_is_unused_is_dissolved_and_nothing_else(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="1g.10gb,1g.10gb,1g.10gb,1g.10gb,3g.40gb", g1="7g.80gb")
    for user in ("alice", "bob"):
        server.allocate(f"p._.{user}", "1g.10gb")
    server.allocate("p._.eve", "3g.40gb")
    server.allocate("q._.eve", "7g.80gb")
    before = server.ledger()
    outcome = server.allocate("p._.carol", "2g.20gb")
    assert outcome.ok, outcome.message
    assert server.cuts() == ["1g.10gb@0 1g.10gb@1 2g.20gb@2 3g.40gb@4", "7g.80gb@0"]
    assert {name: uuids for name, uuids in server.ledger().items() if name != "p._.carol"} == before
    server.check_all_done()


def test_the_preview_foresees_it_and_writes_nothing(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="2g.20gb")
    server.allocate("p._.alice", "2g.20gb")
    before, cuts = server.host.tree(), server.cuts()
    [foreseen] = preview(server, change("allocated", "bob", profile="3g.40gb"))
    assert (server.host.tree(), server.cuts()) == (before, cuts)
    assert foreseen.ok
    assert foreseen.message == (
        "Allocated 0:new (3g.40gb) to p._.bob. GPU 0 is cut for it: 2g.20gb at 0, 3g.40gb at 4."
    )
    [device] = foreseen.result()["allocation"]["devices"]
    assert (device["id"], device["uuid"], device["placement"]) == ("0:new", "", [4, 4])
    assert server.allocate("p._.bob", "3g.40gb").message == foreseen.message.replace("0:new", "0:0")


def test_static_stays_as_it_is(start: Start) -> None:  # noqa: F811
    server = start(A100S, g0="2g.20gb", g1="")
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert (outcome.reason, server.calls.writes) == ("profile_not_available", [])


def test_a_grant_that_needs_no_cut_asks_for_no_layout(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="2g.20gb", g1="")
    server.calls.clear()
    assert server.allocate("p._.alice", "2g.20gb").ok
    assert "nvmlDeviceGetGpuInstancePossiblePlacements" not in server.calls.made
    assert server.calls.made.count("nvmlInit") == 1


def test_several_at_once_and_over_two_gpus(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="4g.40gb", g1="4g.40gb")
    for number in (0, 1):
        server.allocate(f"p{number}._.alice", "4g.40gb")
    outcome = server.allocate("p._.bob", "3g.40gb", gpus=2)
    assert outcome.ok
    assert server.cuts() == ["4g.40gb@0 3g.40gb@4"] * 2
    assert set(server.ledger()["p._.bob"]) == {server.uuids(0)["3g.40gb@4"], server.uuids(1)["3g.40gb@4"]}
    server.check_all_done()


def test_all_or_nothing(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="4g.40gb", g1="7g.80gb")
    server.allocate("p._.alice", "4g.40gb")
    server.allocate("q._.alice", "7g.80gb")
    server.calls.clear()
    outcome = server.allocate("p._.bob", "3g.40gb", gpus=2)
    assert (outcome.reason, server.calls.writes) == ("no_gpu_available", [])


def test_a_batch_sees_what_is_cut_for_those_before(start: Start) -> None:  # noqa: F811
    """Its releases and grants of what is there count too; one lock, one cut of each GPU."""
    server = dynamic(start, g0="2g.20gb,1g.10gb", g1="7g.80gb")
    server.allocate("p._.alice", "2g.20gb")
    server.allocate("q._.alice", "7g.80gb")
    outcomes = server.ds01().apply(
        [
            change("allocated", "bob", profile="3g.40gb"),
            change("released", "alice", "q"),
            change("allocated", "carol", profile="1g.10gb"),
            change("allocated", "dave", profile="4g.40gb"),
            change("allocated", "eve", profile="3g.40gb"),
            change("allocated", "fay", profile="7g.80gb"),
        ]
    )
    assert [o.reason for o in outcomes] == ["granted", "released", "granted", "granted", "granted", "no_gpu_available"]
    assert server.cuts() == ["2g.20gb@0 1g.10gb@2 3g.40gb@4", "4g.40gb@0 3g.40gb@4"]
    server.check_all_done()
    for outcome in outcomes:
        if outcome.reason == "granted":
            assert outcome.allocation is not None
            assert server.ledger()[outcome.name.full] == tuple(d.uuid for d in outcome.allocation.devices)
            assert outcome.allocation.gpu_id in outcome.message
    records = json.loads(server.host.ledger.read_bytes())["allocations"]
    assert all(records[o.name.full]["gpu_id"] == o.allocation.gpu_id for o in outcomes if o.allocation), "no old names"


def test_limits_count(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="2g.20gb", limits=DYNAMIC.replace("max_gpus: 8", "max_gpus: 1"))
    server.allocate("p._.alice", "2g.20gb")
    server.calls.clear()
    assert server.allocate("q._.alice", "3g.40gb").reason == "user_at_limit"
    assert server.calls.writes == []


def test_a_hold_is_taken_over_only_where_no_cut_helps(start: Start) -> None:  # noqa: F811
    limits = DYNAMIC + "groups: {high: {members: [bob], priority: 90}}\n"
    server = dynamic(start, "A100-SXM4-80GB", limits, g0="3g.40gb")
    server.allocate("p._.alice", "3g.40gb")
    server.report("held", "p._.alice")
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert (outcome.ok, outcome.given_up) == (True, ())
    assert server.cut(0) == "3g.40gb@0 3g.40gb@4"
    outcome = server.allocate("q._.bob", "3g.40gb")
    assert [a.container for a in outcome.given_up] == ["p._.alice"]
    server.check_all_done()


def test_a_hold_that_is_over_makes_room(start: Start) -> None:  # noqa: F811
    limits = DYNAMIC.replace("gpu_hold_after_stop: 24h", "gpu_hold_after_stop: 1h")
    server = dynamic(start, "A100-SXM4-80GB", limits, g0="7g.80gb")
    server.allocate("p._.alice", "7g.80gb")
    stopped = datetime.now(timezone.utc) - timedelta(hours=2)
    server.ds01().apply([change("held", "alice", stopped_at=stopped)])
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert outcome.ok, outcome.message
    assert server.cut(0) == "3g.40gb@4"
    assert server.ledger() == {"p._.bob": (server.uuids(0)["3g.40gb@4"],)}
    assert [e["container"] for e in events(server, "gpu.released")] == ["p._.alice"]
    server.check_all_done()


def test_one_whose_device_is_gone_has_another_cut_at_its_start(start: Start) -> None:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", g0="2g.20gb,3g.40gb")
    server.allocate("p._.alice", "3g.40gb")
    server.report("held", "p._.alice")
    server.apply(force=["p._.alice"], g0="2g.20gb")
    [outcome] = server.ds01().apply([change("allocated", "alice", profile="3g.40gb", startable=True)])
    assert outcome.ok, outcome.message
    assert server.cut(0) == "2g.20gb@0 3g.40gb@4"
    server.check_all_done()


def test_after_a_reboot_the_same_is_there_again(start: Start) -> None:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", g0="2g.20gb")
    server.allocate("p._.alice", "2g.20gb")
    server.allocate("p._.bob", "3g.40gb")
    cut = server.cut(0)
    server.boot()
    outcome = server.allocate("q._.bob", "4g.40gb")
    assert not outcome.ok, "nothing is cut where a layout waits to be restored"
    server.restore()
    assert server.cut(0) == cut
    server.check_nothing_false()
    assert set(server.ledger()["p._.bob"]) == {server.uuids(0)["3g.40gb@4"]}


# --- what goes wrong


def test_where_the_driver_refuses_the_request_is_refused_and_all_is_as_before(start: Start) -> None:  # noqa: F811
    """A program in an instance that only the driver knows of."""
    server = dynamic(start, "A100-SXM4-80GB", g0="7g.80gb")
    server.simulate("busy=0:0")
    before = server.written()
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert (outcome.ok, outcome.reason, outcome.allocation) == (False, "layout_in_use", None)
    assert outcome.message.startswith("No device could be cut for p._.bob: The driver did not ")
    assert server.cut(0) == "7g.80gb@0"
    assert server.written().keys() >= before.keys()
    assert server.ledger() == {}
    assert [e["reason"] for e in events(server, "gpu.refused")] == ["layout_in_use"]
    server.check_nothing_false()


def test_where_one_gpu_cannot_be_cut_another_is(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="7g.80gb", g1="7g.80gb")
    server.simulate("busy=0:0")
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert outcome.ok, outcome.message
    assert server.cuts() == ["7g.80gb@0", "3g.40gb@4"]
    assert outcome.message == "Allocated 1:0 (3g.40gb) to p._.bob. GPU 1 is cut for it: 3g.40gb at 4."
    assert [e["reason"] for e in events(server, "mig.refused")] == ["layout_in_use"]
    server.check_all_done()


def test_one_who_waits_keeps_his_place_while_gpus_are_tried(start: Start) -> None:  # noqa: F811
    """Behind him waits another one for the same."""
    server = dynamic(start, g0="7g.80gb", g1="7g.80gb")
    for number in (0, 1):
        server.allocate(f"p{number}._.alice", "7g.80gb")
    now = datetime.now(timezone.utc).replace(microsecond=0)
    ticket = Ticket(now, now + timedelta(minutes=5), current())
    first, second = (change("allocated", user, profile="3g.40gb", ticket=ticket) for user in ("first", "second"))
    assert all(o.waiter for o in server.ds01().apply([first, second]))
    for number in (0, 1):
        server.report("released", f"p{number}._.alice")
    server.simulate("busy=0:0")
    [outcome] = server.ds01().apply([first])
    assert outcome.ok, outcome.message
    assert [w.request.user for w in server.ds01().store.read().queue] == ["second"]
    [outcome] = server.ds01().apply([second])
    assert outcome.ok, outcome.message
    assert server.cuts() == ["7g.80gb@0", "3g.40gb@0 3g.40gb@4"]
    server.check_all_done()


def test_one_who_waits_for_what_cannot_be_cut_is_told(start: Start) -> None:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", g0="7g.80gb")
    server.allocate("p._.alice", "7g.80gb")
    now = datetime.now(timezone.utc).replace(microsecond=0)
    ticket = Ticket(now, now + timedelta(minutes=5), current())
    large = change("allocated", "bob", profile="3g.40gb", ticket=ticket)
    assert server.ds01().apply([large])[0].waiter
    server.report("released", "p._.alice")
    server.simulate("busy=0:0")
    [outcome] = server.ds01().apply([large])
    assert (outcome.reason, outcome.waiter) == ("layout_in_use", None)
    assert server.ds01().store.read().queue == ()


def test_the_others_of_a_batch_get_what_is_theirs(start: Start) -> None:  # noqa: F811
    server = dynamic(start, g0="7g.80gb", g1="2g.20gb,1g.10gb")
    server.allocate("p._.alice", "2g.20gb")
    server.simulate("busy=0:0")
    server.calls.before("nvmlDeviceCreateGpuInstanceWithPlacement", lambda: server.somebody_cuts(1, "4g.40gb", 0))
    outcomes = server.ds01().apply(
        [
            change("allocated", "carol", profile="1g.10gb"),
            change("allocated", "bob", profile="4g.40gb"),
            change("released", "alice"),
        ]
    )
    assert [o.reason for o in outcomes] == ["granted", "layout_in_use", "released"]
    assert set(server.ledger()) == {"p._.carol"}
    assert server.cut(0) == "7g.80gb@0"
    server.check_nothing_false()


def test_somebody_cuts_the_same_room_meanwhile(start: Start) -> None:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", g0="2g.20gb")
    server.allocate("p._.alice", "2g.20gb")
    server.calls.before("nvmlDeviceCreateGpuInstanceWithPlacement", lambda: server.somebody_cuts(0, "3g.40gb", 4))
    outcome = server.allocate("p._.bob", "3g.40gb")
    assert outcome.ok, "what somebody else cut is there to be given"
    assert outcome.message == "Allocated 0:0 (3g.40gb) to p._.bob."
    assert server.ledger()["p._.bob"] == (server.uuids(0)["3g.40gb@4"],)
    assert [e["reason"] for e in events(server, "mig.refused")] == ["layout_impossible"]
    server.check_all_done()


def test_who_waits_is_served_by_a_cut_once_there_is_room(start: Start) -> None:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", g0="4g.40gb,2g.20gb,1g.10gb")
    for user, profile in (("alice", "4g.40gb"), ("carol", "2g.20gb"), ("dave", "1g.10gb")):
        assert server.allocate(f"p._.{user}", profile).ok
    now = datetime.now(timezone.utc).replace(microsecond=0)
    ticket = Ticket(now, now + timedelta(minutes=5), current())
    large = change("allocated", "large", profile="3g.40gb", ticket=ticket)
    [outcome] = server.ds01().apply([large])
    assert outcome.waiter is not None, outcome.message
    server.report("released", "p._.dave")
    small = server.allocate("p._.small", "1g.10gb")
    assert (small.ok, small.reason) == (False, "no_gpu_available")
    assert "kept for requests that wait" in small.message
    server.report("released", "p._.carol")
    [outcome] = server.ds01().apply([large])
    assert outcome.ok, outcome.message
    assert server.cut(0) == "4g.40gb@0 3g.40gb@4"
    assert server.ds01().store.read().queue == ()
    server.check_all_done()


def test_a_dead_waiter_keeps_nothing(start: Start) -> None:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", g0="4g.40gb,2g.20gb")
    for user, profile in (("alice", "4g.40gb"), ("carol", "2g.20gb")):
        server.allocate(f"p._.{user}", profile)
    now = datetime.now(timezone.utc).replace(microsecond=0)
    ticket = Ticket(now, now + timedelta(minutes=5), Process(2**22 - 1, 1))
    server.ds01().apply([change("allocated", "large", profile="3g.40gb", ticket=ticket)])
    assert server.allocate("p._.small", "1g.10gb").ok
    server.check_all_done()
