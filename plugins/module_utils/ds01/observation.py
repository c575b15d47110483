"""One look at a host: what the engine runs and what the driver has. Reads only; an adapter over adapters.

It is taken before the ledger's lock, and again under it only when the ledger changed in between:
whatever DS01 does to containers or devices shows there. What is granted is looked up once more, for other
programs cut GPUs, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import claims, engine, nvml, occupancy, processes
from .errors import Ds01Error
from .lifecycle import Seen
from .model import Inventory, Ledger
from .occupancy import GpuUse
from .transitions import Change

_NO_GPUS = Inventory((), ())


@dataclass(frozen=True)
class Observation:
    """`seen` are DS01's containers by name, None where no engine was asked; `occupied` says who uses
    a device (by UUID) without DS01; `engine_id` names the engine.

    `others` are the containers outside DS01, `uses` what those of them that run were promised (and DS01's own that
    run without an allocation), `processes` the pids on each device by UUID, whosever they are."""

    inventory: Inventory = _NO_GPUS
    containers: Sequence[engine.Container] = ()
    seen: Mapping[str, Seen] | None = None
    occupied: Mapping[str, str] = field(default_factory=dict)
    engine_id: str = ""
    others: Sequence[engine.Container] = ()
    uses: Sequence[GpuUse] = ()
    processes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def running(self) -> frozenset[str]:
        """What the containers that run, or are paused, are called."""
        return frozenset(c.called for c in self.containers if c.status in engine.RUNNING)

    def completed(self, change: Change) -> Change:
        """A stop's own time, where whoever reports it gives none: Docker's FinishedAt."""
        container = (self.seen or {}).get(change.name.full)
        if change.state != "held" or change.stopped_at or not (container and container.stopped):
            return change
        return replace(change, stopped_at=container.finished_at)


class Observer:
    """Looks at the host; `get_engine` connects when first needed, `metadata` holds containers' records,
    `doubtful` says of which GPUs, by UUID, it is not known that they are cut as they should be, and why."""

    def __init__(
        self,
        get_engine: Callable[[], engine.Engine],
        metadata: Path,
        projected: claims.Projected,
        doubtful: Callable[[Inventory], Mapping[str, str]],
    ) -> None:
        self._engine = get_engine
        self._metadata = metadata
        self._projected = projected
        self._doubtful = doubtful
        self._uses: dict[str, GpuUse | None] = {}

    def look(
        self, now: Ledger, driver: nvml.Nvml | None, *, stopping: Collection[str] = (), harmless: Collection[str] = ()
    ) -> Observation:
        """The engine and the driver. `stopping` names containers of which it matters when they stopped, `harmless`
        those outside DS01 that may see GPUs without using them."""
        listing = self._engine().listing()
        seen = {name: self._seen(name, c, now, name in stopping) for name, c in _standing(listing.ours).items()}
        identity = self._identity(now, seen)
        found = Observation(containers=listing.ours, seen=seen, engine_id=identity, others=listing.others)
        if driver is None:
            return found
        foreign = [c for c in listing.others if c.status in engine.RUNNING and c.name not in harmless]
        loose = [c for c in listing.ours if _is_loose(c, now)]
        uses = [*map(self._use, (*foreign, *loose)), *(self._leftover(c) for c in loose if c.own)]
        return self._with_devices(driver, found, [use for use in uses if use])

    def without_engine(self, driver: nvml.Nvml | None) -> Observation:
        """The driver alone."""
        return self._with_devices(driver, Observation(), []) if driver else Observation()

    def _with_devices(self, driver: nvml.Nvml, seen: Observation, uses: Sequence[GpuUse]) -> Observation:
        inventory = driver.inventory()
        inventory = _marked(inventory, self._doubtful(inventory))
        uses = _as_opened(uses, inventory, driver)
        running = driver.processes(inventory)
        occupied = occupancy.occupied(inventory, uses, running, processes.describe)
        return replace(seen, inventory=inventory, occupied=occupied, uses=uses, processes=running)

    def _seen(self, name: str, container: engine.Container, now: Ledger, stopping: bool) -> Seen:
        """One container; when it stopped is asked for only where the ledger does not know it."""
        allocation = now.allocations.get(name)
        stopped = container.status in engine.STOPPED
        if stopped and (stopping or (allocation and allocation.status != "held")):
            container = self._engine().container(container.name) or container
        return Seen(container.id, container.status in engine.RUNNING, stopped, container.finished_at)

    def _identity(self, now: Ledger, seen: Mapping[str, Seen]) -> str:
        """The engine's, asked for when the ledger does not name it, or misses a container: on another
        engine every container would look removed. Raises Ds01Error `engine_unavailable`."""
        missing = any(a.container_id and a.container not in seen for a in now.allocations.values())
        if now.engine_id and not missing:
            return now.engine_id
        identity = self._engine().identity()
        if now.engine_id and identity != now.engine_id:
            raise Ds01Error(
                "engine_unavailable",
                "This is another Docker engine than the one that has the ledger's containers.",
                "Check DOCKER_HOST. If the engine was set up anew, say so with: ds01 rebuild",
            )
        return identity

    def _use(self, container: engine.Container) -> GpuUse | None:
        """What a container outside DS01 was promised at its creation; that never changes, so it is asked once."""
        if container.id not in self._uses:
            self._uses[container.id] = self._engine().gpu_use(container.id)
        return self._uses[container.id]

    def _leftover(self, container: engine.Container) -> GpuUse:
        """One of DS01's that runs without an allocation: it has what it was last given."""
        devices = claims.devices_in_use(container, self._metadata, self._projected)
        return GpuUse(
            container.name, names=tuple(d.uuid for d in devices), how="without an allocation", id=container.id
        )


def _as_opened(uses: Sequence[GpuUse], inventory: Inventory, driver: nvml.Nvml) -> Sequence[GpuUse]:
    """The uses, where a MIG index stands for the device that was called so when the container started."""
    if not any(map(occupancy.by_mig_index, uses)):
        return uses
    numbers = driver.capabilities(inventory)
    return [
        occupancy.as_opened(use, processes.capabilities(use.pid), numbers) if occupancy.by_mig_index(use) else use
        for use in uses
    ]


def _standing(containers: Sequence[engine.Container]) -> Mapping[str, engine.Container]:
    """Which container is meant by a name: one that was set aside until the new one was started, so that it keeps its
    device where no new one comes."""
    named = {c.name: c for c in containers}
    aside = {c.called: c for c in containers if c.called != c.name}
    return {**named, **{name: c for name, c in aside.items() if name not in named or named[name].status == "created"}}


def _is_loose(container: engine.Container, now: Ledger) -> bool:
    """Whether one that carries DS01's label may have a device that the ledger does not know of."""
    runs = container.status in engine.RUNNING and container.called not in now.allocations
    return runs and (container.gpus > 0 or not container.own)


def _marked(inventory: Inventory, doubtful: Mapping[str, str]) -> Inventory:
    """The inventory in which such a GPU is offered to nobody."""
    if not doubtful:
        return inventory
    gpus = [
        replace(gpu, health="suspect", health_reason=doubtful[gpu.uuid])
        if gpu.uuid in doubtful and gpu.health == "ok"
        else gpu
        for gpu in inventory.gpus
    ]
    devices = [
        replace(d, health="suspect") if d.gpu_uuid in doubtful and d.health == "ok" else d for d in inventory.devices
    ]
    return replace(inventory, gpus=tuple(gpus), devices=tuple(devices))
