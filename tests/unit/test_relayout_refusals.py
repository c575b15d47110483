"""What the driver refuses while a layout is changed: a clear sentence, and everything as it was before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pynvml
import pytest
from ds01 import nvml, partitions, processes
from sim_server import Server, Start, edit, needs_sim, start  # noqa: F401 - start is a fixture

pytestmark = needs_sim

CREATE, GI_DESTROY, CI_DESTROY, CI_CREATE, MODE = (
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceDestroy",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlDeviceSetMigMode",
)

Happens = Callable[[Server], None]


def nothing(_server: Server) -> None:
    """What a case does that has nothing to take back."""


def sim(*changes: str) -> Happens:
    return lambda server: server.simulate(*changes)


@dataclass(frozen=True)
class Case:
    """A change that goes wrong: what happens before which call, and what is said then.

    `stays` is how the machine is cut afterwards; None: as before.
    """

    cut: Mapping[str, str]
    wanted: Mapping[str, str]
    call: str
    happens: Happens
    reason: str
    says: tuple[str, ...]
    number: int = 1
    gpus: str = "2xA100-SXM4-80GB"
    stays: tuple[str, ...] | None = None
    reverts: Happens = nothing
    """What takes it back, so that the same change succeeds."""


def somebody(gpu: int, profile: str, start: int, compute: bool = True) -> Happens:  # noqa: F811
    return lambda server: server.somebody_cuts(gpu, profile, start, compute)


def hold_emptied(server: Server) -> None:
    """A client holds the GPU instance that has no compute instance any more."""
    with edit(server.state) as machine:
        inside = {(ci["gpu"], ci["gi"]) for ci in machine.records["ci"]}
        for gi in machine.records["gi"]:
            if (gi["gpu"], gi["id"]) not in inside:
                gi["busy"] = "1"


def free_all(server: Server) -> None:
    """Whoever held something lets it go."""
    with edit(server.state) as machine:
        for kind in ("gpu", "gi", "ci"):
            for record in machine.records[kind]:
                record["busy"] = "0"


# 2g at 0, 1g at 2 and 3, 3g at 4; and from that half of it. alice has the 2g, bob holds the 1g at 2.
FULL = {"g0": "2g.20gb,1g.10gb,1g.10gb,3g.40gb"}
HALF = {"g0": "2g.20gb,1g.10gb,1g.10gb"}
ANEW = {"g0": "2g.20gb,1g.10gb,1g.10gb,2g.20gb,1g.10gb+me"}

CASES: dict[str, Case] = {
    "the place is taken, first": Case(
        HALF,
        ANEW,
        CREATE,
        somebody(0, "1g.10gb", 4),
        "layout_impossible",
        ("GPU 0", "2g.20gb at 4-5", "no room", "somebody else"),
        stays=("2g.20gb@0 1g.10gb@2 1g.10gb@3 1g.10gb@4", "off"),
    ),
    "the place is taken, after one was made": Case(
        HALF,
        ANEW,
        CREATE,
        somebody(0, "1g.10gb", 6),
        "layout_impossible",
        ("GPU 0", "1g.10gb+me at 6", "no room"),
        number=2,
        stays=("2g.20gb@0 1g.10gb@2 1g.10gb@3 1g.10gb@6", "off"),
    ),
    "the media engines are taken": Case(
        HALF,
        ANEW,
        CREATE,
        somebody(0, "1g.10gb+me", 6, compute=False),
        "layout_impossible",
        ("GPU 0", "1g.10gb+me at", "no room"),
        number=2,
        # a GPU instance without a compute instance is cleaned up by the next run, not by an undo
        stays=("2g.20gb@0 1g.10gb@2 1g.10gb@3 1g.10gb+me@6?", "off"),
    ),
    "somebody made the only one with the media engines, elsewhere": Case(
        {"g0": "2g.20gb,1g.10gb"},
        {"g0": "2g.20gb,1g.10gb,1g.10gb+me"},
        CREATE,
        somebody(0, "1g.10gb+me", 5),
        "layout_impossible",
        ("GPU 0", "1g.10gb+me at", "no room"),
        stays=("2g.20gb@0 1g.10gb@2 1g.10gb+me@5", "off"),
    ),
    "a client comes before the compute instance goes": Case(
        FULL,
        ANEW,
        CI_DESTROY,
        sim("process=0.0:1"),
        "layout_in_use",
        ("GPU 0", "remove 3g.40gb at 4-7", "another client uses it"),
        reverts=sim("exit=0:1"),
    ),
    "a client that is no process": Case(
        FULL, ANEW, CI_DESTROY, sim("busy=0:0"), "layout_in_use", ("GPU 0", "3g.40gb at 4-7"), reverts=free_all
    ),
    "a client comes after others are gone": Case(
        {"g0": "2g.20gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb,1g.10gb"},
        {"g0": "2g.20gb,1g.10gb,1g.10gb,2g.20gb"},
        CI_DESTROY,
        sim("busy=0:4"),
        "layout_in_use",
        ("GPU 0", "remove 1g.10gb at"),
        number=2,
        reverts=free_all,
    ),
    "a client holds the emptied GPU instance": Case(
        FULL, ANEW, GI_DESTROY, hold_emptied, "layout_in_use", ("GPU 0", "3g.40gb at 4-7"), reverts=free_all
    ),
    "somebody makes a compute instance in the emptied one": Case(
        FULL,
        ANEW,
        GI_DESTROY,
        lambda server: server.somebody_completes(0),
        "layout_in_use",
        ("GPU 0", "3g.40gb at 4-7"),
    ),
    "the GPU is used when its mode is to change (Ampere)": Case(
        FULL,
        {"g1": "2g.20gb"},
        MODE,
        sim("busy=1"),
        "layout_in_use",
        ("did not enable MIG on GPU 1: another client",),
        reverts=free_all,
    ),
    "the GPU is used when its mode is to change (Hopper)": Case(
        {"g0": "2g.20gb,1g.10gb,1g.10gb"},
        {"g1": "2g.20gb"},
        MODE,
        sim("busy=1"),
        "layout_in_use",
        ("did not enable MIG on GPU 1: another client",),
        gpus="2xH100-SXM5-80GB",
        reverts=free_all,
    ),
    "a virtual machine's GPU waits for a reset": Case(
        FULL,
        {"g1": "2g.20gb"},
        MODE,
        sim("passthrough=1"),
        "mode_pending",
        ("MIG mode of GPU 1", "after its next reset", "Reboot"),
        reverts=sim("reset=1"),
    ),
    "the GPU is used when MIG is to go off": Case(
        {**FULL, "g1": "1g.10gb"},
        {"g1": "full"},
        MODE,
        sim("busy=1"),
        "layout_in_use",
        ("did not disable MIG on GPU 1: another client",),
        reverts=free_all,
    ),
    "the second GPU refuses: the first is as before": Case(
        {**FULL, "g1": "2g.20gb,1g.10gb"},
        {**ANEW, "g1": "3g.40gb,2g.20gb,2g.20gb"},
        CREATE,
        somebody(1, "1g.10gb", 6),
        "layout_impossible",
        ("GPU 1", "no room"),
        number=3,
        stays=("2g.20gb@0 1g.10gb@2 1g.10gb@3 3g.40gb@4", "2g.20gb@0 1g.10gb@2 1g.10gb@6"),
    ),
}


def prepared(start: Start, case: Case) -> Server:  # noqa: F811
    server = start(case.gpus, **case.cut)
    for container, profile in (("p._.alice", "2g.20gb"), ("q._.bob", "1g.10gb")):
        assert server.allocate(container, profile).reason == "granted"
    server.report("active", "p._.alice")
    server.report("held", "q._.bob")
    server.check_all_done()
    return server


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_refusal_leaves_everything_as_it_was(case: Case, start: Start) -> None:  # noqa: F811
    server = prepared(start, case)
    cuts, ledger, written, old = server.cuts(), server.ledger(), server.written(), server.devices()
    server.foresee(**case.wanted)  # there is a plan
    server.calls.clear()
    server.calls.before(case.call, lambda: case.happens(server), case.number)

    refusal = server.refused(**case.wanted)
    assert refusal.reason == case.reason, refusal
    for words in case.says:
        assert words in str(refusal)
    assert refusal.hint, "what would help"

    assert tuple(server.cuts()) == (case.stays or tuple(cuts))
    assert (server.ledger(), server.projected()) == (ledger, ledger)
    server.check_nothing_false()
    # A GPU that waits for its reset is offered to nobody: whoever waits for the ledger is told to look again.
    if case.stays is None and server.devices() == old and refusal.reason != "mode_pending":
        assert server.written() == written, "nothing changed, so nothing is to be written"
    if case.stays is None:
        server.check_all_done()

    server.calls.clear()
    case.reverts(server)
    if case.stays is None:
        assert server.apply(**case.wanted).changed
        server.check_all_done()
        assert server.ledger() == ledger, "whoever was not in the way keeps his device, and its name"


def test_processes_on_an_instance_are_named_one_by_one(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0="2g.20gb,1g.10gb")
    with contextlib.ExitStack() as stack:
        pids = sorted(stack.enter_context(subprocess.Popen(["/bin/sleep", "600"])).pid for _ in range(2))
        for pid in pids:
            stack.callback(os.kill, pid, signal.SIGKILL)
            server.simulate(f"process=0.0:{pid}")
        refusal = server.refused(g0="7g.80gb")
        device = next(d for d in partitions.listing(partitions.look(server.ds01()))["instances"] if d["id"] == "0:0")
        units = [processes.program(pid).unit or None for pid in pids]
    assert refusal.reason == "layout_in_use"
    [detail] = refusal.details["refusals"]
    blockers = [(b["pid"], b["user"], b["unit"], b["container"], b["what"]) for b in detail["blocked_by"]]
    assert [b[:4] for b in blockers] == [(pid, "root", unit, None) for pid, unit in zip(pids, units, strict=True)]
    for pid, *_, what in blockers:
        assert what.startswith(f"process {pid} (sleep of root")
        assert f"in use by {what}" in detail["msg"]
    assert device["status"] == "occupied"
    assert device["occupied_by"] == f"{blockers[0][4]} and 1 more"


@pytest.mark.parametrize(("gpus", "wanted"), [("A100-SXM4-80GB", {"g0": "2g.20gb"}), ("H100-SXM5-80GB", {"g0": ""})])
def test_whoever_has_the_gpu_open_is_named(gpus: str, wanted: Mapping[str, str], start: Start) -> None:  # noqa: F811
    """One that comes between the plan and the switch of the mode: no process of NVML's lists, but of the host."""
    server = start(gpus)
    with contextlib.ExitStack() as stack:
        pids = []

        def come() -> None:
            pids.append(stack.enter_context(server.somebody_opens(0)))
            server.simulate("busy=0")

        server.calls.before(MODE, come)
        refusal = server.refused(**wanted)
        assert refusal.reason == "layout_in_use"
        assert f"process {pids[0]} (sleep of root" in str(refusal)
    assert server.cuts() == ["off"]
    with nvml.session() as driver:
        [gpu] = driver.layout(driver.inventory())
    assert not gpu.mode_pending, "the wish was taken back"
    server.calls.clear()
    free_all(server)
    assert server.apply(**wanted).changed
    server.check_all_done()


