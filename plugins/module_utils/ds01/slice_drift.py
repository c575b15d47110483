"""The users' slices as they are, against what the limits file says: what reconcile does about it. Pure.

The drop-ins that role ds01_slices writes are what a slice has from its start, and after a boot. This is about the
slices that exist: systemd changes those only when it is asked to, whatever a daemon-reload reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from . import names, units
from .drift import Action
from .limits import NO_LIMIT, Aggregate, Config, number_text, resolve

Amounts = Mapping[str, "Fraction | int | None"]
"""systemd properties of a slice, as numbers: CPUQuota in cores, memory in bytes, TasksMax; None is unlimited. A
property that is not there is one that the host cannot enforce (MemoryHigh with cgroup v1)."""

MAX_TASKS = 4194304
"""The kernel's own limit of processes (PID_MAX_LIMIT): a cgroup takes no larger number."""

_LEAST_CPU = Fraction(1, 1000)
"""Cores: systemd gives a slice no less than 1 ms in each second."""


@dataclass(frozen=True)
class LiveSlice:
    """A slice below ds01.slice, as its cgroups show it.

    `containers` are the ids of those that run in it. `floor` says how low a limit may go now: memory that cannot be
    taken from processes without killing them; with cgroup v1 the largest CPU quota of a container, below which the
    kernel does not go. `page`: bytes that a memory limit is rounded down to.
    """

    name: str
    limits: Amounts
    empty: bool = True
    containers: tuple[str, ...] = ()
    floor: Mapping[str, Fraction | int] = field(default_factory=dict)
    page: int = 4096


@dataclass(frozen=True)
class Scope:
    """A running container, as a daemon-reload finds it. `rules` are the DeviceAllow lines of its scope; None where
    systemd has no scope of it, or none that holds devices."""

    container: str
    gpu: bool
    rules: tuple[str, ...] | None


def amounts(aggregate: Aggregate, page: int = 1) -> Amounts:
    """What the kernel is to enforce, rounded as systemd and the kernel round it."""

    def memory(text: str | None) -> int | None:
        return None if text is None else units.parse_size(text) // page * page

    quota, tasks = aggregate.cpu_quota, aggregate.tasks_max
    return {
        "CPUQuota": None if quota is None else max(Fraction(quota.rstrip("%")) / 100, _LEAST_CPU),
        "MemoryMax": memory(aggregate.memory_max),
        "MemoryHigh": memory(aggregate.memory_high),
        "TasksMax": None if tasks is None or tasks > MAX_TASKS else tasks,
    }


def decide(config: Config, live: Sequence[LiveSlice], users: Collection[str]) -> Iterator[Action]:
    """What to do about the slices, removals first, and what to tell people about them.

    `users` are those who have a container, running or not. Kinds: `slice.removed`, `slice.changed` (its details hold
    the `properties` for `systemd_slices.change`), and to be reported alone `slice.deferred` (a limit cannot go as low
    yet) and `slice.moved` (containers that run in the slice of a group which their user left).
    """
    gone = {found.name for found in live if found.empty and _is_over(found, config, users)}
    parts = Counter(_place(found)[1] for found in live if not found.empty)
    for found in sorted(live, key=_depth, reverse=True):
        _, user = _place(found)
        if found.name in gone and all(other.name in gone for other in live if _is_below(other, found)):
            whose = f"{user} has no container in it" if user else "its group is not in the limits file any more"
            yield Action("slice.removed", found.name, f"The slice {found.name} is removed: {whose}.", user)
        elif user:
            yield from _moved(found, config)
            yield from _changed(found, config, 1 if found.empty else parts[user])


def describe(found: LiveSlice) -> dict[str, Any]:
    """A slice with the limits in force, as results show it."""
    group, user = _place(found)
    limits = {key: _text(key, value) for key, value in found.limits.items()}
    return {"slice": found.name, "group": group, "user": user, "containers": len(found.containers), **limits}


def cut_off(scopes: Sequence[Scope]) -> tuple[str, ...]:
    """The containers that a daemon-reload would cut off from their GPUs: systemd applies a scope's own device rules
    again, and NVIDIA's hook, other than CDI, gave these their devices without telling it."""
    return tuple(scope.container for scope in scopes if scope.gpu and not _keeps_gpus(scope.rules))


