"""GPUs cut anew for a request that nothing else can serve (`mig_strategy: dynamic`). Pure.

Instances in use are never touched, and the mode of a GPU never changes: what may go is what nobody has
or uses, as few of it as possible. Whether a cut is worth making is decided as everything else is, as if
it were made: so limits, reservations and those who wait longer count as ever.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from . import placement
from .limits import Limits
from .mig import GpuState, Holder, Instance, Placed, Profile, free_run, mask, room
from .model import NEW, Device, Grant, Refusal, Request

_IN_USE = (Holder("", what="in use"),)


def grant(request: Request, limits: Limits, situation: placement.Situation) -> Grant | None:
    """What the request is granted once GPUs are cut for it: with those cuts, and no hold given up. None:
    no cut helps, or the profile is not for the request to choose."""
    profile = placement.wanted_profile(request, situation)
    more = request.gpus - len(placement.candidates(request, limits, situation))
    gpus = [_held(gpu, situation) for gpu in situation.cuttable if _may_cut(gpu, profile, limits, situation)]
    booked = [gpu for gpu in gpus if _is_booked(gpu, profile, limits, situation)]
    for group in (booked, gpus):
        cuts = cut_for(group, profile, more, situation.ledger.load, situation.policy.strategy)
        if not cuts:
            continue
        decision = placement.decide(request, limits, imagined(situation, cuts))
        if isinstance(decision, Grant):
            return replace(decision, cuts=cuts)
    return None


def imagined(situation: placement.Situation, cuts: Mapping[int, Placed]) -> placement.Situation:
    """The situation once these GPUs are cut so: what is dissolved is gone, new devices are called `0:new`."""
    now = {gpu.index: gpu for gpu in situation.cuttable}
    after = {index: _cut(now[index], layout) for index, layout in cuts.items()}
    gone = {
        uuid for index in cuts for i in now[index].instances if i not in after[index].instances for uuid in i.devices
    }
    stays = [d for d in situation.inventory.devices if d.uuid not in gone]
    new = [_device(gpu, i) for gpu in after.values() for i in gpu.instances if i not in now[gpu.index].instances]
    return replace(
        situation,
        inventory=replace(situation.inventory, devices=(*stays, *new)),
        cuttable=tuple(after.get(gpu.index, gpu) for gpu in situation.cuttable),
    )


def room_kept(
    request: Request, limits: Limits, situation: placement.Situation, decision: Grant | Refusal
) -> frozenset[str]:
    """What is kept, besides its devices, for a request that waits: the GPUs that are to be cut for it, with
    all that is unused there; while there is no room, one for each device, so that it becomes empty there.
    By UUID, of GPUs and of devices."""
    indices = set(decision.cuts) if isinstance(decision, Grant) else _fewest_in_the_way(request, limits, situation)
    gpus = {gpu.uuid for gpu in situation.cuttable if gpu.index in indices}
    return frozenset(gpus).union(d.uuid for d in situation.inventory.devices if d.gpu_uuid in gpus)


def _fewest_in_the_way(request: Request, limits: Limits, situation: placement.Situation) -> set[int]:
    profile = placement.wanted_profile(request, situation)
    gpus = [_held(gpu, situation) for gpu in situation.cuttable if _may_cut(gpu, profile, limits, situation)]

    def in_the_way(gpu: GpuState) -> int:
        used = [mask(i.start, i.size) for i in gpu.instances if i.holders]
        places = (bits for _, bits in gpu.table.by_name[profile].masks)
        return min((sum(bool(bits & taken) for taken in used) for bits in places), default=len(used))

    ranked = sorted(gpus, key=lambda gpu: (in_the_way(gpu), gpu.index))
    return {gpu.index for gpu in ranked[: request.gpus]}


def _may_cut(gpu: GpuState, profile: str, limits: Limits, situation: placement.Situation) -> bool:
    """Whether the request may have this GPU cut. Not where the room is kept, or booked for somebody else;
    nor where a reservation means one of its MIG devices, which another cut would call otherwise, or a
    device of an allocation is missing, which belongs there."""
    probe = _probe(gpu, profile)
    if not placement.may_become(gpu, profile, limits) or gpu.uuid in situation.kept:
        return False
    here = [d for d in situation.inventory.devices if d.gpu_uuid == gpu.uuid]
    named = {name for d in here for name in (d.id, d.uuid)}
    pinned = (
        r.end > situation.now and any(d in named or d.startswith(f"{gpu.index}:") for d in r.devices)
        for r in situation.reservations
    )
    missing = (d.gpu_uuid == gpu.uuid for d, _ in situation.missing)
    return not (any(pinned) or any(missing) or placement.bookings(probe, limits, situation))


def _is_booked(gpu: GpuState, profile: str, limits: Limits, situation: placement.Situation) -> bool:
    """Whether this GPU is booked for this user now."""
    probe = _probe(gpu, profile)
    return any(r.user == limits.user and r.covers(situation.now) and r.names(probe) for r in situation.reservations)


def _probe(gpu: GpuState, profile: str) -> Device:
    """A device as it would be cut out of this GPU."""
    return Device(f"{gpu.index}:{NEW}", f"{NEW}-{gpu.uuid}", gpu.uuid, profile)


def _held(gpu: GpuState, situation: placement.Situation) -> GpuState:
    """The GPU with everything marked that may not be dissolved: allocated, held, in use, or kept."""
    free = {
        d.uuid
        for d in situation.inventory.devices
        if d.gpu_uuid == gpu.uuid
        and not (situation.ledger.holder_of(d) or d.uuid in situation.occupied or d.uuid in situation.kept)
    }
    marked = (i if free.issuperset(i.devices) else replace(i, holders=_IN_USE) for i in gpu.instances)
    return replace(gpu, instances=tuple(marked))


def _cut(gpu: GpuState, layout: Placed) -> GpuState:
    """The GPU cut so."""
    there = {i.key: i for i in gpu.instances if i.whole}
    return replace(gpu, instances=tuple(there.get(key) or _instance(gpu, *key) for key in layout.instances))


def _instance(gpu: GpuState, profile: str, start: int) -> Instance:
    uuid = f"{NEW}-{gpu.uuid}-{profile}@{start}"
    return Instance(-1, profile, start, gpu.table.by_name[profile].size, (uuid,))


def _device(gpu: GpuState, instance: Instance) -> Device:
    profile = gpu.table.by_name[instance.profile]
    share = Fraction(profile.slices, gpu.table.slices)
    return Device(
        id=f"{gpu.index}:{NEW}",
        uuid=instance.uuid,
        gpu_uuid=gpu.uuid,
        profile=profile.name,
        placement=instance.placement,
        equivalents=share,
        memory_mib=profile.memory_mib,
    )


# --- which layout


@dataclass(frozen=True)
class _Way:
    """One way to give a GPU so many instances more: how many unused ones go, the run of slices that stays
    free, and what is there then; None: it stays as it is."""

    gone: int
    run: int
    layout: Placed | None = None


@dataclass(frozen=True)
class _Choice:
    """How some GPUs are cut. The less it costs the better: how many unused instances go, the longest free
    runs (negative), how crowded the GPUs are by strategy, their indices; each added up over the GPUs."""

    cost: tuple[int, ...]
    cuts: tuple[tuple[int, Placed], ...] = ()


def cut_for(
    gpus: Sequence[GpuState],
    profile: str,
    count: int = 1,
    load: Mapping[str, int] | None = None,
    strategy: str = "least_allocated",
) -> dict[int, Placed] | None:
    """How to cut these GPUs, by index, so that they have `count` devices of a profile more: all, or None.

    Instances with holders stay, and so do those of this profile. Of everything else as few as possible go,
    then the least is lost of the GPUs' longest free runs, then the GPUs count by strategy: by how many of
    their devices are allocated (`load`, by UUID), the lowest index first.
    """
    sign = -1 if strategy == "packed" else 1
    best = {0: _Choice((0, 0, 0, 0))}  # by how many devices it gives
    for gpu in gpus:
        if is_open(gpu) and profile in gpu.table.by_name:
            ways = _ways(gpu, gpu.table.by_name[profile], count)
            best = _with(best, gpu, ways, count, sign, (load or {}).get(gpu.uuid, 0))
    return dict(best[count].cuts) if count in best else None


def _with(
    best: Mapping[int, _Choice], gpu: GpuState, ways: Mapping[int, _Way], count: int, sign: int, load: int
) -> dict[int, _Choice]:
    """The best choices once this GPU takes part too, for each number of devices up to `count`."""
    found: dict[int, _Choice] = {}
    for (so_far, choice), (more, way) in itertools.product(best.items(), ways.items()):
        number, crowd = so_far + more, sign * sum(range(load, load + more))
        added = (way.gone, -way.run, crowd, more * gpu.index)
        cost = tuple(a + b for a, b in zip(choice.cost, added, strict=True))
        if number <= count and (number not in found or cost < found[number].cost):
            cut = ((gpu.index, way.layout),) if way.layout else ()
            found[number] = _Choice(cost, (*choice.cuts, *cut))
    return found


def is_open(gpu: GpuState) -> bool:
    """Whether a request may have this GPU cut: MIG is on and stays on, it is healthy, and nobody divided
    one of its instances by hand, which no layout could say."""
    divided = any(i.devices and not i.whole for i in gpu.instances)
    return gpu.mig and gpu.capable and not gpu.mode_pending and gpu.health == "ok" and not divided


def _ways(gpu: GpuState, profile: Profile, most: int) -> dict[int, _Way]:
    """The best way for each number of instances more, up to `most`; numbers that do not fit are absent."""
    stays = [i for i in gpu.instances if i.holders or (i.whole and i.profile == profile.name)]
    loose = [i for i in gpu.instances if i not in stays]
    taken = _taken(stays)
    ways = {0: _Way(0, free_run(gpu.table, _taken(gpu.instances)))}
    ranks: dict[int, tuple[int, ...]] = {}
    for starts in _placements(profile, taken, min(most, _allowed(profile, stays))):
        new = sum(mask(start, profile.size) for start in starts)
        kept = [i for i in loose if _may_stay(i, profile, new)]
        gone, number = len(loose) - len(kept), len(starts)
        if number in ways and gone > ways[number].gone:
            continue
        after = taken | _taken(kept) | new
        run = free_run(gpu.table, after)
        rank = (gone, -run, -room(gpu.table, after), *starts)
        if number not in ranks or rank < ranks[number]:
            keys = [i.key for i in (*stays, *kept)] + [(profile.name, start) for start in starts]
            ranks[number] = rank
            ways[number] = _Way(gone, run, Placed(True, tuple(sorted(keys, key=lambda key: key[1]))))
    return ways


def _allowed(profile: Profile, stays: Sequence[Instance]) -> int:
    """How many more of a profile the driver takes beside these, were there room."""
    if profile.media:
        return 0 if any("+me" in i.profile for i in stays) else 1
    return profile.most - Counter(i.profile for i in stays)[profile.name]


def _may_stay(instance: Instance, profile: Profile, new: int) -> bool:
    """Whether an unused instance may stay beside the new ones. A leftover without a device goes with any cut."""
    overlaps = bool(mask(instance.start, instance.size) & new)
    return instance.whole and not overlaps and not (profile.media and "+me" in instance.profile)


def _placements(profile: Profile, taken: int, most: int, first: int = 0) -> Iterator[tuple[int, ...]]:
    """Where one and more of a profile fit beside each other, from left to right."""
    if most <= 0:
        return
    for number in range(first, len(profile.masks)):
        start, bits = profile.masks[number]
        if not bits & taken:
            yield (start,)
            for others in _placements(profile, taken | bits, most - 1, number + 1):
                yield (start, *others)


def _taken(instances: Sequence[Instance]) -> int:
    bits = 0
    for i in instances:
        bits |= mask(i.start, i.size)
    return bits
