"""The verbs that cut GPUs: foresee, apply, restore. Whatever depends on a layout is put right with it.

Under the ledger's lock: the layout is changed through NVML; then device nodes are made, NVIDIA's CDI spec
is written anew and checked, the ledger's devices get their present names, the containers' CDI devices
follow, and the layout is saved for the next boot. Until then no new device can be granted, since nobody
else gets the lock, nor started on, since the spec does not hold it. A run that was killed leaves at most
what the next one sees and completes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import engine, geometry, interruption, mig, nvml, partitions, pausing, processes, records, services, toolkit
from .cutter import Cutter, cutting
from .errors import Ds01Error, invalid_input
from .ledger import Transaction
from .mig import GpuState, Holder
from .model import Device, Inventory, Ledger
from .partitions import Cuts, Host, Planned, Wanted
from .pausing import Unstarted
from .saved_layout import SavedLayout, layout_of
from .services import Stopping
from .transitions import after, resolved

if TYPE_CHECKING:
    from .allocations import Allocations
    from .observation import Observation

Say = Callable[[str], None]


def _silent(_: str) -> None:
    pass


# --- the layout that is wanted


def foresee(ds01: Allocations, wanted: Wanted, force: Collection[str] = ()) -> Planned:
    """What `apply` would do now. Writes nothing; raises Ds01Error with what is in the way."""
    with nvml.session() as driver:
        planned = _foresee(ds01, driver, ds01.store.read(), wanted, force)
    left = _left_stopped(pausing.left(ds01.paths.paused_services))
    return replace(planned, repairs=(*left, *planned.repairs))


def _left_stopped(units: Iterable[str]) -> Iterator[str]:
    """What an earlier run left stopped, as repairs."""
    return (f"{unit} was left stopped by an earlier run" for unit in units)


def apply(ds01: Allocations, wanted: Wanted, force: Collection[str] = (), say: Say = _silent) -> Planned:
    """Cut the GPUs as wanted, all or none. `force` names containers whose devices may be taken; `say` gets
    each step. Raises Ds01Error, with everything as it was, where something is in the way or the driver
    refuses. A service that gave way and does not start again is told with either, and stays to be started."""
    if not engine.disabled() and ds01.store.lost():
        ds01.rebuild()  # an empty ledger protects nobody
    resumed = pausing.resume(ds01.paths.paused_services, say)
    unstarted = _recorded(ds01, resumed.unstarted)
    try:
        planned = _apply(ds01, wanted, force, say, unstarted)
    except BaseException as exc:
        problems = [str(found.problem) for found in _recorded(ds01, unstarted)]
        if problems and isinstance(exc, Ds01Error):
            raise Ds01Error(exc.reason, " ".join([exc.message, *problems]), exc.hint, **exc.details) from None
        for problem in problems:
            say(problem)
        raise
    problems = [*(str(found.problem) for found in _recorded(ds01, unstarted)), *_unlogged(ds01)]
    return replace(
        planned, repairs=(*_left_stopped(resumed.started), *planned.repairs), problems=(*planned.problems, *problems)
    )


def _recorded(ds01: Allocations, unstarted: Iterable[Unstarted]) -> list[Unstarted]:
    """The same, with an event for each that nobody was told of."""
    found = list(unstarted)
    for unit in found:
        if not unit.known:
            ds01.events.write("service.failed", ds01.clock(), unit=unit.unit, message=str(unit.problem))
    return [replace(unit, known=True) for unit in found]


def _apply(ds01: Allocations, wanted: Wanted, force: Collection[str], say: Say, unstarted: list[Unstarted]) -> Planned:
    """`unstarted` holds afterwards the services that are stopped and should not be."""
    with nvml.session() as driver:
        first = ds01.store.read()
        planned = _foresee(ds01, driver, first, wanted, force)
        if not planned.changed:
            return planned
        note = ds01.paths.paused_services
        with pausing.paused(planned.services, note, say, unstarted), ds01.store.transaction() as transaction:
            if transaction.ledger.generation < first.generation:
                raise Ds01Error(
                    "ledger_unavailable", "The ledger was removed meanwhile.", "Run this again; nothing was changed."
                )
            # Until here others could cut, which shows in no ledger where nobody had the devices.
            # The services that gave way do not run any more, and belong to what was done all the same.
            again = _foresee(ds01, driver, transaction.ledger, wanted, force)
            planned = replace(again, services=planned.services)
            if not planned.changed:
                return planned
            if planned.recuts:
                # Under the lock: whoever writes has the same name for what is not finished yet.
                _check_writable(ds01, planned.host.inventory)
            if planned.over:
                ds01.give_back(transaction, planned.over, planned.host.running)
            inventory = cut(ds01, driver, transaction, planned, say)
    return replace(planned, host=replace(planned.host, inventory=inventory))


def _foresee(ds01: Allocations, driver: nvml.Nvml, ledger: Ledger, wanted: Wanted, force: Collection[str]) -> Planned:
    seen = ds01.look(ledger, driver)
    due = ds01.overdue(ledger, seen)  # what any request would give back is in nobody's way
    host = partitions.host(ds01, driver, functools.reduce(after, due, ledger), seen)
    cuts = wanted(host.gpus)
    planned = partitions.planned(host, cuts, force)
    resets = [gpu for gpu in planned.switched if gpu.resets]
    stopping = services.stopping(ds01.config.policies.mig_services) if resets else ()
    clients = _clients(resets, ds01.config.policies.mig_services, stopping)
    if any(clients.values()):
        host = replace(host, gpus=tuple(_with_holders(gpu, clients.get(gpu.index, ())) for gpu in host.gpus))
        planned = partitions.planned(host, cuts, force)
    over = tuple(outcome for outcome in due if outcome.allocation is None)
    units = tuple(service.unit for service in stopping)
    return replace(planned, services=units, repairs=_repairs(ds01, ledger, planned), over=over)


def _clients(
    gpus: Iterable[GpuState], listed: Collection[str], stopping: Sequence[Stopping]
) -> dict[int, tuple[Holder, ...]]:
    """By index, who keeps one of these GPUs from its reset: the processes that have it open and belong to no
    service that may be stopped, and the services that would have to stop, too, and may not."""
    may_stop = {*listed, *(s.unit for s in stopping if not s.along_with)}
    found = {}
    for gpu in gpus:
        others = [c for c in processes.holders([Path(f"/dev/nvidia{gpu.minor}")]) if c.unit not in may_stop]
        have_it_open = [Holder("", what=str(c), pid=c.pid, unit=c.unit, user=c.user) for c in others]
        named = {client.unit for client in others}
        along = [_taken_along(s) for s in stopping if s.along_with and s.unit not in named]
        found[gpu.index] = (*have_it_open, *along)
    return found


def _taken_along(service: Stopping) -> Holder:
    what = f"{service.along_with} (its stop would stop {service.unit}, which policies.mig_services does not list)"
    return Holder("", what=what, unit=service.unit)


def _with_holders(gpu: GpuState, clients: Iterable[Holder]) -> GpuState:
    """The GPU with those who have it open beside those who are known to use it."""
    return replace(gpu, holders=(*gpu.holders, *clients))


def _repairs(ds01: Allocations, ledger: Ledger, planned: Planned) -> tuple[str, ...]:
    """What is not as it should be beside the layout: what a killed run, or somebody else's change, left."""
    inventory = planned.host.inventory
    found = []
    problem = _spec_problem(ds01, inventory) if _has_toolkit() else None
    if problem:
        found.append(problem.rstrip("."))
    now = resolved(ledger, inventory)
    if now != ledger:
        found.append("the ledger's devices have other names now")
    if _has_toolkit() and not problem and ds01.misprojected(now, inventory, ds01.cdi.nvidia_spec()):
        found.append("CDI devices of containers are not what the ledger says")
    saved, same = ds01.saved_layout.read(), {plan.gpu for plan in planned.plans if not plan.changes}
    if _noted(saved, (gpu for gpu in planned.host.gpus if gpu.index in same)) != saved:
        found.append("the layout was not saved for the next boot")
    return tuple(found)


