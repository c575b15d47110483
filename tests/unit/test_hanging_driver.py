"""A driver that hangs: every door says so in bounded time, keeps nothing, and everything works once it is back.

Each door is a process of its own, for it ends: the simulated driver's call does not return while the fault lasts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import sim_systemd
from ds01 import reconcile
from ds01.errors import EXIT_UNAVAILABLE, Ds01Error
from ds01.ledger import LedgerStore
from sim_server import LIMITS, SIM, Server, Start, needs_sim, start
from support import ROOT

__all__ = ["start"]

pytestmark = needs_sim

BOUND = 0.4
"""Seconds: what the doors of these tests allow a call."""

PROGRAM = """
import sys
utils, bound = sys.argv[1], float(sys.argv[2])
sys.path.insert(0, utils)
import ansible.module_utils
ansible.module_utils.__path__.insert(0, utils)
{imports}
nvml.READ_TIMEOUT = nvml.CHANGE_TIMEOUT = bound
{run}
"""
VERB = PROGRAM.format(imports="from ds01 import cli, nvml", run="sys.exit(cli.main(sys.argv[3:]))")
MODULE = PROGRAM.format(
    imports="import json, runpy\nfrom ansible.module_utils.ds01 import nvml\n"
    "from ansible.module_utils.testing import patch_module_args",
    run="with patch_module_args(json.loads(sys.argv[4])):\n    runpy.run_path(sys.argv[3], run_name='__main__')",
)

ASK = ("--user", "alice", "--container", "new")
VERBS: dict[str, Sequence[str]] = {
    "allocate": ("allocate", *ASK),
    "allocate, dry run": ("allocate", *ASK, "--dry-run"),
    "allocate, waiting": ("allocate", *ASK, "--wait", "1h"),
    "validate": ("validate", "--container", "p._.alice"),
    "status": ("status",),
    "query gpus": ("query", "gpus"),
    "metrics": ("metrics",),
    "config check": ("config", "check"),
    "rebuild": ("rebuild",),
    "rebuild, dry run": ("rebuild", "--dry-run"),
    "reconcile": ("reconcile",),
    "reconcile, dry run": ("reconcile", "--dry-run"),
    "mig list": ("mig", "list"),
    "mig plan": ("mig", "plan", "--gpu", "1=7g.80gb"),
    "mig apply": ("mig", "apply", "--gpu", "1=7g.80gb"),
    "restore": ("restore",),
    "restore, dry run": ("restore", "--dry-run"),
}
MODULES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "info": ("ds01_info", {}),
    "allocate": ("ds01_gpu_allocate", {"user": "alice", "container": "new"}),
    "mig_profile": ("ds01_mig_profile", {"gpus": {"1": ["7g.80gb"]}}),
    "mig_profile, check": ("ds01_mig_profile", {"gpus": {"1": []}, "_ansible_check_mode": True}),
    "mig_profile, exported": ("ds01_mig_profile", {"state": "exported"}),
    "rebuild": ("ds01_rebuild", {}),
    "reconcile": ("ds01_reconcile", {}),
    "reconcile, check": ("ds01_reconcile", {"_ansible_check_mode": True}),
}


def began(*argv: str, program: str = VERB, bound: float = BOUND) -> subprocess.Popen[str]:
    """A door in a process of its own."""
    command = [sys.executable, "-c", program, str(ROOT / "plugins" / "module_utils"), str(bound), *argv]
    environment = os.environ | {"LD_LIBRARY_PATH": str(SIM)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def sentence(call: str, bound: float = BOUND) -> str:
    return f"The NVIDIA driver hangs: {call} has not returned for {bound:g} s. dmesg shows why"


@pytest.fixture
def server(start: Start) -> Server:
    """A whole GPU and one cut in three, of which alice has a slice."""
    found = start("2xA100-SXM4-80GB", g1="2g.20gb,2g.20gb,2g.20gb")
    found.allocate("p._.alice", "2g.20gb")
    return found


def settles(server: Server) -> None:
    """One reconcile brings agreement, and a second changes nothing."""
    assert reconcile.reconcile(server.ds01()).problems == ()
    before = server.written()
    assert not reconcile.reconcile(server.ds01()).changed
    assert server.written() == before
    server.check_all_done()


@pytest.mark.parametrize("argv", VERBS.values(), ids=VERBS)
def test_every_verb_ends_and_says_so(argv: Sequence[str], server: Server) -> None:
    settles(server)
    written = server.written()
    server.simulate("hang=init")
    code, out, err = ended(began(*argv, "--json"))
    assert code == EXIT_UNAVAILABLE
    assert f"ds01: driver_unavailable: {sentence('nvmlInit')}" in err
    answer = json.loads(out)
    assert (answer["failed"], answer["reason"]) == (True, "driver_unavailable")
    assert answer["msg"].startswith(sentence("nvmlInit"))
    assert server.written() == written
    server.simulate("hang=none")
    settles(server)


@pytest.mark.parametrize(("name", "params"), MODULES.values(), ids=MODULES)
def test_every_module_fails_and_says_so(name: str, params: Mapping[str, Any], server: Server) -> None:
    server.simulate("hang=init")
    module = str(ROOT / "library" / f"{name}.py")
    code, out, _ = ended(began(module, json.dumps(params), program=MODULE))
    answer = json.loads(out)
    assert (code, answer["failed"], answer["reason"]) == (EXIT_UNAVAILABLE, True, "driver_unavailable")
    assert answer["msg"].startswith(sentence("nvmlInit"))
    server.simulate("hang=none")
    settles(server)


def test_who_reads_for_people_gets_the_sentence_alone(server: Server) -> None:
    server.simulate("hang=call")
    code, out, err = ended(began("status"))
    assert (code, out, err.count("\n")) == (EXIT_UNAVAILABLE, "", 1)
    assert err.startswith(f"ds01: driver_unavailable: {sentence('nvmlDeviceGetCount')}")


@pytest.mark.parametrize(
    "argv",
    [("limits", "alice"), ("query", "users"), ("events",), ("release", "--container", "p._.alice")],
    ids=" ".join,
)
def test_what_asks_no_driver_goes_on(argv: Sequence[str], server: Server) -> None:
    server.simulate("hang=init")
    code, _, err = ended(began(*argv))
    assert (code, err) == (0, "")


def test_a_slow_driver_is_waited_for(server: Server) -> None:
    server.simulate("slow=0.5")
    code, _, err = ended(began("mig", "apply", "--gpu", "1=2g.20gb,2g.20gb,3g.40gb", bound=2))
    assert (code, "driver_unavailable" in err) == (0, False)
    server.simulate("slow=0")
    assert server.cut(1) == "2g.20gb@0 2g.20gb@2 3g.40gb@4"
    settles(server)


def test_a_lock_is_not_held_by_who_hangs(server: Server) -> None:
    server.simulate("hang=call")
    with began("rebuild", bound=2) as first:
        store, until = LedgerStore(server.host.ledger, lock_timeout=0.2), time.monotonic() + 20
        refusal = None
        while refusal is None and time.monotonic() < until:
            try:
                with store.locked():
                    pass
                time.sleep(0.1)  # the other one's turn
            except Ds01Error as exc:
                refusal = exc
        assert refusal is not None
        assert refusal.reason == "lock_timeout"
        assert first.wait(20) == EXIT_UNAVAILABLE
        first.communicate()
    with store.locked():
        pass
    server.simulate("hang=none")
    settles(server)
    assert server.allocate("q._.bob", "2g.20gb").ok


@pytest.mark.parametrize(
    ("fault", "call"),
    [
        ("hang=change", "nvmlComputeInstanceDestroy"),
        ("hang=change", "nvmlDeviceSetMigMode"),
    ],
)
def test_a_change_that_hangs_is_put_right_afterwards(fault: str, call: str, server: Server) -> None:
    settles(server)
    server.simulate(fault)
    wish = "1=2g.20gb,3g.40gb" if "Instance" in call else "0="
    code, _, err = ended(began("mig", "apply", "--gpu", wish))
    assert code == EXIT_UNAVAILABLE
    assert sentence(call) in err
    server.simulate("hang=none")
    settles(server)
    code, _, err = ended(began("mig", "apply", "--gpu", wish, bound=30))
    assert (code, "driver_unavailable" in err) == (0, False)
    settles(server)


def test_services_that_gave_way_run_again_after_the_next_reconcile_even_while_it_hangs(server: Server) -> None:
    """Reconcile starts them before it asks the driver."""
    unit = "nvidia-dcgm.service"
    systemd = sim_systemd.install(server.host.root / "bin", server.host.root / "units")
    systemd.unit(unit)
    server.host.limits(f"{LIMITS}policies: {{mig_services: [{unit}]}}\n")
    server.simulate("hang=change")
    assert ended(began("mig", "apply", "--gpu", "0="))[0] == EXIT_UNAVAILABLE
    assert systemd.running() == []
    server.simulate("hang=call")
    assert ended(began("reconcile"))[0] == EXIT_UNAVAILABLE
    assert systemd.running() == [unit]
    server.simulate("hang=none")
    settles(server)
