"""Plans as people read them: before and after, GPU by GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ds01 import mig, mig_text, partitions
from ds01.mig import GpuState
from ds01.model import Allocation, Device, Inventory, Ledger
from ds01.names import ContainerName
from ds01.partitions import Host, Planned
from ds01.transitions import Outcome
from mig_support import cut, gpu
from support import NOW

WHOLE = replace(gpu(index=3, mig=False), table=gpu().table)
A_MAP = """\
|2g.20gb        |1g+me  |.......................|1g.10gb|.......|
|alice          |free   |.......................|free   |.......|
 0       1       2       3       4       5       6       7
"""


def differences(state: GpuState, wanted: str, *force: str) -> list[dict[str, str]]:
    cuts = {state.index: cut(wanted)}
    found = mig.plan([state], cuts, force)
    assert found.refusals == ()
    return mig_text.difference(Planned(Host((state,), Inventory((), ()), Ledger()), found.plans, cuts))


def test_the_slices_before_and_after_with_who_sits_where() -> None:
    (found,) = differences(gpu("2g.20gb@0=alice 1g.10gb+me@2 1g.10gb@6", index=1), "2g.20gb 1g.10gb 3g.40gb")
    assert (found["before_header"], found["after_header"]) == ("GPU 1  NVIDIA A100", "GPU 1  NVIDIA A100")
    assert found["before"] == A_MAP
    assert found["after"] == (
        """\
|2g.20gb        |1g.10gb|.......|3g.40gb                        |
|alice          |new    |.......|new                            |
 0       1       2       3       4       5       6       7
"""
    )


@pytest.mark.parametrize(
    ("state", "wanted", "before", "after"),
    [
        pytest.param(WHOLE, "4g.40gb", "MIG off: a whole GPU\n", "|4g.40gb", id="mode on"),
        pytest.param(gpu("1g.10gb@0"), "off", "|1g.10gb|", "MIG off: a whole GPU\n", id="mode off"),
        pytest.param(gpu("1g.10gb@0"), "", "|1g.10gb|", "|......", id="nothing left"),
    ],
)
def test_modes_and_empty_gpus(state: GpuState, wanted: str, before: str, after: str) -> None:
    (found,) = differences(state, wanted)
    assert found["before"].startswith(before)
    assert found["after"].startswith(after)


def test_what_stays_as_it_is_is_no_difference() -> None:
    assert differences(gpu("2g.20gb@0=alice 1g.10gb@6"), "1g.10gb 2g.20gb") == []


def test_what_is_made_anew_in_the_same_place_is_one() -> None:
    (found,) = differences(gpu("2g.20gb@0?"), "2g.20gb")
    assert "leftover" in found["before"]
    assert "new" in found["after"]


def test_what_else_is_put_right() -> None:
    planned = Planned(Host((), Inventory((), ()), Ledger()), (), {}, repairs=("the spec is old", "a name is old"))
    (found,) = mig_text.difference(planned)
    assert (found["before"], found["after"]) == ("the spec is old\na name is old\n", "")


def test_who_loses_a_device_and_what_stops_meanwhile() -> None:
    """The difference is all that --diff alone shows."""
    state = gpu("2g.20gb@0=alice")
    device = Device("0:0", "MIG-0", state.uuid, "2g.20gb", (0, 2))
    alice = Allocation("p._.alice", "alice", (device,), 50, NOW, stopped_at=NOW)
    host = Host((state,), Inventory((), (device,)), Ledger({alice.container: alice}))
    found = mig.plan([state], {0: cut("7g.80gb")}, ["p._.alice"])
    over = Outcome(ContainerName("q", "bob", "q._.bob"), "released", "Its hold is over.")
    planned = Planned(host, found.plans, {}, services=("nvidia-dcgm.service",), over=(over,))
    _, gone, meanwhile = mig_text.difference(planned)
    assert gone["before"] == "p._.alice has 0:0 (force)\nq._.bob: Its hold is over.\n"
    assert meanwhile["after"] == "nvidia-dcgm.service stops, and starts again\n"
    assert (gone["before_header"], gone["after"]) == ("given back", "")
    assert (meanwhile["before_header"], meanwhile["before"]) == ("meanwhile", "")


OLD, STOPPED = "the layout was not saved for the next boot", "x.service was left stopped by an earlier run"
SUMMARIES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "nothing": ("2g.20gb", (), "Every GPU is cut as wanted.", "Every GPU is cut as wanted."),
    "a cut": ("2g.20gb 1g.10gb", (), "GPU 0: create 1g.10gb at 2.", "Cut as wanted: GPU 0."),
    "what is put right": ("2g.20gb", (OLD, STOPPED), *[f"Put right: {OLD}; {STOPPED}."] * 2),
    "both": (
        "2g.20gb 1g.10gb",
        (OLD,),
        f"GPU 0: create 1g.10gb at 2; put right: {OLD}.",
        f"Cut as wanted: GPU 0; put right: {OLD}.",
    ),
}


@pytest.mark.parametrize(("wanted", "repairs", "summary", "done"), SUMMARIES.values(), ids=SUMMARIES)
def test_a_change_in_a_sentence(wanted: str, repairs: tuple[str, ...], summary: str, done: str) -> None:
    """True before and after: nothing that was put right is told as if it were not."""
    state = gpu("2g.20gb@0")
    plans = mig.plan([state], {0: cut(wanted)}).plans
    planned = Planned(Host((state,), Inventory((), ()), Ledger()), plans, {}, repairs=repairs)
    assert (planned.summary(), planned.done()) == (summary, done)


def test_an_instance_that_is_divided_is_made_anew_and_says_why() -> None:
    """Of the same profile in the same place, which would look senseless."""
    whole = gpu("3g.40gb@4")
    divided = replace(whole.instances[0], devices=("MIG-0", "MIG-1"), whole=False)
    state = replace(whole, instances=(divided,))
    plans = mig.plan([state], {0: cut("3g.40gb")}).plans
    planned = Planned(Host((state,), Inventory((), ()), Ledger()), plans, {})
    assert planned.summary() == "GPU 0: destroy 3g.40gb at 4-7 (divided), create 3g.40gb at 4-7."
    assert "|divided                        |" in mig_text.plan_text(planned)


def test_a_mode_that_waits_for_a_reset_is_told() -> None:
    (found,) = differences(replace(WHOLE, pending=True), "4g.40gb")
    assert found["before_header"] == "GPU 3  NVIDIA A100, MIG on after the next reset"


@pytest.mark.parametrize(
    ("running", "says"),
    [(["p._.alice"], "p._.alice runs, and"), (["p._.alice", "q._.bob"], "p._.alice, q._.bob run, and")],
)
def test_those_who_run_are_named_together(running: list[str], says: str) -> None:
    refused = mig.plan([gpu("2g.20gb@0=alice 1g.10gb@6=bob", bob=mig.Holder("q._.bob", "bob"))], {0: cut("7g.80gb")})
    host = Host((), Inventory((), ()), Ledger(), frozenset(running))
    assert partitions.refusal(refused.refusals, host).hint.startswith(says)