def test_all_who_may_be_forced_are_named(start: Start) -> None:  # noqa: F811
    server = start("2xA100-SXM4-80GB", g0="3g.40gb", g1="3g.40gb")
    for container in ("p._.alice", "q._.bob"):
        server.allocate(container, "3g.40gb")
    refusal = server.refused(g0="7g.80gb", g1="7g.80gb")
    assert refusal.hint == "To break it all the same, force: p._.alice, q._.bob."
    assert server.apply(["p._.alice", "q._.bob"], g0="7g.80gb", g1="7g.80gb").released == ("p._.alice", "q._.bob")


@pytest.mark.parametrize(("forced", "other"), [("p._.alice", "q._.bob"), ("q._.bob", "p._.alice")])
def test_those_who_are_forced_already_are_named_too(forced: str, other: str, start: Start) -> None:  # noqa: F811
    """Whoever does what the hint says gets the layout, and not the same hint with the names changed over."""
    server = start("A100-SXM4-80GB", g0="2g.20gb,2g.20gb")
    for container in ("p._.alice", "q._.bob"):
        server.allocate(container, "2g.20gb")
        server.report("held", container)
    refusal = server.refused([forced, "x._.nobody"], g0="7g.80gb")
    assert refusal.hint == f"To break it all the same, force: {forced}, {other}."
    assert server.apply([forced, other], g0="7g.80gb").changed


