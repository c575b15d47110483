"""Waiting processes: `ds01 allocate --wait` beside others that release, overtake, die and are interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from test_cli_sim import Server, machine_state, pytestmark, server  # noqa: F401 - fixtures, and when to skip

FULL = ("--profile", "full")


@pytest.fixture
def busy(server: Server) -> Server:  # noqa: F811
    """The only whole GPU is alice's."""
    assert server.allocate("alice", "first", *FULL).code == 0
    return server


def wait(server: Server, user: str, seconds: str = "60s") -> subprocess.Popen[str]:  # noqa: F811
    """A waiting command, once it stands in the queue."""
    process = server.start("allocate", "--user", user, "--container", "p", *FULL, "--json", "--wait", seconds)
    until(lambda: user in queue(server))
    return process


def queue(server: Server) -> list[str]:  # noqa: F811
    return [row["user"] for row in server.ds01("query", "queue", "--json").json]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def test_who_waits_gets_the_device_when_it_comes_free(busy: Server) -> None:
    with wait(busy, "bob") as bob:
        assert busy.ds01("release", "--user", "alice", "--container", "first").code == 0
        out, err = bob.communicate(timeout=60)
    assert (bob.returncode, '"granted"' in out) == (0, True)
    assert "p._.bob waits at position 1, until " in err
    assert set(busy.ledger()) == {"p._.bob"}
    assert [e["event"] for e in busy.events()] == ["gpu.allocated", "gpu.queued", "gpu.released", "gpu.allocated"]


def test_a_killed_waiter_is_in_nobody_s_way(busy: Server) -> None:
    with wait(busy, "bob") as bob, wait(busy, "carol") as carol:
        assert queue(busy) == ["bob", "carol"]
        bob.kill()
        bob.wait(timeout=20)
        assert queue(busy) == ["carol"]
        busy.ds01("release", "--user", "alice", "--container", "first")
        carol.communicate(timeout=60)
    assert set(busy.ledger()) == {"p._.carol"}


def test_the_higher_priority_is_served_first_and_nobody_overtakes(busy: Server) -> None:
    with wait(busy, "bob") as bob, wait(busy, "alice") as alice:
        assert queue(busy) == ["alice", "bob"], "alice's priority is 50, bob's the default"
        os.kill(alice.pid, signal.SIGSTOP)
        busy.ds01("release", "--user", "alice", "--container", "first")
        late = busy.allocate("dan", "late", *FULL)
        assert (late.code, late.json["reason"]) == (1, "no_gpu_available")
        assert "1 kept for requests that wait" in late.json["msg"]
        os.kill(alice.pid, signal.SIGCONT)
        assert alice.wait(timeout=60) == 0
        bob.send_signal(signal.SIGINT)
        bob.communicate(timeout=60)
        alice.communicate()
    assert bob.returncode == 130
    assert (set(busy.ledger()), queue(busy)) == ({"p._.alice"}, [])


def test_a_wait_that_was_in_vain_says_so(busy: Server) -> None:
    result = busy.allocate("bob", "p", *FULL, "--wait", "1s")
    assert (result.code, result.json["reason"]) == (1, "no_gpu_available")
    assert "It waited since" in result.json["msg"]
    assert queue(busy) == []


@pytest.mark.parametrize("text", ["soon", "10", "-5m"])
def test_a_time_without_unit_is_no_time(text: str, server: Server) -> None:  # noqa: F811
    result = server.ds01("allocate", "--user", "bob", "--container", "p", f"--wait={text}")
    assert (result.code, "Traceback" in result.err) == (2, False)


def test_a_process_on_the_device_keeps_it_and_is_named(server: Server) -> None:  # noqa: F811
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        server.simulate(f"process=0:{sleeper.pid}")
        result = server.allocate("bob", "p", *FULL)
        assert (result.code, result.json["reason"]) == (1, "no_gpu_available")
        assert f"0 is used by process {sleeper.pid} (python" in result.json["msg"]
        assert f"0 is used by process {sleeper.pid}" in server.ds01("status").out
    finally:
        sleeper.kill()
        sleeper.wait()
