"""Filter for playbooks and templates: what a user may have."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ds01_limits
author: The DS01 authors (@ds01)
version_added: "0.1.0"
short_description: What a user may have
description:
  - Reads the limits file on the controller and layers it for one user, key by key - defaults, group, user override.
  - A file that is missing or wrong is an error that names the place in the file; nothing is granted from a guess.
positional: user
options:
  _input:
    description: Path of the limits file. Its schema and C(groups/*.members) lie beside it.
    type: path
    required: true
  user:
    description: The user's login name.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show what alice may have
  ansible.builtin.debug:
    msg: "{{ ('config/resource-limits.yaml' | ds01_limits('alice')).max_gpus }} devices at a time"
"""

RETURN = r"""
_value:
  description:
    - The resolved limits, as C(ds01 limits alice --json) prints them. V(null) is unlimited, V(0) is none.
    - Sizes and durations keep their units; RV(_value.slice) is the user's systemd slice and RV(_value.docker_args)
      the limits as flags of C(docker create).
  type: dict
  contains:
    slice:
      description: The user's systemd slice.
      type: str
      sample: ds01-researcher-alice.slice
    docker_args:
      description: The limits as flags of C(docker create).
      type: list
      elements: str
      sample: ["--cpus=16", "--memory=64g"]
  sample: {user: alice, group: researcher, max_gpus: 2, memory: 64g, priority: 50}
"""

import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# Ansible bundles module_utils into modules only; a filter runs on the controller, beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from ds01 import config, limits, names
from ds01.errors import Ds01Error


def ds01_limits(path: str, user: str) -> dict[str, Any]:
    """One user's resolved limits, as `ds01 limits USER --json` prints them."""
    try:
        return limits.as_dict(limits.resolve(config.load(Path(path)), names.check_user(user)))
    except Ds01Error as exc:
        raise AnsibleFilterError(str(exc)) from None


class FilterModule:
    """Offers `ds01_limits`."""

    def filters(self) -> dict:
        return {"ds01_limits": ds01_limits}
