"""Where the lab keeps things; the environment may move what lies outside the checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST_FILES = ROOT / "lab" / "host"
SIM = ROOT / "build" / "sim"
BUILD = ROOT / "build" / "lab"
WHEELS = ROOT / "build" / "wheels"
RUNTIME_REQUIREMENTS = ROOT / "roles" / "ds01_runtime" / "files" / "requirements.txt"

STATE = Path(os.environ.get("DS01_LAB_STATE", "/var/lib/ds01-lab"))
RUN = Path(os.environ.get("DS01_LAB_RUN", "/run/ds01-lab"))
CACHE = STATE / "cache"

DEFAULT_PREFIX = "ds01-lab"


def inventory_dir(prefix: str) -> Path:
    """Where a prefix's inventory goes unless the caller says otherwise."""
    return ROOT / "inventory" / "lab" if prefix == DEFAULT_PREFIX else BUILD / prefix / "inventory"
