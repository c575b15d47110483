"""How this host's GPUs are cut, who has what, and what a change would do. Read-only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from . import geometry, layouts, mig, nvml, records, units
from .allocations import Allocations
from .errors import Ds01Error, invalid_input
from .mig import Cut, GpuState, Holder, Instance, Plan, Step
from .model import Allocation, Device, Inventory, Ledger
from .observation import Observation
from .transitions import hold_ends, resolved


@dataclass(frozen=True)
class Host:
    """One look: the GPUs with their instances and holders, the ledger as its devices are called now.

    `problems` says what could not be seen.
    """

    gpus: tuple[GpuState, ...]
    inventory: Inventory
    ledger: Ledger
    problems: tuple[Mapping[str, str], ...] = ()

    def device(self, uuid: str) -> Device | None:
        return next((d for d in self.inventory.devices if d.uuid == uuid), None)


def look(allocations: Allocations, *, strict: bool = True) -> Host:
    """The host now. An engine that does not answer is an error; without `strict` it is a problem beside
    what the driver and the ledger tell."""
    before = allocations.store.read()
    problems = []
    with nvml.session() as driver:
        try:
            seen = allocations.look(before, driver)
        except Ds01Error as exc:
            if strict or exc.reason == "driver_unavailable":
                raise
            problems.append({"reason": exc.reason, "msg": str(exc)})
            seen = Observation(driver.inventory())
        gpus = driver.layout(seen.inventory)
    now = resolved(before, seen.inventory)
    who = _Holders(now, hold_ends(now, allocations.config), seen.occupied)
    return Host(tuple(_held(gpu, seen.inventory, who) for gpu in gpus), seen.inventory, now, tuple(problems))


@dataclass(frozen=True)
class _Holders:
    ledger: Ledger
    ends: Mapping[str, datetime] = field(default_factory=dict)
    occupied: Mapping[str, str] = field(default_factory=dict)

    def of(self, device: Device) -> tuple[Holder, ...]:
        """Who has a device by the ledger, else who uses it without DS01."""
        allocation = self.ledger.holder_of(device)
        if allocation:
            return (Holder(allocation.container, allocation.user, self.ends.get(allocation.container)),)
        what = self.occupied.get(device.uuid)
        return (Holder("", what=what),) if what else ()


def _held(gpu: GpuState, inventory: Inventory, who: _Holders) -> GpuState:
    """The GPU with the holders of its instances, and of itself where it is not cut."""
    devices = [d for d in inventory.devices if d.gpu_uuid == gpu.uuid]
    by_uuid = {d.uuid: who.of(d) for d in devices}
    return replace(
        gpu,
        instances=tuple(replace(i, holders=tuple(h for u in i.devices for h in by_uuid[u])) for i in gpu.instances),
        holders=tuple(h for d in devices if d.is_full for h in by_uuid[d.uuid]),
    )


# --- list


def listing(host: Host) -> dict[str, Any]:
    """`ds01 mig list --json`."""
    return {
        "gpus": [_gpu_record(gpu) for gpu in host.gpus],
        "instances": [row for gpu in host.gpus for i in gpu.instances for row in _instance_rows(host, gpu, i)],
        "problems": list(host.problems),
    }


def _gpu_record(gpu: GpuState) -> dict[str, Any]:
    fits = mig.possible(gpu.table, gpu.instances) if gpu.mig else {}
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "model": layouts.model_text(gpu.model_id) if gpu.model_id else None,
        "health": gpu.health,
        "mig_capable": gpu.capable,
        "mig": gpu.mig,
        "mig_pending": gpu.pending if gpu.mode_pending else None,
        "memory_slices": gpu.table.width or None,
        "possible": {name: list(starts) for name, starts in fits.items()},
        "in_use_by": [str(h) for h in gpu.holders],
    }


def _instance_rows(host: Host, gpu: GpuState, instance: Instance) -> list[dict[str, Any]]:
    """A row for each MIG device; one without id and UUID for an instance that has none."""
    devices = [host.device(uuid) for uuid in instance.devices]
    return [_instance_row(host, gpu, instance, device) for device in devices or [None]]


def _instance_row(host: Host, gpu: GpuState, instance: Instance, device: Device | None) -> dict[str, Any]:
    allocation = host.ledger.holder_of(device) if device else None
    until = next((h.until for h in instance.holders if allocation and h.container == allocation.container), None)
    outside = next((h.what for h in instance.holders if h.what), None)
    return {
        "gpu": gpu.index,
        "id": device.id if device else None,
        "uuid": device.uuid if device else None,
        "profile": device.profile if device else instance.profile,
        "placement": list(instance.placement),
        "gpu_instance": instance.id,
        "container": allocation.container if allocation else None,
        "user": allocation.user if allocation else None,
        "status": _status(instance, allocation, outside),
        "until": units.format_time(until) if until else None,
        "occupied_by": None if allocation else outside,
    }


def _status(instance: Instance, allocation: Allocation | None, outside: str | None) -> str:
    if not instance.devices:
        return "leftover"
    if allocation:
        return allocation.status
    return "occupied" if outside else "free"


# --- plan


@dataclass(frozen=True)
class Planned:
    """What a change would do to this host."""

    host: Host
    plans: tuple[Plan, ...]

    @property
    def changed(self) -> bool:
        return any(p.changes for p in self.plans)

    def result(self) -> dict[str, Any]:
        """`ds01 mig plan --json`."""
        return {
            "changed": self.changed,
            "plan": [_step_record(step) for p in self.plans for step in p.steps],
            "devices": [records.device_record(d) for d in self.host.inventory.devices],
        }


def planned(host: Host, cuts: Mapping[int, Cut], force: Collection[str] = ()) -> Planned:
    """The plan for the GPUs that `cuts` names by index, all or none. Raises Ds01Error with what is in the way."""
    gpus = geometry.completed(host.gpus)
    there = {gpu.index for gpu in gpus}
    missing = sorted(set(cuts) - there)
    if missing:
        raise invalid_input(f"There is no GPU {missing[0]} here.", f"There are: {', '.join(map(str, sorted(there)))}.")
    found = mig.plan(gpus, cuts, force)
    if found.refusals:
        raise _refusal(found.refusals)
    return Planned(replace(host, gpus=gpus), found.plans)


def _refusal(refusals: Sequence[mig.LayoutRefusal]) -> Ds01Error:
    first = refusals[0]
    details = [
        {
            "gpu": r.gpu,
            "reason": r.reason,
            "msg": r.message,
            "available_at": units.format_time(r.available_at) if r.available_at else None,
            "blocked_by": [
                {
                    "container": h.container or None,
                    "user": h.user or None,
                    "until": units.format_time(h.until) if h.until else None,
                    "what": h.what or None,
                }
                for h in r.blocked_by
            ],
        }
        for r in refusals
    ]
    message = " ".join(r.message for r in refusals)
    return Ds01Error(first.reason, message, first.hint, refusals=details)


def _step_record(step: Step) -> dict[str, Any]:
    return {
        "gpu": step.gpu,
        "action": step.action,
        "profile": step.profile or None,
        "placement": list(step.placement) if step.placement else None,
        "uuid": step.uuid or None,
    }
