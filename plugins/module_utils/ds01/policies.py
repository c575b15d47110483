"""When a running container has been idle, or has run, for too long: who is warned, and who is stopped. Pure.

Everything is measured in the time since boot, never by the calendar: a clock that jumps moves nobody nearer to a
stop. Idle time is what lies between two samples in a row that both show no use, at most LONGEST_STEP a pair, so
that neither a sample that is missing nor a night without samples counts. Running time goes on over restarts.

Nobody is stopped who was not warned in the same run, in an earlier look, `warning_time` ago, and not before the
time that the warning named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction

from . import names, units
from .drift import Action
from .enforcement import POLICIES, Enforcement, Exemption
from .limits import Config, resolve
from .model import Inventory, Ledger

IDLE, RUNTIME = POLICIES
SHORTEST_STEP = timedelta(seconds=20)
"""A look that follows the last one sooner tells nothing new: it takes three minutes, not three calls, to be idle."""
LONGEST_STEP = timedelta(minutes=10)
"""Of the time between two samples no more counts as idle: nobody looked."""
_WARNED_AT = {IDLE: (Fraction(8, 10), Fraction(95, 100)), RUNTIME: (Fraction(75, 100), Fraction(9, 10))}
"""The shares of the time after which the first and the last warning are given."""
_ZERO = timedelta(0)
_FOR_EVER = timedelta(days=999_999_000)
"""As far ahead as a time since boot is written."""
_LONGEST_GRACE = timedelta(days=7)
"""No socket waits for as long as a limits file may say."""


@dataclass(frozen=True)
class Clock:
    """Now: by the calendar (for people), and since boot, time asleep included (CLOCK_BOOTTIME)."""

    time: datetime
    uptime: timedelta
    boot_id: str


@dataclass(frozen=True)
class Watched:
    """One of DS01's containers. `id` is the engine's, `gpus` how many devices it asks for."""

    id: str
    name: str
    user: str
    gpus: int
    running: bool = True


@dataclass(frozen=True)
class Usage:
    """What a container has used since it started. `started` is the uptime at which its first process began,
    `memory` what it uses now, in bytes; `network` the bytes it sent and received (None: it has no network of its
    own, so nobody can tell)."""

    started: timedelta
    cpu: timedelta
    memory: int = 0
    network: int | None = None


@dataclass(frozen=True)
class DeviceUse:
    """A device now: the compute processes on it, its used memory in bytes, and its utilisation in percent (None:
    the driver tells none, as of every MIG device)."""

    processes: tuple[int, ...] = ()
    memory: int = 0
    utilization: int | None = None


@dataclass(frozen=True)
class Sample:
    """One look at a container. What could not be read is None, or not in `devices`, which are in the allocation's
    order; `keep_alive` is when the workspace's .keep-alive was last touched (None: there is none), where that is
    known."""

    usage: Usage | None = None
    devices: tuple[DeviceUse | None, ...] = ()
    keep_alive: datetime | None = None
    keep_alive_known: bool = True


@dataclass(frozen=True)
class Marks:
    """The last whole sample, to compare the next one with, and the uptime at which it was taken."""

    uptime: timedelta
    cpu: timedelta
    network: int | None
    devices: tuple[DeviceUse, ...]


@dataclass(frozen=True)
class Notice:
    """A warning: since when it stands, when its container may be stopped at the earliest (uptimes), and that time
    as people were told it. `stage` is 1 for the first warning, 2 for the last."""

    stage: int
    since: timedelta
    ends: timedelta
    told: datetime


@dataclass(frozen=True)
class Stop:
    """A stop that was decided: by which policy, and until when (an uptime) the container may take to end by itself.
    As long as it stands nobody has told that it happened."""

    policy: str
    until: timedelta


@dataclass(frozen=True)
class Run:
    """What is known of a container since it last started, as of the look at `seen`.

    `idle` is how long nothing has been used, `streak` how many samples in a row have shown that; `notices` are the
    warnings that stand, by policy, `exempted` the policies whose end an exemption has been noted to prevent, `stop`
    how the container is being stopped.
    """

    boot_id: str
    seen: timedelta
    idle: timedelta = _ZERO
    streak: int = 0
    marks: Marks | None = None
    notices: Mapping[str, Notice] = field(default_factory=dict)
    exempted: tuple[str, ...] = ()
    stop: Stop | None = None


@dataclass(frozen=True)
class KeepAlive:
    """A .keep-alive file as last touched, and for how long it has been honoured."""

    touched: datetime
    counted: timedelta


@dataclass(frozen=True)
class State:
    """What is remembered of a container, from one look to the next and over its restarts. `ran` is its running time
    in all its runs, `farewell` says why it is stopped, until it starts again."""

    ran: timedelta = _ZERO
    run: Run | None = None
    kept: KeepAlive | None = None
    farewell: str = ""

    @property
    def stopped(self) -> State:
        """The state once the stop is over, and was told."""
        return replace(self, run=None)

    @property
    def not_stopped(self) -> State:
        """The state where the stop could not be begun: the next look decides anew."""
        return replace(self, run=replace(self.run, stop=None) if self.run else None, farewell="")


@dataclass(frozen=True)
class Rules:
    """What holds for one container now. None is never; `shortened_from` is its idle_timeout without high demand,
    where that differs, `kept` how long it is kept once it stopped."""

    idle_timeout: timedelta | None = None
    max_runtime: timedelta | None = None
    enforcement: Enforcement = field(default_factory=Enforcement)
    shortened_from: timedelta | None = None
    exemptions: Mapping[str, Exemption] = field(default_factory=dict)
    kept: timedelta | None = None

    def limit(self, policy: str) -> timedelta | None:
        return self.idle_timeout if policy == IDLE else self.max_runtime


@dataclass(frozen=True)
class Decision:
    """What follows for one container: what to tell (policy.warned, policy.exempted, and policy.stopped for a stop that
    happened and that nobody told), whether to stop it, what to remember before that, and what the notice in its
    workspace says now (empty: there is none)."""

    state: State
    actions: tuple[Action, ...] = ()
    notice: str = ""
    stop: Action | None = None


@dataclass(frozen=True)
class Review:
    """The decisions on all containers: states by container id, notices by container name; what to tell, and whom to
    stop then."""

    states: Mapping[str, State]
    actions: tuple[Action, ...]
    notices: Mapping[str, str]
    stops: tuple[Action, ...] = ()


def high_demand(config: Config, inventory: Inventory, ledger: Ledger) -> bool:
    """Whether so many devices are allocated, held ones included, that idle times are shortened."""
    threshold = config.policies.high_demand_threshold
    if threshold is None or not inventory.devices:
        return False
    taken = sum(ledger.holder_of(device) is not None for device in inventory.devices)
    return taken >= Fraction(str(threshold)) * len(inventory.devices)


def rules_of(config: Config, container: Watched, time: datetime, *, demand: bool) -> Rules:
    """What holds for a container. `demand`: whether demand is high."""
    limits, enforcement = resolve(config, container.user), config.enforcement_of(container.user)
    reduction = enforcement.high_demand_idle_reduction
    idle, shortened_from = limits.idle_timeout, None
    if demand and idle is not None and reduction is not None and reduction < 1:
        idle, shortened_from = idle * reduction, idle
    found = {
        policy: exemption
        for exemption in config.exemptions
        for policy in POLICIES
        if exemption.covers(policy, container.user, container.name, time)
    }
    return Rules(idle, limits.max_runtime, enforcement, shortened_from, found, limits.container_hold_after_stop)


def review(
    containers: Iterable[Watched],
    samples: Mapping[str, Sample],
    states: Mapping[str, State],
    rules: Callable[[Watched], Rules],
    clock: Clock,
) -> Review:
    """The decision on each container that the engine has, running or not; `samples` and `states` are by id.

    The state of a container that is not among them is forgotten: it was removed.
    """
    decisions = {
        c: decide(c, samples.get(c.id, Sample()), states.get(c.id, State()), rules(c), clock) for c in containers
    }
    return Review(
        states={c.id: d.state for c, d in decisions.items() if d.state != State()},
        actions=tuple(action for d in decisions.values() for action in d.actions),
        notices={c.name: d.notice for c, d in decisions.items() if d.notice},
        stops=tuple(d.stop for d in decisions.values() if d.stop),
    )


def decide(container: Watched, sample: Sample, state: State, rules: Rules, clock: Clock) -> Decision:
    """What follows from one look at a container."""
    stop = state.run.stop if state.run else None
    if not container.running:
        told = (_told_late(container, state, stop),) if stop else ()
        return Decision(state.stopped, told, state.farewell)
    before = _same_run(state, sample.usage, clock)
    if before and stop and clock.uptime < stop.until:
        return Decision(state, notice=_notice(container, state, rules))  # the engine is at it
    # It runs anew; where its use cannot be read, it may as well be the old run that does not end.
    told = (_told_late(container, state, stop),) if stop and sample.usage and before is None else ()
    state = replace(state, run=replace(before, stop=None) if before else None, farewell="")
    if before is None or clock.uptime - before.seen >= SHORTEST_STEP:
        state = _seen(container, sample, state, rules, clock)
    decision = _judged(container, state, rules, clock)
    return replace(decision, actions=(*told, *decision.actions))


def _told_late(container: Watched, state: State, stop: Stop) -> Action:
    """A stop that happened, and that nobody told: who asked for it died, or did not wait so long."""
    return Action("policy.stopped", container.name, state.farewell.strip(), container.user, {"policy": stop.policy})


def _same_run(state: State, usage: Usage | None, clock: Clock) -> Run | None:
    """The run that was last seen, if it still lasts: nothing of it outlives a restart, or the boot. Where it cannot
    be told, it does, but for one that was to be stopped by now."""
    run = state.run
    if run is None or run.boot_id != clock.boot_id or clock.uptime < run.seen:
        return None
    lasts = usage.started <= run.seen if usage else run.stop is None or clock.uptime < run.stop.until
    return run if lasts else None


def _seen(container: Watched, sample: Sample, state: State, rules: Rules, clock: Clock) -> State:
    """The state after a look: how long it ran and was idle by now."""
    started = sample.usage.started if sample.usage else clock.uptime
    run = state.run or Run(clock.boot_id, min(started, clock.uptime))
    passed = clock.uptime - run.seen
    kept = _kept(state.kept, sample, passed, clock)
    run = replace(_counted(run, _used(container, sample, run.marks, rules, clock, kept), passed), seen=clock.uptime)
    marks = _marks(container, sample, clock)
    return replace(state, ran=state.ran + passed, run=replace(run, marks=marks or run.marks), kept=kept)


def _kept(before: KeepAlive | None, sample: Sample, passed: timedelta, clock: Clock) -> KeepAlive | None:
    """The .keep-alive file, with the time it has counted. Its own age is taken once, when it is first seen, and is
    no less than nothing: a file of the future counts as touched just now. One that cannot be looked for stays as it
    was."""
    if sample.keep_alive is None and sample.keep_alive_known:
        return None
    touched = sample.keep_alive.replace(microsecond=0) if sample.keep_alive else None
    if before and touched in (None, before.touched):
        return KeepAlive(before.touched, before.counted + passed)
    return KeepAlive(touched, max(clock.time - touched, _ZERO)) if touched else None


def _counted(run: Run, used: bool | None, passed: timedelta) -> Run:
    """The run with its idle time, after a sample that showed use, none, or (None) could not tell."""
    if used:
        others = {policy: notice for policy, notice in run.notices.items() if policy != IDLE}
        return replace(run, idle=_ZERO, streak=0, notices=others)
    if used is None:
        return replace(run, streak=0)
    between = min(passed, LONGEST_STEP) if run.streak else _ZERO
    follows = run.streak and passed <= LONGEST_STEP
    return replace(run, idle=run.idle + between, streak=run.streak + 1 if follows else 1)


def _used(
    container: Watched, sample: Sample, marks: Marks | None, rules: Rules, clock: Clock, kept: KeepAlive | None
) -> bool | None:
    """Whether the container is in use; None where that cannot be told. One without GPUs always is: it keeps
    nobody from one."""
    enforcement = rules.enforcement
    if not container.gpus or (kept and _within(kept.counted, enforcement.keepalive_max_duration)):
        return True
    if sample.usage and _within(clock.uptime - sample.usage.started, enforcement.grace_period):
        return True
    if _shows_use(sample, marks, enforcement, clock):
        return True
    whole = sample.keep_alive_known and _marks(container, sample, clock)
    return False if whole and marks else None


def _within(age: timedelta, limit: timedelta | None) -> bool:
    return limit is None or age < limit


def _shows_use(sample: Sample, marks: Marks | None, enforcement: Enforcement, clock: Clock) -> bool:
    """Whether any sign of use reaches its threshold: the devices' own first, then CPU and network."""
    before: tuple[DeviceUse | None, ...] = marks.devices if marks else ()
    before = before if len(before) == len(sample.devices) else (None,) * len(sample.devices)
    if any(now and _device_used(now, last, enforcement) for now, last in zip(sample.devices, before, strict=True)):
        return True
    if not (sample.usage and marks):
        return False
    cpu, percent = sample.usage.cpu - marks.cpu, enforcement.cpu_idle_threshold
    if percent is not None and cpu > _ZERO and cpu * 100 >= (clock.uptime - marks.uptime) * percent:
        return True
    moved = (sample.usage.network or 0) - (marks.network or 0)
    return enforcement.network_idle_threshold is not None and moved > 0 and moved >= enforcement.network_idle_threshold


