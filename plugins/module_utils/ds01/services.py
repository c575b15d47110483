"""Units of this host's systemd: which run, stop and start one, change its limits. An adapter over `systemctl`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from .errors import Ds01Error

_LOOK_TIMEOUT = 15
_CHANGE_TIMEOUT = 150
"""systemd's own patience with a stop is 90 s (DefaultTimeoutStopSec); it answers before this is over."""

_RUNNING = ("active", "reloading", "refreshing", "activating")


def active(units: Sequence[str]) -> tuple[str, ...]:
    """Those of the units that run, or are about to, in the order given; a unit that the host does not
    have does not run. Raises Ds01Error `service_failed` where systemd does not answer."""
    if not units:
        return ()
    done = _systemctl("is-active", units, _LOOK_TIMEOUT)
    states = done.stdout.split()
    if len(states) != len(units):
        raise _failed(f"systemd does not say whether {', '.join(units)} runs{_said(done)}.", units[0])
    return tuple(unit for unit, state in zip(units, states, strict=True) if state in _RUNNING)


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
