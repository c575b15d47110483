"""`ds01 mig` and what it reads from NVML, on machines of the simulated driver."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ds01 import geometry
from ds01.mig import GpuState, Profile, Table
from mig_support import TABLES, gpu
from support import ROOT, Host
from test_cli_sim import LIMITS, SIM, Result, Server

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="the simulated driver is not built: make sim"),
]

CUT = "2g.20gb,1g.10gb+me,3g.40gb"


@functools.cache
def initial(gpus: str, *cut: str) -> str:
    """The state of a machine of these GPUs; the same for the same arguments."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "gpus")
        command = [SIM / "bin" / "nvml-sim", "init", state, "--gpus", gpus, "--seed", "1", "--unprivileged", *cut]
        subprocess.run(command, check=True, timeout=20, capture_output=True)
        return state.read_text(encoding="utf-8")


@pytest.fixture
def start(host: Host) -> Callable[..., Server]:
    """A server of these GPUs; `g1="..."` gives the profiles of GPU 1."""

    def make(gpus: str, **cut: str) -> Server:
        parts = [part for index, profiles in cut.items() for part in ("--mig", f"{index[1:]}={profiles}")]
        server = Server(host, host.root / "gpus")
        server.sim_state.write_text(initial(gpus, *parts), encoding="utf-8")
        host.limits(LIMITS)
        host.config.with_name("mig-layouts.yaml").write_bytes((ROOT / "config" / "mig-layouts.yaml").read_bytes())
        return server

    return make


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    """A whole A100, one that is cut in three (of four), an A30 and a GPU without MIG."""
    return start("2xA100-SXM4-80GB,A30-24GB,L40S-48GB", g1=CUT)


