"""Idle and runtime limits in force: look at every container, warn its user, stop it in the end.

What is decided is in policies.py. Warnings are given before they are remembered, and remembered before anybody is
stopped: a process that dies in between warns again, and nobody is stopped who was not told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import accounts, engine, nvml, policies, telling, usage
from .allocations import Allocations, Settled
from .container_steps import Wish
from .containers import Containers
from .drift import Action
from .engine import Container
from .observation import Observation
from .policies import DeviceUse, Review, Sample, Watched
from .policy_state import PolicyStore

Uses = Mapping[str, DeviceUse]
"""How each device, by UUID, is used now."""


def uses(driver: nvml.Nvml, seen: Observation) -> Uses:
    """Those of the devices, where a container runs whose use matters. Raises Ds01Error `driver_unavailable`."""
    return driver.uses(seen.inventory) if any(c.status in engine.RUNNING for c in _watched(seen)) else {}


def foresee(ds01: Allocations, settled: Settled, devices: Uses) -> list[Action]:
    """The warnings and stops that are due. Writes nothing, and so brings nobody nearer to one."""
    return list(_review(ds01, settled, devices, PolicyStore(ds01.paths.policy_state)).actions)


@dataclass(frozen=True)
class Round:
    """One look at all containers, under reconcile's lock."""

    review: Review
    store: PolicyStore

    @property
    def stops(self) -> list[Action]:
        """Those whose time is over."""
        return [action for action in self.review.actions if action.kind == "policy.stopped"]

    @property
    def warnings(self) -> list[Action]:
        return [action for action in self.review.actions if action.kind != "policy.stopped"]

    def remember(self) -> None:
        """To be called between warnings and stops. Raises Ds01Error: then nobody is to be stopped."""
        self.store.write(self.review.states)

    def remember_ends(self, ids: Collection[str]) -> None:
        """Remember that these containers' runs are over, as the next look would see. Raises Ds01Error."""
        states = self.review.states
        self.store.write({id_: replace(state, run=None) if id_ in ids else state for id_, state in states.items()})


def look(ds01: Allocations, settled: Settled, devices: Uses) -> Round:
    """Look and decide."""
    store = PolicyStore(ds01.paths.policy_state)
    return Round(_review(ds01, settled, devices, store), store)


def carry_out(ds01: Allocations, action: Action) -> bool:
    """One warning or stop, with its event; False where another container has that name by now. Raises Ds01Error where
    it could not be stopped."""
    if action.kind == "policy.stopped":
        there = ds01.engine.container(action.subject)
        if there is None or there.id != action.details["container_id"]:
            return False
        wish = Wish("stopped", action.container, stop_timeout=int(action.details["stop_timeout"]))
        (report,) = Containers(ds01).apply([wish])
        if report.error:
            raise report.error
    telling.tell(action.user, action.message)
    ds01.events.record(action, ds01.clock())
    return True


def leave_notices(settled: Settled, wanted: Mapping[str, str], told: Mapping[str, str]) -> dict[str, str]:
    """Bring the notices in the workspaces up to date; those that stand then, by container. `told` stood before."""
    workspaces = {c.name: c for c in settled.seen.containers if c.workspace}
    stand = {name: text for name, text in told.items() if name in workspaces}
    for name in sorted(wanted.keys() | stand.keys()):
        if wanted.get(name) != stand.get(name) and name in workspaces:
            _leave_notice(workspaces[name], wanted.get(name, ""))
    return {name: text for name, text in wanted.items() if name in workspaces}


def _leave_notice(container: Container, text: str) -> None:
    account = accounts.lookup(container.user)
    if account:
        telling.leave_notice(account, Path(container.workspace, policies.notice_file(container.name)), text)


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
            usage.keep_alive(Path(container.workspace)) if container.workspace else None,
        )
    return samples
