"""ds01_tree: the wanted files and no others, checked together, and nothing written that is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ds01_tree
import pytest
from ansible.module_utils.testing import patch_module_args

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the module on the directory `tree`; its result."""

    def call(files: dict[str, str], check: bool = False, **options: Any) -> dict[str, Any]:
        arguments = {"path": str(tmp_path / "tree"), "files": files, **options}
        with (
            patch_module_args({**arguments, "_ansible_check_mode": check, "_ansible_remote_tmp": str(tmp_path)}),
            pytest.raises(SystemExit),
        ):
            ds01_tree.main()
        return json.loads(capsys.readouterr().out)

    return call


def state(root: Path) -> dict[str, tuple[int, str | None]]:
    """Mode and text of everything below `tree`."""
    return {
        str(path.relative_to(root)): (path.stat().st_mode & 0o7777, path.read_text() if path.is_file() else None)
        for path in sorted(root.glob("tree/**/*"))
    }


def test_files_and_directories_are_made_with_their_modes(run: Run, tmp_path: Path) -> None:
    result = run({"a": "1\n", "deep/b": "2\n"})
    assert result["changed"]
    assert state(tmp_path) == {
        "tree/a": (0o644, "1\n"),
        "tree/deep": (0o755, None),
        "tree/deep/b": (0o644, "2\n"),
    }


def test_a_careful_umask_locks_nobody_out(run: Run, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run({"deep/a": "1\n"}, path=str(tmp_path / "above" / "tree"))
    finally:
        os.umask(before)
    made = [tmp_path / "above", *(tmp_path / "above").rglob("*")]
    assert [path.stat().st_mode & 0o7777 for path in made] == [0o755, 0o755, 0o755, 0o644]


def test_a_second_run_changes_nothing(run: Run, tmp_path: Path) -> None:
    run({"a": "1\n"})
    written = (tmp_path / "tree" / "a").stat().st_mtime_ns
    assert not run({"a": "1\n"})["changed"]
    assert (tmp_path / "tree" / "a").stat().st_mtime_ns == written


@pytest.mark.parametrize("existing", [False, True])
def test_a_dry_run_says_the_same_and_writes_nothing(run: Run, tmp_path: Path, existing: bool) -> None:
    if existing:
        run({"a": "old\n", "b.py": ""})
    before = state(tmp_path)
    dry = run({"a": "new\n"}, check=True, purge=["*.py"])
    assert state(tmp_path) == before
    real = run({"a": "new\n"}, purge=["*.py"])
    assert {key: dry[key] for key in ("changed", "written", "removed", "diff")} == {
        key: real[key] for key in ("changed", "written", "removed", "diff")
    }


def test_a_mode_that_drifted_is_put_right(run: Run, tmp_path: Path) -> None:
    run({"a": "1\n"})
    (tmp_path / "tree" / "a").chmod(0o600)
    (tmp_path / "tree").chmod(0o700)
    result = run({"a": "1\n"})
    assert result["written"] == ["a"]
    assert result["diff"][0]["before_header"].endswith("0600")
    assert (tmp_path / "tree" / "a").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "tree").stat().st_mode & 0o7777 == 0o755


def test_purge_takes_what_matches_and_nothing_else(run: Run, tmp_path: Path) -> None:
    run({"one.d/50.conf": "", "two.d/50.conf": "", "three.d/50.conf": "", "three.d/own.conf": "", "other": ""})
    result = run({"one.d/50.conf": ""}, purge=["*.d/50.conf"])
    assert result["removed"] == ["three.d/50.conf", "two.d/50.conf"]
    assert set(state(tmp_path)) == {
        "tree/one.d",
        "tree/one.d/50.conf",
        "tree/three.d",
        "tree/three.d/own.conf",
        "tree/other",
    }


def test_a_link_is_replaced_not_followed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "tree" / "a").symlink_to(tmp_path / "victim")
    run({"a": "1\n"})
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "tree" / "a").is_symlink()


def test_all_files_are_checked_together_before_any_is_replaced(run: Run, tmp_path: Path) -> None:
    run({"a": "old\n", "b": "old\n"})
    before = state(tmp_path)
    result = run({"a": "new\n", "b": "bad\n"}, validate='sh -c "cat %s/a; grep bad %s/b >&2; exit 3"')
    assert result["failed"]
    assert result["msg"] == f"bad Nothing in {tmp_path / 'tree'} was changed."
    assert state(tmp_path) == before
    assert run({"a": "new\n", "b": "good\n"}, validate='sh -c "grep -q good %s/b"')["changed"]


def test_the_check_names_the_real_place(run: Run, tmp_path: Path) -> None:
    result = run({"a": "x"}, validate='sh -c "echo %s/a: wrong. >&2; exit 2"')
    assert result["msg"] == f"{tmp_path / 'tree' / 'a'}: wrong. Nothing in {tmp_path / 'tree'} was changed."


def test_nothing_new_needs_no_check(run: Run) -> None:
    run({"a": "1\n"})
    assert not run({"a": "1\n"}, validate="false %s").get("failed")


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a"])
def test_no_file_leaves_the_directory(run: Run, name: str) -> None:
    assert "is not a path below" in run({name: ""})["msg"]
