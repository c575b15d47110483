"""One look at a host: what the engine runs and what the driver has. Reads only; an adapter over adapters.

It is taken before the ledger's lock, and again under it only when the ledger changed in between:
whatever DS01 does to containers or devices shows there first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from . import engine, nvml
from .lifecycle import Seen
from .model import Inventory, Ledger
from .transitions import Change

_NO_GPUS = Inventory((), ())


@dataclass(frozen=True)
class Observation:
    """`seen` are DS01's containers by name, None where no engine was asked; `occupied` says who uses
    a device (by UUID) without DS01."""

    inventory: Inventory = _NO_GPUS
    containers: Sequence[engine.Container] = ()
    seen: Mapping[str, Seen] | None = None
    occupied: Mapping[str, str] = field(default_factory=dict)

    @property
    def running(self) -> frozenset[str]:
        """Names of the containers that run, or are paused."""
        return frozenset(c.name for c in self.containers if c.status in engine.RUNNING)

    def completed(self, change: Change) -> Change:
        """A stop's own time, where whoever reports it gives none: Docker's FinishedAt."""
        container = (self.seen or {}).get(change.name.full)
        if change.state != "held" or change.stopped_at or not (container and container.stopped):
            return change
        return replace(change, stopped_at=container.finished_at)


class Observer:
    """Looks at the host; `get_engine` connects when first needed."""

    def __init__(self, get_engine: Callable[[], engine.Engine]) -> None:
        self._engine = get_engine

    def look(self, now: Ledger, driver: nvml.Nvml | None, stopping: Collection[str] = ()) -> Observation:
        """The engine and the driver. `stopping` names containers whose stop is being reported."""
        containers = self._engine().containers()
        seen = {c.name: self._seen(c, now, c.name in stopping) for c in containers}
        return Observation(driver.inventory() if driver else _NO_GPUS, containers, seen)

    def without_engine(self, driver: nvml.Nvml | None) -> Observation:
        """The driver alone."""
        return Observation(driver.inventory() if driver else _NO_GPUS)

    def _seen(self, container: engine.Container, now: Ledger, stopping: bool) -> Seen:
        """One container; when it stopped is asked for only where the ledger does not know it."""
        allocation = now.allocations.get(container.name)
        stopped = container.status in engine.STOPPED
        if stopped and (stopping or (allocation and allocation.status != "held")):
            container = self._engine().container(container.name) or container
        return Seen(container.id, container.status in engine.RUNNING, stopped, container.finished_at)
