"""Layouts changed while others are granted devices, give them back and are killed: nobody's device goes away."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from ds01.errors import Ds01Error
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - a fixture

pytestmark = [pytest.mark.robust, *needs_sim]

USERS, ADMINS, SECONDS = 4, 2, 6
CUTS = [
    "2g.20gb,2g.20gb,2g.20gb",
    "1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb",
    "3g.40gb,2g.20gb,1g.10gb,1g.10gb",
    "3g.40gb,4g.40gb",
    "1g.10gb,2g.20gb,2g.20gb",
    "",
]

Task = Callable[[random.Random], None]


def in_children(tasks: list[Task], folder: Path) -> list[int]:
    """Each of these in a process of its own; what goes wrong in one is in its file."""
    pids = []
    for number, task in enumerate(tasks):
        pid = os.fork()
        if not pid:
            code = 70
            try:
                task(random.Random(number))  # noqa: S311
                code = 0
            except BaseException:
                (folder / str(number)).write_text(traceback.format_exc(), encoding="utf-8")
            os._exit(code)
        pids.append(pid)
    return pids


def crowd(tasks: list[Task], victim: Task, killed: int, end: float, folder: Path) -> None:
    """All of these at once; until the `end` so many more that are killed again and again. What goes wrong is said."""
    pids = in_children(tasks, folder)
    victims, chance = 0, random.Random(7)  # noqa: S311 - the same at every run
    while killed and time.monotonic() < end:
        begun = in_children([lambda _: victim(random.Random(victims))] * killed, folder)  # noqa: B023, S311
        time.sleep(chance.uniform(0.05, 0.6))
        for pid in begun:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        victims += killed
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(pids), "\n".join(file.read_text(encoding="utf-8") for file in folder.iterdir())
    print(f"{victims} killed")


def user(server: Server, name: str, end: float, chance: random.Random) -> None:
    """Asks, looks again and again whether what he was given is there, gives it back."""
    container = f"p._.{name}"
    while time.monotonic() < end:
        outcome = server.allocate(container, chance.choice(["1g.10gb", "2g.20gb", "3g.40gb", None]))
        if outcome.reason not in ("granted", "already_allocated"):
            assert outcome.reason in ("no_gpu_available", "profile_not_available", "driver_unavailable"), outcome
            time.sleep(0.05)
            continue
        mine = outcome.allocation.devices[0].uuid
        for _ in range(chance.randrange(10)):
            assert mine in server.devices(), "a granted device went away"
            assert server.projected()[container] == (mine,)
            time.sleep(0.02)
        assert server.report("released", container).ok


def admin(server: Server, end: float, chance: random.Random) -> None:
    while time.monotonic() < end:
        wishes = {f"g{gpu}": chance.choice(CUTS) for gpu in chance.sample([0, 1], chance.choice([1, 2]))}
        try:
            server.apply(**wishes)
        except Ds01Error as exc:
            assert exc.reason in ("layout_in_use", "layout_impossible", "lock_timeout"), exc


@pytest.mark.parametrize("killed", [0, 1], ids=["nobody is killed", "an admin is killed again and again"])
def test_requests_beside_changes(killed: int, start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
    server = start("2xA100-SXM4-80GB", g0=CUTS[0], g1=CUTS[1])
    said, end = tmp_path_factory.mktemp("said"), time.monotonic() + SECONDS
    tasks: list[Task] = [
        *(lambda chance, n=n: user(server, f"user{n}", end, chance) for n in range(USERS)),
        *(lambda chance: admin(server, end, chance) for _ in range(ADMINS - killed)),
    ]
    crowd(tasks, lambda chance: admin(server, end, chance), killed, end, said)
    server.check_nothing_false()
    server.apply(g0=CUTS[5], g1=CUTS[2])  # completes what a killed one left
    server.check_all_done()
