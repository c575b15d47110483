"""Idle and running time in force: what a run of reconcile does to containers, workspaces, terminals and the log, also
where it dies in the middle, and where containers take their time to end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01 import accounts, policies, reconcile, stopping, telling, usage
from ds01.drift import Action
from ds01.names import Account
from ds01.policy_state import PolicyStore
from test_reconcile import HALF_A_DAY, MINUTE, Server, foreign, said, server
from world import Box, Client

__all__ = ["server"]

ALICES, CAROLS = "p._.alice", "r._.carol"
RUNTIME = {"warning_time": "5m", "sigterm_grace": "60s"}


class KilledError(BaseException):
    """The process dies here."""


@dataclass
class Ward:
    """A server whose containers may run for ten minutes, and are warned five minutes before; alice's has just begun.
    `lines` are those on users' terminals, `began` says when which container's first process began, by its id."""

    server: Server
    workspace: Path
    lines: list[str] = field(default_factory=list)
    began: dict[str, float] = field(default_factory=dict)

    @property
    def notice(self) -> Path:
        return self.workspace / "DS01-NOTICE-p.txt"

    @property
    def box(self) -> Box:
        return self.server.world.boxes[ALICES]

    def run(self, after: timedelta = timedelta(0)) -> list[str]:
        """What a run does after so long; a second one right then does nothing."""
        self.server.passes(after)
        return self.server.run()

    def usages(self, ids: Collection[str]) -> dict[str, policies.Usage]:
        seconds = {id_: self.began.setdefault(id_, self.server.uptime) for id_ in ids}
        return {id_: policies.Usage(timedelta(seconds=began), timedelta(0)) for id_, began in seconds.items()}

    def warned(self) -> Ward:
        assert self.run(5 * MINUTE) == [f"policy.warned {ALICES}"]
        return self

    def dies(self, patch: pytest.MonkeyPatch, place: Any, name: str, after: timedelta) -> None:
        """A run that is killed where it comes to this."""
        self.server.passes(after)
        with patch.context() as here:
            here.setattr(place, name, _dies)
            with pytest.raises(KilledError):
                reconcile.reconcile(self.server.ds01)

    def policies(self, **rules: Any) -> None:
        limits = {"max_runtime": "10m", "container_hold_after_stop": "12h"}
        self.server.limits(defaults=limits, policies={**RUNTIME, **rules})

    def told(self, container: str = ALICES) -> list[tuple[str, str]]:
        """The events of containers that were warned or stopped, with their reasons."""
        kinds = ("policy.warned", "policy.stopped", "container.stopped")
        mine = [event for event in self.server.events if event.get("container") == container]
        return [(event["event"], event.get("reason", "")) for event in mine if event["event"] in kinds]


def _dies(*_: Any, **__: Any) -> Any:
    raise KilledError


WARNED, STOPPED = ("policy.warned", "max_runtime"), ("policy.stopped", "max_runtime")
ENDED = ("container.stopped", "max_runtime")


@pytest.fixture
def ward(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Ward:
    made = Ward(server, tmp_path_factory.mktemp("workspace"))
    made.box.workspace = str(made.workspace)
    me = Account("somebody", os.getuid(), os.getgid(), "/", "/bin/sh", "somebody")
    monkeypatch.setattr(accounts, "lookup", lambda _user: me)
    monkeypatch.setattr(telling, "say", lambda _account, text: made.lines.append(text))

    def clock() -> policies.Clock:
        return policies.Clock(server.world.clock, timedelta(seconds=server.uptime), "boot-1")

    monkeypatch.setattr(usage, "clock", clock)
    monkeypatch.setattr(usage, "usages", made.usages)
    server.ds01.paths.policy_state.unlink()  # of the real clock
    made.policies()
    assert made.run() == []
    return made


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What containers that take their time wait for."""
    event = threading.Event()
    yield event
    event.set()


def deaf(patch: pytest.MonkeyPatch, released: threading.Event, *containers: str) -> None:
    """These do not end before they are released."""
    stop = Client.stop

    def waits(client: Client, name: str, **named: Any) -> None:
        if client._find(name).name in containers:
            client._world.asked_to_end.append(("asked", client._find(name).name))
            released.wait(30)
        stop(client, name, **named)

    patch.setattr(Client, "stop", waits)


