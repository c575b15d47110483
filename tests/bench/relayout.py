"""How GPUs are cut: the plan alone, nothing to do, and one slice of seven changed."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import world
from processes import LIBRARIES, PYTHON
from timing import Case, Section, interleaved

sys.path.append(str(world.ROOT / "tests" / "unit"))

import sim_tools

SEVEN = ",".join(["1g.10gb"] * 7)
GPUS = 8
SAMPLE = 2000
"""Inputs of the plans: GPUs cut at random, some of the instances in use, and a random wish."""


SIX = ["1g.10gb"] * 6
LAYOUTS = ([*SIX, "1g.10gb"], [*SIX, "1g.10gb+me"])
"""Two layouts that differ in one slice of seven."""
WRITES = ("Create", "Destroy", "SetMigMode")


def relayout(rounds: int) -> Iterator[Section]:
    """Plans for one GPU and for eight; layouts carried out."""
    cuts = [f"{gpu}={SEVEN}" for gpu in range(GPUS)]
    with world.installation(f"{GPUS}xA100-SXM4-80GB", cuts) as here, world.in_process(here.env):
        yield _plans(rounds)
        with _tools(here):
            yield _changes(here, max(3, rounds // 20))
            yield _processes(here, max(3, rounds // 30))


@contextlib.contextmanager
def _tools(here: world.Installation) -> Iterator[None]:
    """nvidia-smi and nvidia-ctk as `ds01` finds them; only root can make the device nodes that they need."""
    if os.geteuid() != 0:
        raise SystemExit("bench: layouts are carried out as root only; leave it out with: --only PART")
    folder = sim_tools.write(here.folder / "bin", here.folder / "machine")
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    _run_tools(here)
    yield


def _run_tools(here: world.Installation) -> None:
    """What any change of a layout is followed by: device nodes, and NVIDIA's CDI spec."""
    subprocess.run([here.folder / "bin" / "nvidia-smi", "-L"], check=True, capture_output=True)
    command = [here.folder / "bin" / "nvidia-ctk", "cdi", "generate", f"--output={here.folder / 'cdi' / 'nvidia.yaml'}"]
    subprocess.run(command, check=True, capture_output=True)


def _changes(here: world.Installation, rounds: int) -> Section:
    """In this process: nothing to do, and one slice of seven."""
    from ds01 import nvml, partitions
    from ds01 import relayout as verbs
    from ds01.allocations import Allocations
    from ds01.paths import Paths

    ds01 = Allocations(Paths.from_env(), actor="bench")

    def apply(number: int) -> None:
        verbs.apply(ds01, partitions.wanted(ds01, gpus={0: LAYOUTS[number]}))

    def read() -> None:
        with nvml.session() as driver:
            driver.layout(driver.inventory())

    def anew(number: int) -> None:
        _all_anew(LAYOUTS[number])
        _run_tools(here)

    apply(0)
    same, other = "nothing to do", "one slice of seven changed"
    with _writes() as made:
        counted = {}
        for name, change in ((same, lambda: apply(0)), (other, lambda: apply(1)), ("anew", lambda: anew(0))):
            made.clear()
            change()
            counted[name] = len(made)
        apply(0)
    cases = [
        Case("DS01", same, lambda: apply(0)),
        Case("floor", f"reading {GPUS} GPUs through NVML once", read, against=same),
        Case("DS01", other, lambda: apply(1), lambda: apply(0)),
        Case("floor", "nvidia-smi -L and nvidia-ctk cdi generate", lambda: _run_tools(here), against=other),
        Case("before", "all seven removed and made anew, and the same", lambda: anew(1), lambda: apply(0), other),
    ]
    title = f"MIG layouts of one GPU carried out, in process, {GPUS} GPUs of the simulated driver"
    notes = [
        f"{rounds} rounds, interleaved; the simulated driver makes and removes instances in no time",
        f"calls that change a GPU: {counted[same]} with nothing to do, {counted[other]} for one slice",
        f"{counted['anew']} the way of mig-parted, which removes all of a GPU's instances first",
    ]
    return Section(title, interleaved(title, cases, rounds), notes)


