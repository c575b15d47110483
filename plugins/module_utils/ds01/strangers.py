"""Who uses GPUs without DS01, each with all that it uses, and who of them is to be stopped. Pure.

`occupancy` keeps devices from being granted, and says who is on one in a phrase, whoever it is. This tells DS01's own
containers from everybody else, for what is stopped by mistake is somebody's work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import occupancy
from .drift import Action
from .model import Device, Inventory, Ledger
from .occupancy import GpuUse, Program

_MOST_NAMED = 3
"""So many are named in a sentence; all are in an action's details, and each has an event."""


@dataclass(frozen=True)
class Stranger:
    """Somebody who uses these devices (by UUID) without DS01: a container, or a process that is in none.

    `user` is the login of a process, and of a container's first process that can be seen. `spared`: it is never
    stopped. One of DS01's own containers that runs without an allocation is among them.
    """

    who: str
    devices: tuple[str, ...] = ()
    container: str = ""
    container_id: str = ""
    program: Program | None = None
    spared: bool = False
    user: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON: what does not apply, or is not known, is null."""
        return {
            "container": self.container or None,
            "pid": self.program.pid if self.program else None,
            "program": (self.program.name or None) if self.program else None,
            "user": self.user or None,
        }


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
    """Everybody who uses a device without DS01, containers first. `processes` are pids by device UUID; `programs` are
    all of those, and the containers' first processes as far as they are known."""
    minors = {gpu.uuid: gpu.minor for gpu in inventory.gpus}
    found: dict[tuple[str, str | int], Stranger] = {}
    for use in uses:
        devices = [d.uuid for d in inventory.devices if occupancy.covers(use, d, minors.get(d.gpu_uuid))]
        if devices:
            first = programs.get(use.pid)
            found["container", use.id or use.container] = Stranger(
                occupancy.in_words(use),
                tuple(devices),
                use.container,
                use.id,
                spared=use.id in around.own or not use.id,
                user=first.user if first else "",
            )
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
        return Stranger(program.who, program=program, spared=program.unit in around.services, user=program.user)
    if name in around.harmless:
        return None
    who = f"container {name} (its process {program.pid})"
    return Stranger(who, container=name, container_id=program.container_id, user=program.user)


def _key(stranger: Stranger) -> tuple[str, str | int]:
    if stranger.program:
        return "process", stranger.program.pid
    return "container", stranger.container_id


def seen(strangers: Sequence[Stranger], inventory: Inventory, ledger: Ledger) -> Iterator[Action]:
    """Each device that somebody uses without DS01, and by whom: to be reported. The action has a user where it is one
    alone; its details name them all (`by`)."""
    for device in sorted(inventory.devices, key=lambda d: d.index):
        on_it = _on(device, strangers)
        if on_it:
            users = {stranger.user for stranger in on_it}
            message = _sentence(device, on_it, ledger)
            details = {"by": [stranger.record() for stranger in on_it]}
            yield Action("unmanaged.seen", device.id, message, users.pop() if len(users) == 1 else "", details)


def news(
    strangers: Sequence[Stranger], inventory: Inventory, ledger: Ledger, told: Mapping[str, Collection[str]]
) -> Iterator[Action]:
    """The same as events, one for each user of a device who is not among those told of before (`names`)."""
    for device in sorted(inventory.devices, key=lambda d: d.index):
        for stranger in _on(device, strangers):
            if stranger.who not in told.get(device.id, ()):
                message = _sentence(device, [stranger], ledger)
                yield Action("unmanaged.seen", device.id, message, stranger.user, stranger.record())


def names(strangers: Sequence[Stranger], inventory: Inventory) -> dict[str, list[str]]:
    """Who uses which device without DS01, in phrases, by the device's id: what to remember."""
    found = {device.id: [stranger.who for stranger in _on(device, strangers)] for device in inventory.devices}
    return {device: who for device, who in found.items() if who}


def _on(device: Device, strangers: Iterable[Stranger]) -> list[Stranger]:
    return [stranger for stranger in strangers if device.uuid in stranger.devices]


def _sentence(device: Device, on_it: Sequence[Stranger], ledger: Ledger) -> str:
    holder = ledger.holder_of(device)
    whose = f", and is {holder.container}'s" if holder else ""
    return f"Device {device.id} is used without DS01 by {_listed([s.who for s in on_it])}{whose}."


def _listed(phrases: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b, c and 2 more`."""
    named, more = phrases[:_MOST_NAMED], len(phrases) - _MOST_NAMED
    words = [*named, f"{more} more"] if more > 0 else list(named)
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


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
            what: dict[str, Any] = {"container_id": stranger.container_id}
            yield Action("unmanaged.stopped", stranger.container, message, stranger.user, what)
        elif program.started is not None and asked.get(str(program.pid)) != program.started:
            message = f"{_capital(stranger.who)} is asked to end: it uses {where} without DS01."
            what = {"pid": program.pid, "started": program.started}
            yield Action("unmanaged.stopped", f"process {program.pid}", message, stranger.user, what)


def _capital(phrase: str) -> str:
    return f"{phrase[0].upper()}{phrase[1:]}"