def _spec_problem(ds01: Allocations, inventory: Inventory) -> str | None:
    """Why NVIDIA's CDI spec is not that of these devices: it lacks some, or has some that are gone."""
    spec = ds01.cdi.nvidia_spec()
    uuids = [device.uuid for device in inventory.devices]
    lost = any(gpu.health == "lost" for gpu in inventory.gpus)  # what it had is not known
    described = {str(device.get("name")) for device in spec["devices"]} if spec and not lost else set()
    stale = [name for name in described.difference(uuids) if name.startswith(("GPU-", "MIG-"))]
    if stale:
        return "NVIDIA's CDI spec has devices that are gone."
    return ds01.cdi.problem(uuids, spec) if uuids else None  # without a device there is no spec


def _check_writable(ds01: Allocations, inventory: Inventory) -> None:
    """Before anything is begun: whether what depends on a layout could be written. Raises Ds01Error."""
    ds01.saved_layout.check()
    if _has_toolkit():
        try:
            toolkit.check(ds01.cdi.nvidia_targets())
        except Ds01Error as exc:
            raise _because_of_lost(exc, inventory) from None


def _because_of_lost(exc: Ds01Error, inventory: Inventory) -> Ds01Error:
    """NVIDIA's tool describes all GPUs or none: where one is lost, that is what has to be told."""
    lost = [f"GPU {gpu.index}" for gpu in inventory.gpus if gpu.health == "lost"]
    if not lost or exc.reason != "driver_unavailable":
        return exc
    message = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} lost, and meanwhile no other can be cut anew"
    hint = f"Reset what is lost (nvidia-smi --gpu-reset), or reboot this host. {exc.hint}"
    return Ds01Error(exc.reason, f"{message}: {exc.message}", hint, **exc.details)


