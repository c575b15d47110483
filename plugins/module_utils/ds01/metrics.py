"""What DS01 tells Prometheus: families of samples, from one look at a host and what was counted so far. Pure.

Labels stay few: users, what lives now (devices, containers with an allocation, who waits), and words of DS01's own.
What is not known is left out: it is neither zero nor what it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from fractions import Fraction

from .limits import Limits
from .model import Device, Inventory, Ledger, Waiter

HEALTH = ("ok", "suspect", "failed", "lost")
STATUSES = ("free", "pending", "active", "held", "occupied", "unhealthy")
"""What a device can be: allocated in one of three ways, used without DS01, or not to be allocated."""
ALLOCATED = ("pending", "active", "held")
_EVENTS = ("allocated", "held", "queued", "rebound", "reclaimed", "refused", "released")
_REASONS = (
    "already_allocated", "container_limit", "full_gpu_not_allowed", "gpu_unhealthy", "no_gpu_available",
    "profile_not_available", "reserved", "user_at_limit",
)  # fmt: skip
_WORD = re.compile(r"[a-z][a-z0-9_.]{0,63}")
_MOST_WORDS = 100
_OTHER = "other"
LONGEST_GAP = timedelta(minutes=10)
"""What nobody looked at for longer is not counted as allocated: the server was off, or its clock was set."""


@dataclass(frozen=True)
class Family:
    """A metric: its samples by labels. A counter's name ends in `_total`."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]

    def record(self) -> dict[str, object]:
        """The metric as JSON (`ds01 metrics --json`)."""
        samples = [{"labels": dict(labels), "value": value} for labels, value in self.samples]
        return {"name": self.name, "type": self.kind, "help": self.help, "samples": samples}


@dataclass(frozen=True)
class Run:
    """A run of reconcile: when it ended, how many seconds it took, and whether all of it could be done."""

    ended_at: datetime
    seconds: float
    ok: bool


@dataclass(frozen=True)
class Totals:
    """What was counted since the beginning: events by name, refusals by reason, and up to `counted_until`
    device-seconds by user and status of the allocation, and by user those of running containers that used nothing
    (`idle`); the last run of reconcile, and when one was last all right."""

    events: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    idle: Mapping[str, float] = field(default_factory=dict)
    counted_until: datetime | None = None
    last_run: Run | None = None
    last_success: datetime | None = None


@dataclass(frozen=True)
class Picture:
    """One look at a host. None is not known: a ledger that cannot be read, devices where the driver does not
    answer, containers where no engine was asked.

    `occupied` says by device UUID who uses it; `instances` are the GPU instances of MIG devices by UUID,
    `hold_ends` when holds end by container, `idle` how long running containers have shown no use of their devices,
    `containers` how many DS01 containers each user has, `limits` those of everybody who has something, `available`
    which parts of the host answer.
    """

    now: datetime
    ledger: Ledger | None = None
    inventory: Inventory | None = None
    occupied: Mapping[str, str] = field(default_factory=dict)
    instances: Mapping[str, int] | None = None
    queue: Sequence[Waiter] = ()
    hold_ends: Mapping[str, datetime] = field(default_factory=dict)
    idle: Mapping[str, timedelta] = field(default_factory=dict)
    containers: Mapping[str, int] | None = None
    limits: Mapping[str, Limits] = field(default_factory=dict)
    available: Mapping[str, bool] = field(default_factory=dict)


def with_events(totals: Totals, events: Iterable[Mapping[str, object]]) -> Totals:
    """The totals with these events counted."""
    names, reasons = Counter(totals.events), Counter(totals.refusals)
    for event in events:
        name = _word(event.get("event"), names)
        names[name] += 1
        if name == "gpu.refused":
            reasons[_word(event.get("reason"), reasons)] += 1
    return replace(totals, events=dict(names), refusals=dict(reasons))


def with_time(totals: Totals, ledger: Ledger, idle: Mapping[str, timedelta], now: datetime) -> Totals:
    """The totals with the time since the last look counted for what is allocated now, and of that what running
    containers were `idle`."""
    seconds, unused = dict(totals.seconds), dict(totals.idle)
    for allocation in ledger.allocations.values():
        begun = allocation.stopped_at or allocation.pending_since or allocation.allocated_at
        start = max(begun, totals.counted_until or now, now - LONGEST_GAP)
        key, passed = (allocation.user, allocation.status), max(0.0, (now - start).total_seconds())
        seconds[key] = seconds.get(key, 0.0) + passed * len(allocation.devices)
        if allocation.status == "active" and allocation.container in idle:
            spent = min(passed, idle[allocation.container].total_seconds()) * len(allocation.devices)
            unused[allocation.user] = unused.get(allocation.user, 0.0) + spent
    return replace(totals, seconds=seconds, idle=unused, counted_until=now)


def with_run(totals: Totals, run: Run) -> Totals:
    """The totals after a run of reconcile."""
    return replace(totals, last_run=run, last_success=run.ended_at if run.ok else totals.last_success)


