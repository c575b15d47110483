#!/usr/bin/python
"""Ansible module: a user's container, from created to removed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_container
short_description: Create, start, stop, restart or remove a user's container
version_added: "0.1.0"
description:
  - Makes a container named C(<project>._.<user>) that runs as the user, in the user's systemd slice, with the
    user's limits in the create call, and that asks for its own CDI device and nothing else.
  - Starting a GPU container makes sure that it has an allocation; stopping it begins its hold; removing it gives
    the devices back.
  - All or nothing. When a step fails, what the call created or allocated is taken back.
  - The image has to be on the host; nothing is pulled.
author:
  - The DS01 authors (@ds01)
options:
  state:
    description:
      - V(present) creates it, V(started) also starts it.
      - V(stopped) and V(restarted) need it to exist, except that V(restarted) with O(image) creates it.
      - V(absent) removes it and releases its devices; its workspace stays.
    type: str
    choices: [present, started, stopped, restarted, absent]
    default: started
  project:
    description:
      - The project, such as V(my-project), or the container's full name.
    type: str
  user:
    description:
      - The owner's login name or uid. May be left out when O(project) is a full name.
    type: str
  image:
    description:
      - A local image. Left out, the container has to exist already.
    type: str
  gpus:
    description:
      - Number of devices; V(0) makes a CPU-only container. Used when the container is created.
    type: int
    default: 0
  profile:
    description:
      - The MIG profile of those devices, or V(full). Left out, the limits file decides.
    type: str
  workspace:
    description:
      - Directory of the user on the host, mounted at C(/workspace). Left out, C(containers.workspace) in the
        limits file says where; it is created for the user when missing.
    type: path
  mounts:
    description:
      - Further mounts, C(/source:/target) or C(/source:/target:ro), from directories in
        C(containers.allowed_mounts) of the limits file.
    type: list
    elements: str
    default: []
  env:
    description:
      - Environment variables. Those that choose GPUs are DS01's and refused.
    type: dict
    default: {}
  ports:
    description:
      - Published TCP ports, C(8888:8888) or C(127.0.0.1:8888:8888).
    type: list
    elements: str
    default: []
  command:
    description:
      - The main process. Left out, one that waits for users to come in with C(docker exec).
    type: list
    elements: str
    default: []
  network_mode:
    description:
      - V(host) only where the limits file allows it.
    type: str
    choices: [bridge, none, host]
    default: bridge
  limits:
    description:
      - Limits for the container below those of the user, with the keys of C(ds01 limits USER --json) or of the filter
        P(ds01_limits#filter). C(max_cpus), C(memory), C(memory_swap), C(shm_size) and C(pids_limit) go into the
        create call; C(memory_swap) follows C(memory) where only that is given.
      - A key that is left out is as the limits file on the server says. Null is unlimited, and so allowed only where
        the user's limit is null on the server too.
      - They tighten and never loosen. A value beyond what the user may have on the server, an unknown key, or another
        user's limits are refused with V(invalid_input). What concerns more than one container (C(max_gpus), the
        slice, timeouts) is always the server's, and not read from here.
    type: dict
    default: {}
  stop_timeout:
    description:
      - Seconds between asking the container to stop and killing it.
    type: int
    default: 10
  recreate:
    description:
      - What to do with an existing container that was made from another request. V(never) leaves it and warns;
        V(on_change) makes it anew, V(on_update) does so as well where its image has been built or loaded anew since,
        V(always) in any case.
      - Files outside C(/workspace) and O(keep) are lost then. The old container goes only when the new one is there;
        where that fails, it is as it was, and runs again if it ran.
    type: str
    choices: [never, on_change, on_update, always]
    default: never
  keep:
    description:
      - Files and directories, such as V(/home/alice), which a container gets from the one that it replaces
        (O(recreate)), over what its image has there.
    type: list
    elements: str
    default: []
  wait:
    description:
      - Seconds to wait for devices where none is free, before the start. Requests are served by priority, then by age.
    type: int
    default: 0
  reuse_held:
    description:
      - Gives up what the user's own stopped containers hold, where the start is not possible otherwise. These
        containers stay, and get another device when they are started again.
    type: bool
    default: false
  containers:
    description:
      - Several containers in one call. Each takes the options above. Exclusive with O(project).
    type: list
    elements: dict
    suboptions:
      state:
        description: As O(state).
        type: str
        choices: [present, started, stopped, restarted, absent]
        default: started
      project:
        description: As O(project).
        type: str
        required: true
      user:
        description: As O(user).
        type: str
      image:
        description: As O(image).
        type: str
      gpus:
        description: As O(gpus).
        type: int
        default: 0
      profile:
        description: As O(profile).
        type: str
      workspace:
        description: As O(workspace).
        type: path
      mounts:
        description: As O(mounts).
        type: list
        elements: str
        default: []
      env:
        description: As O(env).
        type: dict
        default: {}
      ports:
        description: As O(ports).
        type: list
        elements: str
        default: []
      command:
        description: As O(command).
        type: list
        elements: str
        default: []
      network_mode:
        description: As O(network_mode).
        type: str
        choices: [bridge, none, host]
        default: bridge
      limits:
        description: As O(limits).
        type: dict
        default: {}
      stop_timeout:
        description: As O(stop_timeout).
        type: int
        default: 10
      recreate:
        description: As O(recreate).
        type: str
        choices: [never, on_change, on_update, always]
        default: never
      keep:
        description: As O(keep).
        type: list
        elements: str
        default: []
      wait:
        description: As O(wait).
        type: int
        default: 0
      reuse_held:
        description: As O(reuse_held).
        type: bool
        default: false
extends_documentation_fragment:
  - ds01
seealso:
  - module: ds01_gpu_allocate
  - module: ds01_info
"""

