"""A whole GPU server in this process: DS01 on the simulated driver, NVIDIA's tools on the path, its own device nodes.

`start` (a fixture) makes one. What it is cut into is read from the simulator's own state file, never from DS01,
and every NVML call is written down. The simulator names its machine by an environment variable that is read at
every call, so other tests of the same process see no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml
import pytest
import sim_tools
from ds01 import cutter, nvml, partitions, processes, relayout
from ds01.allocations import Allocations
from ds01.errors import Ds01Error
from ds01.mig import GpuState
from ds01.paths import Paths
from ds01.transitions import Outcome
from support import ROOT, Host
from test_allocations import change
from test_cli_sim import SIM

sys.path.append(str(ROOT / "lab" / "sim" / "tools"))  # its own tools, in this process: each would take 60 ms

import faults
import nodes
from state import State, edit

needs_sim = [
    pytest.mark.sim,
    pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="the simulated driver is not built: make sim"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make device nodes"),
]

LIMITS = """
defaults: {max_gpus: 8, max_gpus_per_container: 4, allow_full_gpu: true, gpu_hold_after_stop: 24h}
gpu_allocation: {enable_mig: true, mig_profile: null, strategy: packed}
"""

WRITES = frozenset(
    {
        "nvmlDeviceSetMigMode",
        "nvmlDeviceCreateGpuInstance",
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        "nvmlGpuInstanceDestroy",
        "nvmlGpuInstanceCreateComputeInstance",
        "nvmlGpuInstanceCreateComputeInstanceWithPlacement",
        "nvmlComputeInstanceDestroy",
    }
)
"""The calls that change how a GPU is cut."""

_WHOLE = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
"""By compute slices: the number of the compute instance profile that takes all of them."""


@functools.cache
def library() -> ctypes.CDLL:
    """The simulated driver: pynvml asks the loader for a library of its name, and one that is loaded is the answer."""
    found = ctypes.CDLL(str(SIM / "libnvidia-ml.so.1"))
    found.nvmlSimProfile.restype = ctypes.c_char_p
    return found


@functools.cache
def initial(gpus: str, *cut: str) -> str:
    """The state of a machine of these GPUs; the same for the same arguments."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "gpus")
        command = [SIM / "bin" / "nvml-sim", "init", state, "--gpus", gpus, "--seed", "1", *cut]
        subprocess.run(command, check=True, timeout=20, capture_output=True)
        return state.read_text(encoding="utf-8")


@dataclass
class Calls:
    """Every NVML call that is made through pynvml, by name in `made`; `before` lets something happen first."""

    made: list[str] = field(default_factory=list)
    arguments: list[tuple[Any, ...]] = field(default_factory=list)
    originals: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _hooks: list[Callable[[str], None]] = field(default_factory=list)
    _inside: bool = False

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name, function in inspect.getmembers(pynvml, inspect.isfunction):
            if name.startswith("nvml") and name[4].isupper():
                self.originals[name] = function
                patch.setattr(pynvml, name, self._watched(name, function))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # pynvml calls itself, and what a hook does is somebody else's
                return function(*args, **kwargs)
            self._inside = True
            try:
                self.made.append(name)
                self.arguments.append(args)
                for hook in self._hooks:
                    hook(name)
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def before(self, name: str, action: Callable[[], object], number: int = 1) -> None:
        """Do this just before the `number`-th call of that name from now on; `write` is any of WRITES."""
        left = [number]

        def hook(called: str) -> None:
            if called == name or (name == "write" and called in WRITES):
                left[0] -= 1
                if left[0] == 0:
                    action()

        self._hooks.append(hook)

    def before_writes(self, action: Callable[[str], None]) -> None:
        """Do this just before each call that changes how a GPU is cut, with its name."""
        self._hooks.append(lambda called: action(called) if called in WRITES else None)

    def clear(self) -> None:
        """Forget what was called, and what should happen."""
        for what in (self.made, self.arguments, self._hooks):
            what.clear()

    @property
    def writes(self) -> list[str]:
        return [name for name in self.made if name in WRITES]


@dataclass(frozen=True)
class There:
    """A GPU instance of the machine: `uuid` is its MIG device's, None where it has no compute instance."""

    profile: str
    start: int
    uuid: str | None
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}{'' if self.uuid else '?'}"


