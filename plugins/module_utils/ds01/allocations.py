"""The allocation verbs: apply (allocate, hold, activate, release), validate, rebuild.

Decisions are pure (transitions, lifecycle); this file looks at the host once, decides under the
ledger's lock, and carries out: ledger, CDI spec, event. A whole batch is one lock, one NVML session
and one list of the engine.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from . import (
    accounts,
    batch,
    claims,
    config,
    engine,
    events,
    files,
    ledger,
    lifecycle,
    limits,
    names,
    nvml,
    placement,
    processes,
    queueing,
    rebuild,
    records,
)
from .batch import Plan
from .cdi import Cdi, Rewrite
from .errors import Ds01Error, invalid_input
from .ledger import Transaction
from .model import Allocation, Inventory, Ledger, Refusal
from .observation import Observation, Observer
from .paths import Paths
from .saved_layout import SavedLayoutStore
from .transitions import Change, Outcome, after, bound, decide, device_problem, hold_end, refused, resolved

if TYPE_CHECKING:
    from .mig import GpuState
    from .rebuild import Claim, Rebuilt

_ATTEMPTS = 3


class _OutdatedError(Ds01Error):
    """What a decision was based on is not so any more; nothing was changed."""

    def __init__(self, what: str) -> None:
        super().__init__("container_busy", f"While this was decided {what}.", "Try again; nothing was changed.")


@dataclass(frozen=True)
class _Scope:
    """What a run looks at, and what it puts right: whether the engine and the driver are asked, whether
    what is over anyway is noticed, and whether every container's CDI device is compared with the ledger."""

    engine: bool
    driver: bool
    due: bool
    mend: bool = False


@dataclass(frozen=True)
class Settled:
    """What a look at everything found: what became of allocations, and whose CDI device was not what the
    ledger says; the ledger and the host afterwards."""

    outcomes: Sequence[Outcome]
    mended: Sequence[str]
    ledger: Ledger
    seen: Observation


