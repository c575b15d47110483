"""Which MIG instances to destroy and create, and where, to cut a GPU as wanted. Pure.

The plan is exact: every way to place the wanted profiles is considered, so none smaller exists.
First come the instances in use, which stay unless they are named in `force` (one that is missing is made
again in its place), then the fewest operations, then the largest free run, then what could still be cut.
Profiles and their placements are NVML's own, asked of the GPU; nothing here knows a model.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property

from . import units
from .model import FULL, Refusal

KEEP, CREATE, DESTROY, ENABLE, DISABLE = "keep", "create", "destroy", "enable", "disable"

DIVIDED, LEFTOVER = "divided", "leftover"
"""Why an instance that is there has to be made anew to be one of a layout."""

Placement = tuple[int, int]
"""The memory slices of an instance as NVML counts them: (start, size)."""


def span(start: int, size: int) -> str:
    """The memory slices of an instance, as people read them: `4-7`, or `2`."""
    return str(start) if size == 1 else f"{start}-{start + size - 1}"


_IN_USE = 1000
"""What an instance in use is worth beside one that is there and need not be made (1): more than all of those."""

_NEVER = datetime.max.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class Profile:
    """A GPU instance profile: what NVML says of it.

    `slices` are compute slices (the 2 of 2g), `size` memory slices, `starts` the memory slices at which
    an instance may begin, `most` how many a GPU takes when it is cut into nothing else.
    """

    name: str
    id: int
    slices: int
    size: int
    starts: tuple[int, ...]
    most: int
    memory_mib: int = 0

    @property
    def media(self) -> bool:
        """Whether it takes the media engines: one instance of a GPU can have them (MIG User Guide, "+me")."""
        return "+me" in self.name

    @cached_property
    def masks(self) -> tuple[tuple[int, int], ...]:
        """(start, the memory slices as bits) of each possible placement."""
        return tuple((start, mask(start, self.size)) for start in self.starts)


@dataclass(frozen=True)
class Table:
    """The profiles of one GPU."""

    profiles: tuple[Profile, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, Profile]:
        return {p.name: p for p in self.profiles}

    @cached_property
    def usable(self) -> int:
        """The slices, as bits, that the smallest profiles can use. An A100's eighth has memory and no
        compute: only instances of two slices and more reach it, so a run does not grow by it."""
        smallest = min((p.size for p in self.profiles), default=0)
        return _union(bits for p in self.profiles if p.size == smallest for _, bits in p.masks)

    @cached_property
    def width(self) -> int:
        """How many memory slices the GPU has."""
        return max((start + p.size for p in self.profiles for start in p.starts), default=0)

    @cached_property
    def slices(self) -> int:
        """How many compute slices the GPU has."""
        return max((p.slices for p in self.profiles), default=0)

    def is_whole(self, profile: str) -> bool:
        """Whether an instance of this profile has all compute slices."""
        return self.by_name[profile].slices == self.slices


@dataclass(frozen=True)
class Holder:
    """Who uses an instance or a GPU: a container of DS01, or something else that `what` describes.

    `until` is when it is over; None: nobody knows. `pid` and `unit` are of a process of the host.
    """

    container: str
    user: str = ""
    until: datetime | None = None
    what: str = ""
    pid: int | None = None
    unit: str = ""

    def __str__(self) -> str:
        name = f"{self.container} of {self.user}" if self.container else self.what
        return f"{name} until {units.format_time(self.until)}" if self.until else name


@dataclass(frozen=True)
class Instance:
    """A GPU instance. `devices` are the UUIDs of its MIG devices: none where its compute instance is
    missing, several where it was divided by somebody else. `whole`: it has one that spans all of it.
    `there` is False for one of `GpuState.missing`.
    """

    id: int
    profile: str
    start: int
    size: int
    devices: tuple[str, ...] = ()
    whole: bool = True
    holders: tuple[Holder, ...] = ()
    there: bool = True

    @property
    def uuid(self) -> str:
        return self.devices[0] if self.devices else ""

    @property
    def placement(self) -> Placement:
        return self.start, self.size

    @property
    def key(self) -> tuple[str, int]:
        return self.profile, self.start

    @property
    def flaw(self) -> str:
        """DIVIDED where its compute instances are smaller than it, LEFTOVER where it has none, else nothing."""
        if self.whole:
            return ""
        return DIVIDED if self.devices else LEFTOVER


@dataclass(frozen=True)
class GpuState:
    """A GPU as it is. `mig` is its mode now, `pending` the mode after its next reset; `capable`: it has
    MIG at all; `resets`: a change of the mode resets it. `holders` use it as a whole, `model_id` is its PCI
    device id as mig-parted writes it, `minor` the number of its device node. `missing` is what somebody has
    and the GPU does not show, such as after a reboot or a reset; a whole GPU among it has the profile `full`.
    """

    index: int
    uuid: str
    name: str
    mig: bool
    table: Table = Table()
    instances: tuple[Instance, ...] = ()
    missing: tuple[Instance, ...] = ()
    pending: bool | None = None
    capable: bool = True
    model_id: int = 0
    holders: tuple[Holder, ...] = ()
    health: str = "ok"
    resets: bool = False
    minor: int = -1

    @property
    def mode_pending(self) -> bool:
        return self.pending is not None and self.pending != self.mig


@dataclass(frozen=True)
class Cut:
    """How a GPU is wanted: MIG on or off, and the profiles, as many of each as named."""

    enabled: bool
    profiles: tuple[str, ...] = ()

    @cached_property
    def counts(self) -> Mapping[str, int]:
        return Counter(self.profiles)

    def __str__(self) -> str:
        if not self.enabled:
            return "a whole GPU"
        counted = (name if n == 1 else f"{n} x {name}" for name, n in self.counts.items())
        return ", ".join(counted) or "no instances"


@dataclass(frozen=True)
class Placed:
    """How a GPU is wanted to the slice: MIG on or off, and exactly these instances, each a profile and
    the memory slice at which it starts. A layout that is restored or was decided elsewhere.
    """

    enabled: bool
    instances: tuple[tuple[str, int], ...] = ()

    @property
    def cut(self) -> Cut:
        return Cut(self.enabled, tuple(name for name, _ in self.instances))

    def __str__(self) -> str:
        if not (self.enabled and self.instances):
            return str(self.cut)
        return ", ".join(f"{name} at {start}" for name, start in sorted(self.instances, key=lambda key: key[1]))


@dataclass(frozen=True)
class Step:
    """One operation on a GPU, or an instance that stays. `flaw` is that of an instance which goes."""

    gpu: int
    action: str
    profile: str = ""
    placement: Placement | None = None
    uuid: str = ""
    flaw: str = ""

    def __str__(self) -> str:
        if self.placement is None:
            return f"{self.action} MIG mode"
        flaw = f" ({self.flaw})" if self.flaw else ""
        return f"{self.action} {self.profile} at {span(*self.placement)}{flaw}"


@dataclass(frozen=True)
class Plan:
    """What to do with one GPU, in order: destroys, the mode, what stays, creates."""

    gpu: int
    steps: tuple[Step, ...] = ()
    broken: tuple[Instance, ...] = ()
    """Instances in use that the plan destroys, or leaves missing, because `force` names their holders."""

    @property
    def changes(self) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.action != KEEP)

    @property
    def switches(self) -> bool:
        """Whether the MIG mode changes."""
        return any(s.action in (ENABLE, DISABLE) for s in self.steps)


@dataclass(frozen=True)
class LayoutRefusal(Refusal):
    """Why a GPU cannot be cut as wanted, and what is in the way."""

    gpu: int = -1
    blocked_by: tuple[Holder, ...] = ()


@dataclass(frozen=True)
class HostPlan:
    """The plans of all GPUs; where there is a refusal, nothing of them may be carried out."""

    plans: tuple[Plan, ...] = ()
    refusals: tuple[LayoutRefusal, ...] = ()


def plan(gpus: Iterable[GpuState], cuts: Mapping[int, Cut | Placed], force: Collection[str] = ()) -> HostPlan:
    """The smallest plan for every GPU that `cuts` names by index; `force`: containers that it may break."""
    answers = [_planned(gpu, cuts[gpu.index], force) for gpu in gpus if gpu.index in cuts]
    return HostPlan(
        tuple(a for a in answers if isinstance(a, Plan)), tuple(a for a in answers if isinstance(a, LayoutRefusal))
    )


def _planned(gpu: GpuState, wanted: Cut | Placed, force: Collection[str]) -> Plan | LayoutRefusal:
    return plan_placed(gpu, wanted, force) if isinstance(wanted, Placed) else plan_gpu(gpu, wanted, force)


def plan_gpu(gpu: GpuState, cut: Cut, force: Collection[str] = ()) -> Plan | LayoutRefusal:
    """The smallest plan for one GPU, or why there is none."""
    refusal = _unable(gpu, cut) or _mode_refused(gpu, cut, force)
    if refusal:
        return refusal
    free = [i for i in _known(gpu) if not _protected(i, force)]
    staying = [i for i in _known(gpu) if _protected(i, force)]
    if not cut.enabled:
        staying = [i for i in staying if i.profile != FULL]
        return _in_the_way(gpu, cut, staying) if staying else _steps(gpu, cut, ())
    found = _best(_Search(gpu.table, cut.counts, staying, free))
    return _steps(gpu, cut, found) if found is not None else _refused(gpu, cut, force)


def plan_placed(gpu: GpuState, layout: Placed, force: Collection[str] = ()) -> Plan | LayoutRefusal:
    """The plan that makes the GPU exactly this, or why there is none: what is there in its place stays,
    everything else goes. An instance in use that the layout does not have is never in the plan."""
    refusal = _unable(gpu, layout.cut) or _misplaced(gpu, layout) or _mode_refused(gpu, layout, force)
    if refusal:
        return refusal
    wanted = layout.instances if layout.enabled else ((FULL, 0),)
    outside = [i for i in _known(gpu) if _protected(i, force) and not (i.whole and i.key in wanted)]
    return _in_the_way(gpu, layout, outside) if outside else _steps(gpu, layout.cut, layout.instances)


def possible(table: Table, instances: Iterable[Instance]) -> dict[str, tuple[int, ...]]:
    """Profiles that could be cut now beside these instances, and where; those that do not fit are absent."""
    there = tuple(instances)
    taken = _union(mask(i.start, i.size) for i in there)
    count = Counter(i.profile for i in there)
    media = any("+me" in i.profile for i in there)
    found = {}
    for profile in table.profiles:
        starts = tuple(start for start, bits in profile.masks if not bits & taken)
        if starts and count[profile.name] < profile.most and not (media and profile.media):
            found[profile.name] = starts
    return found


def mask(start: int, size: int) -> int:
    """Memory slices as bits."""
    return ((1 << size) - 1) << start


def free_run(table: Table, taken: int) -> int:
    """The longest run of free slices (of `Table.usable`), in slices."""
    free, length = table.usable & ~taken, 0
    while free:
        free &= free >> 1
        length += 1
    return length


def room(table: Table, taken: int) -> int:
    """What could still be asked for: the compute slices of every placement that is free, added up."""
    return sum(p.slices for p in table.profiles for _, bits in p.masks if not bits & taken)


# --- the search


class _Search:
    """Every way to place the wanted profiles around the instances that must stay.

    `staying` take part as they are; each of `free` is worth `worth(instance)` where it can stay too.
    `found` are the ways of most worth, each with its taken slices and its (profile, start)s.
    """

    def __init__(
        self,
        table: Table,
        wanted: Mapping[str, int],
        staying: Sequence[Instance],
        free: Sequence[Instance],
    ) -> None:
        self.table = table
        self.fixed = tuple(i.key for i in staying)
        self.found: list[tuple[int, tuple[tuple[str, int], ...]]] = []
        self._gain = {i.key: _IN_USE * bool(i.holders) + i.there for i in free if i.whole}
        self._most = 0
        rest = Counter(wanted)
        rest.subtract(i.profile for i in staying)
        taken = _union(mask(i.start, i.size) for i in staying)
        apart = taken.bit_count() == sum(i.size for i in staying)  # else one is missing where another is in use
        if apart and all(i.whole for i in staying) and min(rest.values(), default=0) >= 0:
            self._items = self._largest_first(rest)
            self._hope = self._hopes()
            self._place(0, 0, taken, 0, [])

    def _largest_first(self, counts: Mapping[str, int]) -> list[Profile]:
        """The profiles to place, one by one, those with the fewest ways first."""
        chosen = (self.table.by_name[name] for name, count in counts.items() for _ in range(count))
        return sorted(chosen, key=lambda p: (-p.size, len(p.starts), p.name))

    def _hopes(self) -> list[int]:
        """The most that the profiles from each position on may yet be worth: any of them may be the one
        that stays, so the last of five counts for as much as the first."""
        gains: dict[str, list[int]] = {}
        for (name, _), gain in sorted(self._gain.items(), key=lambda item: -item[1]):
            gains.setdefault(name, []).append(gain)
        hopes, left = [0], Counter[str]()
        for profile in reversed(self._items):
            left[profile.name] += 1
            hopes.append(sum(sum(gains.get(name, ())[:count]) for name, count in left.items()))
        return hopes[::-1]

    def _place(self, item: int, first: int, taken: int, gain: int, chosen: list[tuple[str, int]]) -> None:
        """Place the profiles from `item` on, the next one at its placement number `first` or later."""
        if gain + self._hope[item] < self._most:
            return
        if item == len(self._items):
            if gain > self._most:
                self._most = gain
                self.found.clear()
            self.found.append((taken, tuple(chosen)))
            return
        profile = self._items[item]
        again = item + 1 < len(self._items) and self._items[item + 1] is profile  # equal ones from left to right
        for number in range(first, len(profile.masks)):
            start, bits = profile.masks[number]
            if not bits & taken:
                key = (profile.name, start)
                chosen.append(key)
                self._place(item + 1, number + 1 if again else 0, taken | bits, gain + self._gain.get(key, 0), chosen)
                chosen.pop()


_Layout = tuple[tuple[str, int], ...]  # (profile, start) of every instance


def _best(search: _Search, prefer: Callable[[_Layout], datetime] | None = None) -> _Layout | None:
    """The layout that leaves most, of those of most worth; None where nothing fits.

    `prefer` comes before that: the earliest counts.
    """
    ranked = [
        (prefer((*search.fixed, *layout)) if prefer else _NEVER, -free_run(search.table, taken), taken, layout)
        for taken, layout in search.found
    ]
    if not ranked:
        return None
    best = min((wait, run) for wait, run, _, _ in ranked)
    equal = [(taken, layout) for wait, run, taken, layout in ranked if (wait, run) == best]
    _, _, layout = min((-room(search.table, taken), layout, layout) for taken, layout in equal)
    return (*search.fixed, *layout)


# --- the answer


def _known(gpu: GpuState) -> tuple[Instance, ...]:
    """What counts: the instances that are there, and those that somebody has and are missing."""
    return (*gpu.instances, *gpu.missing)


def _protected(instance: Instance, force: Collection[str]) -> bool:
    return any(not (h.container and h.container in force) for h in instance.holders)


def _steps(gpu: GpuState, cut: Cut, layout: _Layout) -> Plan:
    there = {i.key: i for i in gpu.instances if i.whole}
    stays = {key: there[key] for key in layout if key in there}
    goes = [i for i in gpu.instances if stays.get(i.key) is not i]
    new = [key for key in layout if key not in stays]
    size = {name: p.size for name, p in gpu.table.by_name.items()}
    steps = [Step(gpu.index, DESTROY, i.profile, i.placement, i.uuid, i.flaw) for i in sorted(goes, key=_place_of)]
    if cut.enabled != gpu.mig or gpu.mode_pending:
        steps.append(Step(gpu.index, ENABLE if cut.enabled else DISABLE))
    steps += [Step(gpu.index, KEEP, i.profile, i.placement, i.uuid) for i in sorted(stays.values(), key=_place_of)]
    for name, start in sorted(new, key=lambda key: (-size[key[0]], key[1])):
        steps.append(Step(gpu.index, CREATE, name, (start, size[name])))
    wanted = layout if cut.enabled else ((FULL, 0),)
    lost = [i for i in gpu.missing if i.key not in wanted]
    return Plan(gpu.index, tuple(steps), tuple(i for i in (*goes, *lost) if i.holders))


def _place_of(instance: Instance) -> tuple[int, int]:
    return instance.start, instance.id


def _unable(gpu: GpuState, cut: Cut) -> LayoutRefusal | None:
    """What no instance in use has to do with: the GPU, its profiles, their numbers."""
    if gpu.health == "lost":
        return LayoutRefusal("gpu_unhealthy", f"GPU {gpu.index} is lost: its layout cannot be changed.", gpu=gpu.index)
    if not cut.enabled:
        return None
    who = f"GPU {gpu.index} ({gpu.name})"
    if not gpu.capable:
        return LayoutRefusal("profile_not_available", f"{who} has no MIG.", gpu=gpu.index)
    unknown = [name for name in cut.counts if name not in gpu.table.by_name]
    if unknown:
        return _unknown(gpu, who, unknown[0])
    return _untold(gpu, who, cut) or _too_many(gpu, who, cut)


def _untold(gpu: GpuState, who: str, cut: Cut) -> LayoutRefusal | None:
    """A GPU tells where its profiles may be only while its MIG mode is on."""
    untold = [name for name in cut.counts if not gpu.table.by_name[name].starts]
    if not untold:
        return None
    message = f"{who} does not tell where {untold[0]} could be placed{'' if gpu.mig else ' while its MIG mode is off'}."
    hint = (
        ""
        if gpu.mig
        else f"Switch it on first, without instances: ds01 mig apply --gpu {gpu.index}= (in a play: gpus)."
    )
    return LayoutRefusal("layout_impossible", message, hint, gpu=gpu.index)


def _unknown(gpu: GpuState, who: str, name: str) -> LayoutRefusal:
    known = gpu.table.by_name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else ""
    has = f"it has {', '.join(known)}" if known else "it tells its profiles only while MIG is on"
    return LayoutRefusal("profile_not_available", f"{who} has no profile {name}; {has}.", hint, gpu=gpu.index)


def _too_many(gpu: GpuState, who: str, cut: Cut) -> LayoutRefusal | None:
    known = gpu.table.by_name
    problem = ""
    for name, count in cut.counts.items():
        if count > known[name].most:
            problem = f"{who} takes at most {known[name].most} x {name}; {count} were asked for."
    media = [name for name in cut.profiles if known[name].media]
    if len(media) > 1:
        problem = f"{who} has one set of media engines, and {' and '.join(media)} would each take it."
    return LayoutRefusal("layout_impossible", problem, gpu=gpu.index) if problem else None


def _misplaced(gpu: GpuState, layout: Placed) -> LayoutRefusal | None:
    """Instances where the GPU cannot have them, by themselves or beside each other."""
    if not layout.enabled:
        return None
    who, taken = f"GPU {gpu.index} ({gpu.name})", 0
    for name, start in layout.instances:
        profile = gpu.table.by_name[name]
        if start not in profile.starts:
            can = f"it can start at {', '.join(map(str, profile.starts))}."
            return LayoutRefusal("layout_impossible", f"{who} has no {name} at {start}; {can}", gpu=gpu.index)
        bits = mask(start, profile.size)
        if bits & taken:
            message = f"{who} has no room for {layout} together: {name} at {start} overlaps another one."
            return LayoutRefusal("layout_impossible", message, gpu=gpu.index)
        taken |= bits
    return None


def _mode_refused(gpu: GpuState, wanted: Cut | Placed, force: Collection[str]) -> LayoutRefusal | None:
    """A mode changes only on a GPU that nobody uses as a whole."""
    using = [h for h in gpu.holders if not (h.container and h.container in force)]
    if not using or (wanted.enabled == gpu.mig and not gpu.mode_pending):
        return None
    return _blocked(gpu, wanted, [("the GPU itself", h) for h in using])


def _refused(gpu: GpuState, cut: Cut, force: Collection[str]) -> LayoutRefusal:
    """Why nothing fits: the profiles themselves, or else the fewest instances in use that are in the way,
    of equally many those that are over first."""
    used = [i for i in _known(gpu) if _protected(i, force)]

    def over(layout: _Layout) -> datetime:
        return max((_end(i) for i in used if i.key not in layout), default=_NEVER)

    # For this question nobody must stay, and a forced instance is worth no more than a free one.
    unforced = [i if _protected(i, force) else replace(i, holders=()) for i in _known(gpu)]
    found = _best(_Search(gpu.table, cut.counts, (), unforced), over)
    if found is None:
        message = f"GPU {gpu.index} ({gpu.name}) has no room for {cut} together."
        return LayoutRefusal("layout_impossible", message, "What fits beside what: ds01 mig list", gpu=gpu.index)
    return _in_the_way(gpu, cut, [i for i in used if not (i.whole and i.key in found)])


def _end(instance: Instance) -> datetime:
    return max((h.until or _NEVER for h in instance.holders), default=_NEVER)


def _in_the_way(gpu: GpuState, wanted: Cut | Placed, instances: Sequence[Instance]) -> LayoutRefusal:
    places = [(_named(i), h) for i in sorted(instances, key=_place_of) for h in i.holders]
    return _blocked(gpu, wanted, places)


def _named(instance: Instance) -> str:
    name = "the whole GPU" if instance.profile == FULL else f"{instance.profile} at {span(*instance.placement)}"
    return name if instance.there else f"{name} (missing now)"


def _blocked(gpu: GpuState, wanted: Cut | Placed, places: Sequence[tuple[str, Holder]]) -> LayoutRefusal:
    holders = tuple(dict.fromkeys(h for _, h in places))
    ends = [h.until for h in holders]
    used = "; ".join(f"{place} is in use by {h}" for place, h in places)
    return LayoutRefusal(
        "layout_in_use",
        f"GPU {gpu.index} cannot become {wanted}: {used}.",
        available_at=max(e for e in ends if e) if all(ends) else None,
        retry=True,
        gpu=gpu.index,
        blocked_by=holders,
    )


def _union(masks: Iterable[int]) -> int:
    taken = 0
    for bits in masks:
        taken |= bits
    return taken
