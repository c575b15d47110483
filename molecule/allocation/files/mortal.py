#!/opt/ds01/venv/bin/python
"""Runs a module as Ansible's interpreter, and stops for good at a chosen moment of its work.

A moment is the time just before something changes outside this process: a file renamed or removed, a request to the
engine that is more than a question. DIES_AT=3 kills the process at the third one. FREEZES_AT=3 only stops it, so that
others may die meanwhile.
"""

import itertools
import os
import signal
import sys

ENDS = {"DIES_AT": signal.SIGKILL, "FREEZES_AT": signal.SIGSTOP}
at, end = next(((int(os.environ[name]), ends) for name, ends in ENDS.items() if name in os.environ), (0, None))
moments = itertools.count(1)


def watch(event: str, details: tuple) -> None:
    """An audit hook: the interpreter calls it before each such event."""
    sent = event == "http.client.send" and details[1].startswith((b"POST", b"PUT", b"DELETE"))
    if (sent or event in ("os.rename", "os.remove")) and next(moments) == at:
        os.kill(os.getpid(), end)


sys.addaudithook(watch)
exec(compile(sys.stdin.read(), "module", "exec"))  # noqa: S102 that is what an interpreter does
