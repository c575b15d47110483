"""What the policies remember of each container from one look to the next. An adapter: one JSON file.

Times are seconds. A file that is damaged is an empty one: fresh states stop nobody. It has a checksum, since a
flipped digit would be somebody's running time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import files, units
from .errors import Ds01Error
from .policies import DeviceUse, KeepAlive, Marks, Notice, Run, State, Stop

VERSION = 1


class PolicyStore:
    """The file, replaced as a whole, by whoever has reconcile's lock. `problem` says what was wrong with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = b""
        self.problem: str | None = None

    def read(self) -> dict[str, State]:
        """The states by container id; none where there is no file, or none that can be read."""
        try:
            self._content = self._path.read_bytes()
            return _states(json.loads(self._content))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
            self.problem = (
                f"{self._path} cannot be read ({exc}): idle and running times start anew, and whoever was warned is "
                "warned again."
            )
            return {}

    def write(self, states: Mapping[str, State]) -> None:
        """Replace the file where it differs from what was read. Raises Ds01Error `ledger_unavailable`."""
        data = _document(states)
        if data == self._content:
            return
        try:
            files.make_directory(self._path.parent, 0o750)
            files.replace(self._path, data, 0o640, durable=True)
        except OSError as exc:
            raise Ds01Error(
                "ledger_unavailable",
                f"{self._path} could not be written: {exc.strerror}. Nobody is stopped meanwhile.",
                "Free space on that file system.",
            ) from None
        self._content = data


def _document(states: Mapping[str, State]) -> bytes:
    """The file, a container a line."""
    records = {container: _record(state) for container, state in sorted(states.items())}
    lines = ",\n  ".join(f"{json.dumps(container)}: {json.dumps(record)}" for container, record in records.items())
    head = f'{{"version": {VERSION},\n "checksum": {json.dumps(_checksum(records))},\n "containers": {{'
    return f"{head}\n  {lines}\n }}}}\n".encode() if lines else f"{head}}}}}\n".encode()


def _checksum(records: Mapping[str, Any]) -> str:
    canonical = json.dumps(records, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _states(document: Mapping[str, Any]) -> dict[str, State]:
    if document["version"] != VERSION:
        raise ValueError(f"its version is {document['version']!r}; this DS01 reads {VERSION}")
    if document["checksum"] != _checksum(document["containers"]):
        raise ValueError("its checksum does not match its content")
    return {container: _state(record) for container, record in document["containers"].items()}


def _record(state: State) -> dict[str, Any]:
    return {
        "ran": _seconds(state.ran),
        "run": _run_record(state.run) if state.run else None,
        "keep_alive": {
            "touched": state.kept.touched.isoformat(),
            "counted": _seconds(state.kept.counted),
        }
        if state.kept
        else None,
        "farewell": state.farewell,
    }


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "boot_id": run.boot_id,
        "seen": _seconds(run.seen),
        "idle": _seconds(run.idle),
        "streak": run.streak,
        "marks": _marks_record(run.marks) if run.marks else None,
        "notices": {policy: _notice_record(notice) for policy, notice in run.notices.items()},
        "exempted": list(run.exempted),
        "stop": {"policy": run.stop.policy, "until": _seconds(run.stop.until)} if run.stop else None,
    }


def _marks_record(marks: Marks) -> dict[str, Any]:
    devices = [[list(d.processes), d.memory, d.utilization] for d in marks.devices]
    return {
        "uptime": _seconds(marks.uptime),
        "cpu": _seconds(marks.cpu),
        "network": marks.network,
        "devices": devices,
    }


def _notice_record(notice: Notice) -> dict[str, Any]:
    return {
        "stage": notice.stage,
        "since": _seconds(notice.since),
        "ends": _seconds(notice.ends),
        "told": notice.told.isoformat(),
    }


def _seconds(span: timedelta) -> float:
    return span.total_seconds()


def _span(value: float) -> timedelta:
    return timedelta(seconds=value)


def _state(raw: Mapping[str, Any]) -> State:
    kept = raw["keep_alive"]
    return State(
        ran=_span(raw["ran"]),
        run=_run(raw["run"]) if raw["run"] else None,
        kept=KeepAlive(units.parse_time(kept["touched"]), _span(kept["counted"])) if kept else None,
        farewell=str(raw["farewell"]),
    )


def _run(raw: Mapping[str, Any]) -> Run:
    stop = raw.get("stop")  # absent from files of earlier versions
    return Run(
        boot_id=raw["boot_id"],
        seen=_span(raw["seen"]),
        idle=_span(raw["idle"]),
        streak=int(raw["streak"]),
        marks=_marks(raw["marks"]) if raw["marks"] else None,
        notices={policy: _notice(record) for policy, record in raw["notices"].items()},
        exempted=tuple(raw["exempted"]),
        stop=Stop(stop["policy"], _span(stop["until"])) if stop else None,
    )


def _marks(raw: Mapping[str, Any]) -> Marks:
    devices = tuple(DeviceUse(tuple(pids), memory, utilization) for pids, memory, utilization in raw["devices"])
    return Marks(_span(raw["uptime"]), _span(raw["cpu"]), raw["network"], devices)


def _notice(raw: Mapping[str, Any]) -> Notice:
    return Notice(int(raw["stage"]), _span(raw["since"]), _span(raw["ends"]), units.parse_time(raw["told"]))
