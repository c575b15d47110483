"""The nouns: devices, allocations, requests, the ledger. Frozen, pure, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mig import Placed

FULL = "full"
"""The profile of a GPU that is not cut: the whole device."""

NEW = "new"
"""What a MIG device that is yet to be cut has for its index: `0:new`."""
_AFTER_ALL = 1 << 16


@dataclass(frozen=True)
class Device:
    """What can be allocated: a whole GPU (`0`) or a MIG device (`0:1`), known by its UUID.

    `equivalents` is its share of a GPU (2g on seven slices: 2/7), `placement` the memory slices it
    occupies (start, size), `health` one of ok, suspect, failed, lost.
    """

    id: str
    uuid: str
    gpu_uuid: str
    profile: str
    placement: tuple[int, int] | None = None
    equivalents: Fraction = Fraction(1)
    memory_mib: int = 0
    health: str = "ok"

    @property
    def index(self) -> tuple[int, int]:
        """(GPU index, MIG device index or -1): numbers, so that 10 sorts after 2."""
        gpu, _, mig = self.id.partition(":")
        return int(gpu), _AFTER_ALL if mig == NEW else int(mig) if mig else -1

    @property
    def is_full(self) -> bool:
        return self.profile == FULL

    @property
    def is_new(self) -> bool:
        """Whether it is yet to be cut."""
        return self.id.endswith(f":{NEW}")


@dataclass(frozen=True)
class Gpu:
    """A physical GPU. `mig` is its current mode; a GPU in MIG mode is itself never allocated."""

    index: int
    uuid: str
    name: str
    minor: int
    mig: bool
    memory_mib: int
    health: str = "ok"
    health_reason: str = ""
    utilization: int | None = None


@dataclass(frozen=True)
class Inventory:
    """What NVML says is there, read in one session."""

    gpus: tuple[Gpu, ...]
    devices: tuple[Device, ...]
    driver_version: str = ""

    @cached_property
    def _index(self) -> Mapping[object, Device]:
        """Devices by everything that a record may name them by."""
        index: dict[object, Device] = {}
        for device in self.devices:
            for key in (device.uuid, device.id, (device.gpu_uuid, device.profile, device.placement)):
                index.setdefault(key, device)
        return index

    def find(self, recorded: Device) -> Device | None:
        """The device that a record names: by UUID, or by id where it has none."""
        return self._index.get(recorded.uuid or recorded.id)

    def locate(self, recorded: Device) -> Device | None:
        """The device that a record means, as it is now: the one it names, else the one cut to the same
        profile in the same place of the same GPU. A reboot gives MIG devices new UUIDs and indices."""
        found = self.find(recorded)
        if found or recorded.placement is None:
            return found
        return self._index.get((recorded.gpu_uuid, recorded.profile, recorded.placement))


@dataclass(frozen=True)
class Allocation:
    """Devices granted to one container.

    pending: its container is about to be started, since `pending_since`; active: it was; held: it stopped.
    """

    container: str
    user: str
    devices: tuple[Device, ...]
    priority: int
    allocated_at: datetime
    stopped_at: datetime | None = None
    container_id: str | None = None
    pending_since: datetime | None = None

    @property
    def status(self) -> str:
        if self.stopped_at is not None:
            return "held"
        return "active" if self.pending_since is None else "pending"

    @property
    def gpu_id(self) -> str:
        return ",".join(d.id for d in self.devices)


@dataclass(frozen=True)
class Request:
    """One container's wish. `profile`: a MIG profile, `full`, or None for what the limits say."""

    container: str
    user: str
    gpus: int = 1
    profile: str | None = None


@dataclass(frozen=True)
class Process:
    """A process of this boot: its id, and when it started (clock ticks since boot), for ids are used again."""

    pid: int
    started: int


@dataclass(frozen=True)
class Ticket:
    """The right to wait: from `since` until `until`, as long as the process lives."""

    since: datetime
    until: datetime
    process: Process


@dataclass(frozen=True)
class Waiter:
    """A request in the queue, with the priority and the number of devices (None: unlimited) it may have."""

    request: Request
    priority: int
    max_gpus: int | None
    ticket: Ticket


@dataclass(frozen=True)
class Ledger:
    """Who was granted what, and who waits, in order of arrival. `generation` grows by one with every change.

    `boot_id` is the boot in which the devices were last looked up, `engine_id` the engine that has the containers.
    """

    allocations: Mapping[str, Allocation] = field(default_factory=dict)
    generation: int = 0
    boot_id: str = ""
    last_updated: datetime | None = None
    queue: tuple[Waiter, ...] = ()
    engine_id: str = ""

    @cached_property
    def _by_user(self) -> Mapping[str, tuple[Allocation, ...]]:
        found: dict[str, list[Allocation]] = {}
        for allocation in self.allocations.values():
            found.setdefault(allocation.user, []).append(allocation)
        return {user: tuple(allocations) for user, allocations in found.items()}

    @cached_property
    def _by_device(self) -> Mapping[str, Allocation]:
        return {d.uuid or d.id: a for a in self.allocations.values() for d in a.devices}

    @cached_property
    def load(self) -> Mapping[str, int]:
        """How many devices of each GPU are taken, by the GPU's UUID."""
        return Counter(d.gpu_uuid for a in self.allocations.values() for d in a.devices)

    def missing(self, inventory: Inventory) -> Sequence[tuple[Device, Allocation]]:
        """What somebody has and the host does not show, such as after a reset of its GPU."""
        recorded = ((device, a) for a in self.allocations.values() for device in a.devices)
        return [(device, a) for device, a in recorded if inventory.find(device) is None]

    def of_user(self, user: str) -> tuple[Allocation, ...]:
        return self._by_user.get(user, ())

    def holder_of(self, device: Device) -> Allocation | None:
        """Who has the device. A record of the replaced system names no UUID: there the id counts."""
        return self._by_device.get(device.uuid) or self._by_device.get(device.id)

    def with_allocation(self, allocation: Allocation) -> Ledger:
        return replace(self, allocations={**self.allocations, allocation.container: allocation})

    def without(self, *containers: str) -> Ledger:
        """The ledger without these containers' allocations."""
        return replace(self, allocations={k: a for k, a in self.allocations.items() if k not in containers})


@dataclass(frozen=True)
class Grant:
    """The devices, and the holds that gave way to it. `cuts` says how GPUs, by index, have to be cut first:
    devices of theirs are `0:new` until then."""

    devices: tuple[Device, ...]
    given_up: tuple[Allocation, ...] = ()
    cuts: Mapping[int, Placed] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """Why not, in a reason code and a sentence.

    `available_at` is the earliest end of a hold or reservation in the way; `retry` says that the same
    request may be granted later, without anybody changing limits or hardware.
    """

    reason: str
    message: str
    hint: str = ""
    available_at: datetime | None = None
    retry: bool = False
