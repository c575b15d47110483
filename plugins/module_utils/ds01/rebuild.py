"""The ledger from what the containers say, when the ledger is gone. Pure.

A container's claim names its devices by identity (parent GPU, profile, placement), because a MIG
device gets a new UUID and index whenever its GPU is cut anew. What cannot be found again, or is
claimed twice, is reported and not restored: nothing is granted from a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from . import records
from .model import Allocation, Device, Inventory


@dataclass(frozen=True)
class Claim:
    """What one container on the engine says of itself.

    `stopped_at` is set once it stopped; `pending_since` for one that never ran, and may be about to.
    """

    container: str
    container_id: str
    user: str
    devices: tuple[Device, ...]
    priority: int
    created_at: datetime
    stopped_at: datetime | None = None
    pending_since: datetime | None = None

    @property
    def runs(self) -> bool:
        return self.stopped_at is None and self.pending_since is None


@dataclass(frozen=True)
class Rebuilt:
    """The allocations after it, the containers that got theirs back, and a sentence for each that did not."""

    allocations: Mapping[str, Allocation]
    restored: tuple[str, ...]
    problems: tuple[str, ...]


def rebuild(claims: Iterable[Claim], inventory: Inventory, known: Mapping[str, Allocation]) -> Rebuilt:
    """What is known already, and every further claim whose devices are there and nobody else's:
    running containers come first, then the older."""
    allocations = dict(known)
    taken = {d.uuid: a.container for a in known.values() for d in a.devices}
    problems: list[str] = []
    new = (claim for claim in claims if claim.container not in known)
    for claim in sorted(new, key=lambda c: (not c.runs, c.created_at, c.container)):
        found = [inventory.locate(device) for device in claim.devices]
        problem = _problem(claim, found, taken)
        if problem:
            problems.append(f"{claim.container}: {problem}")
            continue
        devices = tuple(d for d in found if d)
        taken.update({d.uuid: claim.container for d in devices})
        allocations[claim.container] = Allocation(
            container=claim.container,
            user=claim.user,
            devices=devices,
            priority=claim.priority,
            allocated_at=claim.created_at,
            stopped_at=claim.stopped_at,
            container_id=claim.container_id,
            pending_since=claim.pending_since,
        )
    restored = tuple(sorted(name for name in allocations if name not in known))
    return Rebuilt(allocations, restored, tuple(problems))


def _problem(claim: Claim, found: list[Device | None], taken: Mapping[str, str]) -> str | None:
    if not claim.devices:
        return "nothing says which devices it had"
    for recorded, device in zip(claim.devices, found, strict=True):
        if device is None:
            return f"its device {recorded.id} ({recorded.profile}) is not on this host any more"
        if device.uuid in taken:
            return f"its device {device.id} is already {taken[device.uuid]}'s"
    return None


def devices_of(written: Any) -> tuple[Device, ...]:
    """The devices in a container's label or metadata record; none where that cannot be read."""
    try:
        return tuple(records.device(raw) for raw in written)
    except (TypeError, ValueError, KeyError, AttributeError):
        return ()