def test_where_a_process_is_in_the_way_too_nothing_is_to_be_forced(start: Start) -> None:  # noqa: F811
    server = start("2xA100-SXM4-80GB", g0="3g.40gb", g1="3g.40gb")
    server.allocate("p._.alice", "3g.40gb")
    server.simulate("process=1.0:1")
    assert server.refused(g0="7g.80gb", g1="7g.80gb").hint == ""


def test_a_name_that_nobody_has_is_told(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0="3g.40gb,2g.20gb")
    server.allocate("p._.alice", "3g.40gb")
    told = "force: no container p._.alcie has a device here."
    assert told in server.refused(["p._.alcie"], g0="7g.80gb").message
    assert server.foresee(["p._.alcie"], g0="3g.40gb").result()["warnings"] == [told]
    done = server.apply(["p._.alice"], g0="7g.80gb")
    assert done.result()["warnings"] == []
    again = server.apply(["p._.alice"], g0="7g.80gb")
    assert (again.changed, again.result()["warnings"]) == (False, []), "the same play again"


def says_yes(name: str) -> Callable[[Server, pytest.MonkeyPatch], None]:
    """The driver accepts this call, and does nothing."""
    return lambda _, patch: patch.setattr(pynvml, name, lambda *_args: None)


def last_minute(happens: Happens) -> Callable[[Server, pytest.MonkeyPatch], None]:
    """Another program is in time for the read-back: before the last write of the change, in another place."""
    return lambda server, _: server.calls.before(CI_CREATE, lambda: happens(server), 2)


