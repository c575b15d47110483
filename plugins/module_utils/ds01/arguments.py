"""What can be typed after `ds01`: its commands and their options."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import terminal, units

_CONTAINER_HELP = "the project (my-project) or the full name (my-project._.alice)"


def parser() -> argparse.ArgumentParser:
    """All commands; one that was parsed is `command`, and `action` for those of a group."""
    ds01 = argparse.ArgumentParser(
        prog="ds01", description="Shares this server's GPUs.", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = ds01.add_subparsers(dest="command", required=True, metavar="COMMAND")

    limits = _add(commands, "limits", "Show what a user may have.", "ds01 limits alice --docker-args")
    limits.add_argument("user")
    limits.add_argument("--docker-args", action="store_true", help="as docker create flags")
    for name in terminal.SINGLE_LIMITS:
        limits.add_argument(f"--{name}", action="store_true", help="this value alone")

    _add_requests(commands)

    status = _add(commands, "status", "Show devices and who has them.", "ds01 status --user alice")
    status.add_argument("--user")

    _add_upkeep(commands)
    _add_emergency_stop(commands)
    _add_slices(commands)

    query = _add(
        commands,
        "query",
        "List containers, GPUs, who waits, or users beside their limits.",
        "ds01 query users --json",
    )
    query.add_argument("what", choices=list(terminal.QUERIES))

    log = _add(commands, "events", "Show the audit log (--json: its lines).", "ds01 events --follow --user alice")
    log.add_argument("--lines", type=_whole, default=50, metavar="N", help="the last N events (default 50)")
    log.add_argument("--follow", action="store_true", help="go on with new ones until interrupted")
    log.add_argument("--user", help="only this user's")
    log.add_argument("--container", metavar="NAME", help="only this container's, or this project's")

    _add_mig(commands)

    check = _add(
        _group(commands, "config", "The limits file."),
        "check",
        "Check the limits file, on a GPU server also against its devices and users, and the MIG layouts beside it.",
        "ds01 config check config/resource-limits.yaml",
    )
    check.add_argument("file", nargs="?", help="default: the one in force")
    check.add_argument("--strict", action="store_true", help="exit 1 when there is anything to look at")
    return ds01


def _add(into: Any, name: str, summary: str, example: str) -> Any:
    command = into.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _group(commands: Any, name: str, summary: str) -> Any:
    group = commands.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(dest="action", required=True, metavar="ACTION")


def _add_requests(commands: Any) -> None:
    allocate = _add(
        commands,
        "allocate",
        "Give a container its devices, all or none.",
        "ds01 allocate --user alice --container my-project --profile 2g.20gb",
    )
    allocate.add_argument("--user", required=True)
    allocate.add_argument("--container", required=True, metavar="NAME", help=_CONTAINER_HELP)
    allocate.add_argument("--gpus", type=_whole, default=1, metavar="N", help="devices (default 1; 0: CPU only)")
    allocate.add_argument("--profile", help="a MIG profile such as 2g.20gb, or full")
    allocate.add_argument("--max-gpus", type=_whole, metavar="N", help="lower the user's limit (root: raise it)")
    allocate.add_argument("--priority", type=_whole, metavar="N", help="lower the user's priority (root: raise it)")
    allocate.add_argument(
        "--wait", type=_duration, metavar="TIME", help="wait so long for a device, such as 10m (Ctrl-C stops waiting)"
    )
    allocate.add_argument(
        "--reuse-held", action="store_true", help="give up what your own stopped containers hold, where that helps"
    )
    allocate.add_argument("--dry-run", action="store_true", help="only say what would happen")

    for name, state, summary in (
        ("release", "released", "Take a container's devices back."),
        ("mark-stopped", "held", "Say that a container stopped: its hold begins."),
        ("clear-stopped", "active", "Say that a container runs again: its hold ends."),
    ):
        move = _add(commands, name, summary, f"ds01 {name} --container my-project --user alice")
        _add_container(move)
        move.add_argument("--dry-run", action="store_true", help="only say what would happen")
        move.set_defaults(state=state)

    validate = _add(
        commands,
        "validate",
        "Check that a container's devices exist, are healthy and are the ones projected.",
        "ds01 validate --container my-project --user alice --gpu 0:1",
    )
    _add_container(validate)
    validate.add_argument("--gpu", metavar="ID", help="the device it should have (0, 0:1 or a UUID)")


def _add_container(command: Any) -> None:
    command.add_argument("--container", required=True, metavar="NAME", help=_CONTAINER_HELP)
    command.add_argument("--user", help="the owner; may be left out with a full or unmistakable name")


def _add_upkeep(commands: Any) -> None:
    for name, summary, foreseen in (
        ("rebuild", "Restore a lost ledger from the containers.", "only say what would be restored"),
        (
            "reconcile",
            "Bring this server back to its own rules: what is over is taken back, what was tampered with is put right.",
            "only say what would be done: a report of drift",
        ),
    ):
        verb = _add(commands, name, summary, f"ds01 {name} --dry-run")
        verb.add_argument("--dry-run", action="store_true", help=foreseen)

    restore = _add(
        commands,
        "restore",
        "After a reboot: cut the GPUs again as they were, and give containers their devices again (a unit does this).",
        "ds01 restore --dry-run",
    )
    how = restore.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would be done")
    how.add_argument(
        "--forget",
        action="append",
        default=[],
        metavar="UUID",
        help="first leave out a GPU that was taken out of this machine for good; may be repeated",
    )

    shown = _add(
        commands,
        "metrics",
        "Show what Prometheus is told about this server (each reconcile writes it where the limits file says).",
        "ds01 metrics --output /var/lib/prometheus/node-exporter",
    )
    shown.add_argument("--output", type=Path, metavar="DIR", help="write it there, as ds01.prom")


def _add_emergency_stop(commands: Any) -> None:
    halt = _add(
        commands,
        "emergency-stop",
        "End containers at once, and free their devices and those that stopped ones hold. Files are kept.",
        "ds01 emergency-stop --user alice",
    )
    whom = halt.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", help="this user's")
    whom.add_argument("--gpu", metavar="ID", help="those on a GPU or a MIG device (0, 0:1 or a UUID)")
    whom.add_argument("--all", action="store_true", help="all of DS01's")
    halt.add_argument(
        "--timeout", type=_whole, default=5, metavar="S", help="seconds until what does not end is killed (default 5)"
    )
    halt.add_argument("--dry-run", action="store_true", help="only say what would be stopped")


def _add_slices(commands: Any) -> None:
    slices = _group(commands, "slices", "The users' slices.")
    _add(
        slices,
        "list",
        "Show the limits in force, what is due, and which containers a daemon-reload would cut off from their GPUs.",
        "ds01 slices list",
    )
    _add(
        slices,
        "apply",
        "Make the slices that exist as the limits file says, while containers run in them; remove those of nobody.",
        "ds01 slices apply",
    )


def _add_mig(commands: Any) -> None:
    mig = _group(commands, "mig", "How the GPUs are cut.")
    _add(mig, "list", "Show how each GPU is cut, who has what, and what still fits.", "ds01 mig list")
    plan = _add(
        mig,
        "plan",
        "Show what it takes to cut the GPUs as wanted. Changes nothing.",
        "ds01 mig plan --gpu 1=3g.40gb,2g.20gb,1g.10gb",
    )
    _add_wanted_layout(plan)
    cut = _add(
        mig,
        "apply",
        "Cut the GPUs as wanted: just what ds01 mig plan shows, all of it or nothing. It does not ask: with neither"
        " --layout nor --gpu it cuts every GPU that has MIG as the limits file says.",
        "ds01 mig apply --layout all-balanced",
    )
    _add_wanted_layout(cut)
    cut.add_argument("--dry-run", action="store_true", help="as ds01 mig plan")


def _add_wanted_layout(command: Any) -> None:
    wanted = command.add_mutually_exclusive_group()
    wanted.add_argument(
        "--layout",
        metavar="NAME",
        help="a layout of the layouts file (neither this nor --gpu: every GPU by the limits file's"
        " enable_mig and mig_profile, as many as fit)",
    )
    wanted.add_argument(
        "--gpu",
        type=_gpu_layout,
        action="append",
        metavar="N=PROFILES",
        help="a GPU and its profiles (1=: MIG without instances, 1=full: MIG off); once for each GPU, the others stay"
        " as they are",
    )
    command.add_argument(
        "--layouts",
        type=Path,
        metavar="FILE",
        help="the file that --layout is in (default: mig-layouts.yaml beside the limits file)",
    )
    command.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="CONTAINER",
        help="full name of one whose devices it may break; may be repeated",
    )


def _duration(text: str) -> timedelta:
    try:
        return units.parse_duration(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _gpu_layout(text: str) -> tuple[int, list[str]]:
    """`1=3g.40gb,2g.20gb` as (1, ["3g.40gb", "2g.20gb"])."""
    index, equals, profiles = text.partition("=")
    if not equals or not index.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1=3g.40gb,2g.20gb (1=full: MIG off)")
    return int(index), [part.strip() for part in profiles.split(",") if part.strip()]
