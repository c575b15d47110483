"""How this host's GPUs are cut, who has what, what is wanted, and what a change would do. Read-only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config, geometry, layouts, lifecycle, mig, nvml, occupancy, processes, records, units
from .errors import Ds01Error, invalid_input
from .limits import GpuPolicy
from .mig import Cut, GpuState, Holder, Instance, Placed, Plan, Step
from .model import Allocation, Device, Inventory, Ledger
from .observation import Observation
from .transitions import STOP_HINT, Outcome, resolved

if TYPE_CHECKING:
    from .allocations import Allocations

Cuts = Mapping[int, Cut | Placed]
"""How GPUs are wanted, by index."""
Wanted = Callable[[Sequence[GpuState]], Cuts]
"""The same, once it is known which GPUs there are."""


@dataclass(frozen=True)
class Host:
    """One look: the GPUs with their instances and holders, the ledger as its devices are called now.

    `running` names the containers that run, `problems` says what could not be seen.
    """

    gpus: tuple[GpuState, ...]
    inventory: Inventory
    ledger: Ledger
    running: frozenset[str] = frozenset()
    problems: tuple[Mapping[str, str], ...] = ()

    def device(self, uuid: str) -> Device | None:
        return next((d for d in self.inventory.devices if d.uuid == uuid), None)


def look(allocations: Allocations, *, strict: bool = True) -> Host:
    """The host now. An engine that does not answer is an error; without `strict` it is a problem beside
    what the driver and the ledger tell."""
    before = allocations.store.read()
    with nvml.session() as driver:
        try:
            return host(allocations, driver, before, allocations.look(before, driver))
        except Ds01Error as exc:
            if strict or exc.reason == "driver_unavailable":
                raise
            found = host(allocations, driver, before, allocations.look_at_driver(driver))
            return replace(found, problems=({"reason": exc.reason, "msg": str(exc)},))


def host(allocations: Allocations, driver: nvml.Nvml, ledger: Ledger, seen: Observation) -> Host:
    """The host as this look shows it, with the ledger's devices as they are called now."""
    now = resolved(ledger, seen.inventory)
    who = _Holders(now, lifecycle.ends(now, allocations.config), _outside(seen))
    gpus = tuple(
        _with_missing(_held(gpu, seen.inventory, who), seen.inventory, who) for gpu in driver.layout(seen.inventory)
    )
    return Host(gpus, seen.inventory, now, seen.running)


# --- what is wanted


def wanted(
    allocations: Allocations,
    *,
    layout: str | None = None,
    gpus: Mapping[int, Sequence[str]] | None = None,
    layouts_file: Path | None = None,
) -> Wanted:
    """A layout by its name, or profiles by GPU index (`[]`: MIG without instances, `["full"]`: MIG off);
    with neither the limits file's short form. Raises Ds01Error for what makes no sense on any host."""
    if layout == "":  # an unanswered question is no wish
        raise invalid_input(
            "The name of the layout is empty.",
            "Name one, or leave it out altogether: then the limits file says how every GPU is cut.",
        )
    if layouts_file is not None and layout is None:
        raise _nameless(layouts_file)
    if layout is not None:
        known = config.load_layouts(layouts_file or allocations.paths.layouts)
        return functools.partial(layouts.select, known, layout)
    if gpus is not None:
        cuts = {index: layouts.cut_of(profiles) for index, profiles in gpus.items()}
        return lambda _: cuts
    return functools.partial(_short_form, allocations.config.gpu)


def _nameless(file: Path) -> Ds01Error:
    """A file of layouts and none of its names: without it another wish would count."""
    names: list[str] = []
    with contextlib.suppress(Ds01Error):
        names = list(config.load_layouts(file))
    hint = f"Name one; there are: {', '.join(names)}." if names else "Name one, or leave the file out."
    return invalid_input(f"{file} is a file of layouts, and none of them is named.", hint)


def _short_form(policy: GpuPolicy, gpus: Sequence[GpuState]) -> dict[int, Cut]:
    """`enable_mig` and `mig_profile`: every GPU that has MIG, cut into as many of the profile as it takes."""
    if policy.enable_mig and policy.mig_profile is None:
        raise Ds01Error(
            "config_invalid",
            "gpu_allocation.mig_profile names no profile to cut the GPUs into.",
            "Name one there, or ask for a layout by its name, or for the profiles of each GPU.",
        )
    profile = policy.mig_profile or ""
    return {gpu.index: layouts.filled(gpu, profile) if policy.enable_mig else Cut(False) for gpu in gpus if gpu.capable}


@dataclass(frozen=True)
class _Holders:
    ledger: Ledger
    ends: Mapping[str, datetime] = field(default_factory=dict)
    outside: Mapping[str, tuple[Holder, ...]] = field(default_factory=dict)

    def of(self, device: Device) -> tuple[Holder, ...]:
        """Who has a device by the ledger, else who uses it without DS01."""
        allocation = self.ledger.holder_of(device)
        return (self.by_ledger(allocation),) if allocation else self.outside.get(device.uuid, ())

    def by_ledger(self, allocation: Allocation) -> Holder:
        return Holder(allocation.container, allocation.user, self.ends.get(allocation.container))


