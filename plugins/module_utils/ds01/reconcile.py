"""The verb that brings a server back to its own rules: reconcile, as often as one likes.

One look at engine and driver, then one stage after the other: as long as nothing was changed and nothing failed, each
decides from that look; afterwards from one of its own, for what one does the next must see. Whoever is to be removed
or stopped is looked at once more by itself. A stage that cannot do its work says why, and the others go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from . import (
    claims,
    drift,
    enforcing,
    engine,
    exclusion,
    memory,
    metrics,
    names,
    nvml,
    pausing,
    processes,
    publishing,
    slices,
    strangers,
    telling,
    watchdog,
)
from .allocations import Allocations, Settled
from .containers import Containers
from .drift import Action, Box
from .errors import Ds01Error
from .memory import Memory
from .metrics import Picture
from .names import ContainerName
from .strangers import Stranger

DEADLINE = 300.0
"""Seconds. A driver that hangs answers no call, and lets none be given up: then the process ends."""

_UNMANAGED_GRACE = 30
"""Seconds that a container outside DS01 has to end by itself."""

_LOCK_WAIT = DEADLINE + 10
"""Seconds that a second run waits for the first: by then that one has ended, or ended itself."""


@dataclass(frozen=True)
class Reconciled:
    """What was done, in order, and what could not be: a sentence each, with its reason code."""

    actions: tuple[Action, ...] = ()
    problems: tuple[Mapping[str, str], ...] = ()

    @property
    def changed(self) -> bool:
        return any(action.kind not in drift.REPORTS for action in self.actions)

    def result(self) -> dict[str, Any]:
        """`ds01 reconcile --json`."""
        return {
            "changed": self.changed,
            "actions": [action.record() for action in self.actions],
            "problems": [dict(problem) for problem in self.problems],
            "msg": self.summary(),
        }

    def summary(self) -> str:
        """The run in a sentence."""
        done = f"{len(self.actions)} to do or report" if self.actions else "everything is as it should be"
        return f"{done}; {len(self.problems)} could not be looked at." if self.problems else f"{done}."


@dataclass
class _Run:
    """A run under way, and what its first look showed."""

    actions: list[Action] = field(default_factory=list)
    problems: list[Mapping[str, str]] = field(default_factory=list)
    settled: Settled | None = None
    uses: enforcing.Uses | None = None
    pictured: Picture | None = None

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """One stage: where it fails, what it was about is a problem."""
        try:
            yield
        except Ds01Error as exc:
            self.problems.append({"stage": what, "reason": exc.reason, "msg": str(exc)})

    @property
    def untouched(self) -> bool:
        """Whether the first look still holds: nothing was changed, nor left halfway."""
        return not (self.done().changed or self.problems)

    def containers(self, ds01: Allocations) -> Sequence[engine.Container]:
        """DS01's containers as they are after what was done so far. Raises Ds01Error."""
        return self.settled.seen.containers if self.settled and self.untouched else ds01.engine.containers()

    def done(self) -> Reconciled:
        return Reconciled(tuple(self.actions), tuple(self.problems))


