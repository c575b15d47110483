"""Filter for playbooks: which server a request goes to."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ds01_rank_hosts
short_description: Order GPU servers for a request, best first
version_added: "0.1.0"
description:
  - The server that has the container comes first, then those with most fitting free devices.
author:
  - The DS01 authors (@ds01)
positional: project, user, profile
options:
  _input:
    description: Host names and their M(ds01_info) results.
    type: dict
    required: true
  project:
    description: The project, or the container's full name.
    type: str
    required: true
  user:
    description: The owner's login name.
    type: str
    required: true
  profile:
    description: The profile that is asked for; none counts every free device.
    type: str
"""

EXAMPLES = r"""
- name: Choose a server
  ansible.builtin.debug:
    msg: "{{ answers | ds01_rank_hosts('my-project', 'alice', '2g.20gb') | first }}"
"""

RETURN = r"""
_value:
  description: Host names, best first.
  type: list
  elements: str
"""

import sys
from pathlib import Path

# Ansible bundles module_utils into modules only; a filter runs on the controller, beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from ds01 import fleet


class FilterModule:
    """Offers `ds01_rank_hosts`."""

    def filters(self) -> dict:
        return {"ds01_rank_hosts": fleet.rank}
