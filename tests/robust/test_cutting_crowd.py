"""Requests that cut GPUs beside layouts that are applied, and killed again and again: nobody's device goes away."""

from __future__ import annotations

import time

import pytest
from sim_server import Start, needs_sim, start  # noqa: F401 - a fixture
from test_on_demand_sim import dynamic
from test_relayout_crowd import CUTS, Task, admin, crowd, user

pytestmark = [pytest.mark.robust, *needs_sim]

USERS, SECONDS = 4, 6


@pytest.mark.parametrize("killed", [0, 1], ids=["nobody is killed", "one who asks is killed again and again"])
def test_requests_that_cut(killed: int, start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
    server = dynamic(start, g0=CUTS[0], g1=CUTS[1])
    said, end = tmp_path_factory.mktemp("said"), time.monotonic() + SECONDS
    tasks: list[Task] = [
        *(lambda chance, n=n: user(server, f"user{n}", end, chance) for n in range(USERS)),
        lambda chance: admin(server, end, chance),
    ]
    crowd(tasks, lambda chance: user(server, "victim", end, chance), killed, end, said)
    server.check_nothing_false()
    if "p._.victim" in server.ledger():
        server.report("released", "p._.victim")
    server.apply(g0=CUTS[5], g1=CUTS[2])  # completes what a killed one left
    server.check_all_done()
