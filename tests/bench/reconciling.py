"""`ds01 reconcile` on a server where nothing is to be done, by its containers, as a whole process."""

from __future__ import annotations

import json
from collections.abc import Iterator

import processes
import world
from timing import Case, Section, interleaved

CONTAINERS = (0, 100, 500)
RUNNING = 50
"""So many of them run, where there are as many: each is looked at in its cgroup."""


def reconcile(rounds: int) -> Iterator[Section]:
    """One run that finds everything as it should be, without containers and with many."""
    engine = world.lab_engine()
    with world.installation(*processes.LAB_GPUS, engine=engine) as here:
        for verb in ("allocate", "release"):
            here.ds01(verb, "--user", "alice", "--container", "bench")  # without a ledger it looks for what was lost
        for number in CONTAINERS:
            running = min(number, RUNNING)
            with world.containers(engine, number, running):
                yield _converged(here, number, running, rounds)


def _converged(here: world.Installation, number: int, running: int, rounds: int) -> Section:
    title = f"ds01 reconcile, nothing to do, {number} containers on the engine, {running} of them running"
    name = f"ds01 reconcile, {number} containers, {running} running"
    here.ds01("reconcile")  # what others left on this engine is reported once
    _check_sampled(here, running)

    def run() -> None:
        found = json.loads(here.ds01("reconcile", "--json"))
        if found["changed"] or found["problems"]:
            raise SystemExit(f"bench: a second run of reconcile found something to do: {found}")

    listing = "import docker; print(len(docker.from_env().api.containers(all=True)))"
    cases = [
        Case("DS01", name, run),
        *processes.interpreters(here, name),
        Case(
            "floor",
            "the interpreter, the SDK and one listing",
            lambda: world.run([processes.PYTHON, "-c", listing], here.env),
            against=name,
        ),
    ]
    notes = [f"{rounds} rounds, interleaved", f"{running} run without devices; the others were made and never started"]
    return Section(title, interleaved(title, cases, rounds), notes)


def _check_sampled(here: world.Installation, running: int) -> None:
    """What runs was looked at in its cgroup; else the figure leaves that out."""
    states = json.loads((here.folder / "state" / "policy-state.json").read_bytes())["containers"] if running else {}
    sampled = sum(bool(state["run"] and state["run"]["marks"]) for state in states.values())
    if sampled != running:
        raise SystemExit(f"bench: reconcile looked at {sampled} of {running} containers that run")
