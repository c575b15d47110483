"""What becomes of one container's allocation: allocated, held, active or released. Pure.

`decide` answers one change with an `Outcome` and never touches anything; a batch folds it over the
ledger, so that each change sees what those before it took.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from . import names, placement, queueing, records, takeover, units
from .errors import invalid_input
from .limits import Config, Limits, gpu_hold, resolve
from .model import Allocation, Device, Grant, Inventory, Ledger, Refusal, Request, Ticket, Waiter

if TYPE_CHECKING:
    from .mig import Placed

STOP_HINT = "Stop it with playbooks/container_stop.yml, or remove it with playbooks/container_remove.yml."
STATES = ("allocated", "held", "active", "released")


@dataclass(frozen=True)
class Change:
    """What one container's allocation should become.

    `priority` and `max_gpus` lower what the limits give; `may_raise` (root) lets them raise it.
    `stopped_at` is when the container stopped; `container_id` the container that becomes active.
    `startable` says that the container does not run and is about to be started: it may be bound to
    another device. `reuse_held` gives up the user's own holds for this. `wait` is how long to wait for
    devices; its `ticket` puts it into the queue (see waiting.py).
    """

    state: str
    name: names.ContainerName
    gpus: int = 1
    profile: str | None = None
    priority: int | None = None
    max_gpus: int | None = None
    strategy: str | None = None
    may_raise: bool = False
    startable: bool = False
    reuse_held: bool = False
    wait: timedelta | None = None
    ticket: Ticket | None = None
    stopped_at: datetime | None = None
    container_id: str | None = None

    def __post_init__(self) -> None:
        for what, value, low, high in (
            ("gpus", self.gpus, 0, None),
            ("max_gpus", self.max_gpus, 0, None),
            ("priority", self.priority, 1, 100),
        ):
            if value is not None and (value < low or (high and value > high)):
                raise invalid_input(f"{what} is {value}; it must be {low} {f'to {high}' if high else 'or more'}.")
        if self.wait is not None and self.wait < timedelta(0):
            raise invalid_input("wait is less than 0.")
        if self.state == "allocated" and not self.name.user:
            raise invalid_input(f"Nobody was named for {self.name.full}.", "Add the user.")


@dataclass(frozen=True)
class Outcome:
    """What became of one change. `ok` is False for a refusal; `before` is the former allocation.

    `given_up` are holds that gave way. `cuts` says how GPUs, by index, have to be cut before it is so.
    `waiter` is the entry in the queue of a request that waits from now on (`joined`) or still does, at
    this `position` (1 is served next).
    """

    name: names.ContainerName
    reason: str
    message: str
    ok: bool = True
    allocation: Allocation | None = None
    before: Allocation | None = None
    hint: str = ""
    available_at: datetime | None = None
    warnings: tuple[str, ...] = ()
    given_up: tuple[Allocation, ...] = ()
    cuts: Mapping[int, Placed] = field(default_factory=dict)
    ticket: Ticket | None = None
    waiter: Waiter | None = None
    joined: bool = False
    position: int = 0

    @property
    def changed(self) -> bool:
        return self.allocation != self.before

    @property
    def is_uncut(self) -> bool:
        """Whether a device of the allocation is yet to be cut."""
        return self.allocation is not None and any(d.is_new for d in self.allocation.devices)

    def result(self) -> dict[str, Any]:
        """The outcome as JSON (`--json`, module results)."""
        return {
            "container": self.name.full,
            "user": self.name.user,
            "changed": self.changed,
            "failed": not self.ok,
            "reason": self.reason,
            "msg": f"{self.message} {self.hint}".strip(),
            "allocation": describe(self.allocation) if self.allocation else None,
            "available_at": units.format_time(self.available_at) if self.available_at else None,
            "given_up": [describe(a) for a in self.given_up],
            "warnings": list(self.warnings),
        }


def describe(allocation: Allocation) -> dict[str, Any]:
    """An allocation as results show it: the ledger's record and what follows from it."""
    return {
        "container": allocation.container,
        "status": allocation.status,
        "device": names.cdi_device(allocation.container),
        **records.record(allocation),
    }


