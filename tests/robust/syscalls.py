"""Run something in a child process, and kill it as it begins a system call of one's choice.

Between two system calls a process changes nothing that outlives it, so the beginnings of all its
system calls are all the moments at which it can be killed with a different result.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

_TRACEME, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXITKILL = 1, 1 << 20
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class _SyscallInfo(ctypes.Structure):
    """The head of the kernel's struct ptrace_syscall_info, the same on every architecture."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


def in_child(action: Callable[[], Any]) -> Any:
    """What `action` returns in a child of this process; AssertionError when it raises there."""
    read, write = os.pipe()
    child = _fork(lambda: _answer(write, action))
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, answer.decode(errors="replace")
    return pickle.loads(answer)  # noqa: S301 - our own child's


def _answer(write: int, action: Callable[[], Any]) -> None:
    with os.fdopen(write, "wb") as pipe:
        try:
            pipe.write(pickle.dumps(action()))
        except BaseException:
            pipe.write(traceback.format_exc().encode())
            raise


def killed(call: int, action: Callable[[], object]) -> bool:
    """Kill a child as it begins the `call`-th system call of `action`, which is then not carried out.

    False when the child had done its work and ended before; AssertionError when its work failed.
    """
    child = _fork(lambda: _traced(action))
    _wait(child)  # it stopped itself just before the action
    _ptrace(_SETOPTIONS, child, _SYSGOOD | _EXITKILL)
    begun, forward = 0, 0
    while True:
        _ptrace(_SYSCALL, child, forward)
        status = _wait(child)
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == 0, f"the child failed: {os.waitstatus_to_exitcode(status)}"
            return False
        forward = 0 if os.WSTOPSIG(status) == _SYSCALL_STOP else os.WSTOPSIG(status)
        if not forward and _begins(child):
            begun += 1
            if begun == call:
                os.kill(child, signal.SIGKILL)
                _wait(child)
                return True


@functools.cache
def why_not() -> str | None:
    """Why processes cannot be traced here (a container's seccomp profile may forbid it); None when they can."""
    try:
        return None if killed(1, os.getpid) else "a traced process shows no system calls"
    except (OSError, AssertionError) as exc:
        return f"ptrace is not permitted: {exc}"


def _fork(action: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the test runner's ends with the child


def _traced(action: Callable[[], object]) -> None:
    _ptrace(_TRACEME, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    action()


def _begins(child: int) -> bool:
    """Whether the child stopped at the beginning of a system call, not at the end of one."""
    info = _SyscallInfo()
    _ptrace(_SYSCALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
    return info.op == _ENTRY


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _ptrace(request: int, child: int, address: int, data: int | None = None) -> None:
    # The kernel reads a lone value (options, a signal) from the last argument.
    first, last = (address, data) if data is not None else (0, address)
    if _libc.ptrace(request, child, first, last) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
