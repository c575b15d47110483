"""A thousand processes at once on 56 devices: none is given twice, nothing is lost, every refusal is right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ds01.ledger import LedgerStore
from installation import Installation
from support import ROOT
from test_allocations import ledger_says, projections
from test_cli_sim import SIM

pytestmark = [
    pytest.mark.robust,
    pytest.mark.sim,
    pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="the simulated driver is not built: make sim"),
    pytest.mark.parametrize("here", ["56 slices"], indirect=True),
]

DEVICES = 56
MAX_GPUS = 3
LIMITS = f"""
defaults:
  max_gpus: {MAX_GPUS}
  max_gpus_per_container: 2
  max_containers_per_user: null
  gpu_hold_after_stop: null
gpu_allocation: {{enable_mig: true, mig_profile: 1g.10gb}}
policies: {{pending_timeout: null}}
"""
Held = tuple[str, tuple[str, ...]]
"""A container's status in the ledger, and its devices' UUIDs."""


@dataclass
class Life:
    """What one process reported: its calls with their answers, and the one that it was killed in."""

    end: int
    calls: list[dict[str, Any]] = field(default_factory=list)
    unanswered: dict[str, Any] | None = None
    has: dict[str, Held] = field(default_factory=dict)
    """What its containers have after the last answer."""


def crowd(here: Installation, folder: Path, processes: int, victims: int = 0) -> list[Life]:
    """Run it, and check every answer against what the process had and what the ledger said then."""
    here.host.limits(LIMITS)
    command = [sys.executable, ROOT / "tests" / "robust" / "crowd.py", folder, str(processes), str(victims)]
    done = subprocess.run(command, env=here.server.env, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stderr[-2000:]) == (0, "")
    ends = json.loads((folder / "ends.json").read_bytes())
    assert victims <= Counter(ends)[-9] == processes - Counter(ends)[0] <= 2 * victims
    return [lived(folder / f"{number}.jsonl", end) for number, end in enumerate(ends)]


def lived(report: Path, end: int) -> Life:
    life = Life(end)
    for line in report.read_text(encoding="utf-8").splitlines() if report.exists() else []:
        said = json.loads(line)
        if "asked" in said:
            life.unanswered = said
            continue
        call = {**(life.unanswered or {}), **said}
        life.unanswered = None
        life.calls.append(call)
        before = life.has.pop(call["container"], None)
        assert call["answer"] == right_answer(call, before), call
        assert call["clashes"] == [], "somebody else uses a device that was granted"
        after = becomes(call, before)
        if after:
            life.has[call["container"]] = after
        assert (call["wrote"] is not None) == (before != after), call
    return life


def right_answer(call: Mapping[str, Any], before: Held | None) -> str:
    """The one right answer, given what the container had and what was taken when it was decided."""
    if call["asked"] != "allocated":
        return call["asked"] if before else "not_allocated"
    if before:
        return "already_allocated"
    if call["mine"] + call["gpus"] > MAX_GPUS:
        return "user_at_limit"
    return "no_gpu_available" if call["taken"] + call["gpus"] > DEVICES else "granted"


def becomes(call: Mapping[str, Any], before: Held | None) -> Held | None:
    """What the container has after an answer."""
    if call["answer"] == "released":
        return None
    status = {"granted": "pending", "held": "held", "active": "active"}.get(call["answer"])
    return (status, tuple(call["uuids"])) if status else before


def ledger(here: Installation) -> dict[str, Held]:
    found = LedgerStore(here.host.ledger).read().allocations
    return {name: (a.status, tuple(d.uuid for d in a.devices)) for name, a in found.items()}


def check_history(calls: Sequence[Mapping[str, Any]]) -> set[int]:
    """Each generation was written once, and is what everybody saw who decided from it. All those written."""
    written = Counter(call["wrote"] for call in calls if call["wrote"])
    assert max(written.values()) == 1, "two processes wrote the same generation: one lost what the other did"
    contents: dict[int, set[str]] = {}
    for call in calls:
        contents.setdefault(call["saw"], set()).add(call["saw_content"])
        if call["wrote"]:
            contents.setdefault(call["wrote"], set()).add(call["wrote_content"])
            assert call["wrote"] == call["saw"] + 1
    assert [generation for generation, seen in contents.items() if len(seen) > 1] == []
    return set(written)


def check_no_device_twice(here: Installation) -> None:
    uuids = [uuid for _, devices in ledger(here).values() for uuid in devices]
    assert len(uuids) == len(set(uuids))


def events(calls: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """The audit log that these calls should have left."""
    changes = {"granted": "gpu.allocated", "held": "gpu.held", "released": "gpu.released"}
    told = [changes[c["answer"]] for c in calls if c["wrote"] and c["answer"] in changes]
    fits = [c for c in calls if c["answer"] == "already_allocated" and c["gpus"] != len(c["uuids"])]
    asked = [c for c in calls if c["answer"] == "not_allocated" and c["asked"] == "released"]
    refused = [c for c in calls if c["answer"] in ("not_allocated", "no_gpu_available", "user_at_limit")]
    return Counter([*told, *["gpu.refused"] * (len(refused) - len(asked) + len(fits))])


def test_a_thousand_processes_at_once(here: Installation, tmp_path_factory: pytest.TempPathFactory) -> None:
    lives = crowd(here, tmp_path_factory.mktemp("crowd"), processes=1000)
    calls = [call for life in lives for call in life.calls]
    answers = Counter(call["answer"] for call in calls)
    print(answers)
    assert answers["granted"] > DEVICES, "no device changed hands"
    assert min(answers[reason] for reason in ("no_gpu_available", "user_at_limit", "held", "active", "released")) > 0
    assert ledger(here) == {container: held for life in lives for container, held in life.has.items()}
    generation = LedgerStore(here.host.ledger).read().generation
    assert check_history(calls) == set(range(1, generation + 1)), "an update was lost"
    check_no_device_twice(here)
    assert projections(here.host) == ledger_says(here.host)
    assert Counter(event["event"] for event in here.server.events()) == events(calls)


def test_a_third_of_them_killed_on_the_way(here: Installation, tmp_path_factory: pytest.TempPathFactory) -> None:
    lives = crowd(here, tmp_path_factory.mktemp("crowd"), processes=1000, victims=333)
    calls = [call for life in lives for call in life.calls]
    found, carried_out = ledger(here), 0
    for life in lives:
        asked = life.unanswered
        if asked:
            before, now = life.has.pop(asked["container"], None), found.pop(asked["container"], None)
            assert now == before or may_be(asked, before, now), asked
            carried_out += now != before
    assert found == {container: held for life in lives for container, held in life.has.items()}
    generation = LedgerStore(here.host.ledger).read().generation
    written = check_history(calls)
    assert written <= set(range(1, generation + 1))
    assert generation == len(written) + carried_out, "an update was lost"
    killed = sum(life.end != 0 for life in lives)
    print(Counter(call["answer"] for call in calls), f"{killed} killed, {carried_out} between writing and answering")
    assert carried_out > 5, "hardly anybody was killed between writing and answering"
    check_no_device_twice(here)
    assert projections(here.host).items() <= ledger_says(here.host).items()
    assert here.server.events(), "each line of the log is whole"


def may_be(asked: Mapping[str, Any], before: Held | None, now: Held | None) -> bool:
    """Whether a call that was carried out, but never answered, would leave this."""
    if asked["asked"] == "released":
        return now is None
    if asked["asked"] == "allocated":
        return before is None and now is not None and (now[0], len(now[1])) == ("pending", asked["gpus"])
    return before is not None and now == (asked["asked"], before[1])


def test_a_hundred_commands_at_once(here: Installation) -> None:
    here.host.limits(LIMITS)
    command = [ROOT / "bin" / "ds01", "allocate", "--json", "--container=p"]
    quiet = {"env": here.server.env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, f"--user=user{number}"], **quiet) for number in range(100)]
    said = [process.communicate(timeout=300) for process in started]
    assert [err for _, err in said if b"Traceback" in err] == []
    answers = [json.loads(out) for out, _ in said]
    assert Counter(a["reason"] for a in answers) == {"granted": DEVICES, "no_gpu_available": 100 - DEVICES}
    granted = {a["container"]: a["allocation"]["devices"][0]["uuid"] for a in answers if a["allocation"]}
    assert len(set(granted.values())) == DEVICES
    assert granted == ledger_says(here.host) == projections(here.host)
