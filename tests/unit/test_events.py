"""The audit log: one JSON object a line, whoever writes at the same time."""

from __future__ import annotations

import json
import multiprocessing
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ds01.events import MAX_LINE, EventLog, actor_from_env
from hypothesis import given
from hypothesis import strategies as st
from support import NOW

PROCESSES = multiprocessing.get_context("fork")


def lines(path: Path) -> list[dict[str, Any]]:
    """The events of a file; raises where a line is not one JSON object."""
    content = path.read_bytes()
    assert content.endswith(b"\n")
    found = [json.loads(line) for line in content[:-1].split(b"\n")]
    assert all(isinstance(event, dict) for event in found)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "events.jsonl"


def test_an_event_as_documented(path: Path) -> None:
    EventLog(path, "root").write(
        "gpu.allocated", NOW, user="alice", container="p._.alice", devices=[{"id": "0:1"}], reason="granted"
    )
    assert lines(path) == [
        {
            "timestamp": "2025-11-21T10:30:00Z",
            "event": "gpu.allocated",
            "actor": "root",
            "user": "alice",
            "container": "p._.alice",
            "devices": [{"id": "0:1"}],
            "reason": "granted",
        }
    ]


@pytest.mark.parametrize(
    ("value", "kept"), [(None, False), ("", False), (0, True), (False, True), ("0", True), ([], True)], ids=repr
)
def test_only_absent_values_are_left_out(value: Any, kept: bool, path: Path) -> None:
    EventLog(path, "root").write("gpu.held", NOW, extra=value)
    assert ("extra" in lines(path)[0]) is kept


def test_events_are_appended(path: Path) -> None:
    for number in range(3):
        EventLog(path, "root").write("gpu.held", NOW, number=number)
    assert [event["number"] for event in lines(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines",
        "\r\n",
        '"quoted"',
        "{}",
        "\x00",
        "\x1b[31m",
        "Jürgen",
        "\u2028",
        "{{ 7*7 }}",
        "\\",
        "😀",
        "x\udcff",
    ],
    ids=ascii,
)
def test_any_text_stays_on_its_line(text: str, path: Path) -> None:
    EventLog(path, "root").write("gpu.refused", NOW, message=text)
    EventLog(path, text).write("gpu.refused", NOW)
    assert len(lines(path)) == 2


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "ü" * 100_000, "😀" * 100_000, "\n" * 100_000], ids=lambda t: ascii(t[0])
)
def test_a_long_text_is_cut_and_the_line_stays_whole(text: str, path: Path) -> None:
    EventLog(path, "root").write("gpu.refused", NOW, user="alice", container="p._.alice", message=text)
    (event,) = lines(path)
    assert (event["user"], event["container"]) == ("alice", "p._.alice")
    assert text.startswith(event["message"][:100])
    assert len(path.read_bytes()) <= MAX_LINE


def test_many_devices_leave_a_line_that_can_be_appended_at_once(path: Path) -> None:
    device = {"id": "7:6", "uuid": "MIG-" + "0" * 36, "gpu_uuid": "GPU-" + "0" * 36, "profile": "1g.10gb"}
    EventLog(path, "root").write("gpu.allocated", NOW, user="alice", devices=[device] * 56)
    assert lines(path)[0]["user"] == "alice"
    assert len(path.read_bytes()) <= MAX_LINE


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_modes_do_not_depend_on_the_umask(mask: int, path: Path, umask: Callable[[int], int]) -> None:
    umask(mask)
    EventLog(path, "root").write("gpu.held", NOW)
    assert oct(stat.S_IMODE(path.stat().st_mode)) == "0o640"
    assert oct(stat.S_IMODE(path.parent.stat().st_mode)) == "0o750"


def test_a_mode_that_an_admin_chose_stays(path: Path) -> None:
    EventLog(path, "root").write("gpu.held", NOW)
    path.chmod(0o644)
    EventLog(path, "root").write("gpu.held", NOW)
    assert oct(stat.S_IMODE(path.stat().st_mode)) == "0o644"


def test_a_planted_link_is_not_followed(path: Path) -> None:
    path.parent.mkdir()
    victim = path.parent / "victim"
    victim.write_bytes(b"untouched")
    path.symlink_to(victim)
    log = EventLog(path, "root")
    log.write("gpu.held", NOW)
    assert log.problem is not None
    assert victim.read_bytes() == b"untouched"


def test_a_log_that_cannot_be_written_is_a_problem_to_tell_not_an_error(path: Path) -> None:
    path.parent.write_text("a file", encoding="utf-8")
    log = EventLog(path, "root")
    assert log.problem is None
    log.write("gpu.held", NOW)
    assert log.problem is not None
    assert str(path) in log.problem


def test_a_log_that_is_set_aside_is_read_on(path: Path) -> None:
    log = EventLog(path, "root")
    for number in range(4):
        log.write("gpu.held", NOW, number=number)
        log.rotate(1, 9)
    log.rotate(1, 9)
    assert log.problem is None
    assert [event["number"] for event in EventLog(path, "").read(3, bool)] == [1, 2, 3]
    assert len(list(path.parent.iterdir())) == 5


def test_a_log_that_cannot_be_set_aside_is_a_problem_and_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(path, "root")
    log.write("gpu.held", NOW)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    log.rotate(1, 9)
    assert log.problem == f"The event log {path} could not be set aside: Read-only file system."
    log.write("gpu.held", NOW)
    assert len(lines(path)) == 2


def _write(path: Path, worker: int) -> None:
    log = EventLog(path, f"worker {worker}")
    for number in range(200):
        log.write("gpu.allocated", NOW, number=number, message="ü" * (worker * 200))


def test_eight_processes_at_once_write_whole_lines(path: Path) -> None:
    workers = [PROCESSES.Process(target=_write, args=(path, n)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0] * 8
    found = lines(path)
    assert len(found) == 1600
    assert Counter(event["actor"] for event in found) == {f"worker {n}": 200 for n in range(8)}
    for worker in range(8):
        assert [e["number"] for e in found if e["actor"] == f"worker {worker}"] == list(range(200))


@given(st.dictionaries(st.sampled_from(["user", "container", "reason", "message"]), st.text()))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    EventLog(path, "root").write("gpu.held", NOW, **fields)
    (event,) = lines(path)
    assert {key: value for key, value in event.items() if key in fields} == {k: v for k, v in fields.items() if v}


@pytest.mark.parametrize(
    ("env", "actor"),
    [
        ({"DS01_ACTOR": "carol", "SUDO_USER": "alice", "USER": "root"}, "carol"),
        ({"SUDO_USER": "alice", "USER": "root"}, "alice"),
        ({"USER": "root"}, "root"),
        ({"SUDO_USER": "", "USER": "bob"}, "bob"),
    ],
    ids=["named by a playbook", "behind sudo", "itself", "sudo without a caller"],
)
def test_actor_is_who_asked(env: dict[str, str], actor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS01_ACTOR", "SUDO_USER", "USER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert actor_from_env() == actor
