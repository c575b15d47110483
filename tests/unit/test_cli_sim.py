"""The command as a process, on a machine of the simulated driver."""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ds01.event_files import LogFiles
from support import ROOT, Host, spec_device

SIM = ROOT / "build" / "sim"

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="the simulated driver is not built: make sim"),
]

THREE = "2g.20gb,2g.20gb,2g.20gb"
LIMITS = """
defaults: {max_gpus: 2, max_gpus_per_container: 2, allow_full_gpu: true, max_containers_per_user: 3}
default_group: students
groups:
  researchers: {members: [alice], priority: 50}
user_overrides:
  nohold: {gpu_hold_after_stop: 0}
  forever: {gpu_hold_after_stop: null}
  slices: {allow_full_gpu: false}
gpu_allocation: {enable_mig: true, mig_profile: 2g.20gb}
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@dataclass(frozen=True)
class Server:
    """One GPU server: a whole GPU (0) and three that are cut in three (1, 2, 3)."""

    host: Host
    sim_state: Path

    @property
    def env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "plugins" / "module_utils"),
            "LD_LIBRARY_PATH": str(SIM),
            "NVML_SIM_STATE": str(self.sim_state),
            "USER": "tester",
            **self.host.env,
        }

    def start(self, *argv: str, **env: str | None) -> subprocess.Popen[str]:
        changed = {key: value for key, value in {**self.env, **env}.items() if value is not None}
        return subprocess.Popen(
            [sys.executable, "-m", "ds01.cli", *argv],
            env=changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ds01(self, *argv: str, **env: str | None) -> Result:
        with self.start(*argv, **env) as process:
            out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return Result(process.returncode, out, err)

    def allocate(self, user: str, container: str, *more: str, **env: str | None) -> Result:
        return self.ds01("allocate", "--user", user, "--container", container, "--json", *more, **env)

    def simulate(self, *changes: str) -> None:
        subprocess.run([SIM / "bin" / "nvml-sim", "set", self.sim_state, *changes], check=True, timeout=20)

    def ledger(self) -> dict[str, Any]:
        if not self.host.ledger.exists():
            return {}
        return json.loads(self.host.ledger.read_bytes())["allocations"]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.host.events.read_text(encoding="utf-8").splitlines()]

    def write_nvidia_spec(self) -> None:
        """A spec of all devices by UUID, in the place and form of `nvidia-ctk cdi generate`."""
        devices = [
            spec_device(device["uuid"], device["id"][0]) for device in self.ds01("status", "--json").json["devices"]
        ]
        spec = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": {}}
        self.host.cdi.mkdir()
        (self.host.cdi / "nvidia.json").write_text(json.dumps(spec), encoding="utf-8")


@pytest.fixture(scope="module")
def machine_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("sim") / "gpus"
    cut = [part for gpu in (1, 2, 3) for part in ("--mig", f"{gpu}={THREE}")]
    command = [SIM / "bin" / "nvml-sim", "init", state, "--gpus", "4xA100-SXM4-80GB", "--unprivileged", *cut]
    subprocess.run(command, check=True, timeout=20, capture_output=True)
    return state


@pytest.fixture
def server(host: Host, machine_state: Path) -> Server:
    state = host.root / "gpus"
    shutil.copy(machine_state, state)
    host.limits(LIMITS)
    return Server(host, state)


def test_the_life_of_an_allocation(server: Server) -> None:
    granted = server.allocate("alice", "my-project")
    assert (granted.code, granted.json["reason"], granted.json["changed"]) == (0, "granted", True)
    allocation = granted.json["allocation"]
    assert (allocation["gpu_id"], allocation["status"], allocation["priority"]) == ("1:0", "pending", 50)
    assert allocation["device"] == "ds01.io/gpu=my-project._.alice"
    (device,) = allocation["devices"]
    assert device["uuid"].startswith("MIG-")
    assert (device["profile"], device["equivalents"]) == ("2g.20gb", "2/7")

    again = server.allocate("alice", "my-project._.alice")
    assert (again.code, again.json["reason"], again.json["changed"]) == (0, "already_allocated", False)

    status = server.ds01("status", "--json").json
    assert Counter(d["status"] for d in status["devices"]) == {"free": 9, "pending": 1}
    assert [(a["container"], a["hold_ends"]) for a in status["allocations"]] == [("my-project._.alice", None)]

    assert server.ds01("validate", "--container", "my-project", "--gpu", "1:0").code == 0
    assert server.ds01("validate", "--container", "my-project", "--gpu", "1.0").code == 0
    assert server.ds01("validate", "--container", "my-project", "--gpu", device["uuid"]).code == 0
    wrong = server.ds01("validate", "--container", "my-project", "--gpu", "0")
    assert (wrong.code, "not_allocated" in wrong.err) == (1, True)

    held = server.ds01("mark-stopped", "--container", "my-project", "--user", "alice", "--json")
    assert (held.code, held.json["reason"], held.json["allocation"]["status"]) == (0, "held", "held")
    assert server.ds01("status", "--json").json["allocations"][0]["hold_ends"].endswith("Z")
    before = server.host.tree()
    assert server.ds01("mark-stopped", "--container", "my-project").code == 0
    assert server.host.tree() == before

    active = server.ds01("clear-stopped", "--container", "my-project", "--json")
    assert (active.code, active.json["reason"], active.json["allocation"]["stopped_at"]) == (0, "active", None)
    assert active.json["allocation"]["status"] == "active", "what runs again is not pending"

    released = server.ds01("release", "--container", "my-project", "--json")
    assert (released.code, released.json["reason"], released.json["allocation"]) == (0, "released", None)
    assert server.ledger() == {}
    assert [(e["event"], e["user"], e["container"], e["actor"]) for e in server.events()] == [
        (event, "alice", "my-project._.alice", "tester") for event in ("gpu.allocated", "gpu.held", "gpu.released")
    ]


def test_a_repeated_run_touches_nothing(server: Server) -> None:
    server.allocate("alice", "p")
    before = server.host.tree()
    for argv in (["status"], ["validate", "--container", "p"], ["allocate", "--user", "alice", "--container", "p"]):
        assert server.ds01(*argv).code == 0
    assert server.host.tree() == before


@pytest.mark.parametrize("verb", ["release", "mark-stopped", "clear-stopped"])
def test_what_is_not_allocated(verb: str, server: Server) -> None:
    result = server.ds01(verb, "--container", "p._.alice", "--json")
    assert result.json["reason"] == "not_allocated"
    assert result.code == (0 if verb == "release" else 1)
    assert result.json["changed"] is False


def test_refusals_say_why(server: Server) -> None:
    assert server.allocate("alice", "a", "--gpus", "2").code == 0
    refused = server.allocate("alice", "b")
    assert (refused.code, refused.json["reason"], refused.json["failed"]) == (1, "user_at_limit", True)
    assert "1:0,2:0 in a._.alice" in refused.json["msg"]
    assert refused.err.startswith("ds01: user_at_limit: ")
    for user, argv, reason in (
        ("slices", ["--profile", "full"], "full_gpu_not_allowed"),
        ("bob", ["--profile", "7g.80gb"], "profile_not_available"),
        ("bob", ["--gpus", "3"], "container_limit"),
        ("bob", ["--max-gpus", "0"], "user_at_limit"),
    ):
        result = server.allocate(user, "p", *argv)
        assert (result.code, result.json["reason"]) == (1, reason)
    assert set(server.ledger()) == {"a._.alice"}
    assert [e["event"] for e in server.events()] == ["gpu.allocated"] + ["gpu.refused"] * 5


def test_a_whole_gpu_and_a_cpu_only_container(server: Server) -> None:
    assert server.allocate("bob", "p", "--profile", "full").json["allocation"]["gpu_id"] == "0"
    cpu = server.allocate("bob", "q", "--gpus", "0", LD_LIBRARY_PATH=None)
    assert (cpu.code, cpu.json["allocation"], "CPU-only" in cpu.json["msg"]) == (0, None, True)
    assert set(server.ledger()) == {"p._.bob"}


@pytest.mark.parametrize(("user", "kept", "reason"), [("nohold", False, "released"), ("forever", True, "held")])
def test_no_hold_and_a_hold_without_end(user: str, kept: bool, reason: str, server: Server) -> None:
    server.allocate(user, "p")
    result = server.ds01("mark-stopped", "--container", "p", "--json")
    assert (result.code, result.json["reason"]) == (0, reason)
    assert bool(server.ledger()) is kept
    status = server.ds01("status", "--json").json["allocations"]
    assert [a["hold_ends"] for a in status] == ([None] if kept else [])


def test_a_dry_run_changes_nothing(server: Server) -> None:
    before = server.host.tree()
    result = server.allocate("alice", "p", "--dry-run")
    assert (result.code, result.json["reason"], result.json["changed"]) == (0, "granted", True)
    assert server.host.tree() == before
    assert not server.host.state.exists()


def test_somebody_else_s_container_is_not_touched(server: Server) -> None:
    server.allocate("alice", "p")
    before = server.host.tree()
    for verb in ("release", "mark-stopped", "clear-stopped"):
        assert server.ds01(verb, "--container", "p._.alice", "--user", "bob").code == 2
    assert server.host.tree() == before


def test_an_ambiguous_project_is_not_guessed(server: Server) -> None:
    server.allocate("alice", "p")
    server.allocate("bob", "p")
    before = server.host.tree()
    result = server.ds01("release", "--container", "p")
    assert result.code == 2
    assert "p._.alice, p._.bob" in result.err
    assert server.host.tree() == before


@pytest.mark.skipif(ctypes.util.find_library("nvidia-ml") is not None, reason="this machine has a real driver")
def test_without_a_driver_nothing_changes(server: Server) -> None:
    server.allocate("alice", "p")
    before = server.host.tree()
    for argv in (["allocate", "--user", "bob", "--container", "q"], ["status"], ["validate", "--container", "p"]):
        result = server.ds01(*argv, LD_LIBRARY_PATH=None)
        assert result.code == 3
        assert result.err.startswith("ds01: driver_unavailable: ")
        assert server.host.tree() == before


@pytest.mark.parametrize("fault", ["loaded=off", "version-mismatch=on"])
def test_a_driver_that_does_not_answer_is_unavailable(fault: str, server: Server) -> None:
    server.simulate(fault)
    result = server.allocate("alice", "p")
    assert (result.code, result.json["reason"]) == (3, "driver_unavailable")
    assert server.ledger() == {}


def test_releasing_needs_no_driver(server: Server) -> None:
    server.allocate("alice", "p")
    assert server.ds01("mark-stopped", "--container", "p", LD_LIBRARY_PATH=None).code == 0
    assert server.ds01("release", "--container", "p", LD_LIBRARY_PATH=None).code == 0
    assert server.ledger() == {}


def test_without_an_engine_nothing_changes(server: Server) -> None:
    server.allocate("alice", "p")
    before = server.host.tree()
    result = server.allocate("bob", "q", DS01_ENGINE=None, DOCKER_HOST="unix:///nonexistent")
    assert (result.code, result.json["reason"]) == (3, "engine_unavailable")
    assert "unix:///nonexistent" in result.err
    assert server.host.tree() == before


@pytest.mark.parametrize("content", ["{", "[]"], ids=ascii)
def test_a_broken_ledger_stops_everything_and_stays(content: str, server: Server) -> None:
    server.host.state.mkdir()
    server.host.ledger.write_text(content, encoding="utf-8")
    before = server.host.tree()
    result = server.allocate("alice", "p")
    assert (result.code, result.json["reason"]) == (3, "ledger_damaged")
    assert server.host.tree() == before


def test_a_log_that_cannot_be_written_never_hides_a_grant(server: Server) -> None:
    server.host.log.write_text("a file where the directory should be", encoding="utf-8")
    result = server.allocate("alice", "p")
    assert (result.code == 0) is bool(server.ledger())


def test_a_lost_gpu_is_not_given_and_the_others_are(server: Server) -> None:
    server.allocate("alice", "p")
    server.simulate("lost=1")
    result = server.ds01("validate", "--container", "p")
    assert (result.code, "gpu_unhealthy" in result.err) == (1, True)
    assert server.allocate("bob", "q").json["allocation"]["gpu_id"] == "2:0"
    gpus = server.ds01("status", "--json").json["gpus"]
    assert [g["health"] for g in gpus] == ["ok", "lost", "ok", "ok"]


@pytest.mark.parametrize("fault", ["remap-pending=0", "remap-failed=0"])
def test_a_gpu_that_waits_for_repair_is_not_given(fault: str, server: Server) -> None:
    server.simulate(fault)
    result = server.allocate("bob", "q", "--profile", "full")
    assert (result.code, result.json["reason"]) == (1, "gpu_unhealthy")


def test_a_gpu_in_mig_mode_without_instances_is_not_given(server: Server) -> None:
    command = [SIM / "bin" / "nvml-sim", "init", server.sim_state, "--gpus", "2xA100-SXM4-80GB", "--mig", "0="]
    subprocess.run(command, check=True, timeout=20)
    assert server.allocate("bob", "p", "--profile", "full").json["allocation"]["gpu_id"] == "1"
    assert server.allocate("bob", "q", "--profile", "full").json["reason"] == "no_gpu_available"
    assert server.allocate("bob", "q").json["reason"] == "profile_not_available"


def test_the_grant_is_projected_and_a_release_withdraws_it(server: Server) -> None:
    server.write_nvidia_spec()
    uuid = server.allocate("alice", "p").json["allocation"]["devices"][0]["uuid"]
    file = server.host.cdi / "ds01-p._.alice.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    assert (written["kind"], written["devices"][0]["name"]) == ("ds01.io/gpu", "p._.alice")
    assert written["annotations"]["ds01.io/uuids"] == uuid
    assert oct(file.stat().st_mode & 0o777) == "0o644"
    assert server.ds01("validate", "--container", "p").code == 0

    file.unlink()
    assert server.ds01("validate", "--container", "p").code in (0, 1)
    assert server.allocate("alice", "p").code == 0
    assert file.exists(), "an allocation is projected again when its file is gone"

    server.ds01("mark-stopped", "--container", "p")
    assert file.exists(), "a held allocation may start"
    server.ds01("release", "--container", "p")
    assert not file.exists()


def test_a_device_that_nvidia_s_spec_does_not_hold_is_refused(server: Server) -> None:
    server.write_nvidia_spec()
    spec = server.host.cdi / "nvidia.json"
    spec.write_text('{"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": []}', encoding="utf-8")
    result = server.allocate("alice", "p")
    assert (result.code, result.json["reason"]) == (3, "driver_unavailable")
    assert "nvidia-ctk cdi generate" in result.json["msg"]
    assert server.ledger() == {}


# Imports once, then forks: all processes run the command in the same instant.
_CROWD = """
import json, os, sys
import fastjsonschema, pynvml, yaml
from ds01 import config
from ds01.cli import main
from ds01.paths import Paths
schema = json.loads(config.find_schema(Paths.from_env().config, config.SCHEMA_NAME).read_text())
validate = fastjsonschema.compile(schema, use_default=False)
fastjsonschema.compile = lambda *_, **__: validate  # compiling takes longer than the command
start, go = os.pipe()
for number, argv in enumerate(json.load(sys.stdin)):
    if os.fork() == 0:
        os.close(go)
        for fd in (1, 2):
            os.dup2(os.open(f"{sys.argv[1]}/{number}.{fd}", os.O_WRONLY | os.O_CREAT), fd)
        os.read(start, 1)
        code = main(argv)
        sys.stdout.flush()
        os._exit(code)
