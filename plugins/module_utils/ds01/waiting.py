"""Waiting for devices: ask, stand in the queue, and ask again whenever something changed.

The queue is in the ledger; whoever waits is a process that looks at it. One that dies drops out by
itself, since nobody answers for its ticket any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from . import processes, units
from .allocations import Allocations
from .errors import Ds01Error
from .model import Allocation, Refusal, Ticket
from .transitions import Change, Outcome, refused

LONGEST = timedelta(days=7)
"""The longest wait that may be asked for."""
_POLL = 0.25
_ASK_AGAIN = timedelta(seconds=5)  # what the driver and the engine say changes without a trace in the ledger


def apply(
    allocations: Allocations, changes: Sequence[Change], say: Callable[[str], None] = lambda _: None
) -> Sequence[Outcome]:
    """`Allocations.apply`, where changes with a `wait` are not refused before their time is over.

    `say` gets a sentence whenever a request's place or prospect changed. Raises Ds01Error as `apply`
    does; then, and when it is interrupted, nobody waits any more.
    """
    asked = [_with_ticket(change, allocations.clock()) for change in changes]
    state = allocations.store.state()
    outcomes = list(allocations.apply(asked))
    said = ""
    try:
        while waiting := [number for number, outcome in enumerate(outcomes) if outcome.waiter]:
            sentence = " ".join(_prospect(outcomes[number]) for number in waiting)
            if sentence != said:
                say(said := sentence)
            _until_something_changes(allocations, [outcomes[number] for number in waiting], state)
            state = allocations.store.state()
            for number, outcome in zip(waiting, _ask_again(allocations, [asked[n] for n in waiting]), strict=False):
                outcomes[number] = outcome
    except BaseException:
        allocations.leave({outcome.name.full for outcome in outcomes if outcome.waiter})
        raise
    return _still_so(allocations, outcomes) if said else outcomes


def _still_so(allocations: Allocations, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes; a grant that ran out while others of the batch waited is none any more."""
    now = allocations.store.read().allocations
    return [outcome if _holds(outcome, now) else _ran_out(outcome) for outcome in outcomes]


def _holds(outcome: Outcome, now: Mapping[str, Allocation]) -> bool:
    granted = outcome.allocation
    if not outcome.ok or granted is None:
        return True
    return granted.container in now and now[granted.container].gpu_id == granted.gpu_id


def _ran_out(outcome: Outcome) -> Outcome:
    message = f"{outcome.name.full} was granted devices, and lost them again before all of the batch were served."
    return refused(outcome.name, Refusal("not_allocated", message, "Ask for it again."))


def _with_ticket(change: Change, now: datetime) -> Change:
    if not change.wait:
        return change
    now = now.replace(microsecond=0)
    return replace(change, ticket=Ticket(now, now + min(change.wait, LONGEST), processes.current()))


def _ask_again(allocations: Allocations, changes: Sequence[Change]) -> Sequence[Outcome]:
    """The answers now; none while the ledger is busy, or the engine restarts, and there is time left."""
    try:
        return allocations.apply(changes)
    except Ds01Error as exc:
        in_time = any(c.ticket and c.ticket.until > allocations.clock() for c in changes)
        if exc.reason in ("lock_timeout", "engine_unavailable") and in_time:
            return []
        raise


def _until_something_changes(allocations: Allocations, outcomes: Sequence[Outcome], state: object) -> None:
    """Sleep until the ledger is another, something that was in the way ends, or it is time to look again."""
    now = allocations.clock()
    ends = [o.available_at for o in outcomes if o.available_at and o.available_at > now]
    over = [o.ticket.until for o in outcomes if o.ticket]
    wake = min([now + _ASK_AGAIN, *ends, *over])
    while allocations.store.state() == state and allocations.clock() < wake:
        time.sleep(_POLL)


def _prospect(outcome: Outcome) -> str:
    """Where a request stands, for whoever waits."""
    until = f", until {units.format_time(outcome.ticket.until)} at most" if outcome.ticket else ""
    ends = f" The first in the way ends at {units.format_time(outcome.available_at)}." if outcome.available_at else ""
    return f"{outcome.name.full} waits at position {outcome.position}{until}: {outcome.message}{ends}"