def _device_used(now: DeviceUse, last: DeviceUse | None, enforcement: Enforcement) -> bool:
    """Utilisation, where the driver tells it, else memory that was taken or given back; and in any case a process
    that came or went."""
    threshold = enforcement.gpu_idle_threshold
    if now.utilization and threshold is not None and now.utilization >= threshold:
        return True
    if last is None:
        return False
    changed = now.utilization is None and now.memory != last.memory
    return changed or set(now.processes) != set(last.processes)


def _marks(container: Watched, sample: Sample, clock: Clock) -> Marks | None:
    """The sample, if it is whole."""
    devices = tuple(device for device in sample.devices if device)
    if sample.usage is None or len(devices) < max(container.gpus, len(sample.devices)):
        return None
    return Marks(clock.uptime, sample.usage.cpu, sample.usage.network, devices)


def _judged(container: Watched, state: State, rules: Rules, clock: Clock) -> Decision:
    """Warnings and the stop, policy by policy; one stop is enough."""
    actions: list[Action] = []
    for policy in POLICIES:
        state, action = _policy(policy, container, state, rules, clock)
        actions += [action] if action else []
    stop = next((action for action in actions if action.kind == "policy.stopped"), None)
    if stop is None or state.run is None:
        return Decision(state, tuple(actions), _notice(container, state, rules))
    run = replace(state.run, stop=Stop(stop.details["policy"], clock.uptime + _grace(rules)))
    return Decision(
        replace(state, run=run, farewell=f"{stop.message}\n"), notice=_notice(container, state, rules), stop=stop
    )


