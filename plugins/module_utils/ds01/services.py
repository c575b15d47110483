"""Services of this host's systemd: which run, stop one, start it again. An adapter over `systemctl`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

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


def _systemctl(verb: str, units: Sequence[str], seconds: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["systemctl", verb, "--no-ask-password", "--", *units],  # noqa: S607 - where root finds it
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