# --- the story of one container


def test_warned_and_then_stopped_in_log_workspace_and_terminal(ward: Ward) -> None:
    assert ward.run(4 * MINUTE) == []
    assert not ward.notice.exists()
    assert ward.run(MINUTE) == [f"policy.warned {ALICES}"]
    (event,) = (event for event in ward.server.events if event["event"] == "policy.warned")
    assert (event["user"], event["container"], event["reason"]) == ("alice", ALICES, "max_runtime")
    assert ward.lines == [event["message"]]
    assert "It will be stopped at 2025-11-21 10:40 UTC" in ward.notice.read_text(encoding="utf-8")
    written = ward.notice.stat()
    assert ward.run(MINUTE) == []
    assert ward.notice.stat() == written, "written once"
    assert ward.run(4 * MINUTE) == [f"policy.stopped {ALICES}"]
    assert not ward.box.runs
    assert ward.told() == [WARNED, ENDED, STOPPED]
    (stop,) = (event for event in ward.server.events if event["event"] == "policy.stopped")
    assert stop["user"] == "alice"
    assert ward.lines[1:] == [stop["message"]]
    assert ward.notice.read_text(encoding="utf-8") == f"{stop['message']}\n"
    assert ward.server.ledger[ALICES].endswith("held")
    assert ward.run(MINUTE) == []
    ward.server.world.start(ward.box)
    ward.began.clear()
    assert f"policy.warned {ALICES}" in ward.run(MINUTE), "its time is over: each start is warned of"
    assert "is stopped" not in ward.notice.read_text(encoding="utf-8")


def test_use_within_the_limits_takes_the_notice_away(ward: Ward) -> None:
    ward.warned()
    ward.server.limits(defaults={"max_runtime": "10h", "container_hold_after_stop": "12h"}, policies=RUNTIME)
    assert ward.run(MINUTE) == []
    assert not ward.notice.exists()


def test_a_report_warns_and_stops_nobody(ward: Ward) -> None:
    ward.server.passes(5 * MINUTE)
    assert ward.server.foreseen() == [f"policy.warned {ALICES}"]
    ward.run()
    ward.server.passes(5 * MINUTE)
    assert ward.server.foreseen() == [f"policy.stopped {ALICES}"]
    assert ward.box.runs
    ward.run()


@pytest.mark.parametrize("how", ["by DS01", "past DS01"])
def test_the_notice_goes_with_its_container(how: str, ward: Ward) -> None:
    ward.warned().run(5 * MINUTE)
    assert "until 2025-11-21 22:40 UTC; then it is removed" in ward.notice.read_text(encoding="utf-8")
    if how == "past DS01":
        ward.server.world.remove(ward.box, record_too=True)
    ward.run(HALF_A_DAY)
    assert ALICES not in ward.server.world.boxes
    assert not ward.notice.exists()


def test_whoever_has_the_name_of_one_whose_time_is_over_goes_on(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    ward.warned()
    remember = PolicyStore.write

    def and_is_made_anew(store: PolicyStore, states: Any) -> None:
        remember(store, states)
        ward.box.id = "id-of-the-new-one"

    ward.server.passes(5 * MINUTE)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyStore, "write", and_is_made_anew)
        assert said(reconcile.reconcile(ward.server.ds01)) == []
    assert ward.box.runs
    assert ward.told() == [WARNED]


def test_one_that_its_user_stops_just_then_is_not_said_to_be_stopped(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember = PolicyStore.write

    def and_is_stopped(store: PolicyStore, states: Any) -> None:
        remember(store, states)
        ward.box.status = "exited"

    ward.warned().server.passes(5 * MINUTE)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyStore, "write", and_is_stopped)
        assert said(reconcile.reconcile(ward.server.ds01)) == []
    ward.server.world.stop(ward.box)
    ward.run(MINUTE)
    assert (ward.told(), ward.notice.exists()) == ([WARNED], False)


def test_one_that_cannot_be_stopped_is_a_problem_and_tried_again(ward: Ward) -> None:
    ward.warned()
    ward.server.world.refuses_to[ward.box.id] = ("stop", "kill")
    ward.server.passes(5 * MINUTE)
    found = reconcile.reconcile(ward.server.ds01)
    assert [(p["stage"], p["reason"]) for p in found.problems] == [(ALICES, "engine_error")]
    assert (ward.told(), len(ward.lines)) == ([WARNED], 1)
    assert "is stopped" not in ward.notice.read_text(encoding="utf-8")
    ward.server.world.refuses_to.clear()
    assert ward.run(MINUTE / 2) == [f"policy.stopped {ALICES}"]


