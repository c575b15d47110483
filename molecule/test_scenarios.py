"""Runs each Molecule scenario as one test, its output shown as it comes (pytest -s)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))
SLOW = {"reboot"}  # on an emulated machine: make vm-test
TIMEOUT = 45 * 60


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=[pytest.mark.vm] if name in SLOW else []) for name in SCENARIOS]
)
def test_scenario(scenario: str) -> None:
    print(f"\n== molecule: {scenario}", flush=True)
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    }
    run = subprocess.run(
        [tools / "molecule", "test", "-s", scenario], cwd=ROOT, env=environment, timeout=TIMEOUT, check=False
    )
    assert run.returncode == 0, f"molecule test -s {scenario} failed; its output is above"
