"""Templates passed with `-e` are refused before anything reads, and so runs, them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ds01_plain_vars: {names: [ds01_project, ds01_env, not_passed]}
"""


def run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK, encoding="utf-8")
    return subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", playbook, *options],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "fine"),
    [
        ({"ds01_project": "my-project", "ds01_env": {"A": "b"}}, True),
        ({"other": "{{ 1 }}"}, True),
        ({"ds01_project": "{{ lookup('pipe', 'touch %s') }}"}, False),
        ({"ds01_env": {"A": ["{% if x %}"]}}, False),
        ({"ds01_env": {"{{ x }}": 1}}, False),
    ],
    ids=["plain", "another variable", "a command", "inside a list", "in a key"],
)
def test_templates_are_refused_and_not_run(variables: dict[str, Any], fine: bool, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    found = run(tmp_path, "-e", json.dumps(variables).replace("%s", str(trap)))
    assert (found.returncode == 0) is fine, found.stdout + found.stderr
    assert ("holds a template" in found.stdout + found.stderr) is not fine
    assert not trap.exists()
