"""The outside world that a test plays: a driver whose devices come and go, an engine, a clock, processes.

It stands in for what DS01 asks: an NVML session, a Docker client, /proc. Devices are `Slot`s, places on
the hardware that keep their identity while UUIDs and indices change, so that "the same device twice"
can be told whatever it is called.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import docker.errors
import pytest
import requests.exceptions
from ds01 import engine, nvml, processes
from ds01.allocations import Allocations
from ds01.errors import Ds01Error
from ds01.model import FULL, Device, Gpu, Inventory, Process
from ds01.paths import Paths
from ds01.policies import DeviceUse
from support import NOW, Host, spec_device

RUNNING = ("running", "paused", "restarting")
FOREIGN_PID = 4711
FRACTION = timedelta(microseconds=987654)
"""What Docker's times have beyond the whole seconds of the ledger (and three more digits)."""


@dataclass(eq=False)
class Slot:
    """A place that can be allocated: a whole GPU, or the MIG device in one place of it."""

    gpu: str
    profile: str
    placement: tuple[int, int] | None
    share: Fraction
    uuid: str
    id: str = ""
    present: bool = True
    health: str = "ok"
    foreign_process: bool = False

    @property
    def node(self) -> str:
        """Its device node, which no reboot changes."""
        return f"/dev/{self.gpu}-{self.placement}"

    @property
    def device(self) -> Device:
        return Device(self.id, self.uuid, self.gpu, self.profile, self.placement, self.share, 0, self.health)

    @property
    def record(self) -> dict[str, Any]:
        """As metadata and labels name it."""
        return {
            "id": self.id,
            "uuid": self.uuid,
            "gpu_uuid": self.gpu,
            "profile": self.profile,
            "placement": list(self.placement) if self.placement else None,
            "equivalents": str(self.share),
        }

    def __repr__(self) -> str:
        return f"<{self.id} {self.profile} {self.uuid}>"


@dataclass
class Box:
    """A container of the engine.

    `opened` are the slots that it was started with, `recorded` those that its records say it was given;
    `promised` are what one outside DS01 was created with; `forgotten` says that no ledger knew it while it ran.
    """

    id: str
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    status: str = "created"
    finished_at: datetime | None = None
    opened: tuple[Slot, ...] = ()
    recorded: tuple[Slot, ...] = ()
    created_at: datetime = NOW
    promised: tuple[str, ...] = ()
    forgotten: bool = False
    workspace: str = ""

    @property
    def ours(self) -> bool:
        return self.labels.get("ds01.managed") == "true"

    @property
    def user(self) -> str:
        return self.labels.get("ds01.user", "")

    @property
    def runs(self) -> bool:
        return self.status in RUNNING

    @property
    def inspected(self) -> dict[str, Any]:
        finished = "0001-01-01T00:00:00Z"
        if self.finished_at:
            finished = self.finished_at.strftime("%Y-%m-%dT%H:%M:%S.987654321Z")
        requests_ = [{"Driver": "nvidia", "DeviceIDs": list(self.promised)}] if self.promised else []
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "State": {"Status": self.status, "FinishedAt": finished},
            "Config": {"Image": "image", "Labels": self.labels, "Env": []},
            "HostConfig": {"DeviceRequests": requests_},
        }


