"""Limits that are handed in for one container: they tighten the user's own, and never loosen them. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from . import units
from .errors import Ds01Error, invalid_input
from .limits import Limits, check_consistent, number_text

IN_CONTAINER = ("max_cpus", "memory", "memory_swap", "shm_size", "pids_limit")
"""The limits that go into a container's create call."""

_KNOWN = (*Limits.__dataclass_fields__, "slice", "docker_args")
_CORES = re.compile(r"[0-9]{1,6}(\.[0-9]{1,20})?")


def tightened(own: Limits, given: Mapping[str, Any]) -> Limits:
    """`own` with the container's limits that are given, none of them looser than `own`'s.

    `given` has keys of `limits.as_dict`, some or all. An absent key leaves what `own` has; null is
    unlimited, looser than any number; what does not go into a container is never taken from it.
    Raises Ds01Error `invalid_input` with the key.
    """
    for key in given:
        if key not in _KNOWN:
            near = difflib.get_close_matches(str(key), _KNOWN, n=1)
            raise _bad(key, f"unknown key{f'; did you mean {near[0]}?' if near else '.'}")
    if given.get("user", own.user) != own.user:
        raise _bad("user", f"these are {given['user']}'s limits, and the container is {own.user}'s.")
    # As in the limits file: swap goes with the memory beside which it is not set.
    swap = {"memory_swap": given["memory"]} if given.get("memory") is not None else {}
    wanted = {**swap, **given}
    result = replace(own, **{key: _no_looser(own, key, wanted[key]) for key in IN_CONTAINER if key in wanted})
    try:
        check_consistent(result, "limits")
    except Ds01Error as exc:
        raise invalid_input(exc.message) from None
    return result


def _bad(key: object, problem: str, hint: str = "") -> Ds01Error:
    return invalid_input(f"limits.{key}: {problem}", hint)


def _no_looser(own: Limits, key: str, value: Any) -> Any:
    """The value with its type made exact, where it is at most what `own` has."""
    allowed = getattr(own, key)
    try:
        exact = None if value is None else _EXACT[key](value)
    except ValueError as exc:
        raise _bad(key, f"{exc}.") from None
    if allowed is None or (exact is not None and _amount(exact) <= _amount(allowed)):
        return exact
    raise _bad(
        key,
        f"{_text(exact)} is more than {_text(allowed)}, which {own.user} may have on this server.",
        "Leave it out, or raise it in the limits file and run playbooks/site.yml.",
    )


def _amount(value: Any) -> int | Fraction:
    return units.parse_size(value) if isinstance(value, str) else value


def _text(value: Any) -> str:
    if value is None:
        return "unlimited"
    return number_text(value) if isinstance(value, Fraction) else str(value)


# Stricter than for the limits file: no schema stood before these values. To Docker 0 and -1 are no limit.
def _cores(value: Any) -> Fraction:
    if isinstance(value, bool) or not _CORES.fullmatch(str(value)) or not Fraction(str(value)):
        raise ValueError(f"{value!r} is not a number of cores above 0")
    return Fraction(str(value))


def _processes(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def _size(value: Any) -> str:
    if not units.parse_size(str(value)):
        raise ValueError(f"{value!r} is not a size above 0")
    return value


_EXACT: dict[str, Callable[[Any], Any]] = {
    "max_cpus": _cores,
    "pids_limit": _processes,
    **dict.fromkeys(("memory", "memory_swap", "shm_size"), _size),
}
