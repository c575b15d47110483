"""`ds01`: the verbs on a host, or out of a checkout (`bin/ds01`). A thin door: parse, call, print.

Exit codes: 0 done, 1 refused (reason on stderr), 2 usage or config error, 3 engine, driver, ledger
or lock unavailable, 128 + N ended by signal N.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import accounts, config, interruption, names, nvml, overview, terminal, units, waiting, watchdog
from .allocations import Allocations
from .errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, EXIT_UNAVAILABLE, Ds01Error, exit_code, invalid_input
from .limits import as_dict, resolve_all
from .lint import lint, lint_layouts
from .model import Inventory
from .paths import Paths
from .transitions import Change, Outcome, describe

_CONTAINER_HELP = "the project (my-project) or the full name (my-project._.alice)"


def _cmd_limits(args: argparse.Namespace, ds01: Allocations) -> int:
    value = ds01.limits(args.user)
    single = next((name for name in terminal.SINGLE_LIMITS if getattr(args, name.replace("-", "_"))), None)
    if args.json:
        _print_json(as_dict(value))
    elif args.docker_args:
        print(" ".join(value.docker_args()))
    elif single:
        print(terminal.text(terminal.SINGLE_LIMITS[single](value)))
    else:
        for label, get in terminal.LIMITS.items():
            print(f"{label}: {terminal.text(get(value))}")
    return EXIT_OK


def _cmd_allocate(args: argparse.Namespace, ds01: Allocations) -> int:
    change = Change(
        "allocated",
        ds01.name(args.container, args.user),
        gpus=args.gpus,
        profile=args.profile,
        priority=args.priority,
        max_gpus=args.max_gpus,
        may_raise=os.geteuid() == 0,
        reuse_held=args.reuse_held,
        wait=args.wait,
    )
    return _carry_out(change, args, ds01)


def _cmd_move(args: argparse.Namespace, ds01: Allocations) -> int:
    return _carry_out(Change(args.state, ds01.name(args.container, args.user)), args, ds01)


def _carry_out(change: Change, args: argparse.Namespace, ds01: Allocations) -> int:
    if args.dry_run:
        print("Dry run, nothing is changed.", file=sys.stderr)
        return _show(ds01.preview([change])[0], args.json)
    return _show(waiting.apply(ds01, [change], _say)[0], args.json)


def _cmd_validate(args: argparse.Namespace, ds01: Allocations) -> int:
    return _show(ds01.validate(ds01.name(args.container, args.user), args.gpu), args.json)


def _cmd_status(args: argparse.Namespace, ds01: Allocations) -> int:
    status = overview.status(ds01, args.user)
    if args.json:
        _print_json(status)
    else:
        print(terminal.status_text(status))
    return EXIT_OK


# What `ds01 query` can be asked for, and the columns that people see.
_QUERIES: Mapping[str, tuple[Callable[[Allocations], Sequence[Mapping[str, Any]]], Mapping[str, str]]] = {
    "containers": (
        overview.containers,
        {"name": "Container", "user": "User", "status": "Status", "gpu_id": "GPU", "image": "Image"},
    ),
    "gpus": (
        overview.gpus,
        {
            "index": "GPU",
            "name": "Name",
            "mig": "MIG",
            "health": "Health",
            "utilization": "Use %",
            "allocated": "Allocated",
            "devices": "of",
        },
    ),
    "queue": (
        overview.queue,
        terminal.QUEUE,
    ),
    "users": (
        overview.users,
        {
            "user": "User",
            "group": "Group",
            "devices": "Devices",
            "max_gpus": "of",
            "held": "Held",
            "gpu_equivalents": "GPU-equivalents",
            "containers": "Containers",
            "max_containers": "of ",
        },
    ),
}


def _cmd_query(args: argparse.Namespace, ds01: Allocations) -> int:
    ask, columns = _QUERIES[args.what]
    rows = ask(ds01)
    if args.json:
        _print_json(rows)
    else:
        print(terminal.table(rows, columns))
    return EXIT_OK


def _cmd_events(args: argparse.Namespace, ds01: Allocations) -> int:
    user = names.canonical_user(args.user, accounts.lookup) if args.user else None

    def wanted(event: Mapping[str, Any]) -> bool:
        container = str(event.get("container") or "")
        named = args.container in (None, container, names.split(container)[0])
        return named and user in (None, event.get("user"))

    for event in ds01.events.read(args.lines, wanted, follow=args.follow):
        print(json.dumps(event, ensure_ascii=False) if args.json else terminal.event_text(event), flush=True)
    return EXIT_OK


def _cmd_metrics(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import publishing

    found = publishing.families(ds01, publishing.look(ds01))
    if args.output:
        _say(f"Written: {publishing.write(args.output, found)}")
    if args.json:
        _print_json([family.record() for family in found])
    elif not args.output:
        print(publishing.render(found).decode(), end="")
    return EXIT_OK


def _cmd_config_check(args: argparse.Namespace, ds01: Allocations) -> int:
    path = Path(args.file or ds01.paths.config)
    checked = config.load(path)
    resolve_all(checked)
    layouts_file = replace(ds01.paths, config=path).layouts
    layouts = config.load_layouts(layouts_file) if layouts_file.exists() else {}
    inventory, not_checked = _this_server()
    findings = lint(checked, ds01.clock(), inventory, accounts.is_login_name if inventory else None)
    findings += lint_layouts(layouts, inventory)
    if args.json:
        counted = {name: list(getattr(checked, name)) for name in ("groups", "overrides")} | {"layouts": list(layouts)}
        found = [asdict(finding) for finding in findings]
        _print_json({"file": str(path), **counted, "findings": found, "not_checked": not_checked})
    else:
        print(f"{path}: valid ({len(checked.groups)} groups, {len(checked.overrides)} user overrides).")
        if layouts:
            print(f"{layouts_file}: valid ({len(layouts)} MIG layouts).")
        for finding in findings:
            print(f"{finding.path}: {finding.message}")
        if not_checked:
            print(f"Not compared with hardware and users: {not_checked}", file=sys.stderr)
    if findings and args.strict:
        _complain("findings", f"{path}: {len(findings)} to look at, and --strict allows none.")
        return EXIT_REFUSED
    return EXIT_OK


def _this_server() -> tuple[Inventory | None, str | None]:
    """What this GPU server has; on another machine None, and why there is nothing to compare with."""
    try:
        with nvml.session() as driver:
            return driver.inventory(), None
    except Ds01Error as exc:
        return None, exc.message


def _cmd_rebuild(args: argparse.Namespace, ds01: Allocations) -> int:
    rebuilt = ds01.foresee_rebuild() if args.dry_run else ds01.rebuild()
    if args.json:
        allocations = [describe(a) for a in rebuilt.allocations.values()]
        restored, problems = list(rebuilt.restored), list(rebuilt.problems)
        _print_json({"allocations": allocations, "restored": restored, "problems": problems})
    else:
        would = "would have" if args.dry_run else "has"
        back = f"; restored: {', '.join(rebuilt.restored)}" if rebuilt.restored else ""
        print(f"The ledger {would} {len(rebuilt.allocations)} allocations{back}.")
        for problem in rebuilt.problems:
            print(f"not restored: {problem}")
    return EXIT_OK


def _cmd_reconcile(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import reconcile

    found = reconcile.foresee(ds01) if args.dry_run else reconcile.reconcile(ds01)
    if args.json:
        _print_json(found.result())
    else:
        for action in found.actions:
            print(action.message)
        print(found.summary())
    for problem in found.problems:
        _complain(problem["reason"], f"{problem['stage']}: {problem['msg']}")
    return max((exit_code(problem["reason"]) for problem in found.problems), default=EXIT_OK)


def _cmd_mig_list(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import mig_text, partitions

    listing = partitions.listing(partitions.look(ds01, strict=False))
    if args.json:
        _print_json(listing)
    else:
        print(mig_text.list_text(listing))
    return EXIT_OK


def _cmd_mig_plan(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import mig_text, relayout

    planned = relayout.foresee(ds01, _wanted_layout(args, ds01), args.force)
    _warn(planned)
    if args.json:
        _print_json(planned.result())
    else:
        print(mig_text.plan_text(planned))
    return EXIT_OK


def _cmd_mig_apply(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import relayout

    if args.dry_run:
        return _cmd_mig_plan(args, ds01)
    with interruption.as_exception():
        planned = relayout.apply(ds01, _wanted_layout(args, ds01), args.force, _say)
    _warn(planned)
    if args.json:
        _print_json(planned.result())
    else:
        print(planned.summary())
    return EXIT_OK


def _warn(done: Any) -> None:
    for warning in done.result()["warnings"]:
        _say(f"warning: {warning}")


def _wanted_layout(args: argparse.Namespace, ds01: Allocations) -> Any:
    """How each GPU is wanted (partitions.Wanted)."""
    from . import partitions

    gpus: dict[int, Sequence[str]] = {}
    for index, profiles in args.gpu or ():
        if index in gpus:
            raise invalid_input(f"GPU {index} is given twice.", "Name all its profiles in one --gpu.")
        gpus[index] = profiles
    return partitions.wanted(ds01, layout=args.layout, gpus=gpus or None, layouts_file=args.layouts)


def _cmd_restore(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import relayout

    with interruption.as_exception():
        restored = relayout.foresee_restore(ds01) if args.dry_run else relayout.restore(ds01, _say)
    if args.json:
        _print_json(restored.result())
    else:
        print(restored.summary())
    _warn(restored)
    for problem in restored.problems:
        _complain("not restored", problem)
    return EXIT_REFUSED if restored.problems else EXIT_OK


def _cmd_slices_list(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import slices

    listing = slices.listing(ds01)
    if args.json:
        _print_json(listing)
        return EXIT_OK
    print(terminal.table(listing["slices"], terminal.SLICES))
    for action in listing["actions"]:
        print(action["msg"])
    if listing["cut_off_by_reload"]:
        print(f"A systemctl daemon-reload would take the GPUs from: {', '.join(listing['cut_off_by_reload'])}.")
    return EXIT_OK


def _cmd_slices_apply(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import slices

    done, problems = slices.apply(ds01)
    if args.json:
        _print_json({"changed": bool(done), "actions": [action.record() for action in done], "problems": problems})
    elif not done and not problems:
        print("Every slice is as the limits file says.")
    else:
        for action in done:
            print(action.message)
    for problem in problems:
        _complain("slices", problem)
    return EXIT_REFUSED if problems else EXIT_OK


def _cmd_emergency_stop(args: argparse.Namespace, ds01: Allocations) -> int:
    from . import emergency

    what = emergency.target(args.user, args.gpu)
    report = emergency.foresee(ds01, what) if args.dry_run else emergency.stop(ds01, what, args.timeout)
    if args.json:
        _print_json(report.result())
    else:
        print(report.summary())
    for problem in report.problems:
        _complain("not stopped", problem)
    return EXIT_REFUSED if report.problems else EXIT_OK


def _show(outcome: Outcome, as_json: bool) -> int:
    if as_json:
        _print_json(outcome.result())
    elif outcome.ok:
        print(outcome.message)
        for warning in outcome.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if not outcome.ok:
        _complain(outcome.reason, f"{outcome.message} {outcome.hint}".strip())
        return exit_code(outcome.reason)
    return EXIT_OK


_say = functools.partial(print, file=sys.stderr, flush=True)
"""Progress, for people; the answer alone goes to the standard output."""


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _complain(reason: str, message: str) -> None:
    print(f"ds01: {reason}: {message}", file=sys.stderr)


def _fail(exc: Ds01Error, as_json: bool) -> None:
    if as_json:
        _print_json({"failed": True, "reason": exc.reason, "msg": str(exc), **exc.details})
    _complain(exc.reason, str(exc))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds01", description="Shares this server's GPUs.", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], summary: str, example: str, into: Any = commands) -> Any:
        command = into.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    def add_container(command: Any) -> None:
        command.add_argument("--container", required=True, metavar="NAME", help=_CONTAINER_HELP)
        command.add_argument("--user", help="the owner; may be left out with a full or unmistakable name")

    limits = add("limits", _cmd_limits, "Show what a user may have.", "ds01 limits alice --docker-args")
    limits.add_argument("user")
    limits.add_argument("--docker-args", action="store_true", help="as docker create flags")
    for name in terminal.SINGLE_LIMITS:
        limits.add_argument(f"--{name}", action="store_true", help="this value alone")

    allocate = add(
        "allocate",
        _cmd_allocate,
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
        command = add(name, _cmd_move, summary, f"ds01 {name} --container my-project --user alice")
        add_container(command)
        command.add_argument("--dry-run", action="store_true", help="only say what would happen")
        command.set_defaults(state=state)

    validate = add(
        "validate",
        _cmd_validate,
        "Check that a container's devices exist, are healthy and are the ones projected.",
        "ds01 validate --container my-project --user alice --gpu 0:1",
    )
    add_container(validate)
    validate.add_argument("--gpu", metavar="ID", help="the device it should have (0, 0:1 or a UUID)")

    status = add("status", _cmd_status, "Show devices and who has them.", "ds01 status --user alice")
    status.add_argument("--user")

    _add_upkeep(add)

    _add_emergency_stop(add)
    _add_slices(commands, add)

    query = add(
        "query",
        _cmd_query,
        "List containers, GPUs, who waits, or users beside their limits.",
        "ds01 query users --json",
    )
    query.add_argument("what", choices=list(_QUERIES))

    log = add("events", _cmd_events, "Show the audit log (--json: its lines).", "ds01 events --follow --user alice")
    log.add_argument("--lines", type=_whole, default=50, metavar="N", help="the last N events (default 50)")
    log.add_argument("--follow", action="store_true", help="go on with new ones until interrupted")
    log.add_argument("--user", help="only this user's")
    log.add_argument("--container", metavar="NAME", help="only this container's, or this project's")

    _add_mig(commands, add)

    actions = commands.add_parser("config", help="The limits file.", description="The limits file.")
    check = add(
        "check",
        _cmd_config_check,
        "Check the limits file, on a GPU server also against its devices and users, and the MIG layouts beside it.",
        "ds01 config check config/resource-limits.yaml",
        actions.add_subparsers(dest="action", required=True, metavar="ACTION"),
    )
    check.add_argument("file", nargs="?", help="default: the one in force")
    check.add_argument("--strict", action="store_true", help="exit 1 when there is anything to look at")
    return parser


def _add_upkeep(add: Callable[..., Any]) -> None:
    again = add("rebuild", _cmd_rebuild, "Restore a lost ledger from the containers.", "ds01 rebuild --dry-run")
    again.add_argument("--dry-run", action="store_true", help="only say what would be restored")

    again = add(
        "reconcile",
        _cmd_reconcile,
        "Bring this server back to its own rules: what is over is taken back, what was tampered with is put right.",
        "ds01 reconcile --dry-run",
    )
    again.add_argument("--dry-run", action="store_true", help="only say what would be done: a report of drift")

    restore = add(
        "restore",
        _cmd_restore,
        "After a reboot: cut the GPUs again as they were, and give containers their devices again (a unit does this).",
        "ds01 restore --dry-run",
    )
    restore.add_argument("--dry-run", action="store_true", help="only say what would be done")

    shown = add(
        "metrics",
        _cmd_metrics,
        "Show what Prometheus is told about this server (each reconcile writes it where the limits file says).",
        "ds01 metrics --output /var/lib/prometheus/node-exporter",
    )
    shown.add_argument("--output", type=Path, metavar="DIR", help="write it there, as ds01.prom")


def _add_emergency_stop(add: Callable[..., Any]) -> None:
    halt = add(
        "emergency-stop",
        _cmd_emergency_stop,
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


def _add_slices(commands: Any, add: Callable[..., Any]) -> None:
    limiting = commands.add_parser("slices", help="The users' slices.", description="The users' slices.")
    slices = limiting.add_subparsers(dest="action", required=True, metavar="ACTION")
    add(
        "list",
        _cmd_slices_list,
        "Show the limits in force, what is due, and which containers a daemon-reload would cut off from their GPUs.",
        "ds01 slices list",
        slices,
    )
    add(
        "apply",
        _cmd_slices_apply,
        "Make the slices that exist as the limits file says, while containers run in them; remove those of nobody.",
        "ds01 slices apply",
        slices,
    )


def _add_mig(commands: Any, add: Callable[..., Any]) -> None:
    cutting = commands.add_parser("mig", help="How the GPUs are cut.", description="How the GPUs are cut.")
    mig = cutting.add_subparsers(dest="action", required=True, metavar="ACTION")
    add("list", _cmd_mig_list, "Show how each GPU is cut, who has what, and what still fits.", "ds01 mig list", mig)
    plan = add(
        "plan",
        _cmd_mig_plan,
        "Show what it takes to cut the GPUs as wanted. Changes nothing.",
        "ds01 mig plan --gpu 1=3g.40gb,2g.20gb,1g.10gb",
        mig,
    )
    _add_wanted_layout(plan)
    cut = add(
        "apply",
        _cmd_mig_apply,
        "Cut the GPUs as wanted: just what ds01 mig plan shows, all of it or nothing.",
        "ds01 mig apply --layout all-balanced",
        mig,
    )
    _add_wanted_layout(cut)
    cut.add_argument("--dry-run", action="store_true", help="as ds01 mig plan")


def _add_wanted_layout(command: Any) -> None:
    wanted = command.add_mutually_exclusive_group()
    wanted.add_argument(
        "--layout",
        metavar="NAME",
        help="a layout of the layouts file (neither this nor --gpu: the limits file's"
        " enable_mig and mig_profile, as many as fit)",
    )
    wanted.add_argument(
        "--gpu",
        type=_gpu_layout,
        action="append",
        metavar="N=PROFILES",
        help="a GPU and its profiles (1=: MIG without instances, 1=full: MIG off)",
    )
    command.add_argument(
        "--layouts",
        type=Path,
        metavar="FILE",
        help="the file that --layout is in (default: mig-layouts.yaml beside the limits file)",
    )
    command.add_argument(
        "--force", action="append", default=[], metavar="CONTAINER", help="full name of one whose devices it may break"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    watchdog.tell(functools.partial(_fail, as_json=args.json))
    try:
        code = args.run(args, Allocations(Paths.from_env()))
        sys.stdout.flush()
        return code
    except Ds01Error as exc:
        _fail(exc, args.json)
        return exc.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to complain at exit
        return EXIT_OK
    except interruption.Interrupted as exc:
        _complain("interrupted", f"{exc} What was begun is undone, or was finished: ds01 mig list shows it.")
        return 128 + exc.signal_number
    except KeyboardInterrupt:
        return EXIT_OK if args.command == "events" else EXIT_INTERRUPTED
    except OSError as exc:
        _complain("output", f"The answer could not be written: {exc.strerror}.")
        return EXIT_UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main())
