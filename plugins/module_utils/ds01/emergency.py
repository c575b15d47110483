"""The emergency stop: what runs of a user, on a GPU, or all of it, ended at once, and its devices free.

It needs the engine, and neither the driver nor a limits file to end containers; nothing is removed. Level-triggered:
it looks, ends, gives back, and looks again, so that what was started meanwhile is met as well.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import accounts, claims, engine, names, stopping
from .allocations import Allocations
from .engine import Container
from .errors import Ds01Error, invalid_input
from .model import Allocation, Device, Ledger, Waiter
from .transitions import Change

TIMEOUT = 5
"""Seconds between asking a container to stop and killing it."""

_ROUNDS = 3
_DEV = Path("/dev")
_GPU = re.compile(r"\d+([.:]\d+)?|(GPU|MIG)-[0-9A-Za-z/-]+")


@dataclass(frozen=True)
class Target:
    """Whose or which containers: a user's, those on a GPU (`0`, `0:1` or a UUID), or with neither all of DS01's."""

    user: str | None = None
    gpu: str | None = None

    def __str__(self) -> str:
        if self.user is not None:
            return f"the containers of {self.user}"
        return f"the containers on GPU {self.gpu}" if self.gpu is not None else "all of DS01's containers"

    def names_user(self, user: str) -> bool:
        return self.user in (None, user)

    def names_devices(self, devices: Sequence[Device]) -> bool:
        return self.gpu is None or any(self.gpu in _words(device) for device in devices)


@dataclass
class Report:
    """What was ended and given back, who still waits for devices, and which running containers carry DS01's labels
    without being its own (renamed, or of a committed image) and were left; `warnings` where the target may be a slip of
    the pen; `foreseen`: what would be."""

    target: Target
    stopped: list[str] = field(default_factory=list)
    released: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    foreseen: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.stopped or self.released)

    def result(self) -> dict[str, Any]:
        """The report as JSON (`--json`, module results)."""
        return {
            "changed": self.changed,
            "stopped": self.stopped,
            "released": [{"container": name, "gpu_id": gpu} for name, gpu in self.released.items()],
            "waiting": self.waiting,
            "left": self.left,
            "problems": self.problems,
            "warnings": self.warnings,
            "msg": self.summary(),
        }

    def summary(self) -> str:
        """What was done, and who waits, in a sentence each."""
        if not self.changed:
            text = f"Nothing to stop: {self.target} do not run, and hold no device."
        else:
            words = ("Would stop", "free") if self.foreseen else ("Stopped", "freed")
            devices = ", ".join(self.released.values()) or "none"
            text = f"{words[0]} {self._listed()} and {words[1]} devices: {devices}. Files are kept."
        if self.left:
            text += f" Left running, for it is not DS01's own: {', '.join(self.left)}."
        return f"{text} Still waiting for devices: {', '.join(self.waiting)}." if self.waiting else text

    def _listed(self) -> str:
        return f"{len(self.stopped)} container(s) ({', '.join(self.stopped)})" if self.stopped else "no container"


@dataclass(frozen=True)
class _Sight:
    """What the target means now: containers that run, allocations (held and pending ones too), who waits, and what only
    looks as if it were DS01's. `ledger` and `users` (of the engine's containers) are what anybody could be meant of."""

    running: Sequence[Container]
    allocations: Mapping[str, Allocation]
    waiting: Sequence[Waiter]
    left: Sequence[Container]
    ledger: Ledger
    users: Collection[str]

    @property
    def empty(self) -> bool:
        return not (self.running or self.allocations or self.waiting or self.left)


def target(user: str | None = None, gpu: str | None = None) -> Target:
    """A user (login name or uid) or a GPU; with neither, everything. Raises Ds01Error `invalid_input`."""
    if user is not None:
        return Target(user=_login(user))
    if gpu is not None and not _GPU.fullmatch(gpu):
        raise invalid_input(f"{gpu!r} names no GPU.", "Write 0, 0:1 or a UUID, as ds01 status shows them.")
    return Target(gpu=gpu and (gpu if gpu.startswith(("GPU-", "MIG-")) else gpu.replace(".", ":")))


def foresee(ds01: Allocations, what: Target) -> Report:
    """What `stop` would do now. Writes nothing."""
    seen = _look(ds01, what)
    return Report(
        what,
        stopped=[container.name for container in seen.running],
        released={name: allocation.gpu_id for name, allocation in seen.allocations.items()},
        waiting=[_waiter(waiter) for waiter in seen.waiting],
        left=[container.name for container in seen.left],
        warnings=_doubts(ds01, what, seen),
        foreseen=True,
    )


def stop(ds01: Allocations, what: Target, timeout: int = TIMEOUT) -> Report:
    """End them all at once, kill after `timeout` seconds what does not end, and give their devices back, and those
    that their stopped containers hold. Whatever cannot be done is among the report's problems.

    Raises Ds01Error `engine_unavailable`.
    """
    report = Report(what)
    for attempt in range(_ROUNDS):
        seen = _look(ds01, what)
        report.waiting = [_waiter(waiter) for waiter in seen.waiting]
        report.left = [container.name for container in seen.left]
        if not seen.running and not seen.allocations:
            report.warnings = [] if attempt else _doubts(ds01, what, seen)
            return report
        if not attempt:
            message = f"Emergency stop of {what}."
            ds01.events.write("policy.emergency_stop", ds01.clock(), user=what.user, message=message)
        report.problems = _end(ds01, seen.running, timeout, report)
        try:
            report.problems += _release(ds01, seen, report)
        except Ds01Error as exc:
            report.problems.append(f"The containers have ended, but their devices are not free: {exc}")
            break
    still = _look(ds01, what)
    report.problems += [f"{container.name} runs again or still." for container in still.running]
    return report


def _look(ds01: Allocations, what: Target) -> _Sight:
    now, containers = _ledger(ds01), ds01.engine.containers()
    running = [c for c in containers if c.status in engine.RUNNING and what.names_user(c.user)]
    concerned = [c for c in running if what.names_devices(_devices(ds01, c, now))]
    return _Sight(
        running=[c for c in concerned if c.own],
        left=[c for c in concerned if not c.own],
        allocations={
            name: allocation
            for name, allocation in now.allocations.items()
            if what.names_user(allocation.user) and what.names_devices(allocation.devices)
        },
        waiting=[waiter for waiter in now.queue if what.gpu is None and what.names_user(waiter.request.user)],
        ledger=now,
        users={container.user for container in containers},
    )


def _doubts(ds01: Allocations, what: Target, seen: _Sight) -> list[str]:
    """What to say where nothing here has the name of what is to be stopped: no error, for of several servers not every
    one knows everybody. The driver is not asked: it may be why somebody stops everything."""
    if not seen.empty:
        return []
    if what.user is not None and accounts.lookup(what.user) is None:
        having = {*seen.users, *(allocation.user for allocation in seen.ledger.allocations.values())} - {""}
        near = difflib.get_close_matches(what.user, having, n=1)
        doubt = f"Nobody is called {what.user} here: neither host, ledger nor engine know that name."
        return [f"{doubt} Did you mean {near[0]}?" if near else doubt]
    if what.gpu is not None:
        there = _gpus(ds01, seen.ledger)
        near = difflib.get_close_matches(what.gpu, there, n=1, cutoff=0.9) or sorted(filter(_is_id, there), key=_place)
        if what.gpu not in there:
            named = f"There is {', '.join(near)}." if near else "No GPU is to be seen here."
            return [f"GPU {what.gpu} is in neither the ledger, NVIDIA's CDI spec nor /dev. {named}"]
    return []


def _gpus(ds01: Allocations, now: Ledger) -> set[str]:
    """All that a GPU or a MIG device of this host may be called, as far as that can be told without the driver."""
    found = {word for a in now.allocations.values() for device in a.devices for word in _words(device)}
    with contextlib.suppress(Ds01Error):
        spec = ds01.cdi.nvidia_spec() or {}
        named = [str(device.get("name")) for device in spec.get("devices", ())]
        found.update(word for name in named for word in (name, name.partition(":")[0]))
    nodes = sum(re.fullmatch(r"nvidia\d+", node.name) is not None for node in _DEV.glob("nvidia*"))
    return found | set(map(str, range(nodes)))


def _is_id(word: str) -> bool:
    return word[:1].isdecimal()


def _place(gpu: str) -> list[int]:
    return [int(part) for part in gpu.split(":")]


def _ledger(ds01: Allocations) -> Ledger:
    """The ledger as far as it can be read: a damaged one keeps no container alive."""
    try:
        return ds01.store.read()
    except Ds01Error:
        return Ledger()


def _devices(ds01: Allocations, container: Container, now: Ledger) -> Sequence[Device]:
    """What the ledger says, else what its records say: it may run without an allocation."""
    allocation = now.allocations.get(container.name)
    if allocation:
        return allocation.devices
    return claims.devices_in_use(container, ds01.paths.metadata, ds01.cdi.projected) if container.gpus else ()


def _end(ds01: Allocations, containers: Sequence[Container], timeout: int, report: Report) -> list[str]:
    """End them in parallel; the problems. What ended is in the report and in the audit log."""
    ends = {end.container: end for end in stopping.ends({container.name: timeout for container in containers})}
    for container in containers:
        if ends[container.name].fate == "over" and container.name not in report.stopped:
            report.stopped.append(container.name)
            ds01.events.write(
                "container.stopped", ds01.clock(), user=container.user, container=container.name, reason="emergency"
            )
    return [str(error) for container in containers if (error := ends[container.name].error)]


def _release(ds01: Allocations, seen: _Sight, report: Report) -> list[str]:
    """Give everything back in one transaction; the problems. One that was started again meanwhile keeps its
    devices: the next round meets it."""
    concerned = {name: allocation.user for name, allocation in seen.allocations.items()}
    # Where the ledger could not be read, it is rebuilt from just these.
    concerned.update({c.name: c.user for c in seen.running if c.gpus})
    changes = [Change("released", names.as_called(name, user)) for name, user in concerned.items()]
    outcomes = ds01.apply(changes) if changes else ()
    report.released.update({o.name.full: o.before.gpu_id for o in outcomes if o.ok and o.changed and o.before})
    return [o.message for o in outcomes if not o.ok and o.reason != "container_running"]


def _words(device: Device) -> set[str]:
    """What a device can be called, and its GPU."""
    return {device.id, device.id.partition(":")[0], device.uuid, device.gpu_uuid} - {""}


def _login(user: str) -> str:
    """The login name; one that this host does not know any more may still have containers."""
    try:
        return names.canonical_user(user, accounts.lookup)
    except Ds01Error as exc:
        if exc.reason != "unknown_user":
            raise
        return user


def _waiter(waiter: Waiter) -> str:
    """Who waits, and by which process: `train._.bob (process 4711)`."""
    return f"{waiter.request.container} (process {waiter.ticket.process.pid})"
