"""Who may have what: the limits file's meaning. Pure.

`parse_config` turns the (already schema-checked) document into a typed `Config`; `resolve` layers
it key by key for one user: defaults < group < user override. An overridden user keeps the group's
other values and its name. `None` is unlimited, 0 is zero, and an absent key is the next lower
layer's value: three different things everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from functools import cached_property
from typing import Any

from . import names, units
from .enforcement import Enforcement, Exemption, RawLayer, finite, parse_exemptions, parse_layer
from .errors import Ds01Error
from .model import Device

NO_LIMIT = {"CPUQuota": "", "MemoryMax": "infinity", "MemoryHigh": "infinity", "TasksMax": "infinity"}
"""How systemd is told that a slice's property is unlimited."""


@dataclass(frozen=True)
class Aggregate:
    """What all containers of one user may use together: the properties of the user's slice.

    systemd's own forms; None sets no limit.
    """

    cpu_quota: str | None = None
    memory_max: str | None = None
    memory_high: str | None = None
    tasks_max: int | None = None

    def properties(self) -> dict[str, str]:
        """systemd unit properties, in a fixed order."""
        pairs = {
            "CPUQuota": self.cpu_quota,
            "MemoryMax": self.memory_max,
            "MemoryHigh": self.memory_high,
            "TasksMax": self.tasks_max,
        }
        return {key: str(value) for key, value in pairs.items() if value is not None}


@dataclass(frozen=True)
class Limits:
    """One user's resolved limits. Sizes stay as written (`64g`); None is unlimited."""

    user: str
    group: str
    max_gpus: int | None
    max_gpus_per_container: int | None
    max_gpu_equivalents: Fraction | None
    allow_full_gpu: bool
    max_cpus: Fraction | None
    memory: str | None
    memory_swap: str | None
    shm_size: str | None
    pids_limit: int | None
    max_containers_per_user: int | None
    idle_timeout: timedelta | None
    max_runtime: timedelta | None
    gpu_hold_after_stop: timedelta | None
    container_hold_after_stop: timedelta | None
    priority: int
    aggregate: Aggregate

    @property
    def slice(self) -> str:
        return names.user_slice(self.group, self.user)

    def docker_args(self) -> list[str]:
        """The limits as `docker create` flags; a limit that is null has no flag."""
        flags = {
            "cpus": number_text(self.max_cpus) if self.max_cpus is not None else None,
            "memory": self.memory,
            "memory-swap": self.memory_swap,
            "shm-size": self.shm_size,
            "pids-limit": self.pids_limit,
            "cgroup-parent": self.slice,
        }
        return [f"--{name}={value}" for name, value in flags.items() if value is not None]


@dataclass(frozen=True)
class Reservation:
    """Devices booked for one user for a time window (start inclusive, end exclusive).

    `devices` are ids or UUIDs; a booked GPU books its MIG devices too.
    """

    user: str
    devices: tuple[str, ...]
    start: datetime
    end: datetime
    reason: str = ""

    def covers(self, when: datetime) -> bool:
        return self.start <= when < self.end

    def names(self, device: Device) -> bool:
        return not {device.id, str(device.index[0]), device.uuid, device.gpu_uuid}.isdisjoint(self.devices)

    def meets(self, start: datetime, runtime: timedelta | None) -> bool:
        """Whether a use that begins at `start` and may last `runtime` (None: for ever) runs into it."""
        return start < self.end and (runtime is None or self.start < start + runtime or self.covers(start))


@dataclass(frozen=True)
class Group:
    members: tuple[str, ...]
    layer: RawLayer
    aggregate: RawLayer
    enforcement: RawLayer = field(default_factory=dict)


@dataclass(frozen=True)
class GpuPolicy:
    """How devices are chosen. `mig_profile` is what a request without a profile gets where MIG is on.

    `mig_strategy`: `static` gives what is cut; `dynamic` cuts GPUs anew, where nobody uses them, for a
    request that nothing else can serve.
    """

    strategy: str = "least_allocated"
    enable_mig: bool = True
    mig_profile: str | None = None
    mig_strategy: str = "static"


