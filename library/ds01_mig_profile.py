#!/usr/bin/python
"""Ansible module: how a host's GPUs are cut into MIG devices."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_mig_profile
short_description: Cut GPUs into MIG devices
version_added: "0.1.0"
description:
  - Makes the smallest change that leads to the wanted layout. Every way to place the profiles is considered, and each
    instance is created at a placement of its own, so that check mode shows exactly what a run carries out.
  - What somebody has stays as it is, whether their container runs or only holds its device. Where the layout cannot be
    had without, the module fails, names who is in the way and until when, and changes nothing.
  - All GPUs that are named change, or none. What a run left behind that died midway is completed or undone by the next.
  - Afterwards the device nodes and NVIDIA's CDI specification are those of the new layout, and containers whose devices
    are called otherwise now keep them. A reboot leads to the same layout again.
  - Without O(layout) and O(gpus) the limits file says how the GPUs are cut (C(enable_mig) and C(mig_profile) of
    C(gpu_allocation)), as many of that profile as fit on every GPU that has MIG.
  - Runs on the GPU server, as root.
author:
  - The DS01 authors (@ds01)
options:
  state:
    description:
      - V(present) cuts the GPUs.
      - V(exported) changes nothing and returns how they are cut, as a file of layouts. A GPU that the driver lost is
        left out, with a warning, and so is an instance that is divided into smaller compute instances or has none.
    type: str
    choices: [present, exported]
    default: present
  layout:
    description:
      - The name of a layout in the layouts file. A GPU that no entry of it is for stays as it is. An empty name is
        refused.
      - When O(state=exported), the name that the exported layout gets, V(current) when left out.
    type: str
  gpus:
    description:
      - GPU index to its profiles, a list such as V([3g.40gb, 2g.20gb, 1g.10gb]); the order means nothing. An empty
        list is MIG mode without instances, and V([full]) a whole GPU (MIG mode off).
      - A GPU that is not named stays as it is.
    type: dict
  layouts_file:
    description:
      - The file that O(layout) is in, on the host, in the format of NVIDIA's mig-parted. Left out, it is
        C(mig-layouts.yaml) beside the limits file.
      - When O(state=present), O(layout) is required with it.
    type: path
  force:
    description:
      - Full names of containers whose devices may be taken, where the layout cannot be had without. One that runs must
        be stopped first.
    type: list
    elements: str
    default: []
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_info
  - module: ds01_gpu_allocate
"""

EXAMPLES = r"""
- name: What a layout of the layouts file would take
  ds01_mig_profile:
    layout: all-balanced
  check_mode: true
  diff: true

- name: Cut one GPU, and make another a whole one
  ds01_mig_profile:
    gpus:
      1: [3g.40gb, 2g.20gb, 1g.10gb]
      2: [full]

- name: Cut all GPUs as the limits file says
  ds01_mig_profile:

- name: Apply a layout of a file that was written for mig-parted, though a stopped container holds a device
  ds01_mig_profile:
    layout: custom-config
    layouts_file: /etc/nvidia-mig-manager/config.yaml
    force: [my-project._.alice]

- name: Keep the present layout as a file
  block:
    - name: Ask for it
      ds01_mig_profile:
        state: exported
        layout: as-of-today
      register: exported

    - name: Write it
      ansible.builtin.copy:
        content: "{{ exported.text }}"
        dest: /etc/ds01/as-of-today.yaml
        mode: "0644"
"""

