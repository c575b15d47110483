"""playbooks/uninstall.yml: what it says that stays, and what it knows of the roles. On a server: molecule/default."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

(PLAY,) = yaml.safe_load((ROOT / "playbooks" / "uninstall.yml").read_text(encoding="utf-8"))
SETTINGS: dict[str, Any] = PLAY["vars"]["ds01_engine_settings"]
ROLE = yaml.safe_load((ROOT / "roles" / "ds01_docker" / "vars" / "main.yml").read_text(encoding="utf-8"))

ALWAYS = ["Users' homes and workspaces", "The packages python3-venv and python3-packaging, and the MIG devices"]
DATA, ENGINE, TOOLKIT = "The ledger in /var/lib/ds01", "The Docker engine", "NVIDIA's container toolkit and CDI spec"
FILE, FILE_GONE = "/etc/docker/daemon.json with exec-opts", "What the engine read of /etc/docker/daemon.json"
DAEMON, METRICS = "nvidia-persistenced.service", "/var/lib/textfile, without ds01.prom"
MINE = '{"id": "a", "name": "p._.bob", "state": "exited", "managed": "true"}'
THEIRS = '{"id": "b", "name": "web", "state": "running", "managed": ""}'

# name: what the tasks before found and which words were given, how each line begins
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a bare server": ({}, [DATA]),
    "as site.yml left it": (
        {"docker": True, "file": SETTINGS, "spec": True, "persistenced": "enabled", "metrics": "/var/lib/textfile"},
        [DATA, ENGINE, FILE_GONE, TOOLKIT, DAEMON, METRICS],
    ),
    "a container of DS01's": ({"docker": True, "file": SETTINGS, "boxes": [MINE]}, ["Containers", DATA, ENGINE, FILE]),
    "it goes as well": (
        {"docker": True, "file": SETTINGS, "boxes": [MINE], "words": ["containers"]},
        [DATA, ENGINE, FILE_GONE],
    ),
    "somebody else's container": (
        {"docker": True, "file": SETTINGS, "boxes": [MINE, THEIRS], "words": ["containers"]},
        [DATA, ENGINE, FILE],
    ),
    "settings of the host's own": ({"docker": True, "file": {**SETTINGS, "debug": True}}, [DATA, ENGINE, FILE]),
    "an engine without settings": ({"docker": True}, [DATA, ENGINE]),
    "every word": (
        {"docker": True, "file": SETTINGS, "spec": True, "words": ["containers", "data", "nvidia", "docker"]},
        [],
    ),
    "another vendor's engine": (
        {"docker": True, "file": {"debug": True}, "dockerd": True, "words": ["docker"]},
        [DATA, FILE],
    ),
}


def found(
    docker: bool = False,
    file: dict[str, Any] | None = None,
    boxes: list[str] | None = None,
    spec: bool = False,
    persistenced: str = "",
    metrics: str | None = None,
    dockerd: bool = False,
    words: list[str] | None = None,
) -> dict[str, Any]:
    """What the tasks register, and the words."""
    limits = yaml.safe_dump({"metrics": {"textfile_directory": metrics}}).encode()
    text = f"{json.dumps(file, indent=4, sort_keys=True)}\n".encode()
    return {
        "ds01_client": {"stat": {"exists": docker}},
        "ds01_engine": {"stdout_lines": boxes or []},
        "ds01_other_engine": {"stat": {"exists": dockerd}},
        "ds01_configured": {"content": base64.b64encode(text).decode()} if file else {},
        "ds01_limits": {"content": base64.b64encode(limits).decode()},
        "ds01_spec": {"stat": {"exists": spec}},
        "ds01_persistenced": {"stdout": persistenced},
        "ds01_inside": {"stdout": ""},
        **{f"ds01_uninstall_{word}": True for word in words or []},
    }


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the last task says in each case, in one play that writes it down at its end."""
    folder = tmp_path_factory.mktemp("plays")
    (task,) = (task for task in PLAY["tasks"] if task["name"] == "Say what stays")
    assert task["ansible.builtin.debug"] == {"msg": "{{ ds01_stays | select }}"}
    told = [
        {
            "ansible.builtin.set_fact": {f"said_{number}": "{{ ds01_stays | select }}"},
            "vars": {**task["vars"], **found(**case)},
        }
        for number, (case, _) in enumerate(CASES.values())
    ]
    every = ", ".join(f"said_{number}" for number in range(len(CASES)))
    content = {"content": f"{{{{ [{every}] | to_json }}}}", "dest": str(folder / "said"), "mode": "0600"}
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars": {**PLAY["vars"], "ansible_python_interpreter": sys.executable},
        "tasks": [*told, {"ansible.builtin.copy": content}],
    }
    (folder / "plays.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", "-c", "local", folder / "plays.yml"],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(CASES, json.loads((folder / "said").read_text(encoding="utf-8")), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_all_that_stays_is_named(name: str, said: dict[str, list[str]]) -> None:
    begins = [*CASES[name][1], *ALWAYS]
    assert [line[: len(begin)] for line, begin in zip(said[name], begins, strict=False)] == begins
    assert len(said[name]) == len(begins)
    assert not any("\n" in line for line in said[name])


def test_what_it_takes_for_ds01s_own_daemon_json_is_what_the_role_writes() -> None:
    assert {**ROLE["__ds01_docker_preset"], **ROLE["__ds01_docker_required"]} == SETTINGS