class World:
    """One host. Layouts are a GPU each: "full", or the profiles it is cut into."""

    def __init__(self, root: Path, layout: Sequence[str | Sequence[str]]) -> None:
        self.clock = NOW
        self.boot = 1
        self.boxes: dict[str, Box] = {}
        self.alive: set[Process] = set()
        self._started = 0
        self.driver_answers = self.engine_answers = True
        self.asked_to_end: list[tuple[str, str]] = []
        self.refuses_to: dict[str, tuple[str, ...]] = {}
        self.cdi, self.nvidia_cdi, self.metadata = root / "cdi", root / "etc-cdi", root / "state" / "container-metadata"
        for directory in (self.cdi, self.nvidia_cdi, self.metadata):
            directory.mkdir(parents=True)
        self.gpus = [f"GPU-{number}" for number in range(len(layout))]
        self.lost: set[str] = set()
        self.slots = [slot for gpu, cut in zip(self.gpus, layout, strict=True) for slot in _cut(gpu, cut)]
        self._made = 0
        self.name_devices()
        self.write_spec()

    def plug_in(self, patch: pytest.MonkeyPatch) -> None:
        """From now on DS01 asks this world."""
        patch.delenv("DS01_ENGINE", raising=False)
        patch.setattr(nvml, "session", self.session)
        patch.setattr(engine, "connect", lambda: engine.Engine(Client(self)))
        patch.setattr(processes, "lives", lambda process: process in self.alive)
        patch.setattr(processes, "boot_id", lambda: f"boot-{self.boot}")

    def service(self, host: Host) -> Allocations:
        """One run of DS01: it reads the limits file anew."""
        paths = Paths(host.config, host.state, host.log, self.cdi, (self.nvidia_cdi,))
        return Allocations(paths, "tester", lambda: self.clock)

    # --- the driver

    @property
    def inventory(self) -> Inventory:
        found = tuple(
            Gpu(index, "", "unknown", index, False, 0, "lost")
            if gpu in self.lost
            else Gpu(index, gpu, "A100", index, not any(s.profile == FULL for s in self.slots if s.gpu == gpu), 81920)
            for index, gpu in enumerate(self.gpus)
        )
        return Inventory(found, tuple(slot.device for slot in self.there()), "550.54")

    def there(self) -> list[Slot]:
        """The slots that the driver shows, in its order."""
        shown = [slot for slot in self.slots if slot.present and slot.gpu not in self.lost]
        return sorted(shown, key=lambda slot: slot.device.index)

    def processes(self, _inventory: Inventory) -> dict[str, tuple[int, ...]]:
        """Strangers' compute processes; the containers' own programs compute nothing just now."""
        return {slot.uuid: (FOREIGN_PID,) for slot in self.there() if slot.foreign_process}

    @contextmanager
    def session(self) -> Iterator[Any]:
        if not self.driver_answers:
            raise Ds01Error("driver_unavailable", "The NVIDIA driver does not answer.")
        yield _Session(self)

    def name_devices(self, order: Mapping[str, int] | None = None) -> None:
        """Give indices: GPUs in their order, MIG devices in the given order of places."""
        for index, gpu in enumerate(self.gpus):
            cut = [slot for slot in self.slots if slot.gpu == gpu]
            cut.sort(key=lambda slot: (order or {}).get(slot.node, 0))
            for number, slot in enumerate(cut):
                slot.id = str(index) if slot.profile == FULL else f"{index}:{number}"

    def rename(self, slot: Slot) -> None:
        """A MIG device made anew has a new UUID; a whole GPU keeps its own."""
        if slot.profile != FULL:
            self._made += 1
            slot.uuid = f"MIG-new-{self._made}"

    def write_spec(self) -> None:
        """What `nvidia-ctk cdi generate` writes now."""
        devices = [self._spec_device(slot) for slot in self.there()]
        spec = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": devices}
        (self.nvidia_cdi / "nvidia.json").write_text(json.dumps(spec), encoding="utf-8")

    def _spec_device(self, slot: Slot) -> dict[str, Any]:
        """A GPU's node keeps its number whatever its index is, and a place's capabilities theirs."""
        return spec_device(slot.uuid, sorted(self.gpus).index(slot.gpu), slot.node)

    def nodes(self, slots: Iterable[Slot]) -> set[str]:
        """The device nodes that these give."""
        edits = [self._spec_device(slot)["containerEdits"] for slot in slots]
        return {node["path"] for edit in edits for node in edit["deviceNodes"]}

    def spec_holds(self, slots: Sequence[Slot]) -> bool:
        spec = json.loads((self.nvidia_cdi / "nvidia.json").read_text(encoding="utf-8"))
        return {slot.uuid for slot in slots} <= {device["name"] for device in spec["devices"]}

    def reboot(self, turned: bool, order: Mapping[str, int]) -> None:
        """Every process ends, /var/run is empty, MIG devices have new UUIDs, and indices are dealt anew."""
        self.boot += 1
        self._started = 0
        self.alive.clear()
        for box in self.boxes.values():
            if box.runs:
                box.status, box.finished_at = "exited", self.clock
        for slot in self.slots:
            slot.foreign_process = False
            self.rename(slot)
        if turned:
            self.gpus.reverse()
        self.name_devices(order)
        shutil.rmtree(self.cdi)
        self.cdi.mkdir()
        self.write_spec()

    # --- the engine

    def box(self, name: str) -> Box | None:
        return self.boxes.get(name)

    def running(self) -> list[Box]:
        return [box for box in self.boxes.values() if box.runs]

    def create(self, name: str, labels: Mapping[str, str], recorded: Sequence[Slot] = ()) -> Box:
        self._made += 1
        devices = json.dumps([slot.record for slot in recorded])
        made = {
            **labels,
            "ds01.project": name.partition("._.")[0],
            "ds01.allocation": name if labels.get("ds01.gpus") != "0" else "",
            "ds01.devices": devices,
            "ds01.created_at": f"{self.clock:%Y-%m-%dT%H:%M:%SZ}",
        }
        box = Box(f"id-{self._made}", name, made if labels else {}, recorded=tuple(recorded), created_at=self.clock)
        self.boxes[name] = box
        return box

    def start(self, box: Box) -> bool:
        """As the engine does: the CDI device is looked up now; False where there is none."""
        uuids = projected(self.cdi, box.name) if box.labels.get("ds01.gpus", "0") != "0" else ()
        by_uuid = {slot.uuid: slot for slot in self.there()}
        if uuids is None or not set(uuids) <= set(by_uuid):
            return False
        box.status, box.forgotten = "running", False
        box.opened = tuple(by_uuid[uuid] for uuid in uuids)
        return True

    def stop(self, box: Box) -> None:
        box.status, box.finished_at = "exited", self.clock

    def remove(self, box: Box, record_too: bool) -> None:
        del self.boxes[box.name]
        if record_too:
            (self.metadata / f"{box.name}.json").unlink(missing_ok=True)

    def rename_box(self, box: Box, new: str) -> None:
        del self.boxes[box.name]
        box.name = new
        self.boxes[new] = box

    def note_devices(self, box: Box, slots: Sequence[Slot]) -> None:
        """The metadata record that DS01 keeps of a container it started."""
        record = {"container_id": box.id, "devices": [slot.record for slot in slots]}
        (self.metadata / f"{box.name}.json").write_text(json.dumps(record), encoding="utf-8")
        box.recorded = tuple(slots)

    # --- time and processes

    def process(self, pid: int) -> Process:
        """The process with this number, started now where none has it; numbers and times begin anew at a boot."""
        known = next((process for process in self.alive if process.pid == pid), None)
        if known is None:
            self._started += 1
            known = Process(pid, self._started)
            self.alive.add(known)
        return known

    def later(self, by: timedelta) -> None:
        self.clock += by


