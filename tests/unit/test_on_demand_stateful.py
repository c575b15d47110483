"""The machine of test_relayout_stateful.py with GPUs that are cut on demand: requests, layouts, holds, reboots and
refusals of the driver in any order. Longer: HYPOTHESIS_PROFILE=long."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from sim_server import needs_sim
from test_allocations import change
from test_on_demand_sim import DYNAMIC
from test_relayout_stateful import _LONG, CONTAINERS, CUTS, MACHINES, Relayouts

PROFILES = ["1g.10gb", "1g.10gb+me", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb", "full", None]


class OnDemand(Relayouts):
    """Whatever is asked for, those who have something keep it, and the preview says what comes of it."""

    @initialize(gpus=st.sampled_from(MACHINES), cuts=st.tuples(st.sampled_from(CUTS), st.sampled_from(CUTS)))
    def begin(self, gpus: str, cuts: tuple[str, str]) -> None:
        super().begin(gpus, cuts)
        self.host.limits(DYNAMIC)

    @rule(container=st.sampled_from(CONTAINERS), profile=st.sampled_from(PROFILES), gpus=st.sampled_from([1, 1, 1, 2]))
    def request(self, container: str, profile: str | None, gpus: int) -> None:
        server, (project, _, user) = self.server, container.partition("._.")
        ledger, cuts = server.ledger(), server.cuts()
        wish = change("allocated", user, project, profile=profile, gpus=gpus)
        [foreseen] = server.ds01().preview([wish])
        assert (server.ledger(), server.cuts()) == (ledger, cuts)
        outcome = server.allocate(container, profile, gpus)
        assert (outcome.reason, outcome.ok) == (foreseen.reason, foreseen.ok), (foreseen, outcome)
        assert (server.cuts() != cuts) == bool(foreseen.cuts)
        assert [now == "off" for now in server.cuts()] == [then == "off" for then in cuts], "no mode changes"
        if outcome.ok:
            assert outcome.allocation is not None
            assert server.ledger()[container] == tuple(d.uuid for d in outcome.allocation.devices)
        self._nobody_lost_anything(ledger, [a.container for a in outcome.given_up])

    @rule(
        container=st.sampled_from(CONTAINERS),
        profile=st.sampled_from(PROFILES[:-2]),
        number=st.integers(1, 4),
        fault=st.sampled_from(["busy", "cut", "tools"]),
        gpu=st.sampled_from([0, 1]),
    )
    def request_with_a_fault(self, container: str, profile: str, number: int, fault: str, gpu: int) -> None:
        """Something happens before one of its writes: it is refused or served, and nobody loses anything."""
        ledger = self.server.ledger()
        take_back = self._prepare(fault, gpu, number)
        outcome = self.server.allocate(container, profile)
        self.server.calls.clear()
        self.server.check_nothing_false()
        take_back()
        assert (container in self.server.ledger()) == (outcome.ok or container in ledger)
        self._nobody_lost_anything(ledger, ())
        self.server.apply(**{f"g{n}": self._as_it_is(n) for n in (0, 1)})  # what it may have left is put right

    def _as_it_is(self, gpu: int) -> str:
        return "full" if self.server.cut(gpu) == "off" else ",".join(i.profile for i in self.server.gpu(gpu) if i.uuid)


TestOnDemand = pytest.mark.usefixtures()(OnDemand.TestCase)
TestOnDemand.pytestmark = needs_sim
TestOnDemand.settings = settings(Relayouts.TestCase.settings, max_examples=300 if _LONG else 6)
del Relayouts  # its own tests are in its own file
