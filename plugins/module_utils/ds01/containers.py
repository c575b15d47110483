"""The container verbs: present, started, stopped, restarted, absent, each all or nothing.

A wish and what the engine shows become a list of steps (container_steps); each step does one thing
and says how to undo it, so that a failure halfway leaves nothing behind. A GPU container asks for its
own CDI device and never knows which GPU that is.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from . import (
    accounts,
    confinement,
    container_spec,
    container_steps,
    drift,
    engine,
    exclusion,
    files,
    names,
    placement,
    records,
    units,
    userdb,
    waiting,
    workspace,
)
from .allocations import Allocations, other_containers
from .container_spec import ContainerRequest, ImageFiles
from .container_steps import Plan, Report, Wish
from .errors import Ds01Error
from .limits import Limits
from .model import Device
from .tighten import tightened
from .transitions import Change, Outcome, describe

_SETTLE = 0.3
_MANY = 2
"""From so many containers on, one listing is asked for first."""
_RUNNING = ("running", "restarting")  # not paused: that is no success of a start


@dataclass(frozen=True)
class _Aside:
    """A container that was set aside, and whether the new one came so far that it needs no other."""

    old: engine.Container
    complete: bool


class Containers:
    """The verbs on one host, beside the allocations they start from and give back to."""

    def __init__(self, allocations: Allocations) -> None:
        self._allocations = allocations

    def apply(self, wishes: Sequence[Wish]) -> list[Report]:
        """Carry the wishes out, one after the other. A failure does not stop the others.

        One look tells which containers are as wished already: nobody has to wait for those, nor lock them.
        """
        converged = self._converged(wishes)
        return [converged.get(wish.name.full) or self._alone(wish) for wish in wishes]

    def preview(self, wishes: Sequence[Wish]) -> list[Report]:
        """What `apply` would do now; writes nothing."""
        converged = self._converged(wishes)
        return [converged.get(w.name.full) or self._each(w, self._foresee, self._engine) for w in wishes]

    def _converged(self, wishes: Sequence[Wish]) -> dict[str, Report]:
        """The reports on those with nothing left to do, by name. Only of names that stand there once: what an earlier
        wish does is not in this look."""
        times = Counter(wish.name.full for wish in wishes)
        if len(times) < _MANY:
            return {}
        try:
            seen, now = engine.Snapshot(self._engine), self._allocations.store.read()
        except Ds01Error:
            return {}  # each says so for itself
        known = {*now.allocations, *(waiter.request.container for waiter in now.queue)}
        reports = {w.name.full: self._as_it_is(w, seen, known) for w in wishes if times[w.name.full] == 1}
        return {name: report for name, report in reports.items() if report}

    def _as_it_is(self, wish: Wish, seen: engine.Snapshot, known: Collection[str]) -> Report | None:
        """The report where nothing is left to do; None where something is, or the container is in question."""
        if seen.container(names.set_aside(wish.name.full)):
            return None
        try:
            plan = self._plan(wish, seen)
        except Ds01Error:
            return None
        gone = plan.existing is None and wish.name.full not in known
        if plan.steps and not (plan.steps == ("release",) and gone):
            return None
        report = container_steps.begun(wish, plan)
        self._leave(wish, plan, report)
        return report

    def _alone(self, wish: Wish) -> Report:
        """One wish, while no other request works on its container."""
        try:
            with exclusion.alone(self._lock, wish.name.full):
                self._put_back(wish.name)
                return self._each(wish, self._carry_out, self._engine)
        except Ds01Error as exc:
            return Report(wish.name, error=exc)

    def _each(self, wish: Wish, run: Callable[[Wish, Plan, Report], None], seen: _Seen) -> Report:
        report = Report(wish.name)
        try:
            plan = self._plan(wish, seen)
            report = container_steps.begun(wish, plan)
            run(wish, plan, report)
        except Ds01Error as exc:
            report.error = exc
        return report

    def _plan(self, wish: Wish, seen: _Seen) -> Plan:
        existing = seen.container(wish.name.full)
        _check_ours(existing)
        if wish.state == "absent":
            status = existing.status if existing else None
            return Plan(existing, None, container_steps.steps(wish, status, differs=False))
        image = self._image(wish.request.image, seen) if wish.request else None
        spec = self._spec(wish.request, image) if wish.request and image else None
        differs = bool(existing and spec and existing.labels.get("ds01.intent") != spec["Labels"]["ds01.intent"])
        outdated = bool(existing and image and not differs and existing.image_id not in ("", image.id))
        status, finished = (existing.status, self._finished(wish.name, existing)) if existing else (None, True)
        anew = differs or (outdated and wish.recreate == "on_update")
        plan = Plan(existing, spec, container_steps.steps(wish, status, anew, finished), outdated=outdated)
        if differs and spec:
            plan.drift = container_spec.differences(self._engine.made_from(wish.name.full), spec)
        if "create" not in plan.steps:
            plan.warnings.extend(container_steps.notices(wish, plan, differs))
        return plan

    def _finished(self, name: names.ContainerName, container: engine.Container) -> bool:
        """Whether the request that made it came to its record, the last thing before the first start."""
        return container.status != "created" or self._metadata(name).get("container_id") == container.id

    def _foresee(self, wish: Wish, plan: Plan, report: Report) -> None:
        held = self._allocations.allocation(wish.name.full)
        report.allocation = describe(held) if held else None
        for step in plan.steps:
            before = report.allocation
            if step == "allocate":
                report.allocation = self._would_have(wish, plan)
            elif step == "release":
                report.allocation = None  # by then the container is removed: nothing is in the way
            if step not in ("allocate", "release") or _devices(report.allocation) != _devices(before):
                report.actions.append(_DONE[step])
        report.after = container_steps.foreseen(wish, plan)
        report.container = container_steps.shown(plan.existing)
        report.foreseen = True

    def _leave(self, wish: Wish, plan: Plan, report: Report) -> None:
        allocation = self._allocations.allocation(wish.name.full)
        report.allocation = describe(allocation) if allocation else None
        report.container, report.after = container_steps.shown(plan.existing), container_steps.state(plan.existing)

    def _would_have(self, wish: Wish, plan: Plan) -> dict[str, Any] | None:
        outcome = self._allocations.preview([self._change(wish, plan)])[0]
        _raise_refusal(outcome)
        return describe(outcome.allocation) if outcome.allocation else None

    def _carry_out(self, wish: Wish, plan: Plan, report: Report) -> None:
        failure: Ds01Error | None = None
        try:
            with contextlib.ExitStack() as undo:
                try:
                    for step in plan.steps:
                        if getattr(self, f"_{step}")(wish, plan, undo):
                            report.actions.append(_DONE[step])
                except Ds01Error as exc:
                    failure = exc
                    raise
                undo.pop_all()
        except Ds01Error as exc:
            undone = _UNDONE if "set_aside" in plan.steps else ("allocated", "created")
            report.actions = [action for action in report.actions if action not in undone]
            raise exc if failure in (None, exc) else _half_undone(failure, exc, wish.name, plan) from None
        if "set_aside" in plan.steps:
            self._drop_old(wish.name, report)
        container = self._engine.container(wish.name.full) if plan.steps else plan.existing
        report.container = container_steps.shown(container)
        report.after = container_steps.state(container)
        allocation = self._allocations.allocation(wish.name.full)
        report.allocation = describe(allocation) if allocation else None
        if self._allocations.events.problem:
            report.warnings.append(self._allocations.events.problem)

    def _allocate(self, wish: Wish, plan: Plan, undo: contextlib.ExitStack) -> bool:
        """Make sure that the container has its devices; new ones are given back when a later step fails."""
        outcome = waiting.apply(self._allocations, [self._change(wish, plan)])[0]
        _raise_refusal(outcome)
        if outcome.changed:
            before, after = outcome.before, outcome.allocation
            kept = before is not None and after is not None and after.devices == before.devices
            undo.callback(self._allocations.apply, [Change("held" if kept else "released", wish.name)])
        return outcome.changed and not kept

    def _create(self, wish: Wish, plan: Plan, undo: contextlib.ExitStack) -> bool:
        request, spec = wish.request, plan.spec
        if request is None or spec is None:
            raise AssertionError("a container is only ever made from a request")
        account = _account(wish.name)
        user_limits = self._limits(request)
        workspace.ensure(self._workspace(request, account), account)
        with self._allocations.store.transaction() as transaction:
            others = other_containers(wish.name, self._engine.containers(), transaction.ledger)
            refusal = placement.containers_allowed(user_limits, others)
            if refusal:
                raise Ds01Error(refusal.reason, refusal.message, refusal.hint)
            has = transaction.ledger.allocations.get(wish.name.full)
            if has is None:
                # Counted and made under one lock: two requests at once cannot both be the last allowed one.
                container_id = self._make(wish.name, spec, (), undo)
        if has:  # the ledger counts it already
            container_id = self._make(wish.name, spec, has.devices, undo)
        self._first_start(request, account)
        if "set_aside" in plan.steps:
            for path in wish.keep:
                self._engine.copy(names.set_aside(wish.name.full), wish.name.full, path)
        undo.callback(self._metadata_path(wish.name).unlink, missing_ok=True)
        metadata = container_spec.metadata(request, user_limits, container_id, self._allocations.clock())
        self._put_metadata(wish.name, metadata)
        self._note_devices(wish.name)
        self._event("container.created", wish.name, image=request.image)
        return True

    def _make(
        self,
        name: names.ContainerName,
        spec: dict[str, Any],
        devices: Sequence[Device],
        undo: contextlib.ExitStack,
    ) -> str:
        stamp = [records.device_record(device) for device in devices]
        container_id = self._engine.create(name.full, container_spec.stamped(spec, self._allocations.clock(), stamp))
        undo.callback(self._engine.remove, name.full)
        return container_id

    def _start(self, wish: Wish, _plan: Plan, _undo: contextlib.ExitStack) -> bool:
        self._engine.start(wish.name.full)
        self._started(wish.name)
        return True

    def _restart(self, wish: Wish, _plan: Plan, _undo: contextlib.ExitStack) -> bool:
        self._engine.restart(wish.name.full, wish.stop_timeout)
        self._started(wish.name)
        return True

    def _started(self, name: names.ContainerName) -> None:
        """It really runs: then its allocation is active."""
        container = self._engine.container(name.full)
        if container and container.command != container_spec.KEEP_ALIVE:
            # Anything but our own waiting process may end at once, and just not have done so yet.
            self._engine.ends_within(name.full, _SETTLE)
            container = self._engine.container(name.full)
        if container is None or container.status not in _RUNNING:
            words = self._engine.last_words(name.full) if container else ""
            raise Ds01Error(
                "container_failed",
                f"{name.full} stopped as soon as it was started{f': {words}' if words else ''}.",
                "Check the image's entry point and the command.",
            )
        if container.gpus:
            self._allocations.apply([Change("active", name, container_id=container.id)])
        self._note_devices(name)
        self._event("container.started", name)

    def _set_aside(self, wish: Wish, plan: Plan, undo: contextlib.ExitStack) -> bool:
        """Make room for the new container, and keep the old one until that is there."""
        name, record = wish.name, self._metadata(wish.name)
        running = plan.existing is not None and plan.existing.status in engine.RUNNING
        if record:
            undo.callback(self._put_metadata, name, record)
        if running:
            undo.callback(self._start_again, name)
            self._engine.stop(name.full, wish.stop_timeout)
        self._engine.rename(name.full, names.set_aside(name.full))
        undo.callback(self._take_back_name, name)
        return True

    def _take_back_name(self, name: names.ContainerName) -> None:
        """The old one is called again as it was; what stands there in its place goes."""
        new = self._engine.container(name.full)
        _check_ours(new)
        if new:
            self._engine.remove(name.full)
        self._engine.rename(names.set_aside(name.full), name.full)

    def _start_again(self, name: names.ContainerName) -> None:
        with contextlib.suppress(Ds01Error):  # why the new one could not be made is what has to be told
            self._engine.start(name.full)

    def _drop_old(self, name: names.ContainerName, report: Report) -> None:
        try:
            self._engine.remove(names.set_aside(name.full))
        except Ds01Error as exc:
            report.warnings.append(f"The old container could not be removed; the next request does so. {exc}")

    def left_aside(self, name: names.ContainerName) -> drift.Action | None:
        """What `put_back` would do now."""
        if exclusion.is_busy(self._lock, name.full):
            return None
        found = self._aside(name)
        return drift.of_aside(name, found.old.id, found.complete) if found else None

    def put_back(self, name: names.ContainerName) -> drift.Action | None:
        """Put right what a request that died left set aside, with an event; None where there is nothing, or a request
        works on it. Raises Ds01Error: `container_foreign` where another container has its name."""
        try:
            with exclusion.alone(self._lock, name.full, timeout=0):
                return self._put_back(name)
        except Ds01Error as exc:
            if exc.reason != "container_busy":
                raise
            return None

    def _put_back(self, name: names.ContainerName) -> drift.Action | None:
        """What a request that died had set aside: it takes its name again, unless the new one is complete."""
        found = self._aside(name)
        if found is None:
            return None
        if found.complete:
            self._engine.remove(found.old.name)
        else:
            self._note_return(name, found.old.id)
            self._take_back_name(name)
        action = drift.of_aside(name, found.old.id, found.complete)
        self._allocations.events.record(action, self._allocations.clock())
        return action

    def _aside(self, name: names.ContainerName) -> _Aside | None:
        """What is set aside under this name; not a container whose own name is like that."""
        old = self._engine.container(names.set_aside(name.full))
        if old is None or old.called != name.full or old.labels.get(engine.MANAGED) != "true":
            return None
        new = self._engine.container(name.full)
        _check_ours(new)
        # Where the record is the old one's again, the new one failed, and could not be removed.
        undone = self._metadata(name).get("container_id") == old.id
        return _Aside(old, bool(new and self._finished(name, new) and not undone))

    def _note_return(self, name: names.ContainerName, container_id: str) -> None:
        """Nobody could see it before: how long it is kept counts from now."""
        record = self._metadata(name)
        if record.get("container_id") == container_id:
            self._put_metadata(name, {**record, "put_back_at": units.format_time(self._allocations.clock())})

    def put_back_at(self, name: names.ContainerName, container_id: str) -> datetime | None:
        """When a container last got its name back; None: it always had it."""
        record = self._metadata(name)
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            return units.parse_time(record["put_back_at"]) if record.get("container_id") == container_id else None
        return None

    def _unpause(self, wish: Wish, _plan: Plan, _undo: contextlib.ExitStack) -> bool:
        self._engine.unpause(wish.name.full)
        return True

    def _stop(self, wish: Wish, plan: Plan, _undo: contextlib.ExitStack) -> bool:
        self._engine.stop(wish.name.full, wish.stop_timeout)
        if plan.existing and plan.existing.gpus:
            self._allocations.apply([Change("held", wish.name)])
        self._event("container.stopped", wish.name)
        return True

    def _remove(self, wish: Wish, _plan: Plan, _undo: contextlib.ExitStack) -> bool:
        self._engine.remove(wish.name.full)
        self._metadata_path(wish.name).unlink(missing_ok=True)
        self._event("container.removed", wish.name)
        return True

    def discard(self, name: names.ContainerName, container_id: str, why: str) -> bool:
        """Remove a container that does not run, and what belongs to it; False where it is gone, or another has its
        name by now. Raises Ds01Error: `engine_error` for one that was started meanwhile, `container_busy` while
        somebody else works on it."""
        with exclusion.alone(self._lock, name.full):
            there = self._engine.container(name.full)
            if there is None or there.id != container_id:
                return False
            self._engine.discard(container_id)
            self._metadata_path(name).unlink(missing_ok=True)
            self._event("container.removed", name, message=why)
            self._allocations.apply([Change("released", name)])
        return True

    def forget(self, name: names.ContainerName) -> bool:
        """Remove the record of a container that is gone; False where there is one by now. Raises Ds01Error."""
        with exclusion.alone(self._lock, name.full):
            if self._engine.container(name.full):
                return False
            self._metadata_path(name).unlink(missing_ok=True)
        return True

    def _release(self, wish: Wish, _plan: Plan, _undo: contextlib.ExitStack) -> bool:
        return self._allocations.apply([Change("released", wish.name)])[0].changed

    def _first_start(self, request: ContainerRequest, account: names.Account) -> None:
        """Make the user known inside before the first process runs: later starts cost nothing."""
        name, defaults = request.name.full, self._allocations.config.containers
        read = {key: self._engine.read_file(name, f"/etc/{key}") for key in ("passwd", "group", "shadow")}
        image = ImageFiles(
            **{key: None if data is None else data.decode(errors="surrogateescape") for key, data in read.items()},
            has_shell=self._engine.exists(name, defaults.shell),
            has_sudo=defaults.sudo and self._engine.exists(name, "/etc/sudoers.d"),
            has_bashrc=self._engine.exists(name, f"{userdb.home(account)}/.bashrc"),
        )
        self._engine.unpack(name, container_spec.first_start(request, account, defaults, image))

    def _image(self, name: str, seen: _Seen) -> engine.Image:
        """The image of a request. Raises Ds01Error `image_missing` or `invalid_input`."""
        image = seen.image(container_spec.check_image(name))
        if image is None:
            raise Ds01Error(
                "image_missing",
                f"There is no image {name} on this host.",
                "Build or load it first (docker build, docker load); see what is there with: docker images",
            )
        return image

    def _spec(self, request: ContainerRequest, image: engine.Image) -> dict[str, Any]:
        """The create call for a request; raises Ds01Error for whatever is wrong with it."""
        defaults = self._allocations.config.containers
        container_spec.check_env(request.env)
        container_spec.check_network(request.network_mode, defaults)
        parsed = [container_spec.parse_mount(text, defaults) for text in request.mounts]
        mounts = [workspace.check_mount(mount, defaults.allowed_mounts) for mount in parsed]
        account = _account(request.name)
        place = self._workspace(request, account)
        workspace.check(place, account)
        return container_spec.body(
            request,
            account,
            self._limits(request),
            defaults,
            [workspace.mount(place, container_spec.WORKSPACE), *mounts],
            image.labels,
            confinement.memlock(),
        )

    def _limits(self, request: ContainerRequest) -> Limits:
        return tightened(self._allocations.limits(request.name.user), request.limits)

    def _workspace(self, request: ContainerRequest, account: names.Account) -> str:
        template = self._allocations.config.containers.workspace
        return request.workspace or workspace.place(template, request.name.project, account)

    def _change(self, wish: Wish, plan: Plan) -> Change:
        """The allocation that this container needs: as requested, else as its labels say."""
        labels = plan.existing.labels if plan.existing else {}
        profile = wish.request.profile if wish.request else labels.get("ds01.profile") or None
        startable = "create" in plan.steps or (plan.existing and plan.existing.status not in engine.RUNNING)
        return Change(
            "allocated",
            wish.name,
            gpus=container_steps.gpus(wish, plan),
            profile=profile,
            startable=bool(startable),
            wait=wish.wait,
            reuse_held=wish.reuse_held,
        )

    @property
    def _lock(self) -> Path:
        return self._allocations.paths.state / "containers.lock"

    def _metadata_path(self, name: names.ContainerName) -> Any:
        return self._allocations.paths.metadata / f"{name.full}.json"

    def _note_devices(self, name: names.ContainerName) -> None:
        """Keep the record's devices true when a start bound the container to others."""
        record, allocation = self._metadata(name), self._allocations.allocation(name.full)
        if not record:
            return
        devices = [records.device_record(d) for d in allocation.devices] if allocation else []
        noted = {**record, "gpu_id": allocation.gpu_id if allocation else None, "devices": devices}
        if noted != record:
            self._put_metadata(name, noted)

    def _metadata(self, name: names.ContainerName) -> dict[str, Any]:
        """The container's record; empty where there is none to be read."""
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(self._metadata_path(name).read_bytes())
            return record if isinstance(record, dict) else {}
        return {}

    def _put_metadata(self, name: names.ContainerName, record: dict[str, Any]) -> None:
        path = self._metadata_path(name)
        try:
            files.make_directory(path.parent, 0o750)
            files.replace(path, json.dumps(record, indent=1).encode() + b"\n", 0o640)
        except OSError as exc:
            message = f"{path} cannot be written: {exc.strerror}."
            raise Ds01Error("permission_denied", message, files.remedy(exc)) from None

    def _event(self, event: str, name: names.ContainerName, **fields: Any) -> None:
        self._allocations.events.write(event, self._allocations.clock(), user=name.user, container=name.full, **fields)

    @property
    def _engine(self) -> engine.Engine:
        return self._allocations.engine