def reconcile(ds01: Allocations) -> Reconciled:
    """Bring ledger, CDI devices, containers and slices into agreement with the limits file and with what is there.

    Raises Ds01Error `lock_timeout` where another run does not end, `config_invalid` for a limits file with a mistake:
    it says what to do to nobody.
    """
    run = _Run()
    with (
        exclusion.only(ds01.paths.state / "reconcile.lock", "reconcile", _LOCK_WAIT, _does_not_end),
        watchdog.bounded(DEADLINE, "ds01 reconcile"),
    ):
        _ = ds01.config
        known, began = memory.read(ds01.paths.memory), memory.since_boot()
        now = known.at(processes.boot_id(), ds01.clock(), memory.since_boot())
        with run.stage("services"):
            _resume(ds01, run)
        with run.stage("allocations"):
            settled = _settle(ds01, run)
            now = _meet_strangers(ds01, settled, now, run)
        with run.stage("containers"):
            _each_aside(ds01, run, Containers(ds01).put_back)
            _remove(ds01, _overdue(ds01, run, now), run)
            _forget(ds01, _leftover_records(ds01, run), run)
        with run.stage("policies"):
            if run.settled and run.uses is not None:
                now = replace(now, notices=_enforce(ds01, run.settled, run.uses, now.notices, run))
        with run.stage("slices"):
            _set_slices(ds01, run)
        if now != known:
            with run.stage("memory"):
                memory.write(ds01.paths.memory, now)
        ds01.events.rotate(ds01.config.events.rotate_at, ds01.config.events.keep)
        if ds01.events.problem:
            run.problems.append({"stage": "events", "reason": "permission_denied", "msg": ds01.events.problem})
        with run.stage("metrics"):
            _publish(ds01, run, memory.since_boot() - began)
    return run.done()


def foresee(ds01: Allocations) -> Reconciled:
    """What `reconcile` would do now: a report of drift. Writes nothing."""
    _ = ds01.config
    run = _Run()
    now = memory.read(ds01.paths.memory).at(processes.boot_id(), ds01.clock(), memory.since_boot())
    run.actions += map(drift.of_service, pausing.left(ds01.paths.paused_services))
    with run.stage("allocations"):
        with nvml.session() as driver:
            run.settled = settled = ds01.foresee_settle(driver)
            uses = enforcing.uses(driver, settled.seen)
        found = _strangers(ds01, settled)
        run.actions += [*_of_settled(settled), *strangers.seen(found, settled.seen.inventory, settled.ledger)]
        run.actions += _unmanaged_to_stop(ds01, settled, found, now.asked)
        run.actions += enforcing.foresee(ds01, settled, uses)
    with run.stage("containers"):
        _each_aside(ds01, run, Containers(ds01).left_aside)
        run.actions += [*_overdue(ds01, run, now), *_leftover_records(ds01, run)]
    with run.stage("slices"):
        if not engine.disabled():
            run.actions += slices.foresee(ds01.config, slices.users(run.containers(ds01)))
    return run.done()


def _does_not_end(holder: str) -> Ds01Error:
    return Ds01Error(
        "lock_timeout",
        f"Another reconcile runs ({holder}), and did not end within {_LOCK_WAIT:g} s.",
        "Try again; if it never ends, the driver or the engine hangs: dmesg shows why.",
    )


# --- services


def _resume(ds01: Allocations, run: _Run) -> None:
    """Start what a change of a GPU's MIG mode left stopped. One that does not start is tried each time, and has
    its event once."""
    resumed = pausing.resume(ds01.paths.paused_services, lambda _: None)
    for action in map(drift.of_service, resumed.started):
        ds01.events.record(action, ds01.clock())
        run.actions.append(action)
    for found in resumed.unstarted:
        if not found.known:
            ds01.events.write("service.failed", ds01.clock(), unit=found.unit, message=str(found.problem))
        with run.stage("services"):
            raise found.problem


# --- allocations


def _settle(ds01: Allocations, run: _Run) -> Settled:
    """Settle, and all that the later stages need of the driver, in one session: to open one takes longer than the rest.
    It is closed before anything is stopped, for whoever cuts GPUs waits for that. Raises Ds01Error."""
    with nvml.session() as driver:
        run.settled = settled = ds01.settle(driver)
        done = list(_of_settled(settled))
        for action in done:
            if action.kind == "cdi.mended":  # what became of allocations is in the log already
                ds01.events.record(action, ds01.clock())
        run.actions += done
        with run.stage("policies"):
            run.uses = enforcing.uses(driver, settled.seen)
        with run.stage("metrics"):
            if run.untouched and ds01.config.metrics.wanted:
                run.pictured = publishing.picture(ds01, settled.ledger, settled.seen, driver)
    return settled


