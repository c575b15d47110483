"""What is to be done about slices: each limit, each way that a user leaves, and when nothing is."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from ds01 import limits, slice_drift
from ds01.limits import Config, parse_config
from ds01.names import user_slice
from ds01.slice_drift import LiveSlice, Scope, amounts, cut_off, decide
from hypothesis import given
from hypothesis import strategies as st

G = 1024**3
ALICE = "ds01-lab-alice.slice"
AGGREGATE: dict[str, Any] = {"cpu_quota": "400%", "memory_max": "64g", "memory_high": "60g", "tasks_max": 1000}
NOTHING: dict[str, None] = dict.fromkeys(AGGREGATE)
IN_FORCE: dict[str, Any] = {
    "CPUQuota": Fraction(4),
    "MemoryMax": 64 * G,
    "MemoryHigh": 60 * G,
    "TasksMax": 1000,
}


def config(aggregate: dict[str, Any] | None = None, **members: list[str]) -> Config:
    """Groups lab (alice, unless named otherwise) and student; `aggregate` is lab's."""
    groups = {"lab": ["alice"], "student": [], **members}
    own = {"lab": AGGREGATE if aggregate is None else aggregate, "student": NOTHING}
    return parse_config({"groups": {g: {"members": m, "aggregate": own.get(g)} for g, m in groups.items()}})


def live(name: str = ALICE, **fields: Any) -> LiveSlice:
    return LiveSlice(name, **{"limits": IN_FORCE, "empty": False, "containers": ("1" * 64,), **fields})


def kinds(found: list[LiveSlice], of: Config, users: tuple[str, ...] = ("alice", "bob")) -> list[tuple[str, str]]:
    return [(action.kind, action.subject) for action in decide(of, found, users)]


def test_what_is_in_force_stays() -> None:
    assert kinds([live("ds01-lab.slice", limits={}), live()], config()) == []


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("CPUQuota", Fraction(3), "CPUQuota 300% -> 400%"),
        ("CPUQuota", None, "CPUQuota unlimited -> 400%"),
        ("CPUQuota", Fraction(1, 3), "CPUQuota 33.33% -> 400%"),
        ("MemoryMax", 32 * G, "MemoryMax 32G -> 64G"),
        ("MemoryMax", 64 * G + 4096, "MemoryMax 67108868K -> 64G"),
        ("MemoryMax", None, "MemoryMax unlimited -> 64G"),
        ("MemoryHigh", 61 * G, "MemoryHigh 61G -> 60G"),
        ("TasksMax", 1001, "TasksMax 1001 -> 1000"),
        ("TasksMax", None, "TasksMax unlimited -> 1000"),
    ],
)
def test_a_limit_that_is_another_is_changed_and_all_are_written(key: str, value: Any, sentence: str) -> None:
    (action,) = decide(config(), [live(limits={**IN_FORCE, key: value})], ["alice"])
    assert (action.kind, action.subject, action.user) == ("slice.changed", ALICE, "alice")
    assert action.message == f"The slice of alice: {sentence}."
    assert action.details["properties"] == {
        "CPUQuota": "400%",
        "MemoryMax": str(64 * G),
        "MemoryHigh": str(60 * G),
        "TasksMax": "1000",
    }


def test_unlimited_is_lifted() -> None:
    (action,) = decide(config(NOTHING), [live()], ["alice"])
    assert action.details["properties"] == limits.NO_LIMIT
    assert kinds([live(limits=dict.fromkeys(IN_FORCE))], config(NOTHING)) == []


def test_what_the_host_cannot_enforce_is_not_asked_for() -> None:
    """cgroup v1 knows no MemoryHigh."""
    on_v1 = {key: value for key, value in IN_FORCE.items() if key != "MemoryHigh"}
    assert kinds([live(limits=on_v1)], config()) == []
    (action,) = decide(config(), [live(limits={**on_v1, "TasksMax": 1})], ["alice"])
    assert set(action.details["properties"]) == {"CPUQuota", "MemoryMax", "TasksMax"}


@pytest.mark.parametrize(
    ("aggregate", "in_force"),
    [
        ({"memory_max": "1.3g"}, {"MemoryMax": 1395863552}),
        ({"cpu_quota": "33.33%"}, {"CPUQuota": Fraction(33330, 100000)}),
        ({"cpu_quota": "0.3%"}, {"CPUQuota": Fraction(1000, 333333)}),
        ({"cpu_quota": "0.01%"}, {"CPUQuota": Fraction(1000, 1000000)}),
        ({"tasks_max": 99999999}, {"TasksMax": None}),
    ],
    ids=str,
)
def test_what_the_kernel_rounds_is_in_force(aggregate: dict[str, Any], in_force: dict[str, Any]) -> None:
    nothing = dict.fromkeys(IN_FORCE)
    assert kinds([live(limits={**nothing, **in_force})], config({**NOTHING, **aggregate})) == []


