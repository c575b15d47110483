"""Questions about a whole host: all at once for `ds01_info`, or one kind of row for `ds01 query`. Read-only."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from . import engine, limits
from .allocations import Allocations
from .errors import Ds01Error
from .model import Ledger


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
    found = part(allocations.engine.containers, ()) if version else ()
    shown = status.get("allocations", [])
    return {
        "gpus": status.get("gpus", []),
        "devices": status.get("devices", []),
        "allocations": shown,
        "holds": [a for a in shown if a["status"] == "held"],
        "queue": status.get("queue", []),
        "containers": [_container(c) for c in found],
        "limits": {u: part(lambda u=u: limits.as_dict(allocations.limits(u)), None) for u in users},
        "versions": {
            "driver": status.get("driver_version") or None,
            "engine": version.get("Version"),
            "python": platform.python_version(),
        },
        "problems": problems,
    }


def containers(allocations: Allocations) -> list[dict[str, Any]]:
    """DS01's containers with the devices they have."""
    held = allocations.store.read().allocations
    found = () if engine.disabled() else allocations.engine.containers()
    return [
        {**_container(c), "gpu_id": held[c.name].gpu_id if c.name in held else None}
        for c in sorted(found, key=lambda c: c.name)
    ]


def gpus(allocations: Allocations) -> list[dict[str, Any]]:
    """Physical GPUs with how many of their devices are taken."""
    status = allocations.status()
    devices = status["devices"]
    return [
        {
            **gpu,
            "devices": sum(d["gpu_uuid"] == gpu["uuid"] for d in devices),
            "allocated": sum(d["gpu_uuid"] == gpu["uuid"] and d["status"] != "free" for d in devices),
        }
        for gpu in status["gpus"]
    ]


def queue(allocations: Allocations) -> list[dict[str, Any]]:
    """Who waits for devices, the next to be served first."""
    return allocations.status()["queue"]


def users(allocations: Allocations) -> list[dict[str, Any]]:
    """Everybody who has something, beside what they may have."""
    ledger = allocations.store.read()
    running = () if engine.disabled() else allocations.engine.containers()
    everybody = sorted({a.user for a in ledger.allocations.values()} | {c.user for c in running})
    return [_user(user, ledger, running, allocations.limits(user)) for user in everybody]


def _user(user: str, ledger: Ledger, running: Sequence[engine.Container], allowed: limits.Limits) -> dict[str, Any]:
    mine = ledger.of_user(user)
    return {
        "user": user,
        "group": allowed.group,
        "devices": sum(len(a.devices) for a in mine),
        "max_gpus": allowed.max_gpus,
        "held": sum(a.status == "held" for a in mine),
        "gpu_equivalents": limits.number_text(sum((d.equivalents for a in mine for d in a.devices), Fraction(0))),
        "containers": sum(c.user == user for c in running),
        "max_containers": allowed.max_containers_per_user,
    }


def _container(container: engine.Container) -> dict[str, Any]:
    return {
        "name": container.name,
        "id": container.id,
        "status": container.status,
        "user": container.user,
        "image": container.image,
        "gpus": container.gpus,
    }
