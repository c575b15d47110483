"""The audit log over several files: set aside by size, read as one, by whoever and whenever."""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ds01 import event_files
from ds01.event_files import LogFiles, Position
from ds01.events import EventLog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import NOW

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "events.jsonl"


@pytest.fixture
def log(path: Path) -> LogFiles:
    return LogFiles(path)


def fill(log: LogFiles, *texts: str) -> None:
    """Lines, and `|` where the log is set aside."""
    for text in texts:
        if text == "|":
            log.rotate(1, 99)
        else:
            log.append(f"{text}\n".encode())


def tail(log: LogFiles, last: int = 99) -> str:
    found, _ = log.tail(last, lambda line: line.decode().strip() or None)
    return " ".join(found)


def after(log: LogFiles, position: Position | None) -> tuple[str, Position | None]:
    """What came after it, and the place to go on from."""
    found = []
    for line, place in log.after(position):
        found.append(line.decode().strip())
        position = place
    return " ".join(found), position


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize(
    ("content", "size", "turned"),
    [("", 1, False), ("", 0, False), ("abc", 5, False), ("abc", 4, True), ("abc", 3, True), ("abc", 0, True)],
    ids=["empty", "empty, any size", "below", "just as large", "above", "any size"],
)
def test_it_is_set_aside_from_its_size_on(content: str, size: int, turned: bool, log: LogFiles, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(content and f"{content}\n", encoding="utf-8")
    assert log.rotate(size, 9) is turned
    assert names(path) == (["events.000001.jsonl", "events.jsonl"] if turned else ["events.jsonl"])
    assert tail(log) == content


def test_without_a_log_there_is_nothing_to_do(log: LogFiles, path: Path) -> None:
    assert not log.rotate(0, 1)
    assert not path.parent.exists()
    assert tail(log) == ""
    assert after(log, None) == ("", None)


@pytest.mark.parametrize(
    ("keep", "left", "read"),
    [(1, ["events.000003.jsonl"], "c d"), (2, ["events.000002.jsonl", "events.000003.jsonl"], "b c d")],
)
def test_only_the_newest_are_kept(keep: int, left: list[str], read: str, log: LogFiles, path: Path) -> None:
    fill(log, "a", "|", "b", "|", "c")
    log.rotate(1, keep)
    fill(log, "d")
    assert names(path) == [*left, "events.jsonl"]
    assert tail(log) == read


def test_a_lower_number_to_keep_counts_at_once(log: LogFiles, path: Path) -> None:
    fill(log, "a", "|", "b", "|", "c")
    assert not log.rotate(1000, 1)
    assert names(path) == ["events.000002.jsonl", "events.jsonl"]


def test_a_shell_lists_them_in_the_order_of_time(log: LogFiles, path: Path) -> None:
    fill(log, *itertools.chain.from_iterable((str(n), "|") for n in range(12)), "12")
    content = "".join(p.read_text(encoding="utf-8") for p in sorted(path.parent.glob("events*.jsonl")))
    assert content.split() == [str(n) for n in range(13)]


def test_numbers_go_on_where_some_are_missing_and_other_files_are_left_alone(log: LogFiles, path: Path) -> None:
    path.parent.mkdir()
    others = ["events.1.jsonl", "events.000009.jsonl.gz", "events.backup.jsonl", "other.000010.jsonl"]
    for name in ("events.000007.jsonl", "events.000002.jsonl", *others):
        path.with_name(name).write_text("x\n", encoding="utf-8")
    fill(log, "a")
    assert log.rotate(1, 2)
    assert names(path) == sorted([*others, "events.000007.jsonl", "events.000008.jsonl", "events.jsonl"])


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_the_next_file_has_the_mode_that_an_admin_chose(
    mask: int, log: LogFiles, path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    fill(log, "a")
    path.chmod(0o644)
    fill(log, "|")
    assert [oct(stat.S_IMODE(p.stat().st_mode)) for p in path.parent.iterdir()] == ["0o644", "0o644"]


@pytest.mark.parametrize(
    ("lines", "last", "read"),
    [
        ("a b | c d | e", 0, ""),
        ("a b | c d | e", 1, "e"),
        ("a b | c d | e", 2, "d e"),
        ("a b | c d | e", 4, "b c d e"),
        ("a b | c d | e", 9, "a b c d e"),
        ("a b | c d |", 1, "d"),
        ("a b | c d |", 3, "b c d"),
        ("a |", 0, ""),
    ],
)
def test_the_last_events_are_those_of_all_files(lines: str, last: int, read: str, log: LogFiles) -> None:
    fill(log, *lines.split())
    assert tail(log, last) == read


def test_only_as_many_files_are_read_as_it_takes(log: LogFiles, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log, "a", "|", "b", "|", "c", "d")
    monkeypatch.setattr(event_files, "_opened_archive", lambda path: pytest.fail(f"{path} was opened"))
    assert tail(log, 2) == "c d"


# What happens between two looks, and what the second one finds.
BETWEEN: dict[str, tuple[str, str]] = {
    "nothing": ("", ""),
    "events": ("c d", "c d"),
    "set aside": ("|", ""),
    "set aside after an event": ("c |", "c"),
    "set aside before an event": ("| c", "c"),
    "set aside between events": ("c | d", "c d"),
    "set aside twice": ("c | d | e", "c d e"),
    "set aside twice at once": ("| c | d", "c d"),
}


@pytest.mark.parametrize(("happens", "found"), BETWEEN.values(), ids=list(BETWEEN))
@pytest.mark.parametrize("before", ["a b", "a | b", "a b |"])
def test_whoever_comes_again_finds_just_what_is_new(before: str, happens: str, found: str, log: LogFiles) -> None:
    fill(log, *before.split())
    read, position = after(log, None)
    assert read == "a b"
    fill(log, *happens.split())
    read, position = after(log, position)
    assert read == found
    assert after(log, position) == ("", position)


@pytest.mark.parametrize("before", ["a b", "a | b", "a b |"])
def test_the_end_of_a_tail_is_the_place_to_go_on_from(before: str, log: LogFiles) -> None:
    fill(log, *before.split())
    _, position = log.tail(0, lambda line: line)
    fill(log, "c", "|", "d")
    assert after(log, position)[0] == "c d"


def test_a_file_that_is_gone_leaves_all_that_is_newer(log: LogFiles, path: Path) -> None:
    fill(log, "a")
    _, position = after(log, None)
    fill(log, "|", "b", "|", "c", "|", "d")
    log.rotate(1000, 1)
    assert after(log, position)[0] == "c d"


@pytest.mark.parametrize("how", ["removed", "emptied", "replaced"])
def test_a_log_that_somebody_began_anew_is_read_from_its_beginning(how: str, log: LogFiles, path: Path) -> None:
    fill(log, "a", "b")
    _, position = after(log, None)
    if how == "emptied":
        os.truncate(path, 0)
    else:
        path.unlink()
    if how == "replaced":
        path.write_text("x\n", encoding="utf-8")
    fill(log, "c", "d", "e")
    assert after(log, position)[0] == ("x c d e" if how == "replaced" else "c d e")


def test_half_a_line_is_left_until_it_is_whole(log: LogFiles, path: Path) -> None:
    fill(log, "a")
    with path.open("ab", buffering=0) as file:
        file.write(b"b")
        read, position = after(log, None)
        assert read == "a"
        assert after(log, position)[0] == ""
        file.write(b"c\n")
    assert after(log, position)[0] == "bc"


def test_half_a_line_in_an_older_file_hides_nothing(log: LogFiles, path: Path) -> None:
    fill(log, "a")
    with path.open("ab") as file:
        file.write(b"half")
    fill(log, "|", "b")
    assert tail(log) == "a b"
    assert after(log, None)[0] == "a b"


def test_a_writer_that_opened_the_log_just_before_it_was_set_aside_writes_into_the_next(
    log: LogFiles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, "a")
    locked = event_files._locked

    def slow(fd: int, kind: int) -> bool:
        if kind == fcntl.LOCK_SH:
            monkeypatch.setattr(event_files, "_locked", locked)
            fill(LogFiles(path), "|")
        return locked(fd, kind)

    monkeypatch.setattr(event_files, "_locked", slow)
    log.append(b"b\n")
    assert path.read_text(encoding="utf-8") == "b\n"
    assert path.with_name("events.000001.jsonl").read_text(encoding="utf-8") == "a\n"


def test_of_two_that_set_it_aside_one_does(log: LogFiles, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log, "a")
    locked = event_files._locked

    def slow(fd: int, kind: int) -> bool:
        monkeypatch.setattr(event_files, "_locked", locked)
        fill(LogFiles(path), "|", "b")
        return locked(fd, kind)

    monkeypatch.setattr(event_files, "_locked", slow)
    assert not log.rotate(1, 9)
    assert names(path) == ["events.000001.jsonl", "events.jsonl"]


def test_a_log_that_is_being_written_is_not_set_aside_and_a_stuck_lock_holds_up_no_event(
    log: LogFiles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_files, "_WAIT", 0.02)
    fill(log, "a")
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not log.rotate(1, 9)
        fcntl.flock(other, fcntl.LOCK_EX)
        fill(log, "b")
    assert tail(log) == "a b"


@pytest.mark.parametrize(
    "problem", ["none", "no log yet", "no directory yet", "a file for a directory", "a link", "a full disk"]
)
def test_whether_an_event_could_be_written(
    problem: str, log: LogFiles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, "a")
    if problem not in ("none", "a full disk"):
        path.unlink()
    if problem in ("no directory yet", "a file for a directory"):
        path.parent.rmdir()
    if problem == "a file for a directory":
        path.parent.write_text("", encoding="utf-8")
    if problem == "a link":
        path.symlink_to("/dev/null")
    if problem == "a full disk":
        full = os.statvfs_result((4096, 4096, 10, 0, 0, 10, 10, 10, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: full)
    if problem in ("none", "no log yet", "no directory yet"):
        log.check()
    else:
        with pytest.raises(OSError):
            log.check()


class Log(RuleBasedStateMachine):
    """Writers, readers who come again, and somebody who sets the log aside, one after the other."""

    directory: Path

    @initialize()
    def begin(self) -> None:
        self.path = self.directory / f"{next(_COUNT)}" / "events.jsonl"
        self.log = LogFiles(self.path)
        self.written: list[str] = []
        self.kept: list[int] = [0]
        self.readers: list[tuple[list[str], Position | None]] = [([], None)]

    @rule(length=st.integers(0, 40))
    def write(self, length: int) -> None:
        text = f"{len(self.written)}{'x' * length}"
        self.log.append(f"{text}\n".encode())
        self.written.append(text)

    @rule(size=st.integers(0, 120))
    def set_aside(self, size: int) -> None:
        large = self.path.exists() and self.path.stat().st_size >= max(size, 1)
        assert self.log.rotate(size, 99) == large

    @rule(last=st.integers(0, 60))
    def comes_later(self, last: int) -> None:
        found, position = self.log.tail(last, lambda line: line.decode().strip())
        assert found == self.written[max(0, len(self.written) - last) :]
        self.readers.append((list(self.written), position))

    @rule(data=st.data())
    def comes_again(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.readers) - 1))
        known, position = self.readers[which]
        for line, place in self.log.after(position):
            known.append(line.decode().strip())
            position = place
        self.readers[which] = (known, position)
        assert known == self.written

    @precondition(lambda self: self.path.exists())
    @rule()
    def dies_while_setting_aside(self) -> None:
        """Between the rename and the next file."""
        number = len(self.log._archives()) + 1
        self.path.rename(self.path.with_name(f"events.{number:06d}.jsonl"))

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if hasattr(self, "path") and self.path.parent.exists():
            files = sorted(self.path.parent.glob("events*.jsonl"))
            assert "".join(p.read_text(encoding="utf-8") for p in files).split() == self.written


_COUNT = itertools.count()


def test_any_order_of_writing_reading_and_setting_aside(tmp_path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class Here(Log):
        directory = tmp_path

    run_state_machine_as_test(Here, settings=settings())


def _write(path: Path, worker: int, number: int) -> None:
    log = EventLog(path, f"worker {worker}")
    for n in range(number):
        log.write("gpu.allocated", NOW, number=n, message="ü" * (n % 50))
        time.sleep(0.0005)  # whoever sets it aside waits for a gap
    assert log.problem is None


def _rotate(path: Path, done: Any) -> None:
    log = LogFiles(path)
    while not done.is_set():
        log.rotate(3000, 10_000)


def _of_workers(events: Iterator[dict[str, Any]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        found.setdefault(event["actor"], []).append(event["number"])
    return found


def test_no_event_is_lost_or_doubled_while_many_write_and_two_set_aside(path: Path) -> None:
    workers, number = 6, 400
    done = PROCESSES.Event()
    processes = [PROCESSES.Process(target=_write, args=(path, n, number)) for n in range(workers)]
    turning = [PROCESSES.Process(target=_rotate, args=(path, done)) for _ in range(2)]
    followed: list[dict[str, Any]] = []
    counted: list[str] = []
    everything = workers * number

    def follow() -> None:
        for event in EventLog(path, "").read(0, bool, follow=True):
            followed.append(event)
            if len(followed) == everything:
                return

    def count() -> None:
        log, position = LogFiles(path), None
        deadline = time.monotonic() + 60
        while len(counted) < everything and time.monotonic() < deadline:
            for line, place in log.after(position):
                position = place
                counted.append(json.loads(line)["actor"])

    readers = [threading.Thread(target=target, daemon=True) for target in (follow, count)]
    for one in (*readers, *turning, *processes):
        one.start()
    for process in processes:
        process.join(60)
    done.set()
    for one in (*turning, *readers):
        one.join(60)
    assert [p.exitcode for p in (*processes, *turning)] == [0] * 8
    assert len(names(path)) > 20, "it was hardly ever set aside"

    whole = {f"worker {n}": list(range(number)) for n in range(workers)}
    assert _of_workers(EventLog(path, "").read(10**6, bool)) == whole
    assert _of_workers(iter(followed)) == whole
    assert Counter(counted) == dict.fromkeys(whole, number)
