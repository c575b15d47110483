"""`make bench`: each figure of DS01 beside its floor and beside what users had before, in one run.

Machines are noisy, so cases take turns and the table shows medians; compare only within a section.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import decision
import processes
import reconciling
import relayout
import servers
from tabulate import tabulate
from timing import Line, Section, say

# Part -> what measures it, its rounds, its rounds with --quick.
PARTS: Mapping[str, tuple[Callable[[int], Iterator[Section]], int, int]] = {
    "decision": (decision.decision, 300, 30),
    "allocate": (processes.allocate, 15, 3),
    "contention": (processes.contention, 5, 1),
    "reconcile": (reconciling.reconcile, 15, 3),
    "relayout": (relayout.relayout, 500, 30),
    "servers": (servers.servers, 9, 3),
}


def main() -> None:
    """Measure the parts that were asked for, and print each section when it is there."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that everything made is removed
    sections = []
    for part in args.only or PARTS:
        measure, rounds, quick = PARTS[part]
        for section in measure(quick if args.quick else rounds):
            sections.append(section)
            print(f"\n{_table(section)}\n", flush=True)
    if args.json:
        document = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": _machine()}
        document["sections"] = [section.as_dict() for section in sections]
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"== written: {args.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given several times")
    return parser.parse_args()


def _table(section: Section) -> str:
    by_name = {line.name: line for line in section.lines}
    rows = [_row(line, by_name.get(line.against)) for line in section.lines]
    headers = [section.title, "", "median", "p99", "CPU", "n", "DS01 against it"]
    notes = "".join(f"\n  {note}" for note in section.notes)
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=["left"] * 2 + ["right"] * 5) + notes


def _row(line: Line, ds01: Line | None) -> Sequence[str]:
    against = _ratio(line, ds01) if ds01 else ""
    if line.reported:
        return line.name, line.kind, duration(line.median), "", "", "reported", against
    measured = (line.median, line.percentile(99), statistics.median(line.cpu))
    return line.name, line.kind, *map(duration, measured), str(len(line.samples)), against


def _ratio(line: Line, ds01: Line) -> str:
    ratio = ds01.median / line.median
    if ratio >= 1:
        return f"{ratio:.3g} times as long"
    return f"{1 / ratio:.3g} times faster"


def duration(seconds: float) -> str:
    """Three digits with the unit that suits them."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s"


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
