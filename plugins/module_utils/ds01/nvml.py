"""The GPUs and MIG devices of this host, through NVML. An adapter.

One session a run: on an eight-GPU server initialising NVML costs more than everything else DS01
does. Handles are read and dropped inside one call, for they do not survive a layout change.
A call that does not return ends the process, and its door says so (watchdog).
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import Ds01Error
from .libraries import require
from .model import FULL, Device, Gpu, Inventory
from .watchdog import Watch

if TYPE_CHECKING:
    from . import mig, policies

_T = TypeVar("_T")

READ_TIMEOUT = 60.0
"""Seconds for a call that reads. The driver itself gives up a GPU that does not answer it after 45 (Xid 119)."""
CHANGE_TIMEOUT = 120.0
"""Seconds for a call that changes a GPU, which may reset it, and for initialising NVML: without persistence mode
that wakes every GPU, one after the other."""

_LOOKS = 8
"""How often the watch looks in that time."""

_MAX_GI_PROFILES = 64
_READS = 5
"""How often a GPU is read that somebody cuts at the same time."""
_MIB = 1024**2
_NO_INSTANCE = 0xFFFFFFFF
"""What NVML reports as the instance of a process that runs in none."""

# NVML error codes that say "this GPU is gone"; every other GPU goes on being enumerated.
_LOST_CODES = frozenset({15, 28, 999})

_INIT_HINTS = {
    4: "Run as root.",
    9: "Load the NVIDIA kernel modules (nvidia-smi shows the state), then try again.",
    12: "Install the NVIDIA driver; DS01 checks it with playbooks/site.yml.",
    18: "The driver was upgraded under a running kernel module: reboot this host.",
}


@contextlib.contextmanager
def session() -> Iterator[Nvml]:
    """An initialised NVML. Raises Ds01Error `driver_unavailable`, or `library_missing` without pynvml."""
    pynvml = require("pynvml", "nvidia-ml-py")
    with Watch(READ_TIMEOUT / _LOOKS) as watch:
        library = _Library(pynvml, watch)
        try:
            library.nvmlInit()
        except pynvml.NVMLError as exc:
            code = getattr(exc, "value", 0)
            problem = "libnvidia-ml.so.1 was not found" if code == 12 else str(exc).rstrip(".")
            raise Ds01Error(
                "driver_unavailable",
                f"The NVIDIA driver does not answer on this host: {problem}.",
                _INIT_HINTS.get(code, "nvidia-smi shows more."),
            ) from None
        try:
            yield Nvml(library)
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                library.nvmlShutdown()


class _Library:
    """pynvml, whose calls have to return in time."""

    def __init__(self, pynvml: Any, watch: Watch) -> None:
        self._pynvml = pynvml
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        """Called once a name: what is found stays as an attribute."""
        found = getattr(self._pynvml, name)
        if isinstance(found, types.FunctionType):
            found = self._watch.watched(found, name, READ_TIMEOUT if "Get" in name else CHANGE_TIMEOUT)
        setattr(self, name, found)
        return found


class Nvml:
    """Reads inside one session; `library` is pynvml, for those who write in it."""

    def __init__(self, pynvml: Any) -> None:
        self.library = self._n = pynvml

    def inventory(self) -> Inventory:
        """Every GPU and every allocatable device. A lost GPU is listed as lost; the others go on."""
        gpus: list[Gpu] = []
        devices: list[Device] = []
        for index in range(self._n.nvmlDeviceGetCount()):
            gpu, its_devices = self._gpu(index)
            gpus.append(gpu)
            devices.extend(its_devices)
        version = self._optional(self._n.nvmlSystemGetDriverVersion, "")
        return Inventory(tuple(gpus), tuple(devices), version)

    def has(self, uuids: Iterable[str]) -> bool:
        """Whether these devices are there as they were listed: a GPU only while its MIG mode is off."""
        try:
            handles = [self._n.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except self._n.NVMLError:
            return False
        return not any(self._optional(self._n.nvmlDeviceGetMigMode, (0, 0), handle)[0] for handle in handles)

    def processes(self, inventory: Inventory) -> dict[str, tuple[int, ...]]:
        """Device UUID -> pids of the compute processes on it, as the host numbers them; absent: none.

        A process counts while it has a CUDA context. Graphics processes do not: a display server sits
        on every GPU and computes nothing. Nor do those that only hold the GPU open, such as
        nvidia-persistenced and DCGM. None are known of a GPU that is lost, or on a platform that
        does not tell (some vGPU guests): refusing would close such a server for good. Everything
        else that fails raises Ds01Error `driver_unavailable`, a caller who is not root among it.
        """
        found: dict[str, tuple[int, ...]] = {}
        for gpu in inventory.gpus:
            devices = [d for d in inventory.devices if d.gpu_uuid == gpu.uuid]
            try:
                found.update(self._steadily(self._processes, gpu.index, devices))
            except self._n.NVMLError_NotSupported:
                continue
            except self._n.NVMLError as exc:
                if not _lost(exc):
                    raise _unreadable(gpu.index, exc) from None
        return found

    def instances(self, inventory: Inventory) -> dict[str, int]:
        """MIG device UUID -> its GPU instance, by which DCGM names it. Those of a GPU that is lost are left out."""
        found: dict[str, int] = {}
        for gpu in inventory.gpus:
            devices = [d for d in inventory.devices if d.gpu_uuid == gpu.uuid and not d.is_full]
            try:
                its = self._devices_by_instance(devices)
            except self._n.NVMLError as exc:
                if not _lost(exc):
                    raise _unreadable(gpu.index, exc) from None
                continue
            found.update({d.uuid: instance for instance, inside in its.items() for d in inside})
        return found

    def capabilities(self, inventory: Inventory) -> dict[str, int]:
        """MIG device UUID -> the number of its GPU instance's node in /dev/nvidia-caps (MIG User Guide, "Device
        Nodes and Capabilities": 135 to a GPU, 9 to a GPU instance, from 3 on)."""
        minors = {gpu.uuid: gpu.minor for gpu in inventory.gpus}
        gpus = {device.uuid: device.gpu_uuid for device in inventory.devices}
        return {uuid: 3 + 135 * minors[gpus[uuid]] + 9 * gi for uuid, gi in self.instances(inventory).items()}

    def uses(self, inventory: Inventory) -> dict[str, policies.DeviceUse]:
        """Device UUID -> how it is used now; a device that could not be read is absent."""
        found = {}
        running = self.processes(inventory)
        for device in inventory.devices:
            with contextlib.suppress(self._n.NVMLError):
                found[device.uuid] = self._use(device, running.get(device.uuid, ()))
        return found

    def _use(self, device: Device, pids: tuple[int, ...]) -> policies.DeviceUse:
        from . import policies

        handle = self._n.nvmlDeviceGetHandleByUUID(device.uuid)
        rates = self._optional(self._n.nvmlDeviceGetUtilizationRates, None, handle) if device.is_full else None
        memory = self._n.nvmlDeviceGetMemoryInfo(handle).used
        return policies.DeviceUse(pids, memory, None if rates is None else rates.gpu)

    def layout(self, inventory: Inventory) -> tuple[mig.GpuState, ...]:
        """How each GPU is cut and could be: its profiles with their placements, and its instances.

        Instances without a compute instance are listed too, which no MIG device tells of. No GPU tells
        placements while its MIG mode is off.
        """
        return tuple(self._gpu_state(gpu, inventory) for gpu in inventory.gpus)

    def _gpu_state(self, gpu: Gpu, inventory: Inventory) -> mig.GpuState:
        from . import mig  # a run that changes no layout does without

        lost = mig.GpuState(gpu.index, gpu.uuid, gpu.name, gpu.mig, health="lost")
        if gpu.health == "lost":
            return lost
        try:
            devices = [d for d in inventory.devices if d.gpu_uuid == gpu.uuid]
            handle = self._n.nvmlDeviceGetHandleByIndex(gpu.index)
            mode = self._optional(self._n.nvmlDeviceGetMigMode, None, handle)
            table = mig.Table(tuple(self._profile(handle, info) for info in self._profiles(handle).values()))
            return mig.GpuState(
                index=gpu.index,
                uuid=gpu.uuid,
                name=gpu.name,
                mig=gpu.mig,
                table=table,
                instances=self._steadily(self._instances, handle, table, devices),
                pending=bool(mode[1]) if mode else None,
                capable=mode is not None,
                model_id=self._n.nvmlDeviceGetPciInfo(handle).pciDeviceId,
                health=gpu.health,
                resets=self._optional(self._n.nvmlDeviceGetArchitecture, 0, handle) < self._n.NVML_DEVICE_ARCH_HOPPER,
                minor=gpu.minor,
            )
        except self._n.NVMLError as exc:
            if _lost(exc):
                return lost
            raise _unreadable(gpu.index, exc) from None

    def _profile(self, handle: Any, info: Any) -> mig.Profile:
        from . import mig

        places = self._optional(self._placements, (), handle, info.id)
        return mig.Profile(
            name=_profile_name(info.name),
            id=info.id,
            slices=info.sliceCount,
            size=max((size for _, size in places), default=0),
            starts=tuple(sorted(start for start, _ in places)),
            most=info.instanceCount,
            memory_mib=info.memorySizeMB,
        )

    def _placements(self, handle: Any, profile_id: int) -> list[tuple[int, int]]:
        """(start, size) of every placement of a profile: asked how many, then which."""
        ask, count = self._n.nvmlDeviceGetGpuInstancePossiblePlacements, ctypes.c_uint(0)
        ask(handle, profile_id, None, ctypes.byref(count))
        found = (self._n.c_nvmlGpuInstancePlacement_t * count.value)()
        ask(handle, profile_id, found, ctypes.byref(count))
        return [(place.start, place.size) for place in found[: count.value]]

    def _instances(self, handle: Any, table: mig.Table, devices: Sequence[Device]) -> tuple[mig.Instance, ...]:
        from . import mig

        inside = self._devices_by_instance([d for d in devices if not d.is_full])
        names = {p.id: p.name for p in table.profiles}
        found = []
        for info in (self._n.nvmlGpuInstanceGetInfo(gi) for p in table.profiles for gi in self._listed(handle, p)):
            here = inside.get(info.id, [])
            name = names[info.profileId]
            found.append(
                mig.Instance(
                    id=info.id,
                    profile=name,
                    start=info.placement.start,
                    size=info.placement.size,
                    devices=tuple(d.uuid for d in here),
                    whole=[d.profile for d in here] == [name],
                )
            )
        return tuple(sorted(found, key=lambda i: (i.start, i.id)))

    def _devices_by_instance(self, devices: Sequence[Device]) -> dict[int, list[Device]]:
        """The MIG devices of each GPU instance, by its id."""
        found: dict[int, list[Device]] = {}
        for device in devices:
            mig_handle = self._mig_handle(device)
            if mig_handle is not None:
                found.setdefault(self._n.nvmlDeviceGetGpuInstanceId(mig_handle), []).append(device)
        return found

    def _mig_handle(self, device: Device) -> Any | None:
        """By UUID: at its index there may be another one by now. None where it is gone."""
        return self._optional(self._n.nvmlDeviceGetHandleByUUID, None, device.uuid)

    def _listed(self, handle: Any, profile: mig.Profile) -> list[Any]:
        """The instances of one profile; none while MIG is off."""
        found, count = (self._n.c_nvmlGpuInstance_t * profile.most)(), ctypes.c_uint(profile.most)
        args = (handle, profile.id, found, ctypes.byref(count))
        told = self._optional(lambda *a: self._n.nvmlDeviceGetGpuInstances(*a) or True, False, *args)
        return list(found[: count.value]) if told else []

    def _processes(self, index: int, devices: Sequence[Device]) -> dict[str, tuple[int, ...]]:
        """Asked of the GPU once: in MIG mode it tells each process's instances to root."""
        if not devices:
            return {}
        handle = self._n.nvmlDeviceGetHandleByIndex(index)
        running = self._n.nvmlDeviceGetComputeRunningProcesses(handle)
        found = {}
        for device in devices if running else ():
            here = running if device.is_full else self._inside(device, running)
            if here:
                found[device.uuid] = tuple(sorted({process.pid for process in here}))
        return found

    def _inside(self, device: Device, running: Sequence[Any]) -> list[Any]:
        """Those of a GPU's processes that run in a MIG device, or of which the driver does not say where."""
        mig = self._mig_handle(device)
        if mig is None:
            return []
        gi, ci = self._n.nvmlDeviceGetGpuInstanceId(mig), self._n.nvmlDeviceGetComputeInstanceId(mig)
        return [
            process
            for process in running
            if process.gpuInstanceId in (gi, _NO_INSTANCE) and process.computeInstanceId in (ci, _NO_INSTANCE)
        ]

    def _gpu(self, index: int) -> tuple[Gpu, list[Device]]:
        try:
            handle = self._n.nvmlDeviceGetHandleByIndex(index)
            return self._steadily(self._readable_gpu, index, handle)
        except self._n.NVMLError as exc:
            if not _lost(exc):
                raise _unreadable(index, exc) from None
            reason = f"the driver lost this GPU ({exc})"
            return Gpu(index, "", "unknown", index, False, 0, "lost", reason), []

    def _steadily(self, read: Callable[..., _T], *args: Any) -> _T:
        """What is read of a GPU that somebody may cut meanwhile: an instance that goes in between is not found."""
        for _ in range(_READS - 1):
            with contextlib.suppress(self._n.NVMLError_NotFound):
                return read(*args)
        return read(*args)

    def _readable_gpu(self, index: int, handle: Any) -> tuple[Gpu, list[Device]]:
        n = self._n
        mig, pending = map(bool, self._optional(n.nvmlDeviceGetMigMode, (0, 0), handle))
        health, reason = self._health(handle)
        if health == "ok" and mig != pending:
            mode = "on" if pending else "off"
            health, reason = "suspect", f"its MIG mode will be {mode} after its next reset, which takes its devices"
        rates = None if mig else self._optional(n.nvmlDeviceGetUtilizationRates, None, handle)
        gpu = Gpu(
            index=index,
            uuid=n.nvmlDeviceGetUUID(handle),
            name=n.nvmlDeviceGetName(handle),
            minor=n.nvmlDeviceGetMinorNumber(handle),
            mig=mig,
            memory_mib=n.nvmlDeviceGetMemoryInfo(handle).total // _MIB,
            health=health,
            health_reason=reason,
            utilization=None if rates is None else rates.gpu,
        )
        if mig:
            return gpu, self._mig_devices(gpu, handle)
        return gpu, [Device(str(index), gpu.uuid, gpu.uuid, FULL, None, Fraction(1), gpu.memory_mib, health)]

    def _health(self, handle: Any) -> tuple[str, str]:
        """failed: rows could not be remapped. suspect: a repair waits for a reset."""
        rows = self._optional(self._n.nvmlDeviceGetRemappedRows, None, handle)
        if rows is None:
            return "ok", ""
        _, _, pending, failed = rows
        if failed:
            return "failed", "a memory row could not be remapped; the GPU needs service"
        if pending:
            return "suspect", "a memory row waits to be remapped; reset the GPU when it is free"
        return "ok", ""

    def _mig_devices(self, gpu: Gpu, handle: Any) -> list[Device]:
        n = self._n
        profiles = self._profiles(handle)
        slices = max((info.sliceCount for info in profiles.values()), default=1)
        devices = []
        for index in range(n.nvmlDeviceGetMaxMigDeviceCount(handle)):
            mig = self._optional(n.nvmlDeviceGetMigDeviceHandleByIndex, None, handle, index)
            if mig is None:
                continue  # the walk has gaps: the count is a maximum
            instance = n.nvmlDeviceGetGpuInstanceById(handle, n.nvmlDeviceGetGpuInstanceId(mig))
            info = n.nvmlGpuInstanceGetInfo(instance)
            profile = profiles[info.profileId]
            share = n.nvmlDeviceGetAttributes(mig)
            name = _profile_name(profile.name)
            if share.computeInstanceSliceCount < share.gpuInstanceSliceCount:
                name = f"{share.computeInstanceSliceCount}c.{name}"
            devices.append(
                Device(
                    id=f"{gpu.index}:{index}",
                    uuid=n.nvmlDeviceGetUUID(mig),
                    gpu_uuid=gpu.uuid,
                    profile=name,
                    placement=(info.placement.start, info.placement.size),
                    equivalents=Fraction(share.computeInstanceSliceCount, slices),
                    memory_mib=share.memorySizeMB,
                    health=gpu.health,
                )
            )
        return devices

    def _profiles(self, handle: Any) -> dict[int, Any]:
        """GPU instance profiles by profile id, which is not the enum that is walked to find them."""
        found = {}
        for enum in range(_MAX_GI_PROFILES):
            try:
                info = self._n.nvmlDeviceGetGpuInstanceProfileInfo(handle, enum, 2)
            except self._n.NVMLError_InvalidArgument:
                break
            except self._n.NVMLError_NotSupported:
                continue
            found[info.id] = info
        return found

    def _optional(self, call: Callable[..., Any], default: Any, *args: Any) -> Any:
        """The call's answer, or `default` where the GPU or the driver does not offer it."""
        try:
            return call(*args)
        except (
            self._n.NVMLError_NotSupported,
            self._n.NVMLError_NotFound,
            self._n.NVMLError_InvalidArgument,
        ):
            return default
        except self._n.NVMLError_FunctionNotFound:
            return default


def _lost(exc: Exception) -> bool:
    return getattr(exc, "value", None) in _LOST_CODES


def _unreadable(index: int, exc: Exception) -> Ds01Error:
    hint = _INIT_HINTS.get(getattr(exc, "value", 0), "nvidia-smi shows more.")
    return Ds01Error("driver_unavailable", f"GPU {index} cannot be read: {str(exc).rstrip('.')}.", hint)


def _profile_name(name: str | bytes) -> str:
    """`2g.20gb` of NVML's `MIG 2g.20gb`."""
    text = name.decode() if isinstance(name, bytes) else name
    return text.removeprefix("MIG ").strip()
