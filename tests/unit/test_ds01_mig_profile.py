"""ds01_mig_profile: check mode is the run, a second run changes nothing, and what is exported leads to itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ds01_mig_profile
import pytest
import sim_systemd
import sim_tools
import yaml
from ansible.module_utils.ds01.paths import Paths
from ds01_mig_profile import Ds01Error
from sim_server import LIMITS, SIM, Server, Start, initial, needs_sim, start
from support import ROOT, Host, come

__all__ = ["start"]

PLAYBOOK = ROOT / "playbooks" / "mig.yml"

CUT = "2g.20gb,1g.10gb+me,3g.40gb"


def run(check: bool = False, **params: Any) -> dict[str, Any]:
    """The module's result with these options; its own Allocations, as on a host."""
    options = {"layout": None, "gpus": None, "layouts_file": None, "force": [], **params}
    return ds01_mig_profile.present(service(), options, check)


def service() -> Any:
    return ds01_mig_profile.Allocations(Paths.from_env(), "tester")


@pytest.fixture
def server(start: Start) -> Server:
    """A whole A100, and one that is cut in three of which alice has a slice."""
    found = start("2xA100-SXM4-80GB", g1=CUT)
    found.allocate("p._.alice", "2g.20gb")
    return found


class TestOnAServer:
    pytestmark = needs_sim

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"gpus": {"1": ["2g.20gb", "1g.10gb", "3g.40gb"]}}, id="one of three"),
            pytest.param({"gpus": {0: ["3g.40gb"], 1: ["2g.20gb"]}}, id="a mode too"),
            pytest.param({"gpus": {"0": []}}, id="a mode and nothing else"),
            pytest.param({"layout": "all-balanced"}, id="by name"),
            pytest.param({"gpus": {"1": ["7g.80gb"]}, "force": ["p._.alice"]}, id="by force"),
        ],
    )
    def test_check_mode_is_the_run_and_the_second_changes_nothing(
        self, options: dict[str, Any], server: Server
    ) -> None:
        server.report("held", "p._.alice")
        before, written = server.cuts(), server.written()
        foreseen = run(check=True, **options)
        assert (server.cuts(), server.written()) == (before, written)
        done = run(**options)
        assert foreseen["changed"]
        assert server.cuts() != before
        for result in (foreseen, done):
            result.pop("devices")  # those that are new have a UUID only afterwards
        assert done == foreseen
        json.dumps(done)  # what Ansible carries to the controller
        after = server.written()
        again = run(**options)
        assert (again["changed"], again["diff"], again["released"]) == (False, [], [])
        assert server.written() == after
        server.check_all_done()

    def test_devices_are_those_afterwards(self, server: Server) -> None:
        done = run(gpus={"0": ["7g.80gb"]})
        assert {d["uuid"] for d in done["devices"]} == set(server.devices())

    def test_without_any_wish_the_limits_file_says_it(self, start: Start) -> None:
        server = start("2xA100-SXM4-80GB", g1="1g.10gb")
        server.host.limits("gpu_allocation: {enable_mig: true, mig_profile: 3g.40gb}\n")
        assert run()["changed"]
        assert server.cuts() == ["3g.40gb@0 3g.40gb@4"] * 2

    @pytest.mark.parametrize("check", [True, False], ids=["check", "run"])
    @pytest.mark.parametrize("file", [None, "/etc/mig.yaml"])
    def test_an_empty_name_is_no_wish_for_the_limits_file_s_layout(
        self, file: str | None, check: bool, server: Server
    ) -> None:
        server.host.limits("gpu_allocation: {enable_mig: true, mig_profile: 3g.40gb}\n")
        before = server.cuts()
        with pytest.raises(Ds01Error, match="The name of the layout is empty") as caught:
            run(check, layout="", layouts_file=file)
        assert (caught.value.reason, server.cuts()) == ("invalid_input", before)
        assert "leave it out altogether" in caught.value.hint

    @pytest.mark.parametrize("check", [True, False], ids=["check", "run"])
    def test_a_file_of_layouts_without_a_name_is_no_wish(self, check: bool, server: Server) -> None:
        """Without it the limits file would count, for all GPUs."""
        server.host.limits("gpu_allocation: {enable_mig: true, mig_profile: 3g.40gb}\n")
        before, file = server.cuts(), ROOT / "config" / "mig-layouts.yaml"
        with pytest.raises(Ds01Error, match=f"{file} is a file of layouts, and none of them is named") as caught:
            run(check, layouts_file=str(file))
        assert (caught.value.reason, server.cuts()) == ("invalid_input", before)
        assert "all-balanced" in caught.value.hint

    def test_a_refusal_says_who_is_in_the_way(self, server: Server) -> None:
        for check in (True, False):
            with pytest.raises(Ds01Error, match=r"p\._\.alice of alice") as caught:
                run(check, gpus={"0": ["3g.40gb"], "1": ["7g.80gb"]})
            assert caught.value.reason == "layout_in_use"
            assert [r["gpu"] for r in caught.value.details["refusals"]] == [1]
            assert server.cut(0) == "off"

    def test_a_service_that_gave_way_is_in_the_result_of_the_run_too(self, server: Server) -> None:
        systemd = sim_systemd.install(server.host.root / "bin", server.host.root / "units")
        systemd.unit("lab-monitor.service")
        server.host.limits(LIMITS + "policies: {mig_services: [lab-monitor.service]}\n")
        foreseen = run(check=True, gpus={"0": ["3g.40gb"]})
        done = run(gpus={"0": ["3g.40gb"]})
        assert foreseen["services"] == done["services"] == ["lab-monitor.service"]
        assert systemd.log() == ["stopped lab-monitor.service", "started lab-monitor.service"]
        assert run(gpus={"0": ["3g.40gb"]})["services"] == []

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_job_that_is_cancelled_says_so_and_is_undone(self, number: signal.Signals, server: Server) -> None:
        said: list[dict[str, Any]] = []

        class Module:
            """What AnsibleModule does at the end, without the end."""

            def fail_json(self, **result: Any) -> None:
                said.append(result)

        before = server.cuts()
        server.calls.before("write", lambda: come(number), 2)
        with ds01_mig_profile.interruptible(Module()):
            run(gpus={"0": ["3g.40gb"], "1": ["2g.20gb"]})
        assert [result["reason"] for result in said] == ["interrupted"]
        assert f"Interrupted by {number.name}." in said[0]["msg"]
        assert server.cuts() == before

    def test_what_is_exported_leads_to_itself(self, server: Server) -> None:
        result = ds01_mig_profile.exported(service(), "as found")
        assert not result["changed"]
        assert yaml.safe_load(result["text"]) == result["document"]
        assert list(result["document"]["mig-configs"]) == ["as found"]
        file = server.host.root / "found.yaml"
        file.write_text(result["text"], encoding="utf-8")
        run(layout="as found", layouts_file=str(file))  # notes the layout for the next boot, and cuts nothing
        again = run(layout="as found", layouts_file=str(file))
        assert not again["changed"]
        assert {step["action"] for step in again["plan"]} == {"keep"}

    def test_a_lost_gpu_is_left_out_of_what_is_exported_and_keeps_its_layout(self, server: Server) -> None:
        server.apply(g0="3g.40gb")
        before = server.cuts()
        server.simulate("lost=1")
        result = ds01_mig_profile.exported(service(), "current")
        assert result["warnings"] == ["GPU 1 is lost: how it is cut cannot be seen, and it is left out."]
        assert result["document"]["mig-configs"]["current"] == [
            {"devices": [0], "mig-enabled": True, "mig-devices": {"3g.40gb": 1}}
        ]
        file = server.host.root / "found.yaml"
        file.write_text(result["text"], encoding="utf-8")
        server.simulate("found=1")
        run(layout="current", layouts_file=str(file))
        assert server.cuts() == before

    def test_a_leftover_is_left_out_with_a_warning(self, server: Server) -> None:
        server.somebody_cuts(1, "1g.10gb", 3, compute=False)
        result = ds01_mig_profile.exported(service(), "current")
        assert result["warnings"] == ["1g.10gb at 3 of GPU 1 has no compute instance: it is left out."]
        assert "1g.10gb" not in result["document"]["mig-configs"]["current"][1]["mig-devices"]

    def test_where_every_gpu_is_lost_nothing_is_exported(self, server: Server) -> None:
        server.simulate("lost=0", "lost=1")
        result = ds01_mig_profile.exported(service(), "current")
        assert len(result["warnings"]) == 2
        assert yaml.safe_load(result["text"]) == result["document"]
        assert result["document"]["mig-configs"] == {"current": []}

    def test_what_could_not_be_seen_is_told_with_what_is_exported(self, server: Server) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", f"unix://{server.host.root}/no-engine.sock")
            patch.delenv("DS01_ENGINE")
            result = ds01_mig_profile.exported(service(), "current")
        assert [warning.startswith("Not everything could be seen: ") for warning in result["warnings"]] == [True]
        assert len(result["document"]["mig-configs"]["current"]) == 2


