"""Servers of the simulated driver, with and without an engine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

import pytest
from ds01 import engine
from installation import Engine, Installation
from support import Host
from test_cli_sim import SIM, Server

THREE_SLICES = ["1xA100-SXM4-80GB", "--mig", "0=2g.20gb,2g.20gb,2g.20gb"]


@pytest.fixture
def here(host: Host) -> Installation:
    """A server with one GPU in three slices, and NVIDIA's CDI spec of it."""
    state = host.root / "gpus"
    command = [SIM / "bin" / "nvml-sim", "init", state, "--gpus", *THREE_SLICES, "--unprivileged"]
    subprocess.run(command, check=True, timeout=20, capture_output=True)
    server = Server(host, state)
    server.write_nvidia_spec()
    return Installation(host, server)


@pytest.fixture
def engine_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[engine.Container]], None]:
    """Let this process, and what is forked from it, find an engine with these containers."""

    def use(containers: Sequence[engine.Container]) -> None:
        monkeypatch.delenv("DS01_ENGINE")
        monkeypatch.setattr(engine, "connect", lambda: Engine(containers))

    return use
