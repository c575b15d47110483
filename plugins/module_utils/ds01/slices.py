"""The slice verbs: how the users' slices are, what is to be done about them, and doing it; who would lose GPUs by a
daemon-reload."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from . import engine, services, slice_drift, systemd_slices
from .allocations import Allocations
from .drift import Action
from .engine import Container, Listing
from .errors import Ds01Error
from .limits import Config
from .slice_drift import LiveSlice, Scope


def foresee(config: Config, users: Collection[str]) -> list[Action]:
    """What is to be done now, and what is to be reported (`slice_drift.decide`). Writes nothing.

    `users` are those who have a container, running or not.
    """
    return list(slice_drift.decide(config, systemd_slices.live(), users))


def carry_out(ds01: Allocations, action: Action, users: Collection[str]) -> bool:
    """Do what one action says, and see that it is so, with an event; False where it is not due any more, or only a
    report.

    Raises Ds01Error `service_failed`, or `slice_not_changed` where the kernel does not take a limit.
    """
    done = _done(action, ds01.config, users)
    if done:
        ds01.events.record(action, ds01.clock())
    return done


def _done(action: Action, config: Config, users: Collection[str]) -> bool:
    if action.kind == "slice.removed":
        return systemd_slices.remove(action.subject)
    if action.kind != "slice.changed":
        return False

    others = [found for found in systemd_slices.live() if found.name != action.subject]

    def agreed(found: LiveSlice) -> bool:
        again = slice_drift.decide(config, [found, *others], users)
        return not any((a.kind, a.subject) == ("slice.changed", action.subject) for a in again)

    systemd_slices.change(action.subject, action.details["properties"])
    if not systemd_slices.in_force(action.subject, agreed):
        raise Ds01Error(
            "slice_not_changed",
            f"{action.message.rstrip('.')}: systemd took it, but the kernel did not.",
            f"See: journalctl -b -u '{action.subject}'",
        )
    return True


def users(containers: Iterable[Container]) -> frozenset[str]:
    """Those who have a container, running or not."""
    return frozenset(container.user for container in containers)


def apply(ds01: Allocations) -> tuple[list[Action], list[str]]:
    """Do all that is due, each with an event; what was done, and the problems, a sentence each."""
    having, done, problems = users(ds01.engine.containers()), [], []
    for action in foresee(ds01.config, having):
        try:
            if carry_out(ds01, action, having):
                done.append(action)
        except Ds01Error as exc:
            problems.append(str(exc))
    return done, problems


def listing(ds01: Allocations) -> dict[str, Any]:
    """The users' slices with the limits in force, what is due, and whom a daemon-reload would cut off, as JSON."""
    live, containers = systemd_slices.live(), ds01.engine.listing()
    return {
        "slices": [row for found in live if (row := slice_drift.describe(found))["user"]],
        "actions": [action.record() for action in slice_drift.decide(ds01.config, live, users(containers.ours))],
        "cut_off_by_reload": list(cut_off_by_reload(ds01.engine, containers)),
    }


def cut_off_by_reload(docker: engine.Engine, listing: Listing) -> tuple[str, ...]:
    """The running containers of this listing, of whomever, that would lose their GPUs by a daemon-reload."""
    return slice_drift.cut_off(_scopes(docker, listing))


def _scopes(docker: engine.Engine, listing: Listing) -> Sequence[Scope]:
    running = [c for c in (*listing.ours, *listing.others) if c.status in engine.RUNNING]
    unit = {c.id: f"docker-{c.id}.scope" for c in running}
    rules = services.device_rules(list(unit.values()))
    return [
        Scope(c.name, c.gpus > 0 if c.own else docker.gpu_use(c.id) is not None, rules.get(unit[c.id])) for c in running
    ]
