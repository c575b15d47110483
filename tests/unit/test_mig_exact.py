"""The planner against brute force: every layout there is, judged one by one.

The judge shares nothing with the planner but the tables: sets of slices instead of bits, all layouts
of a GPU instead of a search. The product of all layouts, wishes and instances in use is too large; it is
sampled with a fixed seed, besides the parts that are small enough to be done whole. DS01_MIG_CASES
asks for more of the sample.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from ds01.mig import (
    CREATE,
    DESTROY,
    KEEP,
    Cut,
    GpuState,
    Instance,
    LayoutRefusal,
    Placed,
    Plan,
    Table,
    plan_gpu,
    plan_placed,
)
from hypothesis import given
from hypothesis import strategies as st
from mig_support import TABLES, held

CASES = int(os.environ.get("DS01_MIG_CASES", "4000"))
MODELS = list(TABLES)

Place = tuple[str, int]  # a profile and where it starts
Layout = frozenset[Place]
Wish = tuple[str, ...]  # profiles, sorted


@dataclass(frozen=True)
class Gpu:
    """All that can be made of one model."""

    table: Table
    layouts: tuple[Layout, ...]
    by_wish: dict[Wish, list[Layout]]

    def slices(self, place: Place) -> frozenset[int]:
        return frozenset(range(place[1], place[1] + self.table.by_name[place[0]].size))

    def taken(self, layout: Layout) -> frozenset[int]:
        return frozenset().union(*map(self.slices, layout))

    def legal(self, layout: Layout) -> bool:
        """What the driver takes: nothing overlaps, one at most with the media engines, no profile too often."""
        size = sum(len(self.slices(place)) for place in layout)
        count = Counter(name for name, _ in layout)
        return (
            len(self.taken(layout)) == size
            and sum("+me" in name for name, _ in layout) <= 1
            and all(count[name] <= self.table.by_name[name].most for name in count)
        )

    def run(self, layout: Layout) -> int:
        """The longest run of free slices that the smallest profile can use."""
        smallest = min(p.size for p in self.table.profiles)
        usable = {n for p in self.table.profiles if p.size == smallest for s in p.starts for n in range(s, s + p.size)}
        free = usable - self.taken(layout)
        line = "".join("x" if n in free else " " for n in range(max(usable) + 2))
        return max(map(len, line.split()), default=0)


@functools.cache
def everything(model: str) -> Gpu:
    table = TABLES[model]
    empty = Gpu(table, (), {})
    places = [(p.name, start) for p in table.profiles for start in p.starts]
    found: list[Layout] = [frozenset()]
    for place in places:  # each layout with and without it
        found += [bigger for layout in found if empty.legal(bigger := layout | {place})]
    by_wish = defaultdict(list)
    for layout in found:
        by_wish[tuple(sorted(name for name, _ in layout))].append(layout)
    return Gpu(table, tuple(found), dict(by_wish))


@dataclass(frozen=True)
class Case:
    """A GPU that is cut in `before`; `used` and `forced` are in use (those that are not there are missing); `wish`
    is wanted."""

    model: str
    before: Layout
    wish: Wish
    used: Layout = frozenset()
    forced: Layout = frozenset()

    @property
    def gpu(self) -> Gpu:
        return everything(self.model)

    @property
    def by_user(self) -> dict[str, Place]:
        return {f"u{number}": place for number, place in enumerate(sorted(self.before | self.used | self.forced))}

    def state(self) -> GpuState:
        def instance(user: str, place: Place) -> Instance:
            who = (held(user),) if place in self.used else (held("forced"),) if place in self.forced else ()
            size = self.gpu.table.by_name[place[0]].size
            return Instance(int(user[1:]), *place, size, (f"MIG-{user}",), True, who, place in self.before)

        found = [instance(user, place) for user, place in self.by_user.items() if place in self.before]
        missing = [instance(user, place) for user, place in self.by_user.items() if place not in self.before]
        return GpuState(0, "GPU-0", self.model, True, self.gpu.table, tuple(found), tuple(missing))

    def answer(self) -> Plan | LayoutRefusal:
        return plan_gpu(self.state(), Cut(True, self.wish), {"p._.forced"})


def carried_out(case: Case, plan: Plan) -> Layout:
    """The layout after the plan, which the driver would have taken step by step."""
    now = set(case.before)
    for step in plan.steps:
        assert step.placement is not None
        place = (step.profile, step.placement[0])
        assert step.placement[1] == len(case.gpu.slices(place))
        if step.action == CREATE:
            assert step.placement[0] in case.gpu.table.by_name[step.profile].starts
            now.add(place)
            assert case.gpu.legal(frozenset(now))
        else:
            assert place in now
            assert step.action in (KEEP, DESTROY)
            now -= {place} if step.action == DESTROY else set()
    order = [step.action for step in plan.steps]
    assert order == sorted(order, key=[DESTROY, KEEP, CREATE].index)
    return frozenset(now)


def check(case: Case) -> None:
    answer = case.answer()
    fitting = [layout for layout in case.gpu.by_wish.get(case.wish, ()) if layout >= case.used]
    if not fitting:
        check_refusal(case, answer)
        return
    assert isinstance(answer, Plan), f"{case}: {answer}"
    after = carried_out(case, answer)
    assert after in fitting, case

    def rank(layout: Layout) -> tuple[int, int, int]:
        """Broken, operations, free run: what the best layout has the least of, the least of, the most of."""
        operations = len(case.before ^ layout)
        return len(case.forced - layout), operations, -case.gpu.run(layout)

    best = min(map(rank, fitting))
    assert rank(after) == best, case
    assert (len(answer.broken), len(answer.changes)) == best[:2], case
    assert {(i.profile, i.start) for i in answer.broken} == case.forced - after


def check_refusal(case: Case, answer: Plan | LayoutRefusal) -> None:
    """Either the profiles do not fit at all, or as few as possible are in the way."""
    assert isinstance(answer, LayoutRefusal), f"{case}: {answer}"
    anyway = case.gpu.by_wish.get(case.wish)
    if not anyway:
        assert answer.reason == "layout_impossible"
        return
    assert answer.reason == "layout_in_use"
    named = {case.by_user[holder.user] for holder in answer.blocked_by}
    assert named <= case.used
    assert len(named) == min(len(case.used - layout) for layout in anyway), case
    assert any(case.used - named <= layout for layout in anyway)


def sampled(model: str, count: int) -> Iterator[Case]:
    """Cases as they come: any layout, any wish (some impossible), some in use, some of those forced."""
    chance, gpu = random.Random(f"{model} {count}"), everything(model)  # noqa: S311 - a sample, not a secret
    names, wishes = [p.name for p in gpu.table.profiles], list(gpu.by_wish)
    for _ in range(count):
        before, wish = chance.choice(gpu.layouts), chance.choice(wishes)
        if chance.random() < 0.1:
            wish = tuple(sorted([*wish, chance.choice(names)]))
        if chance.random() < 0.3:  # a small change, as admins make them
            wish = tuple(sorted(name for name, _ in list(before)[: chance.randrange(len(before) + 1)]))
        busy = {place: chance.choice(("free", "free", "used", "forced")) for place in sorted(before)}
        of = lambda kind, b=busy: frozenset(place for place, state in b.items() if state == kind)  # noqa: E731
        yield Case(model, before, wish, of("used"), of("forced"))


def test_all_layouts_are_known() -> None:
    """By hand, of the A30: each half is empty, two 1g or less, or a 2g (5 ways), or the whole is a 4g: 26; and
    with +me as a 1g (4 places, 2 ways beside it, 5 for the other half) or as a 2g (2 places, 5): 50 more."""
    assert [len(everything(model).layouts) for model in MODELS] == [2319, 76, 1009]


@pytest.mark.parametrize("model", MODELS)
def test_a_sample_of_everything(model: str) -> None:
    refusals = 0
    for case in sampled(model, CASES):
        check(case)
        refusals += isinstance(case.answer(), LayoutRefusal)
    assert CASES // 10 < refusals < CASES * 9 // 10, "the sample has both"


@pytest.mark.parametrize("model", MODELS)
def test_what_is_missing_comes_back_in_its_place(model: str) -> None:
    """As after a reboot or a reset, with whatever was cut since."""
    chance, gpu = random.Random(f"missing {model}"), everything(model)  # noqa: S311 - a sample, not a secret
    refusals = 0
    for case in sampled(model, CASES):
        recorded = chance.choice(gpu.layouts) - case.before
        forced = frozenset(place for place in sorted(recorded) if chance.random() < 0.3)
        wish = tuple(sorted(name for name, _ in recorded)) if chance.random() < 0.3 else case.wish
        given_back = Case(model, case.before, wish, case.used | (recorded - forced), case.forced | forced)
        check(given_back)
        refusals += isinstance(given_back.answer(), LayoutRefusal)
        check_placed(given_back, tuple(sorted(chance.choice((recorded, *gpu.layouts[:20])))))
    assert CASES // 10 < refusals < CASES, "the sample has both"


@pytest.mark.parametrize("model", MODELS)
def test_what_is_as_wanted_stays_in_use_or_not(model: str) -> None:
    """All layouts: an apply that changes nothing makes no call."""
    for wish, layouts in everything(model).by_wish.items():
        for layout in layouts:
            for used in (frozenset(), layout):
                answer = Case(model, layout, wish, used).answer()
                assert isinstance(answer, Plan)
                assert answer.changes == ()
                assert len(answer.steps) == len(layout)


@pytest.mark.parametrize("model", MODELS)
def test_every_wish_on_an_empty_gpu(model: str) -> None:
    """All sets of up to eight profiles, whether they fit or not."""
    gpu = everything(model)
    names = sorted(p.name for p in gpu.table.profiles)
    most = 8 if len(names) < 8 else 4
    for count in range(most + 1):
        for wish in itertools.combinations_with_replacement(names, count):
            check(Case(model, frozenset(), wish))


@pytest.mark.parametrize("model", MODELS)
def test_one_in_use_is_never_touched(model: str) -> None:
    """All layouts with each of their instances in use, whatever is wanted (one wish each, in turn)."""
    gpu = everything(model)
    wishes = itertools.cycle(gpu.by_wish)
    for layout in gpu.layouts:
        for place in sorted(layout):
            check(Case(model, layout, next(wishes), frozenset({place})))


@given(st.data())
def test_any_case(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(MODELS))
    gpu = everything(model)
    before = data.draw(st.sampled_from(gpu.layouts))
    wish = data.draw(st.lists(st.sampled_from([p.name for p in gpu.table.profiles]), max_size=8))
    used = data.draw(st.sets(st.sampled_from(sorted(before)))) if before else set()
    forced = data.draw(st.sets(st.sampled_from(sorted(used)))) if used else set()
    check(Case(model, before, tuple(sorted(wish)), frozenset(used - forced), frozenset(forced)))


@pytest.mark.parametrize("model", MODELS)
def test_the_order_of_names_and_instances_does_not_matter(model: str) -> None:
    for case in sampled(model, 200):
        state, answer = case.state(), case.answer()
        turned = GpuState(0, "GPU-0", model, True, state.table, state.instances[::-1], state.missing)
        again = plan_gpu(turned, Cut(True, case.wish[::-1]), {"p._.forced"})
        if isinstance(answer, Plan):
            assert isinstance(again, Plan)
            assert again.steps == answer.steps
        else:
            assert isinstance(again, LayoutRefusal)
            assert again.blocked_by == answer.blocked_by


# --- to the slice


def check_placed(case: Case, wanted: tuple[Place, ...]) -> None:
    """Exactly this comes of it, with no operation too many; or what is in the way is named, all of it."""
    answer = plan_placed(case.state(), Placed(True, wanted), {"p._.forced"})
    places = frozenset(wanted)
    places_exist = all(start in case.gpu.table.by_name[name].starts for name, start in wanted)
    if not (places_exist and len(places) == len(wanted) and case.gpu.legal(places)):
        assert isinstance(answer, LayoutRefusal), f"{case} {wanted}"
        assert answer.reason == "layout_impossible"
    elif not case.used <= places:
        assert isinstance(answer, LayoutRefusal), f"{case} {wanted}"
        assert {case.by_user[holder.user] for holder in answer.blocked_by} == case.used - places
    else:
        assert isinstance(answer, Plan), f"{case} {wanted}: {answer}"
        assert carried_out(case, answer) == places
        assert len(answer.changes) == len(case.before ^ places)
        assert {(i.profile, i.start) for i in answer.broken} == case.forced - places


@pytest.mark.parametrize("model", MODELS)
def test_each_layout_out_of_another(model: str) -> None:
    """Every layout is reached, from whatever was there, with whatever was in use."""
    chance, gpu = random.Random(model), everything(model)  # noqa: S311 - a sample, not a secret
    for wanted in gpu.layouts:
        before = chance.choice(gpu.layouts)
        busy = {place: chance.choice(("free", "free", "used", "forced")) for place in sorted(before)}
        of = lambda kind, b=busy: frozenset(place for place, state in b.items() if state == kind)  # noqa: E731
        check_placed(Case(model, before, (), of("used"), of("forced")), tuple(wanted))
        check_placed(Case(model, wanted, (), wanted), tuple(wanted))


@given(st.data())
def test_any_places(data: st.DataObject) -> None:
    """Also those that no GPU can have."""
    model = data.draw(st.sampled_from(MODELS))
    gpu = everything(model)
    before = data.draw(st.sampled_from(gpu.layouts))
    anywhere = st.tuples(st.sampled_from([p.name for p in gpu.table.profiles]), st.integers(-1, 12))
    wanted = data.draw(st.one_of(st.lists(anywhere, max_size=4), st.sampled_from(gpu.layouts).map(sorted)))
    used = data.draw(st.sets(st.sampled_from(sorted(before)))) if before else set()
    forced = data.draw(st.sets(st.sampled_from(sorted(used)))) if used else set()
    check_placed(Case(model, before, (), frozenset(used - forced), frozenset(forced)), tuple(wanted))
