"""What every role has to have, and says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(path for path in (Path(__file__).resolve().parents[2] / "roles").iterdir() if path.is_dir())


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


@pytest.fixture(params=ROLES, ids=lambda path: path.name)
def role(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_default_is_specified_and_the_other_way_round(role: Path) -> None:
    options = read(role / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"]
    defaults = read(role / "defaults" / "main.yml")
    assert sorted(options) == sorted(defaults)
    stated = {name: option["default"] for name, option in options.items() if "default" in option}
    assert stated == {name: defaults[name] for name in stated}


def test_variables_carry_the_roles_name(role: Path) -> None:
    assert all(name.startswith(f"{role.name}_") for name in read(role / "defaults" / "main.yml"))
    constants = role / "vars" / "main.yml"
    if constants.exists():
        assert all(name.startswith(f"__{role.name}_") for name in read(constants))


def test_meta_says_what_it_is_for(role: Path) -> None:
    meta = read(role / "meta" / "main.yml")["galaxy_info"]
    assert meta["role_name"] == role.name
    assert meta["description"]
    assert {platform["name"] for platform in meta["platforms"]} == {"Debian", "Ubuntu"}
