"""Services that give way to another MIG mode: which are stopped, in which order, and that all of them come back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sim_systemd
from ds01 import drift, pausing, processes, reconcile
from ds01.errors import Ds01Error
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


# --- what a killed run left


def silent(_: str) -> None:
    pass


@pytest.fixture
def note(server: Server, systemd: Systemd) -> Path:
    """Of a run that was killed when both had stopped."""
    for unit in (EXPORTER, DCGM):
        systemd.unit(unit, "inactive")
    file = server.host.state / "mig-services.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"boot_id": processes.boot_id(), "units": [EXPORTER, DCGM]}), encoding="utf-8")
    return file


def test_reconcile_starts_them(server: Server, systemd: Systemd, note: Path) -> None:
    foreseen = [a for a in reconcile.foresee(server.ds01()).actions if a.kind == "service.started"]
    assert (systemd.log(), note.exists()) == ([], True)
    done = [a for a in reconcile.reconcile(server.ds01()).actions if a.kind == "service.started"]
    assert done == foreseen == [drift.of_service(DCGM), drift.of_service(EXPORTER)]
    assert systemd.log() == [f"started {DCGM}", f"started {EXPORTER}"]
    assert not note.exists()
    events = [json.loads(line) for line in server.host.events.read_text(encoding="utf-8").splitlines()]
    assert [e["unit"] for e in events if e["event"] == "service.started"] == [DCGM, EXPORTER]
    assert [a for a in reconcile.reconcile(server.ds01()).actions if a.kind == "service.started"] == []


def test_reconcile_tells_of_one_that_does_not_start(server: Server, note: Path) -> None:
    (server.host.root / "bin" / "systemctl").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    found = reconcile.reconcile(server.ds01())
    assert [p["reason"] for p in found.problems if p["stage"] == "services"] == ["service_failed", "service_failed"]
    assert list(pausing.left(note)) == [DCGM, EXPORTER], "they are tried again"


def test_the_plan_shows_them_and_the_next_apply_starts_them(server: Server, systemd: Systemd, note: Path) -> None:
    server.apply(g0="full")
    for unit in (EXPORTER, DCGM):
        systemd.unit(unit, "inactive")
    note.write_text(json.dumps({"boot_id": processes.boot_id(), "units": [EXPORTER, DCGM]}), encoding="utf-8")
    foreseen = server.foresee(g0="full")
    assert foreseen.changed
    assert foreseen.repairs == tuple(f"{unit} was left stopped by an earlier run" for unit in (DCGM, EXPORTER))
    done = server.apply(g0="full")
    assert (done.repairs, systemd.running()) == (foreseen.repairs, sorted(BOTH))
    assert not server.apply(g0="full").changed


def test_those_of_a_run_at_work_are_left_alone(server: Server, systemd: Systemd) -> None:
    """A reconcile each minute, and another apply, beside a change that takes its time."""
    note = server.host.state / "mig-services.json"
    may_stop(server, *BOTH)
    seen: list[object] = []

    def meanwhile() -> None:
        seen.append(in_child(lambda: (pausing.left(note), pausing.resume(note, silent))))

    server.calls.before("nvmlDeviceSetMigMode", meanwhile)
    server.apply(g1="3g.40gb")
    assert seen == [str(((), pausing.Resumed()))]
    assert systemd.running() == sorted(BOTH)
    assert len(systemd.log()) == 2 * len(BOTH), "stopped and started once each"


def test_services_of_two_runs_are_not_mixed_up(server: Server, systemd: Systemd, note: Path) -> None:
    """What an earlier one left is started with one's own."""
    with pausing.paused([PERSISTENCED], note, silent, []):
        assert systemd.running() == []
    assert systemd.running() == sorted(BOTH)


def test_after_a_reboot_systemd_starts_them(server: Server, systemd: Systemd, note: Path) -> None:
    server.simulate("reboot")
    assert pausing.left(note) == ()
    assert pausing.resume(note, silent) == pausing.Resumed()
    assert (systemd.log(), note.exists()) == ([], False)


