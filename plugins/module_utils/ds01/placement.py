"""Which devices a request gets, or why not. Pure.

The order is: is it allowed at all (limits) -> what is asked for (profile) -> what is free, unused,
healthy, not booked and not kept for somebody who waits -> which of those (strategy). Nothing ever
widens the wish: a MIG request is never answered with a whole GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from . import units
from .limits import GpuPolicy, Limits, Reservation, number_text
from .model import FULL, Allocation, Device, Grant, Inventory, Ledger, Refusal, Request, Waiter

if TYPE_CHECKING:
    from .mig import GpuState

NONE_FREE = ("no_gpu_available", "reserved", "gpu_unhealthy")
"""Reasons that another free device would change."""

ANY = "any"
"""The wish for any device the user may have, the smallest first."""

# What keeps a device from being granted; the first that applies counts.
TAKEN, OCCUPIED, UNHEALTHY, CLAIMED, BOOKED, KEPT = "taken", "occupied", "unhealthy", "claimed", "booked", "kept"
_OBSTACLES = (TAKEN, OCCUPIED, UNHEALTHY, CLAIMED, BOOKED, KEPT)
_Seen = Sequence[tuple[Device, str]]  # a fitting device, and what keeps it from being granted


@dataclass(frozen=True)
class Situation:
    """Everything a decision depends on, read under the ledger's lock.

    `containers` counts the user's other containers in any state; `running` names all that run (or
    are paused) now; `hold_end` says when a held allocation runs out (None: not before it is
    released). By device UUID: `occupied` says who uses a device without DS01, `kept` are devices for
    those who wait longer, `preferred` are taken first, in that order. `queue` holds who waits, in order
    of arrival; `reclaim` says that holds of lower priority give way. `cuttable` are GPUs that may be cut
    anew where nobody uses them; in `kept` a GPU's UUID keeps its room.
    """

    ledger: Ledger
    inventory: Inventory
    policy: GpuPolicy
    now: datetime
    reservations: Sequence[Reservation] = ()
    containers: int = 0
    running: Collection[str] = ()
    hold_end: Callable[[Allocation], datetime | None] = lambda _: None
    occupied: Mapping[str, str] = field(default_factory=dict)
    kept: Collection[str] = ()
    preferred: Mapping[str, int] = field(default_factory=dict)
    queue: tuple[Waiter, ...] = ()
    reclaim: bool = True
    cuttable: Sequence[GpuState] = ()

    @cached_property
    def missing(self) -> Sequence[tuple[Device, Allocation]]:
        """What somebody has and the host does not show: it may come back in its place."""
        return self.ledger.missing(self.inventory)


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
    if wish == ANY and not limits.allow_full_gpu and devices and all(is_whole(d, situation) for d in devices):
        return _profile_allowed(FULL, limits, situation)
    if not limits.allow_full_gpu and _stands_for_whole(wish, situation):
        return Refusal(
            "full_gpu_not_allowed",
            f"{limits.user} ({limits.group}) may not have a whole GPU, and a {wish} device is all of one.",
            "Ask for a smaller MIG profile, or an admin to set allow_full_gpu.",
        )
    there = sum(_fits(d, wish, limits, situation) for d in devices)
    if there < count and _attainable(wish, limits, situation) < count:
        profiles = sorted({d.profile for d in devices})
        return Refusal(
            "profile_not_available",
            f"This host has {f'only {there}' if there else 'no'} {_named(wish)}{'s' if there > 1 else ''}.",
            f"It has: {', '.join(profiles) or 'no device at all'}.",
        )
    return None


def _attainable(wish: str, limits: Limits, situation: Situation) -> int:
    """How many such devices the host could have, were every GPU that may be cut cut into nothing else."""
    there = Counter(d.gpu_uuid for d in situation.inventory.devices if _fits(d, wish, limits, situation))
    for gpu in situation.cuttable:
        if may_become(gpu, wish, limits):
            there[gpu.uuid] = max(there[gpu.uuid], gpu.table.by_name[wish].most)
    return there.total()


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
    fitting = [d for d in situation.inventory.devices if _fits(d, wish, limits, situation)]
    seen = [(device, obstacle(device, limits, situation)) for device in fitting]
    open_ = [device for device, problem in seen if not problem]
    if len(open_) < request.gpus:
        return _none_left(request, wish, seen, limits, situation)
    chosen = _pick(request.gpus, open_, limits, situation)
    return _equivalents_allowed(chosen, limits, situation) or Grant(tuple(chosen))


def obstacle(device: Device, limits: Limits, situation: Situation) -> str:
    """What keeps the user from getting the device now; empty when nothing does."""
    if situation.ledger.holder_of(device):
        return TAKEN
    if device.uuid in situation.occupied:
        return OCCUPIED
    if device.health != "ok":
        return UNHEALTHY
    if any(claims(device, situation)):
        return CLAIMED
    if bookings(device, limits, situation):
        return BOOKED
    return KEPT if device.uuid in situation.kept else ""


def claims(device: Device, situation: Situation) -> Iterator[tuple[Device, Allocation]]:
    """What is missing and had room that this device has now, with who has it."""
    return ((gone, whose) for gone, whose in situation.missing if _overlap(gone, device))


def _overlap(one: Device, other: Device) -> bool:
    """Whether two devices share room of a GPU; where one of them does not say which it has, they may."""
    if one.gpu_uuid != other.gpu_uuid:
        return False
    if one.placement is None or other.placement is None:
        return True
    (first, size), (second, length) = one.placement, other.placement
    return first < second + length and second < first + size


def bookings(device: Device, limits: Limits, situation: Situation) -> list[Reservation]:
    """The reservations of others that the user's longest run on this device would meet."""
    return [
        reservation
        for reservation in situation.reservations
        if reservation.user != limits.user
        and reservation.meets(situation.now, limits.max_runtime)
        and reservation.names(device)
    ]


def candidates(request: Request, limits: Limits, situation: Situation) -> list[Device]:
    """The devices that this request could be given now, be they enough or not."""
    wish = wanted_profile(request, situation)
    fitting = (d for d in situation.inventory.devices if _fits(d, wish, limits, situation))
    return [d for d in fitting if not obstacle(d, limits, situation)]


def is_whole(device: Device, situation: Situation) -> bool:
    """Whether the device counts as a whole GPU. Where GPUs are cut for who asks, a MIG device with all
    compute slices does, too: it is there because somebody asked, not because an admin divides GPUs so."""
    return device.is_full or (situation.policy.mig_strategy == "dynamic" and device.equivalents == 1)


def _stands_for_whole(wish: str, situation: Situation) -> bool:
    """Whether all that this profile is, or could be cut into, counts as a whole GPU."""
    there = [is_whole(d, situation) for d in situation.inventory.devices if d.profile == wish]
    there += [gpu.table.is_whole(wish) for gpu in situation.cuttable if wish in gpu.table.by_name]
    return bool(there) and all(there)


def may_become(gpu: GpuState, profile: str, limits: Limits) -> bool:
    """Whether the user may have this GPU cut into that profile at all."""
    return profile in gpu.table.by_name and (limits.allow_full_gpu or not gpu.table.is_whole(profile))


def _fits(device: Device, wish: str, limits: Limits, situation: Situation) -> bool:
    if not limits.allow_full_gpu and is_whole(device, situation):
        return False
    return wish in (ANY, device.profile)


def _pick(count: int, open_: Iterable[Device], limits: Limits, situation: Situation) -> list[Device]:
    """The devices, one after the other: preferred or booked for this user, then smallest, then by
    strategy, then lowest index; as far as possible within the user's GPU-equivalents."""
    load = Counter(situation.ledger.load)
    sign = -1 if situation.policy.strategy == "packed" else 1
    mine = [r for r in situation.reservations if r.user == limits.user and r.covers(situation.now)]
    ahead = {**{d.uuid: -1 for d in open_ if any(r.names(d) for r in mine)}, **situation.preferred}
    remaining = list(open_)
    chosen: list[Device] = []
    for more in reversed(range(count)):
        left = _equivalents_left(limits, situation, chosen)
        best = min(
            _affordable(remaining, more, left) or remaining,
            key=lambda d: (ahead.get(d.uuid, len(ahead)), d.equivalents, sign * load[d.gpu_uuid], d.index),
        )
        remaining.remove(best)
        chosen.append(best)
        load[best.gpu_uuid] += 1
    return sorted(chosen, key=lambda d: d.index)


def _equivalents_left(limits: Limits, situation: Situation, chosen: Iterable[Device]) -> Fraction | None:
    """What the user may have besides all that is allocated and chosen; None: any number."""
    if limits.max_gpu_equivalents is None:
        return None
    mine = (d for a in situation.ledger.of_user(limits.user) for d in a.devices)
    return limits.max_gpu_equivalents - sum((d.equivalents for d in (*mine, *chosen)), Fraction(0))


