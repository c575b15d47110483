"""What changes on the host while a request or a layout change waits for the ledger's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ds01.ledger import LedgerStore
from sim_server import LIMITS, Server, Start, needs_sim, start, steps  # noqa: F401 - start is a fixture

pytestmark = needs_sim

THREE = "2g.20gb,2g.20gb,2g.20gb"

Meanwhile = Callable[[Callable[[], object]], None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Let somebody else have the lock first, once, for this."""
    original, waiting = LedgerStore.transaction, []

    @contextmanager
    def transaction(self: LedgerStore) -> Iterator[Any]:
        if waiting:
            waiting.pop()()
        with original(self) as found:
            yield found

    monkeypatch.setattr(LedgerStore, "transaction", transaction)
    return waiting.append


def test_a_device_that_is_cut_away_meanwhile_is_not_granted(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    """The ledger is the same as before: nobody had it."""
    server = start("A100-SXM4-80GB", g0=THREE)
    server.apply(g0=THREE)
    meanwhile(lambda: server.apply(g0="1g.10gb,1g.10gb,1g.10gb,1g.10gb"))
    outcome = server.allocate("p._.alice", "2g.20gb")
    server.check_all_done()
    assert (outcome.reason, server.ledger()) == ("profile_not_available", {})


def test_a_request_sees_what_was_cut_meanwhile(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=THREE)
    meanwhile(lambda: server.apply(g0="1g.10gb,1g.10gb,1g.10gb,1g.10gb"))
    outcome = server.allocate("p._.alice", "1g.10gb")
    assert outcome.reason == "granted", outcome.message
    server.check_all_done()


def test_a_device_that_is_granted_meanwhile_is_not_cut_away(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=THREE)
    meanwhile(lambda: [server.allocate(f"p._.{user}", "2g.20gb") for user in ("alice", "bob")])
    refusal = server.refused(g0="4g.40gb,3g.40gb")
    assert refusal.reason == "layout_in_use"
    assert "p._.alice" in str(refusal)
    assert len(server.ledger()) == 2
    assert server.calls.writes == []
    server.check_all_done()


def test_a_ledger_that_is_removed_meanwhile_is_no_empty_one(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=THREE)
    server.allocate("p._.alice", "2g.20gb")
    server.report("held", "p._.alice")
    cuts = server.cuts()
    meanwhile(server.host.ledger.unlink)
    assert server.refused(g0="2g.20gb,3g.40gb").reason == "ledger_unavailable"
    assert (server.cuts(), server.calls.writes) == (cuts, [])


def test_another_change_meanwhile_is_seen(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=THREE)
    meanwhile(lambda: server.apply(g0="1g.10gb,1g.10gb,1g.10gb,1g.10gb"))
    done = server.apply(g0="2g.20gb,1g.10gb,3g.40gb")
    assert sorted(i.profile for i in server.gpu(0)) == ["1g.10gb", "2g.20gb", "3g.40gb"]
    assert not any("keep" in step for step in steps(done))
    server.check_all_done()


def test_the_same_change_meanwhile_is_enough(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=THREE)
    meanwhile(lambda: server.apply(g0="3g.40gb"))
    server.apply(g0="3g.40gb")
    assert len(server.calls.writes) == 8, "three go, one comes, and none of that twice"
    server.check_all_done()


def dynamic(server: Server) -> Server:
    server.host.limits(LIMITS.replace("strategy: packed", "strategy: packed, mig_strategy: dynamic"))
    return server


def test_what_another_program_cut_meanwhile_is_not_taken_for_a_leftover(
    start: Start,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """A request has its GPU cut, beside what came since it looked."""
    server = dynamic(start("A100-SXM4-80GB", g0=""))
    meanwhile(lambda: server.somebody_cuts(0, "1g.10gb", 0))
    assert server.allocate("p._.alice", "3g.40gb").reason == "granted"
    assert server.cut(0) == "1g.10gb@0 3g.40gb@4"
    server.check_all_done()


def test_two_requests_have_one_gpu_cut(start: Start, meanwhile: Meanwhile) -> None:  # noqa: F811
    server = dynamic(start("A100-SXM4-80GB", g0="7g.80gb"))
    meanwhile(lambda: server.allocate("q._.bob", "3g.40gb"))
    assert server.allocate("p._.alice", "3g.40gb").reason == "granted"
    assert server.cut(0) == "3g.40gb@0 3g.40gb@4"
    assert server.ledger().keys() == {"p._.alice", "q._.bob"}
    server.check_all_done()


def test_instances_that_go_while_they_are_read(start: Start) -> None:  # noqa: F811
    """Another program cuts while DS01 looks, without any lock: what is read then is read again."""
    server = start("A100-SXM4-80GB", g0=THREE)
    for call in ("nvmlDeviceGetGpuInstanceId", "nvmlGpuInstanceGetInfo", "nvmlDeviceGetAttributes"):
        for number in (1, 2, 3):
            uuids = server.uuids(0)
            server.calls.clear()
            server.calls.before(call, lambda: server.somebody_removes(0, server.gpu(0)[-1].start), number)
            assert server.ds01().preview([]) is not None
            server.foresee(g0=THREE)
            server.calls.clear()
            server.apply(g0=THREE)
            assert uuids.keys() == server.uuids(0).keys()
