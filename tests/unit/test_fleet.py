"""Which server a request goes to."""

from __future__ import annotations

from typing import Any

import pytest
from ds01 import fleet


def server(free: int = 0, taken: int = 0, container: str = "", problems: int = 0) -> dict[str, Any]:
    devices = [{"status": "free", "profile": "2g.20gb"}] * free + [{"status": "active", "profile": "2g.20gb"}] * taken
    containers = [{"name": container, "user": "alice"}] if container else []
    return {"devices": devices, "containers": containers, "allocations": [], "problems": [{}] * problems}


@pytest.mark.parametrize(
    ("servers", "best"),
    [
        pytest.param({"a": server(1), "b": server(3), "c": server(2, taken=9)}, "b", id="most free devices"),
        pytest.param({"b": server(2), "a": server(2)}, "a", id="a tie goes by name"),
        pytest.param({"a": server(9), "b": server(0, container="p._.alice")}, "b", id="where the container is"),
        pytest.param(
            {"a": server(9), "b": server(0, container="replaced.p._.alice")}, "b", id="where a request set it aside"
        ),
        pytest.param({"a": server(9, problems=1), "b": server(1)}, "b", id="one that does not answer comes last"),
        pytest.param({"a": server(9), "b": server(9, container="q._.alice")}, "a", id="another project does not bind"),
    ],
)
def test_best_server(servers: dict[str, Any], best: str) -> None:
    assert fleet.rank(servers, "p", "alice")[0] == best


def test_only_fitting_devices_count() -> None:
    full = {"devices": [{"status": "free", "profile": "full"}] * 5}
    assert fleet.rank({"a": full, "b": server(1)}, "p", "alice", "2g.20gb") == ["b", "a"]


def test_an_allocation_without_its_container_binds_too() -> None:
    held = {**server(1), "allocations": [{"container": "p._.2001", "user": "alice"}]}
    assert fleet.rank({"a": server(5), "b": held}, "p", "alice")[0] == "b"
    assert fleet.rank({"a": server(5), "b": held}, "p._.2001", "alice")[0] == "b"
