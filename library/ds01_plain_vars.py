#!/usr/bin/python
"""Ansible action: refuses templates in a request's variables. Its code is plugins/action/ds01_plain_vars.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_plain_vars
short_description: Refuse templates in variables that were passed on the command line
version_added: "0.1.0"
description:
  - Ansible renders templates in extra variables (C(-e)), so that a project called C({{ ... }}) would be run on the
    controller instead of being refused. This looks at the variables as they were typed.
  - Runs on the controller and changes nothing. AWX hands survey answers over as plain text by itself.
author:
  - The DS01 authors (@ds01)
options:
  names:
    description:
      - The variables to look at. One that was not passed is fine.
    type: list
    elements: str
    required: true
attributes:
  action:
    description: Has an action plugin, and does nothing on the host.
    support: full
  check_mode:
    description: Can run in check mode.
    support: full
"""

EXAMPLES = r"""
- name: Refuse templates in the request
  ds01_plain_vars:
    names: [ds01_user, ds01_project]
"""

RETURN = r"""
msg:
  description: Which variables hold a template, and what to do.
  returned: failure
  type: str
"""
