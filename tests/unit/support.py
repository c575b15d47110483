"""What several test files share: a host in a temporary directory, machines and allocations in one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

from ds01.limits import Config, Limits, parse_config, resolve
from ds01.model import FULL, Allocation, Device, Gpu, Inventory, Ledger

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2025, 11, 21, 10, 30, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Host:
    """One DS01 installation in a temporary directory; `env` names it to a process."""

    root: Path
    config: Path
    state: Path
    log: Path
    cdi: Path

    @property
    def env(self) -> dict[str, str]:
        return {
            "DS01_CONFIG": str(self.config),
            "DS01_STATE_DIR": str(self.state),
            "DS01_LOG_DIR": str(self.log),
            "DS01_CDI_DIR": str(self.cdi),
            "DS01_ENGINE": "none",
        }

    @property
    def ledger(self) -> Path:
        return self.state / "gpu-state.json"

    @property
    def events(self) -> Path:
        return self.log / "events.jsonl"

    def limits(self, text: str) -> Path:
        """Write the limits file."""
        self.config.write_text(text, encoding="utf-8")
        return self.config

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Mode and content of every file, lock files left out: equal trees mean that nothing changed."""
        return {
            str(path.relative_to(self.root)): (path.stat().st_mode, path.read_bytes())
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.suffix != ".lock"
        }


def spec_device(uuid: str, gpu: int | str, capability: str = "10") -> dict[str, Any]:
    """A device as NVIDIA's CDI spec has it: the GPU's node; of a MIG device also those of its two instances."""
    caps = [f"/dev/nvidia-caps/nvidia-cap{capability}{n}" for n in (0, 1)] if uuid.startswith("MIG-") else []
    return {"name": uuid, "containerEdits": {"deviceNodes": [{"path": p} for p in (f"/dev/nvidia{gpu}", *caps)]}}


def machine(*gpus: str | list[str], sick: dict[str, str] | None = None) -> Inventory:
    """A server, a GPU each: "full", or the profiles that it is cut into ([]: MIG mode, not cut).

    `sick` gives devices that are not ok, by id. Devices are listed in NVML's order.
    """
    health = sick or {}
    found, devices = [], []
    for index, cut in enumerate(gpus):
        uuid, mig = f"GPU-{index}", cut != "full"
        found.append(Gpu(index, uuid, "NVIDIA A100-SXM4-80GB", index, mig, 81920, health.get(str(index), "ok")))
        if not mig:
            devices.append(Device(str(index), uuid, uuid, FULL, health=health.get(str(index), "ok")))
            continue
        for number, profile in enumerate(cut):
            id_, share = f"{index}:{number}", int(profile.partition("g")[0])
            devices.append(
                Device(
                    id=id_,
                    uuid=f"MIG-{index}-{number}",
                    gpu_uuid=uuid,
                    profile=profile,
                    placement=(2 * number, 2),
                    equivalents=Fraction(share, 7),
                    health=health.get(id_, "ok"),
                )
            )
    return Inventory(tuple(found), tuple(devices), "550.54")


def taken(inventory: Inventory, **holdings: str | Allocation) -> Ledger:
    """A ledger: user="0:1 0:2" gives the container `p._.user` these devices."""
    allocations = {}
    for user, ids in holdings.items():
        devices = tuple(d for d in inventory.devices if d.id in ids.split())
        if len(devices) != len(ids.split()):
            raise ValueError(f"no such devices: {ids}")
        allocations[f"p._.{user}"] = Allocation(f"p._.{user}", user, devices, 10, NOW, container_id="c0ffee")
    return Ledger(allocations, generation=1)


def config_of(**layer: Any) -> Config:
    """A configuration of these defaults; sections by their own names."""
    sections = {key: layer.pop(key) for key in list(layer) if key in _SECTIONS}
    return parse_config({"defaults": layer, **sections})


_SECTIONS = ("groups", "user_overrides", "default_group", "gpu_allocation", "policies", "exemptions")
_FREE = {"max_gpus": None, "max_gpus_per_container": None, "allow_full_gpu": True, "max_containers_per_user": None}


def limits_of(user: str = "alice", **layer: Any) -> Limits:
    """A user's limits: whatever is not named is unlimited."""
    return resolve(config_of(**{**_FREE, **layer}), user)


def come(*signals: signal.Signals) -> None:
    """Let signals come to this very thread: one that is sent to the process another thread may take, which the
    caller hears of whenever that thread gets to run."""
    for number in signals:
        signal.pthread_kill(threading.get_ident(), number)


def calls_of(action: Callable[[], object]) -> int:
    """How many functions an action calls, Python's own included: a measure of its work that no busy or slow machine
    changes."""
    count = 0

    def counted(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count
