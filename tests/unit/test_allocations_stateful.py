"""The allocations of one host over random interleavings of verbs, engine events, accidents and clock jumps.

The real service runs on real files; the host around it is world.py's, and reference.py says what must
have become of everything. Longer: HYPOTHESIS_PROFILE=long.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01 import config, overview, units
from ds01.allocations import Allocations
from ds01.cdi import Rewrite
from ds01.config import load as load_config
from ds01.errors import Ds01Error
from ds01.model import Process, Ticket
from ds01.names import ContainerName
from ds01.transitions import Change, Outcome
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import Model, Rules
from support import NOW, Host
from world import Box, Slot, World, projected

USERS = ("alice", "bob", "carol")
CONTAINERS = [f"{project}._.{user}" for user in USERS for project in "pqr"]
LAYOUTS = (
    ["full", "full", "full"],
    ["full", ["2g.20gb", "2g.20gb", "2g.20gb"]],
    ["full", "full", ["3g.40gb", "2g.20gb", "1g.10gb"]],
    [["3g.40gb", "2g.20gb"], ["2g.20gb", "1g.10gb", "1g.10gb"]],
    ["full"],
)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
JUMPS = [sign * step for step in (30 * MINUTE / 60, 10 * MINUTE, HOUR, 2 * HOUR, 24 * HOUR) for sign in (1, -1)]


# --- limits files


COUNTS = [None, None, None, 3, 2, 1, 0]
KEYS = {
    "max_gpus": COUNTS,
    "max_gpus_per_container": COUNTS,
    "max_gpu_equivalents": [None, 2, 1, "4/7", "2/7"],
    "allow_full_gpu": [True, True, False],
    "max_containers_per_user": COUNTS,
    "gpu_hold_after_stop": [None, "24h", "1h", "30m", 0],
    "max_runtime": [None, "24h", "1h", "30m"],
    "priority": [50, 10, 1],
}
GENEROUS = {"max_gpus": None, "max_gpus_per_container": None, "allow_full_gpu": True, "max_containers_per_user": None}


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A few keys, null, zero or something; the others are absent."""
    keys = draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=2, unique=True))
    return {key: draw(st.sampled_from(KEYS[key])) for key in keys}


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    start = draw(st.integers(-2, 4))
    gpus = draw(st.lists(st.sampled_from(["0", "1", "0:0", "1:0", "1:1"]), min_size=1, max_size=2))
    return {
        "reservation_start": units.format_time(NOW + start * HOUR),
        "reservation_end": units.format_time(NOW + (start + draw(st.integers(1, 3))) * HOUR),
        "reserved_gpus": gpus,
    }


@st.composite
def limits_files(draw: st.DrawFn) -> dict[str, Any]:
    own = {user: draw(st.one_of(st.just({}), st.just({}), layers())) for user in USERS}
    if draw(st.booleans()):
        own["carol"] = {**own["carol"], **draw(windows())}
    return {
        "defaults": {**draw(st.sampled_from([GENEROUS] * 4 + [{}])), **draw(st.one_of(st.just({}), layers()))},
        "default_group": "student",
        "groups": {"lab": {"members": ["alice"], **draw(layers())}, "student": {"members": []}},
        "user_overrides": own,
        "gpu_allocation": {
            "strategy": draw(st.sampled_from(["least_allocated", "packed"])),
            "enable_mig": True,
            "mig_profile": draw(st.sampled_from([None, None, "2g.20gb"])),
        },
        "policies": {
            "reclaim_holds": draw(st.sampled_from(["lower_priority", "never"])),
            "pending_timeout": draw(st.sampled_from(["10m", None, "1h"])),
        },
    }


VERBS = ("allocated", "allocated", "allocated", "allocated", "held", "released", "active")


