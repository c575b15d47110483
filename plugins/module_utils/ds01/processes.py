"""Processes of this host, from /proc. An adapter; nothing here raises."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .model import Process

_PROC = Path("/proc")


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