def _has_toolkit() -> bool:
    """Without an engine nothing is projected, and nobody misses the toolkit."""
    return toolkit.installed() or not engine.disabled()


def cut_on_demand(
    ds01: Allocations, driver: nvml.Nvml, transaction: Transaction, seen: Observation, cuts: Cuts
) -> Inventory:
    """Cut GPUs for requests that were decided under this lock; the devices afterwards. Raises Ds01Error as
    `cut` does."""
    planned = partitions.planned(partitions.host(ds01, driver, transaction.ledger, seen), cuts)
    _check_writable(ds01, planned.host.inventory)
    return cut(ds01, driver, transaction, planned)


def mend(ds01: Allocations, driver: nvml.Nvml, transaction: Transaction) -> None:
    """Put right what depends on the layout, as a run that was killed leaves it. Raises Ds01Error."""
    inventory = driver.inventory()
    _check_writable(ds01, inventory)
    spec = ds01.cdi.nvidia_spec() or {}
    known = {device.get("name") for device in spec.get("devices", ())}
    cut_by_it = {device.gpu_uuid for device in inventory.devices if device.uuid not in known}
    _settle(ds01, driver, transaction, transaction.ledger, (), cut_by_it)


# --- under the lock


@interruption.deferred()
def cut(
    ds01: Allocations, driver: nvml.Nvml, transaction: Transaction, planned: Planned, say: Say = _silent
) -> Inventory:
    """Carry a plan out, and put right what depends on it; the devices afterwards. Under the ledger's lock.

    Raises Ds01Error with the layout, the ledger and the CDI devices as they were, and so an interruption: it
    counts before each step, and not between the steps and what depends on them.
    """
    before, saved, broken = transaction.ledger, ds01.saved_layout.read(), set(planned.released)
    if broken:  # out of reach first: nobody starts on a device that is about to go
        ds01.carry_out(transaction, before.without(*broken), ds01.clock(), broken, stopped=broken)
    gpus, devices = {gpu.index: gpu for gpu in planned.host.gpus}, planned.host.inventory.devices
    changed, begun = [gpus[index].uuid for index in planned.cuts], transaction.ledger
    unsettled: Ds01Error | None = None
    try:
        with cutting(driver.library, say) as cutter:
            _carry_out(cutter, driver, planned)
            inventory = _describe(ds01, driver, changed)
            _check_described(ds01, inventory)
            try:
                _follow(ds01, transaction, before, broken, inventory)
            except Ds01Error as exc:
                if transaction.ledger == begun:
                    raise
                unsettled = exc  # the ledger has it: now the GPUs have to stay so
    except BaseException as exc:
        _undo(ds01, driver, transaction, before, saved, broken, devices)
        _record_refusal(ds01, planned, exc)
        raise _with_clients(exc, planned.host) from None
    _record(ds01, planned, before)
    if unsettled:
        raise Ds01Error(
            unsettled.reason,
            f"The GPUs are cut as wanted, and the ledger has it, but: {unsettled.message}",
            unsettled.hint,
            **unsettled.details,
        )
    _renew(ds01, transaction, devices, inventory)
    return inventory


