"""Who uses this host's GPUs without DS01: containers, by what they were created with, and processes. Pure.

A container that was promised a GPU may use it at any time, so the promise counts, not what it does now.
Where the promise cannot be read exactly it counts for more, never for less.

A privileged container that asks for no GPU is like any program on the host: it could open one, most
(cAdvisor, buildkit) never do, and those that do are seen by their processes.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .model import Device, Inventory

# What a request without a driver may ask for to be answered by NVIDIA's (moby, daemon/nvidia_linux.go).
_CAPABILITIES = frozenset({"gpu", "nvidia", "compute", "compat32", "graphics", "utility", "video", "display"})
_DRIVERS = ("nvidia", "nvidia.cdi", "nvidia.runtime-hook")
_VENDORS = ("nvidia.com", "ds01.io")
_KINDS = ("nvidia.com/gpu", "runtime.nvidia.com/gpu")
_NONE = ("", "none", "void")
_ID = re.compile(r"[0-9]{1,4}([:.][0-9]{1,4})?|(GPU|MIG)-[0-9A-Z-]+", re.IGNORECASE)
_MIG_INDEX = re.compile(r"\d+:\d+")
_NODE = re.compile(r"/dev/nvidia([0-9]{1,4})")
_MOST_SHOWN = 100


@dataclass(frozen=True)
class GpuUse:
    """The GPUs that one container was promised: the union of all that follows.

    `container` is its name, `id` the engine's, `pid` its first process. `names` are ids (`0`, `0:1`) and UUIDs,
    `minors` those of device nodes. `first` = N stands for the GPUs with NVML indices 0 to N-1: that is what
    Docker's NVIDIA driver makes of a count, whatever is free (moby, daemon/nvidia_linux.go, countToDevices).
    `how` says it in the words of a command line.
    """

    container: str
    everything: bool = False
    names: tuple[str, ...] = ()
    minors: tuple[int, ...] = ()
    first: int = 0
    how: str = ""
    pid: int = 0
    id: str = ""


@dataclass(frozen=True)
class Program:
    """A process that computes on a device. `who` says it in a phrase, `user` is its owner's login, `unit` what systemd
    runs it in, `container_id` the container that its cgroup belongs to (empty: none), `name` what it runs. `started`
    tells it from a later one of its number; None: it is gone, or not to be seen from here."""

    pid: int
    who: str
    user: str = ""
    unit: str = ""
    container_id: str = ""
    started: int | None = None
    name: str = ""


def gpu_use(inspected: Mapping[str, Any]) -> GpuUse | None:
    """What a container that is not DS01's was promised, from the engine's inspect document; None: no GPU."""
    host = inspected.get("HostConfig") or {}
    own = f"ds01.io/gpu={inspected['Name'].lstrip('/')}"  # of one of DS01's: what it names, the ledger knows
    requests = [_without(own, request) for request in host.get("DeviceRequests") or ()]
    parts = [*map(_requested, requests), *map(_node, host.get("Devices") or ())]
    # The engine appends a request's NVIDIA_VISIBLE_DEVICES to the container's own, and the last one
    # counts. CDI leaves that to the specification, which cannot be seen from here.
    if not any(_is_nvidia(request) and _requested(request) for request in requests):
        parts.append(_environment(host, inspected.get("Config") or {}))
    use = _union(inspected["Name"].lstrip("/"), [part for part in parts if part], bool(host.get("Privileged")))
    pid = (inspected.get("State") or {}).get("Pid") or 0
    return replace(use, id=inspected.get("Id") or "", pid=pid) if use else None


def by_mig_index(use: GpuUse) -> bool:
    """Whether it was promised a MIG device by its index (`0:1`), which is another device's as soon as the GPU is
    cut anew; what it has is what it was given at its start."""
    return any(_MIG_INDEX.fullmatch(name) for name in use.names)


def as_opened(use: GpuUse, opened: Collection[int] | None, numbers: Mapping[str, int]) -> GpuUse:
    """The use with the MIG devices that the container has in place of indices.

    `opened` are the capability nodes in it (None: nobody can tell; then it counts for the whole GPU), `numbers`
    those of the MIG devices' GPU instances, by UUID.
    """
    lasting = [name for name in use.names if not _MIG_INDEX.fullmatch(name)]
    if opened is None:
        gpus = dict.fromkeys(name.partition(":")[0] for name in use.names if _MIG_INDEX.fullmatch(name))
        return replace(use, names=(*lasting, *gpus))
    return replace(use, names=(*lasting, *(uuid for uuid, number in numbers.items() if number in opened)))


def occupied(
    inventory: Inventory,
    uses: Iterable[GpuUse],
    processes: Mapping[str, Sequence[int]],
    describe: Callable[[int], str],
) -> dict[str, str]:
    """Device UUID -> one phrase that says who uses it; devices that nobody uses are absent.

    `processes` are pids by device UUID, `describe` puts one into words. A use of a GPU covers its MIG
    devices; a name that this host does not have covers nothing.
    """
    uses = tuple(uses)
    minors = {gpu.uuid: gpu.minor for gpu in inventory.gpus}
    found = {}
    for device in inventory.devices:
        users = [use for use in uses if covers(use, device, minors.get(device.gpu_uuid))]
        pids = processes.get(device.uuid, ())
        if users:  # the processes are most likely theirs
            found[device.uuid] = and_more(in_words(users[0]), len(users))
        elif pids:
            found[device.uuid] = and_more(describe(pids[0]), len(pids))
    return found


def _without(own: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    if request.get("Driver") != "cdi":
        return request
    return {**request, "DeviceIDs": [name for name in request.get("DeviceIDs") or () if name != own]}


def _requested(request: Mapping[str, Any]) -> GpuUse | None:
    """What `--gpus` and `--device VENDOR/KIND=NAME` become."""
    ids, count = request.get("DeviceIDs") or (), request.get("Count") or 0
    if request.get("Driver") == "cdi":
        ids = [name for name in ids if not _is_foreign(name)]
        return _named(ids, f"--device {','.join(ids)}")
    if not _is_nvidia(request):
        return None
    if ids:
        return _named(ids, f"--gpus device={','.join(ids)}")
    if count < 0:
        return GpuUse("", everything=True, how="--gpus all")
    return GpuUse("", first=count, how=f"--gpus {count}") if count else None


def _is_nvidia(request: Mapping[str, Any]) -> bool:
    """Whether Docker's NVIDIA driver answers this request."""
    if request.get("Driver"):
        return request["Driver"] in _DRIVERS
    asked = {word for alternative in request.get("Capabilities") or () for word in alternative}
    return "amd" not in asked and not _CAPABILITIES.isdisjoint(asked)


