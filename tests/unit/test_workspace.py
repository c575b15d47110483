"""The user's directory on the host: made by the user, owned by the user, no link followed blindly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ds01 import workspace
from ds01.container_spec import Mount
from ds01.errors import Ds01Error
from ds01.names import Account


@pytest.fixture
def me(tmp_path: Path) -> Account:
    """This process's own user, at home in a temporary directory."""
    return Account("me", os.geteuid(), os.getegid(), str(tmp_path))


def test_place_knows_home_user_and_project() -> None:
    alice = Account("alice", 2001, 2001, "/home/alice")
    assert workspace.place("{home}/workspace", "p", alice) == "/home/alice/workspace"
    assert workspace.place("/srv/{user}/{project}", "p", alice) == "/srv/alice/p"


def test_a_missing_one_is_made_for_the_user(me: Account, tmp_path: Path) -> None:
    workspace.ensure(str(tmp_path / "a" / "b"), me)
    made = (tmp_path / "a" / "b").stat()
    assert (made.st_uid, oct(made.st_mode & 0o777)) == (me.uid, "0o750")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_root_makes_nothing_where_the_user_may_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    nobody = Account("nobody", 65534, 65534, "/nonexistent")
    with pytest.raises(Ds01Error, match="nobody cannot make it"):
        workspace.ensure(str(tmp_path / "workspace"), nobody)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a//b", "", "/a/"])
def test_odd_paths_are_refused(path: str, me: Account) -> None:
    with pytest.raises(Ds01Error, match="plain absolute path"):
        workspace.ensure(path, me)


def test_somebody_else_s_directory_is_refused_through_a_link_too(me: Account, tmp_path: Path) -> None:
    stranger = Account("stranger", me.uid + 1, me.gid, str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for path in (tmp_path / "mine", tmp_path / "link"):
        with pytest.raises(Ds01Error, match="not a directory of stranger"):
            workspace.ensure(str(path), stranger)


def test_what_was_checked_is_what_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert workspace.mount(str(tmp_path / "link"), "/workspace").source == str(tmp_path / "real")


def test_a_mount_s_links_must_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "out").symlink_to("/etc")
    allowed = [str(tmp_path / "data")]
    assert workspace.check_mount(Mount(str(tmp_path / "data"), "/data"), allowed).source == str(tmp_path / "data")
    with pytest.raises(Ds01Error, match="leads to /etc"):
        workspace.check_mount(Mount(str(tmp_path / "data" / "out"), "/x"), allowed)
    with pytest.raises(Ds01Error, match="does not exist"):
        workspace.check_mount(Mount(str(tmp_path / "data" / "none"), "/x"), allowed)