@contextlib.contextmanager
def _writes() -> Iterator[list[str]]:
    """The names of the NVML calls that change a GPU, as they are made."""
    import pynvml

    made: list[str] = []
    originals = {n: f for n, f in vars(pynvml).items() if n.startswith("nvml") and any(w in n for w in WRITES)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            made.append(name)
            return originals[name](*args)

        return call

    for name in originals:
        setattr(pynvml, name, counted(name))
    try:
        yield made
    finally:
        for name, function in originals.items():
            setattr(pynvml, name, function)


def _all_anew(profiles: Sequence[str]) -> None:
    """The way of mig-parted (pkg/mig/config): away with all that is on the GPU, then each where the driver likes."""
    import pynvml
    from ds01 import nvml

    with nvml.session() as driver:
        gpu = driver.layout(driver.inventory())[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for instance in gpu.instances:
            found = pynvml.nvmlDeviceGetGpuInstanceById(handle, instance.id)
            whole = _whole(gpu.table.by_name[instance.profile].slices)
            compute, count = (pynvml.c_nvmlComputeInstance_t * 1)(), ctypes.c_uint(1)
            pynvml.nvmlGpuInstanceGetComputeInstances(found, whole, compute, ctypes.byref(count))
            pynvml.nvmlComputeInstanceDestroy(compute[0])
            pynvml.nvmlGpuInstanceDestroy(found)
        for name in profiles:
            profile = gpu.table.by_name[name]
            made = pynvml.nvmlDeviceCreateGpuInstance(handle, profile.id)
            pynvml.nvmlGpuInstanceCreateComputeInstance(made, _whole(profile.slices))


def _whole(slices: int) -> int:
    """The number of the compute instance profile that takes all of these slices."""
    return {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}[slices]


def _processes(here: world.Installation, rounds: int) -> Section:
    """`ds01 mig apply` as a whole, with nothing to do."""
    name = "ds01 mig apply, nothing to do"
    argv = ["mig", "apply", "--gpu", f"0={','.join(LAYOUTS[0])}"]
    here.ds01(*argv)
    cases = [
        Case("DS01", name, lambda: here.ds01(*argv)),
        Case(
            "floor",
            "the interpreter and the four libraries",
            lambda: world.run([PYTHON, "-c", LIBRARIES], here.env),
            against=name,
        ),
    ]
    return Section(name, interleaved(name, cases, rounds), [f"{rounds} rounds, interleaved; {GPUS} GPUs"])


def _plans(rounds: int) -> Section:
    from ds01 import mig, nvml, partitions
    from ds01.allocations import Allocations
    from ds01.paths import Paths

    ds01 = Allocations(Paths.from_env(), actor="bench")
    host = partitions.look(ds01)
    inputs = _Inputs(host.gpus[0].table)
    one, eight = inputs.some(1), inputs.some(GPUS)
    answers: list[Any] = []

    def plan(gpus: Iterator[tuple[Sequence[Any], Mapping[int, Any]]]) -> Callable[[], None]:
        return lambda: answers.append((*(given := next(gpus)), mig.plan(*given)))

    def check() -> None:
        _, cuts, found = answers[-1]
        for a_plan in found.plans:
            _check(cuts[a_plan.gpu], a_plan)

    def read() -> None:
        with nvml.session() as driver:
            driver.layout(driver.inventory())

    fives = {gpu: mig.Cut(True, ("3g.40gb", "2g.20gb", *["1g.10gb"] * 2)) for gpu in range(GPUS)}
    names = ["plan for one GPU", f"plan for {GPUS} GPUs", f"look at {GPUS} GPUs, and plan"]
    cases = [
        Case("DS01", names[0], plan(one)),
        Case("floor", "looking that plan over: counts, nothing overlaps", check, against=names[0]),
        Case("DS01", names[1], plan(eight)),
        Case("floor", f"looking those {GPUS} over", check, against=names[1]),
        Case("DS01", names[2], lambda: partitions.planned(partitions.look(ds01), fives)),
        Case("floor", f"reading {GPUS} GPUs through NVML", read, against=names[2]),
    ]
    notes = [
        f"{rounds} rounds, interleaved; A100 80GB, each round another GPU, wish and instances in use (fixed seed)",
        f"of the {len(inputs.layouts)} ways to cut one",
    ]
    return Section("MIG plans, in process", interleaved("MIG plans, in process", cases, rounds), notes)


class _Inputs:
    """GPUs in every state that the table allows, drawn with a fixed seed."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._random = random.Random(4)  # noqa: S311 - the same inputs at every run
        self.layouts = list(_layouts(table))

    def some(self, gpus: int) -> Iterator[tuple[Sequence[Any], Mapping[int, Any]]]:
        """Endless: GPUs, and how each is wanted."""
        from ds01.mig import Cut

        made = [
            ([self._gpu(n) for n in range(gpus)], {n: Cut(True, self._wish()) for n in range(gpus)})
            for _ in range(SAMPLE // gpus)
        ]
        return itertools.cycle(made)

    def _wish(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._random.choice(self.layouts))

    def _gpu(self, index: int) -> Any:
        from ds01.mig import GpuState, Holder, Instance

        there = [
            Instance(number, name, start, self._table.by_name[name].size, (f"MIG-{index}-{number}",))
            for number, (name, start) in enumerate(self._random.choice(self.layouts))
        ]
        used = self._random.choice((0.0, 0.2, 0.5))
        holder = (Holder("p._.alice", "alice"),)
        instances = tuple(replace(i, holders=holder if self._random.random() < used else ()) for i in there)
        return GpuState(index, f"GPU-{index}", "A100", True, self._table, instances)


def _layouts(table: Any) -> Iterator[tuple[tuple[str, int], ...]]:
    """Every set of (profile, start) that does not overlap."""
    from ds01.mig import mask

    places = [(p, start) for p in table.profiles for start in p.starts]

    def more(number: int, taken: int, media: bool, chosen: tuple[tuple[str, int], ...]) -> Iterator[Any]:
        if number == len(places):
            yield chosen
            return
        profile, start = places[number]
        yield from more(number + 1, taken, media, chosen)
        bits = mask(start, profile.size)
        if not bits & taken and not (media and profile.media):
            yield from more(number + 1, taken | bits, media or profile.media, (*chosen, (profile.name, start)))

    return more(0, 0, False, ())


def _check(cut: Any, plan: Any) -> None:
    """What anybody must do who does not believe a plan: the profiles are those wanted, and nothing overlaps."""
    stay = [step for step in plan.steps if step.action in ("keep", "create")]
    taken = 0
    for step in stay:
        start, size = step.placement
        bits = ((1 << size) - 1) << start
        if bits & taken:
            raise SystemExit(f"bench: the plan for GPU {plan.gpu} overlaps")
        taken |= bits
    if Counter(step.profile for step in stay) != cut.counts:
        raise SystemExit(f"bench: the plan for GPU {plan.gpu} does not make what was wanted")
