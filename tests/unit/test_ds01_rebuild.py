"""ds01_rebuild and its playbook: what is lost comes back once, and a whole ledger stays as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import ds01_rebuild
import pytest
from ds01 import engine, nvml, processes, records
from ds01.allocations import Allocations
from ds01.config import SCHEMA_NAME
from ds01.engine import Container
from ds01.errors import Ds01Error
from ds01.ledger import LedgerStore
from ds01.model import Device, Inventory
from ds01.paths import Paths
from support import NOW, ROOT, Host, machine, taken

SIM = ROOT / "build" / "sim"
INVENTORY = machine("full", ["2g.20gb"] * 3)
FULL, SLICE, OTHER, _ = INVENTORY.devices
ENGINE = "the engine"


class Driver:
    def inventory(self) -> Any:
        return INVENTORY


class Engine:
    """Stands in for the Docker engine; `there` are the containers that it shows."""

    def __init__(self) -> None:
        self.there: list[Container] = []

    def containers(self) -> tuple[Container, ...]:
        return tuple(self.there)

    def identity(self) -> str:
        return ENGINE

    def container(self, name: str) -> Container | None:
        return next((c for c in self.there if c.name == name), None)


def container(user: str, *devices: Device, status: str = "running") -> Container:
    labels = {
        "ds01.user": user,
        "ds01.project": "p",
        "ds01.allocation": f"p._.{user}" if devices else "",
        "ds01.gpus": str(len(devices)),
        "ds01.created_at": "2025-11-20T08:00:00Z",
        "ds01.devices": json.dumps([records.device_record(d) for d in devices]),
    }
    return Container(f"id-{user}", f"p._.{user}", status, "img", labels, NOW if status == "exited" else None)


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()

    @contextmanager
    def session() -> Iterator[Driver]:
        yield Driver()

    monkeypatch.setattr(engine, "connect", lambda: made)
    monkeypatch.setattr(nvml, "session", session)
    return made


def run(host: Host, check: bool = False) -> dict[str, Any]:
    """The module's result, as another process would get it."""
    paths = Paths(host.config, host.state, host.log, host.cdi, (host.cdi,))
    return ds01_rebuild.rebuild(Allocations(paths, "tester", lambda: NOW), check)


def write_ledger(
    host: Host, inventory: Inventory = INVENTORY, boot: str = processes.boot_id(), **holdings: str
) -> None:
    host.state.mkdir(exist_ok=True)
    LedgerStore(host.ledger).write(replace(taken(inventory, **holdings), boot_id=boot, engine_id=ENGINE))


def damage(host: Host) -> None:
    host.state.mkdir(exist_ok=True)
    host.ledger.write_text("{", encoding="utf-8")


def test_a_lost_ledger_is_restored_once(host: Host, docker: Engine) -> None:
    docker.there = [container("alice", SLICE), container("bob", FULL, status="exited")]
    result = run(host)
    assert (result["changed"], result["restored"], result["problems"]) == (True, ["p._.alice", "p._.bob"], [])
    assert result["msg"] == "Restored p._.alice, p._.bob; the ledger has 2 allocations."
    assert {a["container"]: a["status"] for a in result["allocations"]} == {"p._.alice": "active", "p._.bob": "held"}
    assert result["diff"] == {"before": {}, "after": {"p._.alice": ["1:0 MIG-1-0"], "p._.bob": ["0 GPU-0"]}}
    before = host.tree()
    again = run(host)
    assert (again["changed"], again["restored"], again["diff"]["before"]) == (False, [], result["diff"]["after"])
    assert again["msg"] == "Restored nothing; the ledger has 2 allocations."
    assert host.tree() == before


def test_what_the_ledger_knows_stays(host: Host, docker: Engine) -> None:
    write_ledger(host, carol="1:1")
    docker.there = [container("alice", SLICE), container("bob", OTHER)]
    result = run(host)
    assert result["restored"] == ["p._.alice"]
    carol = {"p._.carol": ["1:1 MIG-1-1"]}
    assert result["diff"] == {"before": carol, "after": {"p._.alice": ["1:0 MIG-1-0"], **carol}}
    assert result["problems"] == ["p._.bob: its device 1:1 is already p._.carol's"]
    assert result["msg"] == "Restored p._.alice; the ledger has 2 allocations; 1 not to be restored."


@pytest.mark.parametrize(
    ("lose", "there", "changed", "damaged"),
    [
        pytest.param(None, [], False, False, id="a new server"),
        pytest.param(None, [container("alice")], False, False, id="only a container without a GPU"),
        pytest.param(damage, [], True, True, id="damaged, and no containers"),
        pytest.param(damage, [container("alice", SLICE)], True, True, id="damaged"),
        pytest.param(
            lambda host: write_ledger(host, alice="1:0"), [container("alice", SLICE)], False, False, id="whole"
        ),
    ],
)
def test_changed_is_what_changes(
    lose: Any, there: list[Container], changed: bool, damaged: bool, host: Host, docker: Engine
) -> None:
    docker.there = there
    if lose:
        lose(host)
    before = host.tree()
    foreseen = run(host, check=True)
    assert host.tree() == before, "check mode writes nothing"
    done = run(host)
    assert [foreseen["changed"], done["changed"]] == [changed, changed]
    assert [foreseen["damaged"], done["damaged"]] == [damaged, damaged]
    assert [foreseen[key] for key in ("allocations", "restored", "problems", "diff")] == [
        done[key] for key in ("allocations", "restored", "problems", "diff")
    ]
    assert (host.tree() == before) is not changed
    assert run(host)["changed"] is False


