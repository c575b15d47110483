"""What time and the engine make of allocations: expiry, stops and starts behind DS01's back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from ds01 import units
from ds01.lifecycle import SETTLED, Seen, due
from ds01.limits import Config, Policies
from ds01.model import Allocation, Ledger
from ds01.transitions import Outcome
from support import NOW, config_of, machine, taken

FOUR = machine("full", "full", "full", "full")
DAY = timedelta(hours=24)  # the built-in hold
MINUTE = timedelta(minutes=1)
NAME = "p._.alice"


def allocation(state: str, ago: timedelta) -> Allocation:
    """Alice's device 0, in this state for so long."""
    mine = replace(taken(FOUR, alice="0").allocations[NAME], allocated_at=NOW - ago)
    if state == "pending":
        return replace(mine, pending_since=NOW - ago, container_id=None)
    return replace(mine, stopped_at=NOW - ago) if state == "held" else mine


def what(
    mine: Allocation, seen: Mapping[str, Seen] | None, config: Config | None = None, **rest: Any
) -> Outcome | None:
    found = list(due(Ledger({NAME: mine}), config or config_of(), seen, rest.get("time", NOW), rest.get("asking", ())))
    return found[0] if found else None


def container(status: str, stopped_ago: timedelta | None = None) -> dict[str, Seen]:
    finished = NOW - stopped_ago if stopped_ago is not None else None
    return {NAME: Seen("c0ffee", status == "running", status == "exited", finished)}


@pytest.mark.parametrize(
    ("state", "ago", "seen", "becomes"),
    [
        pytest.param("pending", 9 * MINUTE, {}, "kept", id="granted 9 min ago, no container yet"),
        pytest.param("pending", 10 * MINUTE, {}, "expired", id="granted 10 min ago, no container"),
        pytest.param("pending", 10 * MINUTE, container("created"), "expired", id="made and never started"),
        pytest.param("pending", 9 * MINUTE, container("created"), "kept", id="made, and just being started"),
        pytest.param("pending", DAY, container("running"), "active", id="granted, and it runs"),
        pytest.param("pending", 9 * MINUTE, container("exited", DAY), "kept", id="about to be started again"),
        pytest.param("pending", 10 * MINUTE, container("exited", DAY - MINUTE), "held", id="the start never came"),
        pytest.param("pending", 10 * MINUTE, container("exited", DAY), "expired", id="nor in its hold's time"),
        pytest.param("held", DAY - timedelta(seconds=1), {}, "expired", id="held for a container that was removed"),
        pytest.param("held", DAY - timedelta(seconds=1), container("exited"), "kept", id="a second before it ends"),
        pytest.param("held", DAY, container("exited"), "expired", id="the hold ends"),
        pytest.param("held", DAY, container("running"), "active", id="somebody started it past DS01"),
        pytest.param("held", DAY, None, "expired", id="the hold ends, no engine"),
        pytest.param("held", DAY - MINUTE, None, "kept", id="a hold, no engine"),
        pytest.param("active", 99 * DAY, container("running"), "kept", id="it runs"),
        pytest.param("active", 99 * DAY, {}, "expired", id="its container was removed past DS01"),
        pytest.param("active", 99 * DAY, None, "kept", id="active, no engine"),
        pytest.param("active", DAY, container("exited", MINUTE), "held", id="it stopped by itself"),
        pytest.param("active", DAY, container("exited", SETTLED / 2), "kept", id="just now: it may be restarting"),
        pytest.param("active", 9 * DAY, container("exited", DAY), "expired", id="it stopped a hold ago, unseen"),
        pytest.param("active", DAY, container("exited"), "kept", id="the engine does not say when"),
    ],
)
def test_what_becomes_of_an_allocation(state: str, ago: timedelta, seen: Any, becomes: str) -> None:
    outcome = what(allocation(state, ago), seen)
    assert (outcome.reason if outcome else "kept") == becomes
    if outcome and outcome.allocation:
        assert outcome.allocation.status == becomes
        assert outcome.allocation.container_id == "c0ffee"


def test_whoever_asks_keeps_his() -> None:
    assert what(allocation("held", DAY), {}, asking={NAME}) is None


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize(
    ("hold", "minutes", "kept"),
    [
        ("15m", 1, True),
        ("15m", 16, False),
        ("0.25h", 14, True),
        ("0.25h", 16, False),
        (0, 1, False),
        (None, 9999, True),
    ],
)
def test_holds_count_from_docker_s_finished_at_in_utc(
    zone: str, hold: Any, minutes: int, kept: bool, timezone_of: Any
) -> None:
    timezone_of(zone)
    finished = units.parse_time((NOW - minutes * MINUTE).strftime("%Y-%m-%dT%H:%M:%S.123456789Z"))
    assert finished.tzinfo == timezone.utc
    seen = {NAME: Seen("c0ffee", running=False, stopped=True, finished_at=finished)}
    outcome = what(allocation("active", DAY), seen, config_of(gpu_hold_after_stop=hold))
    assert outcome is not None
    assert outcome.reason == ("held" if kept else "expired")


def test_a_hold_without_end_and_a_grant_without_end_are_never_over() -> None:
    config = replace(config_of(gpu_hold_after_stop=None), policies=Policies(pending_timeout=None))
    assert what(allocation("held", 999 * DAY), container("exited"), config) is None
    assert what(allocation("pending", 999 * DAY), {}, config) is None


@pytest.mark.parametrize(
    ("start", "end", "over"),
    [(1, 9, False), (0, 9, True), (-9, 9, True), (-9, -1, False)],
    ids=["it begins in an hour", "it begins now", "stopped within it", "it was over before the stop"],
)
def test_a_hold_ends_when_somebody_else_s_reservation_begins(start: int, end: int, over: bool) -> None:
    window = {"reservation_start": hours(start), "reservation_end": hours(end), "reserved_gpus": ["0"]}
    config = config_of(user_overrides={"carol": window})
    assert bool(what(allocation("held", MINUTE), container("exited"), config)) is over
    own = config_of(user_overrides={"alice": window})
    assert what(allocation("held", MINUTE), container("exited"), own) is None


def hours(number: int) -> str:
    return units.format_time(NOW + timedelta(hours=number))


def test_nothing_is_written_for_times_far_away() -> None:
    """A clock that jumped back makes no hold end, and one that jumped ahead makes every one end."""
    mine = allocation("held", timedelta())
    assert what(mine, container("exited"), time=NOW - 365 * DAY) is None
    assert what(mine, container("exited"), time=datetime(9999, 1, 1, tzinfo=timezone.utc)) is not None
