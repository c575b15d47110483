"""Which devices a request gets, or why not. Pure.

The order is: is it allowed at all (limits) -> what is asked for (profile) -> what is free, healthy
and not booked -> which of those (strategy). Nothing ever widens the wish: a MIG request is never
answered with a whole GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction

from . import units
from .limits import GpuPolicy, Limits, Reservation, number_text
from .model import FULL, Allocation, Device, Grant, Inventory, Ledger, Refusal, Request

ANY = "any"
"""The wish for any device the user may have, the smallest first."""


@dataclass(frozen=True)
class Situation:
    """Everything a decision depends on, read under the ledger's lock.

    `containers` counts the user's other containers in any state; `running` names all that run (or
    are paused) now; `hold_ends` says when each held
    allocation runs out (absent: not before it is released).
    """

    ledger: Ledger
    inventory: Inventory
    policy: GpuPolicy
    now: datetime
    reservations: Sequence[Reservation] = ()
    containers: int = 0
    running: Collection[str] = ()
    hold_ends: Mapping[str, datetime] | None = None


def decide(request: Request, limits: Limits, situation: Situation) -> Grant | Refusal:
    """All the devices asked for, or none and the reason."""
    refusal = containers_allowed(limits, situation.containers)
    if refusal or request.gpus == 0:
        return refusal or Grant(())
    wish = wanted_profile(request, situation)
    refusal = _count_allowed(request, limits, situation) or _profile_allowed(wish, limits, situation, request.gpus)
    if refusal:
        return refusal
    return _choose(request, wish, limits, situation)


def wanted_profile(request: Request, situation: Situation) -> str:
    """The profile a request stands for: its own, else the configured one, else what the host has."""
    if request.profile:
        return request.profile
    mig_on = any(gpu.mig for gpu in situation.inventory.gpus)
    if not (situation.policy.enable_mig and mig_on):
        return FULL
    return situation.policy.mig_profile or ANY


def containers_allowed(limits: Limits, containers: int) -> Refusal | None:
    """Why the user, who has this many other containers, may not have one more; None when allowed."""
    allowed = limits.max_containers_per_user
    if allowed is None or containers < allowed:
        return None
    return Refusal(
        "container_limit",
        f"{limits.user} has {containers} of {allowed} containers, running and stopped.",
        "Remove one first: playbooks/container_remove.yml.",
    )


def _profile_allowed(wish: str, limits: Limits, situation: Situation, count: int = 1) -> Refusal | None:
    if wish == FULL and not limits.allow_full_gpu:
        return Refusal(
            "full_gpu_not_allowed",
            f"{limits.user} ({limits.group}) may not have a whole GPU.",
            "Ask for a MIG profile, or an admin to set allow_full_gpu.",
        )
    devices = situation.inventory.devices
    if wish == ANY and not limits.allow_full_gpu and devices and all(d.is_full for d in devices):
        return _profile_allowed(FULL, limits, situation)
    there = sum(_fits(d, wish, limits) for d in devices)
    if there < count:
        profiles = sorted({d.profile for d in devices})
        return Refusal(
            "profile_not_available",
            f"This host has {f'only {there}' if there else 'no'} {_named(wish)}{'s' if there > 1 else ''}.",
            f"It has: {', '.join(profiles) or 'no device at all'}.",
        )
    return None


def _count_allowed(request: Request, limits: Limits, situation: Situation) -> Refusal | None:
    per_container = limits.max_gpus_per_container
    if per_container is not None and request.gpus > per_container:
        return Refusal(
            "container_limit",
            f"{request.gpus} devices were asked for; {limits.user} may have {per_container} in one container.",
            f"Ask for {per_container}." if per_container else "Ask for 0: a CPU-only container.",
        )
    mine = situation.ledger.of_user(limits.user)
    have = sum(len(a.devices) for a in mine)
    if limits.max_gpus is not None and have + request.gpus > limits.max_gpus:
        return Refusal(
            "user_at_limit",
            f"{limits.user} has {have} of {limits.max_gpus} devices{_held_by(mine)} and asked for {request.gpus}.",
            _release_hint(mine),
        )
    return None


def _choose(request: Request, wish: str, limits: Limits, situation: Situation) -> Grant | Refusal:
    matching = [d for d in situation.inventory.devices if _fits(d, wish, limits)]
    free = [d for d in matching if situation.ledger.holder_of(d) is None]
    healthy = [d for d in free if d.health == "ok"]
    booked = _booked_for_others(situation, limits.user)
    open_ = [d for d in healthy if d.id not in booked]
    if len(open_) < request.gpus:
        return _none_left(request, wish, matching, free, healthy, situation, limits.user)
    chosen = _pick(request.gpus, open_, situation)
    return _equivalents_allowed(chosen, limits, situation) or Grant(tuple(chosen))


def _fits(device: Device, wish: str, limits: Limits) -> bool:
    if wish == ANY:
        return limits.allow_full_gpu or not device.is_full
    return device.profile == wish


def _booked_for_others(situation: Situation, user: str) -> set[str]:
    """Ids of reserved devices; a booked GPU books its MIG devices too."""
    ids = {i for r in situation.reservations if r.user != user and r.covers(situation.now) for i in r.devices}
    return {d.id for d in situation.inventory.devices if d.id in ids or str(d.index[0]) in ids}


def _pick(count: int, candidates: Iterable[Device], situation: Situation) -> list[Device]:
    """The devices, one after the other: smallest, then by strategy, then lowest index."""
    load = Counter(d.gpu_uuid for a in situation.ledger.allocations.values() for d in a.devices)
    sign = -1 if situation.policy.strategy == "packed" else 1
    remaining = list(candidates)
    chosen: list[Device] = []
    for _ in range(count):
        best = min(remaining, key=lambda d: (d.equivalents, sign * load[d.gpu_uuid], d.index))
        remaining.remove(best)
        chosen.append(best)
        load[best.gpu_uuid] += 1
    return sorted(chosen, key=lambda d: d.index)


def _equivalents_allowed(chosen: Iterable[Device], limits: Limits, situation: Situation) -> Refusal | None:
    allowed = limits.max_gpu_equivalents
    if allowed is None:
        return None
    mine = situation.ledger.of_user(limits.user)
    have = sum((d.equivalents for a in mine for d in a.devices), Fraction(0))
    more = sum((d.equivalents for d in chosen), Fraction(0))
    if have + more <= allowed:
        return None
    return Refusal(
        "user_at_limit",
        f"{limits.user} has {have} of {number_text(allowed)} GPU-equivalents{_held_by(mine)}; this needs {more} more.",
        _release_hint(mine),
    )


def _none_left(
    request: Request,
    wish: str,
    matching: Sequence[Device],
    free: Sequence[Device],
    healthy: Sequence[Device],
    situation: Situation,
    user: str,
) -> Refusal:
    what = f"{request.gpus} x {_named(wish)}" if request.gpus > 1 else _named(wish)
    if len(healthy) >= request.gpus:
        ends = [r.end for r in situation.reservations if r.user != user and r.covers(situation.now)]
        return Refusal(
            "reserved", f"Every free {_named(wish)} is reserved.", "Try again later.", min(ends, default=None)
        )
    if len(free) >= request.gpus:
        sick = sorted(f"{d.id} ({d.health})" for d in free if d.health != "ok")
        return Refusal(
            "gpu_unhealthy",
            f"No healthy {what} is free; not granted: {', '.join(sick)}.",
            "An admin can see why with: ds01 status.",
        )
    users = {a.container for d in matching if (a := situation.ledger.holder_of(d))}
    ends = [end for container, end in (situation.hold_ends or {}).items() if container in users]
    available = min(ends, default=None)
    return Refusal(
        "no_gpu_available",
        f"No {what} is free: {len(matching) - len(free)} of {len(matching)} in use.",
        f"The earliest hold ends at {units.format_time(available)}." if available else "Try again later.",
        available,
    )


def _named(wish: str) -> str:
    return {FULL: "whole GPU", ANY: "device"}.get(wish, f"{wish} device")


def _held_by(allocations: Iterable[Allocation]) -> str:
    described = [f"{a.gpu_id} in {a.container}, {a.status}" for a in allocations]
    return f" ({'; '.join(described)})" if described else ""


def _release_hint(allocations: Sequence[Allocation]) -> str:
    if not allocations:
        return "An admin can raise the limit in resource-limits.yaml."
    idle = next((a for a in allocations if a.status != "active"), None)
    if idle:
        return f"Free one with: ds01 release --container {idle.container}."
    return f"Stop and remove one, such as {allocations[0].container}: playbooks/container_remove.yml."