_Seen = engine.Engine | engine.Snapshot


_DONE = {
    "allocate": "allocated",
    "create": "created",
    "start": "started",
    "restart": "restarted",
    "unpause": "unpaused",
    "stop": "stopped",
    "remove": "removed",
    "set_aside": "removed",
    "release": "released",
}


# What a failure of a later step takes back, where a container was to be made anew.
_UNDONE = ("allocated", "removed", "created", "started")


def _devices(allocation: Mapping[str, Any] | None) -> Any:
    return allocation["devices"] if allocation else None


def _account(name: names.ContainerName) -> names.Account:
    account = accounts.lookup(name.user)
    if account is None:
        raise Ds01Error("unknown_user", f"There is no user {name.user!r} on this host.", "Check with: getent passwd")
    if account.uid == 0:
        raise Ds01Error("invalid_input", "Containers are not made for root.", "Name the user they are for.")
    return account


def _check_ours(container: engine.Container | None) -> None:
    if container and container.labels.get(engine.MANAGED) != "true":
        raise Ds01Error(
            "container_foreign",
            f"A container {container.name} exists, but DS01 did not make it.",
            "Rename or remove it with docker, then try again.",
        )


def _half_undone(failure: Ds01Error, left: Ds01Error, name: names.ContainerName, plan: Plan) -> Ds01Error:
    """Why a request failed, where what it had begun could not be taken back: what there is now, and the next step."""
    next_step = f"The next request for {name.full}, or ds01 reconcile, puts it right."
    if "set_aside" in plan.steps:
        old = names.set_aside(name.full)
        next_step = (
            f"If {name.full} is gone, it is there with its files as {old}: "
            "the next request for it, or ds01 reconcile, gives it its name again."
        )
    message = f"{failure.message} What was begun could not be taken back: {left.message}"
    return Ds01Error(failure.reason, message, f"{failure.hint} {next_step}".strip(), **failure.details)


def _raise_refusal(outcome: Outcome) -> None:
    if not outcome.ok:
        available = units.format_time(outcome.available_at) if outcome.available_at else None
        raise Ds01Error(outcome.reason, outcome.message, outcome.hint, available_at=available)
