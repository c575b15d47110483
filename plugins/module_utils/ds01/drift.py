"""What a server's containers and devices are, against what they should be: what reconcile does about it. Pure.

Level-triggered: everything follows from how things are now, nothing from what happened before, so it may run
at any time, and a second run right after the first finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from . import names, units
from .limits import Config, resolve
from .model import Allocation, Device
from .names import ContainerName
from .transitions import Outcome

REPORTS = ("device.missing", "unmanaged.seen", "slice.deferred", "slice.moved")
"""Kinds of actions that only tell."""

MEANT = ("slice.moved",)
"""Those of them that tell of what is as it should be, and stays so for as long as somebody wants."""

_SUBJECTS = {
    "service.started": "unit",
    "unmanaged.seen": "device",
    **dict.fromkeys(("slice.changed", "slice.removed"), "slice"),
}
"""What a kind of actions is about, in its events; all others are about a container."""

_RECORD_GRACE = timedelta(hours=1)

_KINDS = {"held": "gpu.held", "active": "gpu.active", "expired": "gpu.released"}


@dataclass(frozen=True)
class Action:
    """One thing that is done, or reported: what, on what, for whom, and a sentence for people."""

    kind: str
    subject: str
    message: str
    user: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def container(self) -> ContainerName:
        """The container that this is about."""
        return names.as_called(self.subject, self.user)

    def record(self) -> dict[str, Any]:
        """The action as JSON (`ds01 reconcile --json`, module results)."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "user": self.user or None,
            "msg": self.message,
            **self.details,
        }

    def event(self) -> dict[str, object]:
        """The action as the fields of its event, those that it does not have empty or None."""
        about = {_SUBJECTS.get(self.kind, "container"): self.subject}
        if self.kind == "unmanaged.stopped" and "pid" in self.details:
            about = {}
        who = {key: self.details[key] for key in ("container", "pid", "program") if key in self.details}
        reason = self.details.get("policy", "")
        return {"user": self.user, **about, **who, "reason": reason, "message": self.message}


@dataclass(frozen=True)
class Box:
    """One of DS01's containers. `finished_at` is when it last stopped; None: it never ran, or nobody asked.
    `put_back_at` is when it last got its name back: its user could not see it before."""

    name: str
    user: str
    id: str
    status: str
    created_at: datetime | None = None
    finished_at: datetime | None = None
    put_back_at: datetime | None = None


def of_outcome(outcome: Outcome) -> Action:
    """What became of an allocation by itself, as an action."""
    return Action(_KINDS[outcome.reason], outcome.name.full, outcome.message, outcome.name.user)


def of_projection(container: str, user: str) -> Action:
    """A CDI device that was not what the ledger says."""
    return Action("cdi.mended", container, f"The CDI device of {container} was not what the ledger says.", user)


def of_service(unit: str) -> Action:
    """A service that gave way to another MIG mode, and was not started again."""
    return Action("service.started", unit, f"{unit} was left stopped by an earlier change of the MIG layout.")


def of_missing(device: Device, whose: Allocation) -> Action:
    """A device that somebody has and the host does not show."""
    message = f"{device.id} ({device.profile}) of {whose.container} is missing: sudo ds01 restore cuts it again."
    return Action("device.missing", whose.container, message, whose.user, {"uuid": device.uuid, "device": device.id})


def of_aside(name: ContainerName, container_id: str, complete: bool) -> Action:
    """A container that a request which died had set aside for a new one: where that one is `complete` it goes, else it
    takes its name again."""
    details = {"container_id": container_id}
    if complete:
        old = names.set_aside(name.full)
        message = f"{old} is removed: another one took its place, and the request for that died."
        return Action("container.removed", old, message, name.user, details)
    message = f"{name.full} has its name again: the request that was to replace it died."
    return Action("container.put_back", name.full, message, name.user, details)


def of_records(written: Mapping[str, datetime], there: Collection[str], now: datetime) -> Iterator[Action]:
    """The records of containers that are gone, by who removed them past DS01. `written` is when each was last written,
    by container; `there` are all that anybody knows of. A young one may be of a container that is being made."""
    for container in sorted(written.keys() - set(there)):
        if not _is_younger(written[container], _RECORD_GRACE, now):
            yield Action("record.removed", container, f"{container} is gone, and its record is removed.")


def overdue(boxes: Iterable[Box], config: Config, now: datetime) -> Iterator[Action]:
    """The containers whose time is over: made and never started, or stopped long enough ago."""
    for box in boxes:
        why = _over(box, config, now)
        if why:
            details = {"container_id": box.id}
            yield Action("container.removed", box.name, f"{box.name} is removed: {why}.", box.user, details)


def may_be_overdue(box: Box, config: Config, now: datetime) -> bool:
    """Whether it is worth asking the engine for a container: one that stopped did so after it was made."""
    if box.status in _STOPPED:
        hold = resolve(config, box.user).container_hold_after_stop
        return hold is not None and not _is_younger(box.created_at, hold, now)
    return bool(_over(box, config, now))


_STOPPED = ("exited", "dead")


def _over(box: Box, config: Config, now: datetime) -> str:
    timeout = config.policies.created_timeout
    if box.status == "created":
        if timeout is None or box.created_at is None or _is_younger(box.created_at, timeout, now):
            return ""
        return f"it was made at {units.format_time(box.created_at)} and never started"
    hold = resolve(config, box.user).container_hold_after_stop
    if box.status not in _STOPPED or hold is None or box.finished_at is None:
        return ""
    if any(_is_younger(since, hold, now) for since in (box.finished_at, box.put_back_at)):
        return ""
    stopped = units.format_time(box.finished_at)
    return f"it stopped at {stopped}, and {box.user}'s stopped containers are kept for {units.format_duration(hold)}"


def _is_younger(since: datetime | None, than: timedelta, now: datetime) -> bool:
    return since is not None and now - since < than
