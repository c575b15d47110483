"""What one reconcile run leaves for the next: the clock's pace, and files of any content."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01 import memory
from ds01.errors import Ds01Error
from ds01.memory import DISTRUST, JUMP, Memory
from support import NOW

KNOWN = Memory("boot", NOW.timestamp() - 1000.0)


@pytest.mark.parametrize(
    ("jump", "distrusted"),
    [(0, False), (JUMP, False), (-JUMP, False), (JUMP + 1, True), (-JUMP - 1, True), (86400, True), (-86400, True)],
)
def test_a_clock_that_was_set(jump: float, distrusted: bool) -> None:
    now = KNOWN.at("boot", NOW + timedelta(seconds=60 + jump), 1060.0)
    assert now.distrusts(1060.0) is distrusted
    assert now.distrusts(1060.0 + DISTRUST - 1) is distrusted
    assert not now.distrusts(1060.0 + DISTRUST)
    assert (now == KNOWN) is not distrusted, "nothing is written for a clock that keeps its pace"


@pytest.mark.parametrize("known", [KNOWN, Memory()], ids=["another boot is remembered", "nothing is"])
@pytest.mark.parametrize("ahead", [timedelta(), timedelta(hours=13), timedelta(hours=-13)])
def test_a_clock_is_not_trusted_for_an_hour_after_a_boot(known: Memory, ahead: timedelta) -> None:
    booted = known.at("another boot", NOW + ahead, 10.0)
    assert booted.distrusts(10.0)
    later = booted.at("another boot", NOW + ahead + timedelta(seconds=60), 70.0)
    assert later == booted, "it keeps its pace"
    assert later.distrusts(DISTRUST - 1)
    assert not later.distrusts(DISTRUST)


def test_one_that_is_put_right_after_a_boot_is_trusted_an_hour_later() -> None:
    put_right = KNOWN.at("another boot", NOW + timedelta(hours=13), 10.0).at("another boot", NOW, 610.0)
    assert put_right.distrusts(610.0 + DISTRUST - 1)
    assert not put_right.distrusts(610.0 + DISTRUST)


def test_a_server_that_has_been_up_for_long_when_it_is_first_looked_at_is_trusted() -> None:
    assert not Memory().at("boot", NOW, DISTRUST).distrusts(DISTRUST)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    kept = Memory("boot", 1.5, 7.0, {"0": "container x"}, {"p._.alice": "text"}, {"4711": 9})
    memory.write(tmp_path / "state" / "reconcile.json", kept)
    assert memory.read(tmp_path / "state" / "reconcile.json") == kept


WHOLE: dict[str, Any] = {"boot_id": "b", "offset": 1.0, "distrust_until": 0.0, "unmanaged": {}, "notices": {}}
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "cut off": json.dumps(WHOLE).encode()[:-9],
    "zeros": b"\0" * 100,
    "another kind of document": b"[1, 2]",
    "a key of another version": json.dumps({**WHOLE, "new": 1}).encode(),
    "an offset that is no number": json.dumps({**WHOLE, "offset": "x"}).encode(),
    "a time that is none": json.dumps({**WHOLE, "distrust_until": None}).encode(),
    "a list of notices": json.dumps({**WHOLE, "notices": ["x"]}).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_nothing(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "reconcile.json"
    file.write_bytes(content)
    assert memory.read(file) == Memory()


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "reconcile.json"
    file.write_text(json.dumps(WHOLE), encoding="utf-8")
    assert memory.read(file).boot_id == "b"


def test_no_file_and_no_room(tmp_path: Path) -> None:
    assert memory.read(tmp_path / "none") == Memory()
    (tmp_path / "file").touch()
    with pytest.raises(Ds01Error) as caught:
        memory.write(tmp_path / "file" / "reconcile.json", KNOWN)
    assert caught.value.reason == "permission_denied"