@dataclass(frozen=True)
class Server:
    """One server. `calls` are the NVML calls of this process; the device nodes are below `root`."""

    host: Host
    calls: Calls

    @property
    def state(self) -> Path:
        return self.host.root / "gpus"

    @property
    def root(self) -> Path:
        return self.host.root / "machine"

    @property
    def held(self) -> Path:
        """Stands in for the folder of device nodes where it matters who has one open."""
        return self.host.root / "held"

    @property
    def nvidia_spec(self) -> Path:
        return self.host.cdi / "nvidia.yaml"

    @property
    def saved(self) -> Path:
        return self.host.state / "mig-layout.json"

    # --- the machine

    def simulate(self, *changes: str) -> None:
        """What `nvml-sim set` does: `lost=0`, `busy=1:0`, `process=0:4711`, `reboot`, ..."""
        for text in changes:
            if text == "reboot":
                assert library().nvmlSimReboot() == 0
                continue
            with edit(self.state) as machine:
                faults.apply(machine, text)

    def gpu(self, index: int) -> list[There]:
        """How this GPU is cut, from left to right; empty also where its MIG mode is off."""
        machine = State.read(self.state)
        gpu = machine.gpus[index]
        devices = {ci["gi"]: ci for ci in machine.of("ci", gpu)}
        model, minor, found = gpu["model"].encode(), int(gpu["minor"]), []
        for gi in machine.of("gi", gpu):
            profile = library().nvmlSimProfile(model, int(gi["profile"])).decode()
            ci = devices.get(gi["id"])
            its = tuple(nodes.mig_nodes(minor, int(gi["id"]), int(ci["id"]))) if ci else ()
            found.append(There(profile, int(gi["start"]), ci and ci["uuid"], its))
        return sorted(found, key=lambda i: i.start)

    def cut(self, index: int) -> str:
        """The same in short: `2g.20gb@0 1g.10gb@2?`, the `?` for one without a compute instance; `off` for MIG off."""
        mig = State.read(self.state).gpus[index].get("mig") == "1"
        return " ".join(map(str, self.gpu(index))) if mig else "off"

    def cuts(self) -> list[str]:
        return [self.cut(index) for index in range(len(State.read(self.state).gpus))]

    def devices(self) -> dict[str, tuple[str, ...]]:
        """UUID -> device nodes, of everything that a container could have."""
        machine, found = State.read(self.state), {}
        for index, gpu in enumerate(machine.gpus):
            if gpu.get("mig") == "1":
                found.update({i.uuid: i.nodes for i in self.gpu(index) if i.uuid})
            else:
                found[gpu["uuid"]] = (nodes.gpu_node(int(gpu["minor"])),)
        return found

    def uuids(self, index: int) -> dict[str, str]:
        """`2g.20gb@0` -> the UUID of the MIG device there."""
        return {str(i): i.uuid for i in self.gpu(index) if i.uuid}

    def somebody_cuts(self, index: int, profile: str, start: int, compute: bool = True) -> None:
        """Another program makes an instance, past DS01."""
        with self._elsewhere() as (n, gpus):
            wanted = gpus[index].table.by_name[profile]
            place = pynvml.c_nvmlGpuInstancePlacement_t(start, wanted.size)
            handle = n["nvmlDeviceGetHandleByIndex"](index)
            made = n["nvmlDeviceCreateGpuInstanceWithPlacement"](handle, wanted.id, ctypes.byref(place))
            if compute:
                n["nvmlGpuInstanceCreateComputeInstance"](made, _WHOLE[wanted.slices])

    def somebody_completes(self, index: int) -> None:
        """Another program makes a compute instance in every GPU instance that has none."""
        with self._elsewhere() as (n, gpus):
            handle = n["nvmlDeviceGetHandleByIndex"](index)
            for instance in gpus[index].instances:
                if not instance.devices:
                    found = n["nvmlDeviceGetGpuInstanceById"](handle, instance.id)
                    slices = gpus[index].table.by_name[instance.profile].slices
                    n["nvmlGpuInstanceCreateComputeInstance"](found, _WHOLE[slices])

    def somebody_removes(self, index: int, start: int) -> None:
        """Another program removes the instance that begins there."""
        with edit(self.state) as machine:
            gpu = machine.gpus[index]
            gone = {gi["id"] for gi in machine.of("gi", gpu) if int(gi["start"]) == start}
            for kind, key in (("gi", "id"), ("ci", "gi")):
                machine.records[kind] = [
                    r for r in machine.records[kind] if r["gpu"] != gpu["minor"] or r[key] not in gone
                ]

    @contextlib.contextmanager
    def somebody_opens(self, index: int) -> Iterator[int]:
        """Another program has the GPU's device node open; its pid. Nodes of a driver that is not there cannot be
        opened, so this one is /dev/null's."""
        node = self.held / f"nvidia{State.read(self.state).gpus[index]['minor']}"
        node.parent.mkdir(exist_ok=True)
        os.mknod(node, stat.S_IFCHR | 0o600, Path("/dev/null").stat().st_rdev)
        with node.open("rb") as file, subprocess.Popen(["/bin/sleep", "600"], stdin=file) as program:
            try:
                yield program.pid
            finally:
                program.kill()
        node.unlink()

    @contextlib.contextmanager
    def _elsewhere(self) -> Iterator[tuple[Mapping[str, Callable[..., Any]], Sequence[GpuState]]]:
        """pynvml as another program calls it, and the GPUs."""
        with nvml.session() as driver:
            gpus = driver.layout(driver.inventory())
        n = self.calls.originals
        n["nvmlInit"]()
        try:
            yield n, gpus
        finally:
            n["nvmlShutdown"]()

    def make_nodes(self) -> None:
        nodes.sync(State.read(self.state), self.root)

    def boot(self, *changes: str) -> None:
        """The host starts anew: instances are gone, /var/run is empty; then NVIDIA's unit makes nodes and spec, or,
        where no device is left, fails."""
        self.simulate("reboot", *changes)
        shutil.rmtree(self.host.cdi)
        shutil.rmtree(self.root)
        self.make_nodes()
        self.host.cdi.mkdir()
        if self.devices():
            self.write_nvidia_spec()

    def write_nvidia_spec(self) -> None:
        """What the boot unit of NVIDIA's toolkit does."""
        self.make_nodes()
        subprocess.run(
            [self.host.root / "bin" / "nvidia-ctk", "cdi", "generate", f"--output={self.nvidia_spec}"],
            check=True,
            timeout=20,
            capture_output=True,
        )

    # --- DS01

    def ds01(self) -> Allocations:
        return Allocations(Paths.from_env(), "tester")

    def wanted(self, **cut: str) -> partitions.Wanted:
        """`g1="3g.40gb,2g.20gb"`; empty: MIG without instances, `full`: MIG off."""
        gpus = {int(gpu[1:]): [p for p in profiles.split(",") if p] for gpu, profiles in cut.items()}
        return partitions.wanted(self.ds01(), gpus=gpus)

    def foresee(self, force: Sequence[str] = (), **cut: str) -> partitions.Planned:
        """Check mode."""
        return relayout.foresee(self.ds01(), self.wanted(**cut), force)

    def apply(self, force: Sequence[str] = (), **cut: str) -> partitions.Planned:
        return relayout.apply(self.ds01(), self.wanted(**cut), force)

    def apply_layout(self, name: str) -> partitions.Planned:
        ds01 = self.ds01()
        return relayout.apply(ds01, partitions.wanted(ds01, layout=name))

    def refused(self, force: Sequence[str] = (), **cut: str) -> Ds01Error:
        """Why it is not carried out."""
        with pytest.raises(Ds01Error) as caught:
            self.apply(force, **cut)
        return caught.value

    def restore(self) -> relayout.Restored:
        return relayout.restore(self.ds01())

    def allocate(self, container: str, profile: str | None = None, gpus: int = 1) -> Outcome:
        """`p._.alice` as it is written; what it got."""
        project, _, user = container.partition("._.")
        [outcome] = self.ds01().apply([change("allocated", user, project, profile=profile, gpus=gpus)])
        return outcome

    def report(self, state: str, container: str) -> Outcome:
        project, _, user = container.partition("._.")
        [outcome] = self.ds01().apply([change(state, user, project)])
        return outcome

    def ledger(self) -> dict[str, tuple[str, ...]]:
        """The UUIDs of each container's devices, by the ledger."""
        if not self.host.ledger.exists():
            return {}
        records = json.loads(self.host.ledger.read_bytes())["allocations"]
        return {name: tuple(d["uuid"] for d in record["devices"]) for name, record in records.items()}

    def projected(self) -> dict[str, tuple[str, ...]]:
        """The UUIDs that each container would start with, by its CDI file."""
        found = {}
        for file in self.host.cdi.glob("ds01-*.json"):
            with contextlib.suppress(FileNotFoundError):  # another process takes its own away
                spec = json.loads(file.read_bytes())
                found[spec["devices"][0]["name"]] = tuple(spec["annotations"]["ds01.io/uuids"].split(","))
        return found

    def projected_nodes(self, container: str) -> set[str]:
        """The device nodes that the container would really see: the file's content, not its annotation."""
        spec = json.loads((self.host.cdi / f"ds01-{container}.json").read_bytes())
        return {node["path"] for node in spec["devices"][0]["containerEdits"]["deviceNodes"]}

    # --- what must always hold

    def check_nothing_false(self) -> None:
        """Nobody can start on a device that is not his or that is gone, whatever happened."""
        there, granted = self.devices(), self.ledger()
        everything = [uuid for uuids in granted.values() for uuid in uuids]
        assert len(everything) == len(set(everything)), "a device is given twice"
        for container, uuids in self.projected().items():
            assert granted.get(container) == uuids, f"{container} could start on what the ledger does not give it"
            assert set(uuids) <= there.keys(), f"{container}'s CDI file names a device that is gone"
            assert self.projected_nodes(container) == {node for uuid in uuids for node in there[uuid]}, (
                f"{container} would see nodes of another device"
            )

    def check_all_done(self) -> None:
        """Everything agrees: machine, nodes, NVIDIA's spec, ledger, CDI files; nothing is left over."""
        self.check_nothing_false()
        there = self.devices()
        assert self.projected() == self.ledger()
        for uuids in self.ledger().values():
            assert set(uuids) <= there.keys()
        missing = [node for its in there.values() for node in its if not (self.root / node.lstrip("/")).exists()]
        assert missing == [], "device nodes are missing"
        if not there:  # nvidia-ctk writes no spec without devices
            assert not self.nvidia_spec.exists(), "NVIDIA's spec holds devices that are gone"
            return self._check_nothing_left()
        named = {d["name"]: d for d in self.nvidia_devices()}
        assert there.keys() <= named.keys(), "NVIDIA's spec does not hold every device"
        assert {name for name in named if name.startswith(("MIG-", "GPU-"))} == there.keys(), "it holds others, too"
        for uuid, its in there.items():
            assert {n["path"] for n in named[uuid]["containerEdits"]["deviceNodes"]} == set(its)
        return self._check_nothing_left()

    def _check_nothing_left(self) -> None:
        assert [cut for cut in self.cuts() if "?" in cut] == [], "GPU instances without a compute instance"
        left = {p.name for folder in (self.host.cdi, self.host.state) for p in folder.glob(".*")}
        # Where all was done but a new generation of the same ledger; the ledger's next write takes its place.
        assert left <= {".gpu-state.json.new"}, "half-written files stay"

    def nvidia_devices(self) -> list[Mapping[str, Any]]:
        """The devices in NVIDIA's spec."""
        import yaml

        return yaml.safe_load(self.nvidia_spec.read_text(encoding="utf-8"))["devices"]

    def written(self) -> dict[str, tuple[int, bytes]]:
        """All that DS01 and NVIDIA's toolkit wrote; equal pictures mean that nothing changed. Not the log of events."""
        machine, log = self.state.name, self.host.log.name
        tree = self.host.tree().items()
        return {path: what for path, what in tree if path.split("/")[0] not in (machine, log, "machine", "bin", "held")}