@dataclass(frozen=True)
class Policies:
    """Rules of the house. `pending_timeout`: how long a grant waits for its container, `created_timeout` how long
    a container that was never started is kept (None: for ever).

    `unmanaged` says what is done about containers and processes that use GPUs without DS01: `report` or `stop`.
    Demand is high where at least `high_demand_threshold` of the devices are allocated (1 is all; None: never).
    `monitoring_containers` are names of containers outside DS01 that may see GPUs without counting as
    their users, such as an exporter of metrics. `mig_services` are systemd units that may be stopped
    while the MIG mode of a GPU changes, and are started again.
    """

    reclaim_holds: str = "lower_priority"
    pending_timeout: timedelta | None = timedelta(minutes=10)
    created_timeout: timedelta | None = timedelta(minutes=30)
    unmanaged: str = "report"
    high_demand_threshold: float | None = 0.8
    monitoring_containers: tuple[str, ...] = ()
    mig_services: tuple[str, ...] = ()


@dataclass(frozen=True)
class EventFiles:
    """The audit log's files: set aside from `rotate_at` bytes on, `keep` older ones stay."""

    rotate_at: int = 16 * 1024**2
    keep: int = 8


@dataclass(frozen=True)
class MetricsFiles:
    """Directories that other programs read: node_exporter's for text files, and dcgm-exporter's for its
    job mapping. None: nothing is written."""

    textfile_directory: str | None = None
    job_mapping_directory: str | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.textfile_directory or self.job_mapping_directory)


@dataclass(frozen=True)
class ContainerDefaults:
    """What every container gets at its first start, whatever its image.

    `workspace` may use {user}, {home} and {project}; `allowed_mounts` are host directories that a
    request may mount besides the workspace.
    """

    shell: str = "/bin/bash"
    sudo: bool = False
    workspace: str = "{home}/workspace"
    aliases: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    allowed_mounts: tuple[str, ...] = ()
    allow_host_network: bool = False


@dataclass(frozen=True)
class Config:
    defaults: RawLayer
    default_group: str
    groups: Mapping[str, Group]
    overrides: Mapping[str, RawLayer]
    override_aggregates: Mapping[str, RawLayer]
    reservations: tuple[Reservation, ...]
    gpu: GpuPolicy
    policies: Policies
    containers: ContainerDefaults
    events: EventFiles = EventFiles()
    metrics: MetricsFiles = MetricsFiles()
    enforcement: RawLayer = field(default_factory=dict)
    override_enforcement: Mapping[str, RawLayer] = field(default_factory=dict)
    exemptions: tuple[Exemption, ...] = ()
    written: Mapping[str, str] = field(default_factory=dict)
    """Where the file uses an old name: `defaults.max_gpus` -> `defaults.max_mig_instances`."""

    @property
    def all_groups(self) -> tuple[str, ...]:
        """The groups that somebody may be in: the file's, and the default group, which needs no entry."""
        return tuple(dict.fromkeys([*self.groups, self.default_group]))

    @cached_property
    def _groups_by_member(self) -> Mapping[str, str]:
        by_member: dict[str, str] = {}
        for name, group in self.groups.items():
            for member in group.members:
                by_member.setdefault(member, name)
        return by_member

    def group_of(self, user: str) -> str:
        """The first group in the file's order that lists the user, else the default group."""
        return self._groups_by_member.get(user, self.default_group)

    def layers_of(self, user: str) -> tuple[RawLayer, ...]:
        """The user's layers, the one that counts most last."""
        group = self.groups.get(self.group_of(user))
        return self.defaults, group.layer if group else {}, self.overrides.get(user, {})

    def enforcement_of(self, user: str) -> Enforcement:
        """How the user's idle and runtime limits are enforced, layered key by key."""
        group = self.groups.get(self.group_of(user))
        own = self.override_enforcement.get(user, {})
        return Enforcement(**{**self.enforcement, **(group.enforcement if group else {}), **own})


# What a key means that no layer sets: the most careful value, never "unlimited".
_BUILTIN: RawLayer = {
    "max_gpus": 1,
    "max_gpus_per_container": 1,
    "max_gpu_equivalents": None,
    "allow_full_gpu": False,
    "max_cpus": 8,
    "memory": "32g",
    "shm_size": "16g",
    "pids_limit": 4096,
    "max_containers_per_user": 3,
    "idle_timeout": "48h",
    "max_runtime": "168h",
    "gpu_hold_after_stop": "24h",
    "container_hold_after_stop": "12h",
    "priority": 10,
}

_ALIASES = {
    "max_mig_instances": "max_gpus",
    "max_gpus_per_user": "max_gpus",
    "max_mig_per_container": "max_gpus_per_container",
    "max_gpu_slots_per_container": "max_gpus_per_container",
    "max_gpu_slots": "max_gpu_equivalents",
    "cpus": "max_cpus",
}