def _undo(
    ds01: Allocations,
    driver: nvml.Nvml,
    transaction: Transaction,
    before: Ledger,
    saved: SavedLayout,
    broken: Collection[str],
    devices: Sequence[Device],
) -> None:
    """As far as it can be: what was made again is in its place, under another name."""
    for act in (
        lambda: ds01.saved_layout.write(saved),
        lambda: _renew(ds01, transaction, devices, _settle(ds01, driver, transaction, before, broken)),
    ):
        with contextlib.suppress(Ds01Error):
            act()


def _renew(ds01: Allocations, transaction: Transaction, before: Sequence[Device], after: Inventory) -> None:
    """Whoever waits for the lock looked at the devices as they were before: let the ledger tell him."""
    if after.devices != before:
        transaction.renew(ds01.clock())


def _carry_out(cutter: Cutter, driver: nvml.Nvml, planned: Planned) -> None:
    """The steps of all GPUs: first what goes and the modes, then what is made."""
    gpus, plans = {gpu.index: gpu for gpu in planned.host.gpus}, planned.plans
    for step in (s for p in plans for s in p.changes if s.action != mig.CREATE):
        cutter.carry_out(gpus[step.gpu], step)
    if planned.switched:  # a GPU tells where its profiles may be only once its mode is on: from here on that counts
        switched = {gpu.index: planned.cuts[gpu.index] for gpu in planned.switched}
        now = (gpu for gpu in driver.layout(driver.inventory()) if gpu.index in switched)
        gpus |= {gpu.index: replace(gpu, missing=_to_come_back(gpus[gpu.index], planned)) for gpu in now}
        plans = (*(p for p in plans if p.gpu not in switched), *_plans(planned.host, gpus.values(), switched))
    for step in (s for p in plans for s in p.changes if s.action == mig.CREATE):
        cutter.carry_out(gpus[step.gpu], step)
    _verify(driver, planned)


def _to_come_back(gpu: GpuState, planned: Planned) -> tuple[mig.Instance, ...]:
    """Of what is missing, all that the plan does not give up."""
    given_up = [i for plan in planned.plans for i in plan.broken if plan.gpu == gpu.index]
    return tuple(i for i in gpu.missing if i not in given_up)


def _plans(host: Host, gpus: Iterable[GpuState], cuts: Cuts) -> Sequence[mig.Plan]:
    found = mig.plan(gpus, cuts)
    if found.refusals:
        raise partitions.refusal(found.refusals, host)
    return found.plans


def _verify(driver: nvml.Nvml, planned: Planned) -> None:
    """Read back: success is what the driver shows, not what it answered."""
    left = [
        step for plan in _plans(planned.host, driver.layout(driver.inventory()), planned.cuts) for step in plan.changes
    ]
    if left:
        raise Ds01Error(
            "layout_impossible",
            f"The driver accepted every step, and the layout is another one: GPU {left[0].gpu} would still have to"
            f" {left[0]}.",
            "Somebody else may cut this GPU at the same time. Run this again.",
        )


def _settle(
    ds01: Allocations,
    driver: nvml.Nvml,
    transaction: Transaction | None,
    before: Ledger,
    broken: Collection[str],
    changed: Collection[str] = (),
) -> Inventory:
    """The saved layout, nodes, NVIDIA's spec, ledger and CDI devices, as the GPUs are now.

    In this order: as long as the spec does not hold the new devices nobody is given one, so whoever is
    has it again after a reboot. Where the spec cannot be written the ledger still gets the devices' present names,
    and only those get a CDI device whom the spec as it is describes; the error is raised then.

    `before` is the ledger before the change (without a `transaction` it is left alone), `broken` are
    containers that may have lost devices by it, `changed` the UUIDs of the GPUs whose layout is DS01's
    from now on.
    """
    problem: Ds01Error | None = None
    try:
        inventory = _describe(ds01, driver, changed)
    except Ds01Error as exc:
        problem, inventory = exc, driver.inventory()
    if transaction:
        _follow(ds01, transaction, before, broken, inventory)
    if problem:
        raise problem
    _check_described(ds01, inventory)
    return inventory


