"""What other programs read of this server: metrics for node_exporter, job mappings for dcgm-exporter.

`look` or `picture` see the host, `publish` counts on and writes the files (the end of every reconcile), `families`
shows the same without writing anything (`ds01 metrics`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from . import engine, files, limits, metrics, nvml, processes, units
from .allocations import Allocations
from .errors import Ds01Error
from .event_files import LogFiles, Position
from .events import parsed
from .libraries import require
from .metrics import Family, Picture, Run, Totals
from .model import Ledger
from .observation import Observation
from .policy_state import PolicyStore
from .transitions import hold_end, resolved

TEXTFILE = "ds01.prom"
_MAPPING = re.compile(r"[0-9]+(\.[0-9]+)?")


def look(ds01: Allocations) -> Picture:
    """The host as it is now, as far as it answers. Raises Ds01Error `config_invalid`."""
    available: dict[str, bool] = {}
    ledger: Ledger | None = None
    driver: nvml.Nvml | None = None
    with contextlib.ExitStack() as stack:
        with _part("ledger", available):
            ledger = ds01.store.read()
        with _part("driver", available):
            driver = stack.enter_context(nvml.session())
        seen = _seen(ds01, ledger or Ledger(), driver, available)
        return picture(ds01, ledger, seen, driver if available["driver"] else None, available)


def _seen(
    ds01: Allocations, ledger: Ledger, driver: nvml.Nvml | None, available: dict[str, bool]
) -> Observation | None:
    """What engine and driver show together; where one of them does not answer, the other alone."""
    parts = {} if engine.disabled() else {"engine": True}
    with contextlib.suppress(Ds01Error):
        found = ds01.look(ledger, driver)
        available.update(parts)
        return found
    alone: Observation | None = None
    if parts:
        with _part("engine", available):
            alone = ds01.look(ledger, None)
    if driver:
        with _part("driver", available):
            alone = ds01.look_at_driver(driver)
    return alone


@contextlib.contextmanager
def _part(name: str, available: dict[str, bool]) -> Iterator[None]:
    """Notes whether this part of the host answered."""
    try:
        yield
        available[name] = True
    except Ds01Error as exc:
        if exc.reason == "config_invalid":
            raise
        available[name] = False


def picture(
    ds01: Allocations,
    ledger: Ledger | None,
    seen: Observation | None,
    driver: nvml.Nvml | None,
    available: Mapping[str, bool] | None = None,
) -> Picture:
    """What was seen already, as a picture. `driver` is the session in which it was; None: it does not answer.

    `available` says which parts answered, where not all did: ledger, driver, engine.
    """
    if available is None:
        available = {"ledger": True, "driver": True, **({} if engine.disabled() else {"engine": True})}
    seen = seen or Observation()
    if ledger and driver:
        ledger = resolved(ledger, seen.inventory)
    now, known = ds01.clock(), ledger or Ledger()
    instances: Mapping[str, int] | None = None
    if driver:
        with contextlib.suppress(Ds01Error):  # a GPU that was cut anew meanwhile is looked at again in a minute
            instances = driver.instances(seen.inventory)
    queue = ds01.situation(known, seen, now).queue
    containers = None if seen.seen is None else Counter(c.user for c in seen.containers if c.user)
    users = {a.user for a in known.allocations.values()} | {w.request.user for w in queue} | set(containers or ())
    ends = {name: hold_end(a, ds01.config) for name, a in known.allocations.items() if a.stopped_at}
    return Picture(
        now=now,
        ledger=ledger,
        inventory=seen.inventory if driver else None,
        occupied=seen.occupied,
        instances=instances,
        queue=queue,
        hold_ends={name: end for name, end in ends.items() if end},
        idle=_idle(ds01, seen),
        containers=containers,
        limits={user: limits.resolve(ds01.config, user) for user in users},
        available={**available, "events": ds01.events.problem is None and _writable(ds01.events.files)},
    )


def _idle(ds01: Allocations, seen: Observation) -> dict[str, timedelta]:
    """How long running containers had shown no use at the last look of the policies, by name."""
    states, boot = PolicyStore(ds01.paths.policy_state).read(), processes.boot_id()
    running = {c.name: states[c.id].run for c in seen.containers if c.status in engine.RUNNING and c.id in states}
    return {name: run.idle for name, run in running.items() if run and run.streak and run.boot_id == boot}


def _writable(log: LogFiles) -> bool:
    try:
        log.check()
    except OSError:
        return False
    return True


def families(ds01: Allocations, pictured: Picture) -> list[Family]:
    """Every metric as it is now. Writes nothing."""
    totals, _ = _counted(ds01, pictured)
    return metrics.families(pictured, totals)


def publish(ds01: Allocations, pictured: Picture, run: Run) -> Sequence[str]:
    """Count on and write what the limits file asks for; whatever could not be done, a sentence each.

    Only under reconcile's lock: one counts at a time.
    """
    wanted, problems = ds01.config.metrics, []
    if wanted.textfile_directory:
        try:
            totals, position = _counted(ds01, pictured)
            totals = metrics.with_run(totals, run)
            write(Path(wanted.textfile_directory), metrics.families(pictured, totals))
            _save(ds01.paths.totals, totals, position)
        except (OSError, Ds01Error) as exc:
            problems.append(f"The metrics could not be written: {_text(exc)}.")
    mapping = metrics.job_mapping(pictured)
    if wanted.job_mapping_directory and mapping is not None:
        try:
            _map_jobs(Path(wanted.job_mapping_directory), mapping)
        except OSError as exc:
            problems.append(f"The job mapping could not be written: {_text(exc)}.")
    return problems


def _text(exc: Exception) -> str:
    if isinstance(exc, OSError):
        return f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror)
    return str(exc).rstrip(".")


def render(found: Sequence[Family]) -> bytes:
    """The metrics in Prometheus' text format. Raises Ds01Error `library_missing`."""
    core = require("prometheus_client.core", "prometheus_client")
    generate = require("prometheus_client.exposition", "prometheus_client").generate_latest

    class Collected:
        def collect(self) -> Iterator[Any]:
            for family in found:
                metric = core.Metric(family.name.removesuffix("_total"), family.help, family.kind)
                for labels, value in family.samples:
                    metric.add_sample(family.name, {name: _utf8(text) for name, text in labels.items()}, value)
                yield metric

    return generate(Collected())


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()


