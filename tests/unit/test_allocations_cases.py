"""Interleavings that went wrong once, each at its shortest. The state machine found them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from ds01 import overview, takeover
from ds01.allocations import Allocations
from ds01.limits import GpuPolicy, Reservation
from ds01.model import Grant, Ledger, Request, Ticket
from ds01.names import ContainerName
from ds01.placement import Situation, decide
from ds01.transitions import Change, Outcome
from support import NOW, Host, limits_of, machine
from test_takeover import holds
from world import Box, World, projected

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
FREE = {"max_gpus": None, "max_gpus_per_container": None, "allow_full_gpu": True, "max_containers_per_user": None}


class Stage:
    """A host with its world, and short words for what happens on it."""

    def __init__(self, host: Host, layout: Any) -> None:
        self.host = host
        self.world = World(host.root, layout)
        self.limits()

    def limits(self, **rest: Any) -> None:
        document = {"defaults": {**FREE, "gpu_hold_after_stop": "1h", **rest.pop("defaults", {})}, **rest}
        self.host.limits(json.dumps(document))

    @property
    def ds01(self) -> Allocations:
        return self.world.service(self.host)

    def call(self, *changes: Change) -> Sequence[Outcome]:
        return self.ds01.apply(changes)

    def change(self, state: str, container: str, pid: int = 0, **options: Any) -> Change:
        project, user = container.split("._.")
        if pid:
            options["ticket"] = Ticket(self.world.clock, self.world.clock + HOUR, self.world.process(pid))
        return Change(state, ContainerName(project, user, container), **options)

    def ask(self, container: str, **options: Any) -> Outcome:
        return self.call(self.change("allocated", container, **options))[0]

    def runs(self, container: str) -> Box:
        """Allocate, create, start, and say so."""
        assert self.ask(container).ok
        box = self.makes(container)
        assert self.world.start(box)
        self.call(self.change("active", container, container_id=box.id))
        self.world.note_devices(box, box.opened)
        return box

    def makes(self, container: str) -> Box:
        has = {d.uuid for d in self.ds01.store.read().allocations[container].devices}
        labels = {"ds01.managed": "true", "ds01.user": container.split("._.")[1], "ds01.gpus": str(len(has))}
        return self.world.create(container, labels, [s for s in self.world.slots if s.uuid in has])

    @property
    def waiting(self) -> list[tuple[str, int]]:
        return [(w.request.container, w.ticket.process.pid) for w in self.ds01.store.read().queue]

    @property
    def ledger(self) -> dict[str, str]:
        return {name: f"{a.gpu_id} {a.status}" for name, a in self.ds01.store.read().allocations.items()}


@pytest.fixture
def stage(host: Host, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Stage:
    made = Stage(host, getattr(request, "param", ["full", "full"]))
    made.world.plug_in(monkeypatch)
    return made


def lose(stage: Stage) -> None:
    stage.host.ledger.unlink()


def damage(stage: Stage) -> None:
    stage.host.ledger.write_bytes(b"{")


# --- a ledger that was lost


@pytest.mark.parametrize("how", [lose, damage])
def test_a_rebuild_takes_back_what_no_allocation_says(how: Callable[[Stage], None], stage: Stage) -> None:
    """Granted, not made yet, and the ledger is lost: a start must not find what is the next one's by then."""
    stage.ask("p._.alice")
    how(stage)
    stage.ask("p._.bob", gpus=2)
    assert stage.ledger == {"p._.bob": "0,1 pending"}
    assert projected(stage.world.cdi, "p._.alice") is None


@pytest.mark.parametrize("stage", [[["2g.20gb"]]], indirect=True)
def test_a_rebuild_leaves_no_cdi_device_that_names_another_device(stage: Stage) -> None:
    """A device was made anew, and NVIDIA's spec does not know it yet."""
    stage.ask("p._.alice")
    stage.world.rename(stage.world.slots[0])
    stage.ds01.rebuild()
    assert projected(stage.world.cdi, "p._.alice") is None
    stage.world.write_spec()
    stage.ask("p._.alice")
    assert projected(stage.world.cdi, "p._.alice") == (stage.world.slots[0].uuid,)


def test_a_container_that_never_ran_is_no_user_of_its_device_after_a_rebuild(stage: Stage) -> None:
    stage.ask("p._.alice")
    stage.makes("p._.alice")
    lose(stage)
    stage.ds01.rebuild()
    assert stage.ledger == {"p._.alice": "0 pending"}
    stage.world.later(10 * MINUTE)
    assert stage.ask("p._.bob", gpus=2).ok


