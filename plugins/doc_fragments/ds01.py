"""What all DS01 modules have in common, for `ansible-doc`."""

from __future__ import annotations


class ModuleDocFragment:
    """Attributes, requirements and notes."""

    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in check mode and say what would change, without writing anything.
    support: full
  diff_mode:
    description: Shows what changed, or would.
    support: full
  idempotent:
    description: A second run with the same options changes nothing.
    support: full
requirements:
  - docker (Python, on the GPU server)
  - nvidia-ml-py (Python, on the GPU server)
  - PyYAML (Python, on the GPU server)
  - fastjsonschema (Python, on the GPU server)
notes:
  - C(playbooks/site.yml) installs the requirements into C(/opt/ds01/venv) on the server; set
    C(ansible_python_interpreter) to C(/opt/ds01/venv/bin/python) for plays that use these modules.
  - The C(DS01_*) environment variables move configuration, ledger, log and CDI directory.
"""
