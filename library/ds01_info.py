#!/usr/bin/python
"""Ansible module: everything about one GPU server, read-only."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_info
short_description: Gather devices, allocations, containers, limits and versions of a GPU server
version_added: "0.1.0"
description:
  - Reads the driver, the ledger, the engine and the limits file once each, and changes nothing.
  - A part that cannot be read is listed in RV(problems) and does not hide the others.
author:
  - The DS01 authors (@ds01)
options:
  users:
    description:
      - Users whose resolved limits are returned.
    type: list
    elements: str
    default: []
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_gpu_allocate
  - module: ds01_container
"""

EXAMPLES = r"""
- name: What is there, and who has it
  ds01_info:
    users: [alice]
  register: server

- name: Free devices
  ansible.builtin.debug:
    msg: "{{ server.devices | rejectattr('container') | map(attribute='id') }}"
"""

RETURN = r"""
gpus:
  description: The physical GPUs with name, mode, health and utilisation (null in MIG mode).
  returned: always
  type: list
  elements: dict
devices:
  description: What can be allocated, and who has it. A device that something outside DS01 uses has the C(status)
    V(occupied), and C(occupied_by) says what.
  returned: always
  type: list
  elements: dict
  sample:
    - {id: "1:0", uuid: MIG-0, gpu_uuid: GPU-1, profile: 2g.20gb, placement: [0, 2], equivalents: 2/7,
       memory_mib: 19968, health: ok, container: my-project._.alice, user: alice, status: active, occupied_by: null}
allocations:
  description: The ledger's allocations, with C(status), C(device) and C(hold_ends).
  returned: always
  type: list
  elements: dict
holds:
  description: Those of RV(allocations) whose container stopped.
  returned: always
  type: list
  elements: dict
queue:
  description: Waiting requests, the next to be served first, with C(position) and, where it is known, C(available_at).
  returned: always
  type: list
  elements: dict
missing:
  description: Devices that somebody has and the host does not show, such as after the driver was loaded anew, each with
    its C(container) and C(user). Their room is granted to nobody else.
  returned: always
  type: list
  elements: dict
containers:
  description: DS01's containers in every state.
  returned: always
  type: list
  elements: dict
limits:
  description: The resolved limits of the named users.
  returned: always
  type: dict
versions:
  description: Of driver, engine and Python.
  returned: always
  type: dict
problems:
  description: What could not be read, each with C(reason) and C(msg).
  returned: always
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01.overview import gather
from ansible.module_utils.ds01_module import this_server


def main() -> None:
    module = AnsibleModule(
        argument_spec={"users": {"type": "list", "elements": "str", "default": []}}, supports_check_mode=True
    )
    module.exit_json(changed=False, **gather(this_server(module), module.params["users"]))


if __name__ == "__main__":
    main()
