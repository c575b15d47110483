"""Fixtures that every test may use: the core package on the path, and a host in a temporary directory."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ansible.module_utils
import fastjsonschema
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
MODULE_UTILS = ROOT / "plugins" / "module_utils"

# `import ds01` as on a host, and `import ansible.module_utils.ds01` as inside a shipped module.
sys.path[:0] = [str(MODULE_UTILS), str(ROOT / "library"), str(ROOT / "tests" / "unit")]
# Before a package that the environment may link to: what is tested is this checkout.
ansible.module_utils.__path__.insert(0, str(MODULE_UTILS))

from support import Host  # noqa: E402 - found on the path above

# A busy machine is slow, not wrong: no test fails because of its duration.
# The same examples at every run: whoever looks for new ones sets HYPOTHESIS_PROFILE=long.
settings.register_profile("ds01", deadline=None, max_examples=60, stateful_step_count=40, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=1000, stateful_step_count=60)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ds01"))


@pytest.fixture(scope="session", autouse=True)
def _hear_signals() -> None:
    """Whoever starts tests with nohup, or behind a script, has them ignore these, and their children, too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compile_each_schema_once() -> Iterator[None]:
    """Compiling the limits file's schema takes ten times as long as the test that needs it."""
    compile_schema = fastjsonschema.compile

    @functools.cache
    def compiled(schema: str, options: str) -> Callable[[Any], Any]:
        return compile_schema(json.loads(schema), **json.loads(options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fastjsonschema, "compile", lambda schema, **options: compiled(json.dumps(schema), json.dumps(options))
        )
        yield


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with the limits file of this repository, and the environment that points to it."""
    found = Host(
        root=tmp_path,
        config=tmp_path / "etc" / "resource-limits.yaml",
        state=tmp_path / "state",
        log=tmp_path / "log",
        cdi=tmp_path / "cdi",
    )
    found.config.parent.mkdir()
    shutil.copy(ROOT / "config" / "resource-limits.yaml", found.config)
    for name in [name for name in os.environ if name.startswith("DS01_")]:
        monkeypatch.delenv(name)
    for name, value in found.env.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def timezone_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Move this process to another time zone, and back at the end of the test."""
    with monkeypatch.context() as patch:

        def move(zone: str) -> None:
            patch.setenv("TZ", zone)
            time.tzset()

        yield move
    time.tzset()


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Change this process's umask, and back at the end of the test."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)
