"""What time and the engine have made of allocations that nobody asked about. Pure.

Level-triggered: whoever asks for a device first lets this say which allocations are over, and which
containers stopped or started behind DS01's back. Holds are measured from Docker's own FinishedAt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from . import names, units
from .limits import Config
from .model import Allocation, Ledger
from .transitions import Outcome, hold_end

SETTLED = timedelta(seconds=30)
"""A container that stopped less than this ago may be in the middle of a restart."""


@dataclass(frozen=True)
class Seen:
    """A container as the engine shows it; `finished_at` is when it last stopped."""

    id: str
    running: bool
    stopped: bool
    finished_at: datetime | None = None


def due(
    now: Ledger, config: Config, seen: Mapping[str, Seen] | None, time: datetime, asking: Collection[str]
) -> Iterator[Outcome]:
    """What has become of each allocation, where that differs from the ledger.

    `seen` are the engine's containers by name (None: no engine is asked); those that are `asking` are
    left to their own request.
    """
    for container, allocation in now.allocations.items():
        if container not in asking:
            outcome = _due(allocation, config, seen, time)
            if outcome:
                yield outcome


def ends(now: Ledger, config: Config) -> dict[str, datetime]:
    """When each allocation whose container does not run is over, by container; one without an end is absent."""
    found = ((a.container, _pending_end(a, config) or hold_end(a, config)) for a in now.allocations.values())
    return {container: end for container, end in found if end is not None}


def _pending_end(allocation: Allocation, config: Config) -> datetime | None:
    """Until when a grant waits for its container to be started."""
    since, timeout = allocation.pending_since, config.policies.pending_timeout
    return None if since is None or timeout is None else units.after(since, timeout)


def _due(allocation: Allocation, config: Config, seen: Mapping[str, Seen] | None, time: datetime) -> Outcome | None:
    container = (seen or {}).get(allocation.container)
    if container and container.running:
        return _runs(allocation, container) if allocation.status != "active" else None
    if allocation.pending_since is not None:
        return _pending(allocation, container, config, time)
    if seen is not None and container is None and allocation.container_id:
        return _over(allocation, "its container was removed")
    if allocation.status == "active":
        settled = container and container.finished_at and container.finished_at + SETTLED <= time
        return _stopped(allocation, container, config, time) if container and container.stopped and settled else None
    return _hold(allocation, container, config, time)


def _hold(held: Allocation, container: Seen | None, config: Config, time: datetime) -> Outcome | None:
    """A hold that may be over, or began anew: its container was started and stopped again, and nobody saw it run."""
    end = hold_end(held, config)
    if end is None or end > time:
        return None
    if container and _ran_once_more(held, container):
        return _stopped(held, container, config, time)
    return _over(held, f"its hold ended at {units.format_time(end)}")


def _ran_once_more(held: Allocation, container: Seen) -> bool:
    finished = container.finished_at
    return bool(finished and held.stopped_at and finished.replace(microsecond=0) > held.stopped_at)


def _pending(allocation: Allocation, container: Seen | None, config: Config, time: datetime) -> Outcome | None:
    end = _pending_end(allocation, config)
    if end is None or time < end:
        return None
    if container is None:
        return _over(allocation, "its container was never made")
    if not container.stopped:
        return _over(allocation, "its container was never started")
    return _stopped(allocation, container, config, time)


def _stopped(allocation: Allocation, container: Seen, config: Config, time: datetime) -> Outcome:
    finished = (container.finished_at or time).replace(microsecond=0)
    held = replace(allocation, stopped_at=finished, pending_since=None, container_id=container.id)
    end = hold_end(held, config)
    if end is not None and end <= time:
        stopped = f"its container stopped at {units.format_time(finished)}"
        return _over(allocation, f"{stopped} and its hold ended at {units.format_time(end)}")
    until = f" until {units.format_time(end)}" if end else ""
    message = f"{allocation.container} stopped at {units.format_time(finished)}: held{until}."
    return Outcome(_name(allocation), "held", message, allocation=held, before=allocation)


def _runs(allocation: Allocation, container: Seen) -> Outcome:
    runs = replace(allocation, stopped_at=None, pending_since=None, container_id=container.id)
    message = f"{allocation.container} runs with {allocation.gpu_id}."
    return Outcome(_name(allocation), "active", message, allocation=runs, before=allocation)


def _over(allocation: Allocation, why: str) -> Outcome:
    return Outcome(_name(allocation), "expired", f"{allocation.gpu_id} is free again: {why}.", before=allocation)


def _name(allocation: Allocation) -> names.ContainerName:
    return names.as_called(allocation.container, allocation.user)
