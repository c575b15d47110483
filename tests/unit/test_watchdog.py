"""What cannot be interrupted is ended with its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ds01
from ds01 import watchdog
from ds01.errors import EXIT_UNAVAILABLE

ROOT = str(Path(ds01.__file__).parent.parent)
HANGS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from ds01 import watchdog
with watchdog.bounded(0.2, "ds01 test", {report}):
    time.sleep(60)
"""


def test_a_process_that_hangs_ends_and_says_why() -> None:
    for report, said in (
        ("lambda text: print('report:', text)", "report: ds01 test did not end"),
        ("lambda _: 1 / 0", ""),
    ):
        code = HANGS.format(report=report)
        ended = subprocess.run(
            [sys.executable, "-u", "-c", code, ROOT], capture_output=True, text=True, timeout=20, check=False
        )
        assert ended.returncode == EXIT_UNAVAILABLE
        assert ended.stderr.startswith("ds01: driver_unavailable: ds01 test did not end within 0.2 s")
        assert ended.stdout.startswith(said)


def test_what_is_done_in_time_goes_on() -> None:
    told: list[str] = []
    with watchdog.bounded(30, "ds01 test", told.append):
        pass
    assert told == []