def write(directory: Path, found: Sequence[Family]) -> Path:
    """The metrics in node_exporter's directory, which is made where it is missing; the file.

    Raises OSError, or Ds01Error `library_missing`.
    """
    text = render(found)
    files.make_directory(directory, 0o755)
    files.replace(directory / TEXTFILE, text, 0o644)
    return directory / TEXTFILE


def _map_jobs(directory: Path, mapping: Mapping[str, str]) -> None:
    """Each device's file says its job; those of devices that nobody has are emptied, as dcgm-exporter wants it."""
    files.make_directory(directory, 0o755)
    there = {p.name: p for p in directory.iterdir() if _MAPPING.fullmatch(p.name) and not p.is_symlink()}
    had = {name: path.read_bytes() for name, path in there.items() if path.is_file()}
    for name in sorted({*had, *mapping}):
        content = mapping.get(name, "").encode(errors="surrogateescape")
        if had.get(name) != content:
            files.replace(directory / name, content, 0o644)


def _counted(ds01: Allocations, pictured: Picture) -> tuple[Totals, Position | None]:
    """The totals up to this picture, and how far the audit log is counted. A log that cannot be read is
    counted when it can."""
    totals, position = _saved(ds01.paths.totals)
    found: list[Mapping[str, Any]] = []
    with contextlib.suppress(OSError):
        for line, place in ds01.events.files.after(position):
            position, event = place, parsed(line)
            if event:
                found.append(event)
    totals = metrics.with_events(totals, found)
    if pictured.ledger is not None:
        totals = metrics.with_time(totals, pictured.ledger, pictured.idle, pictured.now)
    return totals, position


def _save(path: Path, totals: Totals, position: Position | None) -> None:
    run = totals.last_run
    document = {
        "events": dict(totals.events),
        "refusals": dict(totals.refusals),
        "seconds": [[user, status, spent] for (user, status), spent in sorted(totals.seconds.items())],
        "idle": dict(totals.idle),
        "counted_until": _time(totals.counted_until),
        "last_run": run and [_time(run.ended_at), run.seconds, run.ok],
        "last_success": _time(totals.last_success),
        "position": position and [position.inode, position.first, position.offset],
    }
    files.make_directory(path.parent, 0o750)
    files.replace(path, f"{json.dumps(document)}\n".encode(), 0o640)


def _saved(path: Path) -> tuple[Totals, Position | None]:
    """What was saved; with nothing that can be read, counting begins anew, as Prometheus expects of counters."""
    try:
        document = json.loads(path.read_bytes())
        run = document["last_run"]
        totals = Totals(
            events={str(name): int(count) for name, count in document["events"].items()},
            refusals={str(name): int(count) for name, count in document["refusals"].items()},
            seconds={(str(user), str(status)): float(spent) for user, status, spent in document["seconds"]},
            idle={str(user): float(spent) for user, spent in document.get("idle", {}).items()},
            counted_until=_read_time(document["counted_until"]),
            last_run=run and Run(units.parse_time(run[0]), float(run[1]), bool(run[2])),
            last_success=_read_time(document["last_success"]),
        )
        return totals, document["position"] and Position(*map(int, document["position"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return Totals(), None


def _time(value: datetime | None) -> str | None:
    return value.isoformat() if value else None


def _read_time(value: str | None) -> datetime | None:
    return units.parse_time(value) if value else None
