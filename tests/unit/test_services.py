"""systemctl where systemd is not there, or does not answer. With a real one: molecule/mig."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import sim_systemd
from ds01 import services
from ds01.errors import Ds01Error
from ds01.services import Stopping

UNIT = "nvidia-dcgm.service"
CALLS: dict[str, Callable[[], object]] = {
    "stopping": lambda: services.stopping([UNIT]),
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
    assert services.stopping([]) == ()


def program(directory: Path, text: str) -> None:
    path = directory / "systemctl"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


STATES = {
    "active": True,
    "inactive": False,
    "failed": False,
    "activating": True,
    "reloading": True,
    "deactivating": False,
}


@pytest.mark.parametrize(("state", "runs"), STATES.items(), ids=STATES)
def test_the_states_that_systemctl_prints(state: str, runs: bool, path: Path) -> None:
    program(path, f"echo Id={UNIT}; echo ActiveState={state}; echo RequiredBy=; echo PropagatesStopTo=")
    assert services.stopping([UNIT]) == ((Stopping(UNIT),) if runs else ())


Units = Mapping[str, Mapping[str, str]]
DCGM: Units = {"dcgm.service": {"RequiredBy": "exporter.service"}, "exporter.service": {}}
STOPS: dict[str, tuple[Units, Sequence[str], Sequence[Stopping]]] = {
    "in the order given": (
        {"b.service": {}, "a.service": {}},
        ["b.service", "a.service"],
        [*map(Stopping, ["b.service", "a.service"])],
    ),
    "one that is not there": ({}, ["a.service"], []),
    "what needs it goes first": (
        DCGM,
        ["dcgm.service", "exporter.service"],
        [Stopping("exporter.service"), Stopping("dcgm.service")],
    ),
    "in whatever order they are listed": (
        DCGM,
        ["exporter.service", "dcgm.service"],
        [Stopping("exporter.service"), Stopping("dcgm.service")],
    ),
    "one that is not listed": (
        DCGM,
        ["dcgm.service"],
        [Stopping("exporter.service", "dcgm.service"), Stopping("dcgm.service")],
    ),
    "one that does not run": (
        {**DCGM, "exporter.service": {"state": "inactive"}},
        ["dcgm.service"],
        [Stopping("dcgm.service")],
    ),
    "through one that does not run": (
        {
            "a.service": {"BoundBy": "b.service"},
            "b.service": {"state": "failed", "ConsistsOf": "c.target"},
            "c.target": {},
        },
        ["a.service"],
        [Stopping("c.target", "a.service"), Stopping("a.service")],
    ),
    "in a circle": (
        {"a.service": {"PropagatesStopTo": "b.service"}, "b.service": {"RequisiteOf": "a.service"}},
        ["a.service", "b.service"],
        [Stopping("b.service"), Stopping("a.service")],
    ),
}


@pytest.mark.parametrize(("units", "listed", "expected"), STOPS.values(), ids=STOPS)
def test_what_a_stop_takes_along(units: Units, listed: Sequence[str], expected: Sequence[Stopping], path: Path) -> None:
    systemd = sim_systemd.install(path, path / "units")
    for name, about in units.items():
        systemd.unit(name, **about)
    assert services.stopping(listed) == tuple(expected)


def test_another_name_of_a_unit_is_the_unit(path: Path) -> None:
    program(path, f"echo Id={UNIT}; echo ActiveState=active")
    assert services.stopping(["dcgm.service"]) == (Stopping(UNIT),)


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