EXAMPLES = r"""
- name: Alice's container, with one device
  ds01_container:
    project: my-project
    user: alice
    image: ds01-alice/my-project:latest
    gpus: 1

- name: The same with the image as it is now; what she installed in her home goes along
  ds01_container:
    project: my-project
    user: alice
    image: ds01-alice/my-project:latest
    gpus: 1
    recreate: on_update
    keep: [/home/alice]

- name: Stop it; its device is held for a while
  ds01_container:
    project: my-project._.alice
    state: stopped

- name: A container with less than its user may have
  ds01_container:
    project: preprocessing
    user: alice
    image: ds01-alice/my-project:latest
    limits: {max_cpus: 4, memory: 8g}

- name: A container with the limits that the controller's file says, refused if the server's file allows less
  ds01_container:
    project: my-project
    user: alice
    image: ds01-alice/my-project:latest
    limits: "{{ (playbook_dir ~ '/../config/resource-limits.yaml') | ds01_limits('alice') }}"

- name: A course's containers, in one call
  ds01_container:
    containers:
      - {project: lab1, user: alice, image: course:latest, gpus: 1}
      - {project: lab1, user: carol, image: course:latest}
"""

RETURN = r"""
container:
  description: The container now; null when there is none. With one item only, as are the next six.
  returned: always
  type: dict
  sample:
    name: my-project._.alice
    id: 5f2c
    status: running
    image: ds01-alice/my-project:latest
    gpus: 1
    device: ds01.io/gpu=my-project._.alice
    labels: {ds01.user: alice}
allocation:
  description: The container's allocation, as RV(ds01_gpu_allocate#module:allocation); null when it has none.
  returned: always
  type: dict
actions:
  description: What was done, in order.
  returned: always
  type: list
  elements: str
  sample: [allocated, created, started]
drift:
  description:
    - In what the container, as it was before, differs from the request, with C(is) and C(wanted) for each. Environment
      variables are named without their values. Empty where it was made from this request, and where it differs in
      something else, such as the version of DS01 that made it.
  returned: always
  type: dict
  sample:
    memory: {is: 32g, wanted: 64g}
image_outdated:
  description: Whether the image's name stands for another image by now than the container was made from.
  returned: always
  type: bool
reason:
  description: V(ok), or the reason code of the failure, such as V(image_missing) or V(no_gpu_available).
  returned: always
  type: str
msg:
  description: The same in a sentence, with the next step.
  returned: always
  type: str
results:
  description: One result an item, in order, each with the keys above and C(name), C(changed) and C(failed).
  returned: always
  type: list
  elements: dict
"""

