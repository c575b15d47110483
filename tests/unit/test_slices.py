"""The slice verbs, over cgroup files and a systemctl that writes them. With a real systemd: molecule/allocation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ds01 import cli, slices, systemd_slices
from ds01.errors import Ds01Error
from test_allocations_cases import Stage, stage
from test_systemd_slices import path, program, tree

__all__ = ["path", "stage"]  # fixtures

NAME = "ds01-student-alice.slice"
ALICE = f"ds01.slice/ds01-student.slice/{NAME}"
FILES = {
    "cgroup.controllers": "cpu memory pids",
    "ds01.slice/ds01-student.slice/cgroup.events": "populated 1",
    f"{ALICE}/cpu.max": "max 100000",
    f"{ALICE}/memory.max": "max",
    f"{ALICE}/memory.high": "max",
    f"{ALICE}/memory.stat": "anon 4096\nshmem 0",
    f"{ALICE}/pids.max": "12",
    f"{ALICE}/cgroup.events": "populated 1",
}
SYSTEMD = """
for argument; do case $argument in
    TasksMax=*) echo "${argument#*=}" > %(place)s/pids.max;;
    --job-mode=*) rm -r %(place)s;;
esac; done
"""


@pytest.fixture
def place(tmp_path: Path, stage: Stage, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """alice's slice on a v2 host, where she may have 500 processes and everything else; she runs a container."""
    root = tree(tmp_path / "cgroup", FILES)
    monkeypatch.setattr(systemd_slices, "CGROUPS", root)
    monkeypatch.setattr(systemd_slices, "_SETTLE", 0.2)
    monkeypatch.setattr(cli, "Allocations", lambda _: stage.ds01)
    aggregate = {"cpu_quota": None, "memory_max": None, "memory_high": None, "tasks_max": 500}
    stage.limits(groups={"student": {"aggregate": aggregate}})
    stage.runs("p._.alice")
    program(path, SYSTEMD % {"place": root / ALICE})
    return root / ALICE


def events(stage: Stage) -> list[tuple[str, str]]:
    lines = stage.host.events.read_text(encoding="utf-8").splitlines()
    return [(event["event"], event["message"]) for event in map(json.loads, lines) if "slice" in event["event"]]


def test_a_change_is_carried_out_once_and_recorded(place: Path, stage: Stage) -> None:
    done, problems = slices.apply(stage.ds01)
    assert ([action.kind for action in done], problems) == (["slice.changed"], [])
    assert (place / "pids.max").read_text(encoding="utf-8") == "500\n"
    assert slices.apply(stage.ds01) == ([], [])
    assert events(stage) == [("slice.changed", "The slice of alice: TasksMax 12 -> 500.")]


def test_a_look_changes_nothing(place: Path, stage: Stage, path: Path) -> None:
    (path / "calls").unlink(missing_ok=True)
    (action,) = slices.foresee(stage.ds01.config, {"alice"})
    assert action.kind == "slice.changed"
    assert (place / "pids.max").read_text(encoding="utf-8") == "12\n"
    assert not (path / "calls").exists()


def test_what_the_kernel_does_not_take_is_said(place: Path, stage: Stage, path: Path) -> None:
    program(path, "")
    (action,) = slices.foresee(stage.ds01.config, {"alice"})
    with pytest.raises(Ds01Error) as caught:
        slices.carry_out(stage.ds01, action, {"alice"})
    assert caught.value.reason == "slice_not_changed"
    assert caught.value.message == ("The slice of alice: TasksMax 12 -> 500: systemd took it, but the kernel did not.")
    assert slices.apply(stage.ds01)[1] == [str(caught.value)]
    assert events(stage) == []
    assert place.is_dir()


def test_the_slice_of_nobody_goes(place: Path, stage: Stage) -> None:
    (place / "cgroup.events").write_text("populated 0\n", encoding="utf-8")
    assert [kind for kind, _ in events(stage)] == []
    stage.world.remove(stage.world.boxes["p._.alice"], record_too=True)
    done, problems = slices.apply(stage.ds01)
    assert ([action.subject for action in done], problems) == ([NAME], [])
    assert not place.exists()
    assert events(stage) == [("slice.removed", f"The slice {NAME} is removed: alice has no container in it.")]


def test_a_report_is_nothing_to_do(place: Path, stage: Stage) -> None:
    (place / "pids.max").write_text("500\n", encoding="utf-8")
    stage.limits(default_group="other", groups={"other": {"aggregate": {"tasks_max": 500, "memory_max": None}}})
    found = slices.foresee(stage.ds01.config, {"alice"})
    assert "slice.moved" in [action.kind for action in found]
    assert not any(slices.carry_out(stage.ds01, a, {"alice"}) for a in found if a.kind == "slice.moved")


def test_the_commands(place: Path, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slices", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["user"], row["TasksMax"], row["MemoryMax"]) for row in listed["slices"]] == [
        ("alice", "12", "unlimited")
    ]
    assert [(action["kind"], action["subject"]) for action in listed["actions"]] == [("slice.changed", NAME)]
    assert listed["cut_off_by_reload"] == []
    assert cli.main(["slices", "list"]) == 0
    assert "TasksMax 12 -> 500" in capsys.readouterr().out
    assert cli.main(["slices", "apply", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] is True
    assert cli.main(["slices", "apply"]) == 0
    assert capsys.readouterr().out == "Every slice is as the limits file says.\n"
    assert (place / "pids.max").read_text(encoding="utf-8") == "500\n"
    assert [kind for kind, _ in events(stage)] == ["slice.changed"]


def test_whom_a_reload_cuts_off(place: Path, stage: Stage, path: Path) -> None:
    """One outside DS01 that was promised a GPU, in a scope that systemd knows no GPU of."""
    box = stage.world.create("theirs", {})
    box.promised, box.status = ("all",), "running"
    ours = stage.world.boxes["p._.alice"]
    program(
        path,
        f"printf 'Id=docker-{box.id}.scope\\nLoadState=loaded\\nDeviceAllow=char-* m\\n\\n'\n"
        f"printf 'Id=docker-{ours.id}.scope\\nLoadState=loaded\\nDeviceAllow=/dev/char/195:0 rwm\\n'",
    )
    assert slices.cut_off_by_reload(stage.ds01.engine, stage.ds01.engine.listing()) == ("theirs",)
    assert place.is_dir()