@dataclass(frozen=True)
class _Sources:
    """An open session with the driver, and NVIDIA's CDI spec; None where no device is asked for."""

    driver: nvml.Nvml | None
    spec: Mapping[str, Any] | None


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
        self.saved_layout = SavedLayoutStore(paths.saved_layout)
        self._observer = Observer(
            lambda: self.engine,
            paths.metadata,
            self.cdi.projected,
            lambda inventory: self.saved_layout.doubtful((gpu.uuid for gpu in inventory.gpus), processes.boot_id()),
        )

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
        plan, _ = self._persistently(changes, _scope_of(changes))
        problem = self.events.problem
        return [replace(o, warnings=(*o.warnings, problem)) for o in plan.outcomes] if problem else plan.outcomes

    def settle(self, driver: nvml.Nvml) -> Settled:
        """Notice what is over or was seen to have changed, and put right every CDI device that is not what the
        ledger says. Raises Ds01Error where the driver, the engine or the ledger does not answer."""
        plan, seen = self._persistently((), _everything(), driver)
        return Settled(plan.due, plan.mended, plan.ledger, seen)

    def foresee_settle(self, driver: nvml.Nvml) -> Settled:
        """What `settle` would do now. Writes nothing and takes no lock."""
        with contextlib.ExitStack() as stack:
            scope = _everything()
            sources, now = self._open(scope, stack, driver), self.store.read()
            seen = self._observe((), scope, now, sources)
            plan = self._plan((), scope, now, seen, sources)
        return Settled(plan.due, plan.mended, plan.ledger, seen)

    def _persistently(
        self, changes: Sequence[Change], scope: _Scope, driver: nvml.Nvml | None = None
    ) -> tuple[Plan, Observation]:
        """Decide and write, anew where the world moved on meanwhile; then the events."""
        for left in reversed(range(_ATTEMPTS)):
            try:
                plan, seen = self._decide_and_write(changes, scope, driver)
                break
            except _OutdatedError:
                if not left:
                    raise
        self._record_events((*plan.due, *plan.outcomes), plan.now)
        return plan, seen

    def _decide_and_write(
        self, changes: Sequence[Change], scope: _Scope, driver: nvml.Nvml | None
    ) -> tuple[Plan, Observation]:
        """One attempt. Raises _OutdatedError, with nothing changed, when the world moved on meanwhile."""
        if not engine.disabled() and self.store.lost():
            self.rebuild()
        with contextlib.ExitStack() as stack:
            sources = self._open(scope, stack, driver)
            first = self.store.read()
            seen = self._observe(changes, scope, first, sources)
            transaction = stack.enter_context(self.store.transaction())
            if transaction.ledger.generation < first.generation:
                raise _OutdatedError("the ledger was removed")  # what is empty now is no ledger
            if transaction.ledger != first:
                seen = self._observe(changes, scope, transaction.ledger, sources)  # what was seen may be older
                if sources.driver:
                    sources = replace(sources, spec=self.cdi.nvidia_spec())
            plan = self._plan(changes, scope, transaction.ledger, seen, sources)
            if self._cuts_on_demand and any(o.reason == "driver_unavailable" for o in plan.outcomes):
                sources = self._mended(transaction, sources)
                plan = self._plan(changes, scope, transaction.ledger, seen, sources)
            if sources.driver and _cut_since(plan, seen, sources.driver):
                raise _OutdatedError("GPUs were cut")
            self._write(transaction, plan, seen)
            if plan.cuts:
                plan = self._with_cuts(changes, transaction, plan, seen, sources)
        return plan, seen

    def _write(self, transaction: Transaction, plan: Plan, seen: Observation) -> None:
        """The plan's ledger, and the CDI devices that follow from it. Raises as `carry_out` does."""
        moved = batch.moved(transaction.ledger, plan.ledger)
        stopped = set(moved) - seen.running
        moved += (c for c in plan.mended if c not in moved)
        project = (a for a in batch.to_project(plan, transaction.ledger) if batch.all_there(a, seen.inventory))
        self.carry_out(transaction, plan.ledger, plan.now, moved, project, plan.spec, stopped)

    @property
    def _cuts_on_demand(self) -> bool:
        return self.config.gpu.mig_strategy == "dynamic"

    def _mended(self, transaction: Transaction, sources: _Sources) -> _Sources:
        """The sources once NVIDIA's CDI spec is that of the devices: a request that was killed after it had a
        GPU cut leaves another, and nobody else writes it."""
        from . import relayout  # a host whose GPUs stay as they are does without

        if sources.driver:
            with contextlib.suppress(Ds01Error):  # then the refusal stands
                relayout.mend(self, sources.driver, transaction)
        return replace(sources, spec=self.cdi.nvidia_spec())

    def _with_cuts(
        self,
        changes: Sequence[Change],
        transaction: Transaction,
        plan: Plan,
        seen: Observation,
        sources: _Sources,
        spoilt: frozenset[int] = frozenset(),
    ) -> Plan:
        """The plan once GPUs are cut for it, under the same lock. Where a GPU cannot be cut others are tried,
        but `spoilt`; where none is left, those for whom it was are refused for the reason it could not be.
        What the others were given stays."""
        try:
            return self._cut(transaction, plan, seen, sources)
        except Ds01Error as exc:
            failure = exc
        numbers = [number for number, outcome in enumerate(plan.outcomes) if outcome.is_uncut]
        rest, spoilt = [changes[number] for number in numbers], spoilt.union(batch.spoilt(failure, plan))
        try:
            sources = replace(sources, spec=self.cdi.nvidia_spec())
            scope = _scope_of(rest)
            seen = self._observe(rest, scope, transaction.ledger, sources)
            again = batch.refused_for(self._plan(rest, scope, transaction.ledger, seen, sources, spoilt), failure)
            self._write(transaction, again, seen)
            if again.cuts:
                again = self._with_cuts(rest, transaction, again, seen, sources, spoilt)
        except Ds01Error as exc:
            again = replace(plan, outcomes=[batch.not_cut(plan.outcomes[number], exc) for number in numbers], due=())
        outcomes = list(plan.outcomes)
        for number, outcome in zip(numbers, again.outcomes, strict=True):
            outcomes[number] = outcome
        return replace(again, outcomes=outcomes, due=[*plan.due, *again.due])

    def _cut(self, transaction: Transaction, plan: Plan, seen: Observation, sources: _Sources) -> Plan:
        """The plan once it is carried out, all of it. Raises Ds01Error."""
        from . import relayout  # a host whose GPUs stay as they are does without

        assert sources.driver is not None  # noqa: S101 - only GPUs that it showed are in a plan
        inventory = relayout.cut_on_demand(self, sources.driver, transaction, seen, plan.cuts)
        seen = replace(seen, inventory=inventory)
        done = self._bound(plan, transaction.ledger, seen)
        self._write(transaction, done, seen)
        return done

    def _bound(self, plan: Plan, now: Ledger, seen: Observation) -> Plan:
        """The plan with the devices that were cut for it. Raises Ds01Error where one is not there."""
        spec = self.cdi.nvidia_spec()
        outcomes = []
        for planned in plan.outcomes:
            outcome = bound(planned, seen.inventory)
            if outcome.is_uncut:
                message = f"What was cut for {outcome.name.full} is not there any more."
                raise Ds01Error(
                    "layout_impossible", message, "Somebody else cuts this GPU at the same time. Try again."
                )
            if planned.is_uncut:
                outcome = self._projectable(outcome, spec)
                now = after(now, outcome)
            outcomes.append(outcome)
        final = replace(now, boot_id=processes.boot_id(), engine_id=seen.engine_id or now.engine_id)
        return replace(plan, outcomes=outcomes, ledger=final, spec=spec, rebooted=False, cuts={})

    def carry_out(
        self,
        transaction: Transaction,
        final: Ledger,
        now: datetime,
        withdraw: Iterable[str],
        project: Iterable[Allocation] = (),
        spec: Mapping[str, Any] | None = None,
        stopped: Collection[str] = (),
    ) -> None:
        """Ledger and CDI files, both or none; killed at any point, no file says more than the ledger.

        `stopped` are containers that lose devices because they were seen not to run: raises
        _OutdatedError when one was started past DS01 in between.
        """
        rewrite = self.cdi.rewrite()
        try:
            self.cdi.clear()
            self._prepare(rewrite, project, spec)
            for container in withdraw:
                # Killed before the new one is in place, it cannot start, rather than on what it had.
                rewrite.withdraw(container)
            if stopped and not engine.disabled():
                self._check_still_stopped(stopped)
            transaction.commit(final, now)
        except (OSError, Ds01Error) as exc:
            with contextlib.suppress(OSError):
                rewrite.undo()
            raise self._unwritable(exc, "nothing was changed") from None
        try:
            rewrite.finish()
        except OSError as exc:
            raise self._unwritable(exc, "the ledger has it: ask again once that is mended") from None

    def _prepare(self, rewrite: Rewrite, allocations: Iterable[Allocation], spec: Mapping[str, Any] | None) -> None:
        """Their devices, as far as NVIDIA's spec has them. Raises OSError."""
        for allocation in allocations:
            uuids = batch.uuids(allocation)
            if spec is not None and self.cdi.problem(uuids, spec) is None:
                rewrite.project(allocation.container, uuids, spec)

    def _check_still_stopped(self, containers: Collection[str]) -> None:
        """Their devices are out of reach now: whoever does not run yet cannot start with them any more."""
        started = [c.name for c in self.engine.containers() if c.name in containers and c.status in engine.RUNNING]
        if started:
            raise _OutdatedError(f"{', '.join(started)} was started past DS01")

    def _unwritable(self, exc: Exception, outcome: str) -> Exception:
        if not isinstance(exc, OSError):
            return exc
        return Ds01Error(
            "permission_denied",
            f"The CDI directory {self.paths.cdi} cannot be written: {exc.strerror}.",
            f"{files.remedy(exc)} Or name another directory with DS01_CDI_DIR; {outcome}.",
        )

    def leave(self, containers: Collection[str]) -> None:
        """Take these containers' requests out of the queue."""
        with self.store.transaction() as transaction:
            now = transaction.ledger
            queue = tuple(w for w in now.queue if w.request.container not in containers)
            transaction.commit(replace(now, queue=queue), self.clock())

    def rebuild(self) -> Rebuilt:
        """Restore what the ledger lost, from the containers' own records; a damaged file is kept aside."""
        with nvml.session() as driver, self.store.locked():
            time = self.clock()
            lost, kept = self.store.lost(), self.store.set_aside(time)
            before = self.store.read()
            inventory = driver.inventory()
            rebuilt = self._rebuilt(before, inventory, lost)
            after_ = replace(before, allocations=rebuilt.allocations)
            if before.boot_id not in ("", processes.boot_id()):
                after_ = replace(after_, queue=())  # its processes are of the earlier boot
            if rebuilt.allocations:
                after_ = replace(after_, boot_id=processes.boot_id(), engine_id=self.engine.identity())
            self.reproject(Transaction(self.store, before), after_, time, inventory)
        if rebuilt.restored or kept or (lost and rebuilt.problems):  # a new server has no ledger either, and lost none
            self.events.write(
                "ledger.rebuilt",
                time,
                reason="ledger_damaged" if kept else "",
                message=f"Restored {len(rebuilt.restored)}: {', '.join(rebuilt.restored) or 'none'}.",
                problems=list(rebuilt.problems),
                kept=str(kept or ""),
            )
        return rebuilt

    def reproject(self, transaction: Transaction, final: Ledger, now: datetime, inventory: Inventory) -> None:
        """Write the ledger, and every container's CDI device as it says: none where a device is missing."""
        there = [a for a in final.allocations.values() if batch.all_there(a, inventory)]
        self.carry_out(
            transaction, final, now, self._wrongly_projected(final.allocations), there, self.cdi.nvidia_spec()
        )

    def misprojected(self, now: Ledger, inventory: Inventory, spec: Mapping[str, Any] | None) -> list[str]:
        """The containers whose CDI device is not what this ledger and NVIDIA's spec make of it, names a device that
        is gone, or is missing though NVIDIA's spec has all that it needs."""
        should = {
            a.container: batch.uuids(a)
            for a in now.allocations.values()
            if batch.all_there(a, inventory) and self.cdi.problem(batch.uuids(a), spec) is None
        }
        wrong = {c for c, uuids in should.items() if spec is None or not self.cdi.says(c, uuids, spec)}
        return sorted(wrong | (set(self.cdi.containers()) - should.keys()))

    def look_at_driver(self, driver: nvml.Nvml) -> Observation:
        """The devices and their processes, without asking the engine."""
        return self._observer.without_engine(driver)

    def _wrongly_projected(self, allocations: Mapping[str, Allocation]) -> list[str]:
        """Containers whose CDI device says something else: what it names may be somebody else's next."""
        had = {container: self.cdi.projected(container) for container in self.cdi.containers()}
        has = {a.container: batch.uuids(a) for a in allocations.values()}
        return [container for container in had if had[container] != has.get(container)]

    def foresee_rebuild(self) -> Rebuilt:
        """What `rebuild` would restore now. Writes nothing."""
        lost = self.store.lost()
        with nvml.session() as driver:
            return self._rebuilt(Ledger() if lost else self.store.read(), driver.inventory(), lost)

    def _rebuilt(self, before: Ledger, inventory: Inventory, lost: bool) -> Rebuilt:
        """What is known, and what containers claim. A ledger that is whole says who gave a device back:
        then only a container that runs can still have one."""
        claimed = [claim for claim in self._claims() if lost or claim.runs]
        return rebuild.rebuild(claimed, inventory, resolved(before, inventory).allocations)

    def _claims(self) -> list[Claim]:
        def priority(user: str) -> int:
            return limits.resolve(self.config, user).priority

        return claims.read(self.engine, self.paths.metadata, self.cdi.projected, priority, self.clock())

    def preview(self, changes: Sequence[Change]) -> Sequence[Outcome]:
        """What `apply` would do now. Writes nothing and takes no lock."""
        with contextlib.ExitStack() as stack:
            scope = _scope_of(changes)
            sources, now = self._open(scope, stack), self.store.read()
            return self._plan(changes, scope, now, self._observe(changes, scope, now, sources), sources).outcomes

    def validate(self, name: names.ContainerName, gpu: str | None = None) -> Outcome:
        """Whether the container's devices still exist, are healthy, and are the ones projected."""
        allocation = self.allocation(name.full)
        if allocation is None:
            return refused(name, Refusal("not_allocated", f"Nothing is allocated to {name.full}.", "See: ds01 status"))
        wanted = gpu.replace(".", ":") if gpu and not gpu.startswith(("GPU-", "MIG-")) else gpu
        if wanted and wanted not in (allocation.gpu_id, *batch.uuids(allocation)):
            message = f"{name.full} has {allocation.gpu_id}, not {wanted}."
            return refused(name, Refusal("not_allocated", message), allocation)
        with nvml.session() as driver:
            problem = device_problem(allocation, driver.inventory())
        if problem:
            hint = "Start it again with playbooks/container_start.yml: it gets another device."
            return refused(name, Refusal("gpu_unhealthy", f"{name.full}: {problem}.", hint), allocation)
        projected = self.cdi.projected(name.full)
        if projected is None and engine.disabled():
            message = f"{name.full} has {allocation.gpu_id}: present and healthy; there is no engine to project it for."
            return Outcome(name, "granted", message, allocation=allocation, before=allocation)
        if projected != batch.uuids(allocation):
            message = f"{name.full} has {allocation.gpu_id}, but no CDI device says so: it would not start."
            hint = f"Mend it with: ds01 allocate --user {name.user} --container {name.project}"
            return refused(name, Refusal("not_allocated", message, hint), allocation)
        message = f"{name.full} has {allocation.gpu_id}: present, healthy and projected."
        return Outcome(name, "granted", message, allocation=allocation, before=allocation)

    def situation(self, now: Ledger, seen: Observation, time: datetime) -> placement.Situation:
        """What decisions depend on, with this ledger and what was seen of the host."""
        this_boot = now.boot_id in ("", processes.boot_id())
        return placement.Situation(
            ledger=now,
            inventory=seen.inventory,
            policy=self.config.gpu,
            now=time,
            reservations=self.config.reservations,
            running=seen.running,
            hold_end=lambda allocation: hold_end(allocation, self.config),
            occupied=seen.occupied,
            queue=queueing.alive(now.queue, time, processes.lives) if this_boot else (),
            reclaim=self.config.policies.reclaim_holds == "lower_priority",
        )

    def look(self, now: Ledger, driver: nvml.Nvml | None, stopping: Collection[str] = ()) -> Observation:
        """The host as it is now: the engine, where there is one, and the driver's devices."""
        if engine.disabled():
            return self._observer.without_engine(driver)
        ends, time = lifecycle.ends(now, self.config), self.clock()
        over = {container for container, end in ends.items() if end <= time}  # if it did not run once more since
        harmless = self.config.policies.monitoring_containers
        return self._observer.look(now, driver, stopping={*stopping, *over}, harmless=harmless)

    def _open(self, scope: _Scope, stack: contextlib.ExitStack, driver: nvml.Nvml | None = None) -> _Sources:
        """What is slow and does not depend on the ledger, done before its lock is taken: imports, the
        limits file, the engine's connection, the driver's session where none is open yet, NVIDIA's CDI spec."""
        _ = self.config
        if scope.engine:
            _ = self.engine
        if not scope.driver:
            return _Sources(None, None)
        return _Sources(driver or stack.enter_context(nvml.session()), self.cdi.nvidia_spec())

    def _observe(self, changes: Sequence[Change], scope: _Scope, now: Ledger, sources: _Sources) -> Observation:
        if not scope.engine:
            return self._observer.without_engine(sources.driver)
        return self.look(now, sources.driver, {change.name.full for change in changes if change.state == "held"})

    def _plan(
        self,
        changes: Sequence[Change],
        scope: _Scope,
        before: Ledger,
        seen: Observation,
        sources: _Sources,
        spoilt: frozenset[int] = frozenset(),
    ) -> Plan:
        """The decisions; where the limits file says so, with GPUs, but `spoilt`, cut for requests that nothing
        else serves."""
        plan = self._decided(changes, scope, before, seen, sources)
        if not (self._cuts_on_demand and sources.driver and batch.may_need_cuts(plan, before)):
            return plan
        from . import on_demand  # a host whose GPUs stay as they are does without

        gpus = (gpu for gpu in sources.driver.layout(seen.inventory) if gpu.index not in spoilt)
        open_ = [gpu for gpu in gpus if on_demand.is_open(gpu)]
        return self._decided(changes, scope, before, seen, sources, open_)

    def _decided(
        self,
        changes: Sequence[Change],
        scope: _Scope,
        before: Ledger,
        seen: Observation,
        sources: _Sources,
        cuttable: Sequence[GpuState] = (),
    ) -> Plan:
        """Fold the decisions over the ledger, each device of it named as it is called now."""
        time, boot = self.clock(), processes.boot_id()
        now = resolved(before, seen.inventory)
        due = self._due(now, changes, seen, time) if scope.due else []
        for outcome in due:
            now = after(now, outcome)
        situation = self.situation(now, seen, time)
        # Those who are gone leave the ledger too: whoever waits again for the same container stands anew.
        waiting = situation.queue
        situation = replace(situation, ledger=replace(now, queue=waiting), cuttable=cuttable)
        outcomes = []
        for change in changes:
            others = other_containers(change.name, seen.containers, situation.ledger)
            outcome = decide(seen.completed(change), self.config, replace(situation, containers=others))
            outcome = self._projectable(outcome, sources.spec)
            situation = batch.followed(situation, outcome)
            outcomes.append(outcome)
        final = batch.without_uncut(situation.ledger, waiting, outcomes)
        # Only what was looked up in this boot may be projected in it.
        rebooted = bool(sources.driver and before.allocations) and before.boot_id != boot
        same = (final.allocations, final.queue) == (before.allocations, waiting)
        if same and not rebooted and not any(o.ticket for o in outcomes):
            final = before  # that somebody else is gone is no reason to write
        if rebooted or (sources.driver and batch.differs(final, before)):
            final = replace(final, boot_id=boot)
        if batch.differs(final, before):
            final = replace(final, engine_id=seen.engine_id or before.engine_id)
        cuts = {index: layout for outcome in outcomes for index, layout in outcome.cuts.items()}
        moved = batch.moved(before, final)
        mended = self.misprojected(final, seen.inventory, sources.spec) if scope.mend else []
        mended = [container for container in mended if container not in moved]
        return Plan(outcomes, due, final, sources.spec, time, rebooted, cuts, mended)

    def overdue(self, now: Ledger, seen: Observation) -> list[Outcome]:
        """What is over or was seen to have changed, and whoever asks for a device finds before anything else."""
        return self._due(resolved(now, seen.inventory), (), seen, self.clock())

    def give_back(self, transaction: Transaction, over: Sequence[Outcome], running: Collection[str]) -> None:
        """Write that these allocations are over, with the events. Raises as `carry_out` does."""
        final, now = functools.reduce(after, over, transaction.ledger), self.clock()
        moved = batch.moved(transaction.ledger, final)
        self.carry_out(transaction, final, now, moved, stopped=set(moved).difference(running))
        self._record_events(over, now)

    def _due(self, now: Ledger, changes: Sequence[Change], seen: Observation, time: datetime) -> list[Outcome]:
        """What is over or was seen to have changed; whoever asks again keeps his."""
        asking = {change.name.full for change in changes}
        return list(lifecycle.due(now, self.config, seen.seen, time, asking))

    def _projectable(self, outcome: Outcome, spec: Mapping[str, Any] | None) -> Outcome:
        """A grant that NVIDIA's CDI spec cannot carry would never start: refuse it instead."""
        if not batch.granting(outcome) or outcome.allocation is None or outcome.is_uncut:
            return outcome
        if spec is None and engine.disabled():
            return replace(outcome, warnings=("No NVIDIA CDI spec on this host: no CDI device was written.",))
        problem = self.cdi.problem(batch.uuids(outcome.allocation), spec)
        if problem is None:
            return outcome
        hint = "Write it anew with: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        refusal = refused(outcome.name, Refusal("driver_unavailable", problem, hint), outcome.before)
        return replace(refusal, ticket=outcome.ticket)

    def _record_events(self, outcomes: Iterable[Outcome], now: datetime) -> None:
        for outcome in outcomes:
            for event, allocation, reason, message in batch.events(outcome):
                self.events.write(
                    event,
                    now,
                    user=allocation.user if allocation else outcome.name.user,
                    container=allocation.container if allocation else outcome.name.full,
                    devices=[records.device_record(d) for d in allocation.devices] if allocation else None,
                    reason=reason,
                    message=message,
                )


