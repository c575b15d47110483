"""Idle and running time: who is warned, who is stopped, and who is left alone. Each case a minute before, at, and
after its boundary, as a minute-by-minute story."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from ds01.limits import parse_config
from ds01.model import Ledger
from ds01.policies import (
    IDLE,
    LONGEST_STEP,
    RUNTIME,
    SHORTEST_STEP,
    DeviceUse,
    Sample,
    State,
    Usage,
    Watched,
    decide,
    high_demand,
    notice_file,
    review,
    rules_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_world import CONTAINER, HOUR, MIB, MINUTE, NOTHING, World, world
from support import NOW, config_of, machine, taken

FULL = DeviceUse((4711,), 500 * MIB, 0)
MIG = DeviceUse((4711,), 500 * MIB)
CPU_ONLY = replace(CONTAINER, gpus=0)
TWO = replace(CONTAINER, gpus=2)
HALF_HOUR = {"idle_timeout": "30m"}


# What a minute may hold: each is done before the look at its end.
def nothing(_: World) -> None:
    pass


def utilised(percent: int) -> Callable[[World], None]:
    return lambda w: setattr(w, "device", replace(w.device, utilization=percent))


def computing(seconds: float) -> Callable[[World], None]:
    def burn(w: World) -> None:
        w.cpu += timedelta(seconds=seconds)

    return burn


def transferring(size: int) -> Callable[[World], None]:
    def move(w: World) -> None:
        w.network = (w.network or 0) + size

    return move


def allocating(w: World) -> None:
    w.device = replace(w.device, memory=w.device.memory + MIB)


def spawning(w: World) -> None:
    w.device = replace(w.device, processes=(w.device.processes[0] + 1,))


@dataclass(frozen=True)
class Case:
    """A container that does this each minute: idle (so stopped at 30 minutes), or in use."""

    each: Callable[[World], None]
    idle: bool
    device: DeviceUse = FULL
    policies: dict[str, Any] | None = None
    container: Watched = CONTAINER


SIGNS: dict[str, Case] = {
    "a kernel that sits on a GPU": Case(nothing, idle=True),
    "a GPU without any process": Case(nothing, idle=True, device=DeviceUse((), 0, 0)),
    "utilisation below the threshold": Case(utilised(4), idle=True),
    "utilisation at the threshold": Case(utilised(5), idle=False),
    "utilisation below an own threshold": Case(utilised(9), idle=True, policies={"gpu_idle_threshold": 10}),
    "utilisation that does not count": Case(utilised(100), idle=True, policies={"gpu_idle_threshold": None}),
    "threshold 0, utilisation 0": Case(utilised(0), idle=True, policies={"gpu_idle_threshold": 0}),
    "threshold 0, utilisation 1": Case(utilised(1), idle=False, policies={"gpu_idle_threshold": 0}),
    "one process after another": Case(spawning, idle=False),
    "memory of a whole GPU changes": Case(allocating, idle=True),
    "CPU below the threshold": Case(computing(1.19), idle=True),
    "CPU at the threshold: 2 % of a core": Case(computing(1.2), idle=False),
    "CPU that does not count": Case(computing(60), idle=True, policies={"cpu_idle_threshold": None}),
    "CPU threshold 0, none used": Case(nothing, idle=True, policies={"cpu_idle_threshold": 0}),
    "CPU threshold 0, a little used": Case(computing(0.001), idle=False, policies={"cpu_idle_threshold": 0}),
    "network below the threshold": Case(transferring(MIB - 1), idle=True),
    "network at the threshold": Case(transferring(MIB), idle=False),
    "network threshold with a unit": Case(transferring(MIB), idle=True, policies={"network_idle_threshold": "2m"}),
    "network that does not count": Case(transferring(99 * MIB), idle=True, policies={"network_idle_threshold": None}),
    "network threshold 0, nothing sent": Case(nothing, idle=True, policies={"network_idle_threshold": 0}),
    "network threshold 0, a byte": Case(transferring(1), idle=False, policies={"network_idle_threshold": 0}),
    "MIG: a kernel that sits there": Case(nothing, idle=True, device=MIG),
    "MIG: no process": Case(nothing, idle=True, device=DeviceUse()),
    "MIG: memory changes": Case(allocating, idle=False, device=MIG),
    "MIG: processes change": Case(spawning, idle=False, device=MIG),
    "MIG: CPU below the threshold": Case(computing(1.19), idle=True, device=MIG),
    "MIG: CPU at the threshold": Case(computing(1.2), idle=False, device=MIG),
    "two devices, one of them in use": Case(utilised(50), idle=False, container=TWO),
    "two devices, none in use": Case(nothing, idle=True, container=TWO),
    "without GPUs": Case(nothing, idle=False, container=CPU_ONLY),
}


@pytest.mark.parametrize("case", SIGNS.values(), ids=SIGNS.keys())
@pytest.mark.parametrize(("minutes", "over"), [(29, False), (30, True), (31, True)])
def test_signs_of_use(case: Case, minutes: int, over: bool) -> None:
    w = World(config_of(**HALF_HOUR, max_runtime=None, policies=strict(case.policies)), case.container, case.device)
    w.minutes(1, case.each)  # something to compare with
    w.minutes(1, case.each)  # the first sample that may show that nothing is used
    w.minutes(minutes, case.each)
    assert (w.stopped_at() is not None) is (case.idle and over)
    if not case.idle:
        assert (w.told, w.last.notice) == ([], "")


def strict(policies: dict[str, Any] | None) -> dict[str, Any]:
    return {"grace_period": 0, "idle_detection_window": 1, **(policies or {})}


def idle(minutes: int, **document: Any) -> World:
    """A container that has been seen idle for so long, from the second look on."""
    return world(**document).minutes(1).minutes(minutes)


@pytest.mark.parametrize(
    ("document", "first", "last", "stopped"),
    [
        pytest.param({"idle_timeout": "10h"}, 480, 570, 600, id="at 80 % and 95 %"),
        pytest.param({"idle_timeout": "30m"}, 15, 29, 30, id="15 minutes before, where 20 % is less"),
        pytest.param({"idle_timeout_h": 0.5}, 15, 29, 30, id="in the old key"),
        pytest.param({"idle_timeout": "10h", "policies": {"warning_time": "5h"}}, 300, 570, 600, id="5 h before"),
        pytest.param({"idle_timeout": "10m"}, 0, 10, 15, id="shorter than the warning: it counts from the first"),
        pytest.param({"idle_timeout": 0}, None, 0, 15, id="zero is at once, but not without a warning"),
        pytest.param({"idle_timeout": "10h", "policies": {"warning_time": 0}}, 480, 570, 600, id="no time to react"),
        pytest.param({"idle_timeout": 0, "policies": {"warning_time": 0}}, None, 0, 1, id="never in the same look"),
        pytest.param({"idle_timeout": "1h", "policies": {"warning_time": None}}, 48, 57, None, id="only ever warned"),
    ],
)
def test_warned_first_then_warned_a_last_time_then_stopped(
    document: dict[str, Any], first: int | None, last: int, stopped: int | None
) -> None:
    w = idle(700, **document)
    expected = [(first, "warned"), (last, "last warned"), (stopped, "stopped")]
    if last == stopped or (document.get("idle_timeout") == "10m"):
        expected = [(first, "warned"), (10, "last warned"), (15, "stopped")]
    assert w.kinds() == [(minute + 1, what) for minute, what in expected if minute is not None]


@pytest.mark.parametrize(
    ("max_runtime", "first", "last", "stopped"), [("10h", 450, 540, 600), ("168h", 7560, 9072, 10080)]
)
def test_running_time_counts_whatever_is_used(max_runtime: str, first: int, last: int, stopped: int) -> None:
    for container in (CONTAINER, CPU_ONLY):
        w = world(container, max_runtime=max_runtime).minutes(stopped - 1, computing(60))
        assert w.kinds() == [(first, "warned"), (last, "last warned")]
        assert w.minutes(1, computing(60)).stopped_at() == stopped


def test_null_is_never() -> None:
    assert idle(3000).told == []


def test_a_word_of_warning_says_what_happens_when_and_what_helps() -> None:
    w = idle(15, **HALF_HOUR)
    (_, action), *rest = w.told
    assert not rest
    assert (action.kind, action.subject, action.user) == ("policy.warned", CONTAINER.name, "alice")
    assert action.message == (
        "p._.alice: its GPU has not been used for 15m; its idle_timeout is 30m. It will be stopped at "
        "2025-11-21 11:01 UTC, unless it is used before. To keep it for 24h: touch /workspace/.keep-alive"
    )
    assert action.details == {
        "policy": IDLE,
        "measured": "15m",
        "limit": "30m",
        "stage": "first",
        "stops_at": "2025-11-21T11:01:00Z",
    }
    before = w.last.notice
    assert "will be stopped at 2025-11-21 11:01 UTC" in before
    assert w.minutes(10).last.notice == before  # the file is written once
    w.minutes(5)
    stop = w.told[-1][1]
    assert stop.details == {
        "policy": IDLE,
        "measured": "30m",
        "limit": "30m",
        "stop_timeout": 60,
        "container_id": CONTAINER.id,
    }
    assert stop.message == (
        "p._.alice is stopped: its GPU has not been used for 30m, and its idle_timeout is 30m. Its user was warned "
        "that it would be at 2025-11-21 11:01 UTC. It can be started again until 2025-11-21 23:01 UTC; then it is "
        "removed, with all its files but those in /workspace."
    )
    assert w.last.notice == before  # it is not stopped yet
    after = w.minutes(1).last.notice
    assert after == f"{stop.message}\n"
    assert w.minutes(60).last.notice == after  # until it starts again
    assert w.start().look().notice == ""


@pytest.mark.parametrize(
    ("hold", "says"),
    [
        (
            "12h",
            "It can be started again until 2025-11-21 23:01 UTC; then it is removed, with all its files but those in",
        ),
        (None, "Its files are kept, and it can be started again."),
        (0, "It is removed, with all its files but those in /workspace."),
    ],
)
def test_whoever_is_stopped_is_told_how_long_the_files_are_kept(hold: Any, says: str) -> None:
    w = idle(30, **HALF_HOUR, container_hold_after_stop=hold)
    assert says in w.told[-1][1].message


def test_less_than_a_minute_is_no_0() -> None:
    w = world(max_runtime="1m")
    assert w.told[-1][1].message.startswith("p._.alice: it has been running for less than a minute; its max_runtime")


# --- stops that take their time, or that nobody told


def test_one_that_takes_its_time_to_end_is_asked_once_in_that_time() -> None:
    w = world(max_runtime="30m", policies={"sigterm_grace": "10m"})
    w.deaf = True
    w.minutes(49)
    stops = [minute for minute, what in w.kinds() if what == "stopped"]
    assert stops == [30, 40]
    assert "will be stopped" in w.last.notice


def test_one_that_ended_after_all_is_told_once() -> None:
    """Whoever asked the engine to stop it died, or did not wait so long."""
    w = world(max_runtime="30m", policies={"sigterm_grace": "10m"})
    w.deaf = True
    w.minutes(32)
    before = len(w.told)
    w.stop()
    w.minutes(3)
    (late,) = (action for _, action in w.told[before:])
    assert (late.kind, late.subject, late.user) == ("policy.stopped", CONTAINER.name, "alice")
    assert late.message.startswith("p._.alice is stopped: it has been running for 30m")
    assert (late.details, w.last.notice) == ({"policy": RUNTIME}, f"{late.message}\n")


def test_one_that_ended_and_was_started_again_since_is_told_and_not_stopped_for_it() -> None:
    w = world(max_runtime="30m", policies={"sigterm_grace": "10m"})
    w.deaf = True
    w.minutes(31)
    before = len(w.told)
    w.start().minutes(1)
    assert [what for _, what in w.kinds()][before:] == ["stopped", "last warned"]
    assert (w.last.stop, w.running) == (None, True)
    assert [what for _, what in w.minutes(13).kinds()][before:] == ["stopped", "last warned"]


def test_nobody_says_of_one_that_cannot_be_seen_that_it_ended() -> None:
    w = world(max_runtime="30m", policies={"sigterm_grace": "2m"})
    w.deaf = True
    w.minutes(30)
    before = len(w.told)
    w.minutes(5, sample=NOTHING)
    assert [what for _, what in w.kinds()][before:] == ["last warned"]


def test_one_whose_stop_could_not_be_begun_is_stopped_at_the_next_look() -> None:
    w = world(max_runtime="30m", policies={"sigterm_grace": "10m"})
    w.deaf = True
    w.minutes(30)
    w.state = w.state.not_stopped
    w.minutes(1)
    assert [minute for minute, what in w.kinds() if what == "stopped"] == [30, 31]


def test_whoever_uses_it_again_has_all_the_time_again() -> None:
    w = idle(29, **HALF_HOUR)
    w.minutes(1, utilised(80))
    assert (w.last.notice, w.stopped_at()) == ("", None)
    w.device = replace(w.device, utilization=0)
    w.minutes(1).minutes(29)
    assert w.stopped_at() is None
    assert w.minutes(1).stopped_at() == 62


@pytest.mark.parametrize(("window", "stopped"), [(1, 16), (3, 18), (10, 25)])
def test_so_many_samples_in_a_row_before_anything_is_said(window: int, stopped: int) -> None:
    w = world(idle_timeout=0, policies={"idle_detection_window": window})
    w.minutes(1).minutes(60)
    assert w.kinds() == [(window, "last warned"), (stopped, "stopped")]


def test_calls_in_quick_succession_are_one_sample() -> None:
    w = world(idle_timeout=0, policies={"idle_detection_window": 3})
    w.minutes(1)
    for _ in range(50):
        w.wait(SHORTEST_STEP / 60)
        before = w.state
        w.look()
        assert w.state == before
    assert w.told == []
    assert w.minutes(2).kinds()


@pytest.mark.parametrize(("grace", "stopped"), [("30m", 60), ("0.25h", 45), (0, 31), (None, None)])
def test_the_first_time_after_a_start_is_not_idle(grace: Any, stopped: float | None) -> None:
    w = world(**HALF_HOUR, policies={"grace_period": grace})
    assert w.minutes(500).stopped_at() == stopped


def test_grace_again_after_every_start() -> None:
    w = world(**HALF_HOUR, policies={"grace_period": "30m"}).minutes(60)
    assert not w.running
    w.minutes(600)
    assert w.start().minutes(59).running
    assert not w.minutes(1).running


KEPT: dict[str, tuple[Any, timedelta, float | None]] = {
    "for a day": ("24h", timedelta(0), 24 * 60 + 30),
    "for an hour": ("1h", timedelta(0), 90),
    "touched half an hour before": ("1h", 30 * MINUTE, 60),
    "left over from yesterday": ("1h", 24 * HOUR, 31),
    "from the future": ("1h", -9999 * HOUR, 90),
    "not honoured": (0, timedelta(0), 31),
    "as long as it is there": (None, 9999 * HOUR, None),
}


@pytest.mark.parametrize(("most", "age", "stopped"), KEPT.values(), ids=KEPT.keys())
def test_a_keep_alive_file_is_use_up_to_a_limit(most: Any, age: timedelta, stopped: float | None) -> None:
    w = World(config_of(**HALF_HOUR, max_runtime=None, policies=strict({"keepalive_max_duration": most})))
    w.keep_alive = NOW - age
    w.look()
    assert w.minutes(1500).stopped_at() == stopped


def test_a_keep_alive_file_that_is_touched_again_counts_anew_and_one_that_is_gone_not_at_all() -> None:
    w = world(**HALF_HOUR, policies={"keepalive_max_duration": "1h"})
    w.keep_alive = w.time
    w.minutes(50)
    w.keep_alive = w.time
    assert w.minutes(89).running
    assert not w.minutes(1).running
    w = world(**HALF_HOUR)
    w.keep_alive = w.time
    w.minutes(50)
    w.keep_alive = None
    assert w.minutes(30).running
    assert not w.minutes(1).running


def test_a_keep_alive_file_that_cannot_be_seen_any_more_counts_on_and_no_longer_than_it_may() -> None:
    w = world(**HALF_HOUR, policies={"keepalive_max_duration": "1h"})
    w.keep_alive = w.time
    w.minutes(50)
    for _ in range(600):
        w.wait(MINUTE).look(replace(w.sample(), keep_alive=None, keep_alive_known=False))
    assert w.running, "whether it was touched again nobody knows"
    assert w.minutes(30).running, "that it is still the same one counts from its first look"
    assert not w.minutes(1).running


def test_a_keep_alive_file_does_not_prolong_the_running_time() -> None:
    w = world(max_runtime="10h")
    w.keep_alive = w.time
    assert w.minutes(600).stopped_at() == 600


UNREAD: dict[str, Callable[[World], Sample]] = {
    "nothing": lambda _: NOTHING,
    "no cgroup": lambda w: Sample(None, (w.device,)),
    "no driver": lambda w: Sample(Usage(w.started, w.cpu), ()),
    "a GPU that is lost": lambda w: Sample(Usage(w.started, w.cpu), (None,)),
    "a workspace that cannot be looked into": lambda w: replace(w.sample(), keep_alive_known=False),
    "one device of two": lambda w: Sample(Usage(w.started, w.cpu), (w.device, None)),
}


@pytest.mark.parametrize("unread", UNREAD.values(), ids=UNREAD.keys())
def test_what_cannot_be_read_is_not_idle(unread: Callable[[World], Sample]) -> None:
    w = world(TWO, **HALF_HOUR)
    for _ in range(300):
        w.wait(MINUTE).look(unread(w))
    assert w.told == []
    w.minutes(1).minutes(14)
    for _ in range(300):
        w.wait(MINUTE).look(unread(w))
    assert w.told == []
    # Neither the gap nor the minutes at its edges count; what was seen before does.
    w.minutes(1).minutes(15)
    assert w.told
    assert w.running
    assert not w.minutes(1).running


@pytest.mark.parametrize("unread", UNREAD.values(), ids=UNREAD.keys())
def test_nobody_is_stopped_for_idling_in_a_look_that_shows_nothing(unread: Callable[[World], Sample]) -> None:
    w = world(TWO, **HALF_HOUR).minutes(1).minutes(29)
    notice = w.last.notice
    assert notice
    for _ in range(60):
        w.wait(MINUTE).look(unread(w))
    assert (w.running, w.last.notice) == (True, notice)


def test_use_that_is_seen_counts_even_where_not_all_can_be_read() -> None:
    w = idle(29, **HALF_HOUR)
    w.wait(MINUTE).look(Sample(None, (replace(w.device, utilization=90),)))
    assert w.state.run is not None
    assert (w.state.run.idle, w.last.notice) == (timedelta(0), "")


def test_use_while_nobody_looked_shows_in_the_counters() -> None:
    w = idle(29, **HALF_HOUR)
    for _ in range(60):
        w.cpu += timedelta(seconds=30)
        w.wait(MINUTE).look(NOTHING)
    w.minutes(1)
    assert (w.running, w.last.notice) == (True, "")


def test_running_time_goes_on_where_nothing_can_be_read() -> None:
    w = world(max_runtime="10h").minutes(599, sample=NOTHING)
    assert w.kinds() == [(450, "warned"), (540, "last warned")]
    assert w.minutes(1, sample=NOTHING).stopped_at() == 600


def test_a_night_without_samples_is_not_a_night_without_use() -> None:
    w = idle(5, idle_timeout="2h", policies={"idle_detection_window": 3})
    w.wait(9 * HOUR).look()
    assert w.state.run is not None
    assert w.state.run.idle == 5 * MINUTE + LONGEST_STEP
    assert w.state.run.streak == 1
    assert w.told == []


def test_after_a_night_without_samples_two_more_are_needed() -> None:
    w = idle(115, idle_timeout="2h", policies={"idle_detection_window": 3})
    assert w.kinds() == [(97, "warned"), (115, "last warned")]
    w.wait(9 * HOUR).look()
    assert w.running
    assert w.minutes(1).running
    assert not w.minutes(1).running


JUMPS = [timedelta(days=days) for days in (-400, -1, 1, 400)]


@pytest.mark.parametrize("jump", JUMPS, ids=str)
@pytest.mark.parametrize("at", [0, 1, 14, 29])
def test_a_clock_that_jumps_changes_nothing(at: int, jump: timedelta) -> None:
    stories = []
    for leap in (timedelta(0), jump):
        config = config_of(**HALF_HOUR, max_runtime="55m", policies=strict({"keepalive_max_duration": "10m"}))
        w = World(config, keep_alive=NOW)
        w.look()
        w.minutes(at)
        w.time += leap
        stories.append(w.minutes(60).kinds())
    assert stories[0] == stories[1]
    assert w.stopped_at() == 40


def test_running_time_adds_up_over_restarts_and_reboots_and_is_warned_of_anew() -> None:
    w = world(max_runtime="10h").minutes(300)
    w.stop()
    w.minutes(6000)
    w.start().minutes(200)
    assert w.state.ran == 500 * MINUTE
    w.reboot().minutes(10)
    w.start().minutes(50)
    assert w.state.ran == 550 * MINUTE
    told = [what for _, what in w.kinds()]
    assert told == ["warned", "warned", "last warned"]  # a new run, a new warning
    w.minutes(49)
    assert w.running
    assert not w.minutes(1).running


def test_whoever_starts_it_when_its_time_is_over_is_warned_and_has_the_warning_s_time() -> None:
    w = world(max_runtime="10h").minutes(600)
    assert not w.running
    w.wait(MINUTE).start().look()
    assert "will be stopped at" in w.last.notice
    assert w.minutes(14).running
    assert not w.minutes(1).running


def test_a_restart_between_two_looks_is_a_new_run() -> None:
    w = idle(29, **HALF_HOUR)
    w.wait(MINUTE / 2).start().wait(MINUTE / 2).look()
    assert (w.running, w.last.notice) == (True, "")
    assert w.state.run is not None
    assert w.state.run.idle == timedelta(0)
    assert w.state.ran == 30.5 * MINUTE  # what it ran between the last look and its stop is nobody's


def test_a_container_that_is_first_seen_late_has_run_since_it_started() -> None:
    w = World(config_of(idle_timeout=None, max_runtime="10h", policies=strict(None)))
    w.wait(50 * HOUR).look()
    assert w.state.ran == 50 * HOUR
    assert w.kinds() == [(3000, "last warned")]
    assert w.minutes(14).running
    assert not w.minutes(1).running


def test_a_container_made_anew_under_the_same_name_begins_with_nothing() -> None:
    w = idle(29, **HALF_HOUR, max_runtime="40m")
    again = replace(CONTAINER, id="f" * 64)
    found = review([again], {again.id: w.sample()}, {CONTAINER.id: w.state}, lambda _: w.rules, w.clock)
    assert list(found.states) == [again.id]
    assert found.states[again.id].run is not None
    assert found.states[again.id].run.idle == timedelta(0)


def test_the_review_of_all() -> None:
    config = config_of(**HALF_HOUR, policies=strict(None))
    mine, hers = CONTAINER, Watched("b" * 64, "p._.bob", "bob", 1, running=False)
    new = Watched("d" * 64, "new._.bob", "bob", 1, running=False)
    w = idle(14, **HALF_HOUR)
    w.wait(MINUTE)
    states = {mine.id: w.state, hers.id: State(ran=HOUR, farewell="It was stopped.\n"), "gone": State(ran=HOUR)}
    rules = lambda c: rules_of(config, c, w.time, demand=False)  # noqa: E731
    found = review([mine, hers, new], {mine.id: w.sample()}, states, rules, w.clock)
    assert [a.kind for a in found.actions] == ["policy.warned"]
    assert set(found.states) == {mine.id, hers.id}
    assert found.states[hers.id].ran == HOUR
    assert set(found.notices) == {mine.name, hers.name}


EXEMPT = {
    "user": "alice",
    "exempt_from": ["idle_timeout"],
    "reason": "thesis",
    "approved_by": "Prof. Baker",
    "expires_on": None,
}


def days(number: float) -> str:
    return (NOW + timedelta(days=number)).isoformat()


EXEMPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "for good": ({}, True),
    "until tomorrow": ({"expires_on": days(1)}, True),
    "over": ({"expires_on": days(-1)}, False),
    "over just now": ({"expires_on": days(0)}, False),
    "to the end of today": ({"expires_on": "2025-11-21"}, True),
    "to the end of yesterday": ({"expires_on": "2025-11-20"}, False),
    "no such day": ({"expires_on": "2025-13-45"}, False),
    "no date": ({"expires_on": "soon"}, False),
    "nobody approved": ({"approved_by": ""}, False),
    "approved by blanks": ({"approved_by": "  "}, False),
    "no reason": ({"reason": None}, False),
    "nobody": ({"user": None}, False),
    "from nothing": ({"exempt_from": []}, False),
    "from everything": ({"exempt_from": ["idle_timeout", "max_runtime"]}, True),
    "from something else": ({"exempt_from": ["max_runtime"]}, False),
    "in the old words": ({"user": None, "username": "alice", "exempt_from": ["idle_timeout_h"]}, True),
    "somebody else": ({"user": "bob"}, False),
    "this project": ({"project": "p"}, True),
    "this container": ({"project": "p._.alice"}, True),
    "another project": ({"project": "q"}, False),
}


@pytest.mark.parametrize(("changed", "exempt"), EXEMPTIONS.values(), ids=EXEMPTIONS.keys())
def test_exemptions(changed: dict[str, Any], exempt: bool) -> None:
    w = idle(60, **HALF_HOUR, exemptions=[{**EXEMPT, **changed}])
    assert w.running is exempt
    if exempt:
        assert w.kinds() == [(31, "exempted")]  # once, and nobody is bothered
        assert "thesis (approved by Prof. Baker)" in w.told[0][1].message
        assert w.last.notice == ""


@pytest.mark.parametrize("missing", ["user", "exempt_from", "reason", "approved_by", "expires_on"])
def test_an_exemption_that_lacks_something_is_none(missing: str) -> None:
    record = {key: value for key, value in EXEMPT.items() if key != missing}
    config = parse_config({"exemptions": [record]})
    assert missing in config.exemptions[0].problem
    assert not idle(60, **HALF_HOUR, exemptions=[record]).running


def test_the_other_policy_still_holds() -> None:
    w = idle(700, **HALF_HOUR, max_runtime="10h", exemptions=[EXEMPT])
    assert w.stopped_at() == 600
    assert w.told[-1][1].details["policy"] == RUNTIME


def test_an_exemption_that_runs_out_ends_with_a_warning() -> None:
    w = idle(59, **HALF_HOUR, exemptions=[{**EXEMPT, "expires_on": (NOW + HOUR).isoformat()}])
    assert w.kinds() == [(31, "exempted"), (60, "last warned")]
    assert w.minutes(14).running
    assert not w.minutes(1).running


def test_an_exemption_takes_a_warning_back() -> None:
    w = idle(20, **HALF_HOUR)
    assert w.last.notice
    w.config = replace(w.config, exemptions=parse_config({"exemptions": [EXEMPT]}).exemptions)
    assert w.minutes(60).running
    assert w.last.notice == ""


@pytest.mark.parametrize(
    ("demand", "reduction", "stopped"),
    [(False, 0.5, 600), (True, 0.5, 300), (True, 0.25, 150), (True, None, 600), (True, 1, 600), (True, 0, 15)],
)
def test_high_demand_shortens_idle_times(demand: bool, reduction: Any, stopped: float) -> None:
    w = world(idle_timeout="10h", policies={"high_demand_idle_reduction": reduction})
    w.demand = demand
    assert w.minutes(1).minutes(700).stopped_at() == stopped + 1


def test_high_demand_never_shortens_the_running_time() -> None:
    w = world(max_runtime="10h")
    w.demand = True
    assert w.minutes(700).stopped_at() == 600


def test_demand_that_becomes_high_stops_nobody_before_the_time_he_was_told() -> None:
    w = idle(481, idle_timeout="10h")  # told: at 600 minutes
    w.demand = True
    w.minutes(1)
    assert w.kinds()[-1] == (483, "last warned")
    assert "5h while most GPUs are taken (10h otherwise)" in w.told[-1][1].message
    assert "2025-11-21 18:48 UTC" in w.last.notice
    assert w.minutes(14).running
    assert not w.minutes(1).running


def test_not_even_where_the_warning_is_old() -> None:
    w = idle(530, idle_timeout="10h")
    w.demand = True
    w.minutes(1)
    assert w.kinds() == [(481, "warned"), (532, "last warned")]
    assert w.minutes(14).running
    assert not w.minutes(1).running


def test_a_warning_s_time_that_is_made_longer_counts_at_once() -> None:
    w = idle(29, **HALF_HOUR)
    longer = strict({"warning_time": "20m"})
    w.config = config_of(**HALF_HOUR, max_runtime=None, policies=longer)
    assert w.minutes(5).running
    assert not w.minutes(1).running


def test_use_takes_a_warning_back_that_came_with_the_first_idle_minute() -> None:
    w = idle(5, idle_timeout="10m")
    assert w.last.notice
    w.minutes(1, utilised(90))
    assert w.last.notice == ""
    w.minutes(1, utilised(0)).minutes(14)
    assert w.running
    assert not w.minutes(1).running


def test_demand_that_falls_again_takes_the_warning_back() -> None:
    w = world(idle_timeout="10h")
    w.demand = True
    w.minutes(1).minutes(290)
    assert w.last.notice
    w.demand = False
    assert w.minutes(60).last.notice == ""
    w.demand = True
    w.minutes(1)
    assert w.last.notice  # a new one, with all its time
    assert w.minutes(14).running
    assert not w.minutes(1).running


@pytest.mark.parametrize(
    ("threshold", "ids", "high"),
    [
        (0.8, "0 1 2", False),
        (0.8, "0 1 2 3", True),
        (0.81, "0 1 2 3", False),
        (0.6, "0 1 2", True),
        (0, "", True),
        (1, "0 1 2 3", False),
        (None, "0 1 2 3 4", False),
    ],
)
def test_demand_is_high_from_this_share_of_the_devices(threshold: Any, ids: str, high: bool) -> None:
    inventory = machine("full", "full", "full", "full", "full")
    config = config_of(policies={"high_demand_threshold": threshold})
    ledger = taken(inventory, alice=ids) if ids else Ledger()
    assert high_demand(config, inventory, ledger) is high
    held = replace(ledger, allocations={k: replace(a, stopped_at=NOW) for k, a in ledger.allocations.items()})
    assert high_demand(config, inventory, held) is high


def test_a_server_without_devices_has_no_demand() -> None:
    assert not high_demand(config_of(policies={"high_demand_threshold": 0}), machine(), Ledger())


def test_a_group_s_thresholds_and_a_user_s() -> None:
    groups = {"staff": {"members": ["alice", "bob"], "policies": {"gpu_idle_threshold": 20, "warning_time": "1m"}}}
    overrides = {"alice": {"policies": {"gpu_idle_threshold": 50}}}
    config = config_of(policies={"cpu_idle_threshold": 7}, groups=groups, user_overrides=overrides)
    values = [
        (rules.gpu_idle_threshold, rules.cpu_idle_threshold, rules.warning_time)
        for rules in map(config.enforcement_of, ("alice", "bob", "carol"))
    ]
    assert values == [(50, 7, MINUTE), (20, 7, MINUTE), (5, 7, 15 * MINUTE)]


def test_a_longer_timeout_in_the_file_takes_the_warning_back() -> None:
    w = idle(20, **HALF_HOUR)
    assert w.last.notice
    w.config = config_of(idle_timeout="10h", max_runtime=None, policies=strict(None))
    assert w.minutes(1).last.notice == ""


def test_a_warning_moves_with_a_timeout_that_is_a_little_longer() -> None:
    w = idle(29, **HALF_HOUR)
    w.config = config_of(idle_timeout="45m", max_runtime=None, policies=strict(None))
    assert "11:16 UTC" in w.minutes(1).last.notice
    assert w.minutes(14).running
    assert not w.minutes(1).running


def test_one_that_does_not_stop_is_stopped_again_the_next_time() -> None:
    w = world(**HALF_HOUR)
    w.deaf = True
    w.minutes(1).minutes(32)
    assert [what for _, what in w.kinds()][-3:] == ["stopped"] * 3
    w.minutes(1, utilised(90))
    assert w.last == replace(w.last, actions=(), notice="")
    w.stop()
    assert w.look().notice == ""  # by its user, this time


def test_one_stop_is_enough() -> None:
    w = idle(60, idle_timeout="30m", max_runtime="31m")
    assert [what for _, what in w.kinds()].count("stopped") == 1


def test_the_notice_tells_of_both() -> None:
    w = idle(25, idle_timeout="30m", max_runtime="35m")
    assert len(w.last.notice.splitlines()) == 2
    assert w.last.notice.endswith("\n")


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"])
def test_the_host_s_time_zone_does_not_matter(zone: str, timezone_of: Any) -> None:
    timezone_of(zone)
    w = idle(29, **HALF_HOUR, exemptions=[{**EXEMPT, "expires_on": "2025-11-20"}])
    assert "11:01 UTC" in w.last.notice
    assert w.minutes(1).stopped_at() == 31


def test_the_notice_s_file_is_the_project_s() -> None:
    assert notice_file("my-project._.alice") == "DS01-NOTICE-my-project.txt"


# Whatever happens: minutes of any length, of use, of silence, of samples that cannot be read; restarts, reboots,
# clocks that jump, demand that comes and goes, files that are touched.
STEPS = st.sampled_from(["idle"] * 12 + ["busy", "unread", "restart", "reboot", "jump", "demand", "touch", "untouch"])
STORIES = st.lists(st.tuples(STEPS, st.integers(1, 12)), min_size=20, max_size=160)
SPANS = st.sampled_from([0, 3, 10, 30, 60, 180])
RULES = st.fixed_dictionaries(
    {
        "idle_timeout": st.one_of(st.none(), SPANS),
        "max_runtime": st.one_of(st.none(), SPANS),
        "warning_time": st.sampled_from([0, 1, 5, 15, None]),
        "window": st.integers(1, 4),
        "grace": st.sampled_from([0, 5, None]),
        "keep": st.sampled_from([0, 20, None]),
        "exempt": st.booleans(),
    }
)


def minutes_text(value: int | None) -> str | None:
    return None if value is None else f"{value}m"


def world_of(rules: dict[str, Any]) -> World:
    policies = {
        "warning_time": minutes_text(rules["warning_time"]),
        "idle_detection_window": rules["window"],
        "grace_period": minutes_text(rules["grace"]),
        "keepalive_max_duration": minutes_text(rules["keep"]),
    }
    limits = {key: minutes_text(rules[key]) for key in (IDLE, RUNTIME)}
    exemptions = [EXEMPT] if rules["exempt"] else []
    return World(config_of(**limits, policies=policies, exemptions=exemptions))


def happens(w: World, step: str, number: int, utilization: int = 0) -> None:
    """One step of a story, with its look."""
    w.wait(number * MINUTE)
    w.device = replace(w.device, utilization=utilization)
    if step == "busy":
        w.device = replace(w.device, utilization=99)
    elif step == "restart":
        w.stop()
        w.look()
    elif step == "reboot":
        w.reboot()
        w.look()
    elif step == "jump":
        w.time += timedelta(days=number - 6)
    elif step == "demand":
        w.demand = not w.demand
    elif step == "touch":
        w.keep_alive = w.time
    elif step == "untouch":
        w.keep_alive = None
    if not w.running:
        w.start().wait(MINUTE)
    w.look(NOTHING if step == "unread" else None)


@given(RULES, STORIES)
def test_whatever_happens(rules: dict[str, Any], story: list[tuple[str, int]]) -> None:
    w = world_of(rules)
    w.look()
    # By policy: the look and the uptime of this run's first warning that stands.
    warned = {action.details["policy"]: (-1, w.uptime) for _, action in w.told}
    for number, (step, size) in enumerate(story):
        run_before, told_before = (w.boot, w.started), len(w.told)
        happens(w, step, size)
        new = [action for _, action in w.told[told_before:]]
        if (w.boot, w.started) != run_before:
            warned = {}
        assert w.last.state.run is not None
        warned = {policy: first for policy, first in warned.items() if policy in w.last.state.run.notices}
        for action in new:
            policy = action.details["policy"]
            assert rules[policy] is not None, "null is never"
            if action.kind == "policy.warned":
                assert not (policy == IDLE and step in ("busy", "unread")), "no warning for what is in use or unseen"
                assert not (policy == IDLE and rules["exempt"])
                warned.setdefault(policy, (number, w.uptime))
            elif action.kind == "policy.stopped":
                assert rules["warning_time"] is not None
                assert not (policy == IDLE and (rules["exempt"] or step in ("busy", "unread")))
                look, since = warned[policy]
                assert look < number, "never in the same look"
                assert w.uptime - since >= rules["warning_time"] * MINUTE
        assert sum(action.kind == "policy.stopped" for action in new) <= 1


@given(RULES, STORIES, st.integers(0, 159), st.integers(1, 600))
def test_whoever_idles_longer_is_not_treated_better(
    rules: dict[str, Any], story: list[tuple[str, int]], at: int, more: int
) -> None:
    w = world_of({**rules, "exempt": False})
    for step, size in story[: at + 1]:
        happens(w, step, size)
    if w.state.run is None or not w.running:
        return
    w.wait(MINUTE)
    longer = replace(w.state, run=replace(w.state.run, idle=w.state.run.idle + more * MINUTE))
    less, most = (decide(CONTAINER, w.sample(), state, w.rules, w.clock) for state in (w.state, longer))
    if any(a.kind == "policy.stopped" for a in less.actions):
        assert any(a.kind == "policy.stopped" for a in most.actions)
    if less.notice:
        assert most.notice


@settings(max_examples=30)
@given(STORIES, st.integers(1, 60))
def test_one_that_is_always_in_use_is_never_told_anything(story: list[tuple[str, int]], timeout: int) -> None:
    w = World(config_of(idle_timeout=f"{timeout}m", max_runtime=None, policies=strict(None)))
    for step, size in story:
        happens(w, step, size, utilization=99)
    assert (w.told, w.last.notice) == ([], "")


@settings(max_examples=30)
@given(RULES, STORIES, st.integers(-400, 400))
def test_the_calendar_has_no_part_in_it(rules: dict[str, Any], story: list[tuple[str, int]], jump: int) -> None:
    """The same story under another clock has the same end, minute by minute."""
    ends = []
    for shift in (0, jump):
        w = world_of(rules)
        w.time += timedelta(days=shift)
        for step, size in story:
            happens(w, "idle" if step == "jump" else step, size)
        ends.append((w.kinds(), w.state.ran, w.state.run and w.state.run.idle))
    assert ends[0] == ends[1]


def test_far_away_times_are_no_error() -> None:
    w = world(max_runtime="30m", policies={"sigterm_grace": "999999999d"}).minutes(30)
    assert w.told[-1][1].details["stop_timeout"] == timedelta(days=7).total_seconds()
    w = world(idle_timeout="999999999d", max_runtime="999999999d", policies={"warning_time": "999999999d"})
    w.minutes(5)
    assert w.last.notice
    w.time = datetime.max.replace(tzinfo=NOW.tzinfo)
    w.look()
    w = world(idle_timeout="20d", max_runtime="20d")
    w.time = datetime.max.replace(tzinfo=NOW.tzinfo) - timedelta(days=1)
    w.state = replace(w.state, ran=timedelta(days=19))
    w.wait(MINUTE).look()
    assert w.told
