"""systemctl where systemd is not there, or does not answer. With a real one: molecule/mig."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from ds01 import services
from ds01.errors import Ds01Error

UNIT = "nvidia-dcgm.service"
CALLS: dict[str, Callable[[], object]] = {
    "active": lambda: services.active([UNIT]),
    "stop": lambda: services.stop(UNIT),
    "start": lambda: services.start(UNIT),
}
no_systemd = pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs here")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_systemctl(call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Ds01Error, match="systemctl cannot be run on this host: No such file") as caught:
        call()
    assert (caught.value.reason, caught.value.hint) == ("service_failed", f"See: systemctl status {UNIT}")


@no_systemd
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_systemd(call: Callable[[], object]) -> None:
    with pytest.raises(Ds01Error, match=UNIT) as caught:
        call()
    assert "system" in caught.value.message.partition(UNIT)[2], "what systemctl said of it"


def test_nothing_is_asked_for_no_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert services.active([]) == ()


def program(directory: Path, text: str) -> None:
    path = directory / "systemctl"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_the_states_that_systemctl_prints(path: Path) -> None:
    """A line for each unit, in order; exit 3 as soon as one does not run (systemctl(1))."""
    program(path, "printf 'active\\ninactive\\nfailed\\nactivating\\nreloading\\ndeactivating\\n'; exit 3")
    units = [f"{name}.service" for name in "abcdef"]
    assert services.active(units) == ("a.service", "d.service", "e.service")


def test_what_systemctl_says_reaches_people(path: Path) -> None:
    program(path, "echo 'Failed to stop nvidia-dcgm.service: Unit not loaded.' >&2; exit 5")
    with pytest.raises(Ds01Error, match=f"^{UNIT} could not be stopped: Failed to stop .*: Unit not loaded\\. See"):
        services.stop(UNIT)


def test_one_that_does_not_end_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_CHANGE_TIMEOUT", 0.2)
    program(path, "exec sleep 60")
    with pytest.raises(Ds01Error, match=r"systemctl start nvidia-dcgm\.service did not end within 0\.2 s"):
        services.start(UNIT)


def test_a_unit_is_never_an_option(path: Path) -> None:
    program(path, 'echo "$@" >&2; exit 1')
    with pytest.raises(Ds01Error, match=r"stop --no-ask-password -- --all"):
        services.stop("--all")
