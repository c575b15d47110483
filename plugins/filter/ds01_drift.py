"""Filter for playbooks and templates: which files of a host differ from what is wanted."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ds01_drift
author: The DS01 authors (@ds01)
version_added: "0.1.0"
short_description: Which files of a host differ from what is wanted
description:
  - M(ansible.builtin.copy) of a directory asks the host twice for each file, also when nothing is new. With one call of
    M(ansible.builtin.find) and this filter, only files that differ cost anything.
positional: found
options:
  _input:
    description: Files and directories that the host should have.
    type: list
    elements: dict
    required: true
    suboptions:
      dest:
        description: Path on the host.
        type: path
        required: true
      mode:
        description: The files' mode, with four digits.
        type: str
        required: true
      src:
        description: Path on the controller; a directory if O(_input[].pattern) is given.
        type: path
      content:
        description: The file's text, in place of O(_input[].src).
        type: str
      pattern:
        description: The files of the directory that are wanted, at any depth. All others on the host go.
        type: str
  found:
    description: RV(ansible.builtin.find#module:files) of the host, with checksums.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: List the host's files
  ansible.builtin.find:
    paths: [/opt/ds01/lib/ds01]
    patterns: ["*.py"]
    recurse: true
    get_checksum: true
  register: found

- name: Copy what differs
  ansible.builtin.copy:
    src: "{{ item.src }}"
    dest: "{{ item.dest }}"
    mode: "{{ item.mode }}"
  loop: "{{ ([{'src': 'plugins/module_utils/ds01', 'dest': '/opt/ds01/lib/ds01', 'pattern': '*.py', 'mode': '0644'}]
             | ds01_drift(found.files)).outdated }}"
"""

RETURN = r"""
_value:
  description: What to do about it; both lists are empty where nothing differs.
  type: dict
  contains:
    outdated:
      description: Files to copy, one by one, with RV(ignore:dest), RV(ignore:mode) and their source.
      type: list
      elements: dict
    stale:
      description: Paths on the host that the wanted directories do not have.
      type: list
      elements: str
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def ds01_drift(wanted: Iterable[Mapping[str, str]], found: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What to copy to a host and what to remove there, so that it has what is wanted."""
    wanted = list(wanted)
    files = [file for item in wanted for file in _files(item)]
    present = {file["path"]: (file["checksum"], file["mode"]) for file in found}
    trees = tuple(f"{item['dest']}/" for item in wanted if "pattern" in item)
    return {
        "outdated": [file for file in files if present.get(file["dest"]) != (_checksum(file), file["mode"])],
        "stale": sorted({path for path in present if path.startswith(trees)} - {file["dest"] for file in files}),
    }


def _files(item: Mapping[str, str]) -> list[dict[str, str]]:
    """The item itself if it is one file, else the files of its directory that are wanted."""
    if "pattern" not in item:
        return [dict(item)]
    source = Path(item["src"])
    return [
        {"src": str(file), "dest": f"{item['dest']}/{file.relative_to(source)}", "mode": item["mode"]}
        for file in sorted(source.rglob(item["pattern"]))
    ]


def _checksum(file: Mapping[str, str]) -> str:
    content = file["content"].encode() if "content" in file else Path(file["src"]).read_bytes()
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class FilterModule:
    """Offers `ds01_drift`."""

    def filters(self) -> dict:
        return {"ds01_drift": ds01_drift}
