"""How much is done: nothing where all is as wanted, and no more than the plan, which check mode tells beforehand."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from ds01 import cli
from sim_server import Server, Start, needs_sim, plan_of, start, steps  # noqa: F401 - start is a fixture

pytestmark = needs_sim

SEVEN = ",".join(["1g.10gb"] * 7)
ONE_OF_SEVEN = ",".join(["1g.10gb"] * 6 + ["1g.10gb+me"])
MIXED = "2g.20gb,1g.10gb,1g.10gb,3g.40gb"


def quiet(server: Server) -> None:
    """From here on only what this change does is written down."""
    server.calls.clear()


def test_a_converged_run_changes_nothing_and_opens_nvml_once(
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start("2xA100-SXM4-80GB", g0=MIXED, g1=SEVEN)
    server.allocate("p._.alice", "2g.20gb")
    server.apply(g0=MIXED, g1=SEVEN)  # saves the layout
    written, log = server.written(), server.host.events.read_bytes()
    quiet(server)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a tool was run"))
    done = server.apply(g0=MIXED, g1=SEVEN)
    assert (done.changed, steps(done)) == (False, [])
    assert (server.calls.writes, server.calls.made.count("nvmlInit")) == ([], 1)
    assert server.written() == written
    assert server.host.events.read_bytes() == log, "what did not happen is no event"


def test_two_specs_of_nvidia_are_written_from_one_run_of_its_tool(
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of the host's boot, and one that is kept."""
    server, ran, run = start("A100-SXM4-80GB", g0=SEVEN), [], subprocess.run
    kept = server.host.cdi / "nvidia-kept.yaml"
    kept.write_bytes(server.nvidia_spec.read_bytes())
    monkeypatch.setattr(subprocess, "run", lambda argv, **rest: ran.append(argv[0]) or run(argv, **rest))
    server.apply(g0=ONE_OF_SEVEN)
    assert ran == ["nvidia-ctk", "nvidia-smi", "nvidia-ctk"], "once before, to see whether it would work"
    assert kept.read_bytes() == server.nvidia_spec.read_bytes()
    server.check_all_done()


