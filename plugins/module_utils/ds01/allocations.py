"""The allocation verbs: apply (allocate, hold, activate, release), validate, status.

Decisions are pure (placement, transitions); this file reads the world once, decides under the
ledger's lock, and carries out: ledger, CDI spec, event. A whole batch is one lock, one NVML session
and one list of the engine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import accounts, config, engine, events, ledger, limits, names, nvml, placement, rebuild, records, units
from .cdi import Cdi
from .errors import Ds01Error, invalid_input
from .ledger import Transaction
from .model import Allocation, Device, Gpu, Inventory, Ledger, Refusal
from .paths import Paths
from .transitions import Change, Outcome, after, decide, describe, device_problem, expired, hold_ends, refused, resolved

_EVENTS = {"granted": "gpu.allocated", "held": "gpu.held", "released": "gpu.released", "expired": "gpu.released"}
_NO_GPUS = Inventory((), ())


@dataclass(frozen=True)
class _Sources:
    """An open session with the driver, and NVIDIA's CDI spec; None where no device is asked for."""

    driver: nvml.Nvml | None
    spec: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Plan:
    """A batch decided: what becomes of each change, of grants nobody came for, and the ledger after it."""

    outcomes: Sequence[Outcome]
    expired: Sequence[Outcome]
    ledger: Ledger
    spec: Mapping[str, Any] | None
    now: datetime


