"""Files replaced as a whole."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from ds01 import files


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644], ids=oct)
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077], ids=oct)
def test_content_and_mode_are_as_asked(
    mask: int, mode: int, durable: bool, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    target = tmp_path / "file.json"
    target.write_bytes(b"a longer text than the one that follows")
    files.replace(target, b"new", mode, durable=durable)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [target]


def test_a_reader_keeps_the_content_that_it_opened(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    files.replace(target, b"old", 0o644)
    with target.open("rb") as reader:
        files.replace(target, b"new", 0o644)
        assert reader.read() == b"old"


def test_a_link_in_the_target_s_place_is_replaced_not_followed(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "file.json"
    victim.write_bytes(b"untouched")
    target.symlink_to(victim)
    files.replace(target, b"new", 0o644)
    assert (victim.read_bytes(), target.read_bytes()) == (b"untouched", b"new")
    assert not target.is_symlink()


def test_a_link_in_the_temporary_file_s_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / ".file.json.new").symlink_to(victim)
    with pytest.raises(OSError):
        files.replace(tmp_path / "file.json", b"new", 0o644)
    assert victim.read_bytes() == b"untouched"


def test_a_failure_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "directory"
    (target / "full").mkdir(parents=True)
    with pytest.raises(OSError):
        files.replace(target, b"new", 0o644)
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "nowhere" / "file", b"", 0o644)


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_a_directory_that_is_made_has_the_mode_and_one_that_is_there_keeps_its_own(
    mask: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    files.make_directory(tmp_path / "new" / "inner", 0o750)
    assert stat.S_IMODE((tmp_path / "new" / "inner").stat().st_mode) == 0o750
    (tmp_path / "new" / "inner").chmod(0o711)
    files.make_directory(tmp_path / "new" / "inner", 0o750)
    assert stat.S_IMODE((tmp_path / "new" / "inner").stat().st_mode) == 0o711