def _describe(ds01: Allocations, driver: nvml.Nvml, changed: Collection[str]) -> Inventory:
    """The saved layout, nodes and NVIDIA's spec."""
    inventory = driver.inventory()
    gpus = [gpu for gpu in driver.layout(inventory) if gpu.uuid in changed]
    if gpus:
        ds01.saved_layout.write(_noted(ds01.saved_layout.read(), gpus))
    if _has_toolkit() and _spec_problem(ds01, inventory):
        if inventory.devices:
            toolkit.refresh(ds01.cdi.nvidia_targets())
        else:  # nvidia-ctk writes none then, and leaves the old one, whose devices could still be asked for
            toolkit.remove(ds01.cdi.nvidia_targets())
    return inventory


def _follow(
    ds01: Allocations, transaction: Transaction, before: Ledger, broken: Collection[str], inventory: Inventory
) -> None:
    """The ledger and the CDI devices."""
    final = resolved(before, inventory)
    final = final.without(*(c for c in broken if _lost_devices(final, c, inventory)))
    if final.allocations:
        final = replace(final, boot_id=processes.boot_id())
    ds01.reproject(transaction, final, ds01.clock(), inventory)


def _check_described(ds01: Allocations, inventory: Inventory) -> None:
    """Whether NVIDIA's spec is that of the devices, now that it was written. Raises Ds01Error."""
    if _has_toolkit() and (problem := _spec_problem(ds01, inventory)):
        raise Ds01Error("driver_unavailable", problem, "Try: nvidia-smi -L; nvidia-ctk cdi generate")


def _with_clients(exc: BaseException, host: Host) -> BaseException:
    """The driver's "in use" with those who have the GPU open."""
    gpu = next((g for g in host.gpus if isinstance(exc, Ds01Error) and g.index == exc.details.get("gpu")), None)
    if not (isinstance(exc, Ds01Error) and gpu and exc.reason == "layout_in_use"):
        return exc
    clients = [str(client) for client in processes.holders([Path(f"/dev/nvidia{gpu.minor}")])]
    who = f"These have it open: {', '.join(clients)}." if clients else ""
    return Ds01Error(exc.reason, f"{exc.message} {who}".strip(), exc.hint, **exc.details)


def _lost_devices(now: Ledger, container: str, inventory: Inventory) -> bool:
    allocation = now.allocations.get(container)
    return allocation is not None and not all(inventory.find(device) for device in allocation.devices)


def _noted(saved: SavedLayout, gpus: Iterable[GpuState]) -> SavedLayout:
    for gpu in gpus:
        saved = saved.noted(gpu.uuid, layout_of(gpu), processes.boot_id())
    return saved


# --- the audit log


def _record(ds01: Allocations, planned: Planned, before: Ledger) -> None:
    now = ds01.clock()
    for container in planned.released:
        had = before.allocations[container]
        ds01.events.write(
            "gpu.reclaimed",
            now,
            user=had.user,
            container=container,
            devices=[records.device_record(d) for d in had.devices],
            reason="layout",
            message=f"{had.gpu_id}, held for {container}, was taken: the GPU is cut otherwise.",
        )
    gpus = {gpu.index: gpu for gpu in planned.host.gpus}
    for plan in planned.plans:
        if plan.changes:
            steps = ", ".join(map(str, plan.changes))
            uuid = gpus[plan.gpu].uuid
            ds01.events.write("mig.changed", now, gpu=plan.gpu, uuid=uuid, message=f"GPU {plan.gpu}: {steps}.")


def _unlogged(ds01: Allocations) -> tuple[str, ...]:
    """That what was done is not in the log, in words."""
    return (ds01.events.problem,) if ds01.events.problem else ()


def _record_refusal(ds01: Allocations, planned: Planned, exc: BaseException) -> None:
    reason = exc.reason if isinstance(exc, Ds01Error) else "interrupted"
    gpus = [plan.gpu for plan in planned.plans if plan.changes]
    ds01.events.write("mig.refused", ds01.clock(), gpus=gpus, reason=reason, message=str(exc))


