"""Layout changes beside a Docker engine: whose container runs keeps its device, whatever is forced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from ds01 import engine
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - start is a fixture

pytestmark = needs_sim

CUT, WANTED = "2g.20gb,1g.10gb,1g.10gb,3g.40gb", "4g.40gb,3g.40gb"
ALICE = "p._.alice"


@dataclass
class Docker:
    """Stands in for the Docker SDK's client: an engine with these containers. `then` is what they are from the
    so-manieth listing on. Whoever stopped did so a minute ago."""

    status: dict[str, str]
    labels: Mapping[str, Mapping[str, str]]
    then: dict[int, dict[str, str]] = field(default_factory=dict)
    listings: int = 0

    def containers(self, **_: object) -> list[dict[str, Any]]:
        self.listings += 1
        self.status |= self.then.get(self.listings, {})
        return [
            {"Id": f"id-{name}", "Names": [f"/{name}"], "State": status, "Image": "image", "Labels": self.labels[name]}
            for name, status in self.status.items()
        ]

    def inspect_container(self, name: str) -> dict[str, Any]:
        name = name.removeprefix("id-")
        finished = datetime.now(timezone.utc) - timedelta(minutes=1)
        state = {"Status": self.status[name], "FinishedAt": finished.isoformat()}
        config = {"Image": "image", "Labels": self.labels[name]}
        return {"Id": f"id-{name}", "Name": f"/{name}", "Image": "sha256:image", "State": state, "Config": config}

    def info(self) -> dict[str, str]:
        return {"ID": "this engine"}


@pytest.fixture
def server(start: Start, monkeypatch: pytest.MonkeyPatch) -> Server:  # noqa: F811
    """alice's container has the 2g."""
    made = start("A100-SXM4-80GB", g0=CUT)
    made.allocate(ALICE, "2g.20gb")
    made.report("active", ALICE)
    monkeypatch.delenv("DS01_ENGINE")
    return made


def engine_of(server: Server, patch: pytest.MonkeyPatch, status: str, **then: Any) -> Docker:
    record = json.loads(server.host.ledger.read_bytes())["allocations"][ALICE]
    labels = {
        "ds01.managed": "true",
        "ds01.user": "alice",
        "ds01.project": "p",
        "ds01.allocation": ALICE,
        "ds01.gpus": "1",
        "ds01.devices": json.dumps(record["devices"]),
        "ds01.created_at": record["allocated_at"],
    }
    docker = Docker({ALICE: status}, {ALICE: labels}, **then)
    patch.setattr(engine, "connect", lambda: engine.Engine(docker))
    return docker


def test_a_running_container_s_device_cannot_be_forced(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_of(server, monkeypatch, "running")
    written, cuts = server.written(), server.cuts()
    refusal = server.refused([ALICE], g0=WANTED)
    assert (refusal.reason, ALICE in str(refusal)) == ("container_running", True)
    assert (server.written(), server.cuts(), server.calls.writes) == (written, cuts, [])


def test_a_running_container_is_to_be_stopped_before_it_is_forced(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_of(server, monkeypatch, "running")
    hint = server.refused(g0=WANTED).hint
    assert hint.startswith(f"{ALICE} runs, and force takes no running container's device. Stop it with")
    assert hint.endswith(f"force: {ALICE}.")


def test_a_stopped_container_s_device_can(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_of(server, monkeypatch, "exited")
    done = server.apply([ALICE], g0=WANTED)
    assert done.released == (ALICE,)
    assert (server.ledger(), server.projected()) == ({}, {})
    server.check_all_done()


@pytest.mark.parametrize("listing", [2, 3])
def test_one_that_is_started_meanwhile_keeps_it(listing: int, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, past DS01, while the change is on its way: seen once its CDI device is out of reach."""
    docker = engine_of(server, monkeypatch, "exited", then={listing: {ALICE: "running"}})
    written, cuts, ledger = server.written(), server.cuts(), server.ledger()
    refusal = server.refused([ALICE], g0=WANTED)
    assert docker.listings >= listing
    assert refusal.reason == ("container_running" if listing == 2 else "container_busy")
    assert ALICE in str(refusal)
    assert (server.written(), server.cuts(), server.calls.writes) == (written, cuts, [])
    assert server.projected() == server.ledger() == ledger


def test_without_its_engine_nothing_is_begun(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")
    written, cuts = server.written(), server.cuts()
    assert server.refused(g0="2g.20gb,3g.40gb").reason == "engine_unavailable"
    assert (server.written(), server.cuts(), server.calls.writes) == (written, cuts, [])