def _allocating(changes: Sequence[Change]) -> bool:
    return any(change.state == "allocated" for change in changes)


def _scope_of(changes: Sequence[Change]) -> _Scope:
    """What a batch of requests has to look at."""
    return _Scope(_needs_engine(changes), _needs_driver(changes), _allocating(changes))


def _everything() -> _Scope:
    return _Scope(engine=not engine.disabled(), driver=True, due=True, mend=True)


def _needs_engine(changes: Sequence[Change]) -> bool:
    """Whether it matters which containers exist and run: to all but a container that just started."""
    return not engine.disabled() and any(change.state != "active" for change in changes)


def _cut_since(plan: Plan, seen: Observation, driver: nvml.Nvml) -> bool:
    """Whether GPUs were cut since they were looked at: of devices that nobody had no ledger tells."""
    if plan.cuts:
        return [d.uuid for d in driver.inventory().devices] != [d.uuid for d in seen.inventory.devices]
    return not driver.has(batch.granted(plan))


def _needs_driver(changes: Sequence[Change]) -> bool:
    return any(change.state == "allocated" and change.gpus for change in changes)


def other_containers(name: names.ContainerName, containers: Sequence[engine.Container], now: Ledger) -> int:
    """The user's containers besides this one: those the engine has, and those granted but not made yet."""
    existing = {c.called for c in containers if c.user == name.user}
    promised = {a.container for a in now.of_user(name.user)}
    return len((existing | promised) - {name.full})