def _keeps_gpus(rules: tuple[str, ...] | None) -> bool:
    if not rules:
        return True  # no scope, or one without rules (--privileged): systemd restricts nothing
    return any(_lets_gpus_in(*rule.split()) for rule in rules)


def _lets_gpus_in(device: str, access: str = "rwm") -> bool:
    nvidia = device == "char-*" or device.startswith(("char-nvidia", "/dev/nvidia", "/dev/char/195:"))
    return nvidia and "r" in access and "w" in access


def _place(found: LiveSlice) -> tuple[str, str]:
    """(group, user) of a slice; the user is empty for a group's own."""
    return names.slice_owner(found.name) or ("", "")


def _depth(found: LiveSlice) -> tuple[int, str]:
    return found.name.count("-"), found.name


def _is_below(other: LiveSlice, found: LiveSlice) -> bool:
    return other.name.startswith(f"{found.name.removesuffix('.slice')}-")


def _is_over(found: LiveSlice, config: Config, users: Collection[str]) -> bool:
    group, user = _place(found)
    if not user:
        return bool(group) and group not in config.all_groups
    return user not in users or group != config.group_of(user)


def _moved(found: LiveSlice, config: Config) -> Iterator[Action]:
    group, user = _place(found)
    home = config.group_of(user)
    if group == home or found.empty:
        return
    message = (
        f"{user} is in group {home} now, and {len(found.containers)} container(s) still run in the slice of {group}, "
        f"with {home}'s limits; containers made anew are in {names.user_slice(home, user)}, and as long as both have "
        "some, each has half of these limits."
    )
    details = {"group": home, "container_ids": list(found.containers)}
    yield Action("slice.moved", found.name, message, user, details)


def _changed(found: LiveSlice, config: Config, parts: int) -> Iterator[Action]:
    """A container cannot be moved to another slice while it runs: whichever it is in has its user's limits, divided
    among the `parts` in which something of that user runs."""
    _, user = _place(found)
    aggregate = resolve(config, user).aggregate
    wanted = {
        key: _part(key, value, parts, found.page)
        for key, value in amounts(aggregate, found.page).items()
        if key in found.limits
    }
    wrong = [key for key, value in wanted.items() if not _same(value, found.limits[key])]
    too_low = [key for key in wrong if _is_less(wanted[key], found.floor.get(key))]
    for key in too_low:
        message = (
            f"{key} of {user}'s slice stays {_text(key, found.limits[key])} until it can be {_text(key, wanted[key])}: "
            f"the containers in it now need {_text(key, found.floor[key])}."
        )
        yield Action("slice.deferred", found.name, message, user, {"property": key})
    changes = [key for key in wrong if key not in too_low]
    if changes:
        said = ", ".join(f"{key} {_text(key, found.limits[key])} -> {_text(key, wanted[key])}" for key in changes)
        # All of them, for systemd writes them together, and may have read others than those in force.
        properties = {key: _written(key, found.limits[key] if key in too_low else wanted[key]) for key in wanted}
        yield Action("slice.changed", found.name, f"The slice of {user}: {said}.", user, {"properties": properties})


def _part(key: str, whole: Fraction | int | None, parts: int, page: int) -> Fraction | int | None:
    """One of equal parts of an amount, rounded down as the kernel rounds it."""
    if whole is None or parts == 1:
        return whole
    if isinstance(whole, Fraction):
        return max(whole / parts, _LEAST_CPU)
    part = whole // parts
    return part // page * page if key.startswith("Memory") else max(part, 1)


def _same(wanted: Fraction | int | None, has: Fraction | int | None) -> bool:
    """Whether that is in force: the kernel counts a CPU quota in whole microseconds of a period."""
    if wanted is None or has is None:
        return wanted is has
    return abs(wanted - has) * 1000 <= wanted if isinstance(wanted, Fraction) else wanted == has


def _is_less(value: Fraction | int | None, floor: Fraction | int | None) -> bool:
    return value is not None and floor is not None and value < floor


def _written(key: str, value: Fraction | int | None) -> str:
    """As systemd takes it."""
    if value is None:
        return NO_LIMIT[key]
    return f"{number_text(Fraction(int(value * 10000), 100))}%" if key == "CPUQuota" else str(value)


def _text(key: str, value: Fraction | int | None) -> str:
    if value is None:
        return "unlimited"
    if key.startswith("Memory"):
        return units.format_size(int(value))
    return _written(key, value)
