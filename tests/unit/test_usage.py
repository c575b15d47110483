"""What containers use, read from cgroups of both versions and from live processes."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from ds01 import accounts, processes, usage
from ds01.names import Account
from ds01.policies import Usage

ONE, TWO = "a" * 64, "b" * 64


@pytest.fixture
def process() -> Iterator[int]:
    """Somebody's process, younger than this one."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child.pid
    child.communicate()


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def version_2(root: Path, name: str, pids: list[int]) -> Path:
    write(root, cgroup__controllers="cpu memory\n")
    stat = "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n"
    procs = "".join(f"{pid}\n" for pid in pids)
    return write(root / "ds01.slice" / name, cpu__stat=stat, memory__current="1048576\n", cgroup__procs=procs)


def version_1(root: Path, name: str, pids: list[int]) -> Path:
    """The two controllers have hierarchies of their own, where the container may stand in other places."""
    write(root / "memory" / "elsewhere" / name, memory__usage_in_bytes="1048576\n")
    procs = "".join(f"{pid}\n" for pid in pids)
    return write(root / "cpuacct" / "ds01.slice" / name, cpuacct__usage="2500000999\n", cgroup__procs=procs)


VERSIONS = pytest.mark.parametrize("version", [version_2, version_1])
Version = Callable[[Path, str, list[int]], Path]


@VERSIONS
@pytest.mark.parametrize("name", [f"docker-{ONE}.scope", ONE], ids=["systemd", "cgroupfs"])
def test_what_a_container_uses(version: Version, name: str, tmp_path: Path, process: int) -> None:
    version(tmp_path, name, [process])
    found = usage.usages([ONE, TWO], tmp_path)
    assert list(found) == [ONE]
    assert (found[ONE].cpu, found[ONE].memory) == (timedelta(seconds=2.5), 1048576)
    age = usage.clock().uptime - found[ONE].started
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert found[ONE].network is None  # this process has the host's network


@VERSIONS
def test_it_started_with_its_oldest_process(version: Version, tmp_path: Path, process: int) -> None:
    version(tmp_path, ONE, [process, os.getpid()])
    started = processes.started(os.getpid())
    assert started is not None
    ticks = os.sysconf("SC_CLK_TCK")
    assert abs(usage.usages([ONE], tmp_path)[ONE].started.total_seconds() - started / ticks) < 0.001


def test_a_container_with_its_own_systemd_has_its_processes_below(tmp_path: Path, process: int) -> None:
    scope = version_2(tmp_path, f"docker-{ONE}.scope", [])
    write(scope / "init.scope", cgroup__procs=f"{process}\n")
    write(scope / "user.slice", cgroup__procs="")
    assert list(usage.usages([ONE], tmp_path)) == [ONE]


def test_what_a_container_makes_inside_is_no_container(tmp_path: Path, process: int) -> None:
    """It may call a cgroup of its own by another's id."""
    scope = version_2(tmp_path, f"docker-{ONE}.scope", [process])
    version_2(scope, f"docker-{TWO}.scope", [process])
    (scope / "cgroup.controllers").unlink()
    assert list(usage.usages([ONE, TWO], tmp_path)) == [ONE]


