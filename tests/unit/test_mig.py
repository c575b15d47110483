"""The planner on layouts that say by themselves what is right. Everything else: test_mig_exact.py."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from ds01 import mig
from ds01.mig import GpuState, Holder, LayoutRefusal, Plan, plan_gpu, plan_placed
from ds01.slotmap import Block, draw
from ds01.units import format_time
from mig_support import A100, TABLES, cut, gpu, held, instances, placed
from support import NOW, calls_of


def shown(plan: Plan | LayoutRefusal) -> str:
    """A plan in one line: `-2g.20gb@0 =1g.10gb@6 +3g.40gb@0`, the mode as `on` and `off`."""
    assert isinstance(plan, Plan), plan
    sign = {mig.DESTROY: "-", mig.KEEP: "=", mig.CREATE: "+"}
    mode = {mig.ENABLE: "on", mig.DISABLE: "off"}
    return " ".join(
        mode[s.action] if s.placement is None else f"{sign[s.action]}{s.profile}@{s.placement[0]}" for s in plan.steps
    )


def refused(answer: Plan | LayoutRefusal) -> LayoutRefusal:
    assert isinstance(answer, LayoutRefusal), answer
    return answer


SEVEN = " ".join(f"1g.10gb@{n}" for n in range(7))

PLANS = {
    "nothing to do": ("2g.20gb@0 2g.20gb@2", "2g.20gb 2g.20gb", "=2g.20gb@0 =2g.20gb@2"),
    "an empty GPU stays empty": ("", "", ""),
    "everything goes": ("2g.20gb@0 1g.10gb@6", "", "-2g.20gb@0 -1g.10gb@6"),
    "the slot that only 1g can use": ("", "1g.10gb", "+1g.10gb@6"),
    "3g where it wastes no compute slice": ("", "3g.40gb", "+3g.40gb@4"),
    "3g beside 4g": ("", "3g.40gb 4g.40gb", "+4g.40gb@0 +3g.40gb@4"),
    "the largest free run": ("", "2g.20gb", "+2g.20gb@0"),
    "two small ones leave room for 4g": ("", "1g.10gb 1g.10gb", "+1g.10gb@5 +1g.10gb@6"),
    "all seven": ("", "1g.10gb " * 7, " ".join(f"+1g.10gb@{n}" for n in range(7))),
    "mixed, in one way only": (
        "",
        "3g.40gb 2g.20gb 1g.10gb 1g.10gb",
        "+3g.40gb@4 +2g.20gb@0 +1g.10gb@2 +1g.10gb@3",
    ),
    "one of seven more": (
        SEVEN.replace(" 1g.10gb@3", ""),
        "1g.10gb " * 7,
        " ".join(f"=1g.10gb@{n}" for n in (0, 1, 2, 4, 5, 6)) + " +1g.10gb@3",
    ),
    "one of seven becomes +me": (
        SEVEN,
        "1g.10gb " * 6 + "1g.10gb+me",
        "-1g.10gb@6 " + " ".join(f"=1g.10gb@{n}" for n in range(6)) + " +1g.10gb+me@6",
    ),
    "one goes, which leaves the most": (
        "2g.20gb@0 2g.20gb@2 2g.20gb@4",
        "2g.20gb 2g.20gb",
        "-2g.20gb@4 =2g.20gb@0 =2g.20gb@2",
    ),
    "destroys come first": ("7g.80gb@0", "4g.40gb", "-7g.80gb@0 +4g.40gb@0"),
    "one in the middle moves": (
        "1g.10gb@2 1g.10gb@6",
        "4g.40gb 1g.10gb 1g.10gb",
        "-1g.10gb@2 =1g.10gb@6 +4g.40gb@0 +1g.10gb@4",
    ),
    "in use stays, the free one moves": (
        "2g.20gb@4=alice 2g.20gb@0",
        "4g.40gb 2g.20gb",
        "-2g.20gb@0 =2g.20gb@4 +4g.40gb@0",
    ),
    "a leftover without compute instance is made anew": ("2g.20gb@0?", "2g.20gb", "-2g.20gb@0 +2g.20gb@0"),
    "a leftover in the way": ("1g.10gb@0?", "7g.80gb", "-1g.10gb@0 +7g.80gb@0"),
    "MIG off": ("2g.20gb@0", "off", "-2g.20gb@0 off"),
}


@pytest.mark.parametrize(("before", "wanted", "steps"), PLANS.values(), ids=PLANS)
def test_plan(before: str, wanted: str, steps: str) -> None:
    assert shown(plan_gpu(gpu(before), cut(wanted))) == steps


def test_an_instance_that_somebody_divided_is_no_instance_of_its_profile() -> None:
    divided = replace(instances("3g.40gb@4")[0], whole=False, devices=("MIG-a", "MIG-b"))
    state = replace(gpu(), instances=(divided,))
    assert shown(plan_gpu(state, cut("3g.40gb"))) == "-3g.40gb@4 +3g.40gb@4"
    used = replace(state, instances=(replace(divided, holders=(held("bob"),)),))
    assert refused(plan_gpu(used, cut("3g.40gb"))).reason == "layout_in_use"


MODES = {
    "on and cut": (False, None, "2g.20gb", "on +2g.20gb@0"),
    "on": (False, None, "", "on"),
    "is on": (True, None, "", ""),
    "is off": (False, None, "off", ""),
    "off": (True, None, "off", "off"),
    "off is pending, on is wanted": (True, False, "", "on"),
    "on is pending, off is wanted": (False, True, "off", "off"),
    "on is pending, on is wanted": (False, True, "", "on"),
}


@pytest.mark.parametrize(("now", "pending", "wanted", "steps"), MODES.values(), ids=MODES)
def test_mode(now: bool, pending: bool | None, wanted: str, steps: str) -> None:
    assert shown(plan_gpu(replace(gpu(mig=now), pending=pending), cut(wanted))) == steps


def test_a_mode_is_never_changed_under_somebody() -> None:
    used = replace(gpu(mig=False), holders=(held("alice", 2),))
    found = refused(plan_gpu(used, cut("2g.20gb")))
    assert found.reason == "layout_in_use"
    assert found.blocked_by == used.holders
    assert found.available_at == NOW + timedelta(hours=2)
    assert shown(plan_gpu(used, cut("2g.20gb"), {"p._.alice"})) == "on +2g.20gb@0"
    assert shown(plan_gpu(used, cut("off"))) == ""
    assert refused(plan_gpu(gpu("2g.20gb@0=bob"), cut("off"))).blocked_by == (held("bob"),)


# --- in use


def test_the_refusal_names_who_is_in_the_way_and_until_when() -> None:
    state = gpu("2g.20gb@0=alice 2g.20gb@2 1g.10gb@6=bob", alice=held("alice", 3))
    found = refused(plan_gpu(state, cut("4g.40gb 1g.10gb")))
    assert found.reason == "layout_in_use"
    until = format_time(NOW + timedelta(hours=3))
    assert found.message == (
        f"GPU 0 cannot become 4g.40gb, 1g.10gb: 2g.20gb at 0-1 is in use by p._.alice of alice until {until}."
    )
    assert (found.available_at, found.blocked_by) == (NOW + timedelta(hours=3), (held("alice", 3),))
    assert found.retry


IN_THE_WAY = {
    "the fewest": ("1g.10gb@0=a 1g.10gb@1=b 2g.20gb@4=c", "3g.40gb 1g.10gb 1g.10gb", "c"),
    "not those that may stay": ("2g.20gb@0=a 1g.10gb@6=b", "1g.10gb", "a"),
    "more than wanted: those that are over first": ("1g.10gb@0=late 1g.10gb@1=soon", "1g.10gb", "soon"),
    "everybody": ("1g.10gb@0=a 2g.20gb@2=b", "7g.80gb", "a b"),
    "not the one that is forced": ("1g.10gb@0=a 2g.20gb@2=forced", "7g.80gb", "a"),
}


@pytest.mark.parametrize(("before", "wanted", "names"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_only_what_is_in_the_way_is_named(before: str, wanted: str, names: str) -> None:
    state = gpu(before, late=held("late", 9), soon=held("soon", 1))
    found = refused(plan_gpu(state, cut(wanted), {"p._.forced"}))
    assert [h.user for h in found.blocked_by] == names.split()


def test_force_breaks_whom_it_names_and_nobody_without_need() -> None:
    state = gpu("1g.10gb@0=alice 1g.10gb@6=bob")
    both = {"p._.alice", "p._.bob"}
    plan = plan_gpu(state, cut("4g.40gb 1g.10gb"), both)
    assert shown(plan) == "-1g.10gb@0 =1g.10gb@6 +4g.40gb@0"
    assert isinstance(plan, Plan)
    assert [i.holders for i in plan.broken] == [(held("alice"),)]
    assert refused(plan_gpu(state, cut("7g.80gb"), {"p._.alice"})).blocked_by == (held("bob"),)


def test_keeping_one_in_use_is_worth_more_operations() -> None:
    """Without bob's, three operations would do: 3g at 0, 1g.20gb at 6, and both 1g stay."""
    state = gpu("1g.20gb@2=bob 1g.10gb@4 1g.10gb@5")
    steps = shown(plan_gpu(state, cut("3g.40gb 1g.20gb 1g.10gb 1g.10gb"), {"p._.bob"}))
    assert steps == "-1g.10gb@4 -1g.10gb@5 =1g.20gb@2 +3g.40gb@4 +1g.10gb@0 +1g.10gb@1"


