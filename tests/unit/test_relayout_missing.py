"""Devices that somebody has and the GPU does not show: after a reboot that nothing restored, a reset, a lost mode.
Whoever cuts the GPU then makes them again in their places, or is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ds01 import mig_text, partitions
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from state import edit

pytestmark = needs_sim

ALICE, BOB = "p._.alice", "q._.bob"
CUT = "1g.10gb,2g.20gb,3g.40gb"


@pytest.fixture(params=["A100-SXM4-80GB", "H100-SXM5-80GB"])
def server(request: pytest.FixtureRequest, start: Start) -> Server:  # noqa: F811
    """alice holds the 2g, in a place where a fresh cut would not put it; bob the 1g."""
    made = start(f"2x{request.param}", g0=CUT)
    made.apply(g0=CUT)
    made.allocate(ALICE, "2g.20gb")
    made.allocate(BOB, "1g.10gb")
    for container in (ALICE, BOB):
        made.report("active", container)
        made.report("held", container)
    assert made.cut(0) == "1g.10gb@0 2g.20gb@2 3g.40gb@4"
    return made


def reboot(server: Server) -> None:
    """Without a restore."""
    server.boot()


def reset(server: Server) -> None:
    server.simulate("reset=0")


@pytest.fixture(params=[reboot, reset])
def gone(request: pytest.FixtureRequest, server: Server) -> Server:
    event: Callable[[Server], None] = request.param
    event(server)
    assert server.gpu(0) == []
    return server


def test_the_same_layout_comes_back_as_it_was(gone: Server) -> None:
    before = gone.ledger()
    gone.apply(g0=CUT)
    assert gone.cut(0) == "1g.10gb@0 2g.20gb@2 3g.40gb@4"
    assert gone.ledger().keys() == before.keys()
    gone.check_all_done()


def test_another_layout_has_them_in_their_places(gone: Server) -> None:
    gone.apply(g0="1g.10gb,1g.10gb,2g.20gb,2g.20gb")
    there = gone.uuids(0)
    assert gone.ledger() == {ALICE: (there["2g.20gb@2"],), BOB: (there["1g.10gb@0"],)}
    gone.check_all_done()


@pytest.mark.parametrize("wanted", ["7g.80gb", "full", "", "3g.40gb,3g.40gb"])
def test_what_has_no_room_for_them_is_refused(wanted: str, gone: Server) -> None:
    written, cuts = gone.written(), gone.cuts()
    refusal = gone.refused(g0=wanted)
    assert refusal.reason == "layout_in_use"
    assert "2g.20gb at 2-3 (missing now) is in use by p._.alice of alice until" in str(refusal)
    assert "ds01 restore" in refusal.hint
    assert (gone.written(), gone.cuts(), gone.calls.writes) == (written, cuts, [])


def test_they_are_taken_where_that_is_asked_for(gone: Server) -> None:
    assert gone.refused([ALICE], g0="7g.80gb").reason == "layout_in_use"
    done = gone.apply([ALICE, BOB], g0="7g.80gb")
    assert (done.released, gone.ledger(), gone.cut(0)) == ((ALICE, BOB), {}, "7g.80gb@0")
    gone.check_all_done()


def test_one_that_is_forced_may_still_come_back(gone: Server) -> None:
    done = gone.apply([ALICE], g0="1g.10gb,2g.20gb")
    assert (done.released, gone.ledger().keys()) == ((), {ALICE, BOB})
    gone.check_all_done()


def test_they_are_listed(gone: Server) -> None:
    listing = partitions.listing(partitions.look(gone.ds01()))
    rows = [row for row in listing["instances"] if row["status"] == "missing"]
    assert {(row["container"], row["profile"], *row["placement"]) for row in rows} == {
        (ALICE, "2g.20gb", 2, 2),
        (BOB, "1g.10gb", 0, 1),
    }
    assert "missing" in mig_text.list_text(listing)


def test_a_plan_shows_whose_they_are(gone: Server) -> None:
    text = mig_text.plan_text(gone.foresee(g0=CUT))
    after = text.split("then")[1]
    assert "|bob" in after
    assert "|alice" in after


def test_somebody_cut_another_one_over_it(server: Server) -> None:
    """Another program, before DS01 came to it; nobody uses that."""
    server.simulate("reset=0")
    server.somebody_cuts(0, "7g.80gb", 0)
    server.apply(g0=CUT)
    assert server.cut(0) == "1g.10gb@0 2g.20gb@2 3g.40gb@4"
    server.check_all_done()


def test_a_whole_gpu_is_missing_while_it_is_cut(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB")
    server.allocate(ALICE, "full")
    server.report("active", ALICE)
    server.report("held", ALICE)
    with edit(server.state) as machine:  # another program switches it
        machine.gpus[0]["mig"] = "1"
    refusal = server.refused(g0="1g.10gb")
    assert "the whole GPU (missing now) is in use by p._.alice" in str(refusal)
    server.apply(g0="full")
    server.check_all_done()
    assert server.projected().keys() == {ALICE}


def test_the_other_gpu_is_cut_as_ever(gone: Server) -> None:
    gone.apply(g1="7g.80gb")
    assert gone.cut(1) == "7g.80gb@0"
