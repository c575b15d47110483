"""What `ds01` prints for people: lines and tables. Programs read `--json`; nothing parses this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from fractions import Fraction
from typing import Any

from . import units
from .libraries import require
from .limits import Limits, number_text


def text(value: Any) -> str:
    """A limit as `ds01 limits` prints it: one spelling of "no limit", everywhere."""
    if value is None:
        return "unlimited"
    if isinstance(value, timedelta):
        return units.format_duration(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(value) if isinstance(value, Fraction) else str(value)


# `ds01 limits USER` prints these lines; each flag prints one value alone.
LIMITS: Mapping[str, Callable[[Limits], Any]] = {
    "User": lambda v: v.user,
    "Group": lambda v: v.group,
    "Priority": lambda v: v.priority,
    "Max MIG Instances": lambda v: v.max_gpus,
    "Max CPUs": lambda v: v.max_cpus,
    "Memory": lambda v: v.memory,
    "Shared Memory": lambda v: v.shm_size,
    "Max Containers": lambda v: v.max_containers_per_user,
    "Idle Timeout": lambda v: v.idle_timeout,
    "GPU Hold After Stop": lambda v: v.gpu_hold_after_stop,
    "Container Hold After Stop": lambda v: v.container_hold_after_stop,
}
SINGLE_LIMITS: Mapping[str, Callable[[Limits], Any]] = {
    "group": lambda v: v.group,
    "priority": lambda v: v.priority,
    "max-gpus": lambda v: v.max_gpus,
    "max-gpus-per-container": lambda v: v.max_gpus_per_container,
    "max-gpu-equivalents": lambda v: v.max_gpu_equivalents,
    "allow-full-gpu": lambda v: v.allow_full_gpu,
    "max-containers": lambda v: v.max_containers_per_user,
    "max-cpus": lambda v: v.max_cpus,
    "memory": lambda v: v.memory,
    "gpu-hold-time": lambda v: v.gpu_hold_after_stop,
    "container-hold-time": lambda v: v.container_hold_after_stop,
    "idle-timeout": lambda v: v.idle_timeout,
    "max-runtime": lambda v: v.max_runtime,
    "slice": lambda v: v.slice,
}


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a table; `columns` maps a row's key to its heading."""
    tabulate = require("tabulate", "tabulate").tabulate
    return tabulate([[row.get(key) for key in columns] for row in rows], headers=list(columns.values()))


DEVICES = {
    "id": "Device",
    "profile": "Profile",
    "memory": "Memory",
    "state": "State",
    "user": "User",
    "container": "Container",
    "hold_ends": "Held until",
}


SLICES = {
    "user": "User",
    "group": "Group",
    "containers": "Running",
    "CPUQuota": "CPU",
    "MemoryMax": "Memory",
    "MemoryHigh": "throttled from",
    "TasksMax": "Processes",
}


QUEUE = {
    "position": "Position",
    "container": "Container",
    "gpus": "Devices",
    "profile": "Profile",
    "priority": "Priority",
    "since": "Since",
    "available_at": "Not before",
}


# What `ds01 query` can be asked for, and the columns that people see.
QUERIES: Mapping[str, Mapping[str, str]] = {
    "containers": {"name": "Container", "user": "User", "status": "Status", "gpu_id": "GPU", "image": "Image"},
    "gpus": {
        "index": "GPU",
        "name": "Name",
        "mig": "MIG",
        "health": "Health",
        "utilization": "Use %",
        "allocated": "Allocated",
        "devices": "of",
    },
    "queue": QUEUE,
    "users": {
        "user": "User",
        "group": "Group",
        "devices": "Devices",
        "max_gpus": "of",
        "held": "Held",
        "gpu_equivalents": "GPU-equivalents",
        "containers": "Containers",
        "max_containers": "of ",
    },
}


def status_text(status: Mapping[str, Any]) -> str:
    """`ds01 status`: the devices and who has them; of one user, where the status is one user's."""
    ends = {a["container"]: a["hold_ends"] for a in status["allocations"]}
    rows = [
        {
            **device,
            "memory": f"{device['memory_mib'] / 1024:.1f} GiB",
            "state": device["status"] if device["health"] == "ok" else device["health"],
            "hold_ends": ends.get(device["container"]),
        }
        for device in status["devices"]
        if status["user"] in (None, device["user"])
    ]
    taken = sum(d["status"] != "free" for d in status["devices"])
    lines = [f"{taken} of {len(status['devices'])} devices allocated on {len(status['gpus'])} GPUs."]
    if rows:
        lines.append(table(rows, DEVICES))
    for device in status["devices"]:
        if device["occupied_by"]:
            lines.append(f"{device['id']} is used by {device['occupied_by']}, which DS01 does not manage.")
    if status["queue"] and status["user"] is None:
        lines.append(f"{len(status['queue'])} waiting:\n{table(status['queue'], QUEUE)}")
    for gpu in status["gpus"]:
        if gpu["health"] != "ok":
            lines.append(f"GPU {gpu['index']} is {gpu['health']}: {gpu['health_reason']}.")
        elif gpu["mig"] and not any(d["gpu_uuid"] == gpu["uuid"] for d in status["devices"]):
            lines.append(f"GPU {gpu['index']} is in MIG mode and not cut: nothing on it can be allocated.")
    for device in status["missing"]:
        lines.append(
            f"{device['id']} ({device['profile']}) of {device['container']} is missing, and its room is nobody else's: "
            "sudo ds01 restore cuts it again."
        )
    lines.extend(f"Not everything could be seen: {problem['msg']}" for problem in status["problems"])
    return "\n".join(lines)


def event_text(event: Mapping[str, Any]) -> str:
    """One line of `ds01 events`."""
    what = event.get("message") or event.get("reason") or ""
    return f"{event['timestamp']}  {event['event']:<18} {event.get('container') or '-':<28} {what}".rstrip()
