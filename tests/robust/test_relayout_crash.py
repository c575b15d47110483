"""A layout change killed, or out of disk space, at each of its writes: nobody starts on what is not his, the next run
completes it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import moments
import pytest
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - a fixture

pytestmark = [pytest.mark.robust, *needs_sim]

MIXED = "2g.20gb,1g.10gb,1g.10gb,3g.40gb"
ANEW = "2g.20gb,1g.10gb,1g.10gb,2g.20gb,1g.10gb+me"


@dataclass(frozen=True)
class Story:
    """A machine on which alice has a 2g and bob holds a 1g, and a change of it that breaks `force`."""

    gpus: str
    cut: Mapping[str, str]
    wanted: Mapping[str, str]
    force: tuple[str, ...] = ()


STORIES = {
    "half a GPU anew": Story("A100-SXM4-80GB", {"g0": MIXED}, {"g0": ANEW}),
    "MIG on, beside a GPU that is in use": Story(
        "2xA100-SXM4-80GB", {"g0": "2g.20gb,1g.10gb,1g.10gb"}, {"g0": ANEW, "g1": "3g.40gb"}
    ),
    "MIG off, beside a GPU that is in use": Story("2xH100-SXM5-80GB", {"g0": MIXED, "g1": "2g.20gb"}, {"g1": "full"}),
    "two devices taken from their containers": Story(
        "A100-SXM4-80GB", {"g0": MIXED}, {"g0": "4g.40gb,3g.40gb"}, ("p._.alice", "q._.bob")
    ),
}


class Shelf:
    """The server as it was once, to be put back."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        shutil.copytree(server.host.root, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("machine"))

    def put_back(self) -> None:
        root = self._server.host.root
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._folder, root, dirs_exist_ok=True)
        self._server.make_nodes()


@pytest.fixture
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Server], Shelf]:
    return lambda server: Shelf(server, tmp_path_factory.mktemp("before"))


def prepared(start: Start, story: Story) -> Server:  # noqa: F811
    server = start(story.gpus, **story.cut)
    for container, profile in (("p._.alice", "2g.20gb"), ("q._.bob", "1g.10gb")):
        assert server.allocate(container, profile).reason == "granted"
    server.report("active", "p._.alice")
    server.report("held", "q._.bob")
    server.apply(g0=story.cut["g0"])  # so that there is a saved layout before
    server.check_all_done()
    return server


def everywhere(
    server: Server,
    shelf: Shelf,
    action: Callable[[], object],
    what: Callable[[], None] = moments.kill,
    at_least: int = 10,
) -> Iterator[str]:
    """What happens to the action at each of its writes in turn; the write, with everything as it was left."""
    for number in itertools.count(1):
        shelf.put_back()
        server.calls.clear()
        write = moments.happening(server, number, action, what)
        if not write:
            break
        yield f"{number}: {write}"
    print(f"at {number - 1} writes")
    assert number > at_least, f"only {number - 1} writes were seen"


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_killed_at_any_write(story: Story, start: Start, shelf: Callable[[Server], Shelf]) -> None:  # noqa: F811
    server = prepared(start, story)
    before, ledger, saved = server.cuts(), server.ledger(), shelf(server)

    def act() -> None:
        server.apply(story.force, **story.wanted)

    act()
    after, left = server.cuts(), server.ledger()
    assert after != before
    assert left == {name: devices for name, devices in ledger.items() if name not in story.force}
    for write in everywhere(server, saved, act):
        print(write)
        server.check_nothing_false()
        for container in left:
            assert server.ledger()[container] == ledger[container]
            assert server.projected()[container] == ledger[container], (
                "whoever was not in the way can start all the time"
            )
            assert set(ledger[container]) <= server.devices().keys()
        assert set(server.ledger()) <= set(ledger)
        act()
        assert (server.cuts(), server.ledger()) == (after, left)
        server.check_all_done()


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_killed_and_then_somebody_else_comes_first(
    story: Story,
    start: Start,  # noqa: F811
    shelf: Callable[[Server], Shelf],
) -> None:
    """Not the same change again but a request for any device, then a layout as it was, and then the host's reboot."""
    server = prepared(start, story)
    before, saved = server.cut(0), shelf(server)
    server.apply(story.force, **story.wanted)
    after = server.cut(0)
    for write in everywhere(server, saved, lambda: server.apply(story.force, **story.wanted)):
        print(write)
        granted = server.allocate("r._.carol")
        server.check_nothing_false()
        if granted.reason == "granted":
            assert server.projected()["r._.carol"] == server.ledger()["r._.carol"]
        server.boot()
        server.restore()
        server.check_nothing_false()
        assert server.cut(0) in (before, after), "the one whose layout was saved"
        assert "?" not in " ".join(server.cuts())
        left = {name for name in server.ledger() if name not in story.force and name != "r._.carol"}
        assert left == {"p._.alice", "q._.bob"} - set(story.force)
        assert {name: server.projected()[name] for name in left} == {name: server.ledger()[name] for name in left}