RETURN = r"""
plan:
  description:
    - What is done to each GPU, in order, and which instances stay. C(action) is V(destroy), V(enable), V(disable),
      V(keep) or V(create); C(placement) the first memory slice and how many. The same in check mode.
  returned: when O(state=present)
  type: list
  elements: dict
  sample:
    - {gpu: 1, action: destroy, profile: 1g.10gb, placement: [2, 1], uuid: MIG-1}
    - {gpu: 1, action: keep, profile: 2g.20gb, placement: [0, 2], uuid: MIG-0}
    - {gpu: 1, action: create, profile: 3g.40gb, placement: [4, 4], uuid: null}
devices:
  description: The host's devices afterwards; in check mode as they are, since what is not there has no UUID.
  returned: when O(state=present)
  type: list
  elements: dict
  sample:
    - {id: "1:0", uuid: MIG-0, gpu_uuid: GPU-1, profile: 2g.20gb, placement: [0, 2], equivalents: 2/7}
services:
  description: Units that are stopped meanwhile, for they hold a GPU whose MIG mode changes; they run again afterwards.
  returned: when O(state=present)
  type: list
  elements: str
  sample: [nvidia-dcgm.service]
released:
  description: Containers of O(force) that lose devices.
  returned: when O(state=present)
  type: list
  elements: str
  sample: [my-project._.alice]
given_back:
  description: Containers that lose devices because their hold, or the time to start them, was over anyway.
  returned: when O(state=present)
  type: list
  elements: str
repairs:
  description: What else was not as it should be and is put right, such as what a run left behind that died midway.
  returned: when O(state=present)
  type: list
  elements: str
document:
  description: How the GPUs are cut, as a file of layouts has it.
  returned: when O(state=exported)
  type: dict
  sample:
    version: v1
    mig-configs:
      current:
        - {devices: [0], mig-enabled: false, mig-devices: {}}
        - {devices: [1, 2, 3], mig-enabled: true, mig-devices: {2g.20gb: 3}}
text:
  description:
    - When O(state=present), the plan as C(ds01 mig plan) prints it, with each GPU's slices before and after.
    - When O(state=exported), RV(document) as YAML, which O(layouts_file) and mig-parted read.
  returned: success
  type: str
msg:
  description: The result in a sentence; in a failure what is in the way, and what would help.
  returned: always
  type: str
reason:
  description: V(ok), or the reason code of the failure, such as V(layout_in_use) or V(layout_impossible).
  returned: always
  type: str
refusals:
  description:
    - One for each GPU that cannot be cut as wanted, with C(gpu), C(reason), C(msg), C(available_at) and C(blocked_by),
      a list of who is in the way (C(container), C(user), C(until), C(what), C(pid), C(unit)).
  returned: when a layout is refused
  type: list
  elements: dict
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01 import layouts, mig_text, partitions, relayout
from ansible.module_utils.ds01.allocations import Allocations
from ansible.module_utils.ds01.errors import Ds01Error, invalid_input
from ansible.module_utils.ds01_module import fail, interruptible, this_server

ARGUMENT_SPEC = {
    "state": {"type": "str", "choices": ["present", "exported"], "default": "present"},
    "layout": {"type": "str"},
    "gpus": {"type": "dict"},
    "layouts_file": {"type": "path"},
    "force": {"type": "list", "elements": "str", "default": []},
}


def present(ds01: Allocations, params: Mapping[str, Any], check_mode: bool) -> dict[str, Any]:
    """The module's result when the GPUs are, or would be, cut as wanted; its diff with it."""
    file = params["layouts_file"]
    wanted = partitions.wanted(
        ds01,
        layout=params["layout"],
        gpus=None if params["gpus"] is None else profiles(params["gpus"]),
        layouts_file=Path(file) if file else None,
    )
    carry_out = relayout.foresee if check_mode else relayout.apply
    planned = carry_out(ds01, wanted, params["force"])
    shown = {"text": mig_text.plan_text(planned), "diff": mig_text.difference(planned)}
    return {**planned.result(), **shown, "reason": "ok"}


def profiles(gpus: Mapping[Any, Any]) -> dict[int, list[str]]:
    """Each GPU's profiles by its index. Ansible hands the keys of a dict over as text, or as they were written."""
    found: dict[int, list[str]] = {}
    for key, names in gpus.items():
        if not str(key).isdecimal():
            raise invalid_input(f"gpus: {key!r} is not the index of a GPU.", "Write it as ds01 mig list does: 0, 1, 2.")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            hint = "Write [3g.40gb, 2g.20gb]; [] is MIG without instances, [full] a whole GPU."
            raise invalid_input(f"gpus: the profiles of GPU {key} are no list of names.", hint)
        if int(key) in found:
            raise invalid_input(f"gpus: GPU {int(key)} is given twice.", "Name all its profiles in one list.")
        found[int(key)] = names
    return found


def exported(ds01: Allocations, name: str) -> dict[str, Any]:
    """The module's result with the layout as it is now."""
    host = partitions.look(ds01, strict=False)
    document = layouts.exported(host.gpus, name)
    seen = [gpu for gpu in host.gpus if gpu.health != "lost"]
    return {
        "changed": False,
        "reason": "ok",
        "msg": f"How {len(seen)} GPUs are cut, as the layout {name}.",
        "warnings": [
            *layouts.left_out(host.gpus),
            *(f"Not everything could be seen: {problem['msg']}" for problem in host.problems),
        ],
        "document": document,
        "text": layouts.text(document),
        "diff": [],
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC, mutually_exclusive=[("layout", "gpus")], supports_check_mode=True
    )
    ds01 = this_server(module)
    try:
        if module.params["state"] == "exported":
            result = exported(ds01, module.params["layout"] or "current")
        else:
            with interruptible(module):
                result = present(ds01, module.params, module.check_mode)
    except Ds01Error as exc:
        fail(module, exc)
    for warning in result.pop("warnings", []):
        module.warn(warning)
    if not module._diff:
        result.pop("diff")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
