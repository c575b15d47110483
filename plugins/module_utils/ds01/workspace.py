"""The user's workspace on the host. An adapter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .container_spec import Mount, below
from .errors import Ds01Error
from .names import Account

_MKDIR_TIMEOUT = 30


def place(template: str, project: str, account: Account) -> str:
    """The workspace's path for a user and a project."""
    return template.format(home=account.home, user=account.name, project=project)


def check(path: str, account: Account) -> None:
    """The workspace, where it exists, is a directory of the user's own. Raises Ds01Error `invalid_input`."""
    if not Path(path).is_absolute() or os.path.normpath(path) != path:
        raise Ds01Error("invalid_input", f"The workspace {path!r} is not a plain absolute path.")
    real = Path(os.path.realpath(path))
    if real.exists() and not (real.is_dir() and real.stat().st_uid == account.uid):
        raise Ds01Error(
            "invalid_input",
            f"The workspace {path} is not a directory of {account.name} (it is {real}, of uid {real.stat().st_uid}).",
            "Choose a directory that the user owns.",
        )


def ensure(path: str, account: Account) -> None:
    """The workspace exists and is the user's own; it is made by the user, never by root.

    Root making or chowning something below a directory that a user writes to would follow that
    user's symbolic links. Raises Ds01Error `invalid_input`.
    """
    check(path, account)
    if not Path(path).exists():
        _make_as(account, path)
        check(path, account)


def check_mount(mount: Mount, allowed: Sequence[str]) -> Mount:
    """A further mount with its source's links resolved, still below an allowed directory.

    Raises Ds01Error `invalid_input`.
    """
    real = os.path.realpath(mount.source)
    if not Path(real).exists():
        raise Ds01Error("invalid_input", f"{mount.source} does not exist on this host.", "Check the path.")
    if not any(below(real, os.path.realpath(root)) for root in allowed):
        raise Ds01Error("invalid_input", f"{mount.source} leads to {real}, which may not be mounted.")
    return replace(mount, source=real)


def mount(path: str, target: str) -> Mount:
    """The workspace's mount, links resolved, so that what was checked is what is mounted."""
    return Mount(os.path.realpath(path), target)


def _make_as(account: Account, path: str) -> None:
    made = subprocess.run(
        ["/bin/mkdir", "-p", "-m", "0750", "--", path],
        user=account.uid if os.geteuid() == 0 else None,
        group=account.gid if os.geteuid() == 0 else None,
        extra_groups=[] if os.geteuid() == 0 else None,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=_MKDIR_TIMEOUT,
        check=False,
    )
    if made.returncode:
        raise Ds01Error(
            "invalid_input",
            f"The workspace {path} does not exist and {account.name} cannot make it ({made.stderr.strip()}).",
            f"Create it for {account.name}, or name another with ds01_workspace.",
        )
