"""Who a process on this host belongs to, from /proc. An adapter."""

from __future__ import annotations

import pwd
from pathlib import Path

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


def _login(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