def _policy(policy: str, container: Watched, state: State, rules: Rules, clock: Clock) -> tuple[State, Action | None]:
    """The state with this policy's warning as it stands now, and what there is to do."""
    run, limit = state.run, rules.limit(policy)
    if run is None:
        return state, None
    measured = run.idle if policy == IDLE else state.ran
    stage = 0 if limit is None else _stage(policy, measured, limit, rules)
    exemption = rules.exemptions.get(policy)
    if limit is None or not stage or exemption:
        state = _with_notice(state, run, policy, None)
        kept = exemption if limit is not None and measured >= limit and _is_sure(policy, run, rules) else None
        return _exempted(policy, container, state, kept) if kept else (state, None)
    if not _is_sure(policy, run, rules):
        return state, None
    notice = run.notices.get(policy)
    if notice and measured >= limit and _may_end(notice, rules, clock):
        return state, _stopped(policy, container, measured, rules, notice, clock)
    later = _updated(notice, stage, limit - measured, rules, clock)
    state = _with_notice(state, run, policy, later)
    is_news = notice is None or later.stage > notice.stage or later.since > notice.since
    return state, _warned(policy, container, measured, rules, later) if is_news else None


def _is_sure(policy: str, run: Run, rules: Rules) -> bool:
    """Whether enough samples in a row have shown that nothing is used; running needs no second look."""
    return policy == RUNTIME or run.streak >= rules.enforcement.idle_detection_window