def test_what_cannot_be_noted_is_not_stopped(server: Server, systemd: Systemd) -> None:
    note = server.host.state / "no such directory" / "note.json"
    note.parent.parent.mkdir(exist_ok=True)
    note.parent.write_text("", encoding="utf-8")
    with pytest.raises(Ds01Error), pausing.paused([DCGM], note, silent, []):
        pytest.fail("it began")
    assert systemd.log() == []


# --- those that do not start


def events(server: Server, kind: str) -> list[str]:
    lines = server.host.events.read_text(encoding="utf-8").splitlines()
    return [e["unit"] for e in map(json.loads, lines) if e["event"] == kind]


@pytest.fixture
def failing(server: Server, systemd: Systemd) -> Systemd:
    """DCGM runs, and does not start again."""
    may_stop(server, *BOTH)
    systemd.unit(DCGM, RequiredBy=EXPORTER, fails="yes")
    return systemd


def settled(systemd: Systemd) -> None:
    systemd.unit(DCGM, "inactive", RequiredBy=EXPORTER)


def test_one_that_does_not_start_is_told_and_tried_until_it_runs(server: Server, failing: Systemd) -> None:
    done = server.apply(g1="3g.40gb").result()
    assert done["changed"]
    [warning] = done["warnings"]
    for part in (f"{DCGM} could not be started: Job for {DCGM} failed", "ds01 reconcile", f"systemctl mask {DCGM}"):
        assert part in warning
    assert failing.running() == [EXPORTER, PERSISTENCED]
    again = server.apply(g1="3g.40gb").result()
    assert (again["changed"], again["warnings"]) == (False, [warning])
    for _ in range(2):
        found = reconcile.reconcile(server.ds01())
        assert [p["msg"] for p in found.problems if p["stage"] == "services"] == [warning]
    assert events(server, "service.failed") == [DCGM], "once, however often it is tried"
    settled(failing)
    assert server.foresee(g1="3g.40gb").repairs == (f"{DCGM} was left stopped by an earlier run",)
    reconcile.reconcile(server.ds01())
    assert failing.running() == sorted(BOTH)
    assert events(server, "service.started") == [DCGM]
    assert not server.apply(g1="3g.40gb").changed


def test_a_refusal_midway_tells_of_it_too(server: Server, failing: Systemd) -> None:
    server.calls.before("nvmlDeviceSetMigMode", lambda: server.simulate("busy=1"))
    refusal = server.refused(g1="3g.40gb")
    assert refusal.reason == "layout_in_use"
    assert f"{DCGM} could not be started" in str(refusal)
    assert events(server, "service.failed") == [DCGM]
    settled(failing)
    server.simulate("idle=1")
    assert server.apply(g1="3g.40gb").result()["warnings"] == []
    assert failing.running() == sorted(BOTH)


def test_the_next_change_starts_it_with_its_own(server: Server, failing: Systemd) -> None:
    server.apply(g1="3g.40gb")
    server.calls.before("nvmlDeviceSetMigMode", lambda: settled(failing))
    done = server.apply(g0="3g.40gb")
    assert failing.running() == sorted(BOTH)
    assert done.result()["warnings"] == []


@pytest.mark.parametrize("gone", ["removed", "masked", "by itself"])
def test_a_way_out(gone: str, server: Server, failing: Systemd) -> None:
    """Whatever was removed or masked is told once more and not tried again; one that runs needs nothing."""
    server.apply(g1="3g.40gb")
    if gone == "removed":
        failing.remove(DCGM)
    elif gone == "masked":
        failing.unit(DCGM, "failed", LoadState="masked")
    else:
        failing.unit(DCGM, RequiredBy=EXPORTER)
        assert server.foresee(g1="3g.40gb").repairs == ()
    first, second = (reconcile.reconcile(server.ds01()) for _ in range(2))
    told = [p["msg"] for p in first.problems if p["stage"] == "services"]
    assert [message.endswith("is masked or gone, so it is not tried again.") for message in told] == (
        [] if gone == "by itself" else [True]
    )
    assert [p for p in second.problems if p["stage"] == "services"] == []
    assert events(server, "service.started") == []
    assert not (server.host.state / "mig-services.json").exists()


def in_child(act: Callable[[], object]) -> str:
    """What another process is answered."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, str(act()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer
