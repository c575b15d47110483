"""DS01 on a server of the simulated driver, and calls on it as processes make them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import docker.errors  # noqa: F401 - imported once, for all that are forked from here
import pynvml  # noqa: F401
import yaml  # noqa: F401
from ds01.allocations import Allocations
from ds01.paths import Paths
from ds01.transitions import Change, Outcome
from support import NOW, Host
from test_cli_sim import SIM, Server


@dataclass(frozen=True)
class Installation:
    """DS01 on a server of the simulated driver."""

    host: Host
    server: Server

    def applying(self, changes: Sequence[Change], later: timedelta = timedelta(0)) -> Callable[[], Sequence[Outcome]]:
        """To be called in a child process: carry the changes out. Only there the simulated driver is loaded."""
        ds01 = Allocations(Paths.from_env(), "tester", lambda: NOW + later)
        _ = ds01.config  # read once, for all that are forked from here

        def apply() -> Sequence[Outcome]:
            # pynvml asks the loader for this name: a library of that name that is loaded already is the answer.
            ctypes.CDLL(str(SIM / "libnvidia-ml.so.1"))
            os.environ["NVML_SIM_STATE"] = str(self.server.sim_state)
            return ds01.apply(changes)

        return apply

    def allocations(self) -> dict[str, Any]:
        """The ledger's records; none where there is no ledger."""
        return json.loads(self.host.ledger.read_bytes())["allocations"] if self.host.ledger.exists() else {}

    def files(self) -> list[str]:
        """What lies in the state and the CDI directory."""
        return sorted(file.name for folder in (self.host.state, self.host.cdi) for file in folder.glob("*"))

    def copy_to(self, folder: Path) -> None:
        """Put what DS01 has written aside."""
        for directory in (self.host.state, self.host.log, self.host.cdi):
            if directory.exists():
                shutil.copytree(directory, folder / directory.name)

    def put_back(self, folder: Path) -> None:
        """Exactly what was put aside, and nothing else."""
        for directory in (self.host.state, self.host.log, self.host.cdi):
            shutil.rmtree(directory, ignore_errors=True)
            if (folder / directory.name).exists():
                shutil.copytree(folder / directory.name, directory)


class Docker:
    """Stands in for the Docker SDK's client: an engine on which these containers run. Container by name: its labels."""

    def __init__(self, labels: Mapping[str, Mapping[str, str]]) -> None:
        self._labels = labels

    def containers(self, **_: object) -> list[dict[str, Any]]:
        return [
            {"Id": f"id-{name}", "Names": [f"/{name}"], "State": "running", "Image": "image", "Labels": labels}
            for name, labels in self._labels.items()
        ]

    def inspect_container(self, name: str) -> dict[str, Any]:
        config = {"Image": "image", "Labels": self._labels[name]}
        return {"Id": f"id-{name}", "Name": f"/{name}", "State": {"Status": "running"}, "Config": config}

    def info(self) -> dict[str, str]:
        return {"ID": "this engine"}


def made_for(allocations: Mapping[str, Any]) -> Docker:
    """The engine with the running containers that these ledger records were made for."""
    return Docker(
        {
            name: {
                "ds01.managed": "true",
                "ds01.user": record["user"],
                "ds01.project": name.partition("._.")[0],
                "ds01.allocation": name,
                "ds01.gpus": str(len(record["devices"])),
                "ds01.devices": json.dumps(record["devices"]),
                "ds01.created_at": record["allocated_at"],
            }
            for name, record in allocations.items()
        }
    )