_DURATIONS = ("idle_timeout", "max_runtime", "gpu_hold_after_stop", "container_hold_after_stop")
_SUFFIXES = {f"{key}_{unit}": (key, unit) for key in _DURATIONS for unit in "hms"}
_NOT_LIMITS = {
    "members", "aggregate", "policies", "reservation_start", "reservation_end", "reserved_gpus", "reason",
}  # fmt: skip


def number_text(value: Fraction) -> str:
    """`16`, `0.5`, `2/7`: a fraction as people write numbers."""
    if value.denominator == 1:
        return str(value.numerator)
    return str(float(value)) if Fraction(str(float(value))) == value else str(value)


def _bad(path: str, problem: str) -> Ds01Error:
    return Ds01Error("config_invalid", f"{path}: {problem}.")


def _layer(raw: RawLayer | None, path: str) -> RawLayer:
    """A layer under its canonical keys; the same limit under two names is an error."""
    layer: dict[str, Any] = {}
    for key, value in (raw or {}).items():
        if key in _NOT_LIMITS:
            continue
        name = _ALIASES.get(key, key)
        if key in _SUFFIXES:
            name, unit = _SUFFIXES[key]
            value = None if value is None else f"{value}{unit}"  # noqa: PLW2901 - the key names its unit
        if name in layer:
            raise _bad(f"{path}.{key}", f"{name} is set twice, under an old name and a new one")
        layer[name] = _checked(name, value, f"{path}.{key}")
    if "memory" in layer:
        # Set beside a memory limit, swap goes with it; a lower layer's swap would contradict it.
        layer.setdefault("memory_swap", layer["memory"])
    return layer


def _written(layers: Mapping[str, RawLayer | None]) -> dict[str, str]:
    """Each limit under an old name: its path under the name that counts -> its path in the file."""
    return {
        f"{place}.{_ALIASES.get(key) or _SUFFIXES[key][0]}": f"{place}.{key}"
        for place, raw in layers.items()
        for key in raw or {}
        if key in _ALIASES or key in _SUFFIXES
    }


def _checked(name: str, value: Any, path: str) -> Any:
    """The value with its type made exact; a ValueError becomes an error that names the path."""
    if value is None:
        return None
    try:
        return _CONVERT.get(name, lambda v: v)(value)
    except (ValueError, ZeroDivisionError) as exc:
        raise _bad(path, str(exc)) from None