def set_up(host: Host, patch: pytest.MonkeyPatch, gpus: str, cut: Mapping[str, str], permit: str = "any") -> Server:
    """A server in the host's directory; `cut["g1"]` are the profiles of GPU 1."""
    library()
    server = Server(host, Calls())
    parts = [part for index, profiles in cut.items() for part in ("--mig", f"{index[1:]}={profiles}")]
    server.state.write_text(initial(gpus, *parts), encoding="utf-8")
    patch.setenv("NVML_SIM_STATE", str(server.state))
    patch.setattr(processes, "boot_id", lambda: f"boot {State.read(os.environ['NVML_SIM_STATE']).driver['boot']}")
    holders = processes.holders
    patch.setattr(processes, "holders", lambda paths: holders([server.held / path.name for path in paths]))
    patch.setenv("PATH", f"{sim_tools.write(host.root / 'bin', server.root)}:{os.environ['PATH']}")
    server.simulate(f"permit={permit}")
    host.limits(LIMITS)
    shutil.copy(ROOT / "config" / "mig-layouts.yaml", host.config.with_name("mig-layouts.yaml"))
    host.cdi.mkdir()
    if server.devices():  # without one nvidia-ctk fails
        server.write_nvidia_spec()
    patch.setattr(cutter, "_PAUSE", 0)  # who holds an instance in a test does so for good
    server.calls.watch(patch)
    return server


def steps(planned: partitions.Planned) -> list[str]:
    """What a plan does, in short: `0 destroy 3g.40gb 4`. Not what stays."""
    rows = [(s["gpu"], s["action"], s["profile"], s["placement"] and s["placement"][0]) for s in plan_of(planned)]
    return [" ".join(str(word) for word in row if word is not None) for row in rows if row[1] != "keep"]


def plan_of(planned: partitions.Planned) -> list[dict[str, Any]]:
    """The `plan` of its result."""
    return planned.result()["plan"]


Start = Callable[..., Server]


@pytest.fixture
def start(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Call it with the GPUs and their cuts: `start("2xA100-SXM4-80GB", g1="2g.20gb,1g.10gb")`."""

    def make(gpus: str, **cut: str) -> Server:
        return set_up(host, monkeypatch, gpus, cut)

    yield make
    assert pynvml._nvmlLib_refcount == 0, "an NVML session was left open"
