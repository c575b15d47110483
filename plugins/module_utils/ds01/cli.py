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
from pathlib import Path
from typing import Any

from . import accounts, arguments, config, interruption, names, nvml, overview, terminal, waiting, watchdog
from .allocations import Allocations
from .errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, EXIT_UNAVAILABLE, Ds01Error, exit_code, invalid_input
from .limits import as_dict, resolve_all
from .lint import lint, lint_layouts
from .model import Inventory
from .paths import Paths
from .transitions import Change, Outcome, describe


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


def _cmd_query(args: argparse.Namespace, ds01: Allocations) -> int:
    rows = overview.QUERIES[args.what](ds01)
    if args.json:
        _print_json(rows)
    else:
        print(terminal.table(rows, terminal.QUERIES[args.what]))
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
        print(planned.done())
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
        if args.forget:
            relayout.forget(ds01, args.forget)
        restored = relayout.foresee_restore(ds01) if args.dry_run else relayout.restore(ds01, _say)
    if args.json:
        _print_json(restored.result())
    else:
        print(restored.summary() if args.dry_run else restored.done())
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
    _warn(report)
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


# How each command of arguments.py is carried out.
_VERBS: Mapping[str, Callable[[argparse.Namespace, Allocations], int]] = {
    "limits": _cmd_limits,
    "allocate": _cmd_allocate,
    "release": _cmd_move,
    "mark-stopped": _cmd_move,
    "clear-stopped": _cmd_move,
    "validate": _cmd_validate,
    "status": _cmd_status,
    "query": _cmd_query,
    "events": _cmd_events,
    "metrics": _cmd_metrics,
    "config check": _cmd_config_check,
    "rebuild": _cmd_rebuild,
    "reconcile": _cmd_reconcile,
    "restore": _cmd_restore,
    "mig list": _cmd_mig_list,
    "mig plan": _cmd_mig_plan,
    "mig apply": _cmd_mig_apply,
    "slices list": _cmd_slices_list,
    "slices apply": _cmd_slices_apply,
    "emergency-stop": _cmd_emergency_stop,
}


def _verb(args: argparse.Namespace) -> Callable[[argparse.Namespace, Allocations], int]:
    return _VERBS[f"{args.command} {args.action}" if "action" in args else args.command]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = arguments.parser().parse_args(argv)
    watchdog.tell(functools.partial(_fail, as_json=args.json))
    try:
        code = _verb(args)(args, Allocations(Paths.from_env()))
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
