"""What several test files share: a host in a temporary directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