# --- after a reboot


@dataclass(frozen=True)
class Restored:
    """What a restore did. `problems` say which GPUs, or what else, are not as before; `warnings` what went wrong
    beside that."""

    plans: tuple[mig.Plan, ...] = ()
    inventory: Inventory | None = None
    problems: tuple[str, ...] = ()
    renamed: bool = False
    """Whether the ledger's devices have other names now."""
    warnings: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return self.renamed or any(plan.changes for plan in self.plans)

    def result(self) -> dict[str, Any]:
        """`ds01 restore --json`."""
        return {
            "changed": self.changed,
            "plan": [partitions.step_record(step) for plan in self.plans for step in plan.steps],
            "devices": [records.device_record(d) for d in self.inventory.devices] if self.inventory else [],
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "msg": self.summary(),
        }

    def summary(self) -> str:
        """The restore in a sentence."""
        parts = [f"GPU {p.gpu}: {', '.join(map(str, p.changes))}" for p in self.plans if p.changes]
        if parts:
            return "; ".join(parts) + "."
        return self._nothing_cut()

    def done(self) -> str:
        """What was done, in short, for whoever was told each step."""
        cut = [str(p.gpu) for p in self.plans if p.changes]
        return f"Cut again as saved: GPU {', '.join(cut)}." if cut else self._nothing_cut()

    def _nothing_cut(self) -> str:
        return "Nothing was cut again." if self.problems else "Every saved layout is in place."


def forget(ds01: Allocations, uuids: Collection[str]) -> None:
    """Leave GPUs that were taken out of this machine out of what is restored. Raises Ds01Error, with nothing
    forgotten, for one that is there or may be, and for one that is not saved."""
    with nvml.session() as driver, ds01.store.locked():
        saved = ds01.saved_layout.read()
        gpus = driver.inventory().gpus
        for uuid in uuids:
            if uuid not in saved.gpus:
                raise invalid_input(
                    f"No layout of {uuid} is saved.", f"Saved are those of: {', '.join(saved.gpus) or 'none'}."
                )
            if any(gpu.uuid == uuid for gpu in gpus):
                raise invalid_input(f"{uuid} is there: its layout is kept.", "To cut it otherwise: ds01 mig apply")
        lost = [str(gpu.index) for gpu in gpus if gpu.health == "lost"]
        if lost:  # it tells no UUID
            raise Ds01Error(
                "gpu_unhealthy",
                f"GPU {', '.join(lost)} is lost, and may be one that is to be forgotten: every layout is kept.",
                "Reset it, reboot this host, or take it out; then run this again.",
            )
        ds01.saved_layout.write(saved.without(uuids))
    for uuid in uuids:
        message = f"{uuid} was taken out for good: it is not cut again."
        ds01.events.write("mig.forgotten", ds01.clock(), uuid=uuid, message=message)


def foresee_restore(ds01: Allocations) -> Restored:
    """What `restore` would do now. Writes nothing."""
    with nvml.session() as driver:
        host, plans, problems = _foresee_restore(ds01, driver, *_readable(ds01))
    return Restored(tuple(plans.values()), host.inventory, tuple(problems))


