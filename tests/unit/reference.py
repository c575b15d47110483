"""The rules of allocation, written down a second time: slow, by brute force, without the core's code.

`Model` knows who has what by `Slot`s (see world.py). It says exactly what must become of every allocation,
except which of several devices a grant takes and whose holds give way to it: there it looks at what was
chosen and checks it against every choice that the rules allow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import combinations
from typing import Any

from ds01.model import FULL, Process
from ds01.transitions import Change, Outcome
from world import FRACTION, Box, Slot, World

SETTLED = timedelta(seconds=30)
_BUILTIN = {
    "max_gpus": 1,
    "max_gpus_per_container": 1,
    "max_gpu_equivalents": None,
    "allow_full_gpu": False,
    "max_containers_per_user": 3,
    "max_runtime": "168h",
    "gpu_hold_after_stop": "24h",
    "priority": 10,
}
_HOURS = {"m": Fraction(1, 60), "h": 1}


def span(text: Any) -> timedelta | None:
    """`30m`, `24h`, 0, or None for without an end."""
    if text is None or text == 0:
        return None if text is None else timedelta(0)
    return timedelta(hours=float(int(text[:-1]) * _HOURS[text[-1]]))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


@dataclass(frozen=True)
class Booking:
    """A reservation. `names` are ids and UUIDs; a GPU's also books what it is cut into."""

    user: str
    names: tuple[str, ...]
    start: datetime
    end: datetime

    def has(self, device: Named) -> bool:
        return bool({device.id, device.id.split(":")[0], device.uuid, device.slot.gpu} & set(self.names))


class Rules:
    """A limits file, read key by key: absent, null and 0 are three different things."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self.gpu = document["gpu_allocation"]
        self.reclaim = document["policies"]["reclaim_holds"] == "lower_priority"
        self.pending_timeout = span(document["policies"]["pending_timeout"])
        self.bookings = [
            Booking(user, tuple(o["reserved_gpus"]), at(o["reservation_start"]), at(o["reservation_end"]))
            for user, o in document["user_overrides"].items()
            if o.get("reserved_gpus")
        ]

    def of(self, user: str, key: str) -> Any:
        groups = [group for group in self._document["groups"].values() if user in group["members"]]
        layers = [self._document["user_overrides"].get(user, {}), *groups, self._document["defaults"], _BUILTIN]
        return next(layer[key] for layer in layers if key in layer)

    def equivalents(self, user: str) -> Fraction | None:
        value = self.of(user, "max_gpu_equivalents")
        return None if value is None else Fraction(str(value))


@dataclass(frozen=True)
class Named:
    """A slot as the ledger names it: what it was called when it was last looked up."""

    slot: Slot
    id: str
    uuid: str


@dataclass(frozen=True)
class Holding:
    """What one container has."""

    container: str
    user: str
    devices: tuple[Named, ...]
    priority: int
    allocated_at: datetime
    stopped_at: datetime | None = None
    pending_since: datetime | None = None
    container_id: str | None = None

    @property
    def slots(self) -> set[Slot]:
        return {device.slot for device in self.devices}

    @property
    def written(self) -> dict[str, Any]:
        """What the ledger's file must say."""
        return {
            "user": self.user,
            "gpu_id": ",".join(d.id for d in self.devices),
            "uuids": [d.uuid for d in self.devices],
            "priority": self.priority,
            "allocated_at": _text(self.allocated_at),
            "stopped_at": _text(self.stopped_at),
            "pending_since": _text(self.pending_since),
            "container_id": self.container_id,
        }


@dataclass(frozen=True)
class Entry:
    """One who waits, as he asked; `boot` is the boot that his process is of."""

    ask: Ask
    until: datetime
    process: Process
    boot: int


@dataclass(frozen=True)
class Ask:
    """A request with the limits that it was lowered (or, by root, raised) to."""

    container: str
    user: str
    gpus: int
    profile: str | None
    priority: int
    max_gpus: int | None
    reuse: bool = False


