"""`ds01 allocate` as a whole process: alone, beside many containers, and fifty of them at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import world
from timing import Case, Line, Sample, Section, interleaved, reported

LAB_GPUS = ("4xA100-SXM4-80GB", [f"{gpu}=2g.20gb,2g.20gb,2g.20gb" for gpu in (1, 2, 3)])
DEVICES = 10
CALLERS = 50
CONTAINERS = 100
PYTHON = world.ROOT / ".venv" / "bin" / "python"
LIBRARIES = "import yaml, fastjsonschema, pynvml, docker"

# What users of the replaced scripts reported for one allocation, by the containers on the engine.
REPORTED = {0: 0.28, CONTAINERS: 10.0}


def allocate(rounds: int) -> Iterator[Section]:
    """One allocation, without and with containers on the engine."""
    engine = world.lab_engine()
    with world.installation(*LAB_GPUS, engine=engine) as here:
        yield _alone(here, 0, rounds)
        with world.containers(engine, CONTAINERS) as names:
            yield _alone(here, CONTAINERS, rounds, _inspect_each(names, here))


def _alone(here: world.Installation, number: int, rounds: int, more: Sequence[Case] = ()) -> Section:
    title = f"ds01 allocate, a whole process, {number} containers on the engine"
    name = f"ds01 allocate, {number} containers"
    who = ("--user", "alice", "--container", "bench")
    release = lambda: here.ds01("release", *who)  # noqa: E731
    with _floor_file() as write:
        cases = [
            Case("DS01", name, lambda: here.ds01("allocate", *who), release),
            Case("DS01", "of that, the lock held", lambda: _held(here, "allocate", *who), release),
            *interpreters(here, name),
            Case("floor", "4 KB written and fsynced", write, against=name),
            *(Case(c.kind, c.name, c.run, against=name) for c in more),
        ]
        lines = interleaved(title, cases, rounds)
    before = reported(f"replaced scripts, {number} containers", REPORTED[number], name)
    return Section(title, [*lines, before], [f"{rounds} rounds, interleaved"])


def _held(here: world.Installation, *words: str) -> Sample:
    """The same command, watched from inside: what every other caller on the server has to wait for."""
    env = {**here.env, "PYTHONPATH": str(world.CORE)}
    command = [str(PYTHON), str(world.BENCH / "held.py"), *words]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stderr
    wall, cpu = next(line for line in said.splitlines() if line.startswith("held ")).split()[1:]
    return Sample(float(wall), float(cpu))


def interpreters(here: world.Installation, against: str) -> list[Case]:
    python = lambda code: world.run([PYTHON, "-c", code], here.env)  # noqa: E731
    return [
        Case("floor", "the interpreter, nothing imported", lambda: python("pass"), against=against),
        Case("floor", "the interpreter and the four libraries", lambda: python(LIBRARIES), against=against),
    ]


def _inspect_each(names: Sequence[str], here: world.Installation) -> list[Case]:
    """The mechanism that made the replaced scripts slow: a `docker inspect` process a container."""
    client = shutil.which("docker")
    if client is None:
        return []

    def inspect() -> None:
        for name in names:
            world.run([client, "inspect", name], here.env)

    return [Case("before", f"one docker inspect process a container, {len(names)} of them", inspect)]


@contextlib.contextmanager
def _floor_file() -> Iterator[Callable[[], None]]:
    with tempfile.TemporaryDirectory(prefix="ds01-bench-") as folder:
        path = Path(folder) / "floor"

        def write() -> None:
            with path.open("wb") as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())

        yield write


def contention(rounds: int) -> Iterator[Section]:
    """Fifty callers at the same moment for nine MIG devices and one GPU."""
    title = f"{CALLERS} ds01 allocate processes at once, {DEVICES} devices"
    name = f"{CALLERS} processes, all answered"
    verdicts: set[str] = set()
    with world.installation(*LAB_GPUS, engine=world.lab_engine()) as here:
        cases = [
            Case("DS01", name, lambda: verdicts.add(_all_at_once(here)), here.forget),
            Case("floor", f"{CALLERS} interpreters with the four libraries", lambda: _idle(here), against=name),
        ]
        lines: list[Line] = interleaved(title, cases, rounds)
    yield Section(title, lines, [f"{rounds} rounds, interleaved", *sorted(verdicts)])


def _all_at_once(here: world.Installation) -> str:
    """Start everybody, wait for everybody, and check what they were told. Every fifth asks for the GPU."""
    asked = [("full" if number % 5 == 0 else "2g.20gb", f"user{number}") for number in range(CALLERS)]
    answers = _together(
        here,
        [
            [world.DS01, "allocate", "--json", "--user", user, "--container", "p", "--profile", profile]
            for profile, user in asked
        ],
    )
    results = [json.loads(answer) for answer in answers]
    granted = [device["uuid"] for r in results if r["reason"] == "granted" for device in r["allocation"]["devices"]]
    refused = sum(r["reason"] == "no_gpu_available" for r in results)
    ledger = json.loads(here.ledger.read_bytes())["allocations"]
    recorded = [device["uuid"] for allocation in ledger.values() for device in allocation["devices"]]
    if len(set(granted)) != len(granted) or sorted(granted) != sorted(recorded) or len(granted) != DEVICES:
        raise SystemExit(f"bench: {len(granted)} grants for {DEVICES} devices, {len(set(granted))} different ones")
    other = CALLERS - len(granted) - refused
    return f"{len(granted)} granted, none twice, {refused} refused" + (f", {other} failed" if other else "")


def _idle(here: world.Installation) -> None:
    _together(here, [[PYTHON, "-c", LIBRARIES]] * CALLERS)


def _together(here: world.Installation, commands: Sequence[Sequence[str | Path]]) -> list[str]:
    """All commands started before any is waited for; what each printed."""
    quiet = {"env": here.env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([str(word) for word in command], **quiet) for command in commands]
    return [process.communicate(timeout=300)[0] for process in started]
