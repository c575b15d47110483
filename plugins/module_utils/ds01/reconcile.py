"""The verb that brings a server back to its own rules: reconcile, as often as one likes.

One look at engine and driver, then one stage after the other: as long as nothing was changed and nothing failed, each
decides from that look; afterwards from one of its own, for what one does the next must see. Whoever is to be removed
or stopped is looked at once more by itself. A stage that cannot do its work says why, and the others go on.
"""

from __future__ import annotations

import contextlib
import time
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
    stopping,
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
"""Seconds. What hangs answers no call, and lets none be given up: then the process ends, before its unit's time."""

PATIENCE = 120.0
"""Seconds of them in which one run waits for containers to end. The engine goes on with those that take longer, and
the next run looks after them; the rest of the time is enough for everything else."""

_UNMANAGED_GRACE = 30
"""Seconds that a container outside DS01 has to end by itself."""

_LOCK_WAIT = DEADLINE + 10
"""Seconds that a second run waits for the first: by then that one has ended, or ended itself."""


@dataclass(frozen=True)
class Reconciled:
    """What was done, in order, and what could not be: a sentence each, with its reason code; `foreseen`: what would
    be."""

    actions: tuple[Action, ...] = ()
    problems: tuple[Mapping[str, str], ...] = ()
    foreseen: bool = False

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
        did, told = ("to do", "to report") if self.foreseen else ("done", "reported")
        kinds = [action.kind for action in self.actions]
        meant = sum(kind in drift.MEANT for kind in kinds)
        reported = sum(kind in drift.REPORTS for kind in kinds) - meant
        counts = {did: len(kinds) - reported - meant, told: reported}
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        parts = parts or [f"nothing {did}" if self.problems else "everything is as it should be"]
        more = {"to know of": meant, "could not be looked at or done": len(self.problems)}
        return f"{'; '.join([*parts, *(f'{count} {what}' for what, count in more.items() if count)])}."


@dataclass
class _Run:
    """A run under way: what it is `at`, and what its first look showed; `patience` is left for waiting for containers
    to end, and `notices` are those that stand in the workspaces."""

    at: str = ""
    patience: float = field(default_factory=lambda: PATIENCE)
    notices: enforcing.Places = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    problems: list[Mapping[str, str]] = field(default_factory=list)
    settled: Settled | None = None
    uses: enforcing.Uses | None = None
    pictured: Picture | None = None

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """One stage: where it fails, what it was about is a problem."""
        before, self.at = self.at, what
        try:
            yield
        except Ds01Error as exc:
            self.problems.append({"stage": what, "reason": exc.reason, "msg": str(exc)})
        finally:
            self.at = before

    def late(self) -> Ds01Error:
        """It is not done in time. A driver that hangs would have been told long before."""
        return Ds01Error(
            "deadline_passed",
            f"ds01 reconcile did not end within {DEADLINE:g} s. It was at: {self.at or 'its end'}.",
            "What that asks may hang (systemctl status docker, dmesg, users' file systems). What was begun, the next "
            "ds01 reconcile puts right.",
        )

    def ends(self, graces: Mapping[str, int]) -> Iterator[stopping.End]:
        """End these containers side by side, in what is left of the time for that."""
        began = time.monotonic()
        try:
            yield from stopping.ends(graces, self.patience)
        finally:
            self.patience -= time.monotonic() - began

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
        watchdog.bounded(DEADLINE, run.late),
    ):
        _ = ds01.config
        known, began = memory.read(ds01.paths.memory), memory.since_boot()
        run.notices = known.notices
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
                _enforce(ds01, _without_removed(run.settled, run), run.uses, run)
        now = replace(now, notices=run.notices)
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
        with run.stage("policies"):
            due = enforcing.look(ds01, settled, uses)
            run.actions += due.actions
            due.check()
    with run.stage("containers"):
        _each_aside(ds01, run, Containers(ds01).left_aside)
        run.actions += [*_overdue(ds01, run, now), *_leftover_records(ds01, run)]
    with run.stage("slices"):
        if not engine.disabled():
            run.actions += slices.foresee(ds01.config, slices.users(run.containers(ds01)))
    return replace(run.done(), foreseen=True)


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
    for device, whose in settled.ledger.missing(settled.seen.inventory):
        yield drift.of_missing(device, whose)


# --- use without DS01


