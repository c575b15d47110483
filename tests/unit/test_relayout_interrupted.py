"""Ctrl-C, SIGTERM and SIGHUP while GPUs are cut: all of it or nothing, and the services run again."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterator

import pytest
import sim_systemd
from ds01 import cli, interruption
from ds01.interruption import Interrupted
from sim_server import LIMITS, WRITES, Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from sim_systemd import Systemd
from support import come

pytestmark = needs_sim

CUT, ANEW = "2g.20gb,1g.10gb,1g.10gb,3g.40gb", "2g.20gb,1g.10gb,1g.10gb,2g.20gb,1g.10gb+me"
BEFORE, AFTER = {"g0": CUT, "g1": "full"}, {"g0": ANEW, "g1": "3g.40gb"}
UNITS = ["exporter.service", "dcgm.service"]
ALICE = "p._.alice"


@pytest.fixture
def server(start: Start) -> Server:  # noqa: F811
    """alice has the 2g; the second GPU's mode is switched while two services are stopped."""
    made = start("2xA100-SXM4-80GB", g0=CUT)
    made.allocate(ALICE, "2g.20gb")
    made.report("active", ALICE)
    made.host.limits(f"{LIMITS}policies: {{mig_services: {json.dumps(UNITS)}}}\n")
    made.apply(**BEFORE)
    return made


@pytest.fixture
def systemd(server: Server) -> Systemd:
    made = sim_systemd.install(server.host.root / "bin", server.host.root / "units")
    made.unit("dcgm.service", RequiredBy="exporter.service")
    made.unit("exporter.service")
    return made


def at_call(server: Server, number: int, action: Callable[[], object]) -> Callable[[], bool]:
    """Do it at the `number`-th of the calls that change a GPU or come right after such a one; whether it was done."""
    left, after = [number], [False]

    def hook(name: str) -> None:
        if name in WRITES or after[0]:
            left[0] -= 1
            if left[0] == 0:
                action()
        after[0] = name in WRITES

    server.calls.clear()
    server.calls._hooks.append(hook)
    return lambda: left[0] <= 0


def interrupted(server: Server, number: signal.Signals) -> Iterator[str]:
    """A change that is interrupted at each of its moments; how the first GPU is cut then."""
    for moment in itertools.count(1):
        came = at_call(server, moment, lambda: come(number))
        try:
            with interruption.as_exception():
                server.apply(**AFTER)
        except Interrupted:
            pass
        else:
            assert not came(), "it was not heard"
            return
        server.calls.clear()
        yield server.cut(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_all_or_nothing(number: signal.Signals, server: Server, systemd: Systemd) -> None:
    before, ledger, seen = server.cuts(), server.ledger(), set()
    for cut in interrupted(server, number):
        seen.add(cut)
        assert systemd.running() == sorted(UNITS)
        assert server.ledger() == ledger
        server.check_all_done()
        if server.cuts() != before:  # it came after the last step
            assert not server.foresee(**AFTER).changed
            server.apply(**BEFORE)
    assert server.cuts() != before
    assert len(seen) == 2, "some moments were before the last step, some after"


def test_a_second_signal_does_not_break_the_undo(server: Server, systemd: Systemd) -> None:
    before = server.cuts()
    came = at_call(server, 4, lambda: come(signal.SIGTERM))
    server.calls.before_writes(lambda _: came() and come(signal.SIGHUP))
    with pytest.raises(Interrupted), interruption.as_exception():
        server.apply(**AFTER)
    server.calls.clear()
    assert (server.cuts(), systemd.running()) == (before, sorted(UNITS))
    server.check_all_done()


def test_while_a_service_stops(server: Server, systemd: Systemd) -> None:
    before = server.cuts()
    tool = server.host.root / "bin" / "systemctl"
    inner = tool.rename(tool.with_name("real-systemctl"))
    tool.write_text(f'#!/bin/sh\n{inner} "$@"\n[ $1 != stop ] || kill -TERM $PPID\n', encoding="utf-8")
    tool.chmod(0o755)
    with pytest.raises(Interrupted), interruption.as_exception():
        server.apply(**AFTER)
    assert (server.cuts(), systemd.running()) == (before, sorted(UNITS))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_so(
    number: signal.Signals, server: Server, systemd: Systemd, capsys: pytest.CaptureFixture[str]
) -> None:
    before = server.cuts()
    at_call(server, 3, lambda: come(number))
    argv = ["mig", "apply", "--gpu", f"0={ANEW}", "--gpu", "1=3g.40gb"]
    assert cli.main(argv) == 128 + number
    assert f"ds01: interrupted: Interrupted by {number.name}." in capsys.readouterr().err
    assert (server.cuts(), systemd.running()) == (before, sorted(UNITS))
    [refused] = [
        event
        for event in map(json.loads, server.host.events.read_text(encoding="utf-8").splitlines())
        if event["event"] == "mig.refused"
    ]
    assert (refused["reason"], refused["message"]) == ("interrupted", f"Interrupted by {number.name}.")
