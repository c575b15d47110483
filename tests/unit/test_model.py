"""The nouns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ds01.model import Allocation, Device, Ledger
from support import NOW, machine, taken


def test_devices_sort_by_number_not_by_text() -> None:
    ids = ["10", "2", "0", "1:10", "1:2", "10:0", "1:0"]
    ordered = sorted(ids, key=lambda i: Device(i, "u", "g", "full").index)
    assert ordered == ["0", "1:0", "1:2", "1:10", "2", "10", "10:0"]


@pytest.mark.parametrize(("profile", "full"), [("full", True), ("7g.80gb", False), ("1g.10gb", False)])
def test_only_an_uncut_gpu_is_full(profile: str, full: bool) -> None:
    assert Device("0", "u", "g", profile).is_full is full


@pytest.mark.parametrize(
    ("stopped", "pending", "status"),
    [(False, True, "pending"), (False, False, "active"), (True, False, "held"), (True, True, "held")],
)
def test_status_of_an_allocation(stopped: bool, pending: bool, status: str) -> None:
    allocation = Allocation(
        "p._.alice", "alice", (), 10, NOW, NOW if stopped else None, pending_since=NOW if pending else None
    )
    assert allocation.status == status


def test_gpu_id_joins_several_devices() -> None:
    inventory = machine("full", ["2g.20gb", "2g.20gb"])
    ledger = taken(inventory, alice="0 1:1")
    assert ledger.allocations["p._.alice"].gpu_id == "0,1:1"


def recorded(id_: str, uuid: str) -> Device:
    return Device(id_, uuid, "", "full")


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (recorded("0:1", "MIG-0-1"), "0:1"),
        (recorded("0:0", "MIG-0-1"), "0:1"),
        (recorded("0:1", "MIG-gone"), None),
        (recorded("0:1", ""), "0:1"),
        (recorded("0:7", ""), None),
        (recorded("0", "GPU-0"), None),
        (recorded("0", ""), None),
    ],
    ids=["same", "moved", "gone", "old record", "old record, gone", "its GPU is cut", "old record, its GPU is cut"],
)
def test_a_recorded_device_is_found_by_uuid_else_by_id(record: Device, found: str | None) -> None:
    device = machine(["2g.20gb", "2g.20gb"]).find(record)
    assert (device.id if device else None) == found


def test_ledger_says_who_holds_what() -> None:
    inventory = machine("full", "full", "full")
    ledger = taken(inventory, alice="0", bob="1")
    assert [a.container for a in ledger.of_user("alice")] == ["p._.alice"]
    assert ledger.of_user("carol") == ()
    holders = [ledger.holder_of(device) for device in inventory.devices]
    assert [h and h.user for h in holders] == ["alice", "bob", None]


def test_a_ledger_is_changed_by_making_another() -> None:
    before = taken(machine("full", "full"), alice="0")
    more = before.with_allocation(replace(before.allocations["p._.alice"], container="q._.alice"))
    assert set(more.allocations) == {"p._.alice", "q._.alice"}
    assert set(more.without("p._.alice").allocations) == {"q._.alice"}
    assert more.without("unknown") == more
    assert set(before.allocations) == {"p._.alice"}
    assert Ledger().allocations == {}
