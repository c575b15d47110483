"""What is over is in nobody's way: a hold that ended, a grant whose container was never started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from ds01 import engine, mig_text, partitions, relayout
from ds01.allocations import Allocations
from ds01.errors import Ds01Error
from ds01.paths import Paths
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from test_relayout_engine import ALICE, CUT, WANTED, engine_of

pytestmark = needs_sim

LIMITS = """
defaults: {max_gpus: 8, max_gpus_per_container: 4, allow_full_gpu: true, gpu_hold_after_stop: 24h}
gpu_allocation: {enable_mig: true, mig_profile: null, strategy: packed}
policies: {pending_timeout: 30m}
"""


@pytest.fixture
def server(start: Start) -> Server:  # noqa: F811
    """alice's container, which is to be started, has the 2g."""
    made = start("A100-SXM4-80GB", g0=CUT)
    made.host.limits(LIMITS)
    made.allocate(ALICE, "2g.20gb")
    return made


def later(**time: float) -> Allocations:
    return Allocations(Paths.from_env(), "tester", lambda: datetime.now(timezone.utc) + timedelta(**time))


def wanted(ds01: Allocations) -> partitions.Wanted:
    return partitions.wanted(ds01, gpus={0: WANTED.split(",")})


def refused(ds01: Allocations) -> Mapping[str, Any]:
    """Who is in the way."""
    answers = []
    for verb in (relayout.foresee, relayout.apply):
        with pytest.raises(Ds01Error) as caught:
            verb(ds01, wanted(ds01))
        answers.append((caught.value.reason, caught.value.details["refusals"][0]))
    assert answers[0] == answers[1], "the plan says what the apply says"
    assert answers[0][0] == "layout_in_use"
    return answers[0][1]


def events(server: Server) -> list[tuple[str, str | None]]:
    found = [json.loads(line) for line in server.host.events.read_text(encoding="utf-8").splitlines()]
    return [(event["event"], event.get("container")) for event in found]


@pytest.mark.parametrize(("state", "until"), [("held", timedelta(hours=24)), ("pending", timedelta(minutes=30))])
def test_until_it_is_over_it_is_in_the_way_and_the_refusal_says_until_when(
    state: str, until: timedelta, server: Server
) -> None:
    if state == "held":
        server.report("active", ALICE)
        server.report("held", ALICE)
    begun = datetime.now(timezone.utc)
    refusal = refused(later(seconds=until.total_seconds() - 60))
    [blocker] = refusal["blocked_by"]
    assert blocker["container"] == ALICE
    end = datetime.fromisoformat(blocker["until"].replace("Z", "+00:00"))
    assert abs(end - begun - until) < timedelta(seconds=60)
    assert refusal["available_at"] == blocker["until"]


@pytest.mark.parametrize("state", ["held", "pending"])
def test_what_is_over_is_given_back(state: str, server: Server) -> None:
    if state == "held":
        server.report("active", ALICE)
        server.report("held", ALICE)
    written, ds01, known = server.written(), later(hours=25), events(server)
    foreseen = relayout.foresee(ds01, wanted(ds01))
    assert (server.written(), events(server)) == (written, known), "a plan writes nothing"
    assert foreseen.result()["given_back"] == [ALICE]
    assert f"given back: {ALICE}: 0:1 is free again" in mig_text.plan_text(foreseen)

    done = relayout.apply(ds01, wanted(ds01))
    assert (done.result()["given_back"], done.result()["released"]) == ([ALICE], [])
    assert done.result()["plan"] == foreseen.result()["plan"]
    assert (server.ledger(), server.projected()) == ({}, {})
    assert events(server)[len(known) :] == [("gpu.released", ALICE), ("mig.changed", None)]
    server.check_all_done()


def test_where_nothing_is_to_be_cut_nothing_is_given_back(server: Server) -> None:
    written, ds01 = server.written(), later(hours=25)
    as_it_is = partitions.wanted(ds01, gpus={0: CUT.split(",")})
    server.apply(g0=CUT)  # notes the layout
    written = server.written()
    done = relayout.apply(ds01, as_it_is)
    assert (done.changed, done.result()["given_back"]) == (False, [])
    assert server.written() == written


def test_what_is_over_stays_given_back_where_the_driver_refuses(server: Server) -> None:
    """As any request would have left it."""
    cuts, ds01 = server.cuts(), later(hours=25)
    server.calls.before("nvmlDeviceCreateGpuInstanceWithPlacement", lambda: server.somebody_cuts(0, "1g.10gb", 6))
    with pytest.raises(Ds01Error):
        relayout.apply(ds01, partitions.wanted(ds01, gpus={0: ["2g.20gb", "1g.10gb", "1g.10gb", "2g.20gb", "1g.10gb"]}))
    assert server.cuts() != cuts or server.ledger() == {}
    assert server.ledger() == server.projected() == {}
    server.check_nothing_false()


def test_a_container_that_runs_keeps_its_device(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started past DS01: its grant is pending by the ledger, long after the time to start it."""
    monkeypatch.delenv("DS01_ENGINE")
    engine_of(server, monkeypatch, "running")
    refusal = refused(later(hours=25))
    assert [b["container"] for b in refusal["blocked_by"]] == [ALICE]
    assert refusal["blocked_by"][0]["until"] is None


def test_one_that_is_started_meanwhile_keeps_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the moment its CDI device is out of reach."""
    monkeypatch.delenv("DS01_ENGINE")
    docker = engine_of(server, monkeypatch, "exited", then={3: {ALICE: "running"}})
    cuts, ledger, ds01 = server.cuts(), server.ledger(), later(hours=25)
    with pytest.raises(Ds01Error) as caught:
        relayout.apply(ds01, wanted(ds01))
    assert docker.listings >= 3
    assert caught.value.reason == "container_busy"
    assert engine.disabled() is False
    assert (server.cuts(), server.calls.writes) == (cuts, [])
    assert server.projected() == server.ledger() == ledger