def test_after_a_reboot_only_devices_that_have_another_name_are_a_change(host: Host, docker: Engine) -> None:
    docker.there = [container("alice", SLICE)]
    write_ledger(host, boot="another", alice="1:0")
    assert run(host)["changed"] is False, "which boot the ledger is of is nobody's device"

    former = replace(INVENTORY, devices=(FULL, replace(SLICE, uuid="MIG-former"), OTHER))
    write_ledger(host, former, boot="another", alice="1:0")
    result = run(host)
    assert (result["changed"], result["restored"]) == (True, [])
    assert result["diff"] == {"before": {"p._.alice": ["1:0 MIG-former"]}, "after": {"p._.alice": ["1:0 MIG-1-0"]}}
    assert run(host)["changed"] is False


def test_check_mode_says_would(host: Host, docker: Engine) -> None:
    docker.there = [container("alice", SLICE)]
    assert run(host, check=True)["msg"] == "Would restore p._.alice; the ledger would have 1 allocations."


def test_without_an_engine_nothing_is_done(host: Host, docker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise Ds01Error("engine_unavailable", "It is dead.")

    monkeypatch.setattr(engine, "connect", dead)
    damage(host)
    for check in (True, False):
        with pytest.raises(Ds01Error, match="dead"):
            run(host, check=check)


class Socket(BaseHTTPRequestHandler):
    """As much of the engine's API as listing and inspecting containers needs."""

    there: tuple[dict[str, Any], ...] = ()

    def do_GET(self) -> None:
        path = re.sub(r"^/v[0-9.]+", "", self.path.partition("?")[0])
        answer: Any = {"ApiVersion": "1.45", "MinAPIVersion": "1.24"}
        if path == "/containers/json":
            answer = [
                {"Id": c["Id"], "Names": [c["Name"]], "State": "running", "Image": "i", **c["Config"]}
                for c in self.there
            ]
        elif path.startswith("/containers/"):
            answer = next(c for c in self.there if path == f"/containers{c['Name']}/json")
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A Unix socket's client has no address to log."""


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    """DOCKER_HOST of an engine that shows `Socket.there`."""
    path = tmp_path / "engine.sock"
    with socketserver.ThreadingUnixStreamServer(str(path), Socket) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"unix://{path}"
        server.shutdown()
        thread.join()


def inspected(user: str, allocation: dict[str, Any]) -> dict[str, Any]:
    """A running container of `ds01 allocate`'s allocation, as the engine shows it alone."""
    own = {"ds01.project": "p", "ds01.allocation": f"p._.{user}"}
    labels = {"ds01.user": user, "ds01.gpus": "1", "ds01.devices": json.dumps(allocation["devices"]), **own}
    return {
        "Id": f"id-{user}",
        "Name": f"/p._.{user}",
        "State": {"Status": "running", "FinishedAt": "0001-01-01T00:00:00Z"},
        "Config": {"Image": "img", "Labels": labels},
    }


@pytest.mark.sim
@pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="the simulated driver is not built: make sim")
def test_the_playbook_foresees_restores_and_then_changes_nothing(
    host: Host, socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "config" / SCHEMA_NAME, host.config.parent)  # as site.yml does
    state = host.root / "gpus"
    mig = ["--gpus", "1xA100-SXM4-80GB", "--mig", "0=2g.20gb,2g.20gb", "--unprivileged"]
    subprocess.run([SIM / "bin" / "nvml-sim", "init", state, *mig], check=True, timeout=20, capture_output=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(SIM), "NVML_SIM_STATE": str(state), "DOCKER_HOST": socket}

    def ds01(*argv: str) -> Any:
        command = [ROOT / "bin" / "ds01", *argv, "--json"]
        return json.loads(subprocess.run(command, env=env, check=True, timeout=60, capture_output=True).stdout)

    def play(*options: str) -> str:
        variables = {"ansible_connection": "local", "ansible_become": False, "ds01_python": sys.executable}
        command = [Path(sys.executable).parent / "ansible-playbook", ROOT / "playbooks" / "rebuild.yml", *options]
        inventory = host.root / "hosts.yml"
        inventory.write_text(json.dumps({"gpu_servers": {"hosts": {"gpu1": None}}}), encoding="utf-8")
        done = subprocess.run(
            [*command, "-i", inventory, "-e", json.dumps(variables)],
            cwd=ROOT,
            env={**env, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "DS01_ENGINE": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    users = ["alice", "bob"]
    granted = {user: ds01("allocate", "--user", user, "--container", "p")["allocation"] for user in users}
    monkeypatch.setattr(Socket, "there", tuple(inspected(user, granted[user]) for user in users))
    host.ledger.unlink()

    foreseen = play("--check", "--diff")
    assert "changed=1" in foreseen
    assert "Would restore p._.alice, p._.bob; the ledger would have 2 allocations." in foreseen
    assert f'+        "0:0 {granted["alice"]["devices"][0]["uuid"]}"' in foreseen
    assert not host.ledger.exists()

    assert "Restored p._.alice, p._.bob" in play()
    restored = {a["user"]: a["devices"] for a in ds01("status")["allocations"]}
    assert restored == {user: granted[user]["devices"] for user in users}

    before = host.tree()
    assert "changed=0" in play()
    assert host.tree() == before
