"""The ledger's written form: the records of its file, and of results that show an allocation. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from . import units
from .model import FULL, Allocation, Device, Ledger

VERSION = 1


def to_json(ledger: Ledger) -> dict[str, Any]:
    """The file's content (interfaces: "Ledger"), checksum included."""
    body = {
        "version": VERSION,
        "generation": ledger.generation,
        "boot_id": ledger.boot_id,
        "last_updated": units.format_time(ledger.last_updated) if ledger.last_updated else None,
        "allocations": {name: record(a) for name, a in sorted(ledger.allocations.items())},
        "queue": [],
    }
    return {**body, "checksum": _checksum(body)}


def record(allocation: Allocation) -> dict[str, Any]:
    """One allocation as the ledger file and module results show it."""
    return {
        "user": allocation.user,
        "gpu_id": allocation.gpu_id,
        "priority": allocation.priority,
        "allocated_at": units.format_time(allocation.allocated_at),
        "stopped_at": units.format_time(allocation.stopped_at) if allocation.stopped_at else None,
        "devices": [device_record(d) for d in allocation.devices],
        "container_id": allocation.container_id,
    }


def device_record(device: Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "uuid": device.uuid,
        "gpu_uuid": device.gpu_uuid,
        "profile": device.profile,
        "placement": list(device.placement) if device.placement else None,
        "equivalents": str(device.equivalents),
    }


def from_json(document: Mapping[str, Any]) -> Ledger:
    """The ledger of a parsed file, the replaced system's form included.

    Raises ValueError when the checksum or the shape is wrong.
    """
    checksum = document.get("checksum")
    if checksum and checksum != _checksum({k: v for k, v in document.items() if k != "checksum"}):
        raise ValueError("its checksum does not match its content")
    try:
        updated = document.get("last_updated")
        return Ledger(
            allocations={name: _allocation(name, raw) for name, raw in (document.get("allocations") or {}).items()},
            generation=int(document.get("generation") or 0),
            boot_id=document.get("boot_id") or "",
            last_updated=units.parse_time(updated) if updated else None,
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"a record has the wrong shape ({type(exc).__name__}: {exc})") from None


def _allocation(name: str, raw: Mapping[str, Any]) -> Allocation:
    stopped = raw.get("stopped_at")
    devices = raw.get("devices")
    if devices is None:
        devices = [{"id": part.strip().replace(".", ":")} for part in str(raw["gpu_id"]).split(",")]
    return Allocation(
        container=name,
        user=raw["user"],
        devices=tuple(_device(d) for d in devices),
        priority=int(raw.get("priority") or 0),
        allocated_at=units.parse_time(raw["allocated_at"]),
        stopped_at=units.parse_time(stopped) if stopped else None,
        container_id=raw.get("container_id"),
    )


def _device(raw: Mapping[str, Any]) -> Device:
    """A device of a record; one that names only its id (the replaced system's) counts as a whole GPU."""
    placement = raw.get("placement")
    return Device(
        id=raw["id"],
        uuid=raw.get("uuid") or "",
        gpu_uuid=raw.get("gpu_uuid") or "",
        profile=raw.get("profile") or FULL,
        placement=(placement[0], placement[1]) if placement else None,
        equivalents=Fraction(raw.get("equivalents") or 1),
    )


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
