"""Who a process belongs to, in words."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from ds01 import processes

# name: /proc/4711/status, the phrase
STATUS = {
    "a process of a user": ("Name:\tpython3\nUmask:\t0022\nUid:\t0\t1\t1\t1\n", "process 4711 (python3 of root)"),
    "a uid without a login": (
        "Name:\tpython3\nUid:\t3999999999\t0\t0\t0\n",
        "process 4711 (python3 of uid 3999999999)",
    ),
    "a name with a tab and a space": ("Name:\ta: b\tc\nUid:\t0\t0\t0\t0\n", "process 4711 (a: b?c of root)"),
    "a name that plays with the terminal": ("Name:\t\x1b[2Jx\nUid:\t0\t0\t0\t0\n", "process 4711 (?[2Jx of root)"),
    "nothing in it": ("", "process 4711"),
    "no uid in it": ("Name:\tpython3\n", "process 4711"),
}


@pytest.mark.parametrize(("status", "phrase"), STATUS.values(), ids=STATUS)
def test_in_words(status: str, phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "4711").mkdir()
    (tmp_path / "4711" / "status").write_text(status, encoding="utf-8")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert processes.describe(4711) == phrase


def test_a_name_in_no_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_bytes(b"Name:\t\xff\nUid:\t0\t0\t0\t0\n" + b"x" * 100_000)
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert processes.describe(7) == "process 7 (\ufffd of root)"


def test_a_real_one() -> None:
    login = pwd.getpwuid(os.getuid()).pw_name
    assert processes.describe(os.getpid()).endswith(f" of {login})")


@pytest.mark.parametrize("pid", [0, -1, 2**40])
def test_one_that_is_not_there(pid: int) -> None:
    assert processes.describe(pid) == f"process {pid}"