def _of_settled(settled: Settled) -> Iterator[Action]:
    for outcome in settled.outcomes:
        yield drift.of_outcome(outcome)
    for container in settled.mended:
        allocation = settled.ledger.allocations.get(container)
        yield drift.of_projection(container, allocation.user if allocation else "")


# --- use without DS01


def _strangers(ds01: Allocations, settled: Settled) -> Sequence[Stranger]:
    seen, policies = settled.seen, ds01.config.policies
    pids = {pid for pids in seen.processes.values() for pid in pids}
    around = strangers.Surroundings(
        own={container.id for container in seen.containers if container.own},
        outside={c.id: c.name for c in (*seen.containers, *seen.others) if not c.own},
        harmless=policies.monitoring_containers,
        services=policies.mig_services,
    )
    programs = {pid: processes.program(pid) for pid in pids}
    return strangers.find(seen.inventory, settled.ledger, seen.uses, seen.processes, programs, around)


def _meet_strangers(ds01: Allocations, settled: Settled, now: Memory, run: _Run) -> Memory:
    """Report everybody who uses a device without DS01, and stop whom the limits file wants stopped; what to remember.

    There is an event for whoever does and did not at the last run."""
    found, seen = _strangers(ds01, settled), settled.seen.inventory
    for action in strangers.seen(found, seen, settled.ledger):
        run.actions.append(action)
        if now.unmanaged.get(action.subject) != action.details["by"]:
            ds01.events.record(action, ds01.clock())
    ended = []
    programs = {str(stranger.program.pid): stranger.program.started for stranger in found if stranger.program}
    asked = {pid: began for pid, began in now.asked.items() if programs.get(pid) == began}
    for action in _unmanaged_to_stop(ds01, settled, found, now.asked):
        with run.stage(action.subject):
            if not _stop_stranger(ds01, action):
                continue
            run.actions.append(action)
            if "pid" in action.details:
                asked[str(action.details["pid"])] = action.details["started"]
            else:
                ended.append(action.details["container_id"])
    left = [stranger for stranger in found if stranger.program or stranger.container_id not in ended]
    by_device = {action.subject: action.details["by"] for action in strangers.seen(left, seen, settled.ledger)}
    return replace(now, unmanaged=by_device, asked=asked)


def _unmanaged_to_stop(
    ds01: Allocations, settled: Settled, found: Sequence[Stranger], asked: Mapping[str, int]
) -> list[Action]:
    """Nobody without the engine: then no process can be told from a container's."""
    if ds01.config.policies.unmanaged != "stop" or engine.disabled():
        return []
    return list(strangers.stops(found, settled.seen.inventory, asked))


def _stop_stranger(ds01: Allocations, action: Action) -> bool:
    """Stop a container, or ask a process to end, with an event; False for a process that is gone. Raises Ds01Error."""
    if "pid" in action.details:
        if not processes.ask_to_end(action.details["pid"], action.details["started"]):
            return False
    else:
        ds01.engine.end(action.details["container_id"], _UNMANAGED_GRACE)
    telling.tell(action.user, action.message)
    ds01.events.record(action, ds01.clock())
    return True


# --- containers


def _each_aside(ds01: Allocations, run: _Run, look_at: Callable[[ContainerName], Action | None]) -> None:
    """Look at the containers that a request set aside for a new one: it may have died."""
    if engine.disabled():
        return
    for container in run.containers(ds01):
        if container.called != container.name:
            with run.stage(container.called):
                action = look_at(_named(container.called, container.user))
                run.actions += [action] if action else []


def _named(container: str, user: str) -> ContainerName:
    """As it is called: whose account is gone is not looked up anew."""
    return ContainerName(names.split(container)[0], user, container)


def _overdue(ds01: Allocations, run: _Run, clock: Memory) -> list[Action]:
    """The containers whose time is over, each asked for by itself where that may be so; while the clock is not to be
    trusted it is no one's."""
    if engine.disabled() or clock.distrusts(memory.since_boot()):
        return []
    listed = map(_box, (container for container in run.containers(ds01) if container.own))
    asked = [_asked(ds01, box) for box in listed if drift.may_be_overdue(box, ds01.config, ds01.clock())]
    return list(drift.overdue(filter(None, asked), ds01.config, ds01.clock()))


