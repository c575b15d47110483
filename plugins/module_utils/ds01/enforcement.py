"""How idle and runtime limits are enforced: keys of `policies`, and who is exempt. Pure.

The keys of `Enforcement` may stand in the file's `policies`, in a group's and in a user override's: layered
key by key like limits. None is "never" or "does not count", 0 is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from . import names, units
from .errors import Ds01Error

RawLayer = Mapping[str, Any]
POLICIES = ("idle_timeout", "max_runtime")
"""The limits that are enforced on running containers, and from which a user may be exempt."""


@dataclass(frozen=True)
class Enforcement:
    """What counts as idle, and how the end of a container's time is announced.

    Whoever reaches a threshold is active; None: that sign does not count. `gpu_idle_threshold` is in percent of
    the GPU's time, `cpu_idle_threshold` in percent of one core, `network_idle_threshold` in bytes between two
    samples. `idle_detection_window` is how many samples in a row must show nothing. `grace_period` after a start
    counts as use (None: always). `keepalive_max_duration` is how long a `.keep-alive` file is honoured (None: as
    long as it is there). `warning_time` is how old a warning must be before a container is stopped (None: it is
    warned and never stopped), `sigterm_grace` the time between SIGTERM and SIGKILL. High demand multiplies idle
    times by `high_demand_idle_reduction` (None: it leaves them).
    """

    gpu_idle_threshold: float | None = 5
    cpu_idle_threshold: float | None = 2
    network_idle_threshold: int | None = 1024**2
    idle_detection_window: int = 3
    grace_period: timedelta | None = timedelta(minutes=30)
    keepalive_max_duration: timedelta | None = timedelta(hours=24)
    warning_time: timedelta | None = timedelta(minutes=15)
    sigterm_grace: timedelta = timedelta(seconds=60)
    high_demand_idle_reduction: float | None = 0.5


@dataclass(frozen=True)
class Exemption:
    """A user's containers, or those of one project, are not stopped by these policies until `expires` (None: for good).

    A record with a `problem` exempts nobody.
    """

    user: str
    policies: tuple[str, ...]
    reason: str
    approved_by: str
    expires: datetime | None = None
    project: str | None = None
    problem: str = ""

    def covers(self, policy: str, user: str, container: str, when: datetime) -> bool:
        if self.problem or policy not in self.policies or user != self.user:
            return False
        named = self.project is None or self.project in (container, names.split(container)[0])
        return named and (self.expires is None or when < self.expires)


_SPANS = ("grace_period", "keepalive_max_duration", "warning_time", "sigterm_grace")
_OLD_SPANS = {f"{key}_{unit}": (key, unit) for key in _SPANS for unit in "hms"}
_OLD_SPANS["sigterm_grace_seconds"] = ("sigterm_grace", "s")


def finite(value: float) -> float:
    """The number itself. NaN, which is neither above nor below a threshold, raises ValueError."""
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value


_CONVERT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("gpu_idle_threshold", "cpu_idle_threshold", "high_demand_idle_reduction"), finite),
    **{key: lambda v: units.parse_duration(str(v)) for key in _SPANS},
    "network_idle_threshold": lambda v: v if isinstance(v, int) else units.parse_size(v),
}
_REQUIRED = ("sigterm_grace", "idle_detection_window")


def parse_layer(raw: RawLayer | None, path: str) -> RawLayer:
    """What one `policies` section says of enforcement, under the names that count; its other keys are left out.

    Raises Ds01Error `config_invalid` with the place of what is wrong.
    """
    layer: dict[str, Any] = {}
    for key, written in (raw or {}).items():
        name, unit = _OLD_SPANS.get(key, (key, ""))
        if name not in Enforcement.__dataclass_fields__:
            continue
        if name in layer:
            raise _bad(f"{path}.{key}", f"{name} is set twice, under an old name and a new one")
        layer[name] = _converted(name, written if written is None else _with_unit(written, unit), f"{path}.{key}")
    return layer


def _with_unit(value: Any, unit: str) -> Any:
    return f"{value}{unit}" if unit else value


def _converted(name: str, value: Any, path: str) -> Any:
    if value is None:
        if name in _REQUIRED:
            raise _bad(path, "null has no meaning here; write a value, or leave the key out")
        return None
    try:
        return _CONVERT.get(name, lambda v: v)(value)
    except ValueError as exc:
        raise _bad(path, str(exc)) from None


def parse_exemptions(raw: Iterable[RawLayer] | None) -> tuple[Exemption, ...]:
    """The file's exemptions, in its order. What is missing or unreadable in one becomes its `problem`."""
    return tuple(_exemption(record) for record in raw or ())


def _exemption(raw: RawLayer) -> Exemption:
    problems = []
    user = raw.get("user") or raw.get("username") or ""
    written = raw.get("exempt_from") or ()
    policies = tuple(dict.fromkeys(key.removesuffix("_h") for key in written))
    texts = {"user": user, "reason": raw.get("reason"), "approved_by": raw.get("approved_by")}
    problems += [f"{key} is missing" for key, value in texts.items() if not str(value or "").strip()]
    if not policies or not set(policies) <= set(POLICIES):
        problems.append(f"exempt_from must list {' or '.join(POLICIES)}")
    expires, problem = _expiry(raw)
    problems += [problem] if problem else []
    return Exemption(
        user=user,
        policies=policies,
        reason=raw.get("reason") or "",
        approved_by=raw.get("approved_by") or "",
        expires=expires,
        project=raw.get("project") or None,
        problem="; ".join(problems),
    )


def _expiry(raw: RawLayer) -> tuple[datetime | None, str]:
    """When it ends: null is never, a day alone counts to its end, and nothing at all is a mistake."""
    if "expires_on" not in raw:
        return None, "expires_on is missing (null: it never expires)"
    written = raw["expires_on"]
    if written is None:
        return None, ""
    try:
        end = units.parse_time(written)
    except (ValueError, OverflowError):
        return None, f"expires_on {written!r} is no time"
    return (end if len(written.strip()) > len("2026-01-31") else units.after(end, timedelta(days=1))), ""


def _bad(path: str, problem: str) -> Ds01Error:
    return Ds01Error("config_invalid", f"{path}: {problem}.")