def test_no_limit_goes_below_what_is_in_use() -> None:
    """Less memory than processes hold would kill them; a v1 kernel refuses less CPU than a container's own."""
    floor = {"MemoryMax": 70 * G, "CPUQuota": Fraction(5)}
    wide = {**IN_FORCE, "MemoryMax": 100 * G, "CPUQuota": Fraction(8)}
    first, second = decide(config(), [live(limits=wide, floor=floor)], ["alice"])
    assert [first.kind, second.kind] == ["slice.deferred", "slice.deferred"]
    assert first.message == (
        "CPUQuota of alice's slice stays 800% until it can be 400%: the containers in it now need 500%."
    )
    assert second.message == (
        "MemoryMax of alice's slice stays 100G until it can be 64G: the containers in it now need 70G."
    )
    *_, change = decide(config(), [live(limits={**wide, "TasksMax": 5}, floor=floor)], ["alice"])
    assert (change.kind, change.details["properties"]) == (
        "slice.changed",
        {"CPUQuota": "800%", "MemoryMax": str(100 * G), "MemoryHigh": str(60 * G), "TasksMax": "1000"},
    )
    assert kinds([live(limits=wide, floor={"MemoryMax": 64 * G})], config()) == [("slice.changed", ALICE)]


def test_who_moved_keeps_running_where_he_is_with_the_limits_of_his_group_now() -> None:
    moved = config(lab=[], student=["alice"])
    assert kinds([live()], moved) == [("slice.moved", ALICE), ("slice.changed", ALICE)]
    said, change = decide(moved, [live()], ["alice"])
    assert said.message == (
        "alice is in group student now, and 1 container(s) still run in the slice of lab, with student's limits; "
        "containers made anew are in ds01-student-alice.slice, and as long as both have some, each has half of these "
        "limits."
    )
    assert said.details == {"group": "student", "container_ids": ["1" * 64]}
    assert change.details["properties"] == limits.NO_LIMIT


def test_two_slices_of_one_user_have_no_more_than_one() -> None:
    """Who moved has a slice in the old group and one in the new: together they get the aggregate once."""
    old = "ds01-student-alice.slice"
    half = {"CPUQuota": Fraction(2), "MemoryMax": 32 * G, "MemoryHigh": 30 * G, "TasksMax": 500}
    assert kinds([live(), live(old)], config()) == [
        ("slice.moved", old),
        ("slice.changed", old),
        ("slice.changed", ALICE),
    ]
    written = [a.details["properties"] for a in decide(config(), [live(), live(old)], ["alice"]) if "changed" in a.kind]
    assert (
        written
        == [
            {"CPUQuota": "200%", "MemoryMax": str(32 * G), "MemoryHigh": str(30 * G), "TasksMax": "500"},
        ]
        * 2
    )
    assert kinds([live(limits=half), live(old, limits=half)], config()) == [("slice.moved", old)]
    assert kinds([live(limits=half)], config()) == [("slice.changed", ALICE)], "the other one is gone"
    assert kinds([live(empty=True), live(old)], config()) == [("slice.moved", old)], "nothing runs in the new one yet"
    assert kinds([live(), live("ds01-student-bob.slice", limits=dict.fromkeys(IN_FORCE))], config()) == []


@given(st.integers(1, 4), st.sampled_from([4096, 65536]))
def test_parts_add_up_to_no_more_than_the_whole(parts: int, page: int) -> None:
    places = [live(f"ds01-g{n}-alice.slice", limits=dict.fromkeys(IN_FORCE), page=page) for n in range(parts)]
    changes = [a for a in decide(config(), places, ["alice"]) if a.kind == "slice.changed"]
    assert len(changes) == parts
    for key in ("MemoryMax", "MemoryHigh", "TasksMax"):
        amount = sum(int(change.details["properties"][key]) for change in changes)
        assert amount <= int(IN_FORCE[key])
        assert amount > int(IN_FORCE[key]) - parts * page
    assert sum(Fraction(c.details["properties"]["CPUQuota"].rstrip("%")) for c in changes) <= 400


LEFT = {
    "a user with containers, none of which runs": (ALICE, ("alice",), []),
    "a user without a container": (ALICE, (), ["slice.removed"]),
    "a user who moved, and nothing runs any more": ("ds01-student-alice.slice", ("alice",), ["slice.removed"]),
    "a user of a group that is no more": ("ds01-old-alice.slice", ("alice",), ["slice.removed"]),
    "somebody whom the limits file never named": ("ds01-student-zed.slice", ("zed",), []),
    "a group that is no more": ("ds01-old.slice", (), ["slice.removed"]),
    "a group": ("ds01-lab.slice", (), []),
    "the default group": ("ds01-student.slice", (), []),
    "not one of DS01's names": ("ds01-a-b-c.slice", (), []),
    "a name that was never escaped so": (r"ds01-lab-\x61lice.slice", (), []),
}


