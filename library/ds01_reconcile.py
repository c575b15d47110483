#!/usr/bin/python
"""Ansible module: a GPU server brought back to its own rules."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_reconcile
short_description: Bring a GPU server back to its own rules
version_added: "0.1.0"
description:
  - Takes back what is over (holds, grants whose container never came, containers that stopped long ago), notices what
    happened behind DS01's back (containers that stopped, started or vanished), puts CDI devices right that are not what
    the ledger says, gives containers their names again that a request had set aside when it died, and names who uses
    GPUs without DS01.
  - Looks at how things are, never at what happened before, so it may run at any time, after any accident. A second run
    right after the first changes nothing. A timer on the server does the same each minute;
    where one is at work already, the next waits for it, and fails with V(lock_timeout) if it does not end.
  - In check mode it is a report of drift. A diff has a line for each thing that is done, or would be, and none for what
    is only told.
  - Runs on the GPU server, as root.
author:
  - The DS01 authors (@ds01)
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_info
  - module: ds01_rebuild
"""

EXAMPLES = r"""
- name: What is not as it should be
  ds01_reconcile:
  check_mode: true
  register: drift

- name: Put it right
  ds01_reconcile:
"""

RETURN = r"""
actions:
  description:
    - What was done or is to be told, in order, with C(kind), C(subject) (a container, device or slice), C(user) and a
      sentence (C(msg)). Kind C(unmanaged.seen) names everybody who uses the device without DS01 (C(by)), each with
      C(container), or C(pid) and C(program), and C(user).
  returned: success
  type: list
  elements: dict
  sample:
    - kind: gpu.released
      subject: my-project._.alice
      user: alice
      msg: "0:1 is free again: its hold ended at 2025-11-21T10:30:00Z."
problems:
  description: What could not be looked at or done, with C(stage), C(reason) and a sentence (C(msg)).
  returned: always
  type: list
  elements: dict
msg:
  description: The result in a sentence.
  returned: always
  type: str
reason:
  description: V(ok), or the reason code of the first problem, such as V(engine_unavailable).
  returned: always
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01 import drift, reconcile
from ansible.module_utils.ds01.errors import Ds01Error
from ansible.module_utils.ds01.reconcile import Reconciled
from ansible.module_utils.ds01_module import fail, this_server


def diff(found: Reconciled) -> dict[str, str]:
    """What is done, a line each; a second run has none."""
    done = [action for action in found.actions if action.kind not in drift.REPORTS]
    lines = [f"{action.kind} {action.subject}: {action.message}\n" for action in done]
    return {"before_header": "nothing to do", "after_header": "reconcile", "before": "", "after": "".join(lines)}


def main() -> None:
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    ds01 = this_server(module)
    try:
        found = reconcile.foresee(ds01) if module.check_mode else reconcile.reconcile(ds01)
    except Ds01Error as exc:
        fail(module, exc)
    result = found.result()
    if module._diff and found.changed:
        result["diff"] = diff(found)
    if found.problems:
        sentences = " ".join(problem["msg"] for problem in found.problems)
        module.fail_json(**{**result, "msg": sentences, "reason": found.problems[0]["reason"]})
    module.exit_json(**result, reason="ok")


if __name__ == "__main__":
    main()
