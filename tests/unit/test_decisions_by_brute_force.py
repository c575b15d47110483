"""Choosing, taking over and waiting, against every choice that there is: a grant exists exactly where trying
all of them finds one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from itertools import combinations

from ds01 import placement, queueing, takeover
from ds01.limits import GpuPolicy, Limits, Reservation
from ds01.model import FULL, Allocation, Device, Grant, Inventory, Ledger, Process, Refusal, Request, Ticket, Waiter
from ds01.placement import Situation
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NOW, config_of, limits_of, machine

HOUR = timedelta(hours=1)
LAYOUTS = (
    ["full", "full", "full"],
    ["full", ["2g.20gb", "2g.20gb", "2g.20gb"]],
    [["3g.40gb", "2g.20gb", "1g.10gb"], "full"],
    [["1g.10gb", "3g.40gb"], ["2g.20gb", "2g.20gb"]],
)
PROFILES = [None, FULL, "1g.10gb", "2g.20gb", "3g.40gb"]
FACTS = ["free", "free", "free", "free", "mine", "mine", "theirs", "occupied", "sick", "booked", "kept"]


@dataclass(frozen=True)
class Scene:
    """A machine with one fact about each device, and who asks for what."""

    inventory: Inventory
    facts: dict[str, str]
    request: Request
    limits: Limits
    strategy: str
    booked_for_me: tuple[str, ...] = ()
    held: bool = False

    @property
    def situation(self) -> Situation:
        def those(fact: str) -> tuple[Device, ...]:
            return tuple(d for d in self.inventory.devices if self.facts[d.id] == fact)

        def has(user: str, devices: tuple[Device, ...]) -> Allocation:
            stopped = NOW - HOUR if self.held else None
            return Allocation(f"old._.{user}", user, devices, 10, NOW, stopped, "c0ffee")

        sick = {d.id for d in those("sick")}
        devices = tuple(replace(d, health="failed") if d.id in sick else d for d in self.inventory.devices)
        window = NOW - HOUR, NOW + HOUR
        return Situation(
            ledger=Ledger({a.container: a for a in (has("bob", those("theirs")), has("alice", those("mine")))}),
            inventory=replace(self.inventory, devices=devices),
            policy=GpuPolicy(strategy=self.strategy),
            now=NOW,
            reservations=[
                *(Reservation("eve", (d.uuid,), *window) for d in those("booked")),
                *(Reservation("alice", (name,), *window) for name in self.booked_for_me),
            ],
            occupied={d.uuid: "process 4711" for d in those("occupied")},
            kept={d.uuid for d in those("kept")},
        )

    def allowed(self, chosen: Sequence[Device]) -> bool:
        """Whether the limits allow these devices beside those that are Alice's already."""
        mine = [d for d in self.inventory.devices if self.facts[d.id] == "mine"]
        most, per_container, share = (
            self.limits.max_gpus,
            self.limits.max_gpus_per_container,
            self.limits.max_gpu_equivalents,
        )
        together = sum((d.equivalents for d in (*mine, *chosen)), Fraction(0))
        return (
            (most is None or len(mine) + len(chosen) <= most)
            and (per_container is None or len(chosen) <= per_container)
            and (share is None or together <= share)
            and (self.limits.allow_full_gpu or not any(d.is_full for d in chosen))
        )

    def choices(self) -> Iterator[tuple[Device, ...]]:
        """Everything that might be granted."""
        wish = self.request.profile or ("any" if any(gpu.mig for gpu in self.inventory.gpus) else FULL)
        free = [d for d in self.inventory.devices if self.facts[d.id] == "free" and wish in ("any", d.profile)]
        return (chosen for chosen in combinations(free, self.request.gpus) if self.allowed(chosen))


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    inventory = machine(*draw(st.sampled_from(LAYOUTS)))
    limits = {
        "max_gpus": draw(st.sampled_from([None, None, None, 0, 1, 2, 3])),
        "max_gpus_per_container": draw(st.sampled_from([None, None, None, 0, 1, 2])),
        "max_gpu_equivalents": draw(st.sampled_from([None, 0, "2/7", "3/7", "4/7", 1, "9/7", 2])),
        "allow_full_gpu": draw(st.sampled_from([True, True, False])),
    }
    return Scene(
        inventory=inventory,
        facts={d.id: draw(st.sampled_from(FACTS)) for d in inventory.devices},
        request=Request(
            "new._.alice", "alice", draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([None, *PROFILES]))
        ),
        limits=limits_of("alice", **limits),
        strategy=draw(st.sampled_from(["packed", "least_allocated"])),
        booked_for_me=tuple(draw(st.lists(st.sampled_from([d.id for d in inventory.devices]), max_size=2))),
        held=draw(st.booleans()),
    )