def test_a_whole_ledger_is_not_asked_to_take_back_what_was_released(stage: Stage) -> None:
    stage.ask("p._.alice")
    stage.makes("p._.alice")
    stage.call(stage.change("released", "p._.alice"))
    stage.ds01.rebuild()
    assert stage.ledger == {}


def test_a_start_past_ds01_survives_the_loss_of_the_ledger(stage: Stage) -> None:
    """It was bound to another device, then started with docker: label and record name the former one."""
    box = stage.runs("p._.alice")
    stage.world.stop(box)
    stage.call(stage.change("held", "p._.alice"))
    stage.world.later(2 * HOUR)
    stage.runs("p._.bob")
    assert stage.ask("p._.alice", startable=True).allocation.gpu_id == "1"
    assert stage.world.start(box)
    lose(stage)
    assert not stage.ask("p._.carol").ok, "alice's container runs with it"


def test_a_hold_whose_container_was_started_past_ds01_does_not_give_way(stage: Stage) -> None:
    """Its owner asks in the same batch, so that nobody else has noticed the start yet."""
    full_house(stage)
    box = stage.world.boxes["p._.carol"]
    stage.world.stop(box)
    stage.call(stage.change("held", "p._.carol"))
    stage.world.start(box)
    refused, _ = stage.call(
        stage.change("allocated", "p._.bob", priority=90, may_raise=True), stage.change("allocated", "p._.carol")
    )
    assert (refused.reason, refused.given_up) == ("no_gpu_available", ())


# --- the queue


def full_house(stage: Stage) -> None:
    stage.runs("p._.carol")
    stage.runs("q._.carol")


def test_whoever_waits_again_after_his_process_died_stands_in_the_queue(stage: Stage) -> None:
    full_house(stage)
    stage.ask("p._.bob", pid=1)
    stage.world.alive.clear()
    assert stage.ask("p._.bob", pid=2).joined
    assert stage.waiting == [("p._.bob", 2)]
    assert not stage.ask("p._.bob", pid=2).joined, "he stands there already"


@pytest.mark.parametrize("allocations", [True, False], ids=["allocations", "no allocation"])
@pytest.mark.parametrize("rebuild", [True, False], ids=["rebuild", "request"])
def test_nobody_waits_any_more_after_a_reboot(rebuild: bool, allocations: bool, stage: Stage) -> None:
    """A process of this boot may have the number and the start time of one that waited in the last."""
    if allocations:
        full_house(stage)
    else:
        for slot in stage.world.slots:
            slot.foreign_process = True
    assert stage.ask("p._.bob", pid=1).joined
    stage.world.reboot(False, {})
    stage.world.process(1)
    if rebuild:
        stage.ds01.rebuild()
    stage.ask("p._.alice")
    assert [row["container"] for row in overview.status(stage.ds01)["queue"]] == []
    assert stage.waiting == []


def test_how_many_containers_the_next_one_has_delays_nobody_before_him(stage: Stage) -> None:
    """Bob may have more containers than Alice: that he has them is no reason to pass her by."""
    stage.limits(groups={"lab": {"members": ["alice"], "max_containers_per_user": 1}})
    full_house(stage)
    for project in "qr":
        stage.world.create(f"{project}._.bob", {"ds01.managed": "true", "ds01.user": "bob", "ds01.gpus": "0"})
    stage.ask("p._.alice", pid=1)
    stage.world.remove(stage.world.boxes["p._.carol"], record_too=True)
    assert stage.ask("p._.bob").reason == "no_gpu_available"
    assert stage.ask("p._.alice", pid=1).ok


@pytest.mark.parametrize("stage", [["full", "full", "full"]], indirect=True)
def test_a_hold_that_one_who_waits_may_take_over_is_not_taken_over_piece_by_piece(stage: Stage) -> None:
    """Alice comes first and needs one of the two held devices; the other one is half of what Dan needs."""
    stage.limits(groups={"lab": {"members": ["alice", "dan", "eve"], "priority": 50}})
    stage.runs("p._.carol")
    box = stage.runs("q._.bob")
    stage.world.slots[1].foreign_process = stage.world.slots[2].foreign_process = True
    stage.ask("p._.alice", pid=1)
    stage.ask("p._.dan", gpus=2, pid=2)
    stage.world.slots[1].foreign_process = stage.world.slots[2].foreign_process = False
    stage.world.stop(box)
    stage.call(stage.change("held", "q._.bob"))
    assert stage.ask("p._.eve").reason == "no_gpu_available"