def _box(container: engine.Container) -> Box:
    return Box(container.name, container.user, container.id, container.status, claims.created_at(container))


def _asked(ds01: Allocations, box: Box) -> Box | None:
    """How it is now, and since when; None where it is gone, or made anew."""
    now = ds01.engine.container(box.name)
    if not now or now.id != box.id:
        return None
    put_back_at = Containers(ds01).put_back_at(_named(box.name, box.user), box.id)
    return replace(box, status=now.status, finished_at=now.finished_at, put_back_at=put_back_at)


def _remove(ds01: Allocations, actions: Iterable[Action], run: _Run) -> None:
    containers = Containers(ds01)
    for action in actions:
        with run.stage(action.subject):
            if containers.discard(action.container, action.details["container_id"], action.message):
                run.actions.append(action)


def _leftover_records(ds01: Allocations, run: _Run) -> list[Action]:
    """The records that nobody needs; none while it is not known who is there."""
    if engine.disabled() or not run.settled:
        return []
    seen, ledger = run.settled.seen, run.settled.ledger
    listed = {*(c.name for c in (*seen.containers, *seen.others)), *(c.called for c in seen.containers)}
    try:
        written = {file.stem: file.stat().st_mtime for file in ds01.paths.metadata.glob("*.json")}
    except OSError as exc:
        raise Ds01Error("permission_denied", f"{ds01.paths.metadata} could not be read: {exc.strerror}.") from None
    times = {name: datetime.fromtimestamp(time, timezone.utc) for name, time in written.items()}
    return list(drift.of_records(times, {*listed, *ledger.allocations}, ds01.clock()))


def _forget(ds01: Allocations, actions: Iterable[Action], run: _Run) -> None:
    containers = Containers(ds01)
    for action in actions:
        with run.stage(action.subject):
            if containers.forget(action.container):
                ds01.events.record(action, ds01.clock())
                run.actions.append(action)


# --- idle and runtime limits


def _enforce(
    ds01: Allocations, settled: Settled, uses: enforcing.Uses, told: Mapping[str, str], run: _Run
) -> dict[str, str]:
    """Warn and stop; the notices that stand in the workspaces then."""
    found = enforcing.look(ds01, settled, uses)
    stand = enforcing.leave_notices(settled, found.review.notices, told)
    _carry_out(ds01, found.warnings, run)
    found.remember()
    stopped = _carry_out(ds01, found.stops, run)
    if stopped:
        found.remember_ends({container.id for container in settled.seen.containers if container.name in stopped})
    return stand


def _carry_out(ds01: Allocations, actions: Iterable[Action], run: _Run) -> set[str]:
    """Warn or stop; the containers for which that could be done."""
    done = set()
    for action in actions:
        with run.stage(action.subject):
            if enforcing.carry_out(ds01, action):
                run.actions.append(action)
                done.add(action.subject)
    return done


# --- slices


def _set_slices(ds01: Allocations, run: _Run) -> None:
    if engine.disabled():
        return
    users = slices.users(run.containers(ds01))
    for action in slices.foresee(ds01.config, users):
        with run.stage(action.subject):
            if slices.carry_out(ds01, action, users) or action.kind in drift.REPORTS:
                run.actions.append(action)


# --- what other programs read


def _publish(ds01: Allocations, run: _Run, seconds: float) -> None:
    if not ds01.config.metrics.wanted:
        return
    this = metrics.Run(ds01.clock(), seconds, not run.problems)
    pictured = run.pictured if run.pictured and run.untouched else publishing.look(ds01)
    for problem in publishing.publish(ds01, pictured, this):
        run.problems.append({"stage": "metrics", "reason": "permission_denied", "msg": problem})
