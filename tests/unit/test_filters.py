"""The filters: the core's answers and its refusals, word for word, as playbooks get them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ds01 import config, limits
from ds01.errors import Ds01Error

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config" / "resource-limits.yaml"
NAMES = ("ds01_limits", "ds01_slice_dropins")


def filter_named(name: str) -> Callable[..., Any]:
    """The filter as Ansible loads it: a file of its own, not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "plugins" / "filter" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FilterModule().filters()[name]


@pytest.fixture
def limits_file(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Write a limits file, beside its schema."""
    shutil.copy(SHIPPED.with_name("resource-limits.schema.json"), tmp_path)

    def write(document: dict[str, Any]) -> str:
        path = tmp_path / "resource-limits.yaml"
        path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
        return str(path)

    return write


def test_limits_are_what_the_command_prints() -> None:
    expected = limits.as_dict(limits.resolve(config.load(SHIPPED), "alice"))
    assert filter_named("ds01_limits")(str(SHIPPED), "alice") == expected


def test_dropins_are_one_for_each_group() -> None:
    files = filter_named("ds01_slice_dropins")(str(SHIPPED))
    assert set(files) == {"ds01-student-.slice.d/50-ds01.conf", "ds01-researcher-.slice.d/50-ds01.conf"}
    assert files["ds01-researcher-.slice.d/50-ds01.conf"].splitlines()[1:] == [
        "[Slice]",
        "CPUQuota=4800%",
        "MemoryMax=192G",
        "MemoryHigh=172G",
        "TasksMax=12288",
    ]


def test_an_override_has_a_dropin_only_where_it_differs(limits_file: Callable[[dict[str, Any]], str]) -> None:
    path = limits_file({"user_overrides": {"alice": {"priority": 90}, "bob": {"memory": "1g"}}})
    assert set(filter_named("ds01_slice_dropins")(path)) == {
        "ds01-student-.slice.d/50-ds01.conf",
        "ds01-student-bob.slice.d/50-ds01.conf",
    }


def test_no_limit_is_no_line(limits_file: Callable[[dict[str, Any]], str]) -> None:
    path = limits_file({"defaults": {"max_containers_per_user": None}})
    text = filter_named("ds01_slice_dropins")(path)["ds01-student-.slice.d/50-ds01.conf"]
    assert text.splitlines()[1:] == ["[Slice]"]


@pytest.mark.parametrize("user", ["mary-ann", "h.baker@uni.example", "a/b", "../../x", "new\nline", "ü", ".dot", "a b"])
def test_a_hostile_name_stays_one_directory(user: str, limits_file: Callable[[dict[str, Any]], str]) -> None:
    path = limits_file({"user_overrides": {user: {"memory": "1g"}}})
    names = [name for name in filter_named("ds01_slice_dropins")(path) if "student-." not in name]
    assert len(names) == 1
    assert re.fullmatch(r"ds01-student-([A-Za-z0-9:_.]|\\x[0-9a-f]{2})+\.slice\.d/50-ds01\.conf", names[0])


@pytest.mark.parametrize("value", ["4800%\n[Service]\nUser=root", "4800%\n", "% 4", "x"])
def test_a_value_cannot_bring_lines_of_its_own(value: str, limits_file: Callable[[dict[str, Any]], str]) -> None:
    path = limits_file({"groups": {"student": {"aggregate": {"cpu_quota": value}}}})
    with pytest.raises(AnsibleFilterError, match=r"groups\.student\.aggregate\.cpu_quota"):
        filter_named("ds01_slice_dropins")(path)


@pytest.mark.parametrize(("cgroup_v1", "rules"), [(False, 0), (True, 2)])
def test_only_the_old_cgroups_need_a_rule_about_devices(cgroup_v1: bool, rules: int) -> None:
    files = filter_named("ds01_slice_dropins")(str(SHIPPED), cgroup_v1=cgroup_v1)
    assert {text.count("DeviceAllow=") for text in files.values()} == {rules}


@pytest.mark.parametrize(("name", "arguments"), [("ds01_limits", ("alice",)), ("ds01_slice_dropins", ())])
def test_a_refusal_is_the_cores_own_sentence(
    name: str, arguments: tuple[str, ...], limits_file: Callable[[dict[str, Any]], str]
) -> None:
    path = limits_file({"defaults": {"memry": "1g"}})
    with pytest.raises(Ds01Error) as core:
        config.load(Path(path))
    with pytest.raises(AnsibleFilterError) as refused:
        filter_named(name)(path, *arguments)
    assert str(core.value) in str(refused.value)
    assert "did you mean memory?" in str(refused.value)


def test_a_missing_file_grants_nothing(tmp_path: Path) -> None:
    with pytest.raises(AnsibleFilterError, match="cannot be read"):
        filter_named("ds01_limits")(str(tmp_path / "none.yaml"), "alice")


@pytest.mark.parametrize("name", NAMES)
def test_ansible_doc_knows_the_filter(name: str) -> None:
    command = [Path(sys.executable).with_name("ansible-doc"), "--type", "filter", "--json", name]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert said.returncode == 0, said.stderr
    documented = yaml.safe_load(said.stdout)[name]
    assert documented["doc"]["short_description"]
    assert documented["examples"]
    assert documented["return"]["_value"]["description"]
