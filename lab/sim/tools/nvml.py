"""The few NVML calls the stand-ins make, by ctypes: they see what any NVML program sees."""

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

NOT_SUPPORTED, NOT_FOUND, GPU_IS_LOST = 3, 6, 15


class NvmlError(Exception):
    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


class _Placement(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint), ("size", ctypes.c_uint))


class _ProfileInfo(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint),
        ("id", ctypes.c_uint),
        ("p2p", ctypes.c_uint),
        ("slices", ctypes.c_uint),
        ("rest", ctypes.c_uint * 7),
        ("mib", ctypes.c_ulonglong),
        ("name", ctypes.c_char * 96),
    )


class Mig(NamedTuple):
    index: int
    uuid: str
    profile: str
    gi: int
    ci: int


class Gpu(NamedTuple):
    index: int
    handle: ctypes.c_void_p
    minor: int
    uuid: str
    name: str
    mig_mode: str  # as nvidia-smi writes it
    migs: tuple


def library():
    """The library beside this program's own folder (a build, a checkout), else the loader's."""
    beside = Path(sys.argv[0]).resolve().parent.parent / "libnvidia-ml.so.1"
    try:
        lib = ctypes.CDLL(str(beside) if beside.exists() else "libnvidia-ml.so.1")
    except OSError:
        sys.exit(f"{Path(sys.argv[0]).name} couldn't find the libnvidia-ml.so library; is the NVIDIA driver installed?")
    lib.nvmlErrorString.restype = lib.nvmlSimModel.restype = lib.nvmlSimProfile.restype = ctypes.c_char_p
    return lib


class Nvml:
    def __init__(self):
        self.lib = library()

    def __enter__(self):
        self.call("nvmlInit_v2")
        return self

    def __exit__(self, *_):
        self.call("nvmlShutdown")

    def call(self, function, *arguments):
        code = getattr(self.lib, function)(*arguments)
        if code:
            raise NvmlError(code, self.lib.nvmlErrorString(code).decode())

    def number(self, function, *arguments):
        out = ctypes.c_uint()
        self.call(function, *arguments, ctypes.byref(out))
        return out.value

    def handle(self, function, *arguments):
        out = ctypes.c_void_p()
        self.call(function, *arguments, ctypes.byref(out))
        return out

    def text(self, function, *arguments):
        out = ctypes.create_string_buffer(96)
        self.call(function, *arguments, out, len(out))
        return out.value.decode()

    def count(self):
        return self.number("nvmlDeviceGetCount_v2")

    def gpu(self, index):
        handle = self.handle("nvmlDeviceGetHandleByIndex_v2", index)
        mode = self._mig_mode(handle)
        return Gpu(
            index=index,
            handle=handle,
            minor=self.number("nvmlDeviceGetMinorNumber", handle),
            uuid=self.text("nvmlDeviceGetUUID", handle),
            name=self.text("nvmlDeviceGetName", handle),
            mig_mode=mode,
            migs=tuple(self._migs(handle)) if mode == "Enabled" else (),
        )

    def _mig_mode(self, handle):
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        try:
            self.call("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
        except NvmlError as error:
            if error.code != NOT_SUPPORTED:
                raise
            return "[N/A]"
        return "Enabled" if current.value else "Disabled"

    def _migs(self, gpu):
        for index in range(self.number("nvmlDeviceGetMaxMigDeviceCount", gpu)):
            try:
                mig = self.handle("nvmlDeviceGetMigDeviceHandleByIndex", gpu, index)
            except NvmlError as error:
                if error.code != NOT_FOUND:
                    raise
                continue
            yield Mig(
                index=index,
                uuid=self.text("nvmlDeviceGetUUID", mig),
                profile=self.text("nvmlDeviceGetName", mig).rpartition(" MIG ")[2],
                gi=self.number("nvmlDeviceGetGpuInstanceId", mig),
                ci=self.number("nvmlDeviceGetComputeInstanceId", mig),
            )

    def profiles(self, gpu):
        """What this GPU can be cut into: name -> (profile id, compute slices)."""
        found = {}
        for enumeration in range(0x12):
            info = _ProfileInfo(version=ctypes.sizeof(_ProfileInfo) | 2 << 24)
            try:
                self.call("nvmlDeviceGetGpuInstanceProfileInfoV", gpu, enumeration, ctypes.byref(info))
            except NvmlError as error:
                if error.code != NOT_SUPPORTED:
                    raise
                continue
            found[info.name.decode().removeprefix("MIG ")] = (info.id, info.slices)
        return found

    def placements(self, gpu, profile_id):
        out, count = (_Placement * 32)(), ctypes.c_uint(32)
        self.call("nvmlDeviceGetGpuInstancePossiblePlacements_v2", gpu, profile_id, out, ctypes.byref(count))
        return [(place.start, place.size) for place in out[: count.value]]

    def create_mig(self, gpu, profile_id, slices, place):
        """One GPU instance, and one compute instance over all of it."""
        gi = ctypes.c_void_p()
        self.call(
            "nvmlDeviceCreateGpuInstanceWithPlacement",
            gpu,
            profile_id,
            ctypes.byref(_Placement(*place)),
            ctypes.byref(gi),
        )
        whole = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}[slices]
        self.handle("nvmlGpuInstanceCreateComputeInstance", gi, whole)
