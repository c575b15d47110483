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
    ("stopped", "container_id", "status"),
    [(False, None, "pending"), (False, "c0ffee", "active"), (True, "c0ffee", "held"), (True, None, "held")],
)
def test_status_of_an_allocation(stopped: bool, container_id: str | None, status: str) -> None:
    allocation = Allocation("p._.alice", "alice", (), 10, NOW, NOW if stopped else None, container_id)
    assert allocation.status == status


def test_gpu_id_joins_several_devices() -> None:
    inventory = machine("full", ["2g.20gb", "2g.20gb"])
    ledger = taken(inventory, alice="0 1:1")
    assert ledger.allocations["p._.alice"].gpu_id == "0,1:1"


def test_inventory_finds_by_uuid() -> None:
    inventory = machine(["2g.20gb", "2g.20gb"])
    assert inventory.by_uuid("MIG-0-1") == inventory.devices[1]
    assert inventory.by_uuid("MIG-9-9") is None
    assert inventory.by_uuid("GPU-0") is None, "a GPU in MIG mode is no device"


def test_ledger_says_who_holds_what() -> None:
    ledger = taken(machine("full", "full", "full"), alice="0", bob="1")
    assert [a.container for a in ledger.of_user("alice")] == ["p._.alice"]
    assert ledger.of_user("carol") == ()
    assert (holder := ledger.holder_of("GPU-1")) is not None
    assert holder.user == "bob"
    assert ledger.holder_of("GPU-2") is None


def test_a_ledger_is_changed_by_making_another() -> None:
    before = taken(machine("full", "full"), alice="0")
    more = before.with_allocation(replace(before.allocations["p._.alice"], container="q._.alice"))
    assert set(more.allocations) == {"p._.alice", "q._.alice"}
    assert set(more.without("p._.alice").allocations) == {"q._.alice"}
    assert more.without("unknown") == more
    assert set(before.allocations) == {"p._.alice"}
    assert Ledger().allocations == {}