class Model:
    """One host's allocations and queue."""

    def __init__(self, world: World, rules: Rules) -> None:
        self.world = world
        self.rules = rules
        self.holdings: dict[str, Holding] = {}
        self.queue: list[Entry] = []
        self.lost = True

    # --- calls

    def applied(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> None:
        """Follow one call, and raise AssertionError where an outcome is not what the rules say."""
        if self.lost:
            self.rebuilt()
        if changes:
            self.queue = self.waiting()
        if any(c.state == "allocated" and c.gpus for c in changes):
            self._look_up()
        if any(c.state == "allocated" for c in changes):
            self._time_goes_by({c.name.full for c in changes})
        for change, outcome in zip(changes, outcomes, strict=True):
            with _told(change, outcome):
                getattr(self, f"_{change.state}")(change, outcome)

    def settled(self) -> None:
        """Everything was looked at, and nobody asked."""
        if self.lost:
            self.rebuilt()
        self._look_up()
        self._time_goes_by(())

    def waiting(self) -> list[Entry]:
        """Who still waits, in order of arrival."""
        return [
            e
            for e in self.queue
            if e.until > self.world.clock and e.boot == self.world.boot and e.process in self.world.alive
        ]

    def left(self, containers: Collection[str]) -> None:
        self.queue = [e for e in self.queue if e.ask.container not in containers]

    def rebuilt(self) -> None:
        """What the containers claim: those that run first, then the older; nothing twice, nothing that is gone.

        A ledger that is whole knows who gave a device back: then only those that run can claim one.
        """
        claims = [b for b in self.world.boxes.values() if b.ours and b.labels["ds01.gpus"] != "0"]
        if self.lost:
            self.holdings, self.queue, self.lost = {}, [], False
        else:
            claims = [b for b in claims if b.runs]
            self._look_up()
        for box in sorted(claims, key=lambda b: (not b.runs, b.created_at, b.name)):
            there = set(box.recorded) <= set(self.world.there()) - self._held_slots()
            if box.name in self.holdings or not box.recorded or not there:
                continue
            self.holdings[box.name] = Holding(
                container=box.name,
                user=box.user,
                devices=tuple(Named(s, s.id, s.uuid) for s in box.recorded),
                priority=self.rules.of(box.user, "priority"),
                allocated_at=box.created_at,
                stopped_at=box.finished_at if box.status == "exited" else None,
                pending_since=self.world.clock if box.status == "created" else None,
                container_id=box.id,
            )

    # --- what time and the engine do

    def _look_up(self) -> None:
        there = set(self.world.there())
        for name, holding in self.holdings.items():
            devices = tuple(Named(d.slot, d.slot.id, d.slot.uuid) if d.slot in there else d for d in holding.devices)
            self.holdings[name] = replace(holding, devices=devices)

    def _time_goes_by(self, asking: Collection[str]) -> None:
        for name in [name for name in self.holdings if name not in asking]:
            left = self._left_of(self.holdings[name], self.world.box(name))
            if left is None:
                del self.holdings[name]
            else:
                self.holdings[name] = left

    def _left_of(self, holding: Holding, box: Box | None) -> Holding | None:
        now = self.world.clock
        if box and box.runs:
            runs = replace(holding, stopped_at=None, pending_since=None, container_id=box.id)
            return holding if not holding.stopped_at and not holding.pending_since else runs
        if holding.pending_since:
            timeout = self.rules.pending_timeout
            if timeout is None or now < holding.pending_since + timeout:
                return holding
            return self._stopped(holding, box) if box and box.status == "exited" else None
        if box is None and holding.container_id:
            return None
        if holding.stopped_at is None:
            settled = box and box.status == "exited" and box.finished_at + FRACTION + SETTLED <= now
            return self._stopped(holding, box) if settled else holding
        return self._left_of_hold(holding, box)

    def _left_of_hold(self, holding: Holding, box: Box | None) -> Holding | None:
        end = self.hold_end(holding)
        if end is None or end > self.world.clock:
            return holding
        once_more = box and box.status == "exited" and box.finished_at > holding.stopped_at
        return self._stopped(holding, box) if once_more else None

    def _stopped(self, holding: Holding, box: Box) -> Holding | None:
        held = replace(holding, stopped_at=box.finished_at, pending_since=None, container_id=box.id)
        end = self.hold_end(held)
        return None if end is not None and end <= self.world.clock else held

    def hold_end(self, holding: Holding) -> datetime | None:
        """The user's time after the stop, or somebody else's window that comes first."""
        hold, stopped = span(self.rules.of(holding.user, "gpu_hold_after_stop")), holding.stopped_at
        ends = [] if hold is None else [stopped + hold]
        for booking in self.rules.bookings:
            if booking.user != holding.user and booking.end > stopped and any(map(booking.has, holding.devices)):
                ends.append(max(stopped, booking.start))
        return min(ends, default=None)

    # --- the verbs

    def _held(self, change: Change, outcome: Outcome) -> None:
        holding, box = self.holdings.get(change.name.full), self.world.box(change.name.full)
        if holding is None:
            return _expect(outcome, False, "not_allocated")
        if box and box.runs:
            return _expect(outcome, False, "container_running")
        if span(self.rules.of(holding.user, "gpu_hold_after_stop")) == timedelta(0):
            del self.holdings[change.name.full]
            return _expect(outcome, True, "released")
        known = change.stopped_at or (box.finished_at if box and box.status == "exited" else None)
        if not (holding.stopped_at and known in (None, holding.stopped_at)):
            stopped = known or self.world.clock
            self.holdings[change.name.full] = replace(holding, stopped_at=stopped, pending_since=None)
        return _expect(outcome, True, "held")

    def _active(self, change: Change, outcome: Outcome) -> None:
        holding = self.holdings.get(change.name.full)
        if holding is None:
            return _expect(outcome, False, "not_allocated")
        active = replace(
            holding, stopped_at=None, pending_since=None, container_id=change.container_id or holding.container_id
        )
        self.holdings[change.name.full] = active
        return _expect(outcome, True, "active")

    def _released(self, change: Change, outcome: Outcome) -> None:
        holding, box = self.holdings.get(change.name.full), self.world.box(change.name.full)
        if holding is None:
            return _expect(outcome, True, "not_allocated")
        if box and box.runs:
            return _expect(outcome, False, "container_running")
        del self.holdings[change.name.full]
        return _expect(outcome, True, "released")

    def _allocated(self, change: Change, outcome: Outcome) -> None:
        holding = self.holdings.get(change.name.full)
        ask = self.ask_of(change)
        unusable = bool(holding and change.gpus) and self._unusable(holding, change.startable)
        if holding and not (unusable and change.startable):
            self._again(change, outcome, holding, unusable)
        elif not change.gpus:
            refused = self._too_many_containers(change)
            _expect(outcome, not refused, "container_limit" if refused else "granted")
            self._answered(change, outcome, ask, retry=False)
        else:
            self._new(change, outcome, ask)

    def ask_of(self, change: Change) -> Ask:
        def lowered(allowed: int | None, asked: int | None) -> int | None:
            over = allowed is not None and asked is not None and asked > allowed
            return allowed if asked is None or (over and not change.may_raise) else asked

        user = change.name.user
        return Ask(
            container=change.name.full,
            user=user,
            gpus=change.gpus,
            profile=change.profile,
            priority=lowered(self.rules.of(user, "priority"), change.priority),
            max_gpus=lowered(self.rules.of(user, "max_gpus"), change.max_gpus),
            reuse=change.reuse_held,
        )

    def _again(self, change: Change, outcome: Outcome, holding: Holding, unusable: bool) -> None:
        """It has devices already: the same wish again is fine, another one or sick devices are not."""
        profiles = {d.slot.profile for d in holding.devices}
        same = change.gpus == len(holding.devices) and change.profile in (
            None,
            *(profiles if len(profiles) == 1 else ()),
        )
        if outcome.reason == "driver_unavailable" and not unusable and same:
            assert not self.world.spec_holds([d.slot for d in holding.devices]), "NVIDIA's spec has them all"
            assert not outcome.ok
        elif unusable:
            _expect(outcome, False, "gpu_unhealthy")
        else:
            _expect(outcome, same, "already_allocated")
            if same and change.startable:
                self.holdings[change.name.full] = replace(holding, stopped_at=None, pending_since=self.world.clock)
        self._answered(change, outcome, self.ask_of(change), retry=False)

    def _unusable(self, holding: Holding, starts: bool) -> bool:
        there = set(self.world.there())
        if any(d.slot not in there or d.slot.health != "ok" for d in holding.devices):
            return True
        return starts and any(self._booked(d.slot, holding.user) or self._occupied(d.slot) for d in holding.devices)

    # --- new grants

    def _new(self, change: Change, outcome: Outcome, ask: Ask) -> None:
        """A grant has to be one of those that the rules allow, a refusal has to have no such grant."""
        ahead = self._ahead(ask)
        claimed = set().union(*(self._claimed(e.ask, ask.container) for e in ahead))
        if outcome.reason == "driver_unavailable":
            assert not outcome.ok
            assert not self.world.spec_holds([s for s in self.world.there() if self._fits(s, ask)])
        elif outcome.ok:
            _expect(outcome, True, "granted")
            self._check_grant(change, outcome, ask, ahead, claimed)
            self._carry_out(outcome, ask)
        else:
            self._check_refusal(change, outcome, ask, claimed)
        self._answered(change, outcome, ask, retry=self._worth_waiting(outcome, ask))

    def _carry_out(self, outcome: Outcome, ask: Ask) -> None:
        for hold in outcome.given_up:
            del self.holdings[hold.container]
        devices = tuple(Named(s, s.id, s.uuid) for s in self._chosen(outcome))
        now = self.world.clock
        self.holdings[ask.container] = Holding(ask.container, ask.user, devices, ask.priority, now, pending_since=now)

    def _chosen(self, outcome: Outcome) -> list[Slot]:
        by_uuid = {slot.uuid: slot for slot in self.world.there()}
        return [by_uuid[device.uuid] for device in outcome.allocation.devices]

    def _check_grant(
        self, change: Change, outcome: Outcome, ask: Ask, ahead: Sequence[Entry], claimed: set[Slot]
    ) -> None:
        chosen, given = self._chosen(outcome), [hold.container for hold in outcome.given_up]
        assert not self._too_many_containers(change), "more containers than allowed"
        assert (frozenset(given), frozenset(chosen)) in self.grants(ask, ask.container), "no rule allows this grant"
        if given:
            in_vain = [
                h for h in given if (frozenset(given) - {h}, frozenset(chosen)) in self.grants(ask, ask.container)
            ]
            assert not in_vain, f"{in_vain} gave way in vain"
            unclaimed = [g for g in self.grants(ask, ask.container) if not g[0] and not g[1] & claimed]
            assert not unclaimed, f"{unclaimed} was free"
            self._check_order(ask, given, claimed)
        for entry in ahead:
            self._check_not_delayed(entry, ask, given, chosen)
        if not given and not claimed:
            self._check_choice(ask, chosen)

    def _check_order(self, ask: Ask, given: Sequence[str], claimed: set[Slot]) -> None:
        """The longest-held gives way first: of the user's own, and of the others'."""
        may = self._may_give_way(ask, ask.container)
        for own in (True, False):
            these = [h for h in may if (h.user == ask.user) is own and self._usable_slots(ask) & h.slots - claimed]
            these.sort(key=lambda h: (h.stopped_at, h.container))
            taken = [h.container in given for h in these]
            assert taken == sorted(taken, reverse=True), f"{given} of {[h.container for h in these]}"

    def _check_not_delayed(self, entry: Entry, ask: Ask, given: Sequence[str], chosen: Sequence[Slot]) -> None:
        before = self.possible(entry.ask, entry.ask.container)
        if not before and self._may_come(entry.ask):
            piece = self._usable_slots(entry.ask) - self._held_slots()
            assert piece.isdisjoint(chosen), f"{entry.ask.container} waits for more of these"
        # The devices alone: that a user's own quota is used up by then is his own doing.
        mine = Holding(ask.container, "", tuple(_now(s) for s in chosen), 0, self.world.clock)
        after = {**{n: h for n, h in self.holdings.items() if n not in given}, ask.container: mine}
        kept, self.holdings = self.holdings, after
        try:
            assert not before or self.possible(entry.ask, entry.ask.container), f"{entry.ask.container} waited before"
        finally:
            self.holdings = kept

    def _check_choice(self, ask: Ask, chosen: Sequence[Slot]) -> None:
        """What is booked for the user comes first; otherwise no bigger devices than needed."""
        free = {s for given, slots in self.grants(ask, ask.container) if not given for s in slots}
        own = {s for s in free if any(b.user == ask.user and b.has(_now(s)) and self._now_in(b) for b in self._books())}
        if self.rules.equivalents(ask.user) is None:
            assert len(own & set(chosen)) == min(len(own), ask.gpus), "booked for him, and not used"
        if not own:
            least = sorted(s.share for s in free)[: ask.gpus]
            assert sorted(s.share for s in chosen) == least, "a bigger device than needed"

    def _check_refusal(self, change: Change, outcome: Outcome, ask: Ask, claimed: set[Slot]) -> None:
        assert outcome.reason in self._reasons(change, ask, claimed), f"not {self._reasons(change, ask, claimed)}"
        if not self._too_many_containers(change):
            possible = [g for g in self.grants(ask, ask.container) if not g[1] & claimed]
            if self.rules.equivalents(ask.user) is not None:
                # see test_a_hold_gives_way_where_what_is_free_is_too_big
                possible = [g for g in possible if not g[0]]
            assert not possible, f"{possible[0]} was possible"
        if outcome.available_at is not None:
            assert outcome.available_at >= self.world.clock, "available in the past"
            ends = [self.hold_end(h) for h in self.holdings.values() if h.stopped_at]
            assert outcome.available_at in [*ends, *(b.end for b in self._books())], "nothing ends then"

    def _reasons(self, change: Change, ask: Ask, claimed: set[Slot]) -> set[str]:
        """The reasons that may be given, in the order in which they are looked for."""
        if self._too_many_containers(change):
            return {"container_limit"}
        early = self._never(ask, ask.container)
        if early:
            return {early}
        fit = [s for s in self.world.there() if self._fits(s, ask)]
        free = [s for s in fit if s not in self._held_slots(ask.container) and not self._occupied(s)]
        well = [s for s in free if s.health == "ok"]
        open_ = [s for s in well if not self._booked(s, ask.user)]
        if len(free) < ask.gpus:
            return {"no_gpu_available"}
        if len(well) < ask.gpus:
            return {"gpu_unhealthy"}
        if len(open_) < ask.gpus:
            return {"reserved"}
        unkept = len(set(open_) - claimed) >= ask.gpus
        allowed = self.rules.equivalents(ask.user) is None
        return set() if unkept and allowed else {"user_at_limit"} if unkept else {"no_gpu_available", "user_at_limit"}

    def _never(self, ask: Ask, ignore: str) -> str:
        """A reason that no free device would change; empty when there is none."""
        user, per_container = ask.user, self.rules.of(ask.user, "max_gpus_per_container")
        if per_container is not None and ask.gpus > per_container:
            return "container_limit"
        have = sum(len(h.devices) for h in self._of(user, ignore))
        if ask.max_gpus is not None and have + ask.gpus > ask.max_gpus:
            return "user_at_limit"
        there, whole_allowed = self.world.there(), self.rules.of(user, "allow_full_gpu")
        only_whole = self.wish(ask) == "any" and there and all(s.profile == FULL for s in there)
        if not whole_allowed and (self.wish(ask) == FULL or only_whole):
            return "full_gpu_not_allowed"
        return "profile_not_available" if sum(self._fits(s, ask) for s in there) < ask.gpus else ""

    def _answered(self, change: Change, outcome: Outcome, ask: Ask, *, retry: bool) -> None:
        """Who may wait and has a ticket waits, in the place he has; who was answered leaves."""
        here, waiting = ask.container, self.waiting()
        ticket = change.ticket
        waits = bool(ticket and not outcome.ok and retry and self.world.clock < ticket.until)
        assert bool(outcome.waiter) == waits, "waits" if outcome.waiter else "does not wait"
        known = any(e.ask.container == here for e in waiting)
        if waits and not known:
            # That he would give up his own holds is for him to say when he asks again.
            self.queue = [*waiting, Entry(replace(ask, reuse=False), ticket.until, ticket.process, self.world.boot)]
        elif known and not waits and (ticket or outcome.ok):
            self.queue = [e for e in waiting if e.ask.container != here]

    def _worth_waiting(self, outcome: Outcome, ask: Ask) -> bool:
        if outcome.reason == "gpu_unhealthy":
            return sum(s.health == "ok" for s in self.world.there() if self._fits(s, ask)) >= ask.gpus
        return outcome.reason in ("no_gpu_available", "reserved")

    # --- every choice that the rules allow

    def possible(self, ask: Ask, ignore: str) -> bool:
        return any(True for _ in self._each_grant(ask, ignore))

    def grants(self, ask: Ask, ignore: str) -> set[tuple[frozenset[str], frozenset[Slot]]]:
        """Every (holds that give way, devices) by which this may be granted; `ignore` is the container's own."""
        return set(self._each_grant(ask, ignore))

    def _each_grant(self, ask: Ask, ignore: str) -> Iterator[tuple[frozenset[str], frozenset[Slot]]]:
        allowed, usable = self.rules.equivalents(ask.user), self._usable_slots(ask)
        per_container = self.rules.of(ask.user, "max_gpus_per_container")
        if per_container is not None and ask.gpus > per_container:
            return
        may = self._may_give_way(ask, ignore)
        for number in range(len(may) + 1):
            for given in combinations(may, number):
                gone = {h.container for h in given}
                left = [h for n, h in self.holdings.items() if n != ignore and n not in gone]
                mine = [d for h in left if h.user == ask.user for d in h.devices]
                if ask.max_gpus is not None and len(mine) + ask.gpus > ask.max_gpus:
                    continue
                free = usable.difference(*(h.slots for h in left))
                for slots in combinations(sorted(free, key=lambda s: s.node), ask.gpus):
                    total = sum((s.share for s in (*slots, *(d.slot for d in mine))), Fraction(0))
                    if allowed is None or total <= allowed:
                        yield frozenset(gone), frozenset(slots)

    def _may_give_way(self, ask: Ask, ignore: str) -> list[Holding]:
        """Holds of lower priority, those inside the asker's own window, and where asked for his own: as far
        as their devices are of use to him, and never of a container that runs."""
        mine = [b for b in self._books() if b.user == ask.user and self._now_in(b)]
        found = []
        for name, h in self.holdings.items():
            box = self.world.box(name)
            if name == ignore or h.stopped_at is None or (box and box.runs):
                continue
            lower = self.rules.reclaim and h.priority < ask.priority
            booked = any(b.has(d) for b in mine for d in h.devices)
            may = ask.reuse if h.user == ask.user else lower or booked
            if may and h.slots & self._usable_slots(ask):
                found.append(h)
        return found

    def _usable_slots(self, ask: Ask) -> set[Slot]:
        """Fitting, healthy, used by nobody outside DS01 and booked for nobody else."""
        return {
            s
            for s in self.world.there()
            if self._fits(s, ask) and s.health == "ok" and not self._occupied(s) and not self._booked(s, ask.user)
        }

    def _claimed(self, ask: Ask, asker: str) -> set[Slot]:
        """What one who waits could use now, or would as soon as there is enough of it."""
        if self._never(ask, ask.container):
            return set()
        gone = {h.container for h in self._may_give_way(ask, ask.container)} | {asker}
        return self._usable_slots(ask).difference(*(h.slots for n, h in self.holdings.items() if n not in gone))

    def _may_come(self, ask: Ask) -> bool:
        """Whether what somebody waits for will be free one day, as far as limits and hardware go."""
        healthy = sum(s.health == "ok" for s in self.world.there() if self._fits(s, ask))
        no_share = self.rules.equivalents(ask.user) is None
        return no_share and healthy >= ask.gpus and not self._never(ask, ask.container)

    def _ahead(self, ask: Ask) -> list[Entry]:
        ahead = []
        for entry in sorted(self.waiting(), key=lambda e: -e.ask.priority):
            if entry.ask.container == ask.container or entry.ask.priority < ask.priority:
                break
            ahead.append(entry)
        return ahead

    def wish(self, ask: Ask) -> str:
        mig = any(gpu.mig for gpu in self.world.inventory.gpus)
        if ask.profile or not (mig and self.rules.gpu["enable_mig"]):
            return ask.profile or FULL
        return self.rules.gpu["mig_profile"] or "any"

    def _fits(self, slot: Slot, ask: Ask) -> bool:
        if slot.profile == FULL and not self.rules.of(ask.user, "allow_full_gpu"):
            return False
        return self.wish(ask) in ("any", slot.profile)

    def _occupied(self, slot: Slot) -> bool:
        called = {slot.id, slot.id.split(":")[0], slot.uuid, slot.gpu}
        for box in self.world.running():
            forgotten = box.ours and box.labels["ds01.gpus"] != "0" and box.name not in self.holdings
            if (forgotten and slot in box.recorded) or (not box.ours and called & set(box.promised)):
                return True
        return slot.foreign_process

    def _booked(self, slot: Slot, user: str) -> bool:
        """Whether somebody else's window is met by a run that begins now."""
        now, runtime = self.world.clock, span(self.rules.of(user, "max_runtime"))
        for b in self._books():
            soon = runtime is None or b.start < now + runtime or b.start <= now
            if b.user != user and b.has(_now(slot)) and now < b.end and soon:
                return True
        return False

    def _too_many_containers(self, change: Change) -> bool:
        allowed = self.rules.of(change.name.user, "max_containers_per_user")
        boxes = {b.name for b in self.world.boxes.values() if b.ours and b.user == change.name.user}
        others = (boxes | {h.container for h in self._of(change.name.user, "")}) - {change.name.full}
        return allowed is not None and len(others) >= allowed

    def _of(self, user: str, ignore: str) -> list[Holding]:
        return [h for n, h in self.holdings.items() if h.user == user and n != ignore]

    def _held_slots(self, ignore: str = "") -> set[Slot]:
        return set().union(*(h.slots for n, h in self.holdings.items() if n != ignore))

    def _books(self) -> list[Booking]:
        return self.rules.bookings

    def _now_in(self, booking: Booking) -> bool:
        return booking.start <= self.world.clock < booking.end


def _now(slot: Slot) -> Named:
    return Named(slot, slot.id, slot.uuid)


def _text(when: datetime | None) -> str | None:
    return f"{when:%Y-%m-%dT%H:%M:%SZ}" if when else None


def _expect(outcome: Outcome, ok: bool, reason: str) -> None:
    assert (outcome.ok, outcome.reason) == (ok, reason)


@contextmanager
def _told(change: Change, outcome: Outcome) -> Iterator[None]:
    """Say which change an AssertionError is about."""
    try:
        yield
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{change}\n-> {outcome.reason}: {outcome.message}") from exc
