"""Torn, flipped, edited, of another shape: a ledger that is not what was written is never taken for one that is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01 import overview, processes, records
from ds01.allocations import Allocations
from ds01.errors import Ds01Error
from ds01.events import EventLog
from ds01.ledger import LedgerStore
from ds01.model import Ledger, Request, Ticket, Waiter
from ds01.names import ContainerName
from installation import made_for
from support import NOW, Host, machine, taken
from test_allocations import INVENTORY, change, ledger_says, projections

pytestmark = pytest.mark.robust


def read(path: Path) -> Ledger | str:
    """The ledger, or the reason why there is none."""
    try:
        return LedgerStore(path).read()
    except Ds01Error as exc:
        return exc.reason


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, bytes, Ledger]:
    """A ledger as it is written: its path, its bytes, and what they say."""
    path = tmp_path / "gpu-state.json"
    with LedgerStore(path).transaction() as transaction:
        transaction.commit(taken(machine("full", ["2g.20gb"] * 3), alice="0", bob="1:0 1:2"), NOW)
    return path, path.read_bytes(), LedgerStore(path).read()


def test_cut_at_any_length(written: tuple[Path, bytes, Ledger]) -> None:
    path, content, ledger = written
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        expected = "ledger_damaged" if length < len(content) - 1 else ledger  # only the last line's end is missing
        assert read(path) == expected, f"the first {length} of {len(content)} bytes"


def test_any_bit_flipped(written: tuple[Path, bytes, Ledger]) -> None:
    path, content, ledger = written
    harmless = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = read(path)
        assert found in ("ledger_damaged", ledger), f"bit {bit % 8} of byte {bit // 8}"
        harmless += found == ledger
    assert harmless < len(content), "space between the values, and the name of the checksum"


@pytest.mark.parametrize("block", [1, 512, 4096])
def test_a_block_of_zeros_as_a_power_cut_leaves_it(block: int, written: tuple[Path, bytes, Ledger]) -> None:
    path, content, _ = written
    for start in range(0, len(content), max(block, 7)):
        end = min(start + block, len(content))
        path.write_bytes(content[:start] + bytes(end - start) + content[end:])
        assert read(path) == "ledger_damaged", f"bytes {start} to {end}"


@pytest.mark.parametrize("more", [b"x", b"\0" * 512, b"{}", b'{"allocations": {}}'])
def test_something_after_the_end(more: bytes, written: tuple[Path, bytes, Ledger]) -> None:
    path, content, _ = written
    path.write_bytes(content + more)
    assert read(path) == "ledger_damaged"


def test_two_halves_of_two_ledgers(written: tuple[Path, bytes, Ledger]) -> None:
    path, content, _ = written
    with LedgerStore(path).transaction() as transaction:
        transaction.commit(Ledger({"p._.alice": transaction.ledger.allocations["p._.alice"]}), NOW)
    newer = path.read_bytes()
    assert len(newer) < len(content)
    for length in range(100, len(newer) - 1, 11):
        path.write_bytes(newer[:length] + content[length:])
        assert read(path) == "ledger_damaged", f"{length} bytes of the newer one"


def _edit(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"p._.bob"', '"p._.eve"'), encoding="utf-8")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "ledger_damaged"),
    "emptied": (lambda path: path.write_bytes(b""), "ledger_damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "ledger_damaged"),
    "edited by hand": (_edit, "ledger_damaged"),
    "another file": (lambda path: path.write_bytes(b"defaults: {max_gpus: 2}\n"), "ledger_damaged"),
    "another file of JSON": (
        lambda path: path.write_bytes(b'{"cdiVersion": "0.6.0", "devices": []}'),
        "ledger_damaged",
    ),
    "nested without an end": (lambda path: path.write_bytes(b"[" * 200_000), "ledger_damaged"),
    "a number without an end": (lambda path: path.write_bytes(b"9" * 200_000), "ledger_damaged"),
    "a directory": (_directory, "ledger_unavailable"),
}
VERBS: Mapping[str, Callable[[Allocations], object]] = {
    "allocate": lambda ds01: ds01.apply([change("allocated", "carol")]),
    "allocate again": lambda ds01: ds01.apply([change("allocated", "alice")]),
    "hold": lambda ds01: ds01.apply([change("held", "alice")]),
    "activate": lambda ds01: ds01.apply([change("active", "alice")]),
    "release": lambda ds01: ds01.apply([change("released", "alice")]),
    "preview": lambda ds01: ds01.preview([change("allocated", "carol")]),
    "status": overview.status,
    "validate": lambda ds01: ds01.validate(ContainerName("p", "alice", "p._.alice")),
    "a name": lambda ds01: ds01.name("p"),
}


@pytest.fixture
def records_of_two(ds01: Allocations, host: Host) -> Mapping[str, Any]:
    """What the ledger says of alice and bob, who have a device each."""
    ds01.apply([change("allocated", "alice"), change("allocated", "bob")])
    return json.loads(host.ledger.read_bytes())["allocations"]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_without_an_engine_every_verb_is_refused_and_touches_nothing(
    damage: Callable[[Path], object], reason: str, records_of_two: Mapping[str, Any], ds01: Allocations, host: Host
) -> None:
    damage(host.ledger)
    before = host.tree()
    for verb, call in VERBS.items():
        with pytest.raises(Ds01Error) as caught:
            call(ds01)
        assert (verb, caught.value.reason, caught.value.exit_code) == (verb, reason, 3)
    assert host.tree() == before


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_with_an_engine_it_is_rebuilt_and_the_damaged_file_is_kept(
    damage: Callable[[Path], object],
    reason: str,
    records_of_two: Mapping[str, Any],
    ds01: Allocations,
    host: Host,
    engine_with: Callable[..., None],
) -> None:
    had = ledger_says(host)
    engine_with(made_for(records_of_two))
    damage(host.ledger)
    if reason != "ledger_damaged":
        with pytest.raises(Ds01Error, match="cannot be read"):
            ds01.apply([change("allocated", "carol")])
        return
    damaged = host.ledger.read_bytes()
    (outcome,) = ds01.apply([change("allocated", "carol")])
    assert outcome.reason == "granted"
    now = ledger_says(host)
    assert now.pop("p._.carol") not in had.values()
    assert now == had
    assert projections(host) == ledger_says(host)
    (kept,) = host.state.glob("gpu-state.json.damaged-*")
    assert kept.read_bytes() == damaged
    told = [event for event in EventLog(host.events, "").read(9, bool) if event["event"] == "ledger.rebuilt"]
    assert [(event["reason"], event["kept"]) for event in told] == [("ledger_damaged", str(kept))]


def test_a_lost_ledger_is_rebuilt_with_an_engine(
    records_of_two: Mapping[str, Any], ds01: Allocations, host: Host, engine_with: Callable[..., None]
) -> None:
    had = ledger_says(host)
    engine_with(made_for(records_of_two))
    host.ledger.unlink()
    ds01.apply([change("released", "carol")])
    assert ledger_says(host) == had


def _symlink(path: Path) -> None:
    path.symlink_to(path.parent.parent / "victim")


@pytest.mark.parametrize("plant", [_symlink, Path.mkdir], ids=["a symlink", "a directory"])
def test_something_else_in_place_of_the_lock(plant: Callable[[Path], None], ds01: Allocations, host: Host) -> None:
    (host.root / "victim").write_bytes(b"untouched")
    host.state.mkdir()
    plant(host.ledger.with_suffix(".lock"))
    with pytest.raises(Ds01Error) as caught:
        ds01.apply([change("allocated", "alice")])
    assert (caught.value.reason, caught.value.exit_code) == ("permission_denied", 3)
    assert (host.root / "victim").read_bytes() == b"untouched"
    assert (ledger_says(host), projections(host)) == ({}, {})


@pytest.mark.parametrize("name", [".gpu-state.json.new", "gpu-state.json.prev", "gpu-state.json.link"])
def test_a_directory_in_place_of_a_file_that_a_write_needs(name: str, ds01: Allocations, host: Host) -> None:
    ds01.apply([change("allocated", "alice")])
    had = ledger_says(host)
    (host.state / name).mkdir()
    with pytest.raises(Ds01Error) as caught:
        ds01.apply([change("allocated", "bob")])
    assert (caught.value.reason, caught.value.exit_code) == ("ledger_unavailable", 3)
    assert ledger_says(host) == projections(host) == had


# --- valid JSON, no checksum (as the replaced system wrote it), and one value that does not belong there

WRONG = [
    None, True, 0, -1, 10**30, 0.5, "", "x", "../../x", "\0", "1e400", [], [1], ["x"], [[1]], {}, {"x": 1}, [1, 2],
    float("inf"), float("nan"), [float("inf"), 1], "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z",
]  # fmt: skip


def _document() -> dict[str, Any]:
    waiter = Waiter(Request("p._.carol", "carol"), 10, None, Ticket(NOW, NOW + timedelta(hours=1), processes.current()))
    found = records.to_json(replace(taken(INVENTORY, alice="0:1", bob="2"), queue=(waiter,)))
    found["allocations"]["p._.alice"]["stopped_at"] = "2025-11-21T10:00:00Z"
    del found["checksum"]
    return found


def _places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _places(value, (*at, key))


def _with(value: Any, at: tuple[Any, ...]) -> Any:
    document = {"": _document()}
    node: Any = document
    *way, last = ("", *at)
    for key in way:
        node = node[key]
    node[last] = copy.deepcopy(value)
    return document[""]


def _cases() -> Iterator[Any]:
    for at in _places(_document()):
        if "p._.bob" not in at:
            yield pytest.param(at, id=".".join(map(str, at)) or "the whole file")


@pytest.mark.parametrize("at", list(_cases()))
def test_a_value_that_does_not_belong_there_is_never_a_traceback(
    at: tuple[Any, ...], ds01: Allocations, host: Host
) -> None:
    host.state.mkdir()
    for value in WRONG:
        content = json.dumps(_with(value, at))
        for call in VERBS.values():
            host.ledger.write_text(content, encoding="utf-8")
            try:
                call(ds01)
            except Ds01Error as exc:
                assert exc.reason in ("ledger_damaged", "invalid_input"), content