@pytest.mark.parametrize(("name", "users", "expected"), LEFT.values(), ids=LEFT)
def test_an_empty_slice(name: str, users: tuple[str, ...], expected: list[str]) -> None:
    unlimited = dict.fromkeys(IN_FORCE)
    everything = IN_FORCE if name == ALICE else unlimited
    found = live(name, empty=True, containers=(), limits=everything)
    assert [kind for kind, _ in kinds([found], config(), users)] == expected


@pytest.mark.parametrize(("name", "users", "expected"), LEFT.values(), ids=LEFT)
def test_a_slice_that_is_not_empty_is_never_removed(name: str, users: tuple[str, ...], expected: list[str]) -> None:
    assert "slice.removed" not in [kind for kind, _ in kinds([live(name)], config(), users)]


def test_a_group_s_slice_goes_after_those_in_it_and_only_with_them() -> None:
    group, one, two = (replace(live(), name=f"ds01-old{rest}.slice", empty=True) for rest in ("", "-alice", "-bob"))
    assert kinds([group, one, two], config()) == [
        ("slice.removed", "ds01-old-bob.slice"),
        ("slice.removed", "ds01-old-alice.slice"),
        ("slice.removed", "ds01-old.slice"),
    ]
    # It is not empty then; its cgroup may just not have said so yet.
    assert ("slice.removed", "ds01-old.slice") not in kinds([group, one, replace(two, empty=False)], config())


NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12),
    st.sampled_from(["john.doe", "john_doe", "john-doe", "a@x.org", "a@y.org", "@foo", "mary-ann", ".dot", r"a\x2db"]),
)


@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), st.data())
def test_a_slice_is_judged_by_the_limits_of_its_one_owner(users: list[str], data: st.DataObject) -> None:
    """Whatever people are called, a slice that has its owner's limits is left alone, and so is nobody else's."""
    owner = data.draw(st.sampled_from(users))
    document = {"groups": {"lab": {"aggregate": NOTHING}}, "default_group": "lab"}
    document["user_overrides"] = {owner: {"aggregate": AGGREGATE}}
    parsed = parse_config(document)
    found = [
        live(user_slice("lab", user), limits=IN_FORCE if user == owner else dict.fromkeys(IN_FORCE)) for user in users
    ]
    assert kinds(found, parsed, tuple(users)) == []
    wrong = [replace(found[users.index(owner)], limits=dict.fromkeys(IN_FORCE))]
    assert [action.user for action in decide(parsed, wrong, users)] == [owner]


@given(
    st.fractions(Fraction(1, 100), 512, max_denominator=10000).map(lambda cores: Fraction(int(cores * 10000), 10000)),
    st.integers(4096, 2**45),
    st.integers(1, slice_drift.MAX_TASKS),
)
def test_a_second_look_finds_nothing_to_do(cores: Fraction, memory: int, tasks: int) -> None:
    """What is written for a wish is what the wish is compared with afterwards."""
    wish = {
        "cpu_quota": f"{float(cores * 100):.2f}%",
        "memory_max": f"{memory}b",
        "memory_high": None,
        "tasks_max": tasks,
    }
    (action,) = decide(config(wish), [live(limits=dict.fromkeys(IN_FORCE))], ["alice"])
    written = action.details["properties"]
    now = {
        "CPUQuota": Fraction(written["CPUQuota"].rstrip("%")) / 100,
        "MemoryMax": int(written["MemoryMax"]),
        "MemoryHigh": None,
        "TasksMax": int(written["TasksMax"]),
    }
    assert kinds([live(limits=now)], config(wish)) == []


def test_the_amounts_of_an_aggregate() -> None:
    parsed = limits.resolve(config(), "alice").aggregate
    assert amounts(parsed) == IN_FORCE


RULES = ("char-* m", "block-* m", "/dev/char/1:3 rwm")
RELOADS: dict[str, tuple[bool, tuple[str, ...] | None, bool]] = {
    "CDI: systemd was told of the nodes": (True, (*RULES, "/dev/char/195:1 rwm"), False),
    "nodes named by their paths": (True, (*RULES, "/dev/nvidia0 rw"), False),
    "NVIDIA's hook: it was not": (True, RULES, True),
    "may only be made, not opened": (True, (*RULES, "/dev/char/195:1 m"), True),
    "no GPU": (False, RULES, False),
    "privileged: no rules": (True, (), False),
    "no scope: another cgroup driver": (True, None, False),
    "all devices": (True, ("char-* rwm",), False),
}


@pytest.mark.parametrize(("gpu", "rules", "cut"), RELOADS.values(), ids=RELOADS)
def test_who_is_cut_off_by_a_daemon_reload(gpu: bool, rules: tuple[str, ...] | None, cut: bool) -> None:
    assert cut_off([Scope("box", gpu, rules)]) == (("box",) if cut else ())
