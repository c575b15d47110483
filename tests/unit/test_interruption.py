"""Signals while something is under way: an exception, once, and not in the middle of what belongs together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from ds01 import interruption
from ds01.interruption import Interrupted
from support import come

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert after == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_an_exception(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=f"^Interrupted by {number.name}\\.$") as caught, interruption.as_exception():
        come(number)
        pytest.fail("it came here")
    assert caught.value.signal_number == number
    assert isinstance(caught.value, KeyboardInterrupt)


def test_only_the_first_counts() -> None:
    undone = False
    with pytest.raises(Interrupted, match="SIGTERM"), interruption.as_exception():
        try:
            come(signal.SIGTERM)
        finally:
            come(*SIGNALS)
            undone = True
    assert undone


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.as_exception(), interruption.deferred():
            come(signal.SIGHUP)
            interruption.moment()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_deferred_signal_waits_for_the_end() -> None:
    done = []
    with pytest.raises(Interrupted, match="SIGTERM"), interruption.as_exception():
        with interruption.deferred():
            come(signal.SIGTERM)
            done.append("the block")
        done.append("what comes after")
    assert done == ["the block"]


def test_a_deferred_signal_waits_for_a_moment() -> None:
    done = []
    with pytest.raises(Interrupted), interruption.as_exception(), interruption.deferred():
        interruption.moment()
        come(signal.SIGHUP)
        done.append("a step")
        try:
            interruption.moment()
            done.append("another step")
        finally:
            come(signal.SIGHUP, signal.SIGTERM)
            done.append("the undo")
    assert done == ["a step", "the undo"]


def test_a_deferred_signal_that_another_thread_takes_waits_too() -> None:
    done, begun = [], threading.Event()
    other = threading.Thread(target=lambda: (begun.wait(), come(signal.SIGTERM)))
    other.start()  # before the mask, which it would inherit
    with pytest.raises(Interrupted, match="SIGTERM"), interruption.as_exception():
        with interruption.deferred():
            begun.set()
            other.join()
            done.append("the block")
        done.append("what comes after")
    assert done == ["the block"]


def test_what_would_end_the_process_has_no_moment() -> None:
    """Without a door that makes an exception of it, what is under way is finished."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with interruption.deferred():
            come(signal.SIGTERM)
            interruption.moment()
            signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