def _stage(policy: str, measured: timedelta, limit: timedelta, rules: Rules) -> int:
    """0: nothing to say yet; 1: time for the first warning; 2: for the last. Where the share leaves less than
    `warning_time`, the first comes so much earlier that the stop can still come in time."""
    first, last = (limit / share.denominator * share.numerator for share in _WARNED_AT[policy])
    first = min(first, max(limit - (rules.enforcement.warning_time or _ZERO), _ZERO))
    if measured >= last:
        return 2
    return 1 if measured >= first else 0


def _may_end(notice: Notice, rules: Rules, clock: Clock) -> bool:
    """Whether a warning is old enough, and the time that it named is over."""
    age, lead = clock.uptime - notice.since, rules.enforcement.warning_time
    return lead is not None and age >= max(lead, SHORTEST_STEP) and clock.uptime >= notice.ends


def _updated(notice: Notice | None, stage: int, left: timedelta, rules: Rules, clock: Clock) -> Notice:
    """The warning that stands after this look. One whose end has come nearer is a new warning: nobody is stopped
    before the time that he was told."""
    lead = max(rules.enforcement.warning_time or _ZERO, SHORTEST_STEP)
    expected = clock.uptime + min(max(left, _ZERO), _FOR_EVER)
    earliest = max(expected, clock.uptime + min(lead, _FOR_EVER))
    if notice is None or earliest < notice.ends:
        return Notice(stage, clock.uptime, earliest, _calendar(clock, earliest))
    if expected > notice.ends + LONGEST_STEP:
        notice = replace(notice, ends=expected, told=_calendar(clock, expected))
    return replace(notice, stage=max(stage, notice.stage))


