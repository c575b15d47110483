"""Plans as people read them: before and after, GPU by GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ds01 import mig, mig_text
from ds01.mig import GpuState
from ds01.model import Inventory, Ledger
from ds01.partitions import Host, Planned
from mig_support import cut, gpu

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
