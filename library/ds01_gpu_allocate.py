#!/usr/bin/python
"""Ansible module: a container's devices, allocated, held, active or released."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_gpu_allocate
short_description: Allocate GPUs or MIG devices to a container
version_added: "0.1.0"
description:
  - Decides under the host's lock which devices a container gets, within the user's limits, writes the ledger
    and the container's CDI device, or says why not. All devices that were asked for, or none.
  - A container that already has what it asks for keeps it, and nothing is written.
  - Runs on the GPU server, as root.
author:
  - The DS01 authors (@ds01)
options:
  state:
    description:
      - V(allocated) gives the container its devices.
      - V(held) says that the container stopped; its hold begins.
      - V(active) says that the container runs again; its hold ends.
      - V(released) takes the devices back. Nothing allocated is success.
    type: str
    choices: [allocated, held, active, released]
    default: allocated
  container:
    description:
      - The project, such as V(my-project), or the full name, such as V(my-project._.alice).
    type: str
  user:
    description:
      - The owner's login name or uid. May be left out with a full name, or with a project that only one
        allocation has. Required when O(state=allocated) and O(container) is a project.
    type: str
  gpus:
    description:
      - Number of devices; V(0) is a CPU-only container, for which only the number of containers is checked.
    type: int
    default: 1
  profile:
    description:
      - A MIG profile such as V(2g.20gb), or V(full) for a whole GPU. Left out, the limits file decides.
    type: str
  priority:
    description:
      - Lowers the user's priority; root may raise it.
    type: int
  max_gpus:
    description:
      - Lowers the number of devices the user may have; root may raise it.
    type: int
  strategy:
    description:
      - How to choose among free devices; the limits file's strategy when left out.
    type: str
    choices: [least_allocated, packed]
  wait:
    description:
      - Seconds to wait for devices where none is free. Requests are served by priority, then by age; one whose
        process ends drops out. Left out or V(0), the answer comes at once.
      - The connection stays open meanwhile; for long waits run the task with C(async).
    type: int
  reuse_held:
    description:
      - Gives up what the user's own stopped containers hold, where the request cannot be granted otherwise. These
        containers stay, and get another device when they are started again.
    type: bool
    default: false
  allocations:
    description:
      - Several allocations in one call, under one lock and with one look at the driver. Each takes the options
        above. Exclusive with O(container).
    type: list
    elements: dict
    suboptions:
      state:
        description: As O(state).
        type: str
        choices: [allocated, held, active, released]
        default: allocated
      container:
        description: As O(container).
        type: str
        required: true
      user:
        description: As O(user).
        type: str
      gpus:
        description: As O(gpus).
        type: int
        default: 1
      profile:
        description: As O(profile).
        type: str
      priority:
        description: As O(priority).
        type: int
      max_gpus:
        description: As O(max_gpus).
        type: int
      strategy:
        description: As O(strategy).
        type: str
        choices: [least_allocated, packed]
      wait:
        description: As O(wait).
        type: int
      reuse_held:
        description: As O(reuse_held).
        type: bool
        default: false
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_container
  - module: ds01_info
"""

EXAMPLES = r"""
- name: Give alice's container a MIG device
  ds01_gpu_allocate:
    container: my-project
    user: alice
    profile: 2g.20gb

- name: Take it back
  ds01_gpu_allocate:
    container: my-project._.alice
    state: released

- name: Wait for one, ten minutes at most
  ds01_gpu_allocate:
    container: my-project
    user: alice
    wait: 600

- name: A course's containers, in one call
  ds01_gpu_allocate:
    allocations:
      - {container: lab1, user: alice}
      - {container: lab1, user: bob, profile: full}
      - {container: lab1, user: carol, gpus: 0}
"""

RETURN = r"""
allocation:
  description: The container's allocation now; null when it has none. With one item only.
  returned: always
  type: dict
  sample:
    container: my-project._.alice
    status: pending
    device: ds01.io/gpu=my-project._.alice
    user: alice
    gpu_id: "1:0"
    priority: 50
    allocated_at: "2025-11-21T10:30:00Z"
    stopped_at: null
    devices:
      - {id: "1:0", uuid: MIG-0, gpu_uuid: GPU-0, profile: 2g.20gb, placement: [0, 2], equivalents: 2/7}
    container_id: null
    pending_since: "2025-11-21T10:30:00Z"
reason:
  description: The reason code, such as V(granted), V(already_allocated), V(user_at_limit) or V(no_gpu_available).
  returned: always
  type: str
  sample: granted
msg:
  description: The same in a sentence, with the next step.
  returned: always
  type: str
available_at:
  description: When the earliest hold or reservation ends that is in the way; null when that is not known.
  returned: always
  type: str
given_up:
  description: Holds that gave way to the grant, as RV(allocation).
  returned: always
  type: list
  elements: dict
generation:
  description: The ledger's generation after the call.
  returned: always
  type: int
results:
  description: One result an item, in order, each with C(container), C(changed), C(failed), C(reason), C(msg) and
    C(allocation).
  returned: always
  type: list
  elements: dict
"""

import os
from datetime import timedelta

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01 import waiting
from ansible.module_utils.ds01.allocations import Allocations
from ansible.module_utils.ds01.errors import Ds01Error
from ansible.module_utils.ds01.transitions import STATES, Change, Outcome, describe
from ansible.module_utils.ds01_module import fail, finish, items, this_server

ITEM = {
    "state": {"type": "str", "choices": list(STATES), "default": "allocated"},
    "container": {"type": "str"},
    "user": {"type": "str"},
    "gpus": {"type": "int", "default": 1},
    "profile": {"type": "str"},
    "priority": {"type": "int"},
    "max_gpus": {"type": "int"},
    "strategy": {"type": "str", "choices": ["least_allocated", "packed"]},
    "wait": {"type": "int"},
    "reuse_held": {"type": "bool", "default": False},
}
ARGUMENT_SPEC = {
    **ITEM,
    "allocations": {
        "type": "list",
        "elements": "dict",
        "options": {**ITEM, "container": {"type": "str", "required": True}},
    },
}


def to_change(item: dict, allocations: Allocations) -> Change:
    """The change that one item's options ask for."""
    return Change(
        state=item["state"],
        name=allocations.name(item["container"], item["user"]),
        gpus=item["gpus"],
        profile=item["profile"] or None,
        priority=item["priority"],
        max_gpus=item["max_gpus"],
        strategy=item["strategy"],
        may_raise=os.geteuid() == 0,
        wait=timedelta(seconds=item["wait"] or 0),
        reuse_held=item["reuse_held"],
    )


def to_diff(outcome: Outcome) -> dict:
    before, after = (describe(a) if a else {} for a in (outcome.before, outcome.allocation))
    return {"before_header": outcome.name.full, "after_header": outcome.name.full, "before": before, "after": after}


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        mutually_exclusive=[("container", "allocations")],
        required_one_of=[("container", "allocations")],
        supports_check_mode=True,
    )
    try:
        allocations = this_server(module)
        changes = [to_change(item, allocations) for item in items(module, "allocations")]
        outcomes = allocations.preview(changes) if module.check_mode else waiting.apply(allocations, changes)
        results = [outcome.result() for outcome in outcomes]
        generation = allocations.store.read().generation
    except Ds01Error as exc:
        fail(module, exc)
    finish(module, results, [to_diff(outcome) for outcome in outcomes], generation=generation)


if __name__ == "__main__":
    main()
