"""The Ansible inventory of lab hosts, and their host keys: pinned, so that checking stays on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import keys
from .options import ADDRESS
from .paths import WHEELS

HEADER = "# Written by lab/lab: what is up now. Edits are lost.\n"


@dataclass(frozen=True)
class Endpoint:
    """Where a host is reached, and the key it must show."""

    name: str
    port: int
    host_key: str


def ssh_options(known_hosts: Path) -> list[str]:
    """Options for ssh, beyond address and key: only the pinned host key, only the lab's own key."""
    return ["-o", f"UserKnownHostsFile={known_hosts}", "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes"]


def render(endpoints: Iterable[Endpoint], known_hosts: Path) -> dict[str, Any]:
    """The inventory as data."""
    return {
        "gpu_servers": {
            "hosts": {e.name: {"ansible_port": e.port} for e in sorted(endpoints, key=lambda e: e.name)},
            "vars": {
                "ansible_host": ADDRESS,
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(keys.PRIVATE),
                "ansible_ssh_common_args": " ".join(ssh_options(known_hosts)),
                "ansible_python_interpreter": "/usr/bin/python3",
                "ds01_runtime_wheels": str(WHEELS),  # lab hosts need no way out
            },
        }
    }


def write(folder: Path, prefix: str, endpoints: Iterable[Endpoint]) -> Path:
    """Write hosts.yml into the folder and pin the host keys; without endpoints both go away."""
    path, pinned = folder / "hosts.yml", keys.known_hosts(prefix)
    endpoints = list(endpoints)
    if not endpoints:
        path.unlink(missing_ok=True)
        pinned.unlink(missing_ok=True)
        return path
    pinned.parent.mkdir(parents=True, exist_ok=True)
    pinned.write_text("".join(f"[{ADDRESS}]:{e.port} {e.host_key}\n" for e in endpoints))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + yaml.safe_dump(render(endpoints, pinned), sort_keys=False))
    return path
