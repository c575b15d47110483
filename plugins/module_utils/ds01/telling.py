"""Words for users on this host: a file in their workspace, a line on their terminals. An adapter; nothing here raises.

In a workspace root writes nothing: whatever lies there is its user's, links included. So the user's own identity
does it, and gets no further than the user would.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from . import accounts, as_user
from .names import Account

_TERMINALS = Path("/dev/pts")


def leave_notice(account: Account, file: Path, text: str) -> bool:
    """The file says this; without a text there is none. False where the user could not do that."""
    argv = ["/usr/bin/tee", "--", str(file)] if text else ["/bin/rm", "-f", "--", str(file)]
    done = as_user.run(account, argv, text)
    return done is not None and done.returncode == 0


def tell(user: str, text: str) -> int:
    """A line on each terminal of a user, where this host knows one of that name; on how many."""
    account = accounts.lookup(user)
    return say(account, text) if account else 0


def say(account: Account, text: str, terminals: Path = _TERMINALS) -> int:
    """A line on each terminal that the user has open; on how many."""
    told = 0
    for terminal in terminals.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told += _write(terminal, account.uid, f"\r\n*** DS01: {text}\r\n".encode())
    return told


def _write(terminal: Path, uid: int, line: bytes) -> bool:
    fd = os.open(terminal, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.fstat(fd).st_uid == uid and os.write(fd, line) > 0
    finally:
        os.close(fd)