@st.composite
def changes(
    draw: st.DrawFn, profiles: Sequence[str], known: Sequence[str], verbs: Sequence[str] = VERBS
) -> tuple[str, str, dict[str, Any]]:
    """A verb, its container, its options; mostly, but not always, a container that has something to be reported."""
    state = draw(st.sampled_from(verbs))
    container = draw(st.sampled_from(CONTAINERS if state == "allocated" else [*known, *known, *known, *CONTAINERS]))
    if state == "held":
        return state, container, {"ago": draw(st.sampled_from([None, 10 * MINUTE, HOUR]))}
    if state != "allocated":
        return state, container, {}
    lowered = st.sampled_from(
        [
            {"priority": 90, "may_raise": True},
            {"priority": 90, "may_raise": True, "strategy": "packed"},
            {"priority": 1},
            {"priority": 90, "max_gpus": 3},
            {"max_gpus": 1},
            {"max_gpus": 3, "may_raise": True},
        ]
    )
    waits = st.fixed_dictionaries({"pid": st.integers(1, 4), "wait": st.sampled_from([10 * MINUTE, 24 * HOUR])})
    options = {
        "gpus": draw(st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3, 0])),
        "profile": draw(st.sampled_from([None, None, *profiles, *profiles, "7g.80gb"])),
        "startable": draw(st.booleans()),
        "reuse_held": draw(st.booleans()),
        **draw(st.one_of(st.just({}), lowered)),
        **draw(st.one_of(st.just({}), waits)),
    }
    return state, container, options


# --- the machine