from datetime import timedelta

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ds01.allocations import Allocations
from ansible.module_utils.ds01.container_spec import ContainerRequest, check_keep
from ansible.module_utils.ds01.container_steps import DEFAULT_STOP_TIMEOUT, RECREATE, STATES, Report, Wish
from ansible.module_utils.ds01.containers import Containers
from ansible.module_utils.ds01.errors import Ds01Error, invalid_input
from ansible.module_utils.ds01_module import fail, finish, items, this_server

ITEM = {
    "state": {"type": "str", "choices": list(STATES), "default": "started"},
    "project": {"type": "str"},
    "user": {"type": "str"},
    "image": {"type": "str"},
    "gpus": {"type": "int", "default": 0},
    "profile": {"type": "str"},
    "workspace": {"type": "path"},
    "mounts": {"type": "list", "elements": "str", "default": []},
    "env": {"type": "dict", "default": {}},
    "ports": {"type": "list", "elements": "str", "default": []},
    "command": {"type": "list", "elements": "str", "default": []},
    "network_mode": {"type": "str", "choices": ["bridge", "none", "host"], "default": "bridge"},
    "limits": {"type": "dict", "default": {}},
    "stop_timeout": {"type": "int", "default": DEFAULT_STOP_TIMEOUT},
    "recreate": {"type": "str", "choices": list(RECREATE), "default": "never"},
    "keep": {"type": "list", "elements": "str", "default": []},
    "wait": {"type": "int", "default": 0},
    "reuse_held": {"type": "bool", "default": False},
}
ARGUMENT_SPEC = {
    **ITEM,
    "containers": {
        "type": "list",
        "elements": "dict",
        "options": {**ITEM, "project": {"type": "str", "required": True}},
    },
}


def to_wish(item: dict, allocations: Allocations) -> Wish:
    """The wish that one item's options express."""
    if min(item["gpus"], item["stop_timeout"], item["wait"]) < 0:
        raise invalid_input("gpus, stop_timeout and wait must not be negative.")
    name = allocations.name(item["project"], item["user"])
    request = None
    if item["image"]:
        request = ContainerRequest(
            name=name,
            image=item["image"],
            gpus=item["gpus"],
            profile=item["profile"] or None,
            workspace=item["workspace"],
            mounts=item["mounts"],
            env={key: str(value) for key, value in item["env"].items()},
            ports=item["ports"],
            command=item["command"],
            network_mode=item["network_mode"],
            limits=item["limits"],
        )
    return Wish(
        item["state"],
        name,
        request,
        item["stop_timeout"],
        item["recreate"],
        timedelta(seconds=item["wait"]),
        item["reuse_held"],
        [check_keep(path) for path in item["keep"]],
    )


def to_diff(report: Report) -> dict:
    header = report.name.full
    return {"before_header": header, "after_header": header, "before": report.before, "after": report.after}


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        mutually_exclusive=[("project", "containers")],
        required_one_of=[("project", "containers")],
        supports_check_mode=True,
    )
    try:
        allocations = this_server(module)
        containers = Containers(allocations)
        wishes = [to_wish(item, allocations) for item in items(module, "containers")]
        reports = (containers.preview if module.check_mode else containers.apply)(wishes)
    except Ds01Error as exc:
        fail(module, exc)
    finish(module, [report.result() for report in reports], [to_diff(report) for report in reports])


if __name__ == "__main__":
    main()