@settings(max_examples=5 * settings.default.max_examples)
@given(scenes())
def test_a_grant_exists_exactly_where_some_choice_is_allowed(scene: Scene) -> None:
    decision = placement.decide(scene.request, scene.limits, scene.situation)
    choices = set(scene.choices())
    assert isinstance(decision, Grant) == bool(choices), decision
    if isinstance(decision, Grant):
        assert tuple(sorted(decision.devices, key=lambda d: d.index)) in choices
        assert not decision.given_up


@settings(max_examples=5 * settings.default.max_examples)
@given(scenes())
def test_what_is_booked_for_the_user_comes_first_then_the_smallest(scene: Scene) -> None:
    """Among all choices none has more booked devices; among those that have as many, none is smaller."""
    scene = replace(scene, limits=replace(scene.limits, max_gpu_equivalents=None))
    decision = placement.decide(scene.request, scene.limits, scene.situation)
    if not isinstance(decision, Grant):
        return

    def rank(chosen: Sequence[Device]) -> tuple[int, list[Fraction]]:
        booked = sum(bool({d.id, str(d.index[0])} & set(scene.booked_for_me)) for d in chosen)
        return -booked, sorted(d.equivalents for d in chosen)

    assert rank(decision.devices)[0] == min(rank(choice)[0] for choice in scene.choices())
    if not scene.booked_for_me:
        assert rank(decision.devices) == min(map(rank, scene.choices()))


# --- holds


def hold(user: str, devices: Sequence[Device], priority: int, ago: int) -> Allocation:
    name = f"old._.{user}"
    return Allocation(name, user, tuple(devices), priority, NOW - 99 * HOUR, NOW - ago * HOUR, "c0ffee")


@st.composite
def houses(draw: st.DrawFn) -> tuple[Inventory, list[Allocation], set[str]]:
    """A machine on which one or two devices each are held or in use, and which containers run."""
    inventory = machine(*draw(st.sampled_from(LAYOUTS)))
    left, holds, running = list(draw(st.permutations(inventory.devices))), [], set()
    for number, ago in enumerate(draw(st.permutations(range(1, 5)))):
        devices = [left.pop() for _ in range(draw(st.integers(0, min(2, len(left)))))]
        user = f"u{number}" if number else "alice"
        state = draw(st.sampled_from(["held", "held", "held", "runs", "runs unseen"]))
        found = hold(user, devices, draw(st.sampled_from([1, 10])), ago)
        if state != "held":
            running.add(found.container)
        if devices:
            holds.append(replace(found, stopped_at=None) if state == "runs" else found)
    rest = left[draw(st.sampled_from([0, 0, 1, 2])) :]
    if rest:  # few are free, or none
        holds.append(replace(hold("full", rest, 50, 0), stopped_at=None))
        running.add("old._.full")
    return inventory, holds, running


@settings(max_examples=5 * settings.default.max_examples)
@given(
    houses(),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([None, None, None, *PROFILES]),
    st.sampled_from([50, 10, 1]),
    st.booleans(),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([None, None, 1, 2, 3]),
)
def test_holds_give_way_the_longest_held_first_and_only_as_many_as_it_takes(
    house: tuple[Inventory, list[Allocation], set[str]],
    gpus: int,
    profile: str | None,
    priority: int,
    reuse: bool,
    reclaim: bool,
    most: int | None,
) -> None:
    inventory, holdings, running = house
    ledger = Ledger({a.container: a for a in holdings})
    situation = Situation(ledger, inventory, GpuPolicy(), NOW, running=running, reclaim=reclaim)
    request, limits = Request("new._.alice", "alice", gpus, profile), limits_of(priority=priority, max_gpus=most)
    decision = takeover.decide(request, limits, situation, reuse_held=reuse)

    wish = profile or ("any" if any(gpu.mig for gpu in inventory.gpus) else FULL)
    fitting = {d.uuid for d in inventory.devices if wish in ("any", d.profile)}
    idle = [a for a in holdings if a.stopped_at and a.container not in running]
    of_use = sorted((a for a in idle if fitting & {d.uuid for d in a.devices}), key=lambda a: a.stopped_at or NOW)
    own = [a for a in of_use if a.user == "alice" and reuse]
    others = [a for a in of_use if a.user != "alice" and reclaim and a.priority < priority]

    def enough(gone: Sequence[Allocation]) -> bool:
        left = [a for a in holdings if a not in gone]
        have = sum(len(a.devices) for a in left if a.user == "alice")
        free = fitting - {d.uuid for a in left for d in a.devices}
        return len(free) >= gpus and (most is None or have + gpus <= most)

    prefixes = [[*own, *others][:number] for number in range(len(own) + len(others) + 1)]
    expected = next((prefix for prefix in prefixes if enough(prefix)), None)
    assert isinstance(decision, Grant) == (expected is not None), decision
    if isinstance(decision, Grant):
        assert list(decision.given_up) == expected
        assert all({d.uuid for d in a.devices} & {d.uuid for d in decision.devices} for a in decision.given_up[-1:])
        assert {d.uuid for d in decision.devices} <= fitting