def refused(name: names.ContainerName, refusal: Refusal, allocation: Allocation | None = None) -> Outcome:
    """A refusal; whatever was allocated before stays as it was."""
    return Outcome(
        name,
        refusal.reason,
        refusal.message,
        ok=False,
        allocation=allocation,
        before=allocation,
        hint=refusal.hint,
        available_at=refusal.available_at,
    )


def decide(change: Change, config: Config, situation: placement.Situation) -> Outcome:
    """The outcome of one change in this situation."""
    limits = resolve(config, change.name.user)
    current = situation.ledger.allocations.get(change.name.full)
    refusal = _not_theirs(change, current, situation.running) if current else None
    if refusal:
        return refused(change.name, refusal, current)
    if change.state == "allocated":
        outcome = _allocate(change, _adjusted(limits, change), current, situation, config)
        return replace(outcome, ticket=change.ticket)
    if current is None:
        return _nothing_there(change)
    if change.state == "held":
        return _hold(change, config, current, situation.now)
    if change.state == "active":
        return _activate(change, current)
    return Outcome(change.name, "released", f"Released {current.gpu_id} from {current.container}.", before=current)


def _not_theirs(change: Change, current: Allocation, running: Collection[str]) -> Refusal | None:
    """Why an allocation may not be touched: it is somebody else's, or its container is using it."""
    if current.user != change.name.user:
        message = f"{current.container} belongs to {current.user}, not to {change.name.user}."
        return Refusal("invalid_input", message, "See: ds01 status")
    if change.state in ("held", "released") and current.container in running:
        return Refusal("container_running", f"{current.container} is running with {current.gpu_id}.", STOP_HINT)
    return None


def after(now: Ledger, outcome: Outcome) -> Ledger:
    """The ledger once the outcome is carried out."""
    queue = _queue_after(now.queue, outcome)
    if queue != now.queue:
        now = replace(now, queue=queue)
    if outcome.given_up:
        now = now.without(*(a.container for a in outcome.given_up))
    if outcome.allocation == now.allocations.get(outcome.name.full):
        return now
    if outcome.allocation is None:
        return now.without(outcome.name.full)
    return now.with_allocation(outcome.allocation)


def _queue_after(queue: tuple[Waiter, ...], outcome: Outcome) -> tuple[Waiter, ...]:
    """A request that has to wait keeps its place or gets one; one that was answered leaves. What others ask
    or report about its container meanwhile is no answer, unless that was given its devices."""
    others = tuple(w for w in queue if w.request.container != outcome.name.full)
    if outcome.waiter:
        return queue if len(others) < len(queue) else (*queue, outcome.waiter)
    served = outcome.ok and outcome.reason in ("granted", "already_allocated")
    return others if outcome.ticket or served else queue


def hold_end(allocation: Allocation, config: Config) -> datetime | None:
    """When the hold is over: after the user's time, or when somebody else's reservation begins."""
    stopped = allocation.stopped_at
    if stopped is None:
        return None
    hold = gpu_hold(config, allocation.user)
    ends = [units.after(stopped, hold)] if hold is not None else []
    for reservation in config.reservations:
        booked = any(reservation.names(d) for d in allocation.devices)
        if booked and reservation.user != allocation.user and reservation.end > stopped:
            ends.append(max(stopped, reservation.start))
    return min(ends, default=None)


def resolved(now: Ledger, inventory: Inventory) -> Ledger:
    """The ledger with every device as it is now called. One that is not there stays as recorded, and
    so does one whose place another record already names."""
    named = {d.uuid for a in now.allocations.values() for d in a.devices}
    for allocation in now.allocations.values():
        devices = tuple(_renamed(device, inventory, named) for device in allocation.devices)
        named.update(device.uuid for device in devices)
        if devices != allocation.devices:
            now = now.with_allocation(replace(allocation, devices=devices))
    return now


def _renamed(recorded: Device, inventory: Inventory, named: Collection[str]) -> Device:
    found = inventory.locate(recorded)
    if found is None or (found.uuid, found.id) == (recorded.uuid, recorded.id):
        return recorded
    return recorded if found.uuid != recorded.uuid and found.uuid in named else found


