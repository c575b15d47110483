"""Services that give way to another MIG mode: which are stopped, in which order, and that all of them come back."""

from __future__ import annotations

import json

import pytest
import sim_systemd
from sim_server import LIMITS, Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from sim_systemd import Systemd

pytestmark = needs_sim

DCGM, EXPORTER, PERSISTENCED = "nvidia-dcgm.service", "dcgm-exporter.service", "nvidia-persistenced.service"
BOTH = [DCGM, EXPORTER, PERSISTENCED]


@pytest.fixture
def server(start: Start) -> Server:  # noqa: F811
    return start("2xA100-SXM4-80GB")


@pytest.fixture
def systemd(server: Server) -> Systemd:
    """An exporter that needs DCGM."""
    made = sim_systemd.install(server.host.root / "bin", server.host.root / "units")
    made.unit(DCGM, RequiredBy=EXPORTER)
    made.unit(EXPORTER)
    made.unit(PERSISTENCED)
    return made


def may_stop(server: Server, *units: str) -> None:
    server.host.limits(f"{LIMITS}policies: {{mig_services: {json.dumps(units)}}}\n")


def test_whoever_needs_another_stops_first_and_starts_last(server: Server, systemd: Systemd) -> None:
    may_stop(server, DCGM, EXPORTER, PERSISTENCED)
    before = systemd.running()
    foreseen = server.foresee(g1="3g.40gb")
    assert systemd.log() == []
    done = server.apply(g1="3g.40gb")
    assert done.services == foreseen.services == (EXPORTER, DCGM, PERSISTENCED)
    stopped = [f"stopped {unit}" for unit in done.services]
    assert systemd.log() == [*stopped, *(f"started {unit}" for unit in reversed(done.services))]
    assert systemd.running() == before
    server.check_all_done()


def test_one_that_would_stop_along_and_may_not_is_in_the_way(server: Server, systemd: Systemd) -> None:
    may_stop(server, DCGM, PERSISTENCED)
    refusal = server.refused(g1="3g.40gb")
    assert refusal.reason == "layout_in_use"
    assert f"{DCGM} (its stop would stop {EXPORTER}, which policies.mig_services does not list)" in str(refusal)
    [gpu] = refusal.details["refusals"]
    assert [holder["unit"] for holder in gpu["blocked_by"]] == [EXPORTER]
    assert (systemd.log(), server.calls.writes, server.cuts()) == ([], [], ["off", "off"])


def test_one_that_does_not_run_is_left_so(server: Server, systemd: Systemd) -> None:
    may_stop(server, DCGM)
    systemd.unit(EXPORTER, "inactive")
    assert server.apply(g1="3g.40gb").services == (DCGM,)
    assert systemd.running() == [DCGM, PERSISTENCED]


def test_nothing_is_stopped_where_no_gpu_is_reset(start: Start) -> None:  # noqa: F811
    server = start("H100-SXM5-80GB")
    systemd = sim_systemd.install(server.host.root / "bin", server.host.root / "units")
    systemd.unit(DCGM)
    may_stop(server, DCGM)
    assert server.apply(g0="3g.40gb").services == ()
    assert systemd.log() == []
