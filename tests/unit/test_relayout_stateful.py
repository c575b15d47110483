"""Layouts, requests, holds, reboots, swapped GPUs and refusals of the driver in any order: nobody loses a device
that was not to be taken from him, and everything on the host agrees. Longer: HYPOTHESIS_PROFILE=long."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pynvml
import pytest
from ds01.errors import Ds01Error
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sim_server import needs_sim, plan_of, set_up
from support import Host
from test_relayout_calls import without_new

CONTAINERS = [f"{project}._.{user}" for user in ("alice", "bob") for project in "pq"]
MACHINES = ["2xA100-SXM4-80GB", "2xH100-SXM5-80GB", "A100-SXM4-80GB,H100-SXM5-80GB"]
CUTS = [
    "full",
    "",
    "7g.80gb",
    "3g.40gb,4g.40gb",
    "2g.20gb,2g.20gb,2g.20gb",
    "2g.20gb,2g.20gb,2g.20gb,1g.10gb",
    "2g.20gb,1g.10gb,1g.10gb,3g.40gb",
    "1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb",
    "1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb+me",
    "1g.20gb,1g.10gb,2g.20gb",
    "3g.40gb,1g.10gb",
]
PROFILES = ["1g.10gb", "2g.20gb", "3g.40gb", "full", None]


class Relayouts(RuleBasedStateMachine):
    """One server of two GPUs; what the ledger said before a step is what it must say after it."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._folder = tempfile.TemporaryDirectory()
        root = Path(self._folder.name)
        self.host = Host(root, root / "etc" / "limits.yaml", root / "state", root / "log", root / "cdi")
        self.host.config.parent.mkdir()
        for name, value in self.host.env.items():
            self._patch.setenv(name, value)
        self.sick = False

    def teardown(self) -> None:
        self._patch.undo()
        self._folder.cleanup()

    @initialize(gpus=st.sampled_from(MACHINES), cuts=st.tuples(st.sampled_from(CUTS), st.sampled_from(CUTS)))
    def begin(self, gpus: str, cuts: tuple[str, str]) -> None:
        self.server = set_up(self.host, self._patch, gpus, {})
        self.server.apply(g0=cuts[0], g1=cuts[1])

    # --- what happens

    @rule(container=st.sampled_from(CONTAINERS), profile=st.sampled_from(PROFILES), gpus=st.sampled_from([1, 1, 1, 2]))
    def request(self, container: str, profile: str | None, gpus: int) -> None:
        self.server.allocate(container, profile, gpus)

    @precondition(lambda self: self.server.ledger())
    @rule(data=st.data(), state=st.sampled_from(["held", "active", "active", "released"]))
    def report(self, data: st.DataObject, state: str) -> None:
        self.server.report(state, data.draw(st.sampled_from(sorted(self.server.ledger()))))

    @rule(wishes=st.dictionaries(st.sampled_from([0, 1]), st.sampled_from(CUTS), min_size=1), data=st.data())
    def change(self, wishes: dict[int, str], data: st.DataObject) -> None:
        """Without a fault it is carried out as foreseen, or refused with nothing changed."""
        cut = {f"g{gpu}": text for gpu, text in wishes.items()}
        force = data.draw(st.lists(st.sampled_from(CONTAINERS), max_size=1))
        ledger, devices, cuts = self.server.ledger(), self.server.devices(), self.server.cuts()
        try:
            foreseen = self.server.foresee(force, **cut)
        except Ds01Error as exc:
            assert self.server.refused(force, **cut).reason == exc.reason
            assert (self.server.ledger(), self.server.devices()) == (ledger, devices)
            return
        done = self.server.apply(force, **cut)
        assert without_new(plan_of(done)) == without_new(plan_of(foreseen))
        assert done.changed == (self.server.cuts() != cuts)
        self._nobody_lost_anything(ledger, force)
        assert not self.server.foresee(**cut).changed

    @rule(
        gpu=st.sampled_from([0, 1]),
        wish=st.sampled_from(CUTS),
        number=st.integers(1, 12),
        fault=st.sampled_from(["busy", "lost", "cut", "tools"]),
    )
    def change_with_a_fault(self, gpu: int, wish: str, number: int, fault: str) -> None:
        """Something happens before one of its writes; afterwards the same change, or a smaller one, goes through."""
        ledger, cuts = self.server.ledger(), self.server.cuts()
        take_back = self._prepare(fault, gpu, number)
        refused = False
        try:
            self.server.apply(**{f"g{gpu}": wish})
        except Ds01Error:
            refused = True
        self.server.calls.clear()
        self.server.check_nothing_false()
        if refused and fault == "busy":
            assert self.server.cuts() == cuts, "half a change"
        take_back()
        self._nobody_lost_anything(ledger, ())
        if refused:
            try:
                self.server.apply(**{f"g{gpu}": wish})
            except Ds01Error:  # somebody is in the way, as before: then as the GPU was
                present = ",".join(i.profile for i in self.server.gpu(gpu))
                self.server.apply(**{f"g{gpu}": "full" if self.server.cut(gpu) == "off" else present})
        self._nobody_lost_anything(ledger, ())

    def _prepare(self, fault: str, gpu: int, number: int) -> Callable[[], None]:
        """Let it happen before the so-manieth write; what takes it back."""
        server, tool = self.server, self.host.root / "bin" / "nvidia-ctk"
        good = tool.read_bytes()
        happens: dict[str, Callable[[], object]] = {
            "busy": lambda: server.simulate(f"busy={gpu}"),
            "lost": lambda: server.simulate(f"lost={gpu}"),
            "cut": lambda: self._somebody_cuts(gpu),
            "tools": lambda: tool.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8"),
        }
        undone: dict[str, Callable[[], object]] = {
            "busy": lambda: server.simulate(f"idle={gpu}"),
            "lost": lambda: server.simulate(f"found={gpu}"),
            "cut": lambda: None,
            "tools": lambda: tool.write_bytes(good),
        }
        server.calls.before("write", happens[fault], number)
        return lambda: undone[fault]() and None

    def _somebody_cuts(self, gpu: int) -> None:
        """The first place for a 1g that is free, if the GPU is in MIG mode and there is one."""
        for start in range(7):
            try:
                return self.server.somebody_cuts(gpu, "1g.10gb", start)
            except pynvml.NVMLError:
                continue
        return None

    @rule(changes=st.sampled_from([(), ("swap=0:1",)]))
    def reboot(self, changes: Sequence[str]) -> None:
        """The saved layout comes back, on the GPUs that it was of, and everybody has the device of his place."""
        places = self._places()
        self.server.boot(*changes)
        assert self.server.projected() == {}, "before that nobody can start"
        self.server.restore()
        assert {name: place for name, place in self._places().items() if name in places} == places
        assert not self.server.restore().changed

    def _places(self) -> dict[str, list[tuple[str, str, list[int] | None]]]:
        records = json.loads(self.host.ledger.read_bytes())["allocations"] if self.host.ledger.exists() else {}
        return {
            name: [(d["gpu_uuid"], d["profile"], d["placement"]) for d in record["devices"]]
            for name, record in records.items()
        }

    def _nobody_lost_anything(self, before: dict[str, tuple[str, ...]], force: Sequence[str]) -> None:
        """But those who were named."""
        now, there = self.server.ledger(), self.server.devices()
        for container, uuids in before.items():
            if container not in force:
                assert now[container] == uuids
                assert set(uuids) <= there.keys()

    # --- what always holds

    @invariant()
    def all_agree(self) -> None:
        if hasattr(self, "server"):
            self.server.check_all_done()


TestRelayouts = Relayouts.TestCase
TestRelayouts.pytestmark = needs_sim
_LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
Relayouts.TestCase.settings = settings(
    max_examples=100 if _LONG else 12,
    stateful_step_count=30 if _LONG else 15,
    phases=(Phase.explicit, Phase.generate) if not _LONG else tuple(Phase),
)
