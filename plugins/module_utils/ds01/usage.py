"""What containers use: CPU time, memory and network of each, from its cgroup and its processes. An adapter.

Nothing here raises: what cannot be read is absent, and counts neither as use nor as none. Reads cgroup v2 and v1,
and the names that Docker gives with either driver (`docker-<id>.scope`, `<id>`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

from . import accounts, as_user, processes
from .policies import Clock, Usage

_CGROUPS, _PROC = Path("/sys/fs/cgroup"), Path("/proc")
_CONTAINER = re.compile(r"(?:docker-)?([0-9a-f]{64})(?:\.scope)?")
_MOST_PROCESSES = 64
"""Of a container's processes, in which its first one is looked for."""
_TICKS = os.sysconf("SC_CLK_TCK")


def clock() -> Clock:
    """Now, and the time since boot, which no change of the clock moves."""
    uptime = timedelta(microseconds=time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000)
    return Clock(datetime.now(timezone.utc), uptime, processes.boot_id())


def usages(ids: Collection[str], cgroups: Path = _CGROUPS) -> dict[str, Usage]:
    """The use of those of these containers that run and can be read, by id."""
    if (cgroups / "cgroup.controllers").exists():
        memory = cpu = _containers(cgroups)
        files = ("cpu.stat", "memory.current")
    else:
        cpu, memory = _containers(cgroups / "cpuacct"), _containers(cgroups / "memory")
        files = ("cpuacct.usage", "memory.usage_in_bytes")
    found = {}
    for container in ids:
        with contextlib.suppress(OSError, ValueError, KeyError):
            found[container] = _usage(cpu[container] / files[0], memory[container] / files[1])
    return found


def keep_alive(workspace: Path, user: str) -> tuple[datetime | None, bool]:
    """When the workspace's .keep-alive was last touched (None: there is none), and whether that can be told. A link
    counts by itself: what it leads to is the user's choice, and not looked at.

    Where root may not look, on a network file system, the user does.
    """
    file = workspace / ".keep-alive"
    try:
        found = file.lstat()
    except OSError as exc:
        return (None, True) if exc.errno in _NOT_THERE else _keep_alive_as(user, file)
    return _touched(found.st_mode, found.st_mtime_ns // 10**9), True


_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def _keep_alive_as(user: str, file: Path) -> tuple[datetime | None, bool]:
    """As its user sees it, who has to see its directory, too: what is not in one that is closed nobody can say."""
    account = accounts.lookup(user)
    argv = ["/usr/bin/stat", "--printf=%f %Y\\n", "--", f"{file.parent}/.", str(file)]
    done = as_user.run(account, argv) if account else None
    match done.stdout.decode(errors="replace").splitlines() if done else []:
        case [_, line]:
            mode, seconds = line.split()
            return _touched(int(mode, 16), int(seconds)), True
        case [_]:
            return None, True
    return None, False


def _touched(mode: int, seconds: int) -> datetime | None:
    """Only a plain file, or a link, of a time that a calendar has is one."""
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        return None
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds, timezone.utc)
    return None


def _containers(root: Path) -> dict[str, Path]:
    """The cgroups of all containers, by id. Their inside is theirs: what is called a container there is none."""
    found: dict[str, Path] = {}
    waiting = [str(root)]
    while waiting:
        for directory in _directories(waiting.pop()):
            container = _CONTAINER.fullmatch(os.path.basename(directory))  # noqa: PTH119 - thousands of them
            if container:
                found.setdefault(container[1], Path(directory))
            else:
                waiting.append(directory)
    return found


def _directories(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []  # gone meanwhile


def _usage(cpu: Path, memory: Path) -> Usage:
    """One container's. Raises OSError where it is gone, ValueError where a file is not what it should be."""
    ages = ((processes.started(pid), pid) for pid in _processes(cpu.parent))
    started, pid = min((started, pid) for started, pid in ages if started is not None)
    return Usage(
        started=timedelta(microseconds=started * 10**6 // _TICKS),
        cpu=timedelta(microseconds=_cpu(cpu.read_text(encoding="ascii"))),
        memory=int(memory.read_text(encoding="ascii")),
        network=_network(pid),
    )


def _cpu(text: str) -> int:
    """Microseconds: of cgroup v2's cpu.stat, or of v1's one number of nanoseconds."""
    fields = text.split()
    return int(fields[0]) // 1000 if len(fields) == 1 else int(fields[fields.index("usage_usec") + 1])


def _processes(cgroup: Path) -> list[int]:
    """Some of a container's processes, its first one among them: the kernel lists the oldest, or (v1) those with
    the lowest numbers, first; a systemd inside has its own below, in init.scope."""
    found: list[int] = []
    for directory in _with_those_below(cgroup):
        with contextlib.suppress(OSError):
            found += map(int, (directory / "cgroup.procs").read_text(encoding="ascii").split())
        if len(found) >= _MOST_PROCESSES:
            break
    return found[:_MOST_PROCESSES]


def _with_those_below(cgroup: Path) -> Iterator[Path]:
    yield cgroup
    for below in sorted(_directories(str(cgroup))):
        yield from _with_those_below(Path(below))


def _network(pid: int) -> int | None:
    """The bytes that the container of this process has sent and received; None where its network is the host's."""
    try:
        if (_PROC / str(pid) / "ns/net").readlink() == (_PROC / "self/ns/net").readlink():
            return None
    except PermissionError:
        return None  # whose it is cannot be told
    lines = (_PROC / str(pid) / "net/dev").read_text(encoding="ascii", errors="replace").splitlines()[2:]
    counters = (line.partition(":") for line in lines)
    return sum(
        int(numbers.split()[0]) + int(numbers.split()[8]) for name, _, numbers in counters if name.strip() != "lo"
    )