def device_problem(allocation: Allocation, inventory: Inventory) -> str | None:
    """Why the allocation's devices cannot be used now, or None."""
    for device in allocation.devices:
        present = inventory.find(device)
        if present is None:
            return f"device {device.id} ({device.uuid or 'no UUID recorded'}) is not on this host any more"
        if present.health != "ok":
            return f"device {device.id} is {present.health}"
    return None


def _adjusted(limits: Limits, change: Change) -> Limits:
    """The limits with the request's own, lower ones; root may raise them."""

    def choose(allowed: int | None, asked: int | None) -> int | None:
        if asked is None or (allowed is not None and asked > allowed and not change.may_raise):
            return allowed
        return asked

    priority = choose(limits.priority, change.priority)
    return replace(
        limits,
        max_gpus=choose(limits.max_gpus, change.max_gpus),
        priority=limits.priority if priority is None else priority,
    )


def _allocate(
    change: Change, limits: Limits, current: Allocation | None, situation: placement.Situation, config: Config
) -> Outcome:
    problem = _unusable(change, current, limits, situation) if current and change.gpus else None
    if current is not None and not (problem and change.startable):
        return _already(change, current, problem, situation.now)
    if current is not None:
        situation = replace(situation, ledger=situation.ledger.without(current.container))
    if change.strategy:
        situation = replace(situation, policy=replace(situation.policy, strategy=change.strategy))
    request = Request(change.name.full, change.name.user, change.gpus, change.profile)
    ahead = queueing.ahead_of(request.container, limits.priority, situation.queue)
    situation = queueing.keeping(ahead, config, situation)
    decision = takeover.decide(request, limits, situation, reuse_held=change.reuse_held)
    if isinstance(decision, Refusal):
        return _refused_or_waiting(change, request, limits, decision, current, situation, len(ahead))
    if not decision.devices:
        return Outcome(change.name, "granted", f"{change.name.full} is CPU-only: it gets no GPU.")
    return _granted(change, limits, current, decision, situation, f" ({problem})" if problem else "")


def _unusable(change: Change, current: Allocation, limits: Limits, situation: placement.Situation) -> str | None:
    """Why the container cannot go on with the devices it has, or None."""
    problem = device_problem(current, situation.inventory)
    if problem or not change.startable:
        return problem
    for device in current.devices:
        if device.uuid in situation.occupied:
            return f"device {device.id} is used by {situation.occupied[device.uuid]}"
        # Its run begins with this start, whenever it was allocated.
        booked = placement.bookings(device, limits, situation)
        if booked:
            return f"device {device.id} is reserved from {units.format_time(min(b.start for b in booked))} on"
    return None


def _refused_or_waiting(
    change: Change,
    request: Request,
    limits: Limits,
    refusal: Refusal,
    current: Allocation | None,
    situation: placement.Situation,
    ahead: int,
) -> Outcome:
    ticket = change.ticket
    outcome = replace(refused(change.name, refusal, current), position=ahead + 1)
    if ticket is None or not refusal.retry:
        return outcome
    if situation.now >= ticket.until:
        return replace(outcome, message=f"{outcome.message} It waited since {units.format_time(ticket.since)}.")
    known = any(w.request.container == request.container for w in situation.queue)
    return replace(outcome, waiter=Waiter(request, limits.priority, limits.max_gpus, ticket), joined=not known)


def _granted(
    change: Change,
    limits: Limits,
    current: Allocation | None,
    grant: Grant,
    situation: placement.Situation,
    because: str,
) -> Outcome:
    allocation = Allocation(
        container=change.name.full,
        user=change.name.user,
        devices=grant.devices,
        priority=limits.priority,
        allocated_at=situation.now,
        pending_since=situation.now,
    )
    message = f"Allocated {_listed(allocation)} to {allocation.container}{because}."
    message += "".join(f" GPU {index} is cut for it: {layout}." for index, layout in sorted(grant.cuts.items()))
    if grant.given_up:
        gone = ", ".join(f"{a.container} ({a.gpu_id}, priority {a.priority})" for a in grant.given_up)
        message += f" Gave up for it: the hold of {gone}."
    return Outcome(
        change.name,
        "granted",
        message,
        allocation=allocation,
        before=current,
        warnings=_not_raised(change, limits),
        given_up=grant.given_up,
        cuts=grant.cuts,
    )


