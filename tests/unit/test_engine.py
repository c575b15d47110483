"""What the engine shows, told apart."""

from __future__ import annotations

from typing import Any

import docker.errors
import pytest
import requests.exceptions
from ds01.engine import Engine
from ds01.errors import Ds01Error
from ds01.occupancy import GpuUse
from urllib3.exceptions import ProtocolError


def listed(name: str | None, labels: dict[str, str] | None = None) -> dict[str, Any]:
    names = [f"/{name}"] if name else None
    return {"Id": f"{name}".ljust(64, "0"), "Names": names, "State": "running", "Image": "img", "Labels": labels}


class Client:
    """Stands in for the SDK: a list that filters by label, and one container to inspect."""

    def __init__(self, *containers: dict[str, Any]) -> None:
        self._containers = containers
        self.calls = 0

    def containers(self, all: bool = False, filters: dict[str, str] | None = None) -> list[dict[str, Any]]:
        assert all
        self.calls += 1
        key, _, value = (filters or {}).get("label", "").partition("=")
        return [c for c in self._containers if not key or (c["Labels"] or {}).get(key) == value]

    def inspect_container(self, container: str) -> dict[str, Any]:
        if container != "trainer":
            raise docker.errors.NotFound("404", explanation=f"No such container: {container}")
        everything = {"Driver": "", "Count": -1, "DeviceIDs": None, "Capabilities": [["gpu"]]}
        return {"Name": "/trainer", "HostConfig": {"DeviceRequests": [everything]}, "Config": {}}


MANAGED = {"ds01.managed": "true", "ds01.user": "alice"}


def test_all_containers_are_seen_in_one_call_and_split_by_their_label() -> None:
    client = Client(
        listed("p._.alice", MANAGED),
        listed("trainer"),
        listed("labelled", {"ds01.managed": "false"}),
        listed("claims", {"ds01.user": "alice"}),
    )
    listing = Engine(client).listing()
    assert client.calls == 1
    assert [c.name for c in listing.ours] == ["p._.alice"]
    assert [c.name for c in listing.others] == ["trainer", "labelled", "claims"]
    assert Engine(client).containers() == listing.ours


def test_a_container_without_a_name_is_not_overlooked() -> None:
    listing = Engine(Client(listed(None), listed(None, MANAGED))).listing()
    assert [c.name for c in listing.others] == ["None00000000"]
    assert listing.ours == ()


@pytest.mark.parametrize(
    ("why", "reason", "hint"),
    [
        (PermissionError(13, "Permission denied"), "permission_denied", "Run as root."),
        (
            FileNotFoundError(2, "No such file or directory"),
            "engine_unavailable",
            "Check it with: systemctl status docker",
        ),
    ],
    ids=["somebody else's", "not there"],
)
def test_whoever_may_not_use_the_engine_is_told_so(why: OSError, reason: str, hint: str) -> None:
    class Unreachable:
        def containers(self, **_: object) -> None:
            raise requests.exceptions.ConnectionError(ProtocolError("Connection aborted.", why))

    with pytest.raises(Ds01Error, match=f"could not list containers: {why.strerror}") as caught:
        Engine(Unreachable()).containers()
    assert (caught.value.reason, caught.value.hint) == (reason, hint)


def test_a_container_that_is_gone_uses_nothing() -> None:
    engine = Engine(Client())
    assert engine.gpu_use("trainer") == GpuUse("trainer", everything=True, how="--gpus all")
    assert engine.gpu_use("gone") is None
