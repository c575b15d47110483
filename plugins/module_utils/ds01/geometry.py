"""Where profiles may be placed on a GPU that does not say so, because its MIG mode is off. Pure.

For plans only: once the mode is on, NVML's own placements count, and a plan is made anew from them.
Another GPU of the same model that has the mode on is asked first; the tables below are those that NVIDIA
publishes (MIG User Guide, `nvidia-smi mig -lgipp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .mig import GpuState, Profile, Table

_Places = Mapping[int, tuple[int, tuple[int, ...]]]  # by NVML's profile id: (size, starts) in memory slices

# A100, H100, H200, B200 and their relatives: seven compute slices, eight memory slices.
_SEVEN: _Places = {
    19: (1, (0, 1, 2, 3, 4, 5, 6)),
    20: (1, (0, 1, 2, 3, 4, 5, 6)),
    15: (2, (0, 2, 4, 6)),
    14: (2, (0, 2, 4)),
    9: (4, (0, 4)),
    5: (4, (0,)),
    0: (8, (0,)),
}
_A30: _Places = {
    14: (1, (0, 1, 2, 3)),
    21: (1, (0, 1, 2, 3)),
    5: (2, (0, 2)),
    6: (2, (0, 2)),
    0: (4, (0,)),
}
# Three units a quarter.
_RTX_PRO_6000: _Places = {
    **dict.fromkeys((14, 21, 47, 65, 67), (3, (0, 3, 6, 9))),
    **dict.fromkeys((5, 35, 64, 66), (6, (0, 6))),
    **dict.fromkeys((0, 32), (12, (0,))),
}
_BY_MODEL: Mapping[int, _Places] = {0x20B710DE: _A30, 0x2BB510DE: _RTX_PRO_6000}


def completed(gpus: Sequence[GpuState]) -> tuple[GpuState, ...]:
    """The GPUs, with placements where they tell none and they are known."""
    told = {gpu.model_id: gpu.table for gpu in gpus if gpu.mig and gpu.table.width}
    return tuple(_completed(gpu, told.get(gpu.model_id)) for gpu in gpus)


def _completed(gpu: GpuState, same_model: Table | None) -> GpuState:
    if gpu.table.width or not gpu.table.profiles:
        return gpu
    if same_model:
        places = {p.id: (p.size, p.starts) for p in same_model.profiles}
    else:
        places = dict(_BY_MODEL.get(gpu.model_id) or (_SEVEN if _has_seven_slices(gpu.table) else {}))
    return replace(gpu, table=Table(tuple(_placed(p, places) for p in gpu.table.profiles)))


def _has_seven_slices(table: Table) -> bool:
    return any(p.slices == 7 and p.id == 0 for p in table.profiles)


def _placed(profile: Profile, places: _Places) -> Profile:
    size, starts = places.get(profile.id, (0, ()))
    return replace(profile, size=size, starts=starts)