def _listed(allocation: Allocation) -> str:
    return ", ".join(f"{d.id} ({d.profile})" for d in allocation.devices)


def bound(outcome: Outcome, inventory: Inventory) -> Outcome:
    """The outcome once GPUs were cut: with the devices that are in its devices' places, as they are called now."""
    allocation, before = _located(outcome.allocation, inventory), _located(outcome.before, inventory)
    message = outcome.message
    if outcome.allocation and allocation:
        message = message.replace(_listed(outcome.allocation), _listed(allocation), 1)
    return replace(outcome, allocation=allocation, before=before, message=message, cuts={})


def _located(allocation: Allocation | None, inventory: Inventory) -> Allocation | None:
    if allocation is None:
        return None
    return replace(allocation, devices=tuple(inventory.locate(d) or d for d in allocation.devices))


def _not_raised(change: Change, limits: Limits) -> tuple[str, ...]:
    """What was asked for beyond the limits, and not given."""
    pairs = (("max_gpus", change.max_gpus, limits.max_gpus), ("priority", change.priority, limits.priority))
    return tuple(
        f"{what} stays {allowed}: raising it to {asked} needs root."
        for what, asked, allowed in pairs
        if asked is not None and allowed is not None and asked > allowed
    )


def _already(change: Change, current: Allocation, problem: str | None, now: datetime) -> Outcome:
    """An allocation is idempotent, but a different wish is a refusal, not a silent yes.

    One whose container is about to be started is pending from then on: nobody takes it over or back.
    """
    if problem:
        hint = f"Release it, then allocate again: ds01 release --container {current.container}"
        return refused(change.name, Refusal("gpu_unhealthy", f"{current.container}: {problem}.", hint), current)
    profiles = {d.profile for d in current.devices}
    if change.gpus == len(current.devices) and (change.profile is None or {change.profile} == profiles):
        message = f"{current.container} already has {current.gpu_id}."
        starts = replace(current, stopped_at=None, pending_since=now) if change.startable else current
        return Outcome(change.name, "already_allocated", message, allocation=starts, before=current)
    has = f"{current.container} already has {current.gpu_id} ({', '.join(sorted(profiles))})"
    asked = f"{change.gpus} x {change.profile or 'device'}"
    hint = f"Release it first: ds01 release --container {current.container}"
    return refused(change.name, Refusal("already_allocated", f"{has}; {asked} was asked for.", hint), current)


def _nothing_there(change: Change) -> Outcome:
    message = f"Nothing is allocated to {change.name.full}."
    if change.state == "released":
        return Outcome(change.name, "not_allocated", message)
    return refused(change.name, Refusal("not_allocated", message, "See: ds01 status"))


def _hold(change: Change, config: Config, current: Allocation, now: datetime) -> Outcome:
    hold = gpu_hold(config, current.user)
    if hold is not None and not hold:
        message = f"Released {current.gpu_id} from {current.container}: {current.user} has no hold after a stop."
        return Outcome(change.name, "released", message, before=current)
    stopped_at = change.stopped_at.replace(microsecond=0) if change.stopped_at else None
    if current.stopped_at is not None and stopped_at in (None, current.stopped_at):
        message = f"{current.container} is already held since {units.format_time(current.stopped_at)}."
        return Outcome(change.name, "held", message, allocation=current, before=current)
    held = replace(current, stopped_at=stopped_at or now.replace(microsecond=0), pending_since=None)
    end = hold_end(held, config)
    until = "until it is released" if end is None else f"until {units.format_time(end)}"
    message = f"{current.container} keeps {current.gpu_id} {until}."
    return Outcome(change.name, "held", message, allocation=held, before=current)


def _activate(change: Change, current: Allocation) -> Outcome:
    container_id = change.container_id or current.container_id
    active = replace(current, stopped_at=None, pending_since=None, container_id=container_id)
    message = f"{current.container} uses {current.gpu_id}."
    return Outcome(change.name, "active", message, allocation=active, before=current)
