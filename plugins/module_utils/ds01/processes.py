"""Processes of this host, from /proc: whose they are, and whether they still live. An adapter; nothing here raises."""

from __future__ import annotations

import contextlib
import os
import pwd
from pathlib import Path

from .model import Process

_PROC = Path("/proc")
_HEAD = 4096
"""Bytes of /proc/PID/status that are read: name and uids stand in its first lines."""


def describe(pid: int) -> str:
    """`process 4711 (python3 of bob)`; `process 4711` for one that is gone or not to be seen from here."""
    try:
        with (_PROC / str(pid) / "status").open("rb") as status:
            lines = status.read(_HEAD).decode(errors="replace").splitlines()
    except OSError:
        return f"process {pid}"
    fields = dict(line.partition(":\t")[::2] for line in lines)
    name, uids = fields.get("Name", ""), fields.get("Uid", "").split()
    if not name or not uids:
        return f"process {pid}"
    shown = "".join(c if c.isprintable() else "?" for c in name)  # a program names itself as it likes
    return f"process {pid} ({shown} of {_login(int(uids[0]))})"


def lives(process: Process) -> bool:
    """Whether just this process is still there; another one may have its number by now."""
    return _started(process.pid) == process.started


def current() -> Process:
    """This process."""
    return Process(os.getpid(), _started(os.getpid()) or 0)


def boot_id() -> str:
    """Names this boot of the host; empty where the kernel does not say."""
    with contextlib.suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _started(pid: int) -> int | None:
    """Clock ticks between boot and the process's start: field 22 of proc(5)'s stat; a zombie is gone."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _login(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