def _strangers(ds01: Allocations, settled: Settled) -> Sequence[Stranger]:
    seen, policies = settled.seen, ds01.config.policies
    pids = {pid for pids in seen.processes.values() for pid in pids} | {use.pid for use in seen.uses if use.pid}
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
    run.actions += strangers.seen(found, seen, settled.ledger)
    for action in strangers.news(found, seen, settled.ledger, now.unmanaged):
        ds01.events.record(action, ds01.clock())
    ended = []
    programs = {str(stranger.program.pid): stranger.program.started for stranger in found if stranger.program}
    asked = {pid: began for pid, began in now.asked.items() if programs.get(pid) == began}
    for action in _stopped_strangers(_unmanaged_to_stop(ds01, settled, found, now.asked), run):
        telling.tell(action.user, action.message)
        ds01.events.record(action, ds01.clock())
        run.actions.append(action)
        if "pid" in action.details:
            asked[str(action.details["pid"])] = action.details["started"]
        else:
            ended.append(action.details["container_id"])
    left = [stranger for stranger in found if stranger.program or stranger.container_id not in ended]
    return replace(now, unmanaged=strangers.names(left, seen), asked=asked)


def _unmanaged_to_stop(
    ds01: Allocations, settled: Settled, found: Sequence[Stranger], asked: Mapping[str, int]
) -> list[Action]:
    """Nobody without the engine: then no process can be told from a container's."""
    if ds01.config.policies.unmanaged != "stop" or engine.disabled():
        return []
    return list(strangers.stops(found, settled.seen.inventory, asked))


def _stopped_strangers(actions: Iterable[Action], run: _Run) -> Iterator[Action]:
    """Stop containers, side by side, and ask processes to end; those for which that could be done, as it is."""
    containers = {}
    for action in actions:
        if "pid" not in action.details:
            containers[action.details["container_id"]] = action
        elif processes.ask_to_end(action.details["pid"], action.details["started"]):
            yield action
    for end in run.ends(dict.fromkeys(containers, _UNMANAGED_GRACE)):
        action = containers[end.container]
        with run.stage(action.subject):
            if end.error:
                raise end.error
        if end.fate == "over":
            yield action


# --- containers


def _each_aside(ds01: Allocations, run: _Run, look_at: Callable[[ContainerName], Action | None]) -> None:
    """Look at the containers that a request set aside for a new one: it may have died."""
    if engine.disabled():
        return
    for container in run.containers(ds01):
        if container.called != container.name:
            with run.stage(container.called):
                action = look_at(names.as_called(container.called, container.user))
                run.actions += [action] if action else []


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
    put_back_at = Containers(ds01).put_back_at(names.as_called(box.name, box.user), box.id)
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


def _enforce(ds01: Allocations, settled: Settled, uses: enforcing.Uses, run: _Run) -> None:
    """Warn and stop."""
    found = enforcing.look(ds01, settled, uses)
    texts = dict(found.review.notices)
    _leave_notices(settled, texts, run)
    for action in found.review.actions:
        enforcing.tell(ds01, action)
        run.actions.append(action)
    found.remember()
    with run.stage("policies"):
        _tell_damage(ds01, found)
    for action, error in enforcing.stop(ds01, found, run.ends):
        with run.stage(action.subject):
            if error:
                raise error
            run.actions.append(action)
            texts[action.subject] = found.farewell(action)
            _leave_notices(settled, texts, run)
            enforcing.hold(ds01, action)


def _leave_notices(settled: Settled, texts: Mapping[str, str], run: _Run) -> None:
    wanted = enforcing.notices(settled, texts)
    enforcing.leave_notices(wanted, run.notices)
    run.notices = wanted


def _tell_damage(ds01: Allocations, found: enforcing.Round) -> None:
    """Once, for by now the file is whole again. Raises Ds01Error."""
    try:
        found.check()
    except Ds01Error as exc:
        ds01.events.write("policy.state_lost", ds01.clock(), reason=exc.reason, message=str(exc))
        raise


def _without_removed(settled: Settled, run: _Run) -> Settled:
    """What was seen, but for the containers that this run removed."""
    gone = {action.details.get("container_id") for action in run.actions if action.kind == "container.removed"}
    left = tuple(container for container in settled.seen.containers if container.id not in gone)
    return replace(settled, seen=replace(settled.seen, containers=left))


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