@pytest.mark.parametrize("full", [moments.full_disk, moments.stays_full])
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_full_disk_at_any_write(
    story: Story,
    full: Callable[[], None],
    start: Start,  # noqa: F811
    shelf: Callable[[Server], Shelf],
) -> None:
    server = prepared(start, story)
    before, ledger, saved = server.cuts(), server.ledger(), shelf(server)
    server.apply(story.force, **story.wanted)
    after, left = server.cuts(), server.ledger()
    for write in everywhere(server, saved, lambda: server.apply(story.force, **story.wanted), full, at_least=3):
        print(write)
        server.check_nothing_false()
        for container in left:
            assert server.ledger()[container] == ledger[container]
        # What was made again for an undo is in its place, as another device.
        states = [(before, ledger.keys()), (after, left.keys())]
        if full is moments.stays_full:  # there is no room to give back what had been taken by force
            states.append((before, left.keys()))
        assert (server.cuts(), server.ledger().keys()) in states, "half a change"
        server.apply(story.force, **story.wanted)
        assert (server.cuts(), server.ledger()) == (after, left)
        server.check_all_done()


def test_a_restore_killed_at_any_write(start: Start, shelf: Callable[[Server], Shelf]) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB,H100-SXM5-80GB")
    server.apply(g0=MIXED, g1="1g.10gb,1g.10gb,3g.40gb")
    cuts = server.cuts()
    for container, profile in (("p._.alice", "2g.20gb"), ("q._.bob", "3g.40gb")):
        server.allocate(container, profile)
    server.report("held", "q._.bob")
    server.boot("swap=0:1")
    saved = shelf(server)
    for write in everywhere(server, saved, server.restore):
        print(write)
        server.check_nothing_false()
        server.restore()
        assert server.cuts() == [cuts[1], cuts[0]]
        assert set(server.ledger()) == {"p._.alice", "q._.bob"}
        server.check_all_done()
    assert not server.restore().changed


def test_an_undo_killed_at_any_write(start: Start, shelf: Callable[[Server], Shelf]) -> None:  # noqa: F811
    """Somebody takes the place of the last instance; what was done by then is being undone."""
    server = prepared(start, STORIES["half a GPU anew"])
    ledger, saved = server.ledger(), shelf(server)

    def act() -> None:
        server.calls.before(
            "nvmlDeviceCreateGpuInstanceWithPlacement", lambda: server.somebody_cuts(0, "1g.10gb", 6), number=2
        )
        server.apply(g0=ANEW)

    for write in everywhere(server, saved, act):
        print(write)
        server.check_nothing_false()
        server.calls.clear()
        server.apply(g0=ANEW)
        assert server.cut(0) == "2g.20gb@0 1g.10gb@2 1g.10gb@3 2g.20gb@4 1g.10gb+me@6"
        assert server.ledger() == ledger
        server.check_all_done()
