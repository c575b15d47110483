"""Idle and runtime limits in force: look at every container, warn its user, stop it in the end.

What is decided is in policies.py. Warnings are given before they are remembered, and remembered before anybody is
stopped: a process that dies in between warns again, and nobody is stopped who was not told. That a stop happened is
told before it is remembered: where a process dies in between, or leaves before the engine is done, the next look tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import accounts, engine, nvml, policies, telling, usage
from .allocations import Allocations, Settled
from .drift import Action
from .engine import Container
from .errors import Ds01Error
from .observation import Observation
from .policies import DeviceUse, Review, Sample, Watched
from .policy_state import PolicyStore
from .stopping import End
from .transitions import Change

Ends = Callable[[Mapping[str, int]], Iterator[End]]
"""Ends containers by their ids, each with its seconds of grace, side by side."""

Uses = Mapping[str, DeviceUse]
"""How each device, by UUID, is used now."""


def uses(driver: nvml.Nvml, seen: Observation) -> Uses:
    """Those of the devices, where a container runs whose use matters. Raises Ds01Error `driver_unavailable`."""
    return driver.uses(seen.inventory) if any(c.status in engine.RUNNING for c in _watched(seen)) else {}


@dataclass(frozen=True)
class Round:
    """One look at all containers, under reconcile's lock."""

    review: Review
    store: PolicyStore

    @property
    def actions(self) -> list[Action]:
        """What there is to tell, and whom to stop then."""
        return [*self.review.actions, *self.review.stops]

    def check(self) -> None:
        """Raises Ds01Error `policy_state_damaged` where what was remembered is lost."""
        if self.store.problem:
            raise Ds01Error("policy_state_damaged", self.store.problem)

    def farewell(self, action: Action) -> str:
        """What the notice says once its container is stopped."""
        return self.review.states[action.details["container_id"]].farewell

    def remember(self) -> None:
        """To be called between warnings and stops. Raises Ds01Error: then nobody is to be stopped."""
        self.store.write(self.review.states)


def look(ds01: Allocations, settled: Settled, devices: Uses) -> Round:
    """Look and decide. Writes nothing, and so brings nobody nearer to a stop."""
    store = PolicyStore(ds01.paths.policy_state)
    return Round(_review(ds01, settled, devices, store), store)


def tell(ds01: Allocations, action: Action) -> None:
    """A warning, or a stop that happened: on its user's terminals, and in the audit log."""
    if action.kind == "policy.stopped":
        policy = action.details["policy"]
        ds01.events.write("container.stopped", ds01.clock(), user=action.user, container=action.subject, reason=policy)
    ds01.events.record(action, ds01.clock())
    telling.tell(action.user, action.message)


def stop(ds01: Allocations, found: Round, ends: Ends) -> Iterator[tuple[Action, Ds01Error | None]]:
    """Stop those whose time is over, side by side; each that ended, or could not be stopped and why, as it comes.

    Not in it are those that the engine is not done with, or was not asked to stop: the next look sees what became of
    them. Nor is one that does not run any more, or whose name another has by now. Raises Ds01Error where what happened
    cannot be remembered.
    """
    due = {action.details["container_id"]: action for action in found.review.stops}
    there = {id_: action for id_, action in due.items() if _status(ds01, action) in engine.RUNNING}
    states = dict(found.review.states)
    states.update((id_, states[id_].not_stopped) for id_ in due.keys() - there.keys())
    found.store.write(states)
    for end in ends({id_: int(action.details["stop_timeout"]) for id_, action in there.items()}):
        action = there[end.container]
        if end.fate == "over":
            tell(ds01, action)
            states[end.container] = states[end.container].stopped
        elif end.fate != "under way":
            states[end.container] = states[end.container].not_stopped
        found.store.write(states)
        if end.fate in ("over", "failed"):
            yield action, end.error


def hold(ds01: Allocations, action: Action) -> None:
    """The devices of one that was stopped are held from now on, where it has some. Raises Ds01Error: then the next run
    sees to that."""
    if ds01.allocation(action.subject) and _status(ds01, action) in engine.STOPPED:
        ds01.engine.wait_until_listed(action.subject)
        ds01.apply([Change("held", action.container)])


def _status(ds01: Allocations, action: Action) -> str:
    """The container's, now; empty where it is gone, or another one has its name."""
    there = ds01.engine.container(action.subject)
    return there.status if there and there.id == action.details["container_id"] else ""


Places = Mapping[str, str]
"""Texts by where they stand: `alice:/home/alice/workspace/DS01-NOTICE-my-project.txt`, written as alice."""


def notices(settled: Settled, wanted: Mapping[str, str]) -> Places:
    """These texts, by container, where they belong: in the workspaces."""
    return {_place(c): wanted[c.name] for c in settled.seen.containers if c.workspace and wanted.get(c.name)}


def leave_notices(wanted: Places, told: Places) -> None:
    """Bring the notices in the workspaces up to date: `told` stood before, also of containers that are gone."""
    for place in sorted(wanted.keys() | told.keys()):
        user, colon, file = place.partition(":")
        account = accounts.lookup(user) if colon and wanted.get(place) != told.get(place) else None
        if account:
            telling.leave_notice(account, Path(file), wanted.get(place, ""))


def _place(container: Container) -> str:
    return f"{container.user}:{container.workspace}/{policies.notice_file(container.name)}"


def _watched(seen: Observation) -> list[Container]:
    return [c for c in seen.containers if c.own and c.user]


def _review(ds01: Allocations, settled: Settled, devices: Uses, store: PolicyStore) -> Review:
    clock = usage.clock()
    ours = _watched(settled.seen)
    demand = policies.high_demand(ds01.config, settled.seen.inventory, settled.ledger)
    return policies.review(
        [Watched(c.id, c.name, c.user, c.gpus, c.status in engine.RUNNING) for c in ours],
        _samples(settled, [c for c in ours if c.status in engine.RUNNING], devices),
        store.read(),
        lambda container: policies.rules_of(ds01.config, container, clock.time, demand=demand),
        clock,
    )


def _samples(settled: Settled, running: list[Container], devices: Uses) -> dict[str, Sample]:
    """By container id: what each uses now, as far as it can be read."""
    usages = usage.usages([c.id for c in running]) if running else {}
    samples = {}
    for container in running:
        allocation = settled.ledger.allocations.get(container.name)
        uuids = [d.uuid for d in allocation.devices] if allocation else []
        samples[container.id] = Sample(
            usages.get(container.id),
            tuple(devices.get(uuid) for uuid in uuids),
            *(usage.keep_alive(Path(container.workspace), container.user) if container.workspace else ()),
        )
    return samples
