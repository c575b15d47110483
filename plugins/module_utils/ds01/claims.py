"""What the engine's containers say of themselves, for rebuilding the ledger. An adapter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from . import engine, units
from .model import Device
from .rebuild import Claim, devices_of

Projected = Callable[[str], "tuple[str, ...] | None"]
"""The UUIDs that a container's CDI device names now; None where it has none."""


def read(
    docker: engine.Engine, metadata: Path, projected: Projected, priority_of: Callable[[str], int], now: datetime
) -> list[Claim]:
    """What each of DS01's GPU containers says of itself."""
    return [
        _claim(docker.container(container.name) or container, metadata, projected, priority_of, now)
        for container in docker.containers()
        if container.gpus and container.user and container.own
    ]


def _claim(
    container: engine.Container,
    metadata: Path,
    projected: Projected,
    priority_of: Callable[[str], int],
    now: datetime,
) -> Claim:
    stopped = container.status in engine.STOPPED
    return Claim(
        container=container.name,
        container_id=container.id,
        user=container.user,
        devices=devices_in_use(container, metadata, projected),
        priority=priority_of(container.user),
        created_at=created_at(container) or now,
        stopped_at=(container.finished_at or now) if stopped else None,
        pending_since=None if stopped or container.status in engine.RUNNING else now,
    )


def created_at(container: engine.Container) -> datetime | None:
    """When DS01 made the container, as its label says."""
    try:
        return units.parse_time(container.labels["ds01.created_at"])
    except (KeyError, ValueError, OverflowError):
        return None


def devices_in_use(container: engine.Container, metadata: Path, projected: Projected) -> tuple[Device, ...]:
    """What the container has: one that runs was started with what is projected, whatever was recorded before."""
    recorded = recorded_devices(container, metadata)
    uuids = projected(container.name) if container.status in engine.RUNNING else None
    if uuids is None or uuids == tuple(device.uuid for device in recorded):
        return recorded
    return tuple(Device(id=uuid, uuid=uuid, gpu_uuid="", profile="a device") for uuid in uuids)


def recorded_devices(container: engine.Container, metadata: Path) -> tuple[Device, ...]:
    """The devices that the container was last given, as its records say; empty where they do not."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((metadata / f"{container.name}.json").read_bytes())
        if record.get("container_id") == container.id:
            return devices_of(record.get("devices"))
    with contextlib.suppress(ValueError):
        return devices_of(json.loads(container.labels.get("ds01.devices") or "[]"))
    return ()
