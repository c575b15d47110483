"""Who uses GPUs without DS01, each with all that it uses, and who of them is to be stopped. Pure.

`occupancy` keeps devices from being granted, and says who is on one in a phrase, whoever it is. This tells DS01's own
containers from everybody else, for what is stopped by mistake is somebody's work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from . import occupancy
from .drift import Action
from .model import Inventory, Ledger
from .occupancy import GpuUse, Program


@dataclass(frozen=True)
class Stranger:
    """Somebody who uses these devices (by UUID) without DS01: a container, or a process that is in none.

    `spared`: it is never stopped. One of DS01's own containers that runs without an allocation is among them.
    """

    who: str
    devices: tuple[str, ...] = ()
    container: str = ""
    container_id: str = ""
    program: Program | None = None
    spared: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What there is besides the ledger: `own` are the ids of DS01's containers, `outside` the names of all others by
    id, `harmless` the names of those that only watch; `services` are units that may hold a GPU."""

    own: Collection[str] = ()
    outside: Mapping[str, str] = field(default_factory=dict)
    harmless: Collection[str] = ()
    services: Collection[str] = ()


def find(
    inventory: Inventory,
    ledger: Ledger,
    uses: Iterable[GpuUse],
    processes: Mapping[str, Sequence[int]],
    programs: Mapping[int, Program],
    around: Surroundings,
) -> tuple[Stranger, ...]:
    """Everybody who uses a device without DS01, containers first. `processes` are pids by device UUID."""
    minors = {gpu.uuid: gpu.minor for gpu in inventory.gpus}
    found: dict[tuple[str, str | int], Stranger] = {}
    for use in uses:
        devices = [d.uuid for d in inventory.devices if occupancy.covers(use, d, minors.get(d.gpu_uuid))]
        if devices:
            spared = use.id in around.own or not use.id
            container = Stranger(occupancy.in_words(use), tuple(devices), use.container, use.id, spared=spared)
            found["container", use.id or use.container] = container
    for device in inventory.devices:
        holder = ledger.holder_of(device)
        in_use = holder is not None and holder.status != "held"
        for pid in processes.get(device.uuid, ()):
            stranger = _behind(programs[pid], around)
            if stranger and (programs[pid].started is not None or not in_use):
                key = _key(stranger)
                known = found.get(key, stranger)
                found[key] = replace(known, devices=tuple(dict.fromkeys((*known.devices, device.uuid))))
    return tuple(found[key] for key in sorted(found, key=lambda key: (key[0], str(key[1]).zfill(20))))


def _behind(program: Program, around: Surroundings) -> Stranger | None:
    """Whom a process belongs to; None for DS01's own containers, and those that only watch."""
    if program.container_id in around.own:
        return None
    name = around.outside.get(program.container_id)
    if name is None:
        return Stranger(program.who, program=program, spared=program.unit in around.services)
    if name in around.harmless:
        return None
    return Stranger(f"container {name} (its process {program.pid})", container=name, container_id=program.container_id)


def _key(stranger: Stranger) -> tuple[str, str | int]:
    if stranger.program:
        return "process", stranger.program.pid
    return "container", stranger.container_id


def seen(strangers: Sequence[Stranger], inventory: Inventory, ledger: Ledger) -> Iterator[Action]:
    """Each device that somebody uses without DS01, and by whom: to be reported."""
    for device in sorted(inventory.devices, key=lambda d: d.index):
        users = [stranger for stranger in strangers if device.uuid in stranger.devices]
        if users:
            who = occupancy.and_more(users[0].who, len(users))
            holder = ledger.holder_of(device)
            whose = f", and is {holder.container}'s" if holder else ""
            message = f"Device {device.id} is used without DS01 by {who}{whose}."
            yield Action("unmanaged.seen", device.id, message, details={"by": who})


def stops(strangers: Iterable[Stranger], inventory: Inventory, asked: Mapping[str, int]) -> Iterator[Action]:
    """Who is to be stopped: containers, by the engine, and processes, which are asked to end once. `asked` says which
    were: when the process began, by its number."""
    ids = {device.uuid: device.id for device in inventory.devices}
    for stranger in strangers:
        where = ", ".join(ids[uuid] for uuid in stranger.devices)
        program = stranger.program
        if stranger.spared:
            continue
        if program is None:
            message = f"{_capital(stranger.who)} is stopped: it uses {where} without DS01."
            yield Action(
                "unmanaged.stopped", stranger.container, message, details={"container_id": stranger.container_id}
            )
        elif program.started is not None and asked.get(str(program.pid)) != program.started:
            message = f"{_capital(stranger.who)} is asked to end: it uses {where} without DS01."
            details = {"pid": program.pid, "started": program.started}
            yield Action("unmanaged.stopped", f"process {program.pid}", message, program.user, details)


def _capital(phrase: str) -> str:
    return f"{phrase[0].upper()}{phrase[1:]}"
