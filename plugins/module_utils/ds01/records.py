"""The ledger's written form: the records of its file, and of results that show an allocation. Pure."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from typing import Any

from . import units
from .model import FULL, Allocation, Device, Ledger, Process, Request, Ticket, Waiter

VERSION = 1
_DEVICE_ID = re.compile(r"[0-9]+(:[0-9]+)?")


def to_json(ledger: Ledger) -> dict[str, Any]:
    """The file's content (interfaces: "Ledger"), checksum included."""
    body = {
        "version": VERSION,
        "generation": ledger.generation,
        "boot_id": ledger.boot_id,
        "engine_id": ledger.engine_id,
        "last_updated": units.format_time(ledger.last_updated) if ledger.last_updated else None,
        "allocations": {name: record(a) for name, a in sorted(ledger.allocations.items())},
        "queue": [waiter_record(w) for w in ledger.queue],
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
        "pending_since": units.format_time(allocation.pending_since) if allocation.pending_since else None,
    }


def waiter_record(waiter: Waiter) -> dict[str, Any]:
    """One waiting request as the ledger file shows it."""
    request = waiter.request
    return {
        "container": request.container,
        "user": request.user,
        "gpus": request.gpus,
        "profile": request.profile,
        "priority": waiter.priority,
        "max_gpus": waiter.max_gpus,
        "since": units.format_time(waiter.ticket.since),
        "until": units.format_time(waiter.ticket.until),
        "pid": waiter.ticket.process.pid,
        "pid_started": waiter.ticket.process.started,
    }


def device_record(device: Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "uuid": "" if device.is_new else device.uuid,
        "gpu_uuid": device.gpu_uuid,
        "profile": device.profile,
        "placement": list(device.placement) if device.placement else None,
        "equivalents": str(device.equivalents),
    }


def from_json(document: Any) -> Ledger:
    """The ledger of a parsed file, the replaced system's form included.

    Raises ValueError when the checksum or the shape is wrong: an odd file is never an empty ledger.
    """
    checksum = _as(dict, document, "the file").get("checksum")
    if checksum and checksum != _checksum({k: v for k, v in document.items() if k != "checksum"}):
        raise ValueError("its checksum does not match its content")
    if document.get("version", VERSION) != VERSION:
        raise ValueError(f"its version is {document['version']}; this DS01 reads {VERSION}")
    updated = document.get("last_updated")
    try:
        written = _as(dict, document["allocations"], "allocations")
        return Ledger(
            allocations=_distinct({name: _allocation(name, _as(dict, raw, name)) for name, raw in written.items()}),
            generation=_as(int, document.get("generation", 0), "generation"),
            boot_id=document.get("boot_id") or "",
            engine_id=document.get("engine_id") or "",
            last_updated=_time(updated) if updated else None,
            queue=tuple(_waiter(_as(dict, raw, "a waiter")) for raw in _as(list, document.get("queue") or [], "queue")),
        )
    except KeyError as exc:
        raise ValueError(f"{exc.args[0]} is missing") from None


def _distinct(allocations: dict[str, Allocation]) -> dict[str, Allocation]:
    """The same; one device in two containers' records is a damage."""
    holder: dict[str, str] = {}
    for allocation in allocations.values():
        for device in allocation.devices:
            if device.uuid and holder.setdefault(device.uuid, allocation.container) != allocation.container:
                raise ValueError(f"{device.uuid} is both {holder[device.uuid]}'s and {allocation.container}'s")
    return allocations


def _as(kind: type, value: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {reprlib.repr(value)}, not a {kind.__name__}")
    return value


def _time(value: Any) -> datetime:
    try:
        return units.parse_time(_as(str, value, "a time"))
    except OverflowError:
        raise ValueError(f"{value!r} is no time") from None


def _allocation(name: str, raw: Mapping[str, Any]) -> Allocation:
    stopped, pending = raw.get("stopped_at"), raw.get("pending_since")
    devices = raw.get("devices")
    if devices is None:
        written = raw["gpu_id"]  # the replaced system once wrote plain numbers
        ids = str(written).split(",") if isinstance(written, int) else _as(str, written, f"gpu_id of {name}").split(",")
        devices = [{"id": part.strip().replace(".", ":")} for part in ids]
    return Allocation(
        container=name,
        user=_as(str, raw["user"], f"user of {name}"),
        devices=tuple(device(_as(dict, d, f"a device of {name}")) for d in _as(list, devices, f"devices of {name}")),
        priority=_as(int, raw.get("priority") or 0, f"priority of {name}"),
        allocated_at=_time(raw["allocated_at"]),
        stopped_at=_time(stopped) if stopped else None,
        container_id=raw.get("container_id"),
        pending_since=_time(pending) if pending else None,
    )


def _waiter(raw: Mapping[str, Any]) -> Waiter:
    texts = {key: _as(str, raw[key], f"a waiter's {key}") for key in ("container", "user")}
    gpus, priority, pid, started = (
        _as(int, raw[key], f"a waiter's {key}") for key in ("gpus", "priority", "pid", "pid_started")
    )
    profile, most = raw.get("profile"), raw.get("max_gpus")
    return Waiter(
        request=Request(
            **texts, gpus=gpus, profile=None if profile is None else _as(str, profile, "a waiter's profile")
        ),
        priority=priority,
        max_gpus=None if most is None else _as(int, most, "a waiter's max_gpus"),
        ticket=Ticket(_time(raw["since"]), _time(raw["until"]), Process(pid, started)),
    )


def device(raw: Mapping[str, Any]) -> Device:
    """A device of a record; one that names only its id (the replaced system's) counts as a whole GPU.

    Raises ValueError, or KeyError without an id.
    """
    identity = _as(str, raw["id"], "a device's id")
    if not _DEVICE_ID.fullmatch(identity):
        raise ValueError(f"{identity!r} is not a device id")
    placement = raw.get("placement")
    try:
        equivalents = Fraction(raw.get("equivalents") or 1)
        start_and_size = None if placement is None else (int(placement[0]), int(placement[1]))
    except (ZeroDivisionError, IndexError, TypeError, OverflowError):
        raise ValueError(f"the record of device {identity} cannot be read") from None
    return Device(
        id=identity,
        uuid=_as(str, raw.get("uuid") or "", "a device's uuid"),
        gpu_uuid=_as(str, raw.get("gpu_uuid") or "", "a device's gpu_uuid"),
        profile=_as(str, raw.get("profile") or FULL, "a device's profile"),
        placement=start_and_size,
        equivalents=equivalents,
    )


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
