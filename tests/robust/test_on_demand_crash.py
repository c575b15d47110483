"""A request that cuts a GPU, killed or out of disk space at each of its writes: nobody starts on what is not his, and
the same request is served by the next run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import moments
import pytest
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - a fixture
from test_on_demand_sim import DYNAMIC, dynamic
from test_relayout_crash import Shelf, everywhere, shelf  # noqa: F401 - a fixture

pytestmark = [pytest.mark.robust, *needs_sim]


@dataclass(frozen=True)
class Story:
    """What GPU 0 is cut into, of which alice has the first and bob holds the second; what carol asks for, and how
    many of it; the GPUs then."""

    cut: str
    profile: str
    count: int
    then: str


STORIES = {
    "free room": Story("2g.20gb,1g.10gb", "3g.40gb", 1, "2g.20gb@0 1g.10gb@2 3g.40gb@4"),
    "what is unused is dissolved": Story(
        "2g.20gb,1g.10gb,1g.10gb,3g.40gb", "2g.20gb", 1, "2g.20gb@0 1g.10gb@2 1g.10gb@3 2g.20gb@4"
    ),
    "no room, nothing is written": Story("2g.20gb,1g.10gb,2g.20gb", "2g.20gb", 2, ""),
}


def prepared(start: Start, story: Story) -> Server:  # noqa: F811
    server = dynamic(start, "A100-SXM4-80GB", DYNAMIC, g0=story.cut)
    assert server.allocate("p._.alice", "2g.20gb").ok
    assert server.allocate("q._.bob", "1g.10gb").ok
    server.report("active", "p._.alice")
    server.report("held", "q._.bob")
    server.check_all_done()
    return server


@pytest.mark.parametrize("what", [moments.kill, moments.full_disk], ids=["killed", "a full disk"])
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_at_any_write(
    story: Story,
    what: Callable[[], None],
    start: Start,  # noqa: F811
    shelf: Callable[[Server], Shelf],  # noqa: F811
) -> None:
    server = prepared(start, story)
    ledger, saved = server.ledger(), shelf(server)

    def act() -> None:
        server.allocate("r._.carol", story.profile, story.count)

    act()
    after, served = server.cut(0), "r._.carol" in server.ledger()
    assert (after == story.then) if story.then else not served
    for write in everywhere(server, saved, act, what, at_least=10 if served and what is moments.kill else 0):
        print(write)
        server.check_nothing_false()
        for container, devices in ledger.items():
            assert server.ledger()[container] == devices
            assert server.projected()[container] == devices, "whoever was not in the way can start all the time"
        assert server.ledger().keys() <= {*ledger, "r._.carol"}
        server.calls.clear()
        act()
        assert ("r._.carol" in server.ledger()) is served
        server.check_nothing_false()
        if served:
            assert server.cut(0) == after
            assert server.projected() == server.ledger()
            server.boot()
            server.restore()
            assert server.projected().keys() == server.ledger().keys(), "everybody's place is there again"
