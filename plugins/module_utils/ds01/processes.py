"""Processes of this host, from /proc: whose they are, whether they still live, and which hold a device node. An
adapter; nothing here raises."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .model import Process
from .occupancy import Program

_PROC = Path("/proc")
_CONTAINER = re.compile(r"(?:docker-)?([0-9a-f]{64})(?:\.scope)?")
"""A container's cgroup, with Docker's systemd driver and the other."""
_HEAD = 4096
"""Bytes of /proc/PID/status that are read: name and uids stand in its first lines."""


@dataclass(frozen=True)
class Client:
    """A process that has a device open. `unit` is what systemd runs it in: `nvidia-dcgm.service`,
    `session-3.scope`, `docker-<id>.scope`; empty where there is none, as are name and user of one that is gone.
    """

    pid: int
    name: str = ""
    user: str = ""
    unit: str = ""

    def __str__(self) -> str:
        """`process 4711 (nv-hostengine of root in nvidia-dcgm.service)`."""
        place = f" in {self.unit}" if self.unit else ""
        return f"process {self.pid} ({self.name} of {self.user}{place})" if self.name else f"process {self.pid}"


def describe(pid: int) -> str:
    """`process 4711 (python3 of bob)`; `process 4711` for one that is gone or not to be seen from here."""
    return str(Client(pid, *_owner(pid)))


def program(pid: int) -> Program:
    """A process, with what it belongs to; only its number of one that is gone or not to be seen from here."""
    began, client = started(pid), Client(pid, *_owner(pid), _unit(pid))
    container = next((found[1] for part in _cgroup(pid) if (found := _CONTAINER.fullmatch(part))), "")
    seen = began if client.name else None
    return Program(pid, str(client), client.user, client.unit, container, seen, client.name)


def ask_to_end(pid: int, began: int) -> bool:
    """Send SIGTERM to the process that began then; False where it is gone, or somebody else's."""
    with contextlib.suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            if started(pid) == began:  # asked after the process is held: from here on its number stays its own
                signal.pidfd_send_signal(process, signal.SIGTERM)
                return True
        finally:
            os.close(process)
    return False


def holders(nodes: Collection[Path]) -> list[Client]:
    """Every other process that has one of these device nodes open, under whatever name; by pid.

    Only root sees those of everybody. A node that does not exist is held by nobody.
    """
    wanted = {number for node in nodes if (number := _number(node))}
    names = {node.name for node in nodes}
    found = []
    for pid in _pids() if wanted else ():
        if pid != os.getpid() and any(_number(fd) in wanted for fd in _open_devices(pid, names)):
            found.append(Client(pid, *_owner(pid), _unit(pid)))
    return found


def capabilities(pid: int) -> tuple[int, ...] | None:
    """The numbers of the nodes in /dev/nvidia-caps that a process sees in its own root; None where that cannot
    be told. Only root can look into a container."""
    dev = _PROC / str(pid) / "root" / "dev"
    try:
        if not pid or not dev.is_dir():
            return None
        nodes = [node.lstat() for node in (dev / "nvidia-caps").iterdir()]
    except FileNotFoundError:
        return ()
    except OSError:
        return None
    return tuple(sorted(os.minor(node.st_rdev) for node in nodes if stat.S_ISCHR(node.st_mode)))


def lives(process: Process) -> bool:
    """Whether just this process is still there; another one may have its number by now."""
    return started(process.pid) == process.started


def current() -> Process:
    """This process."""
    return Process(os.getpid(), started(os.getpid()) or 0)


def started(pid: int) -> int | None:
    """Clock ticks between boot and the process's start: field 22 of proc(5)'s stat; a zombie is gone."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def boot_id() -> str:
    """Names this boot of the host; empty where the kernel does not say."""
    with contextlib.suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal())
    return []


def _open_devices(pid: int, names: Collection[str]) -> Iterator[Path]:
    """The descriptors of a process that may be of such a node. Its other files are not looked at: one of
    them may lie on a server that does not answer."""
    try:
        descriptors = list((_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return  # gone, or somebody else's
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            target = descriptor.readlink()
            if "dev" in target.parts or target.name in names:
                yield descriptor


def _number(path: Path) -> tuple[int, ...]:
    """What makes two paths the same device: major and minor number; of other files, where they are stored."""
    try:
        found = path.stat()
    except OSError:
        return ()
    if stat.S_ISCHR(found.st_mode):
        return (found.st_rdev,)
    return found.st_dev, found.st_ino


def _owner(pid: int) -> tuple[str, str]:
    """(name, login) of a process; empty for one that is gone or not to be seen from here."""
    try:
        with (_PROC / str(pid) / "status").open("rb") as status:
            lines = status.read(_HEAD).decode(errors="replace").splitlines()
    except OSError:
        return "", ""
    fields = dict(line.partition(":\t")[::2] for line in lines)
    name, uids = fields.get("Name", ""), fields.get("Uid", "").split()
    if not name or not uids:
        return "", ""
    return _printable(name), _login(int(uids[0]))


def _unit(pid: int) -> str:
    """The unit of the host's systemd: the first in the process's path, for a user's own systemd, and one in
    a container, have theirs below it."""
    return _printable(next((part for part in _cgroup(pid) if part.endswith((".service", ".scope"))), ""))


def _cgroup(pid: int) -> list[str]:
    """The parts of the process's path in systemd's hierarchy, from the root on."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {}
    for line in lines:
        _, _, place = line.partition(":")
        controllers, _, path = place.partition(":")
        paths[controllers] = path.split("/")
    return [*paths.get("", ()), *paths.get("name=systemd", ())]  # cgroup v2, and v1


def _printable(text: str) -> str:
    """A program names itself as it likes."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _login(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
