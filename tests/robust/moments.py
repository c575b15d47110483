"""Something done in a child process that ends, or meets a full disk, at one of its writes.

A write is whatever outlives the process: an NVML call that changes a GPU, a file opened for writing,
renamed or removed, a program that is started. Between two of them nothing is different for those who come later.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sim_server import Server

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NEEDS_SPACE = frozenset({"os.mkdir", "os.link", "os.symlink"})
_CHANGES = _NEEDS_SPACE | {"os.rename", "os.remove", "os.rmdir", "os.truncate"}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    """At this write alone."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stays_full() -> None:
    """From this write on."""
    full_disk()


def happening(server: Server, number: int, action: Callable[[], object], what: Callable[[], None] = kill) -> str:
    """Do the action in a child; `what` happens at its `number`-th write. Which write that was; nothing: it has fewer.

    AssertionError where the action fails in another way than by Ds01Error.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os._exit(_act(server, number, action, what, write))
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}:\n{said}"
    return said


def _act(server: Server, number: int, action: Callable[[], object], what: Callable[[], None], pipe: int) -> int:
    from ds01.errors import Ds01Error

    left = [number]

    def met(write: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.write(pipe, write.encode())
        if left[0] == 0 or (left[0] < 0 and what is stays_full):
            what()

    events = _CHANGES if what is kill else _NEEDS_SPACE  # driver and tools refuse in other ways than a disk

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if _is_write(event, args, server.host.root, events) or (event == "subprocess.Popen" and what is kill):
            met(f"{event} {args[1] if event == 'os.rename' else args[0]}")

    try:
        if what is kill:
            server.calls.before_writes(met)
        sys.addaudithook(audit)
        action()
    except Ds01Error:
        return 0
    except BaseException:
        os.write(pipe, traceback.format_exc().encode())
        return 70
    return 0


def _is_write(event: str, args: tuple[Any, ...], root: Path, events: Collection[str]) -> bool:
    if event == "open":
        path, _, flags = args
        return bool(flags & _WRITING) and str(path).startswith(str(root)) and not str(path).endswith(".lock")
    return event in events and str(args[0]).startswith(str(root))
