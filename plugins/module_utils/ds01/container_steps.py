"""What a container should be, the steps between that and what there is, and what is told of it.

A wish and what the engine shows become a list of steps; containers.py carries them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from . import engine, names
from .container_spec import ContainerRequest
from .errors import Ds01Error

STATES = ("present", "started", "stopped", "restarted", "absent")
RECREATE = ("never", "on_change", "on_update", "always")
DEFAULT_STOP_TIMEOUT = 10
"""Seconds between asking a container to stop and killing it."""


@dataclass(frozen=True)
class Wish:
    """What one container should be. `request` is None where no image is named: it has to exist.

    `wait` is how long to wait for devices; `reuse_held` gives up the user's own holds for them. `keep` are
    the paths whose files a container gets from the one that it replaces.
    """

    state: str
    name: names.ContainerName
    request: ContainerRequest | None = None
    stop_timeout: int = DEFAULT_STOP_TIMEOUT
    recreate: str = "never"
    wait: timedelta | None = None
    reuse_held: bool = False
    keep: Sequence[str] = ()


@dataclass
class Report:
    """What was done for one wish, in order, and what the container is now."""

    name: names.ContainerName
    actions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    container: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    image_outdated: bool = False
    foreseen: bool = False
    error: Ds01Error | None = None

    def result(self) -> dict[str, Any]:
        """The report as JSON (module results)."""
        words = str(self.error) if self.error else self._summary()
        return {
            "name": self.name.full,
            "changed": bool(self.actions),
            "failed": self.error is not None,
            "reason": self.error.reason if self.error else "ok",
            "msg": words,
            "actions": self.actions,
            "container": self.container,
            "allocation": self.allocation,
            "drift": self.drift,
            "image_outdated": self.image_outdated,
            "warnings": self.warnings,
        }

    def _summary(self) -> str:
        done = ", ".join(self.actions) or "nothing to do"
        if self.foreseen and self.actions:
            done = f"would be {done}"
        status = self.after.get("status")
        if not status:
            return f"{self.name.full}: {done}."
        gpu = self.allocation["gpu_id"] if self.allocation else None
        device = f"with GPU {gpu}" if gpu else "without a device" if self.after.get("gpus") else "CPU only"
        text = f"{self.name.full}: {done}; {'then' if self.foreseen else 'now'} {status}, {device}."
        if status == "running" and not self.foreseen:
            text += f" Enter it with: docker exec -it {self.name.full} bash (or sh)."
        return text


@dataclass
class Plan:
    """What there is, what would be created, and the steps between."""

    existing: engine.Container | None
    spec: dict[str, Any] | None
    steps: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)
    drift: dict[str, Any] = field(default_factory=dict)
    outdated: bool = False


def steps(wish: Wish, status: str | None, differs: bool, finished: bool = True) -> tuple[str, ...]:
    """What has to be done, given the engine's status (None: no container).

    `differs` says that the container was made from another wish; one that is not `finished` was left
    by a request that died, before anything ran in it. One that is made anew is set aside until the new
    one is there. Raises Ds01Error `container_missing` or `container_busy`.
    """
    if wish.state == "absent":
        # A container that somebody removed by hand may have left its allocation behind.
        return ("remove", "release") if status else ("release",)
    if status == "removing":
        raise Ds01Error("container_busy", f"{wish.name.full} is being removed.", "Try again in a moment.")
    anew = wish.recreate == "always" or (wish.recreate != "never" and differs)
    if status and (not finished or (wish.request and anew)):
        # Its devices first: where the new one could have none, the old one stays.
        away, made = "set_aside" if finished else "remove", _steps_to_make(wish)
        return tuple(step for step in ("allocate", away, "create", "start") if step in (away, *made))
    if status is None:
        return _steps_to_make(wish)
    return _steps_from(wish.state, status)


def _steps_to_make(wish: Wish) -> tuple[str, ...]:
    if wish.request is None or wish.state == "stopped":
        raise Ds01Error(
            "container_missing",
            f"There is no container {wish.name.full}.",
            "Create it with playbooks/container_create.yml.",
        )
    return ("create",) if wish.state == "present" else ("allocate", "create", "start")


def _steps_from(state: str, status: str) -> tuple[str, ...]:
    running = status in engine.RUNNING
    if state == "stopped":
        return ("stop",) if running else ()
    if state == "restarted":
        return ("allocate", "restart") if running else ("allocate", "start")
    if state == "started":
        return {"paused": ("unpause",)}.get(status, () if running else ("allocate", "start"))
    return ()


def notices(wish: Wish, plan: Plan, differs: bool) -> Iterator[str]:
    """What users should know of a container that stays as it is."""
    if differs:
        what = "; ".join(f"{key}: {is_} instead of {wanted}" for key, (is_, wanted) in _shown_drift(plan.drift))
        yield (
            f"{wish.name.full} was made from another request{f' ({what})' if what else ''}; "
            f"it stays as it is (recreate: {wish.recreate})."
        )
    if plan.outdated and wish.request:
        yield (
            f"{wish.name.full} was made from an older image than {wish.request.image} is now; it stays as it is "
            f"(recreate: {wish.recreate})."
        )


def _shown_drift(drift: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    for key, values in drift.items():
        is_, wanted = (json.dumps(values[side]) for side in ("is", "wanted"))
        yield key, (is_, wanted)


def begun(wish: Wish, plan: Plan) -> Report:
    """The report before anything is done."""
    return Report(
        wish.name,
        warnings=[*plan.warnings],
        before=state(plan.existing),
        drift=plan.drift,
        image_outdated=plan.outdated,
    )


def gpus(wish: Wish, plan: Plan) -> int:
    """How many devices the container asks for."""
    if wish.request:
        return wish.request.gpus
    return plan.existing.gpus if plan.existing else 0


def state(container: engine.Container | None) -> dict[str, Any]:
    """What a diff shows of a container; empty when there is none."""
    if container is None:
        return {}
    return {"name": container.name, "status": container.status, "image": container.image, "gpus": container.gpus}


def foreseen(wish: Wish, plan: Plan) -> dict[str, Any]:
    """What a diff shows of the container once the plan is carried out."""
    now = state(plan.existing)
    if not plan.steps:
        return now
    if wish.state == "absent":
        return {}
    status = {"present": "created", "stopped": "exited"}.get(wish.state, "running")
    image = wish.request.image if wish.request and "create" in plan.steps else now.get("image")
    return {"name": wish.name.full, "status": status, "image": image, "gpus": gpus(wish, plan)}


def shown(container: engine.Container | None) -> dict[str, Any] | None:
    """A container as results show it."""
    if container is None:
        return None
    allocation = container.labels.get("ds01.allocation")
    return {
        "name": container.name,
        "id": container.id,
        "status": container.status,
        "image": container.image,
        "gpus": container.gpus,
        "device": names.cdi_device(allocation) if allocation else None,
        "labels": dict(container.labels),
    }
