"""Who uses GPUs without DS01, told from DS01's own, and who is stopped."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ds01 import occupancy, processes, strangers
from ds01.model import Ledger
from ds01.occupancy import GpuUse, Program
from ds01.strangers import Stranger, Surroundings
from support import NOW, machine, taken

ID = "c0ffee" * 10 + "c0de"
TWO = machine("full", ["2g.20gb", "2g.20gb"])
AROUND = Surroundings(
    own={"own"}, outside={"out": "trainer", "dcgm": "exporter"}, harmless=["exporter"], services=["dcgm.service"]
)


def find(
    program: Program | None = None, *uses: GpuUse, ledger: Ledger | None = None, device: str = "GPU-0"
) -> tuple[Stranger, ...]:
    programs = {program.pid: program} if program else {}
    return strangers.find(TWO, ledger or Ledger(), uses, {device: tuple(programs)}, programs, AROUND)


def program(**belongs: object) -> Program:
    return replace(Program(7, "process 7", started=1), **belongs)


def kinds(found: tuple[Stranger, ...]) -> list[str]:
    return [action.subject for action in strangers.stops(found, TWO, {})]


# name: the process, who is a stranger, who is stopped
PROCESSES = {
    "of one of DS01's": (program(container_id="own"), [], []),
    "of one that only watches": (program(container_id="dcgm"), [], []),
    "of a container outside": (program(container_id="out"), ["container trainer (its process 7)"], ["trainer"]),
    "of another engine's": (program(container_id="podman"), ["process 7"], ["process 7"]),
    "outside": (program(), ["process 7"], ["process 7"]),
    "of a service that may": (program(unit="dcgm.service"), ["process 7"], []),
    "that cannot be seen": (program(started=None), ["process 7"], []),
}


@pytest.mark.parametrize(("which", "who", "stopped"), PROCESSES.values(), ids=PROCESSES)
def test_processes(which: Program, who: list[str], stopped: list[str]) -> None:
    found = find(which)
    assert [stranger.who for stranger in found] == who
    assert kinds(found) == stopped


@pytest.mark.parametrize(("started", "seen"), [(None, False), (1, True)])
def test_on_a_device_that_runs_somebody_only_who_can_be_told_counts(started: int | None, seen: bool) -> None:
    ledger = taken(TWO, alice="0")
    assert bool(find(program(started=started), ledger=ledger)) is seen
    held = ledger.with_allocation(replace(ledger.allocations["p._.alice"], stopped_at=NOW))
    assert find(program(started=started), ledger=held), "nobody of DS01's is on one that is held"


def test_all_that_one_uses_is_one_stranger() -> None:
    use = GpuUse("trainer", names=("0", "1:1"), how="--gpus", id="out")
    (found,) = find(program(container_id="out"), use, device="MIG-1-0")
    assert found == Stranger("container trainer (--gpus)", ("GPU-0", "MIG-1-1", "MIG-1-0"), "trainer", "out")
    (action,) = strangers.stops([found], TWO, {})
    assert action.message == "Container trainer (--gpus) is stopped: it uses 0, 1:1, 1:0 without DS01."


def test_one_of_ds01s_without_an_allocation_is_told_and_spared() -> None:
    found = find(None, GpuUse("p._.alice", names=("0",), how="without an allocation", id="own"))
    assert [a.message for a in strangers.seen(found, TWO, Ledger())] == [
        "Device 0 is used without DS01 by container p._.alice (without an allocation)."
    ]
    assert kinds(found) == []


NOBODYS = Program(7, "process 7 (sleep of nobody)", "nobody", started=1, name="sleep")
BOBS = Program(8, "process 8 (python3 of bob)", "bob", started=2, name="python3")
TRAINER = GpuUse("trainer", everything=True, how="--gpus all", id="out", pid=9)
OTHER = GpuUse("other", names=("0",), how="--gpus device=0", id="another")


def on_gpu_0(*programs: Program, uses: tuple[GpuUse, ...] = ()) -> tuple[Stranger, ...]:
    known = {program.pid: program for program in (*programs, Program(9, "process 9", "alice", container_id="out"))}
    return strangers.find(TWO, Ledger(), uses, {"GPU-0": [p.pid for p in programs]}, known, AROUND)


# name: who is on GPU 0, how the sentence names them, whose the action is
CROWDS = {
    "one": (on_gpu_0(NOBODYS), "process 7 (sleep of nobody)", "nobody"),
    "two users": (on_gpu_0(NOBODYS, BOBS), "process 7 (sleep of nobody) and process 8 (python3 of bob)", ""),
    "two of one user": (
        on_gpu_0(BOBS, replace(BOBS, pid=10)),
        "process 8 (python3 of bob) and process 8 (python3 of bob)",
        "bob",
    ),
    "two containers": (
        on_gpu_0(uses=(TRAINER, OTHER)),
        "container trainer (--gpus all) and container other (--gpus device=0)",
        "",
    ),
    "many": (
        on_gpu_0(*(Program(pid, f"process {pid}", "bob", started=1) for pid in (1, 2, 3, 4, 5))),
        "process 1, process 2, process 3 and 2 more",
        "bob",
    ),
}


@pytest.mark.parametrize(("on_it", "who", "user"), CROWDS.values(), ids=CROWDS)
def test_all_who_use_a_device_are_named_in_one_action(on_it: tuple[Stranger, ...], who: str, user: str) -> None:
    action = next(iter(strangers.seen(on_it, TWO, Ledger())))
    assert (action.subject, action.user) == ("0", user)
    assert action.message == f"Device 0 is used without DS01 by {who}."
    assert action.details["by"] == [stranger.record() for stranger in on_it if "GPU-0" in stranger.devices]
    assert "pid" not in action.event()


def test_each_of_them_has_an_event_of_its_own() -> None:
    found = on_gpu_0(NOBODYS, BOBS, uses=(TRAINER,))
    told = [action.event() for action in strangers.news(found, TWO, Ledger(), {}) if action.subject == "0"]
    assert [(e["user"], e["device"], e["container"], e["pid"], e["program"]) for e in told] == [
        ("alice", "0", "trainer", None, None),
        ("nobody", "0", None, 7, "sleep"),
        ("bob", "0", None, 8, "python3"),
    ]
    assert told[1]["message"] == "Device 0 is used without DS01 by process 7 (sleep of nobody)."


def test_only_who_was_not_there_before_is_news() -> None:
    before = strangers.names(on_gpu_0(NOBODYS), TWO)
    assert before == {"0": ["process 7 (sleep of nobody)"]}
    assert [a.user for a in strangers.news(on_gpu_0(NOBODYS, BOBS), TWO, Ledger(), before)] == ["bob"]
    assert not list(strangers.news((), TWO, Ledger(), before)), "nor who left"


def test_a_process_is_asked_once() -> None:
    found = find(program())
    assert not list(strangers.stops(found, TWO, {"7": 1}))
    assert list(strangers.stops(found, TWO, {"7": 2})), "another of that number"


# --- processes as they are


def running() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_real_process_is_asked_to_end_if_it_is_the_one() -> None:
    with running() as child:
        known = processes.program(child.pid)
        assert known.started
        assert not processes.ask_to_end(child.pid, known.started + 1)
        assert child.poll() is None
        assert processes.ask_to_end(child.pid, known.started)
        assert child.wait(timeout=20) != 0
    assert not processes.ask_to_end(child.pid, known.started)
    assert processes.program(child.pid) == Program(child.pid, f"process {child.pid}")


CGROUPS = {
    "v2, systemd": (f"0::/ds01.slice/ds01-a.slice/docker-{ID}.scope\n", ID, f"docker-{ID}.scope"),
    "v2, cgroupfs": (f"0::/docker/{ID}\n", ID, ""),
    "v1": (f"5:devices:/elsewhere\n1:name=systemd:/system.slice/docker-{ID}.scope\n", ID, f"docker-{ID}.scope"),
    "a container inside a container": (f"0::/docker/{ID}/docker/{'1' * 64}\n", ID, ""),
    "a session": ("0::/user.slice/user-1000.slice/session-3.scope\n", "", "session-3.scope"),
    "a name that only looks like one": (f"0::/x/docker-{ID[:-1]}.scope\n", "", f"docker-{ID[:-1]}.scope"),
    "none": ("", "", ""),
}


@pytest.mark.parametrize(("text", "container", "unit"), CGROUPS.values(), ids=CGROUPS)
def test_what_a_process_belongs_to(
    text: str, container: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(text, encoding="utf-8")
    (tmp_path / "7" / "status").write_text("Name:\tx\nUid:\t0\t0\t0\t0\n", encoding="utf-8")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    found = processes.program(7)
    assert (found.container_id, found.unit, found.user, found.started) == (container, unit, "root", None)


def test_a_use_carries_the_containers_id() -> None:
    node = {"PathOnHost": "/dev/nvidia0"}
    inspected = {"Id": ID, "Name": "/trainer", "HostConfig": {"Devices": [node]}, "Config": {}}
    use = occupancy.gpu_use(inspected)
    assert use
    assert (use.container, use.id) == ("trainer", ID)
