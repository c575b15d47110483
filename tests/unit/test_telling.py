"""Words for users: a file in the workspace, with their own rights, and lines on their own terminals."""

from __future__ import annotations

import os
import pty
import pwd
from pathlib import Path

import pytest
from ds01 import telling
from ds01.names import Account


def account_of(uid: int) -> Account:
    return Account("somebody", uid, uid, "/", "/bin/sh", "somebody")


ME = account_of(os.getuid())
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as somebody else")


def test_a_notice_comes_changes_and_goes(tmp_path: Path) -> None:
    file = tmp_path / "NOTICE.txt"
    assert telling.leave_notice(ME, file, "first\n")
    assert telling.leave_notice(ME, file, "Grüße\n")
    assert file.read_text(encoding="utf-8") == "Grüße\n"
    assert telling.leave_notice(ME, file, "")
    assert not file.exists()
    assert telling.leave_notice(ME, file, ""), "gone already"
    assert not telling.leave_notice(ME, tmp_path / "none" / "NOTICE.txt", "text")


@ROOT_ONLY
def test_root_gets_no_further_than_the_user_would(tmp_path: Path) -> None:
    nobody = account_of(pwd.getpwnam("nobody").pw_uid)
    secret = tmp_path / "secret"
    secret.write_text("root's", encoding="utf-8")
    secret.chmod(0o600)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o777 == 0o700:
            directory.chmod(0o755)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    os.chown(workspace, nobody.uid, nobody.gid)
    assert telling.leave_notice(nobody, workspace / "NOTICE.txt", "text")
    assert (workspace / "NOTICE.txt").stat().st_uid == nobody.uid
    (workspace / "link").symlink_to(secret)
    assert not telling.leave_notice(nobody, workspace / "link", "overwritten")
    assert secret.read_text(encoding="utf-8") == "root's"


def test_a_terminal_of_the_user_and_of_nobody_else(tmp_path: Path) -> None:
    """One alone: `say` writes to every terminal of the user's, and here they are real."""
    leader, follower = pty.openpty()
    terminal = Path(os.ttyname(follower))
    try:
        (tmp_path / "0").symlink_to(terminal)
        assert telling.say(ME, "hello", tmp_path) == 0, "a link is not followed"
        assert not telling._write(terminal, 12345, b"hello\r\n")
        assert telling._write(terminal, terminal.stat().st_uid, b"welcome\r\n")
        assert os.read(leader, 1000).startswith(b"welcome\r")
    finally:
        os.close(leader)
        os.close(follower)
