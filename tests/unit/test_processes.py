"""Who a process belongs to, in words, and which processes hold a node."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ds01 import processes

# name: /proc/4711/status, the phrase
STATUS = {
    "a process of a user": ("Name:\tpython3\nUmask:\t0022\nUid:\t0\t1\t1\t1\n", "process 4711 (python3 of root)"),
    "a uid without a login": (
        "Name:\tpython3\nUid:\t3999999999\t0\t0\t0\n",
        "process 4711 (python3 of uid 3999999999)",
    ),
    "a name with a tab and a space": ("Name:\ta: b\tc\nUid:\t0\t0\t0\t0\n", "process 4711 (a: b?c of root)"),
    "a name that plays with the terminal": ("Name:\t\x1b[2Jx\nUid:\t0\t0\t0\t0\n", "process 4711 (?[2Jx of root)"),
    "nothing in it": ("", "process 4711"),
    "no uid in it": ("Name:\tpython3\n", "process 4711"),
}


@pytest.mark.parametrize(("status", "phrase"), STATUS.values(), ids=STATUS)
def test_in_words(status: str, phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "4711").mkdir()
    (tmp_path / "4711" / "status").write_text(status, encoding="utf-8")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert processes.describe(4711) == phrase


def test_a_name_in_no_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_bytes(b"Name:\t\xff\nUid:\t0\t0\t0\t0\n" + b"x" * 100_000)
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert processes.describe(7) == "process 7 (\ufffd of root)"


def test_a_real_one() -> None:
    login = pwd.getpwuid(os.getuid()).pw_name
    assert processes.describe(os.getpid()).endswith(f" of {login})")


@pytest.mark.parametrize("pid", [0, -1, 2**40])
def test_one_that_is_not_there(pid: int) -> None:
    assert processes.describe(pid) == f"process {pid}"


# --- who holds a node


@contextlib.contextmanager
def holding(path: Path, name: str = "") -> Iterator[int]:
    """A real process that has the file open."""
    rename = f"open('/proc/self/comm', 'w').write({name!r});" if name else ""
    code = f"import sys; f = open(sys.argv[1], 'rb'); {rename} print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


LOGIN = pwd.getpwuid(os.getuid()).pw_name


def test_who_has_a_file_open(tmp_path: Path) -> None:
    node, other = tmp_path / "nvidia0", tmp_path / "nvidia1"
    node.touch()
    other.touch()
    with holding(node, "dcgm exporter") as first, holding(other) as second, holding(other, "\x1b[2Jx") as third:
        assert [(c.pid, c.name, c.user) for c in processes.holders([node])] == [(first, "dcgm exporter", LOGIN)]
        found = {c.pid: c for c in processes.holders([node, other, tmp_path / "none"])}
        assert set(found) == {first, second, third}
        assert found[third].name == "?[2Jx"
        assert str(found[first]).startswith(f"process {first} (dcgm exporter of {LOGIN}")
    assert processes.holders([node, other]) == []


def test_by_pid_and_without_this_process(tmp_path: Path) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    with node.open(), holding(node) as first, holding(node) as second:
        assert [c.pid for c in processes.holders([node])] == sorted([first, second])


def test_a_device_is_known_by_its_number_under_any_name(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    with holding(Path("/dev/null")) as pid, holding(Path("/dev/zero")) as zero:
        found = [c.pid for c in processes.holders([link])]
        assert pid in found
        assert zero not in found


def test_a_replaced_file_is_another_one(tmp_path: Path) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    with holding(node):
        node.rename(tmp_path / "old")
        node.touch()
        assert processes.holders([node]) == []


def test_nodes_that_are_not_there_and_no_nodes() -> None:
    assert processes.holders([]) == []
    assert processes.holders([Path("/dev/nvidia-none"), Path("/dev/null/x")]) == []


def test_with_processes_that_come_and_go(tmp_path: Path) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    with holding(node) as pid, subprocess.Popen(["/bin/sh", "-c", "while :; do /bin/true; done"]) as busy:
        try:
            for _ in range(30):
                assert [c.pid for c in processes.holders([node])] == [pid]
        finally:
            busy.kill()


# name: /proc/PID/cgroup, the unit
UNITS = {
    "cgroup v2": ("0::/system.slice/nvidia-dcgm.service\n", "nvidia-dcgm.service"),
    "cgroup v1": ("9:devices:/x.scope\n1:name=systemd:/system.slice/nvidia-dcgm.service\n", "nvidia-dcgm.service"),
    "both": ("1:name=systemd:/user.slice/user-1.slice/session-3.scope\n0::/\n", "session-3.scope"),
    "a container": ("0::/ds01.slice/ds01-a.slice/docker-0123.scope\n", "docker-0123.scope"),
    "systemd in a container": ("0::/system.slice/docker-01.scope/system.slice/dcgm.service\n", "docker-01.scope"),
    "a user's own": (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/nvidia-dcgm.service\n",
        "user@1000.service",
    ),
    "an escaped name": ("0::/system.slice/a\\x2db.service\n", "a\\x2db.service"),
    "a name with a colon": ("0::/system.slice/a:b.service\n", "a:b.service"),
    "a name that plays with the terminal": ("0::/\x1b[2J.service\n", "?[2J.service"),
    "none": ("0::/\n", ""),
    "a container of another driver": ("0::/docker/0123\n", ""),
    "nothing": ("", ""),
    "no lines of this kind": ("nonsense\n:\n", ""),
}


@pytest.mark.parametrize(("cgroup", "unit"), UNITS.values(), ids=UNITS)
def test_the_unit(cgroup: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a /proc made of ordinary files; the node and the descriptor are real."""
    node, process = tmp_path / "nvidia0", tmp_path / "proc" / "4711"
    node.touch()
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "3").symlink_to(node)
    (process / "fd" / "4").symlink_to("socket:[1]")
    (process / "status").write_text(STATUS["a process of a user"][0], encoding="utf-8")
    (process / "cgroup").write_text(cgroup, encoding="utf-8", newline="")
    (tmp_path / "proc" / "4712").mkdir()  # gone while it was looked at
    (tmp_path / "proc" / "self").mkdir()
    monkeypatch.setattr(processes, "_PROC", tmp_path / "proc")
    assert processes.holders([node]) == [processes.Client(4711, "python3", "root", unit)]
    place = f" in {unit}" if unit else ""
    assert str(processes.holders([node])[0]) == f"process 4711 (python3 of root{place})"


def test_one_that_is_gone_is_still_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    (tmp_path / "4711" / "fd").mkdir(parents=True)
    (tmp_path / "4711" / "fd" / "3").symlink_to(node)
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert [str(c) for c in processes.holders([node])] == ["process 4711"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_others_have_open_is_not_told_to_everybody(tmp_path: Path) -> None:
    """Not an error: the process is skipped."""
    node = tmp_path / "nvidia0"
    node.touch()
    with holding(node):
        child = os.fork()
        if child == 0:
            number = 99
            with contextlib.suppress(BaseException):
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                number = len(processes.holders([node]))
            os._exit(number)
        assert os.waitpid(child, 0)[1] == 0


def test_a_process_s_capabilities_are_looked_for_in_its_own_root() -> None:
    import os

    found = processes.capabilities(os.getpid())
    assert found is None or all(isinstance(number, int) for number in found)
    assert processes.capabilities(0) is None
    assert processes.capabilities(2**22 + 1) is None
