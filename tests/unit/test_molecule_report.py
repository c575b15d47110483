"""What a failed Molecule scenario says at its end, out of thousands of lines."""

from __future__ import annotations

import sys

import pytest
from support import ROOT

sys.path.append(str(ROOT / "molecule"))

from test_scenarios import failed_task

FINE = "TASK [Look]\nok: [host]\n"
RESCUED = "TASK [Try]\nfatal: [host]: FAILED! => rescued\nTASK [Mend]\nok: [host]\n"
FAILED = "TASK [Compare]\n\x1b[2m│\x1b[0m fatal: [host]: FAILED! => differs\nPLAY RECAP\n"
CLEANED = "TASK [Destroy]\nchanged: [host]\nPLAY RECAP\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (FINE + FAILED + CLEANED, ["TASK [Compare]", " fatal: [host]: FAILED! => differs", "PLAY RECAP"]),
        (RESCUED + FAILED + CLEANED, ["TASK [Compare]", " fatal: [host]: FAILED! => differs", "PLAY RECAP"]),
        ("molecule: no such scenario\n", ["molecule: no such scenario"]),
    ],
    ids=["failed", "another was rescued", "before any task"],
)
def test_the_failed_task_is_told(output: str, expected: list[str]) -> None:
    assert failed_task(output.splitlines(keepends=True)).splitlines() == expected
