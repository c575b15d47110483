"""What DS01's Ansible modules share: one way to end, whatever happened."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01 import interruption, watchdog
from ansible.module_utils.ds01.allocations import Allocations
from ansible.module_utils.ds01.errors import Ds01Error
from ansible.module_utils.ds01.paths import Paths


def this_server(module: AnsibleModule) -> Allocations:
    """DS01 on the host that the module runs on. A driver that hangs fails the module, instead of holding its job."""
    watchdog.tell(functools.partial(fail, module))
    return Allocations(Paths.from_env())


def items(module: AnsibleModule, batch: str) -> list[dict[str, Any]]:
    """What is asked for: the option `batch`, which may be empty, or the one item that all options are."""
    return [module.params] if module.params[batch] is None else module.params[batch]


def fail(module: AnsibleModule, exc: Ds01Error, **results: Any) -> None:
    """End with the error's sentence, reason code and details."""
    module.fail_json(msg=str(exc), reason=exc.reason, **{**exc.details, **results})


@contextlib.contextmanager
def interruptible(module: AnsibleModule) -> Iterator[None]:
    """End with reason `interrupted` when a signal comes (a lost connection, a cancelled job) and what was begun
    is undone."""
    try:
        with interruption.as_exception():
            yield
    except interruption.Interrupted as exc:
        message = f"{exc} What was begun is undone, or was finished: ds01 mig list shows it."
        module.fail_json(msg=message, reason="interrupted")


def finish(
    module: AnsibleModule, results: Sequence[dict[str, Any]], diffs: Sequence[dict[str, Any]], **more: Any
) -> None:
    """End a batch: failed if any item did, and then still with what the others did.

    A single item's keys stand at the top level too, so that one request reads as one result.
    """
    for item in results:
        for warning in item.pop("warnings", []):
            module.warn(warning)
    outcome: dict[str, Any] = {**(results[0] if len(results) == 1 else {}), "results": list(results), **more}
    outcome["changed"] = any(item["changed"] for item in results)
    if module._diff:
        outcome["diff"] = [diff for diff in diffs if diff["before"] != diff["after"]]
    failed = [item for item in results if item["failed"]]
    outcome.pop("failed", None)
    if failed:
        outcome["msg"] = failed[0]["msg"] if len(results) == 1 else _summary(failed, len(results))
        module.fail_json(**{**outcome, "reason": failed[0]["reason"]})
    module.exit_json(**outcome)


def _summary(failed: Sequence[dict[str, Any]], total: int) -> str:
    return f"{len(failed)} of {total} failed. First: {failed[0]['msg']}"