@pytest.mark.parametrize("state", ["active", "allocated"])
def test_what_others_say_of_his_container_costs_nobody_his_place(state: str, stage: Stage) -> None:
    """It waits for a better device than its own, which is sick."""
    stage.ask("p._.bob")
    stage.ask("q._.bob")
    stage.world.slots[0].health = "failed"
    assert stage.ask("p._.bob", startable=True, pid=1).joined
    stage.call(stage.change(state, "p._.bob", gpus=1 if state == "active" else 0))
    assert stage.waiting == [("p._.bob", 1)]


def test_who_was_answered_waits_no_more_whatever_the_answer(stage: Stage) -> None:
    full_house(stage)
    stage.ask("p._.bob", pid=1)
    stage.call(stage.change("allocated", "p._.bob", gpus=0, pid=1))
    assert stage.waiting == []
    stage.ask("p._.bob", pid=1)
    (stage.world.nvidia_cdi / "nvidia.json").write_text('{"kind": "nvidia.com/gpu", "devices": []}', encoding="utf-8")
    stage.world.remove(stage.world.boxes["p._.carol"], record_too=True)
    assert stage.ask("p._.bob", pid=1).reason == "driver_unavailable"
    assert stage.waiting == []


# --- times


def test_a_run_begins_when_it_starts_and_not_when_its_device_was_allocated(stage: Stage) -> None:
    """An hour's run that begins now would still be there when the window opens."""
    window = {"reservation_start": "2025-11-21T12:00:00Z", "reservation_end": "2025-11-21T13:00:00Z"}
    stage.limits(defaults={"max_runtime": "1h"}, user_overrides={"carol": {**window, "reserved_gpus": ["0"]}})
    box = stage.runs("p._.alice")
    stage.world.later(45 * MINUTE)
    stage.world.stop(box)
    stage.call(stage.change("held", "p._.alice"))
    assert stage.ask("p._.alice", startable=True).allocation.gpu_id == "1"


def test_nothing_is_available_in_the_past(stage: Stage) -> None:
    """A hold that is over and was not given back yet is no promise: its owner is asking for it again."""
    for project in "pq":
        stage.world.stop(stage.runs(f"{project}._.alice"))
        stage.call(stage.change("held", f"{project}._.alice"))
    stage.world.later(2 * HOUR)
    refused, _ = stage.call(
        stage.change("allocated", "p._.bob", gpus=2), stage.change("allocated", "p._.alice", startable=True)
    )
    assert (refused.reason, refused.available_at) == ("no_gpu_available", None)


def test_what_a_batch_did_before_is_in_what_it_promises(stage: Stage) -> None:
    for project in "pq":
        stage.world.stop(stage.runs(f"{project}._.alice"))
    *_, refused = stage.call(
        stage.change("held", "p._.alice", stopped_at=NOW),
        stage.change("held", "q._.alice", stopped_at=NOW + MINUTE),
        stage.change("active", "p._.alice"),
        stage.change("allocated", "p._.bob"),
    )
    assert refused.available_at == NOW + HOUR + MINUTE


def test_a_hold_counts_from_the_last_stop(stage: Stage) -> None:
    """It was started and stopped with docker while it was held, and DS01 looked only afterwards."""
    box = stage.runs("p._.alice")
    stage.world.stop(box)
    stage.call(stage.change("held", "p._.alice"))
    assert stage.world.start(box)
    stage.world.later(2 * HOUR)
    stage.world.stop(box)
    stage.world.later(MINUTE)
    stage.ask("p._.bob")
    assert stage.ledger["p._.alice"] == "0 held"


# --- choices


def test_a_booked_device_that_is_too_big_does_not_keep_a_user_from_a_smaller_one() -> None:
    inventory = machine("full", ["2g.20gb"])
    window = Reservation("alice", ("0",), NOW - HOUR, NOW + HOUR)
    found = Situation(Ledger(), inventory, GpuPolicy(), NOW, reservations=[window])
    decision = decide(Request("p._.alice", "alice"), limits_of(max_gpu_equivalents="2/7"), found)
    assert isinstance(decision, Grant)
    assert [d.id for d in decision.devices] == ["1:0"]


@pytest.mark.xfail(strict=True, reason="only what is not free is taken over, and not what does not fit the quota")
def test_a_hold_gives_way_where_what_is_free_is_too_big() -> None:
    inventory = machine(["3g.40gb", "2g.20gb"])
    found = Situation(holds(inventory, alice=("0:1", 5)), inventory, GpuPolicy(), NOW)
    limits = limits_of("bob", priority=50, max_gpu_equivalents="2/7")
    assert isinstance(takeover.decide(Request("p._.bob", "bob"), limits, found), Grant)
