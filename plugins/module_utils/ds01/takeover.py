"""Holds that give way: to their own owner's new request, to a higher priority, to a reservation. Pure.

A hold is a device that nobody uses: its container stopped. It is taken only where a request cannot be
granted otherwise, by cutting a GPU anew neither, the longest-held first, and never from a container that
runs. The container stays; its next start is given another device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import placement, units
from .limits import Limits
from .model import Allocation, Device, Grant, Refusal, Request


def decide(
    request: Request, limits: Limits, situation: placement.Situation, *, reuse_held: bool = False
) -> Grant | Refusal:
    """`placement.decide`, and where that refuses, with GPUs cut for it, else with holds given up: all the
    devices, or none.

    `reuse_held` gives up the user's own holds as well; without it the refusal offers that.
    """
    decision = placement.decide(request, limits, situation)
    if isinstance(decision, Grant):
        return decision
    cut = _cut(request, limits, situation, decision)
    if cut:
        return cut
    if reuse_held:
        return _giving_up(request, limits, situation, decision, [*_own(limits, situation), *_others(limits, situation)])
    with_others = _giving_up(request, limits, situation, decision, [*_others(limits, situation)])
    return with_others if isinstance(with_others, Grant) else _offering(request, limits, situation, decision)


def _cut(request: Request, limits: Limits, situation: placement.Situation, refusal: Refusal) -> Grant | None:
    if not situation.cuttable or refusal.reason not in (*placement.NONE_FREE, "profile_not_available"):
        return None
    from . import on_demand  # a host whose GPUs stay as they are does without

    return on_demand.grant(request, limits, situation)


def within_reach(request: Request, limits: Limits, situation: placement.Situation) -> list[Device]:
    """The devices that this request could be given, those of holds that would give way to it among them."""
    holds = [hold.container for hold in _others(limits, situation)]
    without = replace(situation, ledger=situation.ledger.without(*holds))
    return placement.candidates(request, limits, without)


def _giving_up(
    request: Request, limits: Limits, situation: placement.Situation, refusal: Refusal, holds: list[Allocation]
) -> Grant | Refusal:
    """Give up one hold after the other until the request is granted."""
    given_up: list[Allocation] = []
    reason = refusal.reason
    for hold in holds:
        if not _would_help(hold, reason, request, limits, situation):
            continue
        situation = replace(
            situation,
            ledger=situation.ledger.without(hold.container),
            preferred={**situation.preferred, **{d.uuid: len(given_up) for d in hold.devices}},
        )
        given_up.append(hold)
        decision = placement.decide(request, limits, situation)
        if isinstance(decision, Grant):
            return replace(decision, given_up=tuple(given_up))
        reason = decision.reason
    return refusal


def _would_help(
    hold: Allocation, reason: str, request: Request, limits: Limits, situation: placement.Situation
) -> bool:
    """Whether one hold less could turn this refusal: the user's own also where a quota is used up."""
    own = hold.user == limits.user
    if not (reason in placement.NONE_FREE or (own and reason == "user_at_limit")):
        return False
    without = replace(situation, ledger=situation.ledger.without(hold.container))
    open_ = {d.uuid for d in placement.candidates(request, limits, without)}
    return any(d.uuid in open_ for d in hold.devices)


def _holds(situation: placement.Situation) -> list[Allocation]:
    """Everything held whose container does not run, the longest-held first."""
    held = (
        a for a in situation.ledger.allocations.values() if a.status == "held" and a.container not in situation.running
    )
    return sorted(held, key=lambda a: (a.stopped_at, a.container))


def _own(limits: Limits, situation: placement.Situation) -> Iterator[Allocation]:
    return (a for a in _holds(situation) if a.user == limits.user)


def _others(limits: Limits, situation: placement.Situation) -> Iterator[Allocation]:
    """Holds of strictly lower priority, and those on devices that are booked for this user now."""
    mine = [r for r in situation.reservations if r.user == limits.user and r.covers(situation.now)]
    for hold in _holds(situation):
        lower = situation.reclaim and hold.priority < limits.priority
        booked = any(r.names(d) for r in mine for d in hold.devices)
        if hold.user != limits.user and (lower or booked):
            yield hold


def _offering(request: Request, limits: Limits, situation: placement.Situation, refusal: Refusal) -> Refusal:
    """The refusal; where giving up the user's own holds would turn it, it says so."""
    granted = _giving_up(request, limits, situation, refusal, [*_own(limits, situation)])
    if not isinstance(granted, Grant):
        return refusal
    held = ", ".join(f"{a.gpu_id} of {a.container}{_until(a, situation)}" for a in granted.given_up)
    return replace(
        refusal, hint=f"You hold {held}: take it over with --reuse-held (in a play: reuse_held). {refusal.hint}".strip()
    )


def _until(hold: Allocation, situation: placement.Situation) -> str:
    end = situation.hold_end(hold)
    return f" until {units.format_time(end)}" if end else ""
