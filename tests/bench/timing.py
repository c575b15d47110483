"""Timing: cases taken in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def say(text: str, end: str = "\n") -> None:
    """What is going on, on stderr: the output stays the table."""
    sys.stderr.write(text + end)
    sys.stderr.flush()


def nothing() -> None:
    """The default for what comes after a case."""


@dataclass(frozen=True)
class Sample:
    """Seconds: how long it took, and the processor time it needed meanwhile."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Case:
    """Something to time; `run` returns a Sample where it measured itself. `after` puts things back, untimed.

    `kind` is what it is in the table: "DS01", "floor" (what physics and the tools below ask for in any
    case) or "before" (what users had). Floors and befores say which DS01 case they are held `against`.
    """

    kind: str
    name: str
    run: Callable[[], object]
    after: Callable[[], object] = nothing
    against: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table: a case with its samples in seconds, or a figure that others reported.

    `cpu` is what this process and those it waited for computed meanwhile: it shows how busy the
    machine was with other things, and has no part of what an engine or a server did.
    """

    kind: str
    name: str
    samples: Sequence[float]
    cpu: Sequence[float] = ()
    against: str = ""
    reported: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: int) -> float:
        """The smallest sample that at least `percent` of them do not exceed."""
        ordered = sorted(self.samples)
        return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "against": self.against or None,
            "reported": self.reported,
            "n": len(self.samples),
            "median_s": self.median,
            "cpu_median_s": statistics.median(self.cpu) if self.cpu else None,
            "p99_s": self.percentile(99),
            "min_s": min(self.samples),
            "max_s": max(self.samples),
        }


@dataclass(frozen=True)
class Section:
    """Lines that were measured together and may be compared; `notes` say what else was seen."""

    title: str
    lines: Sequence[Line]
    notes: Sequence[str] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "lines": [line.as_dict() for line in self.lines], "notes": list(self.notes)}


def reported(name: str, seconds: float, against: str) -> Line:
    """What users of the replaced system reported; nobody measured it here."""
    return Line("before", name, [seconds], against=against, reported=True)


def interleaved(title: str, cases: Sequence[Case], rounds: int) -> list[Line]:
    """Every case once a round, `rounds` times; a round before them, to warm up, does not count."""
    say(f"== {title}: {rounds} rounds of {len(cases)} cases ", end="")
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            sample = timed(case.run)
            case.after()
            if number:
                samples[case.name].append(sample)
        if number % max(1, rounds // 10) == 0:
            say(".", end="")
    say("")
    return [line(case, samples[case.name]) for case in cases]


def line(case: Case, samples: Sequence[Sample]) -> Line:
    """A case and what was measured of it."""
    return Line(case.kind, case.name, [s.wall for s in samples], [s.cpu for s in samples], case.against)


def timed(run: Callable[[], object]) -> Sample:
    """Run it once."""
    computed, began = _computed(), time.perf_counter()
    own = run()
    measured = Sample(time.perf_counter() - began, _computed() - computed)
    return own if isinstance(own, Sample) else measured


def _computed() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)
