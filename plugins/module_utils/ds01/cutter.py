"""MIG instances made and removed, and MIG mode switched, through NVML. An adapter.

All or nothing: whatever was done in a `cutting` is undone, last thing first, when it ends with an
error. Handles are found anew for every step, for none survives a change.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import interruption, mig
from .errors import Ds01Error
from .mig import GpuState, Profile, Step

_MAX_CI_PROFILES = 32
_TRIES, _PAUSE = 4, 0.25
"""How often, and how many seconds apart, the removal of an instance is tried: whoever only looks at the
GPU (monitoring, nvidia-smi) holds it for a moment."""

_IN_USE, _RESET_REQUIRED = 19, 16


@contextlib.contextmanager
def cutting(pynvml: Any, say: Callable[[str], None]) -> Iterator[Cutter]:
    """Changes that are undone if the block ends with an error. `say` gets a sentence before each step.

    Raises Ds01Error; what could not be undone is added to it.
    """
    undo: list[tuple[str, Callable[[], None]]] = []
    try:
        yield Cutter(pynvml, say, undo)
    except BaseException as exc:
        problems = [problem for step in reversed(undo) if (problem := _undone(pynvml, *step))]
        if problems and isinstance(exc, Ds01Error):
            raise Ds01Error(
                exc.reason, f"{exc.message} {' '.join(problems)}", exc.hint, **exc.details, undone=False
            ) from None
        for problem in problems:
            say(problem)
        raise


def _undone(pynvml: Any, what: str, action: Callable[[], None]) -> str:
    """Undo one step; why it could not be, or nothing."""
    try:
        action()
    except (pynvml.NVMLError, Ds01Error) as exc:
        return f"Not undone: {what} ({exc})."
    return ""


class Cutter:
    """The steps of a plan, one by one. Each raises Ds01Error, with the step itself not half done."""

    def __init__(self, pynvml: Any, say: Callable[[str], None], undo: list[tuple[str, Callable[[], None]]]) -> None:
        self._n = pynvml
        self._say = say
        self._undo = undo

    def carry_out(self, gpu: GpuState, step: Step) -> None:
        """One operation of a plan for this GPU; nothing for an instance that stays. A deferred interruption
        counts before it: in the operation it would leave what no undo knows of."""
        if step.action == mig.KEEP:
            return
        interruption.moment()
        self._say(f"GPU {gpu.index}: {step}")
        if step.placement is None:
            self._set_mode(gpu, step.action == mig.ENABLE)
        elif step.action == mig.DESTROY:
            self._destroy(gpu, gpu.table.by_name[step.profile], step.placement[0])
        else:
            self._create(gpu, gpu.table.by_name[step.profile], step.placement[0])

    # --- instances

    def _destroy(self, gpu: GpuState, profile: Profile, start: int) -> None:
        what = f"{profile.name} at {mig.span(start, profile.size)}"
        with self._refusals(gpu, f"remove {what} from"):
            instance = self._find(gpu, profile, start)
            self._undo.append((f"{what} of GPU {gpu.index} was removed", lambda: self._complete(gpu, profile, start)))
            self._empty(instance, profile)
            self._patiently(self._n.nvmlGpuInstanceDestroy, instance)

    def _create(self, gpu: GpuState, profile: Profile, start: int) -> None:
        what = f"{profile.name} at {mig.span(start, profile.size)}"
        with self._refusals(gpu, f"make {what} on"):
            instance = self._place(gpu, profile, start)
            made = self._n.nvmlGpuInstanceGetInfo(instance).id
            self._undo.append((f"{what} of GPU {gpu.index} was made", lambda: self._remove(gpu, profile, made)))
            self._make_compute(instance, profile)

    def _place(self, gpu: GpuState, profile: Profile, start: int) -> Any:
        place = self._n.c_nvmlGpuInstancePlacement_t(start, profile.size)
        return self._n.nvmlDeviceCreateGpuInstanceWithPlacement(self._handle(gpu), profile.id, ctypes.byref(place))

    def _make_compute(self, instance: Any, profile: Profile) -> None:
        """The compute instance over the whole GPU instance."""
        for info in self._compute_profiles(instance):
            if info.sliceCount == profile.slices:
                self._n.nvmlGpuInstanceCreateComputeInstance(instance, info.id)
                return
        raise Ds01Error("driver_unavailable", f"The driver has no compute instance for the whole of {profile.name}.")

    def _complete(self, gpu: GpuState, profile: Profile, start: int) -> None:
        """Put back what `_destroy` took: the compute instance, or all."""
        instance = self._there(gpu, profile, start) or self._place(gpu, profile, start)
        if not self._compute_instances(instance, profile):
            self._make_compute(instance, profile)

    def _remove(self, gpu: GpuState, profile: Profile, made: int) -> None:
        """Take away what `_create` made, by its id: in its place there may be somebody else's by now."""
        for instance in self._instances(gpu, profile):
            if self._n.nvmlGpuInstanceGetInfo(instance).id == made:
                self._empty(instance, profile)
                self._patiently(self._n.nvmlGpuInstanceDestroy, instance)

    def _empty(self, instance: Any, profile: Profile) -> None:
        for compute in self._compute_instances(instance, profile):
            self._patiently(self._n.nvmlComputeInstanceDestroy, compute)

    # --- mode

    def _set_mode(self, gpu: GpuState, on: bool) -> None:
        with self._refusals(gpu, _switch(on)):
            refusal = self._refused_mode(gpu, on)
            what = f"MIG mode of GPU {gpu.index} was switched"
            if refusal is None:
                self._undo.append((what, lambda: self._reset_mode(gpu)))
                return
            if refusal.reason != "mode_pending":  # that wish is left: nothing but the reset can carry it out
                self._undo.append((what, lambda: self._reset_mode(gpu)))
            raise refusal

    def _refused_mode(self, gpu: GpuState, on: bool) -> Ds01Error | None:
        """Switch it, and read back; why it is not so. The driver returns what stands against it, and raises little."""
        status = self._n.nvmlDeviceSetMigMode(self._handle(gpu), int(on))
        current, pending = (bool(mode) for mode in self._n.nvmlDeviceGetMigMode(self._handle(gpu)))
        if current == pending == on:
            return None
        return self._waits_for_reset(gpu, on) if status == _RESET_REQUIRED else self._used(gpu, _switch(on))

    def _reset_mode(self, gpu: GpuState) -> None:
        refusal = self._refused_mode(gpu, gpu.mig)
        if refusal:
            raise refusal

    def _waits_for_reset(self, gpu: GpuState, on: bool) -> Ds01Error:
        return Ds01Error(
            "mode_pending",
            f"MIG mode of GPU {gpu.index} will be {'on' if on else 'off'} after its next reset, which this driver"
            " cannot do (in a virtual machine only its host can).",
            f"Reboot this machine, or reset the GPU (nvidia-smi --gpu-reset -i {gpu.index}); then run this again.",
            gpu=gpu.index,
        )

    # --- finding

    def _handle(self, gpu: GpuState) -> Any:
        """By UUID: an index is no name."""
        return self._n.nvmlDeviceGetHandleByUUID(gpu.uuid)

    def _there(self, gpu: GpuState, profile: Profile, start: int) -> Any | None:
        """The GPU instance of this profile that begins there."""
        for instance in self._instances(gpu, profile):
            if self._n.nvmlGpuInstanceGetInfo(instance).placement.start == start:
                return instance
        return None

    def _find(self, gpu: GpuState, profile: Profile, start: int) -> Any:
        instance = self._there(gpu, profile, start)
        if instance is None:
            raise Ds01Error(
                "layout_impossible",
                f"{profile.name} at {mig.span(start, profile.size)} of GPU {gpu.index} is gone:"
                " somebody else cuts this GPU now.",
                "Run this again: the plan is made anew.",
            )
        return instance

    def _instances(self, gpu: GpuState, profile: Profile) -> list[Any]:
        found, count = (self._n.c_nvmlGpuInstance_t * profile.most)(), ctypes.c_uint(profile.most)
        self._n.nvmlDeviceGetGpuInstances(self._handle(gpu), profile.id, found, ctypes.byref(count))
        return list(found[: count.value])

    def _compute_profiles(self, instance: Any) -> Iterator[Any]:
        """What an instance can be divided into: by enumeration, which has gaps and ends with an invalid argument."""
        for number in range(_MAX_CI_PROFILES):
            try:
                yield self._n.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, number, 0)
            except self._n.NVMLError_NotSupported:
                continue
            except self._n.NVMLError_InvalidArgument:
                return

    def _compute_instances(self, instance: Any, profile: Profile) -> list[Any]:
        found = []
        for info in self._compute_profiles(instance):
            here, count = (self._n.c_nvmlComputeInstance_t * profile.slices)(), ctypes.c_uint(profile.slices)
            self._n.nvmlGpuInstanceGetComputeInstances(instance, info.id, here, ctypes.byref(count))
            found += here[: count.value]
        return found

    # --- refusals

    def _patiently(self, destroy: Callable[[Any], object], instance: Any) -> None:
        for left in reversed(range(_TRIES)):
            try:
                destroy(instance)
                return
            except self._n.NVMLError_NotFound:
                return  # gone, which is what was wanted
            except self._n.NVMLError_InUse:
                if not left:
                    raise
                time.sleep(_PAUSE)

    @contextlib.contextmanager
    def _refusals(self, gpu: GpuState, attempt: str) -> Iterator[None]:
        """The driver's refusal in words; `attempt` ends where the GPU's name follows."""
        try:
            yield
        except self._n.NVMLError as exc:
            raise self._refusal(gpu, attempt, exc) from None

    def _refusal(self, gpu: GpuState, attempt: str, exc: Any) -> Ds01Error:
        tried = f"The driver did not {attempt} GPU {gpu.index}"
        if exc.value == _IN_USE:
            return self._used(gpu, attempt)
        reason, why, hint = _REASONS.get(
            exc.value, ("driver_unavailable", str(exc).rstrip("."), "Its log (dmesg, nvidia-smi) shows more.")
        )
        return Ds01Error(reason, f"{tried}: {why}.", hint, gpu=gpu.index, nvml=exc.value)

    def _used(self, gpu: GpuState, attempt: str) -> Ds01Error:
        return Ds01Error(
            "layout_in_use",
            f"The driver did not {attempt} GPU {gpu.index}: another client uses it.",
            "End what uses it, then run this again.",
            gpu=gpu.index,
            nvml=_IN_USE,
        )


def _switch(on: bool) -> str:
    return f"{'enable' if on else 'disable'} MIG on"


_LOST = ("gpu_unhealthy", "it lost this GPU", "Reset it or reboot this host; nvidia-smi shows more.")
# NVML's error codes: reason code, why, next step.
_REASONS = {
    3: ("driver_unavailable", "it does not support this on this GPU in its present mode", "See: ds01 mig list"),
    4: ("permission_denied", "only root may", "Run as root."),
    15: _LOST,
    23: (
        "layout_impossible",
        "there is no room, so somebody else cut this GPU meanwhile",
        "Run this again: the plan is made anew.",
    ),
    28: _LOST,
    999: _LOST,
}