@pytest.mark.parametrize(
    ("written", "meaning"),
    [
        ({"1": ["3g.40gb", "2g.20gb"], 0: []}, {1: ["3g.40gb", "2g.20gb"], 0: []}),
        ({"12": ["full"]}, {12: ["full"]}),
        ({}, {}),
    ],
    ids=["text and number", "a whole GPU", "none"],
)
def test_gpus_as_they_are_written(written: Mapping[Any, Any], meaning: dict[int, list[str]]) -> None:
    assert ds01_mig_profile.profiles(written) == meaning


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({"GPU-0": []}, "'GPU-0' is not the index of a GPU"),
        ({"-1": []}, "'-1' is not the index of a GPU"),
        ({True: []}, "True is not the index of a GPU"),
        ({"1": "3g.40gb"}, "profiles of GPU 1 are no list"),
        ({"1": None}, "profiles of GPU 1 are no list"),
        ({"1": [7]}, "profiles of GPU 1 are no list"),
        ({"1": {"2g.20gb": 3}}, "profiles of GPU 1 are no list"),
        ({"1": [], 1: []}, "GPU 1 is given twice"),
    ],
    ids=str,
)
def test_gpus_that_mean_nothing(written: Mapping[Any, Any], problem: str) -> None:
    with pytest.raises(Ds01Error, match=problem) as caught:
        ds01_mig_profile.profiles(written)
    assert caught.value.reason == "invalid_input"


