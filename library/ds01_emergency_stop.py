#!/usr/bin/python
"""Ansible module: containers ended at once, and their devices free."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_emergency_stop
short_description: End containers at once and free their devices
version_added: "0.1.0"
description:
  - Ends a user's running containers, those on a GPU, or all of them, side by side. What does not end in time is killed.
  - Their devices are free afterwards, and so are those that their stopped containers hold. The containers themselves
    stay, with their files; their next start through DS01 gives them other devices.
  - Ends nothing that DS01 did not make. Needs the Docker engine; the driver need not answer.
  - Whoever waits for a device may get what is free now; RV(waiting) names them.
  - A user or a GPU of whom nothing on the server knows is a warning and no failure, for of many servers not every one
    knows everybody.
  - Runs on the GPU server, as root.
author:
  - The DS01 authors (@ds01)
options:
  user:
    description: Whose containers. One of O(user), O(gpu) and O(all) has to be given.
    type: str
  gpu:
    description:
      - The containers on this GPU or MIG device, as V(0), V(0:1) or a UUID. A GPU stands for all its MIG devices.
    type: str
  all:
    description: All of DS01's containers.
    type: bool
  timeout:
    description: Seconds between asking a container to stop and killing it.
    type: int
    default: 5
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_container
"""

EXAMPLES = r"""
- name: Who would be stopped
  ds01_emergency_stop:
    gpu: "1"
  check_mode: true
  register: foreseen

- name: End everything of one user
  ds01_emergency_stop:
    user: alice

- name: End everything
  ds01_emergency_stop:
    all: true
    timeout: 1
"""

RETURN = r"""
stopped:
  description: The containers that were ended.
  returned: success
  type: list
  elements: str
  sample: [my-project._.alice]
released:
  description: What became free, of those and of stopped ones.
  returned: success
  type: list
  elements: dict
  sample: [{container: my-project._.alice, gpu_id: "0:1"}]
waiting:
  description: Requests that still wait for devices, with the process that waits.
  returned: success
  type: list
  elements: str
  sample: ["train._.bob (process 4711)"]
left:
  description: Running containers that carry DS01's labels without being its own, and were left.
  returned: success
  type: list
  elements: str
problems:
  description: What could not be ended or given back, a sentence each. The module fails where there are any.
  returned: always
  type: list
  elements: str
msg:
  description: The same in a sentence.
  returned: always
  type: str
reason:
  description: V(ok), or the reason code of the failure, such as V(engine_unavailable) or V(not_stopped).
  returned: always
  type: str
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01 import emergency
from ansible.module_utils.ds01.allocations import Allocations
from ansible.module_utils.ds01.errors import Ds01Error
from ansible.module_utils.ds01_module import fail, this_server


def run(ds01: Allocations, params: dict[str, Any], check_mode: bool) -> emergency.Report:
    """End them, or say which would be ended."""
    what = emergency.target(params["user"], params["gpu"])
    return emergency.foresee(ds01, what) if check_mode else emergency.stop(ds01, what, params["timeout"])


def diff(report: emergency.Report) -> dict[str, Any]:
    """What ran and what was held, and that it is not any more."""
    return {"before": {"running": sorted(report.stopped), "devices": report.released}, "after": {}}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "user": {"type": "str"},
            "gpu": {"type": "str"},
            "all": {"type": "bool"},
            "timeout": {"type": "int", "default": emergency.TIMEOUT},
        },
        mutually_exclusive=[("user", "gpu", "all")],
        required_one_of=[("user", "gpu", "all")],
        supports_check_mode=True,
    )
    if module.params["all"] is False:
        module.fail_json(msg="all: false names nobody; name a user, a GPU, or all: true.", reason="invalid_input")
    try:
        report = run(this_server(module), module.params, module.check_mode)
    except Ds01Error as exc:
        fail(module, exc, problems=[])
    result = report.result()
    for warning in result.pop("warnings"):
        module.warn(warning)
    if module._diff and report.changed:
        result["diff"] = diff(report)
    if report.problems:
        words = f"{' '.join(report.problems)} {result.pop('msg')}"
        module.fail_json(msg=words, reason="not_stopped", **result)
    module.exit_json(reason="ok", **result)


if __name__ == "__main__":
    main()
