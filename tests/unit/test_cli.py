"""The command, as far as it goes without a driver: limits, the limits file, usage."""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from typing import NoReturn

import pytest
from ds01 import arguments, cli, overview, terminal
from ds01.allocations import Allocations
from ds01.cli import main
from ds01.errors import Ds01Error
from ds01.paths import Paths
from support import ROOT, Host

LIMITS = """
defaults: {max_mig_instances: 1, max_cpus: 8, memory: 32g, shm_size: 16g, idle_timeout: 48h}
default_group: students
groups:
  researchers:
    members: [alice, bob]
    max_mig_instances: 2
    max_cpus: 16
    memory: 64g
    idle_timeout: 72h
    priority: 50
user_overrides:
  bob: {max_gpus: null, max_cpus: 0.5, idle_timeout: null, gpu_hold_after_stop: 0, max_gpu_equivalents: 2/7}
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def limits(host: Host) -> Host:
    host.limits(LIMITS)
    return host


def test_limits_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "limits", "alice")
    assert (code, err) == (0, "")
    assert out == (
        "User: alice\n"
        "Group: researchers\n"
        "Priority: 50\n"
        "Max MIG Instances: 2\n"
        "Max CPUs: 16\n"
        "Memory: 64g\n"
        "Shared Memory: 16g\n"
        "Max Containers: 3\n"
        "Idle Timeout: 72h\n"
        "GPU Hold After Stop: 24h\n"
        "Container Hold After Stop: 12h\n"
    )


def test_limits_tell_unlimited_from_zero(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "limits", "bob")
    lines = dict(line.split(": ") for line in out.splitlines())
    assert lines["Max MIG Instances"] == "unlimited"
    assert lines["Idle Timeout"] == "unlimited"
    assert lines["GPU Hold After Stop"] == "0"
    assert lines["Max CPUs"] == "0.5"
    assert lines["Memory"] == "64g"


def test_docker_args_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "limits", "alice", "--docker-args")
    assert (code, err) == (0, "")
    assert out == (
        "--cpus=16 --memory=64g --memory-swap=64g --shm-size=16g --pids-limit=4096 "
        "--cgroup-parent=ds01-researchers-alice.slice\n"
    )


@pytest.mark.parametrize(
    ("user", "flag", "value"),
    [
        ("alice", "--group", "researchers"),
        ("alice", "--priority", "50"),
        ("alice", "--max-gpus", "2"),
        ("bob", "--max-gpus", "unlimited"),
        ("alice", "--max-gpus-per-container", "1"),
        ("alice", "--max-gpu-equivalents", "unlimited"),
        ("alice", "--allow-full-gpu", "no"),
        ("alice", "--max-containers", "3"),
        ("alice", "--max-cpus", "16"),
        ("alice", "--memory", "64g"),
        ("alice", "--gpu-hold-time", "24h"),
        ("bob", "--gpu-hold-time", "0"),
        ("alice", "--container-hold-time", "12h"),
        ("alice", "--idle-timeout", "72h"),
        ("alice", "--max-runtime", "168h"),
        ("stranger", "--group", "students"),
        ("mary-ann", "--slice", r"ds01-students-mary\x2dann.slice"),
    ],
)
def test_a_single_value_alone(user: str, flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "limits", user, flag) == (0, f"{value}\n", "")


def test_limits_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "limits", "bob", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert (document["user"], document["group"], document["max_gpus"]) == ("bob", "researchers", None)
    assert (document["max_cpus"], document["memory"], document["allow_full_gpu"]) == (0.5, "64g", False)
    assert document["slice"] == "ds01-researchers-bob.slice"
    assert document["aggregate"]["cpu_quota"] == "150%"
    assert document["docker_args"][0] == "--cpus=0.5"


def test_json_writes_a_null_limit_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "limits", "bob", "--json")
    document = json.loads(out)
    assert document["idle_timeout"] is None
    assert document["gpu_hold_after_stop"] == "0"


HOSTILE = ["..", "a/b", "/etc", "a b", "a\nb", "a\0b", "{{ lookup('pipe', 'id') }}", "$(id)", "-rf", "a" * 300, "a._"]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:20]))
@pytest.mark.parametrize("verb", ["allocate", "release", "mark-stopped", "clear-stopped", "validate"])
def test_a_hostile_container_name_is_refused_before_anything_else(
    verb: str, name: str, limits: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, verb, "--user=alice", f"--container={name}")
    assert (code, out) == (2, "")
    assert err.startswith("ds01: invalid_input: ")
    assert len(err) < 400
    assert not limits.state.exists()


@pytest.mark.parametrize("user", ["", "../etc", "a/b", "-x y", "a\nb", "{{ 7*7 }}", "o" * 300])
def test_limits_of_a_hostile_name(user: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "limits", "--", user)
    assert (code, out) == (2, "")
    assert err.startswith("ds01: ")
    assert err.count("\n") == 1


def test_a_config_error_is_told_on_both_channels(limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limits.limits("defaults: {memry: 64g}\n")
    code, out, err = run(capsys, "limits", "alice", "--json")
    assert code == 2
    assert "defaults.memry: unknown key; did you mean memory?" in err
    document = json.loads(out)
    assert (document["failed"], document["reason"]) == (True, "config_invalid")
    assert "defaults.memry" in document["msg"]


@pytest.mark.parametrize(
    "argv",
    [["limits", "alice"], ["status"], ["allocate", "--user", "alice", "--container", "p"], ["config", "check"]],
    ids=" ".join,
)
def test_nothing_is_guessed_without_a_limits_file(
    argv: list[str], limits: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    limits.config.unlink()
    code, out, err = run(capsys, *argv)
    assert code in (2, 3)
    assert out == ""
    assert err.startswith("ds01: ")
    assert not limits.ledger.exists()


@pytest.mark.parametrize("flag", [None, "--docker-args", *(f"--{name}" for name in terminal.SINGLE_LIMITS)])
@pytest.mark.parametrize(
    "broken", ["groups: {r: {max_gpus: two}}\n", "defaults: [\n", ""], ids=["typed", "torn", "empty"]
)
def test_no_value_is_printed_from_a_broken_file(
    broken: str, flag: str | None, limits: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that reads one value must not get a number to go on with."""
    limits.limits(broken)
    code, out, err = run(capsys, "limits", "alice", *([flag] if flag else []))
    assert (code, out) == (2, "")
    assert "config_invalid" in err


