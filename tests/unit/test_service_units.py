"""The systemd units that DS01 brings, against what they must be able to do on every release that the roles name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ds01 import reconcile, watchdog
from ds01.enforcement import Enforcement
from support import ROOT

UNITS = sorted((ROOT / "roles" / "ds01_runtime" / "files").glob("*.service"))
CLOSES_DEVICES = ("PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock")
"""The last one before systemd 252: it allows the clock's device, and so no other (systemd issue 18142)."""


@pytest.fixture(params=UNITS, ids=lambda path: path.name)
def settings(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    unit: Path = request.param
    return re.findall(r"^(\w+)=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_units() -> None:
    assert [unit.name for unit in UNITS] == ["ds01-reconcile.service", "ds01-restore.service"]


def test_reconcile_ends_itself_before_its_unit_is_ended_and_waits_for_containers_within_its_time() -> None:
    text = UNITS[0].read_text(encoding="utf-8")
    (minutes,) = re.findall(r"^TimeoutStartSec=(\d+)min$", text, re.MULTILINE)
    assert int(minutes) * 60 > reconcile.DEADLINE + watchdog._LAST_WORDS
    grace = Enforcement().sigterm_grace.total_seconds()
    assert reconcile._UNMANAGED_GRACE + grace < reconcile.PATIENCE <= reconcile.DEADLINE / 2


def test_the_gpus_stay_in_reach(settings: list[tuple[str, str]]) -> None:
    assert [name for name, _ in settings if name in CLOSES_DEVICES] == []


def test_no_unit_starts_an_engine_that_an_admin_stopped(settings: list[tuple[str, str]]) -> None:
    wants = [value for name, value in settings if name in ("Wants", "Requires", "BindsTo", "Upholds")]
    assert not any("docker" in value for value in wants)


def test_a_run_that_waits_for_another_may_do_so() -> None:
    """Both end by themselves, before systemd ends the unit."""
    unit = (ROOT / "roles" / "ds01_runtime" / "files" / "ds01-reconcile.service").read_text(encoding="utf-8")
    (minutes,) = re.findall(r"^TimeoutStartSec=(\d+)min$", unit, re.MULTILINE)
    assert int(minutes) * 60 > reconcile._LOCK_WAIT + reconcile.DEADLINE > reconcile.DEADLINE * 2