READ_BACK: dict[str, tuple[Callable[[Server, pytest.MonkeyPatch], None], str, str]] = {
    "the driver makes no compute instance": (
        says_yes(CI_CREATE),
        "GPU 0 would still have to destroy 2g.20gb at 4-5 (leftover)",
        "2g.20gb@0 1g.10gb@2 1g.10gb@3",
    ),
    "somebody makes another one": (
        last_minute(somebody(0, "1g.10gb", 6)),
        "GPU 0 would still have to destroy 1g.10gb at 6",
        "2g.20gb@0 1g.10gb@2 1g.10gb@3 1g.10gb@6",
    ),
    "somebody removes one that was there": (
        last_minute(lambda server: server.somebody_removes(0, 3)),
        "GPU 0 would still have to create 1g.10gb at 3",
        "2g.20gb@0 1g.10gb@2",
    ),
}


@pytest.mark.parametrize(("happens", "says", "stays"), READ_BACK.values(), ids=READ_BACK)
def test_success_is_what_the_driver_shows(
    happens: Callable[[Server, pytest.MonkeyPatch], None],
    says: str,
    stays: str,
    start: Start,  # noqa: F811
) -> None:
    """Every call was accepted, and the GPU is not as wanted all the same."""
    server = start("2xA100-SXM4-80GB", **HALF)
    assert server.allocate("p._.alice", "2g.20gb").ok
    server.apply(**HALF)
    ledger, saved, log = server.ledger(), server.saved.read_bytes(), server.host.events.read_bytes()
    server.calls.clear()
    wanted = {"g0": "2g.20gb,1g.10gb,1g.10gb,2g.20gb", "g1": "7g.80gb"}
    with pytest.MonkeyPatch.context() as patch:
        happens(server, patch)
        refusal = server.refused(**wanted)
    assert (refusal.reason, refusal.details) == ("layout_impossible", {})
    assert f"The driver accepted every step, and the layout is another one: {says}." in refusal.message
    assert refusal.hint == "Somebody else may cut this GPU at the same time. Run this again."
    assert server.cuts() == [stays, "off"]
    assert (server.ledger(), server.projected(), server.saved.read_bytes()) == (ledger, ledger, saved)
    [event] = map(json.loads, server.host.events.read_bytes()[len(log) :].splitlines())
    assert (event["event"], event["reason"]) == ("mig.refused", "layout_impossible")
    server.check_all_done()
    server.calls.clear()
    assert server.apply(**wanted).changed
    server.check_all_done()
