"""Runs each Molecule scenario as one test, its output shown as it comes (pytest -s)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from threading import Timer

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))
SLOW = {"reboot"}  # on an emulated machine: make vm-test
TIMEOUT = 45 * 60
SHOWN = 40
"""Lines about a failed task that the test's own message repeats, since a scenario prints thousands."""


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
    command = [tools / "molecule", "test", "-s", scenario]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        timer = Timer(TIMEOUT, run.kill)
        timer.start()
        assert run.stdout
        failed = failed_task(shown(run.stdout))
        timer.cancel()
    assert run.returncode == 0, f"molecule test -s {scenario} failed:\n{failed}"


def shown(lines: Iterable[str]) -> Iterable[str]:
    """The lines, each printed as it comes."""
    for line in lines:
        print(line, end="", flush=True)
        yield line


def failed_task(lines: Iterable[str]) -> str:
    """What was printed of the last failed task, up to the recap (earlier ones were rescued); the last lines where
    no task failed."""
    last: deque[str] = deque(maxlen=SHOWN)
    found: list[str] = []
    over = False
    for line in lines:
        plain = re.sub(r"\x1b\[\d*m", "", line).replace("│", "").rstrip()
        if "TASK [" in plain:
            last.clear()
        last.append(plain)
        if re.search(r"\b(fatal|failed): \[", plain):
            found, over = list(last), False
        elif found and not over:
            over = "PLAY RECAP" in plain
            found.append(plain)
    return "\n".join(found[:SHOWN] or last)
