"""Many `ds01 allocate` at once on GPUs that are cut on demand."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import sim_tools
from sim_server import State
from support import Host
from test_cli_sim import SIM, Server, pytestmark  # noqa: F401 - the marks of this file, too

LIMITS = """
defaults: {max_gpus: 8, max_gpus_per_container: 4, allow_full_gpu: true}
gpu_allocation: {mig_profile: 1g.10gb, mig_strategy: dynamic}
"""
SLICES = {"1g.10gb": 1, "2g.20gb": 2, "3g.40gb": 4, None: 1}


@pytest.fixture
def server(host: Host, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Two A100: alice has a 2g, and a 3g is hers, on the first; the second is cut in seven."""
    state = host.root / "gpus"
    command = [SIM / "bin" / "nvml-sim", "init", state, "--gpus", "2xA100-SXM4-80GB", "--unprivileged"]
    cut = ["--mig", "0=2g.20gb,3g.40gb", "--mig", f"1={','.join(['1g.10gb'] * 7)}"]
    subprocess.run([*command, *cut], check=True, timeout=20, capture_output=True)
    tools = sim_tools.write(host.root / "bin", host.root / "machine")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    host.limits(LIMITS)
    return Server(host, state)


def cut(state: Path) -> dict[tuple[str, int], tuple[int, int]]:
    """(GPU, start) -> size and id of every GPU instance, from the simulator's own file."""
    machine = State.read(state)
    sizes = {"19": 1, "20": 1, "15": 2, "14": 2, "9": 4, "5": 4, "0": 8}
    return {(gi["gpu"], int(gi["start"])): (sizes[gi["profile"]], int(gi["id"])) for gi in machine.records["gi"]}


@pytest.mark.parametrize("seed", [1, 2])
def test_no_device_twice_and_nobody_s_touched(server: Server, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - the same at every run
    for profile, container in (("2g.20gb", "mine"), ("3g.40gb", "too")):
        assert server.allocate("alice", container, "--profile", profile).code == 0
    before = {name: record["devices"] for name, record in server.ledger().items()}
    there = cut(server.sim_state)
    wishes = [chance.choice(list(SLICES)) for _ in range(14)]
    crowd = [
        server.start(
            *("allocate", "--user", f"user{number}", "--container", "p", "--json"),
            *(("--profile", wish) if wish else ()),
        )
        for number, wish in enumerate(wishes)
    ]
    answers = []
    for process in crowd:
        out, err = process.communicate(timeout=120)
        assert process.returncode in (0, 1), err
        answers.append(json.loads(out))
    assert {a["reason"] for a in answers} <= {"granted", "no_gpu_available"}
    granted = [a["allocation"] for a in answers if a["reason"] == "granted"]
    assert len(granted) >= 4
    uuids = Counter(d["uuid"] for record in server.ledger().values() for d in record["devices"])
    assert max(uuids.values()) == 1, "a device is given twice"
    live = {d["uuid"]: d for d in server.ds01("status", "--json").json["devices"]}
    assert set(uuids) <= live.keys()
    for name, devices in before.items():
        assert [d["uuid"] for d in server.ledger()[name]["devices"]] == [d["uuid"] for d in devices]
    after = cut(server.sim_state)
    assert {place: after[place] for place in (("0", 0), ("0", 4))} == {
        place: there[place] for place in (("0", 0), ("0", 4))
    }
    for allocation, wish in ((a["allocation"], w) for a, w in zip(answers, wishes, strict=True) if a["allocation"]):
        assert [d["profile"] for d in allocation["devices"]] == [wish or "1g.10gb"]
    refused = [SLICES[w] for a, w in zip(answers, wishes, strict=True) if a["reason"] != "granted"]
    if 1 in refused:
        free = set(range(7)) - {
            n for (gpu, start), (size, _) in after.items() if gpu == "1" for n in range(start, start + size)
        }
        assert not free, "refused although a slice was free"
