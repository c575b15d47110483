"""The server that the relayout tests stand on does what it says."""

from __future__ import annotations

import stat

import pynvml
import pytest
from ds01 import nvml, processes
from sim_server import Start, needs_sim, start  # noqa: F401 - a fixture

pytestmark = needs_sim


def test_a_server_is_whole(start: Start) -> None:  # noqa: F811
    server = start("2xA100-SXM4-80GB", g1="2g.20gb,1g.10gb")
    assert server.cuts() == ["off", "2g.20gb@0 1g.10gb@2"]
    outcome = server.allocate("p._.alice", "2g.20gb")
    assert outcome.reason == "granted", outcome.message
    assert server.ledger() == server.projected() == {"p._.alice": (server.uuids(1)["2g.20gb@0"],)}
    server.check_all_done()
    for nodes in server.devices().values():
        for node in nodes:
            assert stat.S_ISCHR((server.root / node.lstrip("/")).stat().st_mode)


def test_calls_are_seen_and_things_happen_before_them(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0="2g.20gb")
    server.calls.before("nvmlDeviceGetMigMode", lambda: server.somebody_cuts(0, "1g.10gb", 6))
    server.calls.before("nvmlShutdown", lambda: server.simulate("lost=0"))
    with nvml.session() as driver:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetMigMode(handle)
    assert server.calls.made == ["nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMigMode", "nvmlShutdown"]
    assert server.cut(0) == "2g.20gb@0 1g.10gb@6"
    with nvml.session() as driver:
        assert driver.inventory().gpus[0].health == "lost"


def test_what_is_false_is_found(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0="2g.20gb,2g.20gb")
    server.allocate("p._.alice", "2g.20gb")
    server.allocate("p._.bob", "2g.20gb")
    alice = server.host.cdi / "ds01-p._.alice.json"
    alice.write_bytes(alice.read_bytes().replace(b"nvidia-cap3", b"nvidia-cap9"))
    with pytest.raises(AssertionError, match="nodes of another device"):
        server.check_nothing_false()
    alice.unlink()
    server.check_nothing_false()
    with pytest.raises(AssertionError):
        server.check_all_done()
    server.somebody_cuts(0, "1g.10gb", 6, compute=False)
    server.allocate("p._.alice", "2g.20gb")
    with pytest.raises(AssertionError, match="without a compute instance"):
        server.check_all_done()


def test_a_boot_takes_the_instances_and_the_specs(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB,H100-SXM5-80GB", g0="2g.20gb", g1="2g.20gb")
    server.allocate("p._.alice", "2g.20gb")
    server.boot("swap=0:1")
    assert (server.cuts(), server.projected()) == (["off", ""], {})
    assert len(server.ledger()) == 1
    assert processes.boot_id() == "boot 2"