# --- those who wait


@st.composite
def queues(draw: st.DrawFn) -> list[Waiter]:
    ticket = Ticket(NOW, NOW + HOUR, Process(1, 1))
    return [
        Waiter(
            request=Request(
                f"w._.w{number}", f"w{number}", draw(st.integers(1, 2)), draw(st.sampled_from([None, *PROFILES]))
            ),
            priority=draw(st.sampled_from([10, 20, 60])),
            max_gpus=None,
            ticket=ticket,
        )
        for number in range(draw(st.integers(1, 4)))
    ]


CONFIG = config_of(max_gpus=None, max_gpus_per_container=None, allow_full_gpu=True, max_containers_per_user=2)


def could_have(waiter: Waiter, situation: Situation) -> bool:
    decision = takeover.decide(waiter.request, queueing.limits_of(waiter, CONFIG), situation)
    return isinstance(decision, Grant)


def waited_for(waiter: Waiter, ledger: Ledger, inventory: Inventory) -> set[str]:
    """What is free of the devices that somebody needs more of; nothing where there will never be enough."""
    wish = waiter.request.profile or ("any" if any(gpu.mig for gpu in inventory.gpus) else FULL)
    fitting = {d.uuid for d in inventory.devices if wish in ("any", d.profile)}
    taken = {d.uuid for a in ledger.allocations.values() for d in a.devices}
    return fitting - taken if len(fitting) >= waiter.request.gpus else set()


def granted(request: Request, grant: Grant, ledger: Ledger) -> Ledger:
    mine = Allocation(request.container, request.user, grant.devices, 10, NOW)
    return ledger.without(*(a.container for a in grant.given_up)).with_allocation(mine)


@settings(max_examples=5 * settings.default.max_examples)
@given(
    houses(),
    queues(),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([None, None, None, *PROFILES]),
    st.sampled_from([1, 10, 20]),
    st.integers(0, 3),
)
def test_whoever_comes_later_takes_nothing_from_those_before_him(
    house: tuple[Inventory, list[Allocation], set[str]],
    queue: list[Waiter],
    gpus: int,
    profile: str | None,
    priority: int,
    containers: int,
) -> None:
    inventory, holdings, running = house
    request, limits = Request("new._.alice", "alice", gpus, profile), limits_of(priority=priority)
    ledger = Ledger({a.container: a for a in holdings})
    before = Situation(ledger, inventory, GpuPolicy(), NOW, running=running, containers=containers, queue=queue)
    ahead = queueing.ahead_of(request.container, priority, queue)
    decision = takeover.decide(request, limits, queueing.keeping(ahead, CONFIG, before))
    mine = replace(before, containers=0)
    if isinstance(decision, Grant):
        after = replace(mine, ledger=granted(request, decision, ledger))
        for waiter in ahead:
            if could_have(waiter, mine):
                assert could_have(waiter, after), "taken from one who could have it"
            else:
                taken = {d.uuid for d in decision.devices}
                assert taken.isdisjoint(waited_for(waiter, ledger, inventory)), "taken piece by piece"
        return
    alone = takeover.decide(request, limits, before)
    assert isinstance(decision, Refusal)
    if isinstance(alone, Grant):
        wanted = {d.uuid for w in ahead for d in inventory.devices if w.request.profile in (None, d.profile)}
        assert wanted & {d.uuid for d in alone.devices}, "refused for those who want none of it"
