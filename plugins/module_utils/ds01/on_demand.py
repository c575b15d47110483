"""GPUs cut anew for a request that nothing else can serve (`mig_strategy: dynamic`). Pure.

Instances in use are never touched, and the mode of a GPU never changes: what may go is what nobody has
or uses, as few of it as possible.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .mig import GpuState, Instance, Placed, Profile, free_run, mask, room


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