def _outside(seen: Observation) -> dict[str, tuple[Holder, ...]]:
    """By device UUID who uses it without DS01: containers in a phrase, else each process by itself."""
    minors = {gpu.uuid: gpu.minor for gpu in seen.inventory.gpus}
    found = {}
    for device in seen.inventory.devices:
        if device.uuid in seen.occupied:
            promised = any(occupancy.covers(use, device, minors[device.gpu_uuid]) for use in seen.uses)
            pids = () if promised else seen.processes.get(device.uuid, ())
            programs = tuple(_running(processes.program(pid)) for pid in pids)
            found[device.uuid] = programs or (Holder("", what=seen.occupied[device.uuid]),)
    return found


def _running(program: occupancy.Program) -> Holder:
    return Holder("", what=program.who, pid=program.pid, unit=program.unit, user=program.user)


def _held(gpu: GpuState, inventory: Inventory, who: _Holders) -> GpuState:
    """The GPU with the holders of its instances, and of itself where it is not cut."""
    devices = [d for d in inventory.devices if d.gpu_uuid == gpu.uuid]
    by_uuid = {d.uuid: who.of(d) for d in devices}
    return replace(
        gpu,
        instances=tuple(replace(i, holders=tuple(h for u in i.devices for h in by_uuid[u])) for i in gpu.instances),
        holders=tuple(h for d in devices if d.is_full for h in by_uuid[d.uuid]),
    )


def _with_missing(gpu: GpuState, inventory: Inventory, who: _Holders) -> GpuState:
    """The GPU with what the ledger gives of it and it does not show. Where another record has the same
    place by now, that is all that can be had."""
    there = {instance.key for instance in gpu.instances if instance.whole}
    found: dict[tuple[str, int], Instance] = {}
    for device, allocation in who.ledger.missing(inventory):
        start, size = device.placement or (0, gpu.table.width)
        key = (device.profile, start)
        if device.gpu_uuid == gpu.uuid and key not in there:
            known = found.get(key, Instance(-1, device.profile, start, size, there=False))
            found[key] = replace(known, holders=(*known.holders, who.by_ledger(allocation)))
    return replace(gpu, missing=tuple(found.values()))


# --- list


def listing(host: Host) -> dict[str, Any]:
    """`ds01 mig list --json`."""
    return {
        "gpus": [_gpu_record(gpu) for gpu in host.gpus],
        "instances": [row for gpu in host.gpus for row in _rows(host, gpu)],
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
        "profiles": {profile.name: profile.most for profile in gpu.table.profiles},
        "possible": {name: list(starts) for name, starts in fits.items()},
        "in_use_by": [str(h) for h in gpu.holders],
    }


def _rows(host: Host, gpu: GpuState) -> Iterator[dict[str, Any]]:
    for instance in gpu.instances:
        yield from _instance_rows(host, gpu, instance)
    for instance in gpu.missing:
        for holder in instance.holders:
            yield _missing_row(gpu, instance, holder)


def _missing_row(gpu: GpuState, instance: Instance, holder: Holder) -> dict[str, Any]:
    return {
        "gpu": gpu.index,
        "id": None,
        "uuid": None,
        "profile": instance.profile,
        "placement": list(instance.placement),
        "gpu_instance": None,
        "container": holder.container,
        "user": holder.user,
        "status": "missing",
        "until": units.format_time(holder.until) if holder.until else None,
        "occupied_by": None,
    }


def _instance_rows(host: Host, gpu: GpuState, instance: Instance) -> list[dict[str, Any]]:
    """A row for each MIG device; one without id and UUID for an instance that has none."""
    devices = [host.device(uuid) for uuid in instance.devices]
    return [_instance_row(host, gpu, instance, device) for device in devices or [None]]