def _word(value: object, known: Mapping[str, int]) -> str:
    """A label of the log's own words: what somebody wrote into it by hand makes no metric of its own."""
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        return _OTHER
    return value if value in known or len(known) < _MOST_WORDS else _OTHER


def families(picture: Picture, totals: Totals) -> list[Family]:
    """Every metric, in a fixed order; one without samples is left out."""
    found = [*_parts(picture), *_gpus(picture), *_ledger(picture), *_users(picture), *_totals(totals), *_runs(totals)]
    return [family for family in found if family.samples]


def _gauge(name: str, help_: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> Family:
    return Family(f"ds01_{name}", "gauge", help_, list(samples))


def _counter(name: str, help_: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> Family:
    return Family(f"ds01_{name}_total", "counter", help_, list(samples))


def _parts(picture: Picture) -> Iterator[Family]:
    yield _gauge(
        "component_available",
        "Whether DS01 could use this part of the host (1) or not (0).",
        (({"component": name}, float(ok)) for name, ok in sorted(picture.available.items())),
    )


def _gpus(picture: Picture) -> Iterator[Family]:
    inventory = picture.inventory
    if inventory is None:
        return
    yield _gauge("driver_info", "The NVIDIA driver.", [({"version": inventory.driver_version}, 1)])
    yield _gauge(
        "gpu_info",
        "A GPU, and whether it is in MIG mode.",
        (({"gpu": str(g.index), "uuid": g.uuid, "model": g.name, "mig": _yes(g.mig)}, 1) for g in inventory.gpus),
    )
    yield _gauge(
        "gpu_health",
        "The health of a GPU: 1 for the one that it has.",
        (({"gpu": str(g.index), "health": h}, float(h == g.health)) for g in inventory.gpus for h in HEALTH),
    )
    if picture.ledger is None:
        return
    statuses = {d.uuid: _status(d, picture.ledger, picture.occupied) for d in inventory.devices}
    counted = Counter((d.profile, statuses[d.uuid]) for d in inventory.devices)
    yield _gauge(
        "devices",
        "Devices by profile and status.",
        (
            ({"profile": profile, "status": status}, counted[profile, status])
            for profile in sorted({d.profile for d in inventory.devices})
            for status in STATUSES
        ),
    )
    loose = [d for d in inventory.devices if _is_unmanaged(d, picture.ledger, picture.occupied)]
    yield _gauge("unmanaged_devices", "Devices that somebody uses without DS01.", [({}, len(loose))])
    yield _gauge("unmanaged_device_info", "A device that somebody uses without DS01.", ((_of(d), 1) for d in loose))


def _status(device: Device, ledger: Ledger, occupied: Mapping[str, str]) -> str:
    holder = ledger.holder_of(device)
    if holder:
        return holder.status
    if device.uuid in occupied:
        return "occupied"
    return "free" if device.health == "ok" else "unhealthy"


def _is_unmanaged(device: Device, ledger: Ledger, occupied: Mapping[str, str]) -> bool:
    """Whoever uses the device of a container that runs is most likely that container."""
    holder = ledger.holder_of(device)
    return device.uuid in occupied and (holder is None or holder.status == "held")


def _ledger(picture: Picture) -> Iterator[Family]:
    ledger = picture.ledger
    if ledger is None:
        return
    allocations = sorted(ledger.allocations.values(), key=lambda a: a.container)
    yield _gauge(
        "allocation_info",
        "A device that is allocated, with its container.",
        (
            ({"container": a.container, "user": a.user, "status": a.status, **_with_instance(device, picture)}, 1)
            for a in allocations
            for device in a.devices
        ),
    )
    if picture.inventory is not None:
        gone = len(ledger.missing(picture.inventory))
        yield _gauge("allocated_devices_missing", "Allocated devices that the driver does not have.", [({}, gone)])
    held = [a for a in allocations if a.stopped_at]
    yield _gauge(
        "hold_start_timestamp_seconds",
        "When the container stopped whose devices are held.",
        (({"container": a.container, "user": a.user}, a.stopped_at.timestamp()) for a in held if a.stopped_at),
    )
    yield _gauge(
        "hold_end_timestamp_seconds",
        "When the hold ends; absent where it does not.",
        (
            ({"container": a.container, "user": a.user}, picture.hold_ends[a.container].timestamp())
            for a in held
            if a.container in picture.hold_ends
        ),
    )
    yield _gauge(
        "container_idle_seconds",
        "How long a running container has shown no use of its devices; absent where it is in use or that is not known.",
        (
            ({"container": a.container, "user": a.user}, picture.idle[a.container].total_seconds())
            for a in allocations
            if a.status == "active" and a.container in picture.idle
        ),
    )
    yield _gauge("queue_requests", "Requests that wait for devices.", [({}, len(picture.queue))])
    yield _gauge(
        "queue_waiting_since_timestamp_seconds",
        "Since when a request waits for devices.",
        (
            ({"container": w.request.container, "user": w.request.user}, w.ticket.since.timestamp())
            for w in picture.queue
        ),
    )


def _of(device: Device) -> dict[str, str]:
    return {
        "device": device.id,
        "gpu": str(device.index[0]),
        "uuid": device.uuid,
        "gpu_uuid": device.gpu_uuid,
        "profile": device.profile,
    }


def _with_instance(device: Device, picture: Picture) -> dict[str, str]:
    """`gpu_instance` as DCGM numbers it; empty, which to Prometheus is absent, for a whole GPU."""
    now = (picture.inventory.find(device) if picture.inventory else None) or device
    return {**_of(now), "gpu_instance": str((picture.instances or {}).get(now.uuid, ""))}


def _users(picture: Picture) -> Iterator[Family]:
    ledger = picture.ledger
    users = sorted(picture.limits)
    labels = {user: {"user": user, "group": picture.limits[user].group} for user in users}

    def used_and_limit(
        name: str, what: str, used: Mapping[str, float] | None, limit: Mapping[str, Fraction | int | None]
    ) -> Iterator[Family]:
        if used is not None:
            yield _gauge(f"user_{name}", f"{what} that a user has.", ((labels[u], used.get(u, 0)) for u in users))
        capped = [(labels[u], float(value)) for u in users if (value := limit[u]) is not None]
        yield _gauge(f"user_{name}_limit", f"{what} that a user may have; absent where unlimited.", capped)

    mine = {user: ledger.of_user(user) for user in users} if ledger else None
    devices = None if mine is None else {user: sum(len(a.devices) for a in its) for user, its in mine.items()}
    shares = (
        None
        if mine is None
        else {u: float(sum((d.equivalents for a in its for d in a.devices), Fraction(0))) for u, its in mine.items()}
    )
    of = picture.limits
    yield from used_and_limit("devices", "Devices", devices, {u: of[u].max_gpus for u in users})
    yield from used_and_limit(
        "gpu_equivalents", "Shares of GPUs", shares, {u: of[u].max_gpu_equivalents for u in users}
    )
    allowed = {u: of[u].max_containers_per_user for u in users}
    yield from used_and_limit("containers", "Containers", picture.containers, allowed)


def _totals(totals: Totals) -> Iterator[Family]:
    events = {**{f"gpu.{name}": 0 for name in _EVENTS}, **totals.events}
    refusals = {**dict.fromkeys(_REASONS, 0), **totals.refusals}
    yield _counter(
        "events", "Events in the audit log.", (({"event": name}, count) for name, count in sorted(events.items()))
    )
    yield _counter(
        "refusals",
        "Requests for devices that were refused.",
        (({"reason": reason}, count) for reason, count in sorted(refusals.items())),
    )
    yield _counter(
        "allocated_device_seconds",
        "Time that devices were allocated; held: to a container that was stopped.",
        (({"user": user, "status": status}, spent) for (user, status), spent in sorted(totals.seconds.items())),
    )
    yield _counter(
        "idle_device_seconds",
        "Time in which running containers showed no use of their devices.",
        (({"user": user}, spent) for user, spent in sorted(totals.idle.items())),
    )


def _runs(totals: Totals) -> Iterator[Family]:
    run = totals.last_run
    if run is None:
        return
    yield _gauge("reconcile_last_run_timestamp_seconds", "When reconcile last ended.", [({}, run.ended_at.timestamp())])
    yield _gauge("reconcile_last_run_duration_seconds", "How long that took.", [({}, run.seconds)])
    if totals.last_success is not None:
        yield _gauge(
            "reconcile_last_success_timestamp_seconds",
            "When reconcile last ended with everything done.",
            [({}, totals.last_success.timestamp())],
        )


def job_mapping(picture: Picture) -> dict[str, str] | None:
    """dcgm-exporter's job mapping: file name -> content, for every device that is allocated; None: not known.

    A GPU is `<gpu>`, a MIG device `<gpu>.<its GPU instance>`; a job is `<user>:<container>`, one a line.
    """
    if picture.ledger is None or picture.inventory is None or picture.instances is None:
        return None
    found: dict[str, list[str]] = {}
    for allocation in picture.ledger.allocations.values():
        for recorded in allocation.devices:
            device = picture.inventory.find(recorded)
            name = _mapping_file(device, picture.instances) if device else None
            if name:
                found.setdefault(name, []).append(f"{allocation.user}:{allocation.container}\n")
    return {name: "".join(sorted(jobs)) for name, jobs in found.items()}


def _mapping_file(device: Device, instances: Mapping[str, int]) -> str | None:
    gpu = device.index[0]
    if device.is_full:
        return str(gpu)
    return f"{gpu}.{instances[device.uuid]}" if device.uuid in instances else None


def _yes(value: bool) -> str:
    return "true" if value else "false"