def _is_foreign(name: str) -> bool:
    """Whether a CDI name is another vendor's: no GPU that DS01 hands out."""
    vendor, slash, _ = name.partition("=")[0].partition("/")
    return bool(slash) and not f".{vendor}".endswith(tuple(f".{ours}" for ours in _VENDORS))


def _environment(host: Mapping[str, Any], config: Mapping[str, Any]) -> GpuUse | None:
    """What NVIDIA's runtime gives for the container's environment, its image's included.

    An image of the first CUDA releases gets everything without asking (nvidia-container-toolkit,
    internal/config/image/cuda_image.go, IsLegacy).
    """
    if not str(host.get("Runtime") or "").lower().startswith("nvidia"):
        return None
    env = dict(entry.split("=", 1) for entry in config.get("Env") or () if "=" in entry)
    visible = env.get("NVIDIA_VISIBLE_DEVICES")
    if visible is not None:
        return _named([visible], f"NVIDIA_VISIBLE_DEVICES={visible}")
    if env.get("CUDA_VERSION") and not env.get("NVIDIA_REQUIRE_CUDA"):
        return GpuUse("", everything=True, how=f"CUDA_VERSION={env['CUDA_VERSION']} with NVIDIA's runtime")
    return None


def _node(device: Mapping[str, Any]) -> GpuUse | None:
    """What `--device /dev/nvidia0` gives; nvidiactl, nvidia-uvm and nvidia-caps alone give no GPU."""
    path = posixpath.normpath(device.get("PathOnHost") or "")
    if path == "/dev":
        return GpuUse("", everything=True, how="device /dev")
    node = _NODE.fullmatch(path)
    return GpuUse("", minors=(int(node[1]),), how=f"device {path}") if node else None


def _named(lists: Iterable[str], how: str) -> GpuUse | None:
    """The use of comma-separated names. `all`, and any form that is not known here, is everything."""
    asked = [name.strip() for names in lists for name in names.split(",")]
    ids = [_id(name) for name in asked if name.lower() not in _NONE]
    if not ids:
        return None
    known = tuple(id_ for id_ in ids if id_)
    return GpuUse("", names=known, how=how) if len(known) == len(ids) else GpuUse("", everything=True, how=how)


def _id(name: str) -> str | None:
    """A name as DS01 writes it; None for one that may stand for more than one device."""
    kind, is_cdi, inner = name.partition("=")
    if is_cdi:
        name = inner if kind in _KINDS else ""
    if not _ID.fullmatch(name):
        return None
    return ":".join(str(int(part)) for part in re.split("[:.]", name)) if name[0].isdigit() else name


def _union(container: str, parts: Sequence[GpuUse], privileged: bool) -> GpuUse | None:
    """All of them as one. A privileged container sees every node, and has the libraries if it asked for any GPU."""
    if not parts:
        return None
    how = ", ".join(dict.fromkeys([*(part.how for part in parts), *(["--privileged"] if privileged else [])]))
    return GpuUse(
        container=container,
        everything=privileged or any(part.everything for part in parts),
        names=tuple(dict.fromkeys(name for part in parts for name in part.names)),
        minors=tuple(dict.fromkeys(minor for part in parts for minor in part.minors)),
        first=max(part.first for part in parts),
        how=_shown(how),
    )


def _shown(text: str) -> str:
    """Fit for a terminal and a log line: an image's environment is anybody's text."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= _MOST_SHOWN else f"{printable[:_MOST_SHOWN]}..."


def covers(use: GpuUse, device: Device, minor: int | None) -> bool:
    """Whether the container may use this device, whose GPU's node has that minor number."""
    gpu = device.index[0]
    names = {str(gpu), device.id, device.gpu_uuid.lower(), device.uuid.lower()}
    return use.everything or gpu < use.first or minor in use.minors or any(name.lower() in names for name in use.names)


def in_words(use: GpuUse) -> str:
    """`container trainer (--gpus all)`."""
    return f"container {use.container} ({use.how})"


def and_more(phrase: str, count: int) -> str:
    """The first of so many, and how many more there are."""
    return f"{phrase} and {count - 1} more" if count > 1 else phrase
