"""Units of this host's systemd: which run, stop and start one, change its limits. An adapter over `systemctl`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import Ds01Error

_LOOK_TIMEOUT = 15
_CHANGE_TIMEOUT = 150
"""systemd's own patience with a stop is 90 s (DefaultTimeoutStopSec); it answers before this is over."""

_STOPPED_WITH = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""By which a stop spreads: made by Requires=, Requisite=, BindsTo=, PartOf=, PropagatesStopTo= (systemd.unit(5))."""

_RUNNING = ("active", "reloading", "refreshing", "activating")


@dataclass(frozen=True)
class Stopping:
    """A unit that runs and would stop. `along_with` is the unit whose stop takes it along, empty where it is
    itself one of those asked about."""

    unit: str
    along_with: str = ""


def stopping(units: Sequence[str]) -> tuple[Stopping, ...]:
    """What stops when these units are stopped, in an order in which whoever needs another goes first.

    A stop takes along what depends on the unit, and a start brings none of it back. A unit that the host does
    not have does not run. Raises Ds01Error `service_failed` where systemd does not answer.
    """
    known: dict[str, _Known] = {}
    causes: dict[str, str] = {}
    for unit in units:
        _add_stopping(unit, unit, known, causes)
    own = {known[unit].name for unit in units}
    return tuple(Stopping(unit, "" if unit in own else cause) for unit, cause in causes.items())


def runs(unit: str) -> bool:
    """Whether it runs, or is about to. Raises Ds01Error `service_failed` where systemd does not answer."""
    return _known(unit).runs


def startable(unit: str) -> bool:
    """Whether systemd has it, and an admin has not masked it. Raises Ds01Error `service_failed` where systemd
    does not answer."""
    return _known(unit).load_state not in ("not-found", "masked")


@dataclass(frozen=True)
class _Known:
    """A unit's own name where it was asked about by another, whether it runs, what a stop of it stops, and what
    became of its file (LoadState)."""

    name: str
    runs: bool
    dependents: tuple[str, ...]
    load_state: str


def _add_stopping(unit: str, cause: str, known: dict[str, _Known], causes: dict[str, str]) -> None:
    """Those that go with the unit, then the unit. A stop spreads through what does not run, too."""
    if unit in known:
        return
    found = known[unit] = _known(unit)
    for dependent in found.dependents:
        _add_stopping(dependent, cause, known, causes)
    if found.runs:
        causes.setdefault(found.name, cause)


def _known(unit: str) -> _Known:
    done = _systemctl("show", [unit], _LOOK_TIMEOUT, f"--property=Id,LoadState,ActiveState,{','.join(_STOPPED_WITH)}")
    about = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    if done.returncode or "ActiveState" not in about:
        raise _failed(f"systemd does not say whether {unit} runs{_said(done)}.", unit)
    dependents = tuple(name for kind in _STOPPED_WITH for name in about.get(kind, "").split())
    runs, load_state = about["ActiveState"] in _RUNNING, about.get("LoadState", "")
    return _Known(about.get("Id") or unit, runs, dependents, load_state)


def stop(unit: str) -> None:
    """Stop it, and wait until it has stopped. Raises Ds01Error `service_failed`."""
    done = _systemctl("stop", [unit], _CHANGE_TIMEOUT)
    if done.returncode:
        raise _failed(f"{unit} could not be stopped{_said(done)}.", unit)


def start(unit: str) -> None:
    """Start it, and wait until it runs. Raises Ds01Error `service_failed`."""
    done = _systemctl("start", [unit], _CHANGE_TIMEOUT)
    if done.returncode:
        raise _failed(f"{unit} could not be started{_said(done)}.", unit)


def set_properties(unit: str, properties: Mapping[str, str]) -> None:
    """Change what a unit may use, until the next boot, while it runs. Raises Ds01Error `service_failed`."""
    wanted = [f"{name}={value}" for name, value in properties.items()]
    done = _systemctl("set-property", [unit, *wanted], _LOOK_TIMEOUT, "--runtime")
    if done.returncode:
        raise _failed(f"{unit} could not be given {', '.join(wanted)}{_said(done)}.", unit)


def deactivate(unit: str) -> None:
    """Stop this unit alone, and nothing that runs in it or needs it. Raises Ds01Error `service_failed`."""
    done = _systemctl("stop", [unit], _CHANGE_TIMEOUT, "--job-mode=ignore-dependencies")
    if done.returncode:
        raise _failed(f"{unit} could not be stopped{_said(done)}.", unit)


def device_rules(units: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The DeviceAllow lines of those of the units that systemd has. Raises Ds01Error `service_failed`."""
    if not units:
        return {}
    done = _systemctl("show", units, _LOOK_TIMEOUT, "--property=Id,LoadState,DeviceAllow")
    if done.returncode:
        raise _failed(f"systemd does not say which devices {units[0]} may use{_said(done)}.", units[0])
    found = {}
    for block in done.stdout.split("\n\n"):
        pairs = [line.partition("=")[::2] for line in block.splitlines()]
        about = dict(pairs)
        if about.get("LoadState") == "loaded":
            found[about["Id"]] = tuple(value for name, value in pairs if name == "DeviceAllow" and value)
    return found


def _systemctl(verb: str, units: Sequence[str], seconds: int, *options: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["systemctl", verb, "--no-ask-password", *options, "--", *units],  # noqa: S607 - where root finds it
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed(f"systemctl {verb} {' '.join(units)} did not end within {seconds} s.", units[0]) from None
    except OSError as exc:
        raise _failed(f"systemctl cannot be run on this host: {exc.strerror}.", units[0]) from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """What systemctl said, in one line."""
    words = " ".join(done.stderr.split()).rstrip(".")
    return f": {words:.300}" if words else ""


def _failed(message: str, unit: str) -> Ds01Error:
    return Ds01Error("service_failed", message, f"See: systemctl status {unit}")