def test_damaged_memory_is_told_once_and_stops_nobody(ward: Ward) -> None:
    ward.warned()
    path = ward.server.ds01.paths.policy_state
    path.write_bytes(path.read_bytes()[:-20])
    ward.server.passes(5 * MINUTE)
    assert [p["reason"] for p in reconcile.foresee(ward.server.ds01).problems] == ["policy_state_damaged"]
    found = reconcile.reconcile(ward.server.ds01)
    assert [(p["stage"], p["reason"]) for p in found.problems] == [("policies", "policy_state_damaged")]
    assert said(found) == [f"policy.warned {ALICES}"], "anew, with all the warning's time"
    (event,) = (event for event in ward.server.events if event["event"] == "policy.state_lost")
    assert str(path) in event["message"]
    assert ward.run(4 * MINUTE) == []
    assert ward.box.runs
    assert ward.run(MINUTE) == [f"policy.stopped {ALICES}"]


@pytest.mark.parametrize("known", [True, False])
def test_a_workspace_that_cannot_be_looked_into_is_no_idle_one(
    known: bool, ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, str]] = []

    def keep_alive(workspace: Path, user: str) -> tuple[None, bool]:
        asked.append((workspace, user))
        return None, known

    monkeypatch.setattr(usage, "keep_alive", keep_alive)
    rules = {**RUNTIME, "grace_period": 0, "idle_detection_window": 1}
    limits = {"idle_timeout": "10m", "max_runtime": None, "container_hold_after_stop": "12h"}
    ward.server.limits(defaults=limits, policies=rules)
    done = [action for _ in range(12) for action in ward.run(MINUTE)]
    assert done == ([f"policy.warned {ALICES}", f"policy.stopped {ALICES}"] if known else [])
    assert set(asked) == {(ward.workspace, "alice")}


# --- a process that dies


