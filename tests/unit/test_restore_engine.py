"""A restore beside Docker: an engine that does not run yet is never asked, since its start waits for the restore."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sim_systemd
from ds01 import engine
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from test_relayout_engine import ALICE, CUT, Docker, engine_of

pytestmark = needs_sim


@pytest.fixture
def server(start: Start, monkeypatch: pytest.MonkeyPatch) -> Server:  # noqa: F811
    """Cut by DS01; alice's container has the 2g."""
    made = start("A100-SXM4-80GB")
    made.apply(g0=CUT)
    made.allocate(ALICE, "2g.20gb")
    made.report("active", ALICE)
    monkeypatch.delenv("DS01_ENGINE")
    return made


def docker_is(state: str, server: Server, patch: pytest.MonkeyPatch) -> Docker:
    """Its unit, in that state; and an engine that answers, so that it shows whether it was asked."""
    sim_systemd.install(server.host.root / "bin", server.host.root / "units").unit("docker.service", state)
    return engine_of(server, patch, "exited")


@pytest.mark.parametrize("state", ["inactive", "failed", "deactivating"])
def test_at_boot_no_engine_is_asked(state: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    docker, cuts = docker_is(state, server, monkeypatch), server.cuts()
    server.boot()
    restored = server.restore()
    assert (restored.changed, restored.problems, docker.listings) == (True, (), 0)
    assert server.cuts() == cuts
    assert server.projected().keys() == {ALICE}
    server.check_all_done()


@pytest.mark.parametrize("state", ["active", "reloading", "activating"])
def test_one_that_runs_is_asked(state: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    docker, cuts = docker_is(state, server, monkeypatch), server.cuts()
    server.boot()
    restored = server.restore()
    assert (restored.problems, docker.listings > 0) == ((), True)
    assert server.cuts() == cuts
    server.check_all_done()


def test_without_systemd_none_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    docker, cuts = engine_of(server, monkeypatch, "exited"), server.cuts()
    server.boot()
    monkeypatch.setattr("subprocess.run", _without_systemctl(subprocess.run))
    assert (server.restore().problems, docker.listings, server.cuts()) == ((), 0, cuts)


def test_one_that_does_not_answer_keeps_nobody_from_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    docker_is("active", server, monkeypatch)
    cuts = server.cuts()
    monkeypatch.setattr(engine, "connect", _unavailable)
    server.boot()
    assert (server.restore().problems, server.cuts()) == ((), cuts)


def _unavailable() -> engine.Engine:
    raise engine.Ds01Error("engine_unavailable", "Docker does not answer.")


def _without_systemctl(run: Callable[..., Any]) -> Callable[..., Any]:
    def without(command: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        if command[0] == "systemctl":
            raise FileNotFoundError(2, "No such file or directory")
        return run(command, *args, **kwargs)

    return without
