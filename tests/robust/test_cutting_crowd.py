"""Requests that cut GPUs beside layouts that are applied, and killed again and again: nobody's device goes away."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from sim_server import Start, needs_sim, start  # noqa: F401 - a fixture
from test_on_demand_sim import dynamic
from test_relayout_crowd import CUTS, admin, in_children, user

pytestmark = [pytest.mark.robust, *needs_sim]

USERS, SECONDS = 4, 6


@pytest.mark.parametrize("killed", [0, 1], ids=["nobody is killed", "one who asks is killed again and again"])
def test_requests_that_cut(killed: int, start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
    server = dynamic(start, g0=CUTS[0], g1=CUTS[1])
    said, end = tmp_path_factory.mktemp("said"), time.monotonic() + SECONDS
    tasks: list[Callable[[random.Random], None]] = [
        *(lambda chance, n=n: user(server, f"user{n}", end, chance) for n in range(USERS)),
        lambda chance: admin(server, end, chance),
    ]
    pids = in_children(tasks, said)
    victims, chance = 0, random.Random(7)  # noqa: S311 - the same at every run
    while killed and time.monotonic() < end:
        [pid] = in_children([lambda _: user(server, "victim", end, random.Random(victims))], said)  # noqa: B023, S311
        time.sleep(chance.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        victims += 1
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(pids), "\n".join(file.read_text(encoding="utf-8") for file in said.iterdir())
    server.check_nothing_false()
    if "p._.victim" in server.ledger():
        server.report("released", "p._.victim")
    server.apply(g0=CUTS[5], g1=CUTS[2])  # completes what a killed one left
    server.check_all_done()
    print(f"{victims} killed")