def test_killed_while_it_warns_it_warns_again(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered was told before."""
    ward.dies(monkeypatch, telling, "tell", 5 * MINUTE)
    assert ward.run() == [f"policy.warned {ALICES}"]
    assert len(ward.lines) == 1


def test_killed_before_it_remembers_it_warns_again_and_stops_nobody(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward.dies(monkeypatch, PolicyStore, "write", 5 * MINUTE)
    ward.dies(monkeypatch, PolicyStore, "write", 6 * MINUTE)
    assert ward.box.runs
    assert ward.run() == [f"policy.warned {ALICES}"]
    ward.dies(monkeypatch, PolicyStore, "write", 5 * MINUTE)
    assert ward.box.runs, "remembered before anybody is stopped"
    assert ward.run() == [f"policy.stopped {ALICES}"]


def dies_stopping(ward: Ward, patch: pytest.MonkeyPatch, before: Callable[[], object]) -> None:
    """A run at the end of the container's time, which dies once it has begun to stop it."""

    def dies(graces: Mapping[str, int], _patience: float) -> Iterator[stopping.End]:
        if graces:
            before()
            raise KilledError
        yield from ()

    ward.warned().server.passes(5 * MINUTE)
    with patch.context() as here:
        here.setattr(stopping, "ends", dies)
        with pytest.raises(KilledError):
            reconcile.reconcile(ward.server.ds01)
    assert ward.told() == [WARNED]


def test_killed_before_it_stops_it_stops_later(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    dies_stopping(ward, monkeypatch, lambda: None)
    assert ward.box.runs
    assert ward.run(MINUTE / 2) == [], "the engine may be at it"
    assert ward.run(MINUTE / 2) == [f"policy.stopped {ALICES}"]
    assert ward.told() == [WARNED, ENDED, STOPPED]


def test_killed_while_it_stops_the_next_run_tells(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    dies_stopping(ward, monkeypatch, lambda: ward.server.world.stop(ward.box))
    assert f"policy.stopped {ALICES}" in ward.run(MINUTE)
    assert ward.told() == [WARNED, ENDED, STOPPED]
    assert len(ward.lines) == 2
    assert "is stopped" in ward.notice.read_text(encoding="utf-8")


# --- several, and some that take their time


@pytest.fixture
def crowd(ward: Ward) -> Ward:
    """Carol's container began with alice's, and both were warned."""
    ward.server.runs(CAROLS)
    assert ward.run() == []
    assert ward.run(5 * MINUTE) == [f"policy.warned {ALICES}", f"policy.warned {CAROLS}"]
    return ward


def test_they_end_side_by_side(crowd: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    together, stop = threading.Barrier(2, timeout=10), Client.stop

    def ends_with_the_other(client: Client, name: str, **named: Any) -> None:
        together.wait()
        stop(client, name, **named)

    monkeypatch.setattr(Client, "stop", ends_with_the_other)
    assert sorted(crowd.run(5 * MINUTE)) == [f"policy.stopped {ALICES}", f"policy.stopped {CAROLS}"]
    for container in (ALICES, CAROLS):
        assert crowd.told(container) == [WARNED, ENDED, STOPPED]
        assert crowd.server.ledger[container].endswith("held")


def test_one_that_takes_longer_than_a_run_waits_is_asked_once_and_told_in_the_end(
    crowd: Ward, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    crowd.policies(sigterm_grace="10m")
    monkeypatch.setattr(reconcile, "PATIENCE", 0.3)
    deaf(monkeypatch, released, ALICES)
    assert crowd.run(5 * MINUTE) == [f"policy.stopped {CAROLS}"]
    assert (crowd.box.runs, crowd.told()) == (True, [WARNED])
    assert "It will be stopped" in crowd.notice.read_text(encoding="utf-8")
    assert crowd.run(5 * MINUTE) == []
    assert crowd.server.world.asked_to_end.count(("asked", ALICES)) == 1
    crowd.server.world.stop(crowd.box)  # the engine's doing
    assert f"policy.stopped {ALICES}" in crowd.run(MINUTE)
    assert crowd.told() == [WARNED, ENDED, STOPPED]


def test_one_that_was_not_asked_in_time_is_stopped_by_the_next_run(
    crowd: Ward, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    monkeypatch.setattr(stopping, "_AT_ONCE", 1)
    monkeypatch.setattr(reconcile, "PATIENCE", 0.3)
    deaf(monkeypatch, released, ALICES)
    crowd.server.passes(5 * MINUTE)
    assert said(reconcile.reconcile(crowd.server.ds01)) == []
    assert crowd.server.world.boxes[CAROLS].runs
    assert crowd.run(MINUTE / 2) == [f"policy.stopped {CAROLS}"]
    crowd.server.world.stop(crowd.box)
    crowd.run(MINUTE)


def test_strangers_end_side_by_side_and_their_time_is_of_the_run_s(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    ward.policies(unmanaged="stop")
    foreign(ward.server, "deaf", "0")
    foreign(ward.server, "trainer", "0")
    monkeypatch.setattr(reconcile, "PATIENCE", 0.3)
    monkeypatch.setattr(stopping, "_AT_ONCE", 2)
    deaf(monkeypatch, released, "deaf")
    ward.server.passes(MINUTE)
    assert "unmanaged.stopped trainer" in said(reconcile.reconcile(ward.server.ds01))
    (told,) = ward.server.told("unmanaged.stopped")
    assert told.startswith("Container trainer")
    ward.server.world.stop(ward.server.world.boxes["deaf"])
    ward.run()


def test_a_run_that_takes_too_long_says_what_it_was_at_and_blames_nobody(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Any] = []

    @contextmanager
    def bounded(seconds: float, late: Callable[[], Any]) -> Iterator[None]:
        assert seconds == reconcile.DEADLINE
        errors.append(late)
        yield

    def hangs(*_: Any) -> list[Action]:
        errors.append(errors[0]())
        return []

    monkeypatch.setattr(reconcile.watchdog, "bounded", bounded)
    monkeypatch.setattr(reconcile.slices, "foresee", hangs)
    assert reconcile.reconcile(ward.server.ds01).problems == ()
    error = errors[1]
    assert (error.reason, error.exit_code) == ("deadline_passed", 3)
    assert error.message == "ds01 reconcile did not end within 300 s. It was at: slices."
    assert "driver" not in str(error)
