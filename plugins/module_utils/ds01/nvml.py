"""The GPUs and MIG devices of this host, through NVML. An adapter.

One session a run: on an eight-GPU server initialising NVML costs more than everything else DS01
does. Handles are read and dropped inside one call, for they do not survive a layout change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from .errors import Ds01Error
from .libraries import require
from .model import FULL, Device, Gpu, Inventory

_MAX_GI_PROFILES = 64
_MIB = 1024**2

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
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        code = getattr(exc, "value", None)
        problem = "libnvidia-ml.so.1 was not found" if code == 12 else str(exc)
        raise Ds01Error(
            "driver_unavailable",
            f"The NVIDIA driver does not answer on this host: {problem}.",
            _INIT_HINTS.get(code, "nvidia-smi shows more."),
        ) from None
    try:
        yield Nvml(pynvml)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


class Nvml:
    """Reads inside one session."""

    def __init__(self, pynvml: Any) -> None:
        self._n = pynvml

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

    def _gpu(self, index: int) -> tuple[Gpu, list[Device]]:
        try:
            handle = self._n.nvmlDeviceGetHandleByIndex(index)
            return self._readable_gpu(index, handle)
        except self._n.NVMLError as exc:
            if getattr(exc, "value", None) not in _LOST_CODES:
                raise Ds01Error(
                    "driver_unavailable",
                    f"GPU {index} cannot be read: {exc}.",
                    _INIT_HINTS.get(getattr(exc, "value", None), "nvidia-smi shows more."),
                ) from None
            reason = f"the driver lost this GPU ({exc})"
            return Gpu(index, "", "unknown", index, False, 0, "lost", reason), []

    def _readable_gpu(self, index: int, handle: Any) -> tuple[Gpu, list[Device]]:
        n = self._n
        mig = bool(self._optional(n.nvmlDeviceGetMigMode, (0, 0), handle)[0])
        health, reason = self._health(handle)
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


def _profile_name(name: str | bytes) -> str:
    """`2g.20gb` of NVML's `MIG 2g.20gb`."""
    text = name.decode() if isinstance(name, bytes) else name
    return text.removeprefix("MIG ").strip()