BROKEN: dict[str, Callable[[Path], object]] = {
    "no CPU counter": lambda scope: (scope / "cpu.stat").unlink(),
    "CPU counter of nothing": lambda scope: (scope / "cpu.stat").write_text(""),
    "CPU counter without a sum": lambda scope: (scope / "cpu.stat").write_text("user_usec 1\nsystem_usec 2\n"),
    "CPU counter of words": lambda scope: (scope / "cpu.stat").write_text("usage_usec much\n"),
    "no memory": lambda scope: (scope / "memory.current").unlink(),
    "memory of words": lambda scope: (scope / "memory.current").write_text("max\n"),
    "no processes": lambda scope: (scope / "cgroup.procs").write_text(""),
    "no list of processes": lambda scope: (scope / "cgroup.procs").unlink(),
    "a process that is gone": lambda scope: (scope / "cgroup.procs").write_text(f"{2**22 - 1}\n"),
    "not ASCII": lambda scope: (scope / "cpu.stat").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_read_is_absent(damage: Callable[[Path], object], tmp_path: Path, process: int) -> None:
    scope = version_2(tmp_path, f"docker-{ONE}.scope", [process])
    version_2(tmp_path, f"docker-{TWO}.scope", [process])
    damage(scope)
    assert list(usage.usages([ONE, TWO], tmp_path)) == [TWO]


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert usage.usages([ONE], tmp_path / "nowhere") == {}


def test_the_traffic_of_a_network_of_its_own(tmp_path: Path, process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = tmp_path / "proc"
    header = "Inter-|   Receive  |  Transmit\n face |bytes  packets\n"
    lines = "    lo: 999 1 0 0 0 0 0 0 999 1 0 0 0 0 0 0\n  eth0: 1000 1 0 0 0 0 0 0 24 1 0 0 0 0 0 0\n"
    write(proc / str(process) / "net", dev=header + lines)
    for pid, name in (("self", "net:[1]"), (str(process), "net:[2]")):
        (proc / pid / "ns").mkdir(parents=True)
        (proc / pid / "ns/net").symlink_to(name)
    monkeypatch.setattr(usage, "_PROC", proc)
    version_2(tmp_path / "cgroup", ONE, [process])
    assert usage.usages([ONE], tmp_path / "cgroup")[ONE].network == 1024


def test_many_containers_are_read_in_no_time(tmp_path: Path, process: int) -> None:
    ids = [f"{number:064x}" for number in range(500)]
    for identity in ids:
        version_2(tmp_path, f"docker-{identity}.scope", [process] * 10)
    began = time.monotonic()
    found = usage.usages(ids, tmp_path)
    assert len(found) == 500
    assert time.monotonic() - began < 10  # a tenth of that on an idle machine; what counts is that it is no minute


def test_the_live_cgroups_of_this_machine() -> None:
    """Whatever runs here: nothing raises, and what is found is sound."""
    found = usage.usages(list(usage._containers(Path("/sys/fs/cgroup"))))
    for use in found.values():
        assert isinstance(use, Usage)
        assert use.started <= usage.clock().uptime


def test_the_clock_is_the_kernel_s() -> None:
    now = usage.clock()
    seconds = float(Path("/proc/uptime").read_text().split()[0])
    assert abs(now.uptime.total_seconds() - seconds) < 1
    assert now.boot_id == processes.boot_id()
    assert now.time.tzinfo == timezone.utc


# --- .keep-alive

NONE_THERE, UNKNOWN = (None, True), (None, False)
TOUCHED = datetime(2025, 11, 21, 10, 30, tzinfo=timezone.utc)


def touch(file: Path, seconds: int = 1763721000) -> None:
    file.touch()
    os.utime(file, (0, seconds))


def test_when_a_keep_alive_file_was_touched(tmp_path: Path) -> None:
    assert usage.keep_alive(tmp_path, "alice") == NONE_THERE
    assert usage.keep_alive(tmp_path / "nowhere", "alice") == NONE_THERE
    touch(tmp_path / ".keep-alive")
    assert usage.keep_alive(tmp_path, "alice") == (TOUCHED, True)


def test_a_keep_alive_link_counts_by_itself_and_a_pipe_or_directory_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / ".keep-alive"
    file.symlink_to("/nowhere/at/all")
    touched, known = usage.keep_alive(tmp_path, "alice")
    assert touched is not None
    assert (abs(touched - datetime.now(timezone.utc)) < timedelta(minutes=1), known) == (True, True)
    file.unlink()
    os.mkfifo(file)
    assert usage.keep_alive(tmp_path, "alice") == NONE_THERE
    file.unlink()
    file.mkdir()
    assert usage.keep_alive(tmp_path, "alice") == NONE_THERE


def test_a_keep_alive_file_of_times_that_no_calendar_has(tmp_path: Path) -> None:
    for seconds in (-(2**31), 2**33, 2**34 - 1):
        touch(tmp_path / ".keep-alive", seconds)
        found, known = usage.keep_alive(tmp_path, "alice")
        assert known
        assert found is None or found.tzinfo == timezone.utc


@pytest.fixture
def squashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace on a file system on which root may do nothing, and its user what he may anywhere."""
    me = Account("alice", os.getuid(), os.getgid(), "/", "/bin/sh", "alice")
    monkeypatch.setattr(accounts, "lookup", lambda user: me if user == "alice" else None)
    lstat = Path.lstat

    def refuses(path: Path) -> os.stat_result:
        if path.is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", refuses)
    return tmp_path


def test_where_root_may_not_look_the_user_does(squashed: Path) -> None:
    assert usage.keep_alive(squashed, "alice") == NONE_THERE
    touch(squashed / ".keep-alive")
    assert usage.keep_alive(squashed, "alice") == (TOUCHED, True)
    (squashed / ".keep-alive").unlink()
    (squashed / ".keep-alive").mkdir()
    assert usage.keep_alive(squashed, "alice") == NONE_THERE


def test_where_nobody_may_look_it_cannot_be_told(squashed: Path) -> None:
    assert usage.keep_alive(squashed / "nowhere", "alice") == UNKNOWN
    assert usage.keep_alive(squashed, "somebody who is gone") == UNKNOWN


@pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as somebody else")
def test_the_user_sees_no_more_than_he_may(squashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    account = Account("nobody", nobody.pw_uid, nobody.pw_gid, "/", "/bin/sh", "nobody")
    monkeypatch.setattr(accounts, "lookup", lambda _: account)
    touch(squashed / ".keep-alive")
    squashed.chmod(0o700)
    assert usage.keep_alive(squashed, "nobody") == UNKNOWN
