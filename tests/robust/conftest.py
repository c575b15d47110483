"""Servers of the simulated driver, with and without an engine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from ds01 import engine
from installation import Docker, Installation
from support import Host
from test_allocations import clock, driver, ds01  # noqa: F401 - fixtures: the verbs on a machine made up by the test
from test_cli_sim import SIM, Server

SEVEN = ["1g.10gb"] * 7
MACHINES = {
    "3 slices": ["1xA100-SXM4-80GB", "--mig", "0=2g.20gb,2g.20gb,2g.20gb"],
    "56 slices": ["8xA100-SXM4-80GB", *(word for gpu in range(8) for word in ("--mig", f"{gpu}={','.join(SEVEN)}"))],
}


@pytest.fixture
def here(request: pytest.FixtureRequest, host: Host) -> Installation:
    """A server with one GPU in three slices, or the one that the test names, and NVIDIA's CDI spec of it."""
    state, gpus = host.root / "gpus", MACHINES[getattr(request, "param", "3 slices")]
    command = [SIM / "bin" / "nvml-sim", "init", state, "--gpus", *gpus, "--unprivileged"]
    subprocess.run(command, check=True, timeout=20, capture_output=True)
    server = Server(host, state)
    server.write_nvidia_spec()
    return Installation(host, server)


@pytest.fixture
def engine_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Docker], None]:
    """Let this process, and what is forked from it, find this engine."""

    def use(docker: Docker) -> None:
        monkeypatch.delenv("DS01_ENGINE")
        monkeypatch.setattr(engine, "connect", lambda: engine.Engine(docker))

    return use
