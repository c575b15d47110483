"""A batch of requests decided, and what follows from that: for the ledger, the CDI devices and the audit log. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from . import placement
from .errors import Ds01Error
from .model import Allocation, Inventory, Ledger, Refusal, Waiter
from .transitions import Outcome, after, refused

if TYPE_CHECKING:
    from .mig import Placed

_EVENTS = {"granted": "gpu.allocated", "held": "gpu.held", "released": "gpu.released", "expired": "gpu.released"}


@dataclass(frozen=True)
class Plan:
    """A batch decided: what becomes of each change and of what was due anyway, and the ledger after it.

    `rebooted` says that the ledger is of an earlier boot: nothing of it is projected yet. The ledger is
    without what GPUs have to be cut for first, as `cuts` says, by index.
    """

    outcomes: Sequence[Outcome]
    due: Sequence[Outcome]
    ledger: Ledger
    spec: Mapping[str, Any] | None
    now: datetime
    rebooted: bool
    cuts: Mapping[int, Placed] = field(default_factory=dict)
    mended: Sequence[str] = ()
    """Containers whose CDI device is not what that ledger says."""


def events(outcome: Outcome) -> Iterator[tuple[str, Allocation | None, str, str]]:
    """What the audit log says of an outcome: the event, the allocation it is about, why, a sentence."""
    for hold in outcome.given_up:
        by = f"{outcome.name.full} of {outcome.name.user}"
        yield "gpu.reclaimed", hold, "reclaimed", f"{hold.gpu_id}, held for {hold.container}, was taken over for {by}."
    event = _EVENTS.get(outcome.reason) if outcome.changed else None
    if event == "gpu.allocated" and outcome.before:
        event = "gpu.rebound"
    if outcome.waiter:
        event = "gpu.queued" if outcome.joined else None
    elif not outcome.ok:
        event = "gpu.refused"
    if event:
        yield event, outcome.allocation or outcome.before, outcome.reason, outcome.message


def moved(before: Ledger, after_: Ledger) -> list[str]:
    """Containers whose devices are others than before, or none any more; another name is no other device."""
    had, has = ({name: uuids(a) for name, a in now.allocations.items()} for now in (before, after_))
    return sorted(name for name in had if has.get(name) != had[name])


def may_need_cuts(plan: Plan, before: Ledger) -> bool:
    """Whether it could be otherwise on a host that cuts GPUs on demand. Those who wait may wait for a cut."""
    reasons = (*placement.NONE_FREE, "profile_not_available")
    unserved = any(o.given_up or (not o.ok and o.reason in reasons) for o in plan.outcomes)
    return unserved or bool(before.queue)


def without_uncut(now: Ledger, queue: Sequence[Waiter], outcomes: Sequence[Outcome]) -> Ledger:
    """The ledger as long as nothing is cut: whoever had waited in the `queue` before waits in his place."""
    before: dict[str, Allocation | None] = {}
    for outcome in outcomes:
        if outcome.is_uncut:
            before.setdefault(outcome.name.full, outcome.before)
    for container, allocation in before.items():
        now = now.with_allocation(allocation) if allocation else now.without(container)
    stays = tuple(w for w in queue if w in now.queue or w.request.container in before)
    return replace(now, queue=(*stays, *(w for w in now.queue if w not in queue))) if before else now


def spoilt(failure: Ds01Error, plan: Plan) -> Collection[int]:
    """The GPU that could not be cut; where it is not known, all that were to be."""
    gpu = failure.details.get("gpu")
    return [gpu] if isinstance(gpu, int) else plan.cuts


def refused_for(plan: Plan, failure: Ds01Error) -> Plan:
    """The plan in which nobody waits for a GPU that cannot be cut: who is not served is refused for that."""
    outcomes = [o if o.ok else not_cut(o, failure) for o in plan.outcomes]
    lost = {o.name.full for o in outcomes if not o.ok}
    queue = tuple(w for w in plan.ledger.queue if w.request.container not in lost)
    return replace(plan, outcomes=outcomes, ledger=replace(plan.ledger, queue=queue))


def not_cut(outcome: Outcome, exc: Ds01Error) -> Outcome:
    """The refusal of a request for which no GPU could be cut."""
    message = f"No device could be cut for {outcome.name.full}: {exc.message}"
    return refused(outcome.name, Refusal(exc.reason, message, exc.hint), outcome.before)


def followed(situation: placement.Situation, outcome: Outcome) -> placement.Situation:
    """The situation once the outcome is carried out."""
    if outcome.cuts:
        from . import on_demand

        situation = on_demand.imagined(situation, outcome.cuts)
    now = after(situation.ledger, outcome)
    return situation if now is situation.ledger else replace(situation, ledger=now, queue=now.queue)


def differs(one: Ledger, other: Ledger) -> bool:
    return (one.allocations, one.queue) != (other.allocations, other.queue)


def granted(plan: Plan) -> list[str]:
    """The UUIDs of the devices that somebody gets by this."""
    granted = [
        o.allocation for o in plan.outcomes if o.ok and o.reason == "granted" and not o.is_uncut and o.allocation
    ]
    return [device.uuid for allocation in granted for device in allocation.devices]


def granting(outcome: Outcome) -> bool:
    """Grants, and those asked for again: that mends a CDI file that somebody removed."""
    return outcome.ok and outcome.reason in ("granted", "already_allocated")


def to_project(plan: Plan, before: Ledger) -> Iterator[Allocation]:
    """Whose CDI devices are to be written: moved, renamed and asked for; after a reboot everybody's."""
    asked = {o.name.full for o in plan.outcomes if granting(o)}
    for name, allocation in plan.ledger.allocations.items():
        known = before.allocations.get(name)
        if plan.rebooted or name in asked or name in plan.mended or (known and known.devices != allocation.devices):
            yield allocation


def uuids(allocation: Allocation) -> tuple[str, ...]:
    """What a CDI device is written from."""
    return tuple(device.uuid for device in allocation.devices)


def all_there(allocation: Allocation, inventory: Inventory) -> bool:
    """Whether this host has its devices: NVIDIA's spec may be older than a layout, or than a boot."""
    return all(inventory.find(device) for device in allocation.devices)