@interruption.deferred()
def restore(ds01: Allocations, say: Say = _silent) -> Restored:
    """Cut every GPU again as it was saved, in the same places, and project the ledger on what is there then.

    For a boot, before any container runs: it asks no engine that does not run yet, since its start may wait for
    this. GPU by GPU: one that cannot be cut again keeps no other from it, and is offered to nobody. One that was
    cut again in this boot already loses nothing by it, unless somebody's device is missing on it: then the driver was
    loaded anew, which takes the instances and, on Hopper, the mode. An interruption counts between two GPUs, and is
    raised once those that are done are settled. Raises Ds01Error where there is no driver, or no lock.
    """
    with nvml.session() as driver, ds01.store.locked():
        ledger, unreadable = _readable(ds01)
        host, plans, problems = _foresee_restore(ds01, driver, ledger, unreadable)
        done: list[str] = []
        interrupted: interruption.Interrupted | None = None
        for uuid, plan in plans.items():
            try:
                _cut_again(driver, host, plan, ds01.saved_layout.read().gpus[uuid].layout, say)
                done.append(uuid)
            except Ds01Error as exc:
                problems.append(str(_with_clients(exc, host)))
            except interruption.Interrupted as exc:  # what was cut again is settled all the same
                interrupted = exc
                break
        if interrupted:
            problems += [
                f"{interrupted} GPU {plan.gpu} was not cut again." for uuid, plan in plans.items() if uuid not in done
            ]
        transaction = None if unreadable else Transaction(ds01.store, ledger)
        inventory = host.inventory
        try:
            inventory = _settle(ds01, driver, transaction, ledger, (), done)
        except Ds01Error as exc:
            problems.append(str(exc))
    renamed = transaction is not None and transaction.ledger.generation != ledger.generation
    restored = Restored(tuple(plans[uuid] for uuid in done), inventory, tuple(problems), renamed)
    _record_restore(ds01, restored)
    if interrupted:
        raise interrupted
    return replace(restored, warnings=_unlogged(ds01))


def _cut_again(driver: nvml.Nvml, host: Host, plan: mig.Plan, layout: mig.Placed, say: Say) -> None:
    with cutting(driver.library, say) as cutter:
        _carry_out(cutter, driver, Planned(host, (plan,), {plan.gpu: layout}))


def _readable(ds01: Allocations) -> tuple[Ledger, list[str]]:
    """The ledger; where it is damaged an empty one, and that in words."""
    try:
        return ds01.store.read(), []
    except Ds01Error as exc:
        if exc.reason != "ledger_damaged":
            raise
        return Ledger(), [str(exc)]


def _foresee_restore(
    ds01: Allocations, driver: nvml.Nvml, ledger: Ledger, unreadable: Sequence[str]
) -> tuple[Host, dict[str, mig.Plan], list[str]]:
    """The host, the plan of each saved GPU by its UUID, and what cannot be restored."""
    host = partitions.host(ds01, driver, ledger, _look(ds01, driver, ledger))
    host = replace(host, gpus=geometry.completed(host.gpus))
    there = {gpu.uuid: gpu for gpu in host.gpus}
    plans: dict[str, mig.Plan] = {}
    problems = [*unreadable]
    for uuid, saved in _saved(ds01, problems).gpus.items():
        if uuid not in there:
            problems.append(
                f"{uuid} is not there: the driver lost it, or it was taken out. If it is gone for good:"
                f" ds01 restore --forget {uuid}"
            )
            continue
        gpu = there[uuid]
        answer = mig.plan_placed(replace(gpu, missing=()), saved.layout)  # what is missing comes back by it
        if isinstance(answer, mig.LayoutRefusal):
            problems.append(answer.message)
        elif saved.boot_id == processes.boot_id() and _takes_away(answer) and not gpu.missing:
            problems.append(f"GPU {answer.gpu} was cut otherwise since it was restored: it is left as it is.")
        elif unreadable and _takes_away(answer):
            problems.append(f"GPU {answer.gpu} is cut otherwise, and without a ledger nobody knows who uses it.")
        else:
            plans[uuid] = answer
    return host, plans, problems


def _saved(ds01: Allocations, problems: list[str]) -> SavedLayout:
    """The saved layouts. Where they cannot be read there are none, and GPUs that are whole still have users."""
    try:
        return ds01.saved_layout.read()
    except Ds01Error as exc:
        problems.append(str(exc))
        return SavedLayout()


def _look(ds01: Allocations, driver: nvml.Nvml, ledger: Ledger) -> Observation:
    """The host, with the engine where it runs already: asking one that does not would start it, and wait."""
    with contextlib.suppress(Ds01Error):
        if not engine.disabled() and services.runs("docker.service"):
            return ds01.look(ledger, driver)
    return ds01.look_at_driver(driver)


def _takes_away(plan: mig.Plan) -> bool:
    """Whether a device, or a whole GPU, would be gone."""
    return plan.switches or any(step.uuid for step in plan.changes)


def _record_restore(ds01: Allocations, restored: Restored) -> None:
    if restored.changed or restored.problems:
        ds01.events.write(
            "mig.restored", ds01.clock(), message=restored.summary(), problems=list(restored.problems) or None
        )