class Allocations:
    """The verbs on one host. `clock` gives aware times; everything else follows from `paths`."""

    def __init__(
        self,
        paths: Paths,
        actor: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self.paths = paths
        self.clock = clock
        self.store = ledger.LedgerStore(paths.ledger)
        self.cdi = Cdi(paths.cdi, paths.nvidia_cdi)
        self.events = events.EventLog(paths.events, actor or events.actor_from_env())
        self._config: limits.Config | None = None
        self._engine: engine.Engine | None = None

    @property
    def config(self) -> limits.Config:
        """The limits file, read once a run."""
        if self._config is None:
            self._config = config.load(self.paths.config)
        return self._config

    @property
    def engine(self) -> engine.Engine:
        """The Docker engine, connected when first needed."""
        if self._engine is None:
            self._engine = engine.connect()
        return self._engine

    def limits(self, user: str) -> limits.Limits:
        """One user's resolved limits."""
        return limits.resolve(self.config, names.canonical_user(user, accounts.lookup))

    def name(self, container: str, user: str | None = None) -> names.ContainerName:
        """The container that somebody means: a full name, a project with its user, or a project
        name that only one allocation has (one that none has names nobody's container)."""
        if user is not None:
            return names.container_name(container, user, accounts.lookup)
        if names.SEPARATOR in container:
            project, owner = names.split(container)
            return names.container_name(project, owner, accounts.lookup)
        names.check_project(container)
        known = self.store.read().allocations
        matches = sorted(full for full in known if names.split(full)[0] == container)
        if len(matches) > 1:
            raise invalid_input(f"{container} is ambiguous: {', '.join(matches)}.", "Add the user.")
        if not matches:
            return names.ContainerName(container, "", container)
        return names.ContainerName(container, known[matches[0]].user, matches[0])

    def allocation(self, container: str) -> Allocation | None:
        return self.store.read().allocations.get(container)

    def apply(self, changes: Sequence[Change]) -> Sequence[Outcome]:
        """Carry the changes out, in order, under one lock. A refusal does not stop the others.

        A ledger that is gone or damaged is first rebuilt from the containers.
        """
        if not engine.disabled() and self.store.lost():
            self.rebuild()
        with contextlib.ExitStack() as stack:
            sources = self._open(changes, stack)
            transaction = stack.enter_context(self.store.transaction())
            before = transaction.ledger
            plan = self._plan(changes, before, sources)
            moved = _moved(before, plan.ledger)
            specs = {name: self.cdi.content(name) for name in (*moved, *(o.name.full for o in plan.outcomes))}
            for container in moved:
                # Killed before the new one is written, it cannot start, rather than on what it had.
                self.cdi.withdraw(container)
            transaction.commit(plan.ledger, plan.now)
            try:
                asked = [o.name.full for o in plan.outcomes if _to_project(o)]
                final = (plan.ledger.allocations.get(name) for name in dict.fromkeys((*moved, *asked)))
                self._project((a for a in final if a), plan.spec)
            except OSError as exc:
                transaction.commit(before, plan.now)
                for container, content in specs.items():
                    with contextlib.suppress(OSError):
                        self.cdi.restore(container, content)
                raise Ds01Error(
                    "permission_denied",
                    f"The CDI directory {self.paths.cdi} cannot be written: {exc.strerror}.",
                    "Run as root, or name another directory with DS01_CDI_DIR; nothing was allocated.",
                ) from None
        self._record_events(plan)
        problem = self.events.problem
        return [replace(o, warnings=(*o.warnings, problem)) for o in plan.outcomes] if problem else plan.outcomes

    def rebuild(self) -> rebuild.Rebuilt:
        """Restore what the ledger lost, from the containers' own records; a damaged file is kept aside."""
        with nvml.session() as driver, self.store.locked():
            time = self.clock()
            kept = self.store.set_aside(time)
            before = self.store.read()
            rebuilt = rebuild.rebuild(self._claims(), driver.inventory(), before.allocations)
            Transaction(self.store, before).commit(replace(before, allocations=rebuilt.allocations), time)
            self._project(rebuilt.allocations.values(), self.cdi.nvidia_spec())
        restored = sorted(set(rebuilt.allocations) - set(before.allocations))
        if restored or rebuilt.problems or kept:  # a new server has no ledger either, and lost none
            self._record_rebuilt(restored, rebuilt.problems, kept, time)
        return rebuilt

    def _record_rebuilt(
        self, restored: Sequence[str], problems: Sequence[str], kept: Path | None, time: datetime
    ) -> None:
        self.events.write(
            "ledger.rebuilt",
            time,
            reason="ledger_damaged" if kept else "",
            message=f"Restored {len(restored)}: {', '.join(restored) or 'none'}.",
            problems=list(problems),
            kept=str(kept or ""),
        )

    def foresee_rebuild(self) -> rebuild.Rebuilt:
        """What `rebuild` would restore now. Writes nothing."""
        known = {} if self.store.lost() else self.store.read().allocations
        with nvml.session() as driver:
            return rebuild.rebuild(self._claims(), driver.inventory(), known)

    def _claims(self) -> list[rebuild.Claim]:
        """What each GPU container says of itself: its metadata record, else its labels."""
        claims = []
        for container in self.engine.containers():
            if container.gpus and container.user:
                claims.append(self._claim(container))
        return claims

    def _claim(self, listed: engine.Container) -> rebuild.Claim:
        container = self.engine.container(listed.name) or listed
        stopped = container.status in ("exited", "dead")
        created = container.labels.get("ds01.created_at")
        return rebuild.Claim(
            container=container.name,
            container_id=container.id,
            user=container.user,
            devices=self._recorded_devices(container),
            priority=self.limits(container.user).priority,
            created_at=units.parse_time(created) if created else self.clock(),
            stopped_at=(container.finished_at or self.clock()) if stopped else None,
        )

    def _recorded_devices(self, container: engine.Container) -> tuple[Device, ...]:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((self.paths.metadata / f"{container.name}.json").read_bytes())
            if record.get("container_id") == container.id:
                return rebuild.devices_of(record.get("devices"))
        with contextlib.suppress(ValueError):
            return rebuild.devices_of(json.loads(container.labels.get("ds01.devices") or "[]"))
        return ()

    def preview(self, changes: Sequence[Change]) -> Sequence[Outcome]:
        """What `apply` would do now. Writes nothing and takes no lock."""
        with contextlib.ExitStack() as stack:
            return self._plan(changes, self.store.read(), self._open(changes, stack)).outcomes

    def validate(self, name: names.ContainerName, gpu: str | None = None) -> Outcome:
        """Whether the container's devices still exist, are healthy, and are the ones projected."""
        allocation = self.allocation(name.full)
        if allocation is None:
            return refused(name, Refusal("not_allocated", f"Nothing is allocated to {name.full}.", "See: ds01 status"))
        wanted = gpu.replace(".", ":") if gpu and not gpu.startswith(("GPU-", "MIG-")) else gpu
        if wanted and wanted not in (allocation.gpu_id, *(d.uuid for d in allocation.devices)):
            message = f"{name.full} has {allocation.gpu_id}, not {wanted}."
            return refused(name, Refusal("not_allocated", message), allocation)
        with nvml.session() as driver:
            problem = device_problem(allocation, driver.inventory())
        if problem:
            hint = f"Release it, then start the container again: ds01 release --container {name.full}"
            return refused(name, Refusal("gpu_unhealthy", f"{name.full}: {problem}.", hint), allocation)
        projected = self.cdi.projected(name.full)
        if projected is None and engine.disabled():
            message = f"{name.full} has {allocation.gpu_id}: present and healthy; there is no engine to project it for."
            return Outcome(name, "granted", message, allocation=allocation, before=allocation)
        if projected != tuple(d.uuid for d in allocation.devices):
            message = f"{name.full} has {allocation.gpu_id}, but no CDI device says so: it would not start."
            hint = f"Mend it with: ds01 allocate --user {name.user} --container {name.project}"
            return refused(name, Refusal("not_allocated", message, hint), allocation)
        message = f"{name.full} has {allocation.gpu_id}: present, healthy and projected."
        return Outcome(name, "granted", message, allocation=allocation, before=allocation)

    def status(self, user: str | None = None) -> dict[str, Any]:
        """GPUs, devices with who has them, allocations with when their hold ends. Read-only."""
        user = names.canonical_user(user, accounts.lookup) if user else None
        now = self.store.read()
        with nvml.session() as driver:
            inventory = driver.inventory()
        ends = hold_ends(now, self.config)
        shown = sorted((a for a in now.allocations.values() if user in (None, a.user)), key=lambda a: a.container)
        return {
            "generation": now.generation,
            "user": user,
            "driver_version": inventory.driver_version,
            "gpus": [_gpu_row(gpu) for gpu in inventory.gpus],
            "devices": [_device_row(device, now) for device in inventory.devices],
            "allocations": [
                {
                    **describe(a),
                    "hold_ends": units.format_time(ends[a.container]) if a.container in ends else None,
                }
                for a in shown
            ],
        }

    def _open(self, changes: Sequence[Change], stack: contextlib.ExitStack) -> _Sources:
        """What is slow and does not depend on the ledger, done before its lock is taken: imports, the
        limits file, the engine's connection, the driver's session, NVIDIA's CDI spec."""
        _ = self.config
        if _needs_engine(changes):
            _ = self.engine
        if not _needs_driver(changes):
            return _Sources(None, None)
        return _Sources(stack.enter_context(nvml.session()), self.cdi.nvidia_spec())

    def _plan(self, changes: Sequence[Change], now: Ledger, sources: _Sources) -> _Plan:
        """Read what the batch needs, once, and fold the decisions over the ledger."""
        containers = self.engine.containers() if _needs_engine(changes) else ()
        running = {c.name for c in containers if c.status in engine.RUNNING}
        time = self.clock()
        inventory = sources.driver.inventory() if sources.driver else _NO_GPUS
        now = resolved(now, inventory)
        gone = self._expired(now, changes, containers, running, time) if _allocating(changes) else []
        for outcome in gone:
            now = after(now, outcome)
        situation = placement.Situation(
            ledger=now,
            inventory=inventory,
            policy=self.config.gpu,
            now=time,
            reservations=self.config.reservations,
            running=running,
            hold_ends=hold_ends(now, self.config),
        )
        outcomes = []
        for change in changes:
            others = other_containers(change.name, containers, situation.ledger)
            outcome = decide(change, self.config, replace(situation, containers=others))
            outcome = self._projectable(outcome, sources.spec)
            situation = replace(situation, ledger=after(situation.ledger, outcome))
            outcomes.append(outcome)
        return _Plan(outcomes, gone, situation.ledger, sources.spec, situation.now)

    def _expired(
        self,
        now: Ledger,
        changes: Sequence[Change],
        containers: Sequence[engine.Container],
        running: Collection[str],
        time: datetime,
    ) -> list[Outcome]:
        """What is over, taken back: nobody came for it, or its hold ended. Whoever asks again keeps his."""
        asking = {change.name.full for change in changes}
        over = expired(time, now, self.config, {c.name for c in containers} | asking, running)
        outcomes = []
        for container, why in over.items():
            if container not in asking:
                before = now.allocations[container]
                name = names.ContainerName(names.split(container)[0], before.user, container)
                outcomes.append(Outcome(name, "expired", f"{before.gpu_id} is free again: {why}.", before=before))
        return outcomes

    def _projectable(self, outcome: Outcome, spec: Mapping[str, Any] | None) -> Outcome:
        """A grant that NVIDIA's CDI spec cannot carry would never start: refuse it instead."""
        if not _to_project(outcome) or outcome.allocation is None:
            return outcome
        if spec is None and engine.disabled():
            return replace(outcome, warnings=("No NVIDIA CDI spec on this host: no CDI device was written.",))
        problem = self.cdi.problem([d.uuid for d in outcome.allocation.devices], spec)
        if problem is None:
            return outcome
        hint = "Write it anew with: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        return refused(outcome.name, Refusal("driver_unavailable", problem, hint), outcome.before)

    def _project(self, allocations: Iterable[Allocation], spec: Mapping[str, Any] | None) -> None:
        """Write their devices, as far as NVIDIA's spec has them. Raises OSError."""
        for allocation in allocations:
            uuids = [d.uuid for d in allocation.devices]
            if spec is not None and self.cdi.problem(uuids, spec) is None:
                self.cdi.project(allocation.container, uuids, spec)

    def _record_events(self, plan: _Plan) -> None:
        for outcome in (*plan.expired, *plan.outcomes):
            event = _EVENTS.get(outcome.reason) if outcome.changed else None
            if event == "gpu.allocated" and outcome.before:
                event = "gpu.rebound"
            if not outcome.ok:
                event = "gpu.refused"
            if event is None:
                continue
            shown = outcome.allocation or outcome.before
            self.events.write(
                event,
                plan.now,
                user=outcome.name.user,
                container=outcome.name.full,
                devices=[records.device_record(d) for d in shown.devices] if shown else None,
                reason=outcome.reason,
                message=outcome.message,
            )


def _moved(before: Ledger, after_: Ledger) -> list[str]:
    """Containers whose devices are others than before, or none any more."""
    had = {name: a.devices for name, a in before.allocations.items()}
    has = {name: a.devices for name, a in after_.allocations.items()}
    return sorted(name for name in had if has.get(name) != had[name])


def _allocating(changes: Sequence[Change]) -> bool:
    return any(change.state == "allocated" for change in changes)


def _needs_engine(changes: Sequence[Change]) -> bool:
    """Whether it matters which containers exist and run: to all but a container that just started."""
    return not engine.disabled() and any(change.state != "active" for change in changes)


def _to_project(outcome: Outcome) -> bool:
    """Grants, and those asked for again: that mends a CDI file that somebody removed."""
    return outcome.ok and outcome.reason in ("granted", "already_allocated")


def _needs_driver(changes: Sequence[Change]) -> bool:
    return any(change.state == "allocated" and change.gpus for change in changes)


def other_containers(name: names.ContainerName, containers: Sequence[engine.Container], now: Ledger) -> int:
    """The user's containers besides this one: those the engine has, and those granted but not made yet."""
    existing = {c.name for c in containers if c.user == name.user}
    promised = {a.container for a in now.of_user(name.user)}
    return len((existing | promised) - {name.full})


def _gpu_row(gpu: Gpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "mig": gpu.mig,
        "memory_mib": gpu.memory_mib,
        "health": gpu.health,
        "health_reason": gpu.health_reason,
        "utilization": gpu.utilization,
    }


def _device_row(device: Device, now: Ledger) -> dict[str, Any]:
    holder = now.holder_of(device)
    return {
        **records.device_record(device),
        "memory_mib": device.memory_mib,
        "health": device.health,
        "container": holder.container if holder else None,
        "user": holder.user if holder else None,
        "status": holder.status if holder else "free",
    }
