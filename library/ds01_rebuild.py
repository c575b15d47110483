#!/usr/bin/python
"""Ansible module: a lost or damaged ledger, restored from the containers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_rebuild
short_description: Restore a lost or damaged ledger from the containers
version_added: "0.1.0"
description:
  - Restores who has which device from what the containers' records and labels say, and writes the containers' CDI
    devices again. What the ledger still knows stays as it is. A damaged file is kept beside the new one.
  - A device is found again by its place on its GPU. What is not there any more, or is claimed twice, is named in
    RV(problems) and not restored; grants whose container was never made are gone.
  - The next request does the same by itself where the ledger is lost. This shows beforehand what will come of it.
  - Runs on the GPU server, as root.
author:
  - The DS01 authors (@ds01)
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_gpu_allocate
  - module: ds01_info
"""

EXAMPLES = r"""
- name: What would be restored
  ds01_rebuild:
  check_mode: true
  diff: true

- name: Restore it
  ds01_rebuild:
  register: rebuilt

- name: Name what was not restored
  ansible.builtin.debug:
    msg: "{{ rebuilt.problems }}"
"""

RETURN = r"""
allocations:
  description: All allocations of the ledger afterwards, as RV(ds01_gpu_allocate#module:allocation).
  returned: success
  type: list
  elements: dict
restored:
  description: The containers that are in the ledger again.
  returned: success
  type: list
  elements: str
  sample: [my-project._.alice]
problems:
  description: What was not restored, and why, a sentence each.
  returned: success
  type: list
  elements: str
  sample: ["train._.bob: its device 0:1 (2g.20gb) is not on this host any more"]
damaged:
  description: Whether the ledger could not be read; it lies beside the new one then, C(gpu-state.json.damaged-*).
  returned: success
  type: bool
msg:
  description: The same in a sentence.
  returned: always
  type: str
reason:
  description: V(ok), or the reason code of the failure, such as V(engine_unavailable).
  returned: always
  type: str
"""

from collections.abc import Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01.allocations import Allocations
from ansible.module_utils.ds01.errors import Ds01Error
from ansible.module_utils.ds01.transitions import describe
from ansible.module_utils.ds01_module import fail, this_server


def rebuild(ds01: Allocations, check_mode: bool) -> dict:
    """The module's result, its diff with it."""
    damaged = ds01.store.lost() and ds01.paths.ledger.exists()
    before = {} if damaged else ds01.store.read().allocations
    rebuilt = ds01.foresee_rebuild() if check_mode else ds01.rebuild()
    had, has = devices(before), devices(rebuilt.allocations)
    return {
        # Not the ledger's generation: that also counts what is noted of this boot and concerns nobody's device.
        "changed": damaged or had != has,
        "reason": "ok",
        "msg": summary(rebuilt.restored, len(has), len(rebuilt.problems), check_mode),
        "allocations": [describe(allocation) for allocation in rebuilt.allocations.values()],
        "restored": list(rebuilt.restored),
        "problems": list(rebuilt.problems),
        "damaged": damaged,
        "diff": {"before": had, "after": has},
    }


def summary(restored: Sequence[str], total: int, problems: int, check_mode: bool) -> str:
    """The result in a sentence."""
    what = ("Would restore" if check_mode else "Restored") + f" {', '.join(restored) or 'nothing'}"
    unknown = f"; {problems} not to be restored" if problems else ""
    return f"{what}; the ledger {'would have' if check_mode else 'has'} {total} allocations{unknown}."


def devices(allocations: dict) -> dict:
    """Each container's devices, for a diff: a MIG device may be found again under another UUID."""
    return {name: [f"{d.id} {d.uuid}" for d in allocations[name].devices] for name in sorted(allocations)}


def main() -> None:
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    try:
        result = rebuild(this_server(module), module.check_mode)
    except Ds01Error as exc:
        fail(module, exc)
    if not module._diff:
        result.pop("diff")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
