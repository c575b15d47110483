"""Who waits, in which order, and what is kept for them. Pure.

The higher priority comes first, then who came first. A request is granted only what does not delay
those before it: what they could have now is kept for them, and what they wait for is not taken away
piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from . import placement, takeover
from .limits import Config, Limits, resolve
from .model import Grant, Process, Refusal, Waiter


def alive(queue: Iterable[Waiter], now: datetime, lives: Callable[[Process], bool]) -> tuple[Waiter, ...]:
    """Those who still wait: their time is not over, and their process is there."""
    return tuple(w for w in queue if w.ticket.until > now and lives(w.ticket.process))


def ordered(queue: Iterable[Waiter]) -> list[Waiter]:
    """By priority; among equals the order of arrival, which is the queue's own: clocks jump."""
    return sorted(queue, key=lambda w: -w.priority)


def ahead_of(container: str, priority: int, queue: Sequence[Waiter]) -> list[Waiter]:
    """Who is served before this container's request. One that does not wait yet is the last of its priority."""
    before = []
    for waiter in ordered(queue):
        if waiter.request.container == container or waiter.priority < priority:
            break
        before.append(waiter)
    return before


def limits_of(waiter: Waiter, config: Config) -> Limits:
    """The limits that a waiting request is decided with."""
    limits = resolve(config, waiter.request.user)
    return replace(limits, priority=waiter.priority, max_gpus=waiter.max_gpus)


def keeping(waiters: Sequence[Waiter], config: Config, situation: placement.Situation) -> placement.Situation:
    """The situation for whoever comes after these waiters: with their devices kept.

    How many containers they have is theirs to be asked when it is their turn: here it is not known.
    """
    for waiter in waiters:
        limits = replace(limits_of(waiter, config), max_containers_per_user=None)
        decision = takeover.decide(waiter.request, limits, situation)
        if isinstance(decision, Grant):
            kept = {d.uuid for d in decision.devices}
        elif decision.retry:
            kept = {d.uuid for d in takeover.within_reach(waiter.request, limits, situation)}
        else:
            continue  # nothing that may become free would help
        if situation.cuttable:
            kept |= _room_kept(waiter, limits, situation, decision)
        situation = replace(situation, kept={*situation.kept, *kept})
    return situation


def _room_kept(
    waiter: Waiter, limits: Limits, situation: placement.Situation, decision: Grant | Refusal
) -> frozenset[str]:
    from . import on_demand  # a host whose GPUs stay as they are does without

    return on_demand.room_kept(waiter.request, limits, situation, decision)