def test_what_is_no_container_of_ours_cannot_be_forced() -> None:
    stranger = Holder("", what="process 4711 (python of eve)")
    state = gpu("2g.20gb@0=eve", eve=stranger)
    found = refused(plan_gpu(state, cut("7g.80gb"), {"", "eve"}))
    assert "is in use by process 4711 (python of eve)" in found.message
    assert (found.hint, found.available_at) == ("", None)


# --- impossible


IMPOSSIBLE = {
    "no such profile": ("2g.10gb", "profile_not_available", "has no profile 2g.10gb; it has 1g.10gb,"),
    "too many": ("3g.40gb 3g.40gb 3g.40gb", "layout_impossible", "takes at most 2 x 3g.40gb; 3 were asked for"),
    "no room together": ("3g.40gb 3g.40gb 1g.10gb", "layout_impossible", "no room for 2 x 3g.40gb, 1g.10gb together"),
    "the media engines twice": ("1g.10gb+me 1g.10gb+me", "layout_impossible", "one set of media engines"),
}


@pytest.mark.parametrize(("wanted", "reason", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible(wanted: str, reason: str, message: str) -> None:
    for state in (gpu(), gpu("2g.20gb@0=alice")):
        found = refused(plan_gpu(state, cut(wanted)))
        assert (found.reason, found.retry, found.blocked_by) == (reason, False, ())
        assert message in found.message


def test_near_misses_are_offered() -> None:
    assert refused(plan_gpu(gpu(), cut("2g.20g"))).hint == "Did you mean 2g.20gb?"


def test_gpus_that_have_no_mig_or_are_gone() -> None:
    no_mig = replace(gpu(mig=False), capable=False, table=mig.Table())
    assert refused(plan_gpu(no_mig, cut(""))).message == "GPU 0 (NVIDIA A100) has no MIG."
    assert shown(plan_gpu(no_mig, cut("off"))) == ""
    assert refused(plan_gpu(replace(gpu(), health="lost"), cut("off"))).reason == "gpu_unhealthy"


# --- to the slice

PLACED = {
    "all of it, on an empty GPU": ("", "2g.20gb@2 1g.10gb@6", "+2g.20gb@2 +1g.10gb@6"),
    "it is so": ("2g.20gb@2=alice 1g.10gb@6", "1g.10gb@6 2g.20gb@2", "=2g.20gb@2 =1g.10gb@6"),
    "the same profile in another place is another instance": ("2g.20gb@0", "2g.20gb@2", "-2g.20gb@0 +2g.20gb@2"),
    "what is not in it goes": ("1g.10gb@0 1g.10gb@6", "1g.10gb@6", "-1g.10gb@0 =1g.10gb@6"),
    "none at all": ("1g.10gb@0", "", "-1g.10gb@0"),
    "a leftover is made anew": ("2g.20gb@2?", "2g.20gb@2", "-2g.20gb@2 +2g.20gb@2"),
    "MIG off": ("2g.20gb@0", "off", "-2g.20gb@0 off"),
    "what a search would not choose": ("", "3g.40gb@0 1g.10gb@4", "+3g.40gb@0 +1g.10gb@4"),
}


@pytest.mark.parametrize(("before", "wanted", "steps"), PLACED.values(), ids=PLACED)
def test_placed(before: str, wanted: str, steps: str) -> None:
    assert shown(plan_placed(gpu(before), placed(wanted))) == steps


def test_placed_switches_the_mode_on_first() -> None:
    off = gpu(mig=False)
    assert shown(plan_placed(off, placed("2g.20gb@2"))) == "on +2g.20gb@2"
    used = replace(off, holders=(held("alice"),))
    assert refused(plan_placed(used, placed("2g.20gb@2"))).blocked_by == (held("alice"),)


NOT_PLACED = {
    "somebody is elsewhere": (
        "2g.20gb@0=alice",
        "2g.20gb@2",
        "layout_in_use",
        "GPU 0 cannot become 2g.20gb at 2: 2g.20gb at 0-1 is in use by p._.alice of alice.",
    ),
    "somebody, and MIG off": ("2g.20gb@0=alice", "off", "layout_in_use", "GPU 0 cannot become a whole GPU: "),
    "no such start": (
        "",
        "2g.20gb@1",
        "layout_impossible",
        "GPU 0 (NVIDIA A100) has no 2g.20gb at 1; it can start at 0, 2, 4.",
    ),
    "one over another": ("", "4g.40gb@0 2g.20gb@2", "layout_impossible", "no room for 4g.40gb at 0, 2g.20gb at 2"),
    "one twice": ("", "2g.20gb@0 2g.20gb@0", "layout_impossible", "2g.20gb at 0 overlaps another one."),
    "the media engines twice": ("", "1g.10gb+me@0 1g.10gb+me@1", "layout_impossible", "one set of media engines"),
    "no such profile": ("", "2g.10gb@0", "profile_not_available", "has no profile 2g.10gb"),
}


@pytest.mark.parametrize(("before", "wanted", "reason", "message"), NOT_PLACED.values(), ids=NOT_PLACED)
def test_not_placed(before: str, wanted: str, reason: str, message: str) -> None:
    found = refused(plan_placed(gpu(before), placed(wanted)))
    assert found.reason == reason
    assert message in found.message


def test_placed_breaks_whom_force_names() -> None:
    plan = plan_placed(gpu("2g.20gb@0=alice"), placed("2g.20gb@2"), {"p._.alice"})
    assert shown(plan) == "-2g.20gb@0 +2g.20gb@2"
    assert isinstance(plan, Plan)
    assert [i.holders for i in plan.broken] == [(held("alice"),)]


# --- several GPUs, and how long it takes


def test_a_host_s_plans_are_those_of_its_gpus_and_their_refusals() -> None:
    gpus = [gpu("2g.20gb@0", index=0), gpu("2g.20gb@0=bob", index=1), gpu("1g.10gb@0", index=2)]
    found = mig.plan(gpus, {0: cut("2g.20gb"), 1: cut("7g.80gb"), 3: cut("off")})
    assert [(p.gpu, p.changes) for p in found.plans] == [(0, ())]
    assert [(r.gpu, r.reason) for r in found.refusals] == [(1, "layout_in_use")]


HARDEST = {
    "A100-SXM4-80GB": "1g.10gb 1g.10gb 1g.10gb+me 1g.20gb",
    "RTX-PRO-6000": "1g.24gb 1g.24gb+gfx 1g.24gb+me 1g.24gb-me",
}


def eight(model: str) -> list[GpuState]:
    return [gpu("", TABLES[model], index) for index in range(8)]


@pytest.mark.parametrize("model", HARDEST)
def test_eight_gpus_take_little_work(model: str) -> None:
    """The layouts with the most ways to place them. A busy machine is slow, not wrong: the time itself (40 ms) is
    for `make bench` to measure, where 16,000 calls take 3 ms."""
    cuts = dict.fromkeys(range(8), cut(HARDEST[model]))
    assert not mig.plan(eight(model), cuts).refusals
    assert calls_of(lambda: mig.plan(eight(model), cuts)) < 25_000


# --- what is still possible


POSSIBLE = {
    "empty": ("", "1g.10gb:7 1g.10gb+me:7 1g.20gb:4 2g.20gb:3 3g.40gb:2 4g.40gb:1 7g.80gb:1"),
    "three of 2g": ("2g.20gb@0 2g.20gb@2 2g.20gb@4", "1g.10gb:1 1g.10gb+me:1 1g.20gb:1"),
    "media taken": ("1g.10gb+me@0 4g.40gb@0", "1g.10gb:3 1g.20gb:2 2g.20gb:1 3g.40gb:1"),
    "full": ("7g.80gb@0", ""),
}


@pytest.mark.parametrize(("before", "expected"), POSSIBLE.values(), ids=POSSIBLE)
def test_possible(before: str, expected: str) -> None:
    found = mig.possible(A100, instances(before))
    assert " ".join(f"{name}:{len(starts)}" for name, starts in found.items()) == expected


# --- drawn


@pytest.mark.parametrize(
    ("model", "text"), [("A30-24GB", "1g.6gb+me@1"), ("RTX-PRO-6000", "1g.24gb+me.all@3 2g.48gb@6")]
)
def test_a_map_fits_a_terminal_and_its_lines_line_up(model: str, text: str) -> None:
    table = TABLES[model]
    blocks = [Block(i.start, i.size, i.profile, "somebody-with-a-long-name") for i in instances(text, table)]
    labels, owners, numbers = draw(table.width, blocks)
    assert len(labels) == len(owners) <= 76
    for block in blocks:
        assert labels[numbers.index(f" {block.start}") :].startswith("|" + block.label)
    assert [n for n, c in enumerate(labels) if c == "|"] == [n for n, c in enumerate(owners) if c == "|"]


def test_an_empty_gpu_is_one_free_run() -> None:
    assert draw(4, []) == ["|" + "." * 63 + "|", " 0               1               2               3"]
