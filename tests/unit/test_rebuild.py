"""The ledger from what the containers say."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from ds01 import records
from ds01.model import Device, Inventory
from ds01.rebuild import Claim, devices_of, rebuild
from hypothesis import given
from hypothesis import strategies as st
from support import machine, taken

NOW = datetime(2025, 11, 21, 10, 30, tzinfo=timezone.utc)
HOST = machine("full", ["2g.20gb", "2g.20gb", "2g.20gb"])


def claim(user: str, *devices: Device, age: int = 0, stopped: bool = False) -> Claim:
    created = NOW - timedelta(hours=age)
    return Claim(f"p._.{user}", f"id-{user}", user, devices, 10, created, NOW if stopped else None)


def recut(inventory: Inventory) -> Inventory:
    """The same layout cut anew: other UUIDs, other indices."""
    mig = [d for d in inventory.devices if not d.is_full]
    anew = [replace(d, uuid=f"NEW-{i}", id=f"1:{len(mig) - 1 - i}") for i, d in enumerate(mig)]
    return replace(inventory, devices=(*(d for d in inventory.devices if d.is_full), *anew))


def test_each_container_gets_back_what_it_had() -> None:
    full, mig, *_ = HOST.devices
    rebuilt = rebuild([claim("alice", mig), claim("bob", full, stopped=True)], HOST, {})
    alice, bob = rebuilt.allocations["p._.alice"], rebuilt.allocations["p._.bob"]
    assert (alice.devices, alice.status, alice.container_id) == ((mig,), "active", "id-alice")
    assert (bob.devices, bob.status, bob.stopped_at) == ((full,), "held", NOW)
    assert rebuilt.problems == ()


def test_a_device_cut_anew_in_the_same_place_is_the_same() -> None:
    mig = HOST.devices[1]
    (device,) = rebuild([claim("alice", mig)], recut(HOST), {}).allocations["p._.alice"].devices
    assert (device.uuid, device.placement, device.profile) == ("NEW-0", mig.placement, mig.profile)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        pytest.param(replace(HOST.devices[1], uuid="x", profile="3g.40gb"), "not on this host", id="another profile"),
        pytest.param(replace(HOST.devices[1], uuid="x", placement=(6, 2)), "not on this host", id="another place"),
        pytest.param(replace(HOST.devices[1], uuid="x", gpu_uuid="GPU-9"), "not on this host", id="another GPU"),
        pytest.param(replace(HOST.devices[0], uuid="x", gpu_uuid="x"), "not on this host", id="a whole GPU swapped"),
    ],
)
def test_what_cannot_be_found_is_said_and_not_guessed(device: Device, says: str) -> None:
    rebuilt = rebuild([claim("alice", device)], HOST, {})
    assert rebuilt.allocations == {}
    assert says in rebuilt.problems[0]


def test_a_container_of_which_nothing_is_known_is_reported() -> None:
    assert "nothing says" in rebuild([claim("alice")], HOST, {}).problems[0]


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        pytest.param({"age": 1}, {"age": 2}, "bob", id="the older"),
        pytest.param({"age": 1}, {"age": 2, "stopped": True}, "alice", id="the running one, whatever its age"),
    ],
)
def test_a_device_claimed_twice_goes_to_one(first: dict[str, Any], second: dict[str, Any], winner: str) -> None:
    mig = HOST.devices[1]
    rebuilt = rebuild([claim("alice", mig, **first), claim("bob", mig, **second)], HOST, {})
    assert list(rebuilt.allocations) == [f"p._.{winner}"]
    assert f"p._.{winner}'s" in rebuilt.problems[0]


def test_what_the_ledger_still_knows_wins() -> None:
    known = taken(HOST, carol="1:0").allocations
    rebuilt = rebuild([claim("alice", HOST.devices[1]), claim("carol", HOST.devices[2])], HOST, known)
    assert rebuilt.allocations == known
    assert "p._.carol's" in rebuilt.problems[0]


@pytest.mark.parametrize("written", [None, [], {}, 5, "x", [5], [{}], [{"id": "all"}], [{"id": "0", "placement": [1]}]])
def test_a_record_that_cannot_be_read_gives_no_device(written: Any) -> None:
    assert devices_of(written) == ()


def test_a_written_device_is_read_back() -> None:
    (device,) = devices_of([records.device_record(HOST.devices[1])])
    assert HOST.find(device) == HOST.devices[1]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 9)), max_size=8))
def test_no_device_twice_whatever_is_claimed(wishes: list[tuple[int, bool, int]]) -> None:
    claims = [
        replace(claim(f"u{n}", HOST.devices[i], age=age, stopped=stopped)) for n, (i, stopped, age) in enumerate(wishes)
    ]
    rebuilt = rebuild(claims, HOST, {})
    granted = [d.uuid for a in rebuilt.allocations.values() for d in a.devices]
    assert len(granted) == len(set(granted)) == len({i for i, _, _ in wishes})
    assert len(rebuilt.allocations) + len(rebuilt.problems) == len(claims)