def inside(server: Server, code: str) -> str:
    """What Python code prints in a process that has this server's driver; `d` is an open session."""
    whole = f"import json, pynvml\nfrom ds01 import nvml\nwith nvml.session() as d:\n    {code}"
    command = [sys.executable, "-c", whole]
    done = subprocess.run(command, env=server.env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan(server: Server, *argv: str) -> list[str]:
    """A plan in short: `1 destroy 3g.40gb 4`."""
    result = server.ds01("mig", "plan", *argv, "--json")
    assert result.code == 0, result.err
    words = [(s["gpu"], s["action"], s["profile"], s["placement"] and s["placement"][0]) for s in result.json["plan"]]
    return [" ".join(str(word) for word in step if word is not None) for step in words]


# --- what NVML tells


@pytest.mark.parametrize("model", TABLES)
def test_the_tables_are_the_driver_s(model: str, start: Callable[..., Server]) -> None:
    server = start(model, g0="")
    told = inside(server, "[g] = d.layout(d.inventory()); print(json.dumps([vars(p) for p in g.table.profiles]))")
    fields = ("name", "id", "slices", "size", "starts", "most")
    profiles = {Profile(**{f: tuple(p[f]) if f == "starts" else p[f] for f in fields}) for p in json.loads(told)}
    assert profiles == set(TABLES[model].profiles)


@pytest.mark.parametrize("model", TABLES)
def test_a_gpu_with_mig_off_is_completed_from_what_is_known(model: str) -> None:
    ids = {"A100-SXM4-80GB": 0x20B210DE, "A30-24GB": 0x20B710DE, "RTX-PRO-6000": 0x2BB510DE}
    table = TABLES[model]
    silent = Table(tuple(replace(p, size=0, starts=()) for p in table.profiles))
    off = replace(gpu("", silent, mig=False), model_id=ids[model])
    (known,) = geometry.completed([off])
    assert known.table == table


def test_another_gpu_of_the_model_knows_best() -> None:
    odd = Table((Profile("1g.5gb", 19, 1, 2, (0, 2), 2),))
    silent = Table((replace(odd.profiles[0], size=0, starts=()),))
    off, on = replace(gpu("", silent, 0, mig=False), model_id=7), replace(gpu("", odd, 1), model_id=7)
    other: GpuState = replace(off, index=2, model_id=8)
    found = geometry.completed([off, on, other])
    assert [g.table for g in found] == [odd, odd, silent]


# --- list


def test_list_is_read_at_a_glance(server: Server) -> None:
    server.allocate("alice", "p", "--profile", "2g.20gb")
    server.ds01("mark-stopped", "--container", "p")
    result = server.ds01("mig", "list")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(
        """\
GPU 0  NVIDIA A100-SXM4-80GB, MIG off
  with MIG on up to: 7 x 1g.10gb, 3 x 2g.20gb, 2 x 3g.40gb, 1 x 4g.40gb, 1 x 7g.80gb, 1 x 1g.10gb+me, 4 x 1g.20gb

GPU 1  NVIDIA A100-SXM4-80GB, MIG on
  |2g.20gb        |1g+me  |.......|3g.40gb                        |
  |alice (held)   |free   |.......|free                           |
   0       1       2       3       4       5       6       7
  fits beside: 1g.10gb at 3

GPU 2  NVIDIA A30, MIG off
  with MIG on up to: 4 x 1g.6gb, 2 x 2g.12gb, 1 x 4g.24gb, 1 x 1g.6gb+me, 1 x 2g.12gb+me

GPU 3  NVIDIA L40S, no MIG

Device """
    )
    row = next(line for line in result.out.splitlines() if line.startswith("1:1 "))
    assert row.split()[:6] == ["1:1", "2g.20gb", "0-1", "held", "alice", "p._.alice"]
    assert row.endswith("Z")


def test_list_in_json(server: Server) -> None:
    server.allocate("alice", "p", "--profile", "2g.20gb")
    found = server.ds01("mig", "list", "--json").json
    assert [(g["index"], g["mig"], g["mig_capable"]) for g in found["gpus"]] == [
        (0, False, True),
        (1, True, True),
        (2, False, True),
        (3, False, False),
    ]
    assert found["gpus"][1]["possible"] == {"1g.10gb": [3]}
    assert found["gpus"][0]["possible"] == {}
    assert found["gpus"][0]["profiles"]["3g.40gb"] == found["gpus"][1]["profiles"]["3g.40gb"] == 2
    assert (found["gpus"][1]["memory_slices"], found["gpus"][1]["model"]) == (8, "0x20B210DE")
    uuids = {d["id"]: d["uuid"] for d in server.ds01("status", "--json").json["devices"]}
    assert [
        (i["gpu"], i["id"], i["uuid"], i["profile"], i["placement"], i["container"], i["status"])
        for i in found["instances"]
    ] == [
        (1, "1:1", uuids["1:1"], "2g.20gb", [0, 2], "p._.alice", "pending"),
        (1, "1:2", uuids["1:2"], "1g.10gb+me", [2, 1], None, "free"),
        (1, "1:0", uuids["1:0"], "3g.40gb", [4, 4], None, "free"),
    ]


def test_a_process_outside_ds01_is_shown(server: Server) -> None:
    server.simulate("process=1.0:4711")
    (row,) = [i for i in server.ds01("mig", "list", "--json").json["instances"] if i["id"] == "1:0"]
    assert (row["status"], row["container"]) == ("occupied", None)
    assert "4711" in row["occupied_by"]
    assert f"\n1:0 is used by {row['occupied_by']}." in server.ds01("mig", "list").out
    refused = server.ds01("mig", "plan", "--gpu", "1=7g.80gb")
    assert refused.code == 1
    assert "4711" in refused.err


def test_a_leftover_is_shown_and_cleaned_up(server: Server) -> None:
    inside(
        server,
        "h = pynvml.nvmlDeviceGetHandleByIndex(1); pynvml.nvmlDeviceCreateGpuInstanceWithPlacement("
        "h, 19, pynvml.byref(pynvml.c_nvmlGpuInstancePlacement_t(3, 1)))",
    )
    (row,) = [i for i in server.ds01("mig", "list", "--json").json["instances"] if i["status"] == "leftover"]
    assert (row["id"], row["uuid"], row["profile"], row["placement"]) == (None, None, "1g.10gb", [3, 1])
    assert "|left   |" in server.ds01("mig", "list").out
    kept = ["1 keep 2g.20gb 0", "1 keep 1g.10gb+me 2", "1 keep 3g.40gb 4"]
    assert plan(server, "--gpu", f"1={CUT}") == ["1 destroy 1g.10gb 3", *kept]


def test_an_instance_that_is_divided_has_a_row_for_each_part(start: Callable[..., Server]) -> None:
    server = start("A100-SXM4-80GB", g0="")
    inside(
        server,
        "h = pynvml.nvmlDeviceGetHandleByIndex(0); g = pynvml.nvmlDeviceCreateGpuInstance(h, 14); "
        "[pynvml.nvmlGpuInstanceCreateComputeInstance(g, 0) for _ in range(2)]",
    )
    found = server.ds01("mig", "list", "--json").json["instances"]
    assert [(i["id"], i["profile"]) for i in found] == [("0:0", "1c.2g.20gb"), ("0:1", "1c.2g.20gb")]
    (instance,) = {tuple(i["placement"]) for i in found}
    assert plan(server, "--gpu", "0=2g.20gb")[0] == f"0 destroy 2g.20gb {instance[0]}"
    shown = server.ds01("mig", "plan", "--gpu", "0=2g.20gb").out
    assert "|divided        |" in shown
    assert f"- destroy 2g.20gb at {instance[0]}-{instance[0] + 1} (divided)  (MIG-" in shown


def test_a_lost_gpu_hides_no_other(server: Server) -> None:
    server.simulate("lost=1")
    assert "GPU 1  unknown, lost" in server.ds01("mig", "list").out
    assert server.ds01("mig", "plan", "--gpu", "1=").err.startswith("ds01: gpu_unhealthy: GPU 1 is lost")
    assert plan(server, "--gpu", "0=7g.80gb") == ["0 enable", "0 create 7g.80gb 0"]


def test_a_pending_mode_is_told(server: Server) -> None:
    server.simulate("process=0:4711")
    inside(server, "pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(0), 1)")
    assert "GPU 0  NVIDIA A100-SXM4-80GB, MIG off (on after the next reset)" in server.ds01("mig", "list").out
    server.simulate("exit=0:4711")
    for wish in ("0=full", "0=7g.80gb"):
        out = server.ds01("mig", "plan", "--gpu", wish).out
        assert out.startswith("GPU 0  NVIDIA A100-SXM4-80GB, MIG on after the next reset\n")


def test_a_gpu_with_a_pending_mode_is_offered_to_nobody(server: Server) -> None:
    """The next reset, with the driver's next start or anybody's, takes what was granted."""
    server.simulate("process=0:4711", "process=1.0:4712")
    wish = "pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex({}), {})"
    inside(server, f"{wish.format(0, 1)}; {wish.format(1, 0)}")
    server.simulate("exit=0:4711", "exit=1.0:4712")
    gpus = server.ds01("status", "--json").json["gpus"]
    assert [(gpu["health"], gpu["health_reason"]) for gpu in gpus[:2]] == [
        ("suspect", "its MIG mode will be on after its next reset, which takes its devices"),
        ("suspect", "its MIG mode will be off after its next reset, which takes its devices"),
    ]
    refused = server.ds01("allocate", "--user", "alice", "--container", "p", "--profile", "2g.20gb")
    assert refused.code == 1
    assert "gpu_unhealthy: No healthy 2g.20gb" in refused.err
    assert "1:1 (suspect)" in refused.err
    others = [server.allocate(user, "p", "--profile", "full").json["allocation"]["gpu_id"] for user in ("bob", "dan")]
    assert others == ["2", "3"]
    inside(server, f"{wish.format(0, 0)}; {wish.format(1, 1)}")
    assert {gpu["health"] for gpu in server.ds01("status", "--json").json["gpus"]} == {"ok"}
    assert server.allocate("alice", "p", "--profile", "full").json["allocation"]["gpu_id"] == "0"


# --- plan


def test_a_plan_shows_before_and_after(server: Server) -> None:
    server.allocate("alice", "p", "--profile", "2g.20gb")
    gone = next(d["uuid"] for d in server.ds01("status", "--json").json["devices"] if d["id"] == "1:2")
    result = server.ds01("mig", "plan", "--gpu", "1=2g.20gb,3g.40gb,1g.10gb")
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        f"""\
GPU 1  NVIDIA A100-SXM4-80GB
  now   |2g.20gb        |1g+me  |.......|3g.40gb                        |
        |alice          |free   |.......|free                           |
         0       1       2       3       4       5       6       7
  then  |2g.20gb        |1g.10gb|.......|3g.40gb                        |
        |alice          |new    |.......|free                           |
         0       1       2       3       4       5       6       7
  - destroy 1g.10gb+me at 2  ({gone})
  + create 1g.10gb at 2
"""
    )
    assert server.ds01("mig", "plan", "--gpu", f"1={CUT}").out == (
        "GPU 1  NVIDIA A100-SXM4-80GB: as wanted, nothing to do\n\n"
        "also put right: the layout was not saved for the next boot\n"
    )


