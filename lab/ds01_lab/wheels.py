"""Python packages for lab hosts, which may have no way to a package index."""

import shutil
import sys

from .image import inputs_hash
from .paths import RUNTIME_REQUIREMENTS, WHEELS
from .shell import run, say

HOST_PYTHON = "3.13"  # what the host image's Debian has
# Newest first; a wheel for an older glibc serves a newer one.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def ensure() -> None:
    """Download the runtime's wheels into build/wheels unless its requirements are unchanged since."""
    inputs = inputs_hash(RUNTIME_REQUIREMENTS.read_bytes(), HOST_PYTHON, PLATFORMS)
    stamp = WHEELS / ".inputs"
    if stamp.exists() and stamp.read_text() == inputs:
        return
    say(f"wheels: download for Python {HOST_PYTHON} into {WHEELS.name}/ (about 5 s, once)")
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        + ["--only-binary=:all:", "--implementation=cp", f"--python-version={HOST_PYTHON}"]
        + [f"--platform={platform}" for platform in PLATFORMS]
        + ["--dest", WHEELS, "--requirement", RUNTIME_REQUIREMENTS],
        timeout=300,
    )
    stamp.write_text(inputs)
