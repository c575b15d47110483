"""The nouns: devices, allocations, requests, the ledger. Frozen, pure, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from fractions import Fraction

FULL = "full"
"""The profile of a GPU that is not cut: the whole device."""


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
        return int(gpu), int(mig) if mig else -1

    @property
    def is_full(self) -> bool:
        return self.profile == FULL

    def same_as(self, recorded: Device) -> bool:
        """Whether a record means this device."""
        return self.uuid == recorded.uuid if recorded.uuid else self.id == recorded.id


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

    def find(self, recorded: Device) -> Device | None:
        """The device that a record names: by UUID, or by id where it has none."""
        return next((d for d in self.devices if d.same_as(recorded)), None)

    def locate(self, recorded: Device) -> Device | None:
        """The device that a record means, as it is now: the one it names, else the one cut to the same
        profile in the same place of the same GPU. A reboot gives MIG devices new UUIDs and indices."""
        found = self.find(recorded)
        if found or recorded.placement is None:
            return found
        identity = (recorded.gpu_uuid, recorded.profile, recorded.placement)
        return next((d for d in self.devices if (d.gpu_uuid, d.profile, d.placement) == identity), None)


@dataclass(frozen=True)
class Allocation:
    """Devices granted to one container.

    pending: granted, its container was not started yet; active: it was; held: it stopped.
    """

    container: str
    user: str
    devices: tuple[Device, ...]
    priority: int
    allocated_at: datetime
    stopped_at: datetime | None = None
    container_id: str | None = None
    pending: bool = False

    @property
    def status(self) -> str:
        if self.stopped_at is not None:
            return "held"
        return "pending" if self.pending else "active"

    @property
    def gpu_id(self) -> str:
        return ",".join(d.id for d in self.devices)


@dataclass(frozen=True)
class Ledger:
    """Who was granted what. `generation` grows by one with every change."""

    allocations: Mapping[str, Allocation] = field(default_factory=dict)
    generation: int = 0
    boot_id: str = ""
    last_updated: datetime | None = None

    def of_user(self, user: str) -> tuple[Allocation, ...]:
        return tuple(a for a in self.allocations.values() if a.user == user)

    def holder_of(self, device: Device) -> Allocation | None:
        """Who has the device. A record of the replaced system names no UUID: there the id counts."""
        return next((a for a in self.allocations.values() if any(device.same_as(d) for d in a.devices)), None)

    def with_allocation(self, allocation: Allocation) -> Ledger:
        return replace(self, allocations={**self.allocations, allocation.container: allocation})

    def without(self, container: str) -> Ledger:
        return replace(self, allocations={k: a for k, a in self.allocations.items() if k != container})


@dataclass(frozen=True)
class Request:
    """One container's wish. `profile`: a MIG profile, `full`, or None for what the limits say."""

    container: str
    user: str
    gpus: int = 1
    profile: str | None = None


@dataclass(frozen=True)
class Grant:
    devices: tuple[Device, ...]
    reason: str = "granted"


@dataclass(frozen=True)
class Refusal:
    """Why not, in a reason code and a sentence; `available_at` when a hold of the user's class ends."""

    reason: str
    message: str
    hint: str = ""
    available_at: datetime | None = None
