"""What policies remember: written, read back, damaged, lost. Nothing that is damaged stops anybody."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01.errors import Ds01Error
from ds01.policies import DeviceUse, KeepAlive, Marks, Notice, Run, State, Stop
from ds01.policy_state import PolicyStore
from hypothesis import given
from hypothesis import strategies as st
from policy_world import CONTAINER, MINUTE, World, world
from support import NOW

SPANS = st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=36500))
TIMES = st.datetimes(timezones=st.just(NOW.tzinfo)).map(lambda t: t.replace(microsecond=0))
COUNTS = st.integers(0, 2**50)
DEVICES = st.builds(DeviceUse, st.lists(COUNTS, max_size=3).map(tuple), COUNTS, st.none() | st.integers(0, 100))
MARKS = st.builds(Marks, SPANS, SPANS, st.none() | COUNTS, st.lists(DEVICES, max_size=3).map(tuple))
NOTICES = st.dictionaries(
    st.sampled_from(["idle_timeout", "max_runtime"]), st.builds(Notice, st.integers(1, 2), SPANS, SPANS, TIMES)
)
POLICIES = st.lists(st.sampled_from(["idle_timeout", "max_runtime"]), unique=True).map(tuple)
STOPS = st.builds(Stop, st.sampled_from(["idle_timeout", "max_runtime"]), SPANS)
RUNS = st.builds(
    Run, st.text(), SPANS, SPANS, st.integers(0, 99), st.none() | MARKS, NOTICES, POLICIES, st.none() | STOPS
)
STATES = st.builds(State, SPANS, st.none() | RUNS, st.none() | st.builds(KeepAlive, TIMES, SPANS), st.text())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "policy-state.json"


@given(states=st.dictionaries(st.text(min_size=1), STATES, max_size=4))
def test_what_is_written_is_read(states: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("states") / "policy-state.json"
    PolicyStore(path).write(states)
    store = PolicyStore(path)
    assert (store.read(), store.problem) == (states, None)


def test_no_file_is_nothing_to_remember(path: Path) -> None:
    store = PolicyStore(path)
    assert (store.read(), store.problem) == ({}, None)
    store.write({})
    assert PolicyStore(path).read() == {}


def warned() -> World:
    """One look before its stop."""
    return world(idle_timeout="30m", max_runtime="35m").minutes(1).minutes(29)


def test_the_file_is_private_and_stays_as_it_is_where_nothing_changed(path: Path) -> None:
    states = {CONTAINER.id: warned().state}
    PolicyStore(path).write(states)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o640, 0o750)
    before = path.stat()
    store = PolicyStore(path)
    store.write(store.read())
    assert path.stat() == before


def test_a_story_goes_on_in_the_next_process(path: Path) -> None:
    ends = []
    for through_the_file in (False, True):
        w = world(idle_timeout="30m", max_runtime="35m")
        w.keep_alive = w.time
        for _ in range(60):
            if through_the_file:
                PolicyStore(path).write({CONTAINER.id: w.state})
                w.state = PolicyStore(path).read()[CONTAINER.id]
            w.minutes(1)
        ends.append((w.kinds(), w.state))
    assert ends[0] == ends[1]


def flipped(data: bytes) -> bytes:
    return data.replace(b'"ran": 1800.0', b'"ran": 9999.0')


def another_version(data: bytes) -> bytes:
    return data.replace(b'"version": 1', b'"version": 2')


def edited(data: bytes, **changed: Any) -> bytes:
    """With a checksum that is right, and records that are not."""
    from ds01 import policy_state

    document = json.loads(data)
    for record in document["containers"].values():
        record.update(changed)
    document["checksum"] = policy_state._checksum(document["containers"])
    return json.dumps(document).encode()


DAMAGES = {
    "empty": lambda _: b"",
    "zeros": lambda data: b"\0" * len(data),
    "torn": lambda data: data[: len(data) // 2],
    "one digit": flipped,
    "another version": another_version,
    "a list": lambda _: b"[]",
    "a number": lambda _: b"7",
    "null": lambda _: b"null",
    "no containers": lambda _: b'{"version": 1, "checksum": "sha256:x"}',
    "not UTF-8": lambda data: b"\xff" + data,
    "deep": lambda _: b"[" * 100_000,
    "ran is text": lambda data: edited(data, ran="long"),
    "ran is null": lambda data: edited(data, ran=None),
    "ran is endless": lambda data: edited(data, ran=1e300),
    "run is a word": lambda data: edited(data, run="yes"),
    "run is empty": lambda data: edited(data, run={"boot_id": "x"}),
    "keep-alive of no day": lambda data: edited(data, keep_alive={"touched": "2025-13-45", "counted": 0}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_a_fresh_start_and_stops_nobody(damage: Any, path: Path) -> None:
    w = warned()
    PolicyStore(path).write({CONTAINER.id: w.state})
    data = damage(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    store = PolicyStore(path)
    assert store.read() == {}
    assert store.problem is not None
    assert "start anew" in store.problem
    w.state = State()
    w.minutes(1)
    assert w.running
    w.minutes(14)
    assert w.running  # warned anew, with all the warning's time
    store.write({CONTAINER.id: w.state})
    assert PolicyStore(path).read() == {CONTAINER.id: w.state}


def test_a_file_that_may_not_be_read_is_no_file(path: Path) -> None:
    path.mkdir(parents=True)
    store = PolicyStore(path)
    assert store.read() == {}
    assert store.problem
    with pytest.raises(Ds01Error, match="could not be written") as caught:
        store.write({CONTAINER.id: State(ran=MINUTE)})
    assert caught.value.reason == "ledger_unavailable"


def test_a_state_from_before_the_boot_is_no_warning() -> None:
    w = warned()
    assert w.state.run is not None
    w.state = replace(w.state, run=replace(w.state.run, boot_id="another boot"))
    w.minutes(1)
    assert w.running