def _affordable(devices: Sequence[Device], more: int, left: Fraction | None) -> list[Device]:
    """Those that leave enough for as many more of the smallest others."""
    if left is None:
        return list(devices)
    smallest = sorted(devices, key=lambda d: d.equivalents)[: more + 1]

    def cost(device: Device) -> Fraction:
        others = [d for d in smallest if d is not device][:more]
        return sum((d.equivalents for d in others), device.equivalents)

    return [device for device in devices if cost(device) <= left]


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


def _none_left(request: Request, wish: str, seen: _Seen, limits: Limits, situation: Situation) -> Refusal:
    what = f"{request.gpus} x {_named(wish)}" if request.gpus > 1 else _named(wish)
    passed = {name: _beyond(name, [problem for _, problem in seen]) for name in _OBSTACLES}
    if passed[UNHEALTHY] < request.gpus <= passed[OCCUPIED]:
        return _unhealthy(request, what, seen)
    if passed[BOOKED] < request.gpus <= passed[CLAIMED]:
        return _reserved(what, seen, limits, situation)
    ends = _ends(seen, limits, situation)
    return Refusal(
        "no_gpu_available",
        f"No {what} is free: {_in_the_way(wish, seen, situation)}.",
        f"The earliest hold or reservation ends at {units.format_time(min(ends))}."
        if ends
        else "Try again later, or let it wait (--wait 10m).",
        min(ends, default=None),
        retry=True,
    )


def _beyond(name: str, found: Iterable[str]) -> int:
    """How many devices have nothing against them up to and including this obstacle."""
    later = ("", *_OBSTACLES[_OBSTACLES.index(name) + 1 :])
    return sum(problem in later for problem in found)


def _unhealthy(request: Request, what: str, seen: _Seen) -> Refusal:
    sick = sorted(f"{d.id} ({d.health})" for d, problem in seen if problem == UNHEALTHY)
    return Refusal(
        "gpu_unhealthy",
        f"No healthy {what} is free; not granted: {', '.join(sick)}.",
        "An admin can see why with: ds01 status.",
        retry=sum(d.health == "ok" for d, _ in seen) >= request.gpus,
    )


def _reserved(what: str, seen: _Seen, limits: Limits, situation: Situation) -> Refusal:
    booked = [r for d, o in seen if o == BOOKED for r in bookings(d, limits, situation)]
    if any(r.covers(situation.now) for r in booked):
        message = f"Every free {what} is reserved."
    else:
        runtime = "may run for ever" if limits.max_runtime is None else "may run too long"
        start = units.format_time(min(r.start for r in booked))
        message = (
            f"Every free {what} is reserved from {start} on, and {limits.user}'s container {runtime} (max_runtime)."
        )
    end = min(r.end for r in booked)
    return Refusal("reserved", message, f"Try again after {units.format_time(end)}.", end, retry=True)


def _in_the_way(wish: str, seen: _Seen, situation: Situation) -> str:
    """Why the fitting devices cannot be had, most of them first, and why no other is cut."""
    number = Counter(problem for _, problem in seen)
    seen = sorted(seen, key=lambda entry: entry[0].index)
    parts = [f"{number[TAKEN]} of {len(seen)} in use"] if number[TAKEN] else []
    parts += [
        f"{d.id} is used by {situation.occupied[d.uuid]}, which DS01 does not manage"
        for d, problem in seen
        if problem == OCCUPIED
    ]
    parts += [f"{d.id} is {d.health}" for d, problem in seen if problem == UNHEALTHY]
    parts += [
        f"{d.id} has the room of {gone.profile} that {whose.container} has and that is missing (sudo ds01 restore)"
        for d, problem in seen
        if problem == CLAIMED
        for gone, whose in claims(d, situation)
    ]
    parts += [f"{number[BOOKED]} reserved"] if number[BOOKED] else []
    parts += [f"{number[KEPT]} kept for requests that wait"] if number[KEPT] else []
    possible = [gpu for gpu in situation.cuttable if wish in gpu.table.by_name]
    if any(gpu.uuid in situation.kept for gpu in possible):
        parts.append("room is kept for requests that wait")
    elif possible:
        parts.append("no GPU has unused room for it")
    return ", ".join(parts)


def _ends(seen: _Seen, limits: Limits, situation: Situation) -> list[datetime]:
    """When holds and reservations end that are in the way. One that is over, and was not yet given back,
    is no promise."""
    holders = (situation.ledger.holder_of(d) for d, _ in seen)
    ends = [end for a in holders if a and (end := situation.hold_end(a)) and end > situation.now]
    return ends + [r.end for d, o in seen if o == BOOKED for r in bookings(d, limits, situation)]


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
