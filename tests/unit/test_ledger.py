"""The ledger file: locked, whole, durable, and untouched when nothing changed."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from ds01.errors import Ds01Error
from ds01.ledger import LedgerStore
from ds01.model import Allocation, Device, Ledger
from support import NOW, machine, taken

BEFORE = taken(machine("full", "full"), alice="0")
AFTER = taken(machine("full", "full"), alice="0", bob="1")
PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "gpu-state.json"


def commit(path: Path, ledger: Ledger) -> bool:
    with LedgerStore(path, 5).transaction() as transaction:
        return transaction.commit(ledger, NOW)


@contextmanager
def held_lock(path: Path, said: bytes = b"pid 4711") -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("wb", buffering=0) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(said)
        yield


def test_no_file_is_an_empty_ledger(path: Path) -> None:
    assert LedgerStore(path).read() == Ledger()
    assert not path.parent.exists(), "reading makes nothing"


def test_what_is_committed_is_read(path: Path) -> None:
    assert commit(path, BEFORE)
    found = LedgerStore(path).read()
    assert found.allocations == BEFORE.allocations
    assert (found.generation, found.last_updated) == (1, NOW)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["version"] == 1
    assert document["checksum"].startswith("sha256:")


def test_each_change_is_a_generation(path: Path) -> None:
    with LedgerStore(path).transaction() as transaction:
        for ledger in (BEFORE, AFTER, BEFORE):
            assert transaction.commit(ledger, NOW)
            assert transaction.ledger.allocations == ledger.allocations
    assert LedgerStore(path).read().generation == 3


def test_a_commit_that_changes_nothing_leaves_the_file_alone(path: Path) -> None:
    commit(path, BEFORE)
    os.utime(path, ns=(10**18, 10**18))
    before = path.read_bytes(), path.stat()
    assert not commit(path, replace(BEFORE, generation=99, last_updated=NOW + timedelta(days=1)))
    assert path.read_bytes() == before[0]
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (10**18, before[1].st_ino)
    assert not path.with_suffix(".json.prev").exists()


def test_a_transaction_without_a_commit_writes_no_ledger(path: Path) -> None:
    with LedgerStore(path).transaction():
        pass
    assert not path.exists()


def test_the_generation_before_is_kept(path: Path) -> None:
    commit(path, BEFORE)
    first = path.read_bytes()
    commit(path, AFTER)
    assert path.with_suffix(".json.prev").read_bytes() == first
    second = path.read_bytes()
    commit(path, Ledger())
    assert path.with_suffix(".json.prev").read_bytes() == second
    assert sorted(p.name for p in path.parent.iterdir()) == ["gpu-state.json", "gpu-state.json.prev", "gpu-state.lock"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000, 0o027], ids=oct)
def test_modes_do_not_depend_on_the_umask(mask: int, path: Path, umask: Callable[[int], int]) -> None:
    umask(mask)
    commit(path, BEFORE)
    commit(path, AFTER)
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (path.parent, path, path.with_suffix(".json.prev"))}
    assert modes == {"state": "0o750", "gpu-state.json": "0o640", "gpu-state.json.prev": "0o640"}


def test_the_file_is_replaced_never_rewritten(path: Path) -> None:
    commit(path, BEFORE)
    with path.open("rb") as reader:
        commit(path, AFTER)
        assert json.load(reader)["generation"] == 1
    assert json.loads(path.read_bytes())["generation"] == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"42",
        b"{}",
        b'{"allocations": {"p._.alice": {}}}',
        b'{"allocations": {}, "checksum": "sha256:0"}',
    ],
    ids=["empty", "cut", "not text", "list", "null", "number", "no allocations", "wrong record", "wrong checksum"],
)
def test_a_ledger_that_cannot_be_read_is_refused_and_kept(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(Ds01Error) as caught:
        commit(path, BEFORE)
    assert (caught.value.reason, caught.value.exit_code) == ("ledger_damaged", 3)
    assert str(path) in str(caught.value)
    assert "gpu-state.json.prev" in caught.value.hint
    assert path.read_bytes() == content


def test_half_a_ledger_is_refused(path: Path) -> None:
    commit(path, AFTER)
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(Ds01Error) as caught:
            LedgerStore(path).read()
        assert caught.value.reason == "ledger_damaged"


def test_leftovers_of_a_killed_writer_do_no_harm(path: Path) -> None:
    commit(path, BEFORE)
    (path.parent / ".gpu-state.json.new").write_bytes(b'{"allocations": {"half')
    path.with_suffix(".json.link").write_bytes(b"{")
    assert LedgerStore(path).read().allocations == BEFORE.allocations
    assert commit(path, AFTER)
    assert LedgerStore(path).read().allocations == AFTER.allocations


@pytest.mark.parametrize("name", ["gpu-state.lock", ".gpu-state.json.new"])
def test_links_planted_in_the_directory_are_not_followed(name: str, path: Path) -> None:
    victim = path.parent.parent / "victim"
    victim.write_bytes(b"untouched")
    path.parent.mkdir()
    (path.parent / name).symlink_to(victim)
    with pytest.raises((Ds01Error, OSError)):
        commit(path, BEFORE)
    assert victim.read_bytes() == b"untouched"
    assert not path.exists()


def test_a_failed_write_is_a_refusal_not_a_traceback(path: Path) -> None:
    path.parent.mkdir()
    (path.parent / ".gpu-state.json.new").mkdir()
    with pytest.raises(Ds01Error) as caught:
        commit(path, BEFORE)
    assert caught.value.reason == "ledger_unavailable"


def test_what_could_not_be_written_is_not_taken_for_done(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again in the same transaction, once there is space."""
    commit(path, BEFORE)
    store = LedgerStore(path)
    with store.transaction() as transaction:
        with monkeypatch.context() as full, pytest.raises(Ds01Error):
            full.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            transaction.commit(AFTER, NOW)
        assert transaction.ledger.allocations == BEFORE.allocations
        assert transaction.commit(AFTER, NOW)
    assert store.read().allocations == AFTER.allocations


