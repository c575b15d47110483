#!/opt/ds01/venv/bin/python
"""Runs a module as Ansible's interpreter, and kills the engine when it is asked, for the KILLS_AT-th time, to change
something: just before it gets to know, or KILLS_LATER seconds afterwards; with KILLS_ITSELF the module as well."""

import itertools
import os
import signal
import subprocess
import sys

at, later = int(os.environ["KILLS_AT"]), os.environ["KILLS_LATER"]
moments = itertools.count(1)


def watch(event: str, details: tuple) -> None:
    """An audit hook: the interpreter calls it before each such event."""
    if event == "http.client.send" and details[1].startswith((b"POST", b"PUT", b"DELETE")) and next(moments) == at:
        kill = f"sleep {later}; systemctl kill --signal=KILL docker.service"
        process = subprocess.Popen(["/bin/sh", "-c", kill])
        if float(later) == 0:
            process.wait()
        if "KILLS_ITSELF" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
exec(compile(sys.stdin.read(), "module", "exec"))  # noqa: S102 that is what an interpreter does