PYTHON = """\
#!/bin/sh
export LD_LIBRARY_PATH={sim} PATH={tools}:$PATH {variables}
exec {python} "$@"
"""
"""A server's interpreter: the same machine, with a driver and a DS01 of its own."""


@dataclass(frozen=True)
class Fleet:
    """Two servers on this machine, gpu1 with an A30 and gpu2 with an A100."""

    root: Path

    def state(self, name: str) -> str:
        return (self.root / name / "gpus").read_text(encoding="utf-8")

    def play(self, *options: str) -> subprocess.CompletedProcess[str]:
        """playbooks/mig.yml."""
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", "-i", self.root / "hosts.yml", *options, PLAYBOOK],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    hosts = {}
    for name, model in (("gpu1", "A30-24GB"), ("gpu2", "A100-SXM4-80GB")):
        root = tmp_path / name
        shutil.copytree(ROOT / "config", root / "etc")
        (root / "gpus").write_text(initial(model).replace("permit_any=0", "permit_any=1"), encoding="utf-8")
        parts = [root / "etc" / "resource-limits.yaml", *(root / part for part in ("state", "log", "cdi"))]
        env = {**Host(root, *parts).env, "NVML_SIM_STATE": str(root / "gpus")}
        variables = " ".join(f"{key}={value}" for key, value in env.items())
        tools = sim_tools.write(root / "bin", root / "machine")
        script = PYTHON.format(sim=SIM, tools=tools, variables=variables, python=sys.executable)
        (root / "python").write_text(script, encoding="utf-8")
        (root / "python").chmod(0o755)
        hosts[name] = {"ansible_connection": "local", "ansible_become": False, "ds01_python": str(root / "python")}
    (tmp_path / "hosts.yml").write_text(json.dumps({"gpu_servers": {"hosts": hosts}}), encoding="utf-8")
    return Fleet(tmp_path)


class TestThePlaybook:
    pytestmark = needs_sim

    def test_the_server_that_refuses_is_the_last_one_tried(self, fleet: Fleet) -> None:
        before = fleet.state("gpu2")
        done = fleet.play("-e", '{"ds01_mig_gpus": {"0": ["3g.40gb"]}}')
        assert done.returncode != 0
        assert "GPU 0 (NVIDIA A30) has no profile 3g.40gb" in done.stdout
        assert "gpu2" not in done.stdout
        assert fleet.state("gpu2") == before

    def test_it_says_the_plan_of_each_server_and_then_changes_nothing(self, fleet: Fleet) -> None:
        done = fleet.play("-e", "ds01_mig_layout=all-balanced")
        assert done.returncode == 0, done.stdout + done.stderr
        for line in ("+ create 2g.12gb at 0-1", "+ create 3g.40gb at 4-7", "+ enable MIG mode"):
            assert line in done.stdout
        again = fleet.play("-e", "ds01_mig_layout=all-balanced", "--diff")
        assert again.stdout.count("changed=0") == 2
        assert "as wanted, nothing to do" in again.stdout

    def test_an_unanswered_question_leaves_the_gpus_that_are_named(self, fleet: Fleet) -> None:
        done = fleet.play(
            "-e", "ds01_mig_layout=", "-e", "ds01_mig_layouts_file=", "-e", '{"ds01_mig_gpus": {"0": []}}'
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("+ enable MIG mode") == 2
        assert "+ create" not in done.stdout

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["-e", "ds01_mig_layout={{ 7 * 7 }}"], "ds01_mig_layout"),
            (["-e", "ds01_mig_state=absent"], "value of ds01_mig_state must be one of"),
            (["-e", "ds01_mig_gpus=1"], "ds01_mig_gpus"),
            (["-e", '{"ds01_mig_gpus": {"0": []}, "ds01_mig_layout": "x"}'], "mutually exclusive"),
            (["-e", "ds01_mig_layouts_file=/nowhere.yaml"], "none of them is named"),
            (["-e", "ds01_mig_layout="], "The name of the layout is empty"),
        ],
        ids=["a template", "no such state", "no mapping", "two wishes", "a file and no name", "an unanswered question"],
    )
    def test_inputs(self, options: list[str], problem: str, fleet: Fleet) -> None:
        before = [fleet.state(name) for name in ("gpu1", "gpu2")]
        done = fleet.play(*options)
        assert done.returncode != 0
        assert problem in done.stdout
        assert [fleet.state(name) for name in ("gpu1", "gpu2")] == before
