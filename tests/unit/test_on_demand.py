"""What is cut for a request that nothing else can serve: cases in words, and against every layout there is."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from ds01.mig import GpuState, Placed, Plan, plan_placed
from ds01.on_demand import cut_for
from mig_support import A100, TABLES, gpu, instances
from support import calls_of
from test_mig_exact import Case, Layout, Place, everything


def shown(cuts: dict[int, Placed] | None) -> str:
    """Every layout in a line: `0: 2g.20gb at 0; 1: ...`."""
    return "none" if cuts is None else "; ".join(f"{index}: {layout}" for index, layout in sorted(cuts.items()))


# what is there, the profile and how many, what it is cut into
ONE_GPU = {
    "free room": ("", "2g.20gb 1", "0: 2g.20gb at 0"),
    "free room beside one in use": ("2g.20gb@0=alice", "3g.40gb 1", "0: 2g.20gb at 0, 3g.40gb at 4"),
    "what is unused stays where there is room": ("1g.10gb@6", "2g.20gb 1", "0: 2g.20gb at 4, 1g.10gb at 6"),
    "the largest run stays free": ("2g.20gb@2=alice", "1g.10gb 1", "0: 1g.10gb at 0, 2g.20gb at 2"),
    "an unused one is dissolved": ("7g.80gb@0", "3g.40gb 1", "0: 3g.40gb at 4"),
    "one of that profile stays: one more is asked for": (
        "1g.10gb@0 1g.10gb@1 2g.20gb@2 3g.40gb@4=alice",
        "2g.20gb 1",
        "0: 2g.20gb at 0, 2g.20gb at 2, 3g.40gb at 4",
    ),
    "the fewest go": (
        "1g.10gb@0 1g.10gb@1 1g.20gb@2 3g.40gb@4=alice",
        "2g.20gb 1",
        "0: 1g.10gb at 0, 1g.10gb at 1, 2g.20gb at 2, 3g.40gb at 4",
    ),
    "one in use is never dissolved": ("4g.40gb@0=alice 3g.40gb@4=bob", "1g.10gb 1", "none"),
    "nor moved": ("1g.10gb@3=alice", "4g.40gb 1", "none"),
    "several at once": (
        "2g.20gb@0=alice 1g.10gb@2 1g.10gb@5",
        "2g.20gb 2",
        "0: 2g.20gb at 0, 2g.20gb at 2, 2g.20gb at 4",
    ),
    "all or nothing": ("2g.20gb@0=alice 1g.10gb@2=bob", "2g.20gb 2", "none"),
    "more than a GPU takes": ("", "3g.40gb 3", "none"),
    "the media engines are taken by the same": ("1g.10gb+me@6", "1g.10gb+me 1", "none"),
    "the media engines are in use": ("1g.10gb+me@6=alice", "1g.10gb+me 1", "none"),
    "a leftover without a device goes with it": ("1g.10gb@6?", "2g.20gb 1", "0: 2g.20gb at 0"),
    "a leftover in the way": ("4g.40gb@0=alice 3g.40gb@4?", "2g.20gb 1", "0: 4g.40gb at 0, 2g.20gb at 4"),
    "no such profile": ("", "5g.50gb 1", "none"),
    "none more": ("", "2g.20gb 0", ""),
}


@pytest.mark.parametrize(("there", "wish", "cuts"), ONE_GPU.values(), ids=ONE_GPU)
def test_one_gpu(there: str, wish: str, cuts: str) -> None:
    profile, count = wish.split()
    assert shown(cut_for([gpu(there)], profile, int(count))) == cuts


def test_another_media_instance_makes_way() -> None:
    state = gpu("1g.24gb+me@0 1g.24gb@3=alice", TABLES["RTX-PRO-6000"])
    assert shown(cut_for([state], "2g.48gb+me.all")) == "0: 1g.24gb at 3, 2g.48gb+me.all at 6"


GPUS = {
    "MIG is off": {"mig": False},
    "MIG will be off": {"pending": False},
    "lost": {"health": "lost"},
    "to be repaired": {"health": "suspect"},
    "without MIG": {"capable": False},
    "divided by hand": {
        "instances": (replace(instances("3g.40gb@4")[0], whole=False, devices=("MIG-a", "MIG-b")),),
    },
}


@pytest.mark.parametrize("what", GPUS.values(), ids=GPUS)
def test_gpus_that_are_never_cut_on_demand(what: dict[str, object]) -> None:
    assert cut_for([replace(gpu(), **what)], "2g.20gb") is None
    assert shown(cut_for([replace(gpu(), **what), gpu(index=1)], "2g.20gb")) == "1: 2g.20gb at 0"


# the GPUs, the profile and how many, the devices allocated of each, the cuts by strategy
SEVERAL = {
    "the lowest": (["", ""], "2g.20gb 1", (0, 0), "0: 2g.20gb at 0", "0: 2g.20gb at 0"),
    "least allocated, or packed": (
        ["2g.20gb@0=alice", ""],
        "2g.20gb 1",
        (1, 0),
        "1: 2g.20gb at 0",
        "0: 2g.20gb at 0, 2g.20gb at 2",
    ),
    "free room before what is unused": (
        ["7g.80gb@0", "4g.40gb@0=alice"],
        "3g.40gb 1",
        (0, 1),
        *["1: 4g.40gb at 0, 3g.40gb at 4"] * 2,
    ),
    "a slice of a run, or a hole that is as long": (
        ["", "2g.20gb@0=alice 1g.10gb@2=alice 3g.40gb@4=alice"],
        "1g.10gb 1",
        (0, 3),
        "0: 1g.10gb at 6",
        "1: 2g.20gb at 0, 1g.10gb at 2, 1g.10gb at 3, 3g.40gb at 4",
    ),
    "over two": (
        ["4g.40gb@0=alice", "4g.40gb@0=bob"],
        "3g.40gb 2",
        (1, 1),
        *["0: 4g.40gb at 0, 3g.40gb at 4; 1: 4g.40gb at 0, 3g.40gb at 4"] * 2,
    ),
    "two of four apart, or together": (
        ["", ""],
        "3g.40gb 2",
        (0, 0),
        *["0: 3g.40gb at 4; 1: 3g.40gb at 4"] * 2,  # 3g at 0 wastes a slice
    ),
    "together not enough": (["4g.40gb@0=alice", "4g.40gb@0=bob"], "3g.40gb 3", (1, 1), "none", "none"),
}


@pytest.mark.parametrize(("there", "wish", "load", "least", "packed"), SEVERAL.values(), ids=SEVERAL)
def test_several_gpus(there: list[str], wish: str, load: tuple[int, ...], least: str, packed: str) -> None:
    gpus = [gpu(text, index=index) for index, text in enumerate(there)]
    profile, count = wish.split()
    loads = {f"GPU-{index}": number for index, number in enumerate(load)}
    for strategy, expected in (("least_allocated", least), ("packed", packed)):
        assert shown(cut_for(gpus, profile, int(count), loads, strategy)) == expected


# --- against every layout


def best(case: Case, profile: str, count: int) -> tuple[int, int] | None:
    """By brute force: how few unused ones go, and the longest run then; None: nothing fits."""
    stays = case.used | {place for place in case.before if place[0] == profile}
    ranks = []
    for layout in case.gpu.layouts:
        new = layout - case.before
        if stays <= layout and len(new) == count and all(name == profile for name, _ in new):
            ranks.append((len(case.before - layout), -case.gpu.run(layout)))
    return min(ranks, default=None)


def check(case: Case, profile: str, count: int) -> bool:
    """Exactly so many more, nothing in use touched, as few as possible dissolved; what comes of it is a layout
    that the planner takes."""
    cuts = cut_for([case.state()], profile, count)
    expected = best(case, profile, count)
    assert (cuts is None) == (expected is None), f"{case} {profile} {count}: {cuts}"
    if cuts is None:
        return False
    places: Layout = frozenset(cuts[0].instances)
    assert case.gpu.legal(places)
    assert case.used <= places
    new = places - case.before
    assert len(new) == count
    assert {name for name, _ in new} == {profile}
    assert (len(case.before - places), -case.gpu.run(places)) == expected, f"{case} {profile} {count}: {cuts}"
    plan = plan_placed(case.state(), cuts[0])
    assert isinstance(plan, Plan)
    assert len(plan.changes) == len(case.before ^ places)
    assert plan.broken == ()
    return True


@pytest.mark.parametrize("model", list(TABLES))
def test_a_sample_of_every_layout(model: str) -> None:
    """Every layout, with some of it in use."""
    chance, everything_ = random.Random(model), everything(model)  # noqa: S311 - a sample, not a secret
    names = [p.name for p in everything_.table.profiles]
    granted, asked = 0, 0
    for before in chance.sample(everything_.layouts, min(500, len(everything_.layouts))):
        used: set[Place] = {place for place in before if chance.random() < 0.4}
        granted += check(Case(model, before, (), frozenset(used)), chance.choice(names), chance.choice((1, 1, 2, 3)))
        asked += 1
    assert asked // 10 < granted < asked * 9 // 10, "the sample has both"


@pytest.mark.parametrize("count", [1, 2])
def test_every_profile_on_small_gpus(count: int) -> None:
    """All of the A30: every layout, each set of instances in use, every profile."""
    model = "A30-24GB"
    for before in everything(model).layouts:
        for size in range(len(before) + 1):
            for used in itertools.combinations(sorted(before), size):
                for profile in TABLES[model].profiles:
                    check(Case(model, before, (), frozenset(used)), profile.name, count)


def test_several_gpus_against_every_distribution() -> None:
    """Three GPUs, each by itself exact: no other distribution dissolves less, or leaves longer runs."""
    model, chance = "A100-SXM4-80GB", random.Random(3)  # noqa: S311 - a sample, not a secret
    layouts = everything(model).layouts
    for _ in range(60):
        cases = []
        for _ in range(3):
            before = chance.choice(layouts)
            cases.append(Case(model, before, (), frozenset(p for p in before if chance.random() < 0.5)))
        profile, count = chance.choice([p.name for p in A100.profiles]), chance.choice((1, 2, 3))
        gpus = [replace(case.state(), index=n, uuid=f"GPU-{n}") for n, case in enumerate(cases)]
        cuts = cut_for(gpus, profile, count)
        ranks = [
            [(0, -case.gpu.run(case.before)), *(best(case, profile, n) for n in range(1, count + 1))] for case in cases
        ]
        sums = []
        for numbers in itertools.product(range(count + 1), repeat=3):
            picked = [ranks[n][number] for n, number in enumerate(numbers)]
            if sum(numbers) == count and all(picked):
                sums.append(tuple(map(sum, zip(*picked, strict=True))))
        if cuts is None:
            assert sums == []
            continue
        after = [frozenset(cuts[n].instances) if n in cuts else case.before for n, case in enumerate(cases)]
        gone = sum(len(case.before - places) for case, places in zip(cases, after, strict=True))
        runs = sum(case.gpu.run(places) for case, places in zip(cases, after, strict=True))
        assert (gone, -runs) == min(sums)


@pytest.mark.parametrize(("profile", "count"), [("1g.10gb", 1), ("3g.40gb", 2), ("1g.10gb", 8)])
def test_eight_gpus_take_little_work(profile: str, count: int) -> None:
    """Seven small ones on each are the most ways there are. 18,000 calls take 5 ms."""
    gpus: list[GpuState] = [gpu("1g.10gb@6=alice 1g.20gb@0 2g.20gb@2", index=index) for index in range(8)]
    assert cut_for(gpus, profile, count)
    assert calls_of(lambda: cut_for(gpus, profile, count)) < 25_000
