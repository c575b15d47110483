"""Filter for playbooks and templates: the systemd drop-ins that hold users to their limits."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ds01_slice_dropins
author: The DS01 authors (@ds01)
version_added: "0.1.0"
short_description: The systemd drop-ins that hold users to their limits
description:
  - Reads the limits file on the controller and writes the drop-ins that a host needs - one for each group, which
    systemd applies to the slices of all its users, and one for each user whose override differs.
  - A file that is missing or wrong is an error that names the place in the file.
options:
  _input:
    description: Path of the limits file. Its schema and C(groups/*.members) lie beside it.
    type: path
    required: true
  cgroup_v1:
    description:
      - Whether the host still mounts cgroups the old way. There a slice needs a rule about devices from its start -
        without one systemd moves the slice's first container out of its own device cgroup, which is what keeps it
        from other people's GPUs. The rule allows everything; the containers' own rules decide.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Show the limits of the slices
  ansible.builtin.debug:
    msg: "{{ 'config/resource-limits.yaml' | ds01_slice_dropins }}"
"""

RETURN = r"""
_value:
  description: Path below C(/etc/systemd/system) to the file's text. A property that is not there is no limit.
  type: dict
  sample:
    ds01-researcher-.slice.d/50-ds01.conf: "[Slice]\nCPUQuota=4800%\nMemoryMax=192G\nTasksMax=12288\n"
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ansible.errors import AnsibleFilterError

# Ansible bundles module_utils into modules only; a filter runs on the controller, beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from ds01 import config, limits
from ds01.errors import Ds01Error

_DEVICES = ["DeviceAllow=char-* rwm", "DeviceAllow=block-* rwm"]


def ds01_slice_dropins(path: str, cgroup_v1: bool = False) -> dict[str, str]:
    """Path below /etc/systemd/system -> the file's text."""
    devices = _DEVICES if cgroup_v1 else []
    try:
        dropins = limits.slice_dropins(config.load(Path(path)))
    except Ds01Error as exc:
        raise AnsibleFilterError(str(exc)) from None
    return {f"{directory}/50-ds01.conf": _text(properties, devices) for directory, properties in dropins.items()}


def _text(properties: Mapping[str, str], more: Sequence[str]) -> str:
    lines = [*(f"{name}={value}" for name, value in properties.items()), *more]
    return "\n".join(["# Managed by Ansible (DS01, role ds01_slices).", "[Slice]", *lines, ""])


class FilterModule:
    """Offers `ds01_slice_dropins`."""

    def filters(self) -> dict:
        return {"ds01_slice_dropins": ds01_slice_dropins}
