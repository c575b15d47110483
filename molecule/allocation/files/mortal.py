#!/opt/ds01/venv/bin/python
"""Runs a module as Ansible's interpreter, and stops for good at a chosen moment of its work.

A moment is the time just before something changes outside this process: a request to the engine that is more than a
question, a file renamed or removed. DIES_AT=3 kills the process at the third one. FREEZES_AT=3 only stops it (SIGSTOP),
so that others may die meanwhile.
"""

import os
import signal
import sys

ENDS = {"DIES_AT": signal.SIGKILL, "FREEZES_AT": signal.SIGSTOP}
at, end = next(((int(os.environ[name]), end) for name, end in ENDS.items() if name in os.environ), (0, 0))
passed = 0


def watch(event: str, details: tuple) -> None:
    global passed
    changes = event in ("os.rename", "os.remove") or (event == "http.client.send" and details[1][:4] in (b"POST", b"PUT ", b"DELE"))
    passed += changes
    if changes and passed == at:
        os.kill(os.getpid(), end)


sys.addaudithook(watch)
exec(compile(sys.stdin.read(), "module", "exec"))
