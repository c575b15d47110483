"""Killed at any moment: the ledger is whole, nobody can start on what is not his, and asking again mends it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from ds01.ledger import LedgerStore
from ds01.model import Ledger
from ds01.transitions import Change
from installation import Installation, made_for
from support import NOW, Host, machine, taken
from syscalls import in_child, killed, why_not
from test_allocations import change, ledger_says, projections
from test_cli_sim import SIM

needs_sim = pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="make sim")
pytestmark = [pytest.mark.robust, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

LIMITS = """
defaults: {max_gpus: 3, max_gpus_per_container: 3, gpu_hold_after_stop: 1h}
gpu_allocation: {enable_mig: true, mig_profile: 2g.20gb}
"""


@dataclass(frozen=True)
class Story:
    """Batches that were carried out before, and the one that is killed, so much later."""

    before: Sequence[Sequence[Change]]
    killed: Sequence[Change]
    later: timedelta = timedelta(0)


STORIES = {
    "the first allocate of a server": Story([], [change("allocated", "alice")]),
    "allocate": Story([[change("allocated", "alice")]], [change("allocated", "bob", gpus=2)]),
    "release": Story([[change("allocated", "alice"), change("allocated", "bob")]], [change("released", "alice")]),
    "hold": Story([[change("allocated", "alice")]], [change("held", "alice")]),
    "active": Story([[change("allocated", "alice")]], [change("active", "alice", container_id="c0ffee")]),
    "allocate that takes back ended holds": Story(
        [
            [change("allocated", "alice"), change("allocated", "bob"), change("allocated", "carol")],
            [change("held", "alice"), change("held", "bob")],
        ],
        [change("allocated", "dan")],
        timedelta(hours=2),
    ),
    "allocate that takes over a hold": Story(
        [
            [change("allocated", "alice"), change("allocated", "bob"), change("allocated", "carol")],
            [change("held", "bob")],
        ],
        [change("allocated", "boss", priority=90, may_raise=True)],
    ),
    "a batch that gives one's devices to others": Story(
        [[change("allocated", "alice", gpus=3)]],
        [change("released", "alice"), change("allocated", "bob"), change("allocated", "carol", gpus=2)],
    ),
}


def killed_everywhere(action: Callable[[], object], put_back: Callable[[], None], at_least: int) -> Iterator[int]:
    """Kill the action at each of its system calls in turn; the call's number, with the files as they were left."""
    for call in itertools.count(1):
        put_back()
        if not killed(call, action):
            break
        yield call
    print(f"killed at {call - 1} system calls")
    assert call > at_least, f"it was killed at {call - 1} moments only: was anything traced?"


def test_one_ledger_write(tmp_path: Path) -> None:
    path = tmp_path / "gpu-state.json"
    before, after = (taken(machine("full", "full"), **who) for who in ({"alice": "0"}, {"alice": "0", "bob": "1"}))

    def write(ledger: Ledger) -> None:
        with LedgerStore(path, 1).transaction() as transaction:
            transaction.commit(ledger, NOW)

    def put_back() -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        write(Ledger({"older": after.allocations["p._.bob"]}))  # so that there is a generation before, too
        write(before)

    for call in killed_everywhere(lambda: write(after), put_back, at_least=25):
        found = LedgerStore(path).read()
        assert found.allocations in (before.allocations, after.allocations), f"killed at system call {call}"
        assert found.generation == (2 if found.allocations == before.allocations else 3)
        write(after)
        assert LedgerStore(path).read().allocations == after.allocations
        assert sorted(f.name for f in tmp_path.iterdir()) == [path.name, "gpu-state.json.prev", "gpu-state.lock"]


def nothing_false(host: Host) -> None:
    """The ledger is whole, gives no device twice, and nobody can start on what it does not give him."""
    LedgerStore(host.ledger).read()
    assert not host.state.exists() or host.state.stat().st_mode & 0o027 == 0, "others may write or look into it"
    granted = ledger_says(host)
    uuids = [uuid for devices in granted.values() for uuid in devices.split(",")]
    assert len(uuids) == len(set(uuids)), "a device was given twice"
    assert projections(host).items() <= granted.items(), "a container could start on what is not its own"
    # Docker takes every file with one of these endings for a spec.
    specs = {file.name for ending in ("json", "yaml") for file in host.cdi.glob(f"*.{ending}")}
    assert specs == {"nvidia.json", *(f"ds01-{container}.json" for container in projections(host))}


@needs_sim
@pytest.mark.sim
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_batch(story: Story, here: Installation, tmp_path_factory: pytest.TempPathFactory) -> None:
    here.host.limits(LIMITS)
    for batch in story.before:
        assert all(outcome.ok for outcome in in_child(here.applying(batch)))
    start = tmp_path_factory.mktemp("start")
    here.copy_to(start)
    before, act = here.allocations(), here.applying(story.killed, story.later)
    assert all(outcome.ok for outcome in in_child(act))
    after, files = here.allocations(), here.files()
    assert after != before
    mended = set()
    for call in killed_everywhere(act, lambda: here.put_back(start), at_least=50):
        nothing_false(here.host)
        assert here.allocations() in (before, after), f"killed at system call {call}"
        left = frozenset(here.host.tree().items())
        if left not in mended:  # what comes next depends on nothing else
            mended.add(left)
            assert all(outcome.ok for outcome in in_child(act))
            assert here.allocations() == after
            assert projections(here.host) == ledger_says(here.host)
            assert here.files() == files, "a half-written file stays"
    assert len(mended) > 4, "nothing was left half done"


@needs_sim
@pytest.mark.sim
def test_the_rebuilding_of_a_damaged_ledger(
    here: Installation, engine_with: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    here.host.limits(LIMITS)
    in_child(here.applying([change("allocated", "alice"), change("allocated", "bob")]))
    rebuilt = ledger_says(here.host)
    engine_with(made_for(here.allocations()))
    torn = here.host.ledger.read_bytes()[:-100]
    here.host.ledger.write_bytes(torn)
    start = tmp_path_factory.mktemp("start")
    here.copy_to(start)
    act = here.applying([change("allocated", "carol")])
    assert [outcome.reason for outcome in in_child(act)] == ["granted"]
    after = ledger_says(here.host)
    assert set(after) == {*rebuilt, "p._.carol"}
    store, mended = LedgerStore(here.host.ledger), set()
    for call in killed_everywhere(act, lambda: here.put_back(start), at_least=100):
        at = f"killed at system call {call}"
        assert store.lost() or ledger_says(here.host) in (rebuilt, after), at
        assert torn in [file.read_bytes() for file in here.host.state.glob("gpu-state.json*")], f"{at}: it is gone"
        assert projections(here.host).items() <= after.items(), at
        left = frozenset(here.host.tree().items())
        if left not in mended:
            mended.add(left)
            assert all(outcome.ok for outcome in in_child(act))
            assert ledger_says(here.host) == projections(here.host) == after, at
    assert len(mended) > 4, "nothing was left half done"