def _instance_row(host: Host, gpu: GpuState, instance: Instance, device: Device | None) -> dict[str, Any]:
    allocation = host.ledger.holder_of(device) if device else None
    until = next((h.until for h in instance.holders if allocation and h.container == allocation.container), None)
    others = [h.what for h in instance.holders if h.what]
    outside = occupancy.and_more(others[0], len(others)) if others else None
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
    """What a change does to this host, so that its GPUs are as `cuts` says.

    `services` are stopped meanwhile; `repairs` say what else is not as it should be and is put right;
    `warnings` what was asked for and means nothing, `problems` what went wrong beside the layout.
    `over` are allocations that are over anyway, and that `host` is without.
    """

    host: Host
    plans: tuple[Plan, ...]
    cuts: Cuts
    services: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    over: tuple[Outcome, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return self.recuts or bool(self.repairs)

    @property
    def recuts(self) -> bool:
        """Whether a layout changes."""
        return any(p.changes for p in self.plans)

    @property
    def released(self) -> tuple[str, ...]:
        """The containers that lose their devices, as `force` allows."""
        return tuple(sorted({h.container for p in self.plans for i in p.broken for h in i.holders}))

    @property
    def given_back(self) -> Mapping[str, str]:
        """The containers that lose devices because their allocation is over, and why. Where nothing changes,
        that is left to the next request."""
        return {outcome.name.full: outcome.message for outcome in self.over if self.changed}

    @property
    def switched(self) -> tuple[GpuState, ...]:
        """The GPUs whose MIG mode changes."""
        return tuple(gpu for gpu in self.host.gpus for p in self.plans if p.gpu == gpu.index and p.switches)

    def result(self) -> dict[str, Any]:
        """`ds01 mig plan --json` and `ds01 mig apply --json`."""
        return {
            "changed": self.changed,
            "plan": [step_record(step) for p in self.plans for step in p.steps],
            "devices": [records.device_record(d) for d in self.host.inventory.devices],
            "services": list(self.services),
            "released": list(self.released),
            "given_back": list(self.given_back),
            "repairs": list(self.repairs),
            "warnings": [*(self.warnings if self.recuts else ()), *self.problems],
            "msg": self.summary(),
        }

    def summary(self) -> str:
        """The change in a sentence."""
        parts = [f"GPU {p.gpu}: {', '.join(map(str, p.changes))}" for p in self.plans if p.changes]
        return self._with_repairs(parts) or "Every GPU is cut as wanted."

    def done(self) -> str:
        """What was done, in short, for whoever was told each step."""
        cut = [str(p.gpu) for p in self.plans if p.changes]
        parts = [f"Cut as wanted: GPU {', '.join(cut)}"] if cut else []
        return self._with_repairs(parts) or "Every GPU is cut as wanted."

    def _with_repairs(self, parts: Sequence[str]) -> str:
        """The sentence with what is put right beside it; nothing where there is neither."""
        right = f"{'put' if parts else 'Put'} right: {'; '.join(self.repairs)}"
        said = [*parts, right] if self.repairs else parts
        return "; ".join(said) + "." if said else ""


def planned(host: Host, cuts: Cuts, force: Collection[str] = ()) -> Planned:
    """The plan for the GPUs that `cuts` names by index, all or none. Raises Ds01Error with what is in the way."""
    gpus = geometry.completed(host.gpus)
    there = {gpu.index for gpu in gpus}
    missing = sorted(set(cuts) - there)
    if missing:
        raise invalid_input(f"There is no GPU {missing[0]} here.", f"There are: {', '.join(map(str, sorted(there)))}.")
    found = mig.plan(gpus, cuts, force)
    if found.refusals:
        raise refusal(found.refusals, host, force)
    plan = Planned(replace(host, gpus=gpus), found.plans, cuts, warnings=tuple(_unknown(host, force)))
    running = sorted(host.running.intersection(plan.released))
    if running:
        raise Ds01Error(
            "container_running", f"{', '.join(running)}: force takes no running container's device.", STOP_HINT
        )
    return plan


def _unknown(host: Host, force: Collection[str]) -> Iterator[str]:
    """Of those who are named and have nothing, which is most likely a slip of the pen."""
    return (f"force: no container {name} has a device here." for name in force if name not in host.ledger.allocations)


def _remedy(refusals: Iterable[mig.LayoutRefusal], running: Collection[str], forced: Iterable[str]) -> str:
    """What may be forced, if that would do; with those that are `forced` already, or they would be in the way then."""
    holders = [holder for found in refusals for holder in found.blocked_by]
    names = list(dict.fromkeys(holder.container for holder in holders))
    run = [name for name in names if name in running]
    if not all(names) or any(not found.blocked_by for found in refusals):
        return ""
    first = f"{_they_run(run)}, and force takes no running container's device. {STOP_HINT} " if run else ""
    return f"{first}To break it all the same, force: {', '.join(dict.fromkeys([*forced, *names]))}."


def _they_run(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'runs' if len(names) == 1 else 'run'}"


def refusal(refusals: Sequence[mig.LayoutRefusal], host: Host, force: Collection[str] = ()) -> Ds01Error:
    """What is in the way, of each GPU, as one error."""
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
                    "pid": h.pid,
                    "unit": h.unit or None,
                }
                for h in r.blocked_by
            ],
        }
        for r in refusals
    ]
    message = " ".join([*(r.message for r in refusals), *_unknown(host, force)])
    refused = {r.gpu for r in refusals}
    missing = any(gpu.missing for gpu in host.gpus if gpu.index in refused)
    first_try = "What is missing may come back: sudo ds01 restore. " if missing else ""
    forced = [name for name in force if name in host.ledger.allocations]
    hint = first.hint or first_try + _remedy(refusals, host.running, forced)
    return Ds01Error(first.reason, message, hint, refusals=details)


def step_record(step: Step) -> dict[str, Any]:
    """A step as results show it."""
    return {
        "gpu": step.gpu,
        "action": step.action,
        "profile": step.profile or None,
        "placement": list(step.placement) if step.placement else None,
        "uuid": step.uuid or None,
    }
