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


def read(docker: engine.Engine, metadata: Path, priority_of: Callable[[str], int], now: datetime) -> list[Claim]:
    """What each GPU container says of itself: its metadata record, else its labels."""
    return [
        _claim(docker.container(container.name) or container, metadata, priority_of, now)
        for container in docker.containers()
        if container.gpus and container.user
    ]


def _claim(container: engine.Container, metadata: Path, priority_of: Callable[[str], int], now: datetime) -> Claim:
    stopped = container.status in engine.STOPPED
    created = container.labels.get("ds01.created_at")
    return Claim(
        container=container.name,
        container_id=container.id,
        user=container.user,
        devices=recorded_devices(container, metadata),
        priority=priority_of(container.user),
        created_at=units.parse_time(created) if created else now,
        stopped_at=(container.finished_at or now) if stopped else None,
        pending_since=None if stopped or container.status in engine.RUNNING else now,
    )


def recorded_devices(container: engine.Container, metadata: Path) -> tuple[Device, ...]:
    """The devices that the container was last given, as its records say; empty where they do not."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((metadata / f"{container.name}.json").read_bytes())
        if record.get("container_id") == container.id:
            return devices_of(record.get("devices"))
    with contextlib.suppress(ValueError):
        return devices_of(json.loads(container.labels.get("ds01.devices") or "[]"))
    return ()
