"""promtool, Prometheus' own checker, where there is one: `make promtool` fetches it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

BUILT = ROOT / "build" / "promtool" / "promtool"
PROMTOOL = shutil.which("promtool") or (str(BUILT) if BUILT.exists() else None)

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not there: make promtool")


def promtool(*argv: str | Path, stdin: bytes = b"") -> tuple[int, str]:
    """Its exit code, and what it says."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *argv], input=stdin, capture_output=True, timeout=60, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()
