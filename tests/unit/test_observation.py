"""One look at a host, with an engine that the test makes up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01.engine import Container, Listing
from ds01.errors import Ds01Error
from ds01.observation import Observer
from ds01.occupancy import GpuUse
from support import NOW, machine, taken

TWO = machine("full", "full")
OURS = {
    "ds01.managed": "true",
    "ds01.gpus": "1",
    "ds01.user": "alice",
    "ds01.project": "p",
    "ds01.allocation": "p._.alice",
}


@dataclass
class Engine:
    """Stands in for the Docker engine, and counts what it is asked."""

    there: list[Container] = field(default_factory=list)
    foreign: list[Container] = field(default_factory=list)
    name: str = "this engine"
    asked: list[str] = field(default_factory=list)

    def listing(self) -> Listing:
        return Listing(tuple(self.there), tuple(self.foreign))

    def identity(self) -> str:
        self.asked.append("identity")
        return self.name

    def container(self, name: str) -> Container:
        self.asked.append(f"inspect {name}")
        (found,) = (c for c in self.there if c.name == name)
        return replace(found, finished_at=NOW - timedelta(hours=1))

    def gpu_use(self, container_id: str) -> GpuUse | None:
        self.asked.append(f"use of {container_id}")
        return None if container_id == "p._.alice" else GpuUse(container_id, everything=True, how="--gpus all")


class Driver:
    def inventory(self) -> Any:
        return TWO

    def capabilities(self, _inventory: Any) -> dict[str, int]:
        return {}

    def processes(self, _inventory: Any) -> dict[str, tuple[int, ...]]:
        return {}


def container(name: str, status: str = "running", labels: Any = OURS) -> Container:
    return Container(name, name, status, "img", labels)


def observer(engine: Engine, tmp_path: Path, **doubtful: str) -> Observer:
    """`GPU_1` stands for GPU-1."""
    projected = {"q._.alice": ("GPU-0",)}
    of = {uuid.replace("_", "-"): why for uuid, why in doubtful.items()}
    return Observer(lambda: engine, tmp_path, projected.get, lambda _: of)


def test_a_container_outside_ds01_is_asked_about_once(tmp_path: Path) -> None:
    engine = Engine(foreign=[container("trainer", labels={}), container("old", "exited", {})])
    looks = observer(engine, tmp_path)
    ledger = replace(taken(TWO), engine_id="this engine")
    for _ in range(2):
        assert set(looks.look(ledger, Driver()).occupied) == {"GPU-0", "GPU-1"}
    assert engine.asked == ["use of trainer"]


def test_what_only_watches_uses_nothing(tmp_path: Path) -> None:
    engine = Engine(foreign=[container("dcgm-exporter", labels={})])
    seen = observer(engine, tmp_path).look(taken(TWO), Driver(), harmless=["dcgm-exporter"])
    assert seen.occupied == {}


def test_a_gpu_that_may_not_be_cut_as_it_should_be_is_offered_to_nobody(tmp_path: Path) -> None:
    seen = observer(Engine(), tmp_path, GPU_1="it was not cut again").look(taken(TWO), Driver())
    assert [d.health for d in seen.inventory.devices] == ["ok", "suspect"]
    assert [gpu.health_reason for gpu in seen.inventory.gpus] == ["", "it was not cut again"]


@pytest.mark.parametrize(
    ("state", "stopping", "asked"),
    [("active", (), True), ("held", (), False), ("held", ("p._.alice",), True), ("none", (), False)],
    ids=["it stopped unseen", "the ledger knows", "its stop is being reported", "it has no device"],
)
def test_docker_is_only_asked_when_a_container_stopped_where_nobody_knows(
    state: str, stopping: Any, asked: bool, tmp_path: Path
) -> None:
    engine = Engine(there=[container("p._.alice", "exited")])
    ledger = replace(taken(TWO, **({} if state == "none" else {"alice": "0"})), engine_id="this engine")
    if state == "held":
        ledger = ledger.with_allocation(replace(ledger.allocations["p._.alice"], stopped_at=NOW))
    seen = observer(engine, tmp_path).look(ledger, None, stopping=stopping)
    assert engine.asked == (["inspect p._.alice"] if asked else [])
    assert seen.seen is not None
    assert (seen.seen["p._.alice"].finished_at is not None) is asked


def test_one_of_ours_that_runs_without_an_allocation_keeps_what_it_was_last_given(tmp_path: Path) -> None:
    device = '[{"id": "1", "uuid": "GPU-1", "gpu_uuid": "GPU-1", "profile": "full"}]'
    engine = Engine(there=[container("p._.alice", labels={**OURS, "ds01.devices": device})])
    seen = observer(engine, tmp_path).look(taken(TWO), Driver())
    assert seen.occupied == {"GPU-1": "container p._.alice (without an allocation)"}


def test_what_was_projected_counts_for_one_that_runs_whatever_was_recorded(tmp_path: Path) -> None:
    labels = {
        **OURS,
        "ds01.project": "q",
        "ds01.allocation": "q._.alice",
        "ds01.devices": '[{"id": "1", "uuid": "GPU-1"}]',
    }
    engine = Engine(there=[container("q._.alice", labels=labels)])
    engine.gpu_use = lambda _: None  # type: ignore[method-assign]
    assert set(observer(engine, tmp_path).look(taken(TWO), Driver()).occupied) == {"GPU-0"}


@pytest.mark.parametrize(
    "labels",
    [{"ds01.managed": "true"}, OURS, {**OURS, "ds01.gpus": "0", "ds01.allocation": ""}],
    ids=["our label alone", "an image made of one of ours", "and of one without a GPU"],
)
def test_a_label_hides_nobody(labels: dict[str, str], tmp_path: Path) -> None:
    engine = Engine(there=[container("copy", labels=labels)])
    assert set(observer(engine, tmp_path).look(taken(TWO), Driver()).occupied) == {"GPU-0", "GPU-1"}


def test_on_another_engine_no_container_counts_as_removed(tmp_path: Path) -> None:
    """DOCKER_HOST named an engine without these containers: every device would have come free."""
    ledger = replace(taken(TWO, alice="0"), engine_id="the former engine")
    with pytest.raises(Ds01Error, match="another Docker engine") as caught:
        observer(Engine(), tmp_path).look(ledger, Driver())
    assert caught.value.reason == "engine_unavailable"
    here = Engine(there=[container("p._.alice")])
    assert observer(here, tmp_path).look(ledger, Driver()).engine_id == "the former engine"
    assert here.asked == []


def test_a_container_that_is_missing_from_its_own_engine_was_removed(tmp_path: Path) -> None:
    ledger = replace(taken(TWO, alice="0"), engine_id="this engine")
    assert observer(Engine(), tmp_path).look(ledger, Driver()).seen == {}


def test_who_was_given_a_mig_device_by_its_index_is_known_by_what_he_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(foreign=[container("trainer", labels={})])
    monkeypatch.setattr(engine, "gpu_use", lambda _: GpuUse("trainer", names=("1:0",), how="x", pid=4711))
    asked: list[int] = []
    monkeypatch.setattr("ds01.processes.capabilities", asked.append)
    seen = observer(engine, tmp_path).look(taken(TWO), Driver())
    assert (asked, set(seen.occupied)) == ([4711], {"GPU-1"}), "where it cannot be told, the whole GPU"