def _count(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _fraction(value: Any) -> Fraction:
    try:
        return Fraction(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None


def _above_zero(value: Any) -> Any:
    """To Docker 0 is "no limit": what cannot be none must not become everything."""
    if not value:
        raise ValueError("0 would mean no limit to Docker; write null for unlimited, or more than 0")
    return value


def _some_time(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("0 would take devices back from containers that are just being made; write null for never")
    return value


def _some_size(value: int) -> int:
    if not value:
        raise ValueError("0 would set the log aside for every event")
    return value


def _size_text(value: str) -> str:
    _above_zero(units.parse_size(value))
    return value


_CONVERT: dict[str, Callable[[Any], Any]] = {
    **{key: lambda v: units.parse_duration(str(v)) for key in _DURATIONS},
    "pending_timeout": lambda v: _some_time(units.parse_duration(str(v))),
    "created_timeout": lambda v: _some_time(units.parse_duration(str(v))),
    "high_demand_threshold": finite,
    "max_gpu_equivalents": _fraction,
    "max_cpus": lambda v: _above_zero(_fraction(v)),
    "pids_limit": lambda v: _above_zero(_count(v)),
    **dict.fromkeys(("max_gpus", "max_gpus_per_container", "max_containers_per_user", "priority"), _count),
    "memory": _size_text,
    "memory_swap": _size_text,
    "shm_size": _size_text,
    "rotate_at": lambda v: _some_size(units.parse_size(v)),
}


def _reservation(user: str, raw: RawLayer, path: str) -> Reservation | None:
    if not raw.get("reserved_gpus"):
        return None
    try:
        start, end = units.parse_time(raw["reservation_start"]), units.parse_time(raw["reservation_end"])
    except KeyError as exc:
        raise _bad(path, f"reserved_gpus needs {exc.args[0]} as well") from None
    except ValueError as exc:
        raise _bad(path, f"a reservation time cannot be read: {exc}") from None
    if end <= start:
        raise _bad(path, "reservation_end must be later than reservation_start")
    devices = tuple(str(d).replace(".", ":") for d in raw["reserved_gpus"])
    return Reservation(user, devices, start, end, str(raw.get("reason") or ""))


def _given_aggregate(raw: RawLayer | None, path: str) -> RawLayer:
    """What the file says of a slice; a limit of 0 would stop every process in it."""
    given = (raw or {}).get("aggregate") or {}
    for key, value in given.items():
        if value is not None and Fraction(re.sub(r"[^0-9./]", "", str(value))) == 0:
            raise _bad(f"{path}.aggregate.{key}", "0 would stop everything in the slice; write null for unlimited")
    return given


def _container_defaults(raw: RawLayer) -> ContainerDefaults:
    given = {key: value for key, value in raw.items() if value is not None}
    if "allowed_mounts" in given:
        given["allowed_mounts"] = tuple(given["allowed_mounts"])
    return ContainerDefaults(**given)


def _event_files(raw: RawLayer) -> EventFiles:
    known = dict(raw)
    if "rotate_at" in known:
        known["rotate_at"] = _checked("rotate_at", known["rotate_at"], "events.rotate_at")
    return EventFiles(**known)


_OLD_POLICIES = {f"created_{name}_{unit}": unit for name in ("timeout", "container_timeout") for unit in "hms"}
_OLD_POLICIES["created_container_timeout"] = ""


def _policies(raw: RawLayer) -> Policies:
    known: dict[str, Any] = {}
    for key, value in raw.items():
        name = "created_timeout" if key in _OLD_POLICIES else key
        if name not in Policies.__dataclass_fields__:
            continue  # how limits are enforced, which groups and users may change
        if name in known:
            raise _bad(f"policies.{key}", f"{name} is set twice, under an old name and a new one")
        unit = _OLD_POLICIES.get(key)
        known[name] = _checked(name, f"{value}{unit}" if unit and value is not None else value, f"policies.{key}")
    for key in ("monitoring_containers", "mig_services"):
        known[key] = tuple(known.get(key) or ())
    return Policies(**known)


def parse_config(document: Mapping[str, Any], members: Mapping[str, tuple[str, ...]] | None = None) -> Config:
    """The typed configuration of a document that the schema accepts.

    `members` are further members by group (from `groups/<group>.members` files). Every section may
    be null. Raises Ds01Error `config_invalid` with the path of what is wrong.
    """
    groups: Mapping[str, RawLayer | None] = document.get("groups") or {}
    overrides: Mapping[str, RawLayer | None] = document.get("user_overrides") or {}
    extra = members or {}
    unknown = sorted(set(extra) - set(groups))
    if unknown:
        raise _bad(f"groups/{unknown[0]}.members", f"there is no group {unknown[0]!r} in the limits file")
    reservations = (_reservation(u, raw or {}, f"user_overrides.{u}") for u, raw in overrides.items())
    defaults = dict(_layer(_BUILTIN, "built-in"))
    defaults.update(_layer(document.get("defaults"), "defaults"))
    gpu = document.get("gpu_allocation") or {}
    return Config(
        defaults=defaults,
        default_group=document.get("default_group") or "student",
        groups={
            name: Group(
                members=(*((raw or {}).get("members") or ()), *extra.get(name, ())),
                layer=_layer(raw, f"groups.{name}"),
                aggregate=_given_aggregate(raw, f"groups.{name}"),
                enforcement=parse_layer((raw or {}).get("policies"), f"groups.{name}.policies"),
            )
            for name, raw in groups.items()
        },
        overrides={user: _layer(raw, f"user_overrides.{user}") for user, raw in overrides.items()},
        override_aggregates={user: _given_aggregate(raw, f"user_overrides.{user}") for user, raw in overrides.items()},
        reservations=tuple(r for r in reservations if r),
        gpu=GpuPolicy(**{k: v for k, v in gpu.items() if k in GpuPolicy.__dataclass_fields__}),
        policies=_policies(document.get("policies") or {}),
        enforcement=parse_layer(document.get("policies"), "policies"),
        override_enforcement={
            user: parse_layer((raw or {}).get("policies"), f"user_overrides.{user}.policies")
            for user, raw in overrides.items()
        },
        exemptions=parse_exemptions(document.get("exemptions")),
        containers=_container_defaults(document.get("containers") or {}),
        events=_event_files(document.get("events") or {}),
        metrics=MetricsFiles(**(document.get("metrics") or {})),
        written=_written(
            {
                "defaults": document.get("defaults"),
                **{f"groups.{name}": raw for name, raw in groups.items()},
                **{f"user_overrides.{user}": raw for user, raw in overrides.items()},
            }
        ),
    )


def _aggregate(layer: RawLayer, explicit: RawLayer) -> Aggregate:
    """The slice's limits: what the file says, else one container's limit times their number."""
    count = layer["max_containers_per_user"]

    def times(key: str, scale: Callable[[Any, int], Any]) -> Any:
        # A user who may have no container has no use for a slice; a limit of 0 would be none.
        return None if count is None or layer[key] is None else scale(layer[key], max(count, 1))

    computed = {
        "cpu_quota": times("max_cpus", lambda v, n: f"{number_text(Fraction(int(v * n * 10000), 100))}%"),
        "memory_max": times("memory", lambda v, n: units.format_size(units.parse_size(v) * n)),
        "tasks_max": times("pids_limit", lambda v, n: v * n),
    }
    given = (key for key in ("memory_max", "memory_high") if explicit.get(key))
    sizes = {key: units.format_size(units.parse_size(explicit[key])) for key in given}
    merged = {**computed, **explicit, **sizes}
    return Aggregate(**{k: v for k, v in merged.items() if k in Aggregate.__dataclass_fields__})


def resolve(config: Config, user: str) -> Limits:
    """One user's limits, layered key by key."""
    return _resolved(config, config.group_of(user), user, f"limits of {user}")


def resolve_all(config: Config) -> None:
    """Make sure that every group's and every override's limits fit together, whoever is in it.

    Raises Ds01Error `config_invalid` with their place in the file.
    """
    for group in config.all_groups:
        _resolved(config, group, "", f"groups.{group}" if group in config.groups else "defaults")
    for user in config.overrides:
        _resolved(config, config.group_of(user), user, f"user_overrides.{user}")


def _resolved(config: Config, group: str, user: str, where: str) -> Limits:
    known = config.groups.get(group)
    layer = {**config.defaults, **(known.layer if known else {}), **config.overrides.get(user, {})}
    explicit = {**(known.aggregate if known else {}), **config.override_aggregates.get(user, {})}
    resolved = Limits(user=user, group=group, aggregate=_aggregate(layer, explicit), **layer)
    check_consistent(resolved, where)
    return resolved


def gpu_hold(config: Config, user: str) -> timedelta | None:
    """How long the user's stopped containers keep their devices: that one of `resolve`'s values.

    Asked for every held allocation in every decision, so it does not resolve all the others.
    """
    return next(x["gpu_hold_after_stop"] for x in reversed(config.layers_of(user)) if "gpu_hold_after_stop" in x)


def check_consistent(limits: Limits, where: str) -> None:
    """Limits that contradict each other would fail at the engine, or limit nothing.

    Raises Ds01Error `config_invalid` with `where` they stand.
    """
    for low, low_name, high, high_name in (
        (limits.memory, "memory", limits.memory_swap, "memory_swap (memory and swap together)"),
        (limits.aggregate.memory_high, "memory_high", limits.aggregate.memory_max, "memory_max"),
    ):
        if low and high and units.parse_size(low) > units.parse_size(high):
            raise _bad(where, f"{low_name} is {low}, more than {high_name}, which is {high}")


def group_aggregate(config: Config, group: str) -> Aggregate:
    """What the slice of a user of this group gets, where no override says otherwise."""
    known = config.groups.get(group)
    layer = {**config.defaults, **(known.layer if known else {})}
    return _aggregate(layer, known.aggregate if known else {})


def slice_dropins(config: Config) -> dict[str, dict[str, str]]:
    """Drop-in directory -> slice properties: one for each group, one for each user who differs.

    systemd applies `ds01-<group>-.slice.d/` to every user slice of the group, so a new user needs
    no file and no daemon-reload.
    """
    dropins = {names.group_dropin_dir(g): group_aggregate(config, g).properties() for g in config.all_groups}
    for user in config.overrides:
        limits = resolve(config, user)
        group = group_aggregate(config, limits.group)
        if limits.aggregate != group:
            # systemd merges both drop-ins: what the group limits and the user does not is lifted.
            lifted = {key: NO_LIMIT[key] for key in group.properties()}
            dropins[f"{limits.slice}.d"] = {**lifted, **limits.aggregate.properties()}
    return dropins


def as_dict(value: Limits) -> dict[str, Any]:
    """Resolved limits as JSON; null is unlimited, sizes and durations as written with their unit."""

    def plain(item: Any) -> Any:
        if isinstance(item, timedelta):
            return units.format_duration(item)
        return number_text(item) if isinstance(item, Fraction) else item

    document = {key: plain(item) for key, item in asdict(value).items()}
    document["max_cpus"] = None if value.max_cpus is None else float(value.max_cpus)
    return {**document, "slice": value.slice, "docker_args": value.docker_args()}
