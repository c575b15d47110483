"""What cannot be interrupted is ended with its process, which says so first."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import ds01
import pytest
from ds01 import watchdog
from ds01.errors import EXIT_UNAVAILABLE

ROOT = str(Path(ds01.__file__).parent.parent)
HANGS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from ds01 import watchdog
from ds01.errors import Ds01Error
def quits(error):
    print("report:", error.reason)
    sys.exit(0)
{tell}
with {block}
"""
BOUNDED = "watchdog.bounded(0.2, lambda: Ds01Error('deadline_passed', 'It took too long.')): time.sleep(60)"
WATCHED = "watchdog.Watch(0.05) as watch: watch.watched(time.sleep, 'nvmlSleep', 0.2)(60)"
REASONS = {BOUNDED: "deadline_passed", WATCHED: "driver_unavailable"}
SAYS = {BOUNDED: "It took too long.", WATCHED: "nvmlSleep has not returned for 0.2 s. dmesg"}


@pytest.mark.parametrize("block", [BOUNDED, WATCHED], ids=["a block", "a call"])
@pytest.mark.parametrize(
    ("tell", "out"),
    [
        ("", ""),
        ("watchdog.tell(lambda error: print('report:', error))", "report: {}"),
        ("watchdog.tell(quits)", "report: [reason]"),
        ("watchdog.tell(lambda _: 1 / 0)", ""),
        ("signal = __import__('signal'); signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())", ""),
    ],
    ids=["to stderr", "its own way", "as a module", "a mistake", "signals wait"],
)
def test_a_process_that_hangs_ends_and_says_why(tell: str, out: str, block: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS.format(tell=tell, block=block), ROOT],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == EXIT_UNAVAILABLE
    if "tell(" not in tell:
        assert ended.stderr.startswith(f"ds01: {REASONS[block]}: ")
        assert SAYS[block] in ended.stderr
    assert out.format("").replace("[reason]", REASONS[block]) in ended.stdout
    if "{}" in out:
        assert SAYS[block] in ended.stdout


def test_nobody_who_reads_keeps_it_from_ending() -> None:
    """Its report fills a pipe."""
    code = HANGS.format(tell="watchdog._LAST_WORDS = 1; watchdog.tell(lambda _: print('x' * 10**6))", block=BOUNDED)
    with subprocess.Popen([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE) as process:
        assert process.wait(20) == -signal.SIGALRM


def test_what_is_done_in_time_goes_on() -> None:
    with watchdog.bounded(30, lambda: pytest.fail("it was done in time")):
        pass
    with watchdog.Watch(0.02) as watch:
        call = watch.watched(threading.Event().wait, "nvmlWait", 0.2)
        assert [call(0.05) for _ in range(8)] == [False] * 8  # longer together than one may last
        with pytest.raises(ZeroDivisionError):
            watch.watched(lambda: 1 // 0, "nvmlFails", 0.2)()
        threading.Event().wait(0.4)  # what failed is over, too


SIGNAL = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from ds01 import watchdog
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
with watchdog.Watch(30):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    print(signal.SIGUSR1 in signal.sigpending())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
"""


def test_a_watch_takes_no_signal_that_waits() -> None:
    """In a process of its own: others' threads take one, too."""
    done = subprocess.run([sys.executable, "-c", SIGNAL, ROOT], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "True\nheard\n"
