"""NVML calls as programs make them, where pynvml leaves the loop or the buffer to its caller."""

import ctypes

import pynvml


def profiles(gpu):
    """Name -> profile info, by the loop callers are told to use: until the number is no profile at all."""
    found, number = {}, 0
    while True:
        try:
            info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, number)
            found[info.name.removeprefix("MIG ")] = info
        except pynvml.NVMLError_NotSupported:
            pass
        except pynvml.NVMLError_InvalidArgument:
            return found
        number += 1


def placements(gpu, profile_id):
    count = ctypes.c_uint(0)
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, profile_id, None, ctypes.byref(count))
    out = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, profile_id, out, ctypes.byref(count))
    return [(place.start, place.size) for place in out]


def create_gi(gpu, name, start=None):
    info = profiles(gpu)[name]
    if start is None:
        return pynvml.nvmlDeviceCreateGpuInstance(gpu, info.id)
    size = placements(gpu, info.id)[0][1]
    place = pynvml.c_nvmlGpuInstancePlacement_t(start, size)
    return pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, info.id, ctypes.byref(place))


def create_ci(gi, slices=None):
    """A compute instance over the whole GPU instance, or over some slices of it."""
    infos = []
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            infos.append(pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, number, 0))
        except pynvml.NVMLError_NotSupported:
            continue
    info = (
        max(infos, key=lambda i: i.sliceCount) if slices is None else next(i for i in infos if i.sliceCount == slices)
    )
    return pynvml.nvmlGpuInstanceCreateComputeInstance(gi, info.id)


def instances(gpu):
    """(profile name, id, start) of every GPU instance."""
    found = []
    for name, info in profiles(gpu).items():
        out, count = (pynvml.c_nvmlGpuInstance_t * info.instanceCount)(), ctypes.c_uint()
        pynvml.nvmlDeviceGetGpuInstances(gpu, info.id, out, ctypes.byref(count))
        for gi in out[: count.value]:
            details = pynvml.nvmlGpuInstanceGetInfo(gi)
            found.append((name, details.id, details.placement.start))
    return sorted(found, key=lambda instance: instance[1])