PLANS: dict[str, tuple[list[str], list[str]]] = {
    "MIG off": (["--gpu", "1=full"], ["destroy 2g.20gb 0", "destroy 1g.10gb+me 2", "destroy 3g.40gb 4", "disable"]),
    "a layout by name": (
        ["--layout", "all-balanced"],
        ["destroy 1g.10gb+me 2", "keep 2g.20gb 0", "keep 3g.40gb 4", "create 1g.10gb 2", "create 1g.10gb 3"],
    ),
}


@pytest.mark.parametrize(("argv", "steps"), PLANS.values(), ids=PLANS)
def test_plans(argv: list[str], steps: list[str], server: Server) -> None:
    assert [s.removeprefix("1 ") for s in plan(server, *argv) if s.startswith("1 ")] == steps


def test_a_plan_writes_nothing_and_creates_nothing(server: Server) -> None:
    server.allocate("alice", "p", "--profile", "2g.20gb")
    before = server.host.tree()
    for argv in (["list"], ["plan", "--layout", "all-smallest"], ["plan", "--layout", "all-balanced"]):
        server.ds01("mig", *argv)
    assert server.host.tree() == before, "the simulated driver's state is in there"


def test_who_is_in_the_way_is_named_and_may_be_forced(server: Server) -> None:
    server.allocate("alice", "p", "--profile", "2g.20gb")
    server.ds01("mark-stopped", "--container", "p")
    argv = ["mig", "plan", "--gpu", "1=4g.40gb,2g.20gb"]
    refused = server.ds01(*argv, "--json")
    assert refused.code == 1
    (one,) = refused.json["refusals"]
    (blocker,) = one["blocked_by"]
    assert (refused.json["reason"], one["gpu"]) == ("layout_in_use", 1)
    assert (blocker["container"], blocker["user"]) == ("p._.alice", "alice")
    (hold,) = server.ds01("status", "--json").json["allocations"]
    assert blocker["until"] == one["available_at"] == hold["hold_ends"]
    assert f"2g.20gb at 0-1 is in use by p._.alice of alice until {blocker['until']}" in refused.err
    forced = server.ds01(*argv, "--force", "p._.alice")
    assert forced.code == 0
    assert "  ! this takes 2g.20gb at 0-1 from p._.alice of alice until" in forced.out


