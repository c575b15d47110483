"""The slice verbs: what is to be done about the users' slices, done; who would lose GPUs by a daemon-reload."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from . import engine, services, slice_drift, systemd_slices
from .drift import Action
from .engine import Listing
from .errors import Ds01Error
from .limits import Config
from .slice_drift import LiveSlice, Scope


def foresee(config: Config, users: Collection[str]) -> list[Action]:
    """What is to be done now, and what is to be reported (`slice_drift.decide`). Writes nothing.

    `users` are those who have a container, running or not.
    """
    return list(slice_drift.decide(config, systemd_slices.live(), users))


def carry_out(action: Action, config: Config, users: Collection[str]) -> bool:
    """Do what one action says, and see that it is so; False where it is not due any more, or only a report.

    Raises Ds01Error `service_failed`, or `slice_not_changed` where the kernel does not take a limit.
    """
    if action.kind == "slice.removed":
        return systemd_slices.remove(action.subject)
    if action.kind != "slice.changed":
        return False

    def agreed(found: LiveSlice) -> bool:
        return not any(again.kind == "slice.changed" for again in slice_drift.decide(config, [found], users))

    systemd_slices.change(action.subject, action.details["properties"])
    if not systemd_slices.in_force(action.subject, agreed):
        raise Ds01Error(
            "slice_not_changed",
            f"{action.message.rstrip('.')}: systemd took it, but the kernel did not.",
            f"See: journalctl -b -u '{action.subject}'",
        )
    return True


def cut_off_by_reload(docker: engine.Engine) -> tuple[str, ...]:
    """The running containers, of whomever, that would lose their GPUs by a daemon-reload."""
    return slice_drift.cut_off(_scopes(docker, docker.listing()))


def _scopes(docker: engine.Engine, listing: Listing) -> Sequence[Scope]:
    running = [c for c in (*listing.ours, *listing.others) if c.status in engine.RUNNING]
    unit = {c.id: f"docker-{c.id}.scope" for c in running}
    rules = services.device_rules(list(unit.values()))
    return [
        Scope(c.name, c.gpus > 0 if c.own else docker.gpu_use(c.id) is not None, rules.get(unit[c.id])) for c in running
    ]