class Machine(RuleBasedStateMachine):
    """Everything that can happen to a host."""

    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="ds01-", dir=shared if os.access(shared, os.W_OK) else None))
        self.patch = pytest.MonkeyPatch()
        self.host = Host(
            self.root, self.root / "limits.yaml", self.root / "state", self.root / "log", self.root / "cdi"
        )

    @initialize(layout=st.sampled_from(LAYOUTS), limits=limits_files())
    def install(self, layout: Any, limits: dict[str, Any]) -> None:
        self.world = World(self.root, layout)
        self.profiles = sorted({slot.profile for slot in self.world.slots})
        self.model = Model(self.world, Rules(limits))
        self._write_limits(limits)
        self.world.plug_in(self.patch)
        self.patch.setattr(os, "fsync", lambda _: None)  # durability is not what is looked at here

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    def _write_limits(self, limits: dict[str, Any]) -> None:
        loaded = load_config(self.host.limits(json.dumps(limits)))
        self.patch.setattr(config, "load", lambda _: loaded)  # read once, since it stays the same for some calls
        self.model.rules = Rules(limits)

    def _service(self) -> Allocations:
        return self.world.service(self.host)

    def _name(self, container: str) -> ContainerName:
        project, user = container.split("._.")
        return ContainerName(project, user, container)

    # --- calls

    def call(self, *changes: Change) -> Sequence[Outcome]:
        """One call: foreseen, carried out, compared with the model, and checked for needless writing."""
        service = self._service()
        lost = self.model.lost
        before = self._files()
        foreseen = None if lost else service.preview(changes)
        assert self._files() == before, "a preview wrote something"
        outcomes = service.apply(changes)
        if foreseen is not None:
            assert [o.result() for o in foreseen] == [o.result() for o in outcomes], "not what was foreseen"
        known = dict(self.model.holdings), self.model.waiting()
        self.model.applied(changes, outcomes)
        self._compare()
        same = known == (self.model.holdings, self.model.waiting()) and not any(c.ticket for c in changes)
        self._check_writing(before, outcomes, same and not lost)
        return outcomes

    def _check_writing(self, before: dict[str, bytes], outcomes: Sequence[Outcome], same: bool) -> None:
        for outcome in outcomes:
            if (
                outcome.ok
                and outcome.reason in ("granted", "already_allocated")
                and outcome.name.full in self.model.holdings
            ):
                assert projected(self.world.cdi, outcome.name.full), "granted, and it could not start"
        ledger = before.get("state/gpu-state.json")
        if same and (ledger is None or json.loads(ledger)["boot_id"] == f"boot-{self.world.boot}"):
            assert self._files().get("state/gpu-state.json") == ledger, "nothing changed, and it was written"

    def _files(self) -> dict[str, bytes]:
        return {name: data for name, (_, data) in self.host.tree().items() if not name.startswith("log/")}

    def _document(self) -> dict[str, Any]:
        return json.loads(self.host.ledger.read_bytes()) if self.host.ledger.exists() else {}

    def _compare(self) -> None:
        """The ledger's file says what the model says; where there is still none, it is still lost."""
        self.model.lost = not self.host.ledger.exists()
        document = self._document()
        found = {
            name: {**{k: v for k, v in raw.items() if k != "devices"}, "uuids": [d["uuid"] for d in raw["devices"]]}
            for name, raw in document.get("allocations", {}).items()
        }
        expected = {name: holding.written for name, holding in self.model.holdings.items()}
        assert found == expected, f"the ledger says {found},\nthe model {expected}"
        this_boot = document.get("boot_id") in ("", f"boot-{self.world.boot}")
        waiting = [
            (w["container"], w["gpus"], w["profile"], w["priority"], w["max_gpus"], w["pid"])
            for w in document.get("queue", ())
            if this_boot
            and units.parse_time(w["until"]) > self.world.clock
            and Process(w["pid"], w["pid_started"]) in self.world.alive
        ]
        queue = [
            (e.ask.container, e.ask.gpus, e.ask.profile, e.ask.priority, e.ask.max_gpus, e.process.pid)
            for e in self.model.waiting()
        ]
        assert waiting == queue, f"the ledger says {waiting},\nthe model {queue}"

    def change(self, drawn: tuple[str, str, dict[str, Any]]) -> Change:
        """A change as its caller would make it: who says that a container is about to start has looked."""
        state, container, options = drawn[0], drawn[1], dict(drawn[2])
        box = self.world.box(container)
        if state == "allocated":
            pid, wait = options.pop("pid", 0), options.pop("wait", None)
            if pid:
                options["ticket"] = Ticket(self.world.clock, self.world.clock + wait, self.world.process(pid))
            options["startable"] = options["startable"] and not (box and box.runs)
        if state == "held" and options.get("ago") is not None:
            options["stopped_at"] = self.world.clock - options["ago"]
        options.pop("ago", None)
        return Change(state, self._name(container), **options)

    def _drawn(self, data: st.DataObject, verbs: Sequence[str] = VERBS) -> tuple[str, str, dict[str, Any]]:
        return data.draw(changes(self.profiles, sorted(self.model.holdings), verbs))

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self.call(self.change(self._drawn(data)))

    @rule(data=st.data())
    def ask_for_several(self, data: st.DataObject) -> None:
        self.call(*[self.change(self._drawn(data)) for _ in range(data.draw(st.integers(2, 4)))])

    @rule(data=st.data())
    def ask_twice(self, data: st.DataObject) -> None:
        """The second time changes nothing."""
        state, container, options = self._drawn(data)
        options = {key: value for key, value in options.items() if key not in ("pid", "wait")}
        if state == "allocated":
            options["startable"] = False
        self.call(self.change((state, container, options)))
        before = self._files()
        self.call(self.change((state, container, options)))
        assert self._files() == before

    @rule(data=st.data(), container=st.sampled_from(CONTAINERS))
    def bring_up(self, data: st.DataObject, container: str) -> None:
        profile = data.draw(st.sampled_from([None, *self.profiles]))
        self._bring_up(container, data.draw(st.sampled_from([1, 1, 2])), profile)

    @rule(containers=st.permutations(CONTAINERS), gpus=st.sampled_from([1, 1, 1, 1, 2]), data=st.data())
    def crowd(self, containers: Sequence[str], gpus: int, data: st.DataObject) -> None:
        """As many come as there are devices, and some of them leave again, so that there are holds."""
        for container in containers[: len(self.world.slots)]:
            self._bring_up(container, gpus, None)
        running = data.draw(st.permutations([box.name for box in self.world.running()]))
        for name in running[: data.draw(st.integers(0, len(running)))]:
            self.world.later(MINUTE)
            self._stop(self.world.boxes[name], told=True)
        for _ in range(data.draw(st.integers(0, 2))):
            self.important(data, data.draw(st.sampled_from([1, 1, 2])))

    @rule(data=st.data(), gpus=st.sampled_from([1, 1, 2]))
    def important(self, data: st.DataObject, gpus: int) -> None:
        """A new request that others' holds give way to."""
        without = [name for name in CONTAINERS if name not in self.model.holdings]
        container = data.draw(st.sampled_from(without or CONTAINERS))
        priority, reuse = data.draw(st.sampled_from([90, 50, 10])), data.draw(st.booleans())
        profile = data.draw(st.sampled_from([None, *self.profiles]))
        options = {"gpus": gpus, "profile": profile, "priority": priority, "reuse_held": reuse, "may_raise": True}
        self.call(self.change(("allocated", container, {**options, "startable": True})))

    @rule(data=st.data(), containers=st.lists(st.sampled_from(CONTAINERS), min_size=1, max_size=3, unique=True))
    def queue_up(self, data: st.DataObject, containers: Sequence[str]) -> None:
        """Several wait, each for something else."""
        for pid, container in enumerate(containers, 1):
            options = {
                "gpus": data.draw(st.sampled_from([1, 1, 2, 3])),
                "profile": data.draw(st.sampled_from([None, *self.profiles])),
                "priority": data.draw(st.sampled_from([None, 1, 90])),
                "may_raise": True,
                "startable": False,
            }
            self.call(self.change(("allocated", container, {**options, "pid": pid, "wait": 24 * HOUR})))

    @precondition(lambda self: self.model.waiting() and self.model.holdings)
    @rule(data=st.data(), gpus=st.sampled_from([1, 1, 2]))
    def turn(self, data: st.DataObject, gpus: int) -> None:
        """Somebody goes while others wait, and one who does not wait asks before they do."""
        gone = data.draw(st.sampled_from(sorted(self.model.holdings)))
        if gone in self.world.boxes:
            self.world.remove(self.world.boxes[gone], record_too=True)
        self.call(Change("released", self._name(gone)))
        without = [name for name in CONTAINERS if name not in self.model.holdings]
        container, profile = data.draw(st.sampled_from(without)), data.draw(st.sampled_from([None, *self.profiles]))
        options = {"gpus": gpus, "profile": profile, "startable": True}
        self.call(self.change(("allocated", container, options)))

    def _bring_up(self, container: str, gpus: int, profile: str | None) -> None:
        """What `ds01_container started` does."""
        box = self.world.box(container)
        if box and (box.runs or box.labels["ds01.gpus"] == "0"):
            return
        gpus = int(box.labels["ds01.gpus"]) if box else gpus
        change = Change("allocated", self._name(container), gpus=gpus, profile=profile, startable=True)
        if self.call(change)[0].ok:
            box = box or self._create(container, gpus)
            assert self._start(box), "granted, and the engine found no device"
            self.call(Change("active", self._name(container), container_id=box.id))
            self.world.note_devices(box, box.opened)

    @rule(data=st.data(), hours=st.integers(0, 2), told=st.booleans())
    def all_stop(self, data: st.DataObject, hours: int, told: bool) -> None:
        """Containers stop one after the other, so that there are holds of different age."""
        for name in data.draw(st.permutations([box.name for box in self.world.running()])):
            self.world.later(MINUTE)
            self._stop(self.world.boxes[name], told)
        self.world.later(hours * HOUR / 4)

    def _create(self, container: str, gpus: int) -> Box:
        labels = {"ds01.managed": "true", "ds01.user": self._name(container).user, "ds01.gpus": str(gpus)}
        holding = self.model.holdings.get(container)
        return self.world.create(container, labels, [d.slot for d in holding.devices] if holding else ())

    def _start(self, box: Box) -> bool:
        """A start; two containers that run never share a device."""
        started = self.world.start(box)
        others = {slot for other in self.world.running() if other is not box and other.ours for slot in other.opened}
        assert others.isdisjoint(box.opened if started else ()), f"{box.name} shares a device"
        return started

    # --- the engine

    @rule(data=st.data())
    def engine_event(self, data: st.DataObject) -> None:
        """Somebody uses docker past DS01, or DS01's own verbs."""
        acts = ["create", "foreign"]
        box = self.world.boxes.get(data.draw(st.sampled_from(["none", *sorted(self.world.boxes)])))
        if box:
            acts = ["start"] if not box.runs else ["stop", "stop", "pause"]
            acts.append("remove")
        getattr(self, f"_{data.draw(st.sampled_from(acts))}_drawn")(data, box)

    def _create_drawn(self, data: st.DataObject, _box: None) -> None:
        container, gpus = data.draw(st.sampled_from(CONTAINERS)), data.draw(st.integers(0, 2))
        if container not in self.world.boxes:
            self._create(container, gpus)

    def _foreign_drawn(self, data: st.DataObject, _box: None) -> None:
        """A container that is not DS01's, and was promised a device."""
        if "jupyter" not in self.world.boxes:
            box = self.world.create("jupyter", {})
            box.status, box.promised = "running", (data.draw(st.sampled_from(["0", "1", "GPU-1"])),)

    def _start_drawn(self, _data: st.DataObject, box: Box) -> None:
        if not self.model.lost:  # see test_a_start_past_ds01_survives_the_loss_of_the_ledger
            self._start(box)

    def _stop_drawn(self, data: st.DataObject, box: Box) -> None:
        self._stop(box, data.draw(st.booleans()))

    def _stop(self, box: Box, told: bool) -> None:
        self.world.stop(box)
        if told and box.ours:
            self.call(Change("held", self._name(box.name)))

    def _pause_drawn(self, _data: st.DataObject, box: Box) -> None:
        box.status = "paused"

    def _remove_drawn(self, data: st.DataObject, box: Box) -> None:
        told = data.draw(st.booleans())
        self.world.remove(box, told)
        if told and box.ours:
            self.call(Change("released", self._name(box.name)))

    # --- time, limits, devices

    @rule(by=st.sampled_from(JUMPS))
    def clock_jumps(self, by: timedelta) -> None:
        for waiter in self._document().get("queue", ()) if not self.model.lost else ():
            if units.parse_time(waiter["until"]) <= self.world.clock:  # gone: no jump back makes it wait again
                self.world.alive.discard(Process(waiter["pid"], waiter["pid_started"]))
        self.world.later(by)

    @rule(limits=limits_files())
    def limits_change(self, limits: dict[str, Any]) -> None:
        self._write_limits(limits)

    @rule(data=st.data(), what=st.sampled_from(["health", "process", "slot", "gpu", "spec"]), known=st.booleans())
    def device_event(self, data: st.DataObject, what: str, known: bool) -> None:
        """Something becomes of a device; `known`: NVIDIA's CDI spec is written anew after it."""
        getattr(self, f"_{what}_event")(data, self.world.slots[data.draw(st.integers(0, len(self.world.slots) - 1))])
        if known:
            self.world.write_spec()

    def _health_event(self, data: st.DataObject, slot: Slot) -> None:
        slot.health = data.draw(st.sampled_from(["ok", "failed", "suspect"]))

    def _process_event(self, _data: st.DataObject, slot: Slot) -> None:
        slot.foreign_process = not slot.foreign_process

    def _slot_event(self, _data: st.DataObject, slot: Slot) -> None:
        """A MIG device is destroyed, or made anew in its place, where no container is using it."""
        if not self._in_use(slot):
            slot.present = not slot.present
            self.world.rename(slot)

    def _gpu_event(self, _data: st.DataObject, slot: Slot) -> None:
        """A GPU is lost, or reset, where no container is using it."""
        its = [other for other in self.world.slots if other.gpu == slot.gpu]
        if slot.gpu not in self.world.lost:
            self.world.lost.add(slot.gpu)
        elif not any(map(self._in_use, its)):
            self.world.lost.remove(slot.gpu)
            for other in its:
                self.world.rename(other)

    def _spec_event(self, _data: st.DataObject, _slot: Slot) -> None:
        self.world.write_spec()

    def _in_use(self, slot: Slot) -> bool:
        return any(slot in box.opened or slot in box.recorded for box in self.world.running())

    def _reboot(self, data: st.DataObject) -> None:
        turned, order = data.draw(st.booleans()), data.draw(st.permutations(range(4)))
        self.world.reboot(turned, {slot.node: order[i % 4] for i, slot in enumerate(self.world.slots)})

    # --- the queue

    @precondition(lambda self: self.model.queue)
    @rule(data=st.data(), dies=st.booleans())
    def waiter_goes(self, data: st.DataObject, dies: bool) -> None:
        entry = self.model.queue[data.draw(st.integers(0, len(self.model.queue) - 1))]
        if dies:
            self.world.alive.discard(entry.process)
        elif not self.model.lost:
            self._service().leave({entry.ask.container})
            self.model.left({entry.ask.container})
            self._compare()

    # --- accidents

    @rule(data=st.data(), what=st.sampled_from(["loss", "loss", "rebuild", "reboot", "silence", "failure"]))
    def accident(self, data: st.DataObject, what: str) -> None:
        if not self.model.lost or what in ("rebuild", "reboot"):
            getattr(self, f"_{what}")(data)

    def _loss(self, data: st.DataObject) -> None:
        """The ledger is gone or damaged."""
        if all(box.opened == box.recorded for box in self.world.running() if box.ours) and self.host.ledger.exists():
            damaged = data.draw(st.booleans())
            self.host.ledger.write_bytes(self.host.ledger.read_bytes()[:-20]) if damaged else self.host.ledger.unlink()
            self.model.lost = True

    def _rebuild(self, _data: st.DataObject) -> None:
        self._service().rebuild()
        self.model.rebuilt()
        self._compare()

    def _silence(self, data: st.DataObject) -> None:
        """Without driver or engine there is an error, and everything stays as it was."""
        what = data.draw(st.sampled_from(["driver_answers", "engine_answers"]))
        change = replace(self.change(self._drawn(data, ["allocated"])), gpus=1)
        before = self._files()
        setattr(self.world, what, False)
        with pytest.raises(Ds01Error) as caught:
            self._service().apply([change])
        setattr(self.world, what, True)
        assert caught.value.reason in ("driver_unavailable", "engine_unavailable")
        assert self._files() == before

    def _failure(self, data: st.DataObject) -> None:
        """The CDI directory fails before the ledger is written, or after it, or somebody kills DS01 there."""
        when = data.draw(st.sampled_from(["before", "after", "killed"]))
        asked = [self.change(self._drawn(data)) for _ in range(2)]
        service, before = self._service(), self._cdi_files()
        foreseen = service.preview(asked)

        def fails(*_: Any) -> None:
            raise KeyboardInterrupt if when == "killed" else OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rewrite, "project" if when == "before" else "finish", fails)
            try:
                service.apply(asked)
            except (Ds01Error, KeyboardInterrupt):
                if when == "before":
                    assert self._cdi_files() == before
                    asked = foreseen = []
        self.model.applied(asked, foreseen)
        self._compare()

    @rule(data=st.data(), how=st.sampled_from(["nothing", "removed", "edited", "of nobody"]))
    def reconcile(self, data: st.DataObject, how: str) -> None:
        """Somebody tampers with a CDI device: then each says what the ledger says; a second look writes nothing."""
        files = sorted(self.world.cdi.glob("ds01-*.json"))
        if files and how != "nothing":
            self._tamper(data.draw(st.sampled_from(files)), how)
        with self.world.session() as driver:
            foreseen = None if self.model.lost else self._service().foresee_settle(driver)
            settled = self._service().settle(driver)
        if foreseen is not None:
            assert [o.result() for o in foreseen.outcomes] == [o.result() for o in settled.outcomes]
            assert list(foreseen.mended) == list(settled.mended)
        self.model.settled()
        self._compare()
        there = set(self.world.there())
        for name, holding in self.model.holdings.items():
            slots = [device.slot for device in holding.devices]
            if set(slots) <= there and self.world.spec_holds(slots):
                assert projected(self.world.cdi, name) == tuple(d.uuid for d in holding.devices)
        before = self._files()
        with self.world.session() as driver:
            again = self._service().settle(driver)
        assert (list(again.outcomes), list(again.mended)) == ([], [])
        assert self._files() == before

    def _tamper(self, file: Path, how: str) -> None:
        text = file.read_text(encoding="utf-8")
        if how == "removed":
            file.unlink()
        elif how == "edited":
            file.write_text(text.replace("/dev/nvidia", "/dev/other"), encoding="utf-8")
        else:
            file.with_name("ds01-x._.eve.json").write_text(text, encoding="utf-8")

    def _cdi_files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.world.cdi.glob("ds01-*")}

    @precondition(lambda self: not self.model.lost)
    @rule()
    def look(self) -> None:
        """The status writes nothing and promises nothing in the past."""
        before = self._files()
        status = overview.status(self._service())
        assert self._files() == before
        for row in status["queue"]:
            assert row["available_at"] is None or units.parse_time(row["available_at"]) >= self.world.clock

    # --- what holds at any time

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "model") and not self.model.lost:
            self._no_device_twice()
            self._what_runs_keeps_its_devices()
            self._no_file_says_more_than_the_ledger()

    def _no_device_twice(self) -> None:
        taken = [slot for holding in self.model.holdings.values() for slot in holding.slots]
        assert len(taken) == len(set(taken))

    def _what_runs_keeps_its_devices(self) -> None:
        for box in self.world.running():
            holding = self.model.holdings.get(box.name)
            if box.ours and box.labels["ds01.gpus"] != "0":
                box.forgotten = box.forgotten or not holding
                assert box.forgotten or holding.slots == set(box.opened), f"{box.name} runs with {box.opened}"

    def _no_file_says_more_than_the_ledger(self) -> None:
        for file in self.world.cdi.glob("ds01-*.json"):
            spec = json.loads(file.read_bytes())
            (device,) = spec["devices"]
            holding = self.model.holdings.get(device["name"])
            assert holding, f"{file.name} without an allocation"
            assert spec["annotations"]["ds01.io/uuids"] == ",".join(d.uuid for d in holding.devices)
            nodes = {node["path"] for node in device["containerEdits"]["deviceNodes"]}
            assert nodes == self.world.nodes(d.slot for d in holding.devices)


TestAllocations = Machine.TestCase
TestAllocations.settings = settings(
    max_examples=2 * settings.default.max_examples,
    phases=[Phase.generate] if os.environ.get("NOSHRINK") else list(Phase),
)