def test_a_whole_gpu_that_somebody_has_is_not_cut(server: Server) -> None:
    assert server.allocate("alice", "p", "--profile", "full").json["allocation"]["gpu_id"] == "0"
    assert "  used as a whole by p._.alice of alice until " in server.ds01("mig", "list").out
    refused = server.ds01("mig", "plan", "--gpu", "0=2g.20gb")
    assert refused.code == 1
    assert "GPU 0 cannot become 2g.20gb: the GPU itself is in use by p._.alice of alice until " in refused.err


USAGE: dict[str, tuple[list[str], int, str]] = {
    "no such GPU": (["--gpu", "9="], 2, "There is no GPU 9 here. There are: 0, 1, 2, 3."),
    "a GPU twice": (["--gpu", "1=", "--gpu", "1=full"], 2, "GPU 1 is given twice."),
    "no profile": (["--gpu", "1=2g20gb"], 2, "2g20gb: this is not a MIG profile"),
    "no index": (["--gpu", "2g.20gb"], 2, "'2g.20gb' is not of the form 1=3g.40gb,2g.20gb"),
    "a GPU without MIG": (["--gpu", "3="], 1, "GPU 3 (NVIDIA L40S) has no MIG."),
    "a profile of another model": (["--gpu", "2=1g.10gb"], 1, "GPU 2 (NVIDIA A30) has no profile 1g.10gb; it has 1g.6"),
    "no room": (["--gpu", "2=2g.12gb,2g.12gb,1g.6gb"], 1, "no room for 2 x 2g.12gb, 1g.6gb together"),
    "no such layout": (["--layout", "all-balance"], 2, "There is no layout 'all-balance'."),
    "a file and no name": (
        ["--layouts", str(ROOT / "config" / "mig-layouts.yaml")],
        2,
        "none of them is named. Name one; there are: all-disabled,",
    ),
    "a file and a GPU": (["--gpu", "1=", "--layouts", "/nowhere.yaml"], 2, "Name one, or leave the file out."),
    "no such file": (["--layout", "x", "--layouts", "/nowhere.yaml"], 2, "/nowhere.yaml: the file of MIG layouts"),
    "the short form": ([], 1, "GPU 2 (NVIDIA A30) has no profile 2g.20gb; it has 1g.6"),
    "both": (["--layout", "x", "--gpu", "1="], 2, "not allowed with argument"),
}


@pytest.mark.parametrize(("argv", "code", "sentence"), USAGE.values(), ids=USAGE)
def test_what_cannot_be_planned_is_told_in_one_sentence(
    argv: list[str], code: int, sentence: str, server: Server
) -> None:
    result: Result = server.ds01("mig", "plan", *argv)
    assert (result.code, result.out) == (code, "")
    assert sentence in result.err


def test_capability_nodes_are_numbered_as_the_driver_does(server: Server) -> None:
    told = json.loads(inside(server, "i = d.inventory(); print(json.dumps(d.capabilities(i)))"))
    devices = server.ds01("status", "--json").json["devices"]
    state = server.sim_state.read_text(encoding="utf-8")
    cut = [dict(f.split("=") for f in line.split()[1:]) for line in state.splitlines() if line.startswith("ci ")]
    assert told == {ci["uuid"]: 3 + 135 * int(ci["gpu"]) + 9 * int(ci["gi"]) for ci in cut}
    assert set(told) == {d["uuid"] for d in devices if ":" in d["id"]}