def _calendar(clock: Clock, uptime: timedelta) -> datetime:
    """The time at this uptime, in whole minutes, for people."""
    return units.after(clock.time, uptime - clock.uptime).replace(second=0, microsecond=0)


def _with_notice(state: State, run: Run, policy: str, notice: Notice | None) -> State:
    kept = {name: other for name, other in run.notices.items() if name != policy}
    if notice:
        kept[policy] = notice
    return state if kept == run.notices else replace(state, run=replace(run, notices=kept))


def _exempted(policy: str, container: Watched, state: State, exemption: Exemption) -> tuple[State, Action | None]:
    """Noted once a run: the time is over, and an exemption keeps the container."""
    run = state.run
    if run is None or policy in run.exempted:
        return state, None
    until = f" until {_text_time(exemption.expires)}" if exemption.expires else ""
    message = (
        f"{container.name} is kept past its {policy}{until}: {exemption.reason} (approved by {exemption.approved_by})."
    )
    details = {"policy": policy, "reason": exemption.reason, "approved_by": exemption.approved_by}
    action = Action("policy.exempted", container.name, message, container.user, details)
    return replace(state, run=replace(run, exempted=(*run.exempted, policy))), action


def _warned(policy: str, container: Watched, measured: timedelta, rules: Rules, notice: Notice) -> Action:
    message = _warning(policy, container, measured, rules, notice)
    details = {**_details(policy, measured, rules), "stage": "last" if notice.stage > 1 else "first"}
    if rules.enforcement.warning_time is not None:
        details["stops_at"] = units.format_time(notice.told)
    return Action("policy.warned", container.name, message, container.user, details)


