"""Which server a request goes to. Pure; works on the answers of `ds01_info`, one a host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import names


def rank(hosts: Mapping[str, Mapping[str, Any]], project: str, user: str, profile: str | None = None) -> list[str]:
    """Host names, best first: where the container is already, then where most fitting devices are free.

    `hosts` maps a name to its `ds01_info` result; ties go by name. A host whose driver or engine
    does not answer comes last, so that its error is seen when there is no other.
    """

    def key(host: str) -> tuple[bool, bool, int, str]:
        info = hosts[host]
        has_it = any(
            _is(entry.get("name") or entry["container"], entry["user"], project, user)
            for entry in (*info.get("containers", ()), *info.get("allocations", ()))
        )
        free = sum(
            d["status"] == "free" and d.get("health", "ok") == "ok" and profile in (None, "", d["profile"])
            for d in info.get("devices", ())
        )
        return not has_it, bool(info.get("problems")), -free, host

    return sorted(hosts, key=key)


def _is(name: str, owner: str, project: str, user: str) -> bool:
    """Whether it is this one, also where a request that died left it set aside."""
    return any(_is_called(called, owner, project, user) for called in (name, names.before_aside(name)))


def _is_called(container: str, owner: str, project: str, user: str) -> bool:
    return container == project or (names.split(container)[0] == project and owner == user)