os.close(go)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def crowd(server: Server, commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """What each command printed, all run at once by processes of their own."""
    outputs = server.host.root.parent / f"{server.host.root.name}-outputs"
    outputs.mkdir()
    command = [sys.executable, "-c", _CROWD, outputs]
    subprocess.run(command, env=server.env, input=json.dumps(commands), text=True, check=True, timeout=60)
    assert [f.read_text() for f in sorted(outputs.glob("*.2")) if "Traceback" in f.read_text()] == []
    return [json.loads((outputs / f"{number}.1").read_bytes()) for number in range(len(commands))]


def test_hostile_names_are_usage_errors_and_change_nothing(server: Server) -> None:
    server.allocate("bob", "p")
    before = server.host.tree()
    names = ["", "..", "../../etc", "a b", "a\nb", "{{ lookup('pipe', 'id') }}", "$(id)", "-rf", "a" * 300]
    cases = [("alice", name) for name in names] + [(name, "p") for name in names]
    commands = [
        [verb, f"--user={user}", f"--container={container}", "--json"]
        for user, container in cases
        for verb in ("allocate", "release")
    ]
    reasons = [result["reason"] for result in crowd(server, commands)]
    accepted = [
        c for c, reason in zip(commands, reasons, strict=True) if reason not in ("invalid_input", "unknown_user")
    ]
    assert accepted == []
    assert server.host.tree() == before


@pytest.mark.parametrize(
    ("profile", "devices"), [("2g.20gb", 9), ("null", 10)], ids=["nine slices", "nine slices and a whole GPU"]
)
def test_fifty_processes_at_once_never_get_one_device_twice(profile: str, devices: int, server: Server) -> None:
    server.host.limits(LIMITS.replace("mig_profile: 2g.20gb", f"mig_profile: {profile}"))
    results = crowd(server, [["allocate", f"--user=user{n}", "--container=p", "--json"] for n in range(50)])
    assert Counter(r["reason"] for r in results) == {"granted": devices, "no_gpu_available": 50 - devices}
    uuids = [d["uuid"] for r in results if r["allocation"] for d in r["allocation"]["devices"]]
    assert len(set(uuids)) == devices
    written = [d["uuid"] for a in server.ledger().values() for d in a["devices"]]
    assert sorted(written) == sorted(uuids)
    assert json.loads(server.host.ledger.read_bytes())["generation"] == devices
    assert Counter(e["event"] for e in server.events()) == {"gpu.allocated": devices, "gpu.refused": 50 - devices}


def test_one_container_asked_for_by_many_processes_is_one_allocation(server: Server) -> None:
    results = crowd(server, [["allocate", "--user=alice", "--container=p", "--json"]] * 8)
    assert Counter(r["reason"] for r in results) == {"granted": 1, "already_allocated": 7}
    assert len({r["allocation"]["gpu_id"] for r in results}) == 1


def test_one_user_s_quota_holds_against_parallel_requests(server: Server) -> None:
    results = crowd(server, [["allocate", "--user=bob", f"--container=p{n}", "--json"] for n in range(8)])
    assert Counter(r["reason"] for r in results) == {"granted": 2, "user_at_limit": 6}
    assert sum(len(a["devices"]) for a in server.ledger().values()) == 2


def test_allocating_and_releasing_at_once_leaves_a_whole_ledger(server: Server) -> None:
    commands = [
        [verb, f"--user=user{n}", "--container=p", "--json"] for n in range(8) for verb in ("allocate", "release")
    ]
    results = crowd(server, commands)
    assert {r["reason"] for r in results} <= {"granted", "released", "not_allocated"}
    released = sum(r["reason"] == "released" for r in results)
    assert len(server.ledger()) == 8 - released


def test_query_lists_users_beside_their_limits_and_gpus_with_what_is_taken(server: Server) -> None:
    server.allocate("alice", "my-project")
    server.ds01("mark-stopped", "--container", "my-project")
    (user,) = server.ds01("query", "users", "--json").json
    assert (user["user"], user["devices"], user["held"], user["gpu_equivalents"]) == ("alice", 1, 1, "2/7")
    gpus = server.ds01("query", "gpus", "--json").json
    assert [(g["index"], g["allocated"], g["devices"]) for g in gpus] == [(0, 0, 1), (1, 1, 3), (2, 0, 3), (3, 0, 3)]
    assert server.ds01("query", "containers", "--json").json == []
    assert "alice" in server.ds01("query", "users").out


def test_config_check_compares_the_file_with_the_server(server: Server) -> None:
    file = server.host.root / "another.yaml"
    file.write_text(
        "defaults: {max_gpus: 2}\n"
        "groups:\n"
        "  r: {members: [root], max_mig_instances: 10}\n"
        "  many: {members: [daemon, no-such-user], max_gpu_equivalents: 18/7}\n"
        "user_overrides:\n"
        "  root: {reserved_gpus: ['9'], reservation_start: '2025-01-01', reservation_end: '2999-01-01'}\n"
        "gpu_allocation: {mig_profile: 3g.40gb}\n",
        encoding="utf-8",
    )
    checked = server.ds01("config", "check", str(file), "--json")
    assert (checked.code, checked.json["not_checked"], checked.err) == (0, None, "")
    assert {finding["path"]: finding["message"] for finding in checked.json["findings"]} == {
        "groups.r.max_mig_instances": "max_gpus is 10, but this server has 9 MIG devices; allow_full_gpu is false.",
        "groups.many.members": "not a login name of this server: no-such-user.",
        "user_overrides.root.reserved_gpus": "this server has no 9; see: ds01 status.",
        "gpu_allocation.mig_profile": "this server has no 3g.40gb device; it has: 2g.20gb, full.",
    }
    shown = server.ds01("config", "check", str(file), "--strict")
    assert (shown.code, len(shown.out.splitlines()), "findings" in shown.err) == (1, 5, True)


def test_events_are_shown_for_people_and_line_by_line_for_programs(server: Server) -> None:
    assert server.ds01("events").out == "", "no log yet is no error"
    server.allocate("alice", "a")
    server.allocate("bob", "b")
    with (server.host.log / "events.jsonl").open("a", encoding="utf-8") as log:
        log.write("torn{\n[]\n")
    server.ds01("release", "--container", "a")
    told = [json.loads(line) for line in server.ds01("events", "--json").out.splitlines()]
    assert [e["event"] for e in told] == ["gpu.allocated", "gpu.allocated", "gpu.released"]
    assert server.ds01("events", "--user", "bob").out.count("\n") == 1
    assert "p._.nobody" not in server.ds01("events", "--container", "a._.alice", "--lines", "9").out


def test_events_of_older_files_are_shown_too(server: Server) -> None:
    for user in ("alice", "bob", "carol"):
        server.allocate(user, "p")
        LogFiles(server.host.events).rotate(1, 9)
    shown = server.ds01("events", "--json", "--lines", "2").out.splitlines()
    assert [json.loads(line)["user"] for line in shown] == ["bob", "carol"]
    assert server.ds01("events", "--user", "alice").out.count("\n") == 1


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not there")
def test_jq_reads_all_files_in_the_order_of_time(server: Server) -> None:
    for user in ("alice", "bob", "carol"):
        server.allocate(user, "p")
        LogFiles(server.host.events).rotate(1, 9)
    files = sorted(server.host.log.glob("events*.jsonl"))
    found = subprocess.run(
        ["/usr/bin/env", "jq", "-r", 'select(.event == "gpu.allocated") | .user', *files],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert found.stdout.split() == ["alice", "bob", "carol"]


def test_following_events_shows_what_comes(server: Server) -> None:
    server.allocate("alice", "a")
    follower = server.start("events", "--follow", "--json")
    try:
        assert follower.stdout is not None
        assert json.loads(follower.stdout.readline())["event"] == "gpu.allocated"
        server.ds01("release", "--container", "a")
        assert json.loads(follower.stdout.readline())["event"] == "gpu.released"
        assert LogFiles(server.host.events).rotate(1, 9)
        server.allocate("bob", "b")
        assert json.loads(follower.stdout.readline())["user"] == "bob"
    finally:
        follower.terminate()
        follower.wait(10)