def test_a_member_of_a_members_file_has_the_group_s_limits_at_every_door(
    limits: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = limits.config.parent / "groups"
    directory.mkdir()
    (directory / "researchers.members").write_text("dora\n", encoding="utf-8")
    assert run(capsys, "limits", "dora", "--group")[1] == "researchers\n"
    assert json.loads(run(capsys, "limits", "dora", "--json")[1])["max_gpus"] == 2
    assert Allocations(Paths.from_env()).limits("dora").idle_timeout == timedelta(hours=72)
    assert run(capsys, "limits", "eve", "--group")[1] == "students\n"


def test_config_check(limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "check")
    assert (code, out) == (0, f"{limits.config}: valid (1 groups, 1 user overrides).\n")
    shipped = ROOT / "config" / "resource-limits.yaml"
    code, out, _ = run(capsys, "config", "check", str(shipped), "--json")
    assert (code, json.loads(out)["groups"]) == (0, ["student", "researcher"])
    assert "all-balanced" in json.loads(out)["layouts"]


def test_config_check_reads_the_layouts_beside_it(limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    beside = limits.config.parent / "mig-layouts.yaml"
    beside.write_text("version: v1\nmig-configs: {off: [{devices: all, mig-enabled: false}]}\n", encoding="utf-8")
    code, out, _ = run(capsys, "config", "check")
    assert (code, out.splitlines()[1]) == (0, f"{beside}: valid (1 MIG layouts).")

    divided = "{devices: all, mig-enabled: true, mig-devices: {1c.2g.20gb: 1}}"
    beside.write_text(f"version: v1\nmig-configs: {{divided: [{divided}]}}\n", encoding="utf-8")
    code, out, _ = run(capsys, "config", "check")
    assert (code, out.splitlines()[1]) == (0, f"{beside}: valid (1 MIG layouts).")
    assert out.splitlines()[2].startswith("mig-configs.divided.0.mig-devices.1c.2g.20gb: DS01 makes one compute")
    assert run(capsys, "config", "check", "--strict")[0] == 1

    beside.write_text("version: v1\nmig-configs: {on: [{devices: all, mig-enabled: true}]}\n", encoding="utf-8")
    code, out, err = run(capsys, "config", "check")
    assert (code, out) == (2, "")
    assert f"config_invalid: {beside}: mig-configs.on.0: mig-devices is missing" in err


def test_config_check_says_what_to_look_at_and_what_it_could_not_see(
    limits: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds01.nvml.session", no_driver)
    limits.limits(
        "defaults: {max_gpus: 99}\ngroups: {r: {members: [alice, nobody-knows]}, s: {members: [alice]}, t: }\n"
    )
    lines = [
        "groups.s.members: alice is in r too, which stands first in the file and counts.",
        "groups.t.members: nobody is in this group: list them here or in groups/t.members.",
    ]
    code, out, err = run(capsys, "config", "check")
    assert (code, out.splitlines()) == (0, [f"{limits.config}: valid (3 groups, 0 user overrides).", *lines])
    assert err == "Not compared with hardware and users: The driver sleeps.\n"

    code, out, err = run(capsys, "config", "check", "--strict")
    assert (code, out.splitlines()[1:]) == (1, lines)
    assert f"ds01: findings: {limits.config}: 2 to look at" in err

    code, out, _ = run(capsys, "config", "check", "--json", "--strict")
    document = json.loads(out)
    assert (code, document["not_checked"]) == (1, "The driver sleeps.")
    assert [f"{finding['path']}: {finding['message']}" for finding in document["findings"]] == lines


def no_driver() -> NoReturn:
    raise Ds01Error("driver_unavailable", "The driver sleeps.", "Wake it.")


def test_config_check_without_findings_is_strict_enough(limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "config", "check", "--strict")[0] == 0
    assert json.loads(run(capsys, "config", "check", "--json")[1])["findings"] == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("groups: {r: {members: [a], memory: 8g, memory_swap: 4g}}", "groups.r"),
        ("groups: {r: {members: [a]}, s: {memory: 8g, memory_swap: 4g}}", "groups.s"),
        ("defaults: {memory: 8g, memory_swap: 4g}", "defaults"),
        ("groups: {r: {members: [a, b]}}\nuser_overrides: {b: {memory: 8g, memory_swap: 4g}}", "user_overrides.b"),
        ("groups: {r: {members: [a, b]}}\nuser_overrides: {b: {memory: 8g}, c: {memory_swap: 4g}}", "user_overrides.c"),
        ("groups: {r: {aggregate: {memory_max: 8g, memory_high: 9g}}}", "groups.r"),
    ],
    ids=["a group", "one without members", "nobody's but the default group's", "a later member", "nobody's", "a slice"],
)
def test_config_check_resolves_everybody(
    text: str, place: str, limits: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    limits.limits(f"{text}\n")
    code, out, err = run(capsys, "config", "check")
    assert (code, out) == (2, "")
    assert f"config_invalid: {place}: memory" in err


def test_config_check_of_a_bad_file(limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limits.limits("groups: {r: {memory: 64x}}\n")
    code, out, err = run(capsys, "config", "check")
    assert (code, out) == (2, "")
    assert "config_invalid" in err
    assert "groups.r.memory: '64x'" in err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["limits"],
        ["allocate"],
        ["allocate", "--user", "alice"],
        ["allocate", "--container", "p"],
        ["allocate", "--user", "alice", "--container", "p", "--gpus", "all"],
        ["allocate", "--user", "alice", "--container", "p", "--gpus", "-1"],
        ["allocate", "--user", "alice", "--container", "p", "--gpus", "1.5"],
        ["allocate", "--user", "alice", "--container", "p", "--priority", "high"],
        ["release"],
        ["config"],
    ],
    ids=lambda argv: " ".join(argv) or "nothing",
)
def test_usage_errors_exit_2(argv: list[str], limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: ds01" in capsys.readouterr().err
    assert not limits.state.exists()


def test_releasing_what_nobody_has_is_done(limits: Host, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "release", "--container", "nothing")
    assert (code, "Nothing is allocated" in out) == (0, True)
    assert not limits.ledger.exists()


@pytest.mark.parametrize("verb", ["mark-stopped", "clear-stopped", "validate"])
def test_an_unknown_project_is_refused_and_nothing_is_written(
    verb: str, limits: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, verb, "--container", "nothing")
    assert code == 1
    assert "not_allocated" in err
    assert not limits.ledger.exists()


def typed(parser: argparse.ArgumentParser) -> list[str]:
    """All commands that a parser takes, those of groups with the group before them."""
    found = []
    for group in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        for name, below in group.choices.items():
            found += [f"{name} {command}" for command in typed(below)] or [name]
    return found


def test_whatever_can_be_typed_can_be_carried_out() -> None:
    assert sorted(typed(arguments.parser())) == sorted(cli._VERBS)
    assert overview.QUERIES.keys() == terminal.QUERIES.keys()


@pytest.mark.parametrize("action", ["plan", "apply"])
def test_the_help_says_what_may_be_repeated(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["mig", action, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "once for each GPU, the others stay as they are" in words
    assert "whose devices it may break; may be repeated" in words
    assert ("It does not ask: with neither --layout nor --gpu it cuts every GPU" in words) is (action == "apply")
