"""How GPUs are cut: the plan alone, and beside reading the GPUs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import world
from timing import Case, Section, interleaved

SEVEN = ",".join(["1g.10gb"] * 7)
GPUS = 8
SAMPLE = 2000
"""Inputs of the plans: GPUs cut at random, some of the instances in use, and a random wish."""


def relayout(rounds: int) -> Iterator[Section]:
    """Plans for one GPU and for eight."""
    cuts = [f"{gpu}={SEVEN}" for gpu in range(GPUS)]
    with world.installation(f"{GPUS}xA100-SXM4-80GB", cuts) as here, world.in_process(here.env):
        yield _plans(rounds)


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
