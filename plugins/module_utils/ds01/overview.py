"""Everything about one host in one answer, for `ds01_info`. Read-only; a part that fails says so."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

from . import engine, limits
from .allocations import Allocations
from .errors import Ds01Error


def gather(allocations: Allocations, users: Sequence[str]) -> dict[str, Any]:
    """Devices, allocations, holds, containers, the named users' limits and versions.

    `problems` lists what could not be read, so that one dead part does not hide the others.
    """
    problems: list[dict[str, str]] = []

    def part(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except Ds01Error as exc:
            problems.append({"reason": exc.reason, "msg": str(exc)})
            return otherwise

    status = part(allocations.status, {})
    version = part(lambda: dict(allocations.engine.version()), {}) if not engine.disabled() else {}
    containers = part(allocations.engine.containers, ()) if version else ()
    shown = status.get("allocations", [])
    return {
        "gpus": status.get("gpus", []),
        "devices": status.get("devices", []),
        "allocations": shown,
        "holds": [a for a in shown if a["status"] == "held"],
        "queue": [],
        "containers": [
            {"name": c.name, "id": c.id, "status": c.status, "user": c.user, "image": c.image, "gpus": c.gpus}
            for c in containers
        ],
        "limits": {u: part(lambda u=u: limits.as_dict(allocations.limits(u)), None) for u in users},
        "versions": {
            "driver": status.get("driver_version") or None,
            "engine": version.get("Version"),
            "python": platform.python_version(),
        },
        "problems": problems,
    }