class _Session:
    def __init__(self, world: World) -> None:
        self._world = world

    def inventory(self) -> Inventory:
        return self._world.inventory

    def has(self, uuids: Iterable[str]) -> bool:
        return {*uuids} <= {device.uuid for device in self._world.inventory.devices}

    def processes(self, inventory: Inventory) -> dict[str, tuple[int, ...]]:
        return self._world.processes(inventory)

    def capabilities(self, _inventory: Inventory) -> dict[str, int]:
        return {}

    def instances(self, _inventory: Inventory) -> dict[str, int]:
        return {}

    def uses(self, inventory: Inventory) -> dict[str, DeviceUse]:
        """Nobody computes; who is idle is policies' own tests' matter."""
        return {device.uuid: DeviceUse() for device in inventory.devices}


class Client:
    """The part of the Docker SDK's client that the engine adapter reads with."""

    def __init__(self, world: World) -> None:
        self._world = world

    def containers(self, *, filters: Any = None, **_: Any) -> list[dict[str, Any]]:
        self._answers()
        wanted = [box for box in self._world.boxes.values() if not filters or box.ours]
        return [
            {
                "Id": b.id,
                "Names": [f"/{b.name}"],
                "State": b.status,
                "Image": "image",
                "Labels": b.labels,
                "Mounts": [{"Destination": "/workspace", "Source": b.workspace}] if b.workspace else [],
            }
            for b in wanted
        ]

    def inspect_container(self, name: str) -> dict[str, Any]:
        self._answers()
        return self._find(name).inspected

    def info(self) -> dict[str, Any]:
        self._answers()
        return {"ID": "the-engine"}

    def stop(self, name: str, **_: Any) -> None:
        self._end(name, "stop")

    def kill(self, name: str) -> None:
        self._end(name, "kill")

    def _end(self, name: str, how: str) -> None:
        self._answers()
        self._world.asked_to_end.append((how, name))
        box = self._find(name)
        if how in self._world.refuses_to.get(name, ()):
            raise docker.errors.APIError("it hangs", explanation=f"cannot {how} {name}: it hangs")
        if box.runs:
            self._world.stop(box)

    def remove_container(self, name: str, *, force: bool = False) -> None:
        self._answers()
        box = self._find(name)
        if box.runs and not force:
            raise docker.errors.APIError("it runs", explanation=f"cannot remove {name}: it runs")
        self._world.remove(box, record_too=False)

    def rename(self, name: str, new: str) -> None:
        self._answers()
        if new in self._world.boxes:
            raise docker.errors.APIError("it is taken", explanation=f"cannot rename {name}: {new} is in use")
        self._world.rename_box(self._find(name), new)

    def _find(self, name: str) -> Box:
        found = next((box for box in self._world.boxes.values() if name in (box.name, box.id)), None)
        if found is None:
            raise docker.errors.NotFound("no such container", explanation="no such container")
        return found

    def _answers(self) -> None:
        if not self._world.engine_answers:
            raise requests.exceptions.ConnectionError("nobody listens")


def projected(cdi: Path, container: str) -> tuple[str, ...] | None:
    """The UUIDs that a container could start with now."""
    file = cdi / f"ds01-{container}.json"
    if not file.exists():
        return None
    return tuple(json.loads(file.read_text(encoding="utf-8"))["annotations"]["ds01.io/uuids"].split(","))


def _cut(gpu: str, cut: str | Sequence[str]) -> Iterator[Slot]:
    if cut == FULL:
        yield Slot(gpu, FULL, None, Fraction(1), gpu)
        return
    start = 0
    for number, profile in enumerate(cut):
        size = int(profile[0])
        yield Slot(gpu, profile, (start, size), Fraction(size, 7), f"MIG-{gpu}-{number}")
        start += size