def test_a_renewal_is_a_generation_of_the_same(path: Path) -> None:
    commit(path, BEFORE)
    store = LedgerStore(path)
    before = store.read()
    with store.transaction() as transaction:
        transaction.renew(NOW)
    assert store.read().generation == before.generation + 1
    assert store.read().allocations == before.allocations


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file", encoding="utf-8")
    with pytest.raises(Ds01Error) as caught:
        commit(tmp_path / "state" / "gpu-state.json", BEFORE)
    assert (caught.value.reason, caught.value.exit_code) == ("permission_denied", 3)


def test_a_lock_held_elsewhere_is_a_refusal_that_names_the_holder(path: Path) -> None:
    with held_lock(path), pytest.raises(Ds01Error) as caught, LedgerStore(path, 0.05).transaction():
        pytest.fail("got the lock of somebody else")
    assert (caught.value.reason, caught.value.exit_code) == ("lock_timeout", 3)
    assert "pid 4711" in caught.value.message
    assert "0.05 s" in caught.value.message
    assert not path.exists()


def test_who_waits_asks_ever_less_often(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    flock = fcntl.flock
    with held_lock(path):
        monkeypatch.setattr(fcntl, "flock", lambda *args: (asked.append(time.monotonic()), flock(*args)))
        with pytest.raises(Ds01Error), LedgerStore(path, 0.6).transaction():
            pytest.fail("got the lock of somebody else")
    assert 6 < len(asked) < 40, "a thousand who wait would leave no processor to the one who has it"
    assert asked[-1] - asked[0] >= 0.55, "nobody gives up early"


def test_reading_needs_no_lock(path: Path) -> None:
    commit(path, BEFORE)
    with held_lock(path):
        assert LedgerStore(path, 0.05).read().allocations == BEFORE.allocations


def test_the_lock_ends_with_the_transaction_even_a_failed_one(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), LedgerStore(path).transaction():
        raise ZeroDivisionError
    assert commit_soon(path)


def commit_soon(path: Path) -> bool:
    with LedgerStore(path, 0.5).transaction() as transaction:
        return transaction.commit(BEFORE, NOW)


def _hold_until_killed(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with LedgerStore(path).transaction():
        ready.set()
        time.sleep(60)


def test_the_lock_dies_with_its_process(path: Path) -> None:
    ready = PROCESSES.Event()
    holder = PROCESSES.Process(target=_hold_until_killed, args=(path, ready))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(Ds01Error, match=f"pid {holder.pid}"), LedgerStore(path, 0.05).transaction():
        pytest.fail("got the lock of a living process")
    holder.kill()
    holder.join(20)
    assert commit_soon(path)


def _add(path: Path, worker: int, count: int) -> None:
    for number in range(count):
        name = f"p{number}._.user{worker}"
        device = Device("0", f"GPU-{name}", "GPU-0", "full")
        with LedgerStore(path, 20).transaction() as transaction:
            allocation = Allocation(name, f"user{worker}", (device,), 10, NOW)
            transaction.commit(transaction.ledger.with_allocation(allocation), NOW)


def test_processes_at_once_lose_nothing_of_each_other(path: Path) -> None:
    workers = [PROCESSES.Process(target=_add, args=(path, n, 10)) for n in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        LedgerStore(path).read()  # whole at every moment
        workers[0].join(0.01)
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    found = LedgerStore(path).read()
    assert len(found.allocations) == 40
    assert found.generation == 40
