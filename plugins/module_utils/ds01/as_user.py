"""Commands with a user's own rights. An adapter; nothing here raises.

What lies in a workspace is its user's, links included, and on a network file system root may get no further than
anybody: so the user's own identity goes there, and gets as far as the user would.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence

from .names import Account

_TIMEOUT = 10


def run(account: Account, argv: Sequence[str], text: str = "") -> subprocess.CompletedProcess[bytes] | None:
    """Run a command with this on its standard input; None where it could not be run, or did not end in time."""
    root = os.geteuid() == 0
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            argv,
            input=text.encode(),
            user=account.uid if root else None,
            group=account.gid if root else None,
            extra_groups=[] if root else None,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            check=False,
        )
    return None