def test_when_the_last_device_goes_nvidia_s_spec_goes_too(
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nvidia-ctk writes none without devices, and the old one would still name those of before."""
    server = start("2xA100-SXM4-80GB", g1=MIXED)
    kept = server.host.cdi / "nvidia-kept.yaml"
    kept.write_bytes(server.nvidia_spec.read_bytes())
    server.apply(g0="", g1="")
    assert [file for file in (server.nvidia_spec, kept) if file.exists()] == []
    server.check_all_done()
    written = server.written()
    quiet(server)
    assert not server.foresee(g0="", g1="").changed
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a tool was run"))
        assert not server.apply(g0="", g1="").changed
    assert (server.calls.writes, server.written()) == ([], written)
    server.apply(g0="", g1=MIXED)
    server.check_all_done()


def test_a_spec_of_devices_that_are_gone_is_put_right_without_a_cut(start: Start) -> None:  # noqa: F811
    """As a run leaves it that was killed, or another program that cut the GPUs."""
    server = start("A100-SXM4-80GB", g0="")
    server.apply(g0="")
    server.nvidia_spec.write_text(
        json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": "GPU-gone"}]}),
        encoding="utf-8",
    )
    gone = ("NVIDIA's CDI spec has devices that are gone",)
    assert server.foresee(g0="").repairs == gone
    assert server.apply(g0="").repairs == gone
    assert not server.nvidia_spec.exists()
    assert server.apply(g0="").repairs == ()


def test_a_layout_by_name_converges_too(start: Start) -> None:  # noqa: F811
    server = start("2xA100-SXM4-80GB", g0="")
    server.apply_layout("all-balanced")
    quiet(server)
    assert not server.apply_layout("all-balanced").changed
    assert server.calls.writes == []
    assert server.cut(0) == server.cut(1)


def test_one_of_seven_slices(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=SEVEN)
    server.allocate("p._.alice", gpus=3)
    kept = set(server.uuids(0).values())
    quiet(server)
    done = server.apply(g0=ONE_OF_SEVEN)
    assert Counter(server.calls.writes) == {
        "nvmlComputeInstanceDestroy": 1,
        "nvmlGpuInstanceDestroy": 1,
        "nvmlDeviceCreateGpuInstanceWithPlacement": 1,
        "nvmlGpuInstanceCreateComputeInstance": 1,
    }
    assert server.calls.made.count("nvmlInit") == 1
    assert [step.split()[1] for step in steps(done)] == ["destroy", "create"]
    assert len(kept & set(server.uuids(0).values())) == 6
    server.check_all_done()


CHANGES: dict[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "nothing": ("A100-SXM4-80GB", {"g0": MIXED}, {"g0": MIXED}),
    "one of seven": ("A100-SXM4-80GB", {"g0": SEVEN}, {"g0": ONE_OF_SEVEN}),
    "all anew": ("A100-SXM4-80GB", {"g0": SEVEN}, {"g0": "7g.80gb"}),
    "MIG on": ("A100-SXM4-80GB", {}, {"g0": MIXED}),
    "MIG on, nothing in it": ("H100-SXM5-80GB", {}, {"g0": ""}),
    "MIG off": ("A100-SXM4-80GB", {"g0": MIXED}, {"g0": "full"}),
    "three GPUs of three models": (
        "A100-SXM4-80GB,A30-24GB,RTX-PRO-6000",
        {"g1": "2g.12gb,1g.6gb", "g2": "2g.48gb"},
        {"g0": "3g.40gb,4g.40gb", "g1": "1g.6gb,1g.6gb,2g.12gb", "g2": "1g.24gb,1g.24gb,1g.24gb"},
    ),
    "one of two": ("2xH100-SXM5-80GB", {"g0": SEVEN, "g1": SEVEN}, {"g1": "2g.20gb,2g.20gb,2g.20gb,1g.10gb"}),
    "gone with its contents": ("A100-SXM4-80GB", {"g0": MIXED}, {"g0": ""}),
}


@pytest.mark.parametrize(("gpus", "cut", "wanted"), CHANGES.values(), ids=CHANGES)
def test_check_mode_shows_what_is_done_then(
    gpus: str,
    cut: Mapping[str, str],
    wanted: Mapping[str, str],
    start: Start,  # noqa: F811
) -> None:
    server = start(gpus, **cut)
    before, cuts = server.host.tree(), server.cuts()
    quiet(server)
    foreseen = server.foresee(**wanted)
    assert (server.calls.writes, server.calls.made.count("nvmlInit")) == ([], 1)
    assert (server.host.tree(), server.cuts()) == (before, cuts), "the simulated driver's state is in there"
    done = server.apply(**wanted)
    assert without_new(plan_of(done)) == without_new(plan_of(foreseen))
    assert bool(steps(done)) is (server.cuts() != cuts)
    assert done.changed and foreseen.changed, "if nothing else the layout is saved"
    server.check_all_done()
    for step in plan_of(done):
        if step["action"] in ("keep", "create"):
            (there,) = [i for i in server.gpu(step["gpu"]) if i.start == step["placement"][0]]
            assert there.profile == step["profile"]
            assert step["uuid"] in (there.uuid, None if step["action"] == "create" else there.uuid)
    assert not server.foresee(**wanted).changed
    assert {d["uuid"] for d in done.result()["devices"]} == server.devices().keys()


def without_new(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan without the UUIDs that nobody can know beforehand."""
    return [{**step, "uuid": None} if step["action"] == "create" else step for step in plan]


def test_gaps_in_the_walk_hide_nothing(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0=MIXED)
    server.allocate("p._.alice", "2g.20gb")
    ledger = server.ledger()
    server.simulate("gap=0:0", "gap=0:2")
    done = server.apply(g0="2g.20gb,1g.10gb,1g.10gb,2g.20gb,1g.10gb+me")
    assert server.cut(0) == "2g.20gb@0 1g.10gb@2 1g.10gb@3 2g.20gb@4 1g.10gb+me@6"
    assert len([step for step in plan_of(done) if step["action"] == "keep"]) == 3
    assert server.ledger() == ledger
    server.check_all_done()


def test_a_leftover_is_cleaned_up_by_the_next_run(start: Start) -> None:  # noqa: F811
    server = start("A100-SXM4-80GB", g0="2g.20gb,1g.10gb")
    server.somebody_cuts(0, "1g.10gb", 3, compute=False)
    done = server.apply(g0="2g.20gb,1g.10gb")
    assert steps(done) == ["0 destroy 1g.10gb 3"]
    server.check_all_done()


@pytest.mark.parametrize(("gpus", "cut", "wanted"), CHANGES.values(), ids=CHANGES)
def test_the_command_s_dry_run_shows_what_it_does_then(
    gpus: str,
    cut: Mapping[str, str],
    wanted: Mapping[str, str],
    start: Start,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start(gpus, **cut)
    argv = [
        "mig",
        "apply",
        "--json",
        *(word for gpu, text in wanted.items() for word in ("--gpu", f"{gpu[1:]}={text}")),
    ]

    def run(*more: str) -> dict[str, Any]:
        assert cli.main([*argv, *more]) == 0
        return json.loads(capsys.readouterr().out)

    before = server.host.tree()
    foreseen = run("--dry-run")
    assert server.host.tree() == before
    done = run()
    assert without_new(done["plan"]) == without_new(foreseen["plan"])
    assert (done["changed"], done["msg"]) == (foreseen["changed"], foreseen["msg"])
    again = run("--dry-run")
    assert (again["changed"], {step["action"] for step in again["plan"]} <= {"keep"}) == (False, True)


def test_the_commands_tell_each_step_once(
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While it goes on, and not again in the answer."""
    server, said = start("2xA100-SXM4-80GB", g0="1g.10gb"), []
    monkeypatch.setattr(cli, "_say", said.append)  # the standard error, as it was when this process began
    assert cli.main(["mig", "apply", "--gpu", "0=2g.20gb", "--gpu", "1=7g.80gb"]) == 0
    assert capsys.readouterr().out == "Cut as wanted: GPU 0, 1.\n"
    assert said == [
        "GPU 0: destroy 1g.10gb at 0",
        "GPU 1: enable MIG mode",
        "GPU 0: create 2g.20gb at 0-1",
        "GPU 1: create 7g.80gb at 0-7",
    ]
    server.boot()
    said.clear()
    assert cli.main(["restore", "--dry-run"]) == 0
    assert capsys.readouterr().out == "GPU 0: create 2g.20gb at 0-1; GPU 1: create 7g.80gb at 0-7.\n"
    assert cli.main(["restore"]) == 0
    assert capsys.readouterr().out == "Cut again as saved: GPU 0, 1.\n"
    assert said == ["GPU 0: create 2g.20gb at 0-1", "GPU 1: create 7g.80gb at 0-7"]
