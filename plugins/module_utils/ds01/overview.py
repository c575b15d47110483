"""Questions about a whole host: its status, all at once for `ds01_info`, or one kind of row. Read-only."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from typing import Any

from . import accounts, engine, limits, names, nvml, queueing, records, takeover, units
from .allocations import Allocations
from .errors import Ds01Error
from .model import Allocation, Device, Gpu, Ledger, Refusal
from .observation import Observation
from .placement import Situation
from .transitions import describe, resolved


def status(allocations: Allocations, user: str | None = None) -> dict[str, Any]:
    """GPUs, devices with who has or uses them, allocations with when their hold ends, who waits, and what is missing.

    `problems` says what could not be seen: an engine that does not answer does not hide the devices.
    """
    user = names.canonical_user(user, accounts.lookup) if user else None
    now = allocations.store.read()
    problems: list[dict[str, str]] = []
    with nvml.session() as driver:
        try:
            seen = allocations.look(now, driver)
        except Ds01Error as exc:
            problems.append({"reason": exc.reason, "msg": str(exc)})
            seen = Observation(driver.inventory())
    now = resolved(now, seen.inventory)  # after a reboot the same device has another UUID, and maybe another name
    situation = allocations.situation(now, seen, allocations.clock())
    shown = sorted((a for a in now.allocations.values() if user in (None, a.user)), key=lambda a: a.container)
    return {
        "generation": now.generation,
        "user": user,
        "driver_version": seen.inventory.driver_version,
        "gpus": [_gpu(gpu) for gpu in seen.inventory.gpus],
        "devices": [_device(device, now, seen.occupied) for device in seen.inventory.devices],
        "allocations": [{**describe(a), "hold_ends": _time(situation.hold_end(a))} for a in shown],
        "queue": _queue(allocations, situation),
        "missing": [_missing(d, a) for d, a in situation.missing if user in (None, a.user)],
        "problems": problems,
    }


def _missing(device: Device, whose: Allocation) -> dict[str, Any]:
    return {**records.device_record(device), "container": whose.container, "user": whose.user}


def _queue(allocations: Allocations, situation: Situation) -> list[dict[str, Any]]:
    """Who waits, the next to be served first, with the earliest end of what is in the way."""
    rows = []
    for position, waiter in enumerate(queueing.ordered(situation.queue), 1):
        decision = takeover.decide(waiter.request, queueing.limits_of(waiter, allocations.config), situation)
        available = decision.available_at if isinstance(decision, Refusal) else None
        rows.append({"position": position, **records.waiter_record(waiter), "available_at": _time(available)})
    return rows


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

    def limits_of(user: str) -> Any:
        return part(lambda: limits.as_dict(allocations.limits(user)), None)

    seen = part(lambda: status(allocations), {})
    problems.extend(seen.get("problems", ()))
    version = part(lambda: dict(allocations.engine.version()), {}) if not engine.disabled() else {}
    found = part(allocations.engine.containers, ()) if version else ()
    shown = seen.get("allocations", [])
    return {
        "gpus": seen.get("gpus", []),
        "devices": seen.get("devices", []),
        "allocations": shown,
        "holds": [a for a in shown if a["status"] == "held"],
        "queue": seen.get("queue", []),
        "missing": seen.get("missing", []),
        "containers": [_container(c) for c in found],
        "limits": {user: limits_of(user) for user in users},
        "versions": {
            "driver": seen.get("driver_version") or None,
            "engine": version.get("Version"),
            "python": platform.python_version(),
        },
        "problems": [problem for index, problem in enumerate(problems) if problem not in problems[:index]],
    }


def containers(allocations: Allocations) -> list[dict[str, Any]]:
    """DS01's containers with the devices they have."""
    held = allocations.store.read().allocations
    found = () if engine.disabled() else allocations.engine.containers()
    return [
        {**_container(c), "gpu_id": held[c.called].gpu_id if c.called in held else None}
        for c in sorted(found, key=lambda c: c.name)
    ]


def gpus(allocations: Allocations) -> list[dict[str, Any]]:
    """Physical GPUs with how many of their devices are taken."""
    found = status(allocations)
    devices = found["devices"]
    return [
        {
            **gpu,
            "devices": sum(d["gpu_uuid"] == gpu["uuid"] for d in devices),
            "allocated": sum(d["gpu_uuid"] == gpu["uuid"] and d["container"] is not None for d in devices),
        }
        for gpu in found["gpus"]
    ]


def queue(allocations: Allocations) -> list[dict[str, Any]]:
    """Who waits for devices, the next to be served first."""
    return status(allocations)["queue"]


def users(allocations: Allocations) -> list[dict[str, Any]]:
    """Everybody who has something, beside what they may have."""
    ledger = allocations.store.read()
    running = () if engine.disabled() else allocations.engine.containers()
    everybody = sorted({a.user for a in ledger.allocations.values()} | {c.user for c in running})
    return [_user(user, ledger, running, limits.resolve(allocations.config, user)) for user in everybody if user]


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


def _gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "mig": gpu.mig,
        "memory_mib": gpu.memory_mib,
        "health": gpu.health,
        "health_reason": gpu.health_reason,
        "utilization": gpu.utilization,
    }


def _device(device: Device, now: Ledger, occupied: Mapping[str, str]) -> dict[str, Any]:
    holder = now.holder_of(device)
    return {
        **records.device_record(device),
        "memory_mib": device.memory_mib,
        "health": device.health,
        "container": holder.container if holder else None,
        "user": holder.user if holder else None,
        "status": holder.status if holder else "occupied" if device.uuid in occupied else "free",
        "occupied_by": occupied.get(device.uuid) if holder is None or holder.status == "held" else None,
    }


def _time(value: datetime | None) -> str | None:
    return units.format_time(value) if value else None


# What `ds01 query` can be asked for.
QUERIES: Mapping[str, Callable[[Allocations], Sequence[Mapping[str, Any]]]] = {
    "containers": containers,
    "gpus": gpus,
    "queue": queue,
    "users": users,
}
