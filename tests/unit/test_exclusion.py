"""One request at a time for a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ds01.errors import Ds01Error
from ds01.exclusion import alone, is_busy
from support import ROOT

HOLD = """
import sys, time
from pathlib import Path
from ds01.exclusion import alone
with alone(Path(sys.argv[1]), "p._.alice"):
    print("has it", flush=True)
    time.sleep(600)
"""


def test_a_second_request_waits_and_is_told_and_a_dead_one_is_in_nobody_s_way(tmp_path: Path) -> None:
    lock = tmp_path / "state" / "containers.lock"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "plugins" / "module_utils")}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], env=env, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"has it\n"
        with pytest.raises(Ds01Error) as caught, alone(lock, "p._.alice", timeout=0.1):
            pytest.fail("two at once")
        assert caught.value.reason == "container_busy"
        assert caught.value.message == f"Another request for p._.alice is at work (pid {first.pid})."
        assert (is_busy(lock, "p._.alice"), is_busy(lock, "p._.bob")) == (True, False)
        assert not is_busy(tmp_path / "none", "p._.alice")
        assert not (tmp_path / "none").exists()
        with alone(lock, "p._.bob", timeout=0.1):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not is_busy(lock, "p._.alice")
    with alone(lock, "p._.alice", timeout=0.1):
        pass


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(Ds01Error) as caught, alone(tmp_path / "lock", "p._.alice"):
        pytest.fail("followed")
    assert caught.value.reason == "permission_denied"
    assert not (tmp_path / "victim").exists()
