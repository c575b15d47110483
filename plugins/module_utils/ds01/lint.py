"""What a valid limits file says that cannot be meant, or cannot be had on this server. Pure.

Findings are advice: the file counts all the same. One file may serve several servers, so a quota
beyond this one may be right for another; it is shown because nobody can reach it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Any

from . import names, units
from .errors import Ds01Error
from .limits import Config, RawLayer, Reservation, number_text, resolve
from .model import Device, Inventory

if TYPE_CHECKING:
    from .layouts import Layouts

_QUOTAS = ("max_gpus", "max_gpus_per_container", "max_gpu_equivalents")
_SHOWN = 10
"""Names that one sentence lists; of more it gives the number."""


@dataclass(frozen=True)
class Finding:
    """Something to look at: `path` is its place in the limits file, `message` a sentence for people."""

    path: str
    message: str


@dataclass(frozen=True)
class _Scope:
    """A group or a user: the layers that make the limits, with their places in the file, nearest first."""

    layers: tuple[tuple[str, RawLayer], ...]

    def __getitem__(self, key: str) -> Any:
        return next(layer[key] for _, layer in self.layers if key in layer)

    def depth(self, key: str) -> int:
        """How many layers away the value of `key` stands: 0 is the nearest."""
        return next(i for i, (_, layer) in enumerate(self.layers) if key in layer)

    def place(self, key: str) -> str:
        """Where the value of `key` stands."""
        return f"{self.layers[self.depth(key)][0]}.{key}"


def lint(
    config: Config,
    now: datetime,
    inventory: Inventory | None = None,
    known_user: Callable[[str], bool] | None = None,
) -> tuple[Finding, ...]:
    """Everything to look at, in the file's order of sections.

    Without `inventory` nothing is compared with hardware, without `known_user` (whether this host
    has that login name) nobody is looked up.
    """
    scopes = _scopes(config)
    cut = inventory if inventory and not _cut_for_who_asks(config, inventory) else None
    findings = [
        *(_quotas(scopes, cut) if cut else ()),
        *_contradictions(scopes),
        *_members(config, known_user),
        *_overridden(config, known_user),
        *_reservations(config, now, inventory),
        *_exemptions(config, now, known_user),
        *(_profile(config, cut) if cut else ()),
    ]
    # Found through several groups, it is the same finding; the file may use a limit's old name.
    in_file = (Finding(config.written.get(f.path, f.path), f.message) for f in findings)
    return tuple(dict.fromkeys(in_file))


def lint_layouts(known: Layouts, inventory: Inventory | None = None) -> tuple[Finding, ...]:
    """The layouts that nobody could apply: DS01 cannot make them, or, with `inventory`, GPUs are not there."""
    from . import layouts  # most runs need the limits alone

    indices = [gpu.index for gpu in inventory.gpus] if inventory else None
    return tuple(Finding(place, problem) for place, problem in layouts.findings(known, indices))


def _scopes(config: Config) -> list[_Scope]:
    """Each group, the default group too, and each override: what no scope sees limits nobody."""

    def below(group: str) -> tuple[tuple[str, RawLayer], ...]:
        known = config.groups.get(group)
        return (*([(f"groups.{group}", known.layer)] if known else []), ("defaults", config.defaults))

    groups = [_Scope(below(group)) for group in config.all_groups]
    users = [
        _Scope(((f"user_overrides.{user}", layer), *below(config.group_of(user))))
        for user, layer in config.overrides.items()
    ]
    return groups + users


def _cut_for_who_asks(config: Config, inventory: Inventory) -> bool:
    """Whether other devices, and more of them, can be had than are there now."""
    return config.gpu.mig_strategy == "dynamic" and any(gpu.mig for gpu in inventory.gpus)


def _quotas(scopes: Sequence[_Scope], inventory: Inventory) -> Iterator[Finding]:
    for scope in scopes:
        full = scope["allow_full_gpu"]
        devices = [d for d in inventory.devices if full or not d.is_full]
        there = {**dict.fromkeys(_QUOTAS, len(devices)), "max_gpu_equivalents": _equivalents(devices)}
        for key in _QUOTAS:
            value = scope[key]
            if value is not None and value > there[key]:
                # An inherited quota may be beyond reach only because of what this layer allows.
                nearer = key if scope.depth(key) <= scope.depth("allow_full_gpu") else "allow_full_gpu"
                yield Finding(scope.place(nearer), _beyond(key, value, devices, full, _lost(inventory)))


def _equivalents(devices: Sequence[Device]) -> Fraction:
    return sum((d.equivalents for d in devices), Fraction(0))


def _beyond(key: str, value: int | Fraction, devices: Sequence[Device], full: bool, lost: str) -> str:
    kind = "device" if full else "MIG device"
    there = f"{len(devices) or 'no'} {kind}{'' if len(devices) == 1 else 's'}"
    if key == "max_gpu_equivalents" and devices:
        there += f", {number_text(_equivalents(devices))} GPU-equivalents together"
    why = "" if full else "; allow_full_gpu is false"
    return f"{key} is {number_text(Fraction(value))}, but this server has {there}{lost}{why}."


def _lost(inventory: Inventory) -> str:
    lost = [str(gpu.index) for gpu in inventory.gpus if gpu.health == "lost"]
    return f" (without GPU {', '.join(lost)}, which the driver lost)" if lost else ""


def _contradictions(scopes: Sequence[_Scope]) -> Iterator[Finding]:
    for scope in scopes:
        total, one = scope["max_gpus"], scope["max_gpus_per_container"]
        set_beside_or_above = scope.depth("max_gpus_per_container") <= scope.depth("max_gpus")
        if total and one is not None and one > total and set_beside_or_above:
            message = f"max_gpus_per_container is {one}, but max_gpus, for all of a user's containers, is {total}."
            yield Finding(scope.place("max_gpus_per_container"), message)


def _members(config: Config, known_user: Callable[[str], bool] | None) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for name, group in config.groups.items():
        path = f"groups.{name}.members"
        if not group.members and name != config.default_group:
            yield Finding(path, f"nobody is in this group: list them here or in groups/{name}.members.")
        for member in dict.fromkeys(group.members):
            if member in first:
                yield Finding(path, f"{member} is in {first[member]} too, which stands first in the file and counts.")
            first.setdefault(member, name)
        yield from _names(path, dict.fromkeys(group.members), known_user)


def _names(path: str, users: Iterable[str], known: Callable[[str], bool] | None) -> Iterator[Finding]:
    """Those that cannot be a user's name, and those that are none here."""
    plain = []
    for user in users:
        try:
            plain.append(names.check_user(user))
        except Ds01Error as exc:
            yield Finding(path, str(exc))
    strangers = [user for user in plain if known and not known(user)]
    if strangers:
        more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        yield Finding(path, f"not a login name of this server: {', '.join(strangers[:_SHOWN])}{more}.")


