"""The ledger's written form."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from fractions import Fraction
from typing import Any

import pytest
from ds01 import records
from ds01.model import Allocation, Device, Ledger, Process, Request, Ticket, Waiter
from hypothesis import given
from hypothesis import strategies as st
from support import NOW, machine, taken

# The state file as the documentation of the replaced scripts shows it.
ORIGINAL = """{
  "allocations": {
    "my-project._.alice": {
      "user": "alice",
      "gpu_id": "0",
      "allocated_at": "2025-11-21T10:30:00",
      "priority": 50,
      "stopped_at": null
    }
  },
  "last_updated": "2025-11-21T10:30:00"
}"""


def test_the_file_as_documented() -> None:
    inventory = machine(["1g.10gb", "2g.20gb"])
    ledger = Ledger(taken(inventory, alice="0:1").allocations, 42, "boot-1", NOW)
    written = records.to_json(ledger)
    checksum = written.pop("checksum")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", checksum)
    assert written == {
        "version": 1,
        "generation": 42,
        "boot_id": "boot-1",
        "engine_id": "",
        "last_updated": "2025-11-21T10:30:00Z",
        "allocations": {
            "p._.alice": {
                "user": "alice",
                "gpu_id": "0:1",
                "priority": 10,
                "allocated_at": "2025-11-21T10:30:00Z",
                "stopped_at": None,
                "devices": [
                    {
                        "id": "0:1",
                        "uuid": "MIG-0-1",
                        "gpu_uuid": "GPU-0",
                        "profile": "2g.20gb",
                        "placement": [2, 2],
                        "equivalents": "2/7",
                    }
                ],
                "container_id": "c0ffee",
                "pending_since": None,
            }
        },
        "queue": [],
    }


def test_the_original_file_is_read() -> None:
    ledger = records.from_json(json.loads(ORIGINAL))
    assert ledger.generation == 0
    assert ledger.last_updated == NOW
    allocation = ledger.allocations["my-project._.alice"]
    assert (allocation.user, allocation.gpu_id, allocation.priority) == ("alice", "0", 50)
    assert (allocation.allocated_at, allocation.stopped_at, allocation.container_id) == (NOW, None, None)
    assert allocation.devices[0].equivalents == 1


@pytest.mark.parametrize(
    ("gpu_id", "expected"),
    [
        ("0", ["0"]),
        ("0:1", ["0:1"]),
        ("0.1", ["0:1"]),
        ("0:0,0:1", ["0:0", "0:1"]),
        ("0, 1.0", ["0", "1:0"]),
        (3, ["3"]),
    ],
)
def test_original_gpu_ids(gpu_id: Any, expected: list[str]) -> None:
    document = json.loads(ORIGINAL)
    document["allocations"]["my-project._.alice"]["gpu_id"] = gpu_id
    (allocation,) = records.from_json(document).allocations.values()
    assert [d.id for d in allocation.devices] == expected


def test_an_original_hold_began_in_utc() -> None:
    document = json.loads(ORIGINAL)
    document["allocations"]["my-project._.alice"]["stopped_at"] = "2025-11-21T12:00:00.123456"
    (allocation,) = records.from_json(document).allocations.values()
    assert allocation.stopped_at == datetime(2025, 11, 21, 12, 0, 0, 123456, tzinfo=timezone.utc)
    assert allocation.status == "held"


def test_an_unknown_key_of_a_record_is_no_reason_to_stop() -> None:
    document = json.loads(ORIGINAL)
    document["allocations"]["my-project._.alice"]["note"] = "by hand"
    assert "my-project._.alice" in records.from_json(document).allocations


_WHEN = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(
    lambda t: t.replace(microsecond=0, tzinfo=timezone.utc)
)
_DEVICES = st.builds(
    Device,
    id=st.sampled_from(["0", "0:1", "10:12"]),
    uuid=st.text(min_size=1, max_size=8),
    gpu_uuid=st.text(min_size=1, max_size=8),
    profile=st.sampled_from(["full", "2g.20gb", "1c.3g.40gb", "1g.10gb+me"]),
    placement=st.none() | st.tuples(st.integers(0, 7), st.integers(1, 8)),
    equivalents=st.builds(Fraction, st.integers(1, 7), st.just(7)),
)
_DEVICE_LISTS = st.lists(_DEVICES, max_size=3).map(tuple)


def _no_device_twice(found: list[Allocation]) -> bool:
    uuids = [d.uuid for a in found for d in {d.uuid: d for d in a.devices}.values()]
    return len(uuids) == len(set(uuids))


_ALLOCATIONS = st.builds(
    Allocation,
    container=st.text(min_size=1, max_size=20),
    user=st.text(min_size=1, max_size=20),
    devices=_DEVICE_LISTS,
    priority=st.integers(1, 100),
    allocated_at=_WHEN,
    stopped_at=st.none() | _WHEN,
    container_id=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    pending_since=st.none() | _WHEN,
)
_WAITERS = st.builds(
    Waiter,
    request=st.builds(
        Request,
        container=st.text(min_size=1, max_size=20),
        user=st.text(min_size=1, max_size=20),
        gpus=st.integers(1, 8),
        profile=st.none() | st.sampled_from(["full", "2g.20gb"]),
    ),
    priority=st.integers(1, 100),
    max_gpus=st.none() | st.integers(0, 8),
    ticket=st.builds(
        Ticket, since=_WHEN, until=_WHEN, process=st.builds(Process, st.integers(1, 2**22), st.integers(0, 2**60))
    ),
)
_LEDGERS = st.builds(
    Ledger,
    allocations=st.lists(_ALLOCATIONS, max_size=4)
    .filter(_no_device_twice)
    .map(lambda found: {a.container: a for a in found}),
    generation=st.integers(0, 10**6),
    boot_id=st.text(max_size=36),
    engine_id=st.text(max_size=36),
    last_updated=st.none() | _WHEN,
    queue=st.lists(_WAITERS, max_size=3).map(tuple),
)


@given(_LEDGERS)
def test_a_ledger_survives_being_written_and_read(ledger: Ledger) -> None:
    assert records.from_json(json.loads(json.dumps(records.to_json(ledger)))) == ledger


def test_the_checksum_is_that_of_the_content_not_of_its_order() -> None:
    written = records.to_json(taken(machine("full", "full"), alice="0", bob="1"))
    backwards = dict(reversed(written.items()))
    assert records.from_json(backwards) == records.from_json(written)


@pytest.mark.parametrize(
    "forge",
    [
        lambda d: d.update(generation=7),
        lambda d: d["allocations"].clear(),
        lambda d: d["allocations"].pop("p._.bob"),
        lambda d: d["allocations"]["p._.alice"].update(user="mallory"),
        lambda d: d["allocations"]["p._.alice"]["devices"][0].update(uuid="GPU-1"),
        lambda d: d["allocations"]["p._.alice"].update(stopped_at="2025-11-21T10:30:00Z"),
        lambda d: d.update(checksum="sha256:" + "0" * 64),
        lambda d: d.update(more="than that"),
    ],
    ids=["generation", "emptied", "one missing", "user", "device", "stopped", "checksum", "another key"],
)
def test_a_changed_file_fails_its_checksum(forge: Any) -> None:
    document = records.to_json(taken(machine("full", "full"), alice="0", bob="1"))
    forge(document)
    with pytest.raises(ValueError, match="checksum"):
        records.from_json(document)


def broken(**changes: Any) -> dict[str, Any]:
    document = json.loads(ORIGINAL)
    record = document["allocations"]["my-project._.alice"]
    for key, value in changes.items():
        if value is ...:
            del record[key]
        else:
            record[key] = value
    return document


WRONG: dict[str, Any] = {
    "a list": [],
    "null": None,
    "a number": 5,
    "a text": "allocations",
    "allocations as a list": {"allocations": ["my-project._.alice"]},
    "allocations as an empty list": {"allocations": []},
    "allocations as a text": {"allocations": "none"},
    "nothing at all": {},
    "record as null": {"allocations": {"my-project._.alice": None}},
    "record as a list": {"allocations": {"my-project._.alice": []}},
    "no user": broken(user=...),
    "no device": broken(gpu_id=...),
    "gpu_id null": broken(gpu_id=None),
    "gpu_id empty": broken(gpu_id=""),
    "gpu_id words": broken(gpu_id="all"),
    "no time": broken(allocated_at=...),
    "time as a number": broken(allocated_at=1763721000),
    "time in words": broken(allocated_at="yesterday"),
    "time before all time": broken(allocated_at="0001-01-01T00:00:00+05:00"),
    "stopped in words": broken(stopped_at="yes"),
    "priority in words": broken(priority="high"),
    "devices as a text": broken(devices="0:1"),
    "devices as numbers": broken(devices=[0]),
    "device without an id": broken(devices=[{"uuid": "GPU-0"}]),
    "device's id as a number": broken(devices=[{"id": 0}]),
    "equivalents of nothing": broken(devices=[{"id": "0", "equivalents": "1/0"}]),
    "equivalents in words": broken(devices=[{"id": "0", "equivalents": "half"}]),
    "placement too short": broken(devices=[{"id": "0", "placement": [1]}]),
    "generation in words": {**json.loads(ORIGINAL), "generation": "many"},
    "a version yet to come": {**json.loads(ORIGINAL), "version": 2},
}


@pytest.mark.parametrize("document", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_is_a_value_error_and_never_an_empty_ledger(document: Any) -> None:
    with pytest.raises(ValueError):
        records.from_json(document)
