"""`ds01 reconcile` on a server where nothing is to be done, by its containers, as a whole process."""

from __future__ import annotations

import json
from collections.abc import Iterator

import processes
import world
from timing import Case, Section, interleaved

CONTAINERS = (0, 100, 500)


def reconcile(rounds: int) -> Iterator[Section]:
    """One run that finds everything as it should be, without containers and with many."""
    engine = world.lab_engine()
    with world.installation(*processes.LAB_GPUS, engine=engine) as here:
        for verb in ("allocate", "release"):
            here.ds01(verb, "--user", "alice", "--container", "bench")  # without a ledger it looks for what was lost
        for number in CONTAINERS:
            with world.containers(engine, number):
                yield _converged(here, number, rounds)


def _converged(here: world.Installation, number: int, rounds: int) -> Section:
    title = f"ds01 reconcile, nothing to do, {number} containers on the engine"
    name = f"ds01 reconcile, {number} containers"
    here.ds01("reconcile")  # what others left on this engine is reported once

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
    return Section(title, interleaved(title, cases, rounds), [f"{rounds} rounds, interleaved"])