def _overridden(config: Config, known_user: Callable[[str], bool] | None) -> Iterator[Finding]:
    default = config.groups.get(config.default_group)
    members = {member for group in config.groups.values() for member in group.members}
    for user in config.overrides:
        path = f"user_overrides.{user}"
        yield from _names(path, [user], known_user)
        # Elsewhere everybody who is in no group is meant to be in the default group.
        if user not in members and default and default.members:
            yield Finding(path, f"{user} is in no group; {config.default_group}, which counts then, lists its members.")


def _reservations(config: Config, now: datetime, inventory: Inventory | None) -> Iterator[Finding]:
    open_ = [r for r in config.reservations if r.end > now]
    for reservation in config.reservations:
        if reservation not in open_:
            ended = units.format_time(reservation.end)
            yield Finding(_at(reservation, "reservation_end"), f"this reservation ended at {ended} and books nothing.")
        elif inventory:
            yield from _bookable(reservation, config, inventory)
    for one, other in combinations(open_, 2):
        yield from _overlap(one, other, inventory)


def _at(reservation: Reservation, key: str) -> str:
    return f"user_overrides.{reservation.user}.{key}"


def _bookable(reservation: Reservation, config: Config, inventory: Inventory) -> Iterator[Finding]:
    """Whether the user can have what is booked: if not, nobody can."""
    path, user = _at(reservation, "reserved_gpus"), resolve(config, reservation.user)
    gpus = {name for gpu in inventory.gpus for name in (str(gpu.index), gpu.uuid)}
    there = gpus | {name for device in inventory.devices for name in (device.id, device.uuid)}
    missing = [name for name in reservation.devices if name not in there]
    if missing:
        yield Finding(path, f"this server has no {', '.join(missing)}; see: ds01 status.")
    booked = [d for d in inventory.devices if reservation.names(d)]
    whole = [d.id for d in booked if d.is_full and not user.allow_full_gpu]
    if whole:
        yield Finding(path, f"{', '.join(whole)}: {user.user} may not have a whole GPU, and nobody else gets it.")
    elif user.max_gpus is not None and len(booked) > user.max_gpus:
        message = f"{len(booked)} devices are booked, but {user.user} may have {user.max_gpus}; the rest is nobody's."
        yield Finding(path, message)


def _overlap(one: Reservation, other: Reservation, inventory: Inventory | None) -> Iterator[Finding]:
    start, end = max(one.start, other.start), min(one.end, other.end)
    if inventory:
        both = [d.id for d in inventory.devices if one.names(d) and other.names(d)]
    else:
        both = [a if _covers(b, a) else b for a in one.devices for b in other.devices if _covers(a, b) or _covers(b, a)]
    if both and start < end:
        time = f"{units.format_time(start)} to {units.format_time(end)}"
        message = f"{', '.join(both)}: booked for {one.user} as well from {time}; then neither gets it."
        yield Finding(_at(other, "reserved_gpus"), message)


def _covers(booked: str, device: str) -> bool:
    """As far as the names themselves show it: a booked GPU books its MIG devices too."""
    return device == booked or device.partition(":")[0] == booked


def _exemptions(config: Config, now: datetime, known_user: Callable[[str], bool] | None) -> Iterator[Finding]:
    for index, exemption in enumerate(config.exemptions):
        path = f"exemptions.{index}"
        if exemption.problem:
            yield Finding(path, f"this exempts nobody: {exemption.problem}.")
        elif exemption.expires and exemption.expires <= now:
            ended = units.format_time(exemption.expires)
            yield Finding(path, f"this exemption ended at {ended} and exempts nobody.")
        else:
            yield from _names(path, [exemption.user], known_user)


def _profile(config: Config, inventory: Inventory) -> Iterator[Finding]:
    """Whether what a request without a profile gets is there; without MIG it gets a whole GPU."""
    wanted = config.gpu.mig_profile
    if not (wanted and config.gpu.enable_mig and any(gpu.mig for gpu in inventory.gpus)):
        return
    profiles = sorted({d.profile for d in inventory.devices})
    if wanted not in profiles:
        there = ", ".join(profiles) or "no device at all"
        yield Finding("gpu_allocation.mig_profile", f"this server has no {wanted} device; it has: {there}.")
