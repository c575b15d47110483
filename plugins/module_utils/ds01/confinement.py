"""What this host itself may pass on to containers. An adapter."""

from __future__ import annotations

import resource
from pathlib import Path

_CAP_SYS_RESOURCE = 24


def memlock() -> int:
    """Bytes of locked memory a container may have: -1 (unlimited), or what a host that is itself
    confined (a container without CAP_SYS_RESOURCE) can pass on."""
    effective = next(
        int(line.split()[1], 16)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("CapEff:")
    )
    if effective >> _CAP_SYS_RESOURCE & 1:
        return -1
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
