"""Where things are on this host. `DS01_*` variables move every part, for tests and second installations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    config: Path
    state: Path
    log: Path
    cdi: Path
    nvidia_cdi: tuple[Path, ...]

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Paths:
        """The installed paths, each overridden by its variable (interfaces: "Files on a host")."""
        cdi = Path(env.get("DS01_CDI_DIR") or "/var/run/cdi")
        return cls(
            config=Path(env.get("DS01_CONFIG") or _default_config()),
            state=Path(env.get("DS01_STATE_DIR") or "/var/lib/ds01"),
            log=Path(env.get("DS01_LOG_DIR") or "/var/log/ds01"),
            cdi=cdi,
            nvidia_cdi=(cdi, Path("/etc/cdi")),
        )

    @property
    def ledger(self) -> Path:
        return self.state / "gpu-state.json"

    @property
    def layouts(self) -> Path:
        """The MIG layouts, beside the limits file."""
        return self.config.parent / "mig-layouts.yaml"

    @property
    def saved_layout(self) -> Path:
        """How the GPUs were last cut."""
        return self.state / "mig-layout.json"

    @property
    def paused_services(self) -> Path:
        """The services that wait to be started again, while a GPU's MIG mode changes."""
        return self.state / "mig-services.json"

    @property
    def memory(self) -> Path:
        """What one reconcile run leaves for the next."""
        return self.state / "reconcile.json"

    @property
    def totals(self) -> Path:
        """What was counted for the metrics so far."""
        return self.state / "metrics.json"

    @property
    def policy_state(self) -> Path:
        """What idle and runtime policies remember of the containers."""
        return self.state / "policy-state.json"

    @property
    def metadata(self) -> Path:
        return self.state / "container-metadata"

    @property
    def events(self) -> Path:
        return self.log / "events.jsonl"


def _default_config() -> Path:
    """The deployed limits file; in a checkout on a machine without one, the checkout's own."""
    deployed = Path("/etc/ds01/resource-limits.yaml")
    checkout = Path(__file__).resolve().parents[3] / "config" / "resource-limits.yaml"
    return checkout if checkout.is_file() and not deployed.exists() else deployed