def _stopped(
    policy: str, container: Watched, measured: timedelta, rules: Rules, notice: Notice, clock: Clock
) -> Action:
    message = (
        f"{container.name} is stopped: {_what(policy, container, measured)}, and its {policy} is "
        f"{_limit_text(policy, rules)}. Its user was warned that it would be at {_text_time(notice.told)}. "
        f"{_afterwards(policy, rules, clock)}"
    )
    details = {
        **_details(policy, measured, rules),
        "stop_timeout": _grace(rules).total_seconds(),
        "container_id": container.id,
    }
    return Action("policy.stopped", container.name, message, container.user, details)


def _grace(rules: Rules) -> timedelta:
    return min(rules.enforcement.sigterm_grace, _LONGEST_GRACE)


def _afterwards(policy: str, rules: Rules, clock: Clock) -> str:
    """What becomes of it, and of its files. It is kept a little longer than is said here: it stops after this look."""
    if rules.kept is None:
        text = "Its files are kept, and it can be started again."
    elif not rules.kept:
        return "It is removed, with all its files but those in /workspace."
    else:
        until = _text_time(units.after(clock.time, rules.kept))
        text = f"It can be started again until {until}; then it is removed, with all its files but those in /workspace."
    return text if policy == IDLE else f"{text} {_AGAIN}"


_AGAIN = "The time counts over restarts: for more, make a new container or ask for an exemption."


def _details(policy: str, measured: timedelta, rules: Rules) -> dict[str, object]:
    limit = rules.limit(policy)
    return {"policy": policy, "measured": units.format_duration(measured), "limit": units.format_duration(limit)}


def _warning(policy: str, container: Watched, measured: timedelta, rules: Rules, notice: Notice) -> str:
    """What a user is told; it stays the same as long as the warning does."""
    sentences = [
        f"{container.name}: {_what(policy, container, measured)}; its {policy} is {_limit_text(policy, rules)}."
    ]
    if rules.enforcement.warning_time is None:
        return f"{sentences[0]} Please stop it if you no longer need it."
    sentences.append(_ends(policy, notice))
    return " ".join([*sentences, *_hints(policy, rules)])


def _ends(policy: str, notice: Notice) -> str:
    unless = ", unless it is used before" if policy == IDLE else ""
    return f"It will be stopped at {_text_time(notice.told)}{unless}."


def _hints(policy: str, rules: Rules) -> list[str]:
    if policy == RUNTIME:
        return ["Save your work before."]
    keep = rules.enforcement.keepalive_max_duration
    if keep == _ZERO:
        return []
    how_long = f" for {units.format_duration(keep)}" if keep else ""
    return [f"To keep it{how_long}: touch /workspace/.keep-alive"]


def _notice(container: Watched, state: State, rules: Rules) -> str:
    """The text of the file in the workspace: the warnings that stand. It does not change while they do not."""
    if state.run is None:
        return ""
    lines = []
    for policy, notice in state.run.notices.items():
        reached = f"{container.name} {_WHAT[policy]} for long, and its {policy} is {_limit_text(policy, rules)}."
        ends = [] if rules.enforcement.warning_time is None else [_ends(policy, notice), *_hints(policy, rules)]
        lines.append(" ".join([reached, *ends]))
    return "".join(f"{line}\n" for line in lines)


_WHAT = {IDLE: "has not been used", RUNTIME: "has been running"}


def _what(policy: str, container: Watched, measured: timedelta) -> str:
    minutes = measured // timedelta(minutes=1)
    span = units.format_duration(timedelta(minutes=minutes)) if minutes else "less than a minute"
    if policy == RUNTIME:
        return f"it has been running for {span}"
    return f"its GPU{'s have' if container.gpus > 1 else ' has'} not been used for {span}"


def _limit_text(policy: str, rules: Rules) -> str:
    text = units.format_duration(rules.limit(policy))
    if policy == IDLE and rules.shortened_from is not None:
        return f"{text} while most GPUs are taken ({units.format_duration(rules.shortened_from)} otherwise)"
    return text


def _text_time(time: datetime) -> str:
    return time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def notice_file(container: str) -> str:
    """The name of the file in the workspace that says what happens to a container. Several may share a workspace."""
    return f"DS01-NOTICE-{names.split(container)[0]}.txt"
