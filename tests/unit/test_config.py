"""The limits file on disk: every way to get it wrong is refused, with the place in the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ds01_gpu_allocate
import pytest
from ds01 import config, limits
from ds01.errors import Ds01Error
from support import ROOT, Host


def problem(path: Path) -> str:
    """What is wrong with the limits file, without its own path."""
    with pytest.raises(Ds01Error) as caught:
        config.load(path)
    assert caught.value.reason == "config_invalid"
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1500
    return str(caught.value).replace(str(path.parent), "")


def test_the_shipped_limits_file_is_valid() -> None:
    checked = config.load(ROOT / "config" / "resource-limits.yaml")
    alice = limits.resolve(checked, "alice")
    assert (alice.group, alice.max_gpus, alice.aggregate.cpu_quota) == ("researcher", 2, "4800%")
    assert limits.resolve(checked, "nobody-knows").group == checked.default_group


HOSTILE: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["is empty"]),
    "only comments": ("# nothing\n", ["is empty"]),
    "null": ("null\n", ["is empty"]),
    "a list": ("- defaults\n", ["the file", "a mapping of sections"]),
    "a word": ("defaults\n", ["the file", "a mapping of sections"]),
    "false": ("false\n", ["the file", "a mapping of sections"]),
    "not YAML": ("defaults: [\n", ["line 2"]),
    "tab": ("defaults:\n\tmemory: 64g\n", ["line 2"]),
    "NUL": ("defaults: \0\n", ["not YAML"]),
    "two documents": ("---\ndefaults: {}\n---\ndefaults: {}\n", ["line 3", "another document"]),
    "Python object": ("defaults: !!python/object/apply:os.system [id]\n", ["line 1"]),
    "undefined alias": ("defaults: *nothing\n", ["line 1", "undefined alias"]),
    "unhashable key": ("? [a]\n: b\n", ["line 1"]),
    "duplicate section": ("defaults: {memory: 1g}\ngroups: {}\ndefaults: {}\n", ["line 3", "'defaults'", "twice"]),
    "duplicate key": ("defaults:\n  memory: 1g\n  memory: 2g\n", ["line 3", "'memory'", "twice"]),
    "duplicate group": ("groups:\n  a: {}\n  b: {}\n  a: {}\n", ["line 4", "'a'", "twice"]),
    "duplicate user": ("user_overrides:\n  a: {}\n  a: {}\n", ["line 3", "'a'", "twice"]),
    "unknown section": ("group: {}\n", ["group: unknown key", "did you mean groups?"]),
    "unknown key": ("defaults: {memry: 64g}\n", ["defaults.memry: unknown key", "did you mean memory?"]),
    "unknown key, nothing near": ("gpu_allocation: {xyzzy: 1}\n", ["gpu_allocation.xyzzy: unknown key", "strategy"]),
    "unknown key in a group": ("groups: {r: {max_gpu: 1}}\n", ["groups.r.max_gpu", "did you mean max_gpus?"]),
    "unknown key in an override": ("user_overrides: {a: {priorty: 1}}\n", ["user_overrides.a.priorty", "priority?"]),
    "unknown key in an aggregate": (
        "groups: {r: {aggregate: {cpuquota: '1%'}}}\n",
        ["groups.r.aggregate.cpuquota", "did you mean cpu_quota?"],
    ),
    "members in the defaults": ("defaults: {members: [a]}\n", ["defaults.members: unknown key"]),
    "aggregate in the defaults": ("defaults: {aggregate: {}}\n", ["defaults.aggregate: unknown key"]),
    "section of the wrong type": ("defaults: [memory]\n", ["defaults", "a mapping of limits"]),
    "group of the wrong type": ("groups: {r: [a]}\n", ["groups.r", "a mapping of limits"]),
    "members as a word": ("groups: {r: {members: bob}}\n", ["groups.r.members", "a list of names"]),
    "size without unit": ("defaults: {memory: 64}\n", ["defaults.memory: 64", "with its unit"]),
    "size in quotes without unit": ("defaults: {memory: '64'}\n", ["defaults.memory: '64'", "with its unit"]),
    "size with a wrong unit": ("defaults: {memory: 64x}\n", ["defaults.memory: '64x'", "with its unit"]),
    "negative size": ("defaults: {memory: -64g}\n", ["defaults.memory: '-64g'"]),
    "duration without unit": ("defaults: {idle_timeout: 48}\n", ["defaults.idle_timeout: 48", "with its unit"]),
    "duration with a wrong unit": ("defaults: {idle_timeout: 2w}\n", ["defaults.idle_timeout: '2w'"]),
    "duration as a time of day": ("defaults: {idle_timeout: 1:30}\n", ["defaults.idle_timeout"]),
    "duration beyond every calendar": ("defaults: {idle_timeout: 99999999999999d}\n", ["defaults.idle_timeout"]),
    "duration false": ("defaults: {idle_timeout: false}\n", ["defaults.idle_timeout"]),
    "old duration with a unit": ("defaults: {idle_timeout_h: 1h}\n", ["defaults.idle_timeout_h: '1h'"]),
    "old duration true": ("defaults: {idle_timeout_h: true}\n", ["defaults.idle_timeout_h: True"]),
    "negative old duration": ("defaults: {idle_timeout_h: -1}\n", ["defaults.idle_timeout_h: -1"]),
    "limit under two names": ("defaults: {max_gpus: 1, max_mig_instances: 1}\n", ["max_gpus is set twice"]),
    "count as text": ("defaults: {max_gpus: '2'}\n", ["defaults.max_gpus: '2'", "a whole number"]),
    "count as true": ("defaults: {max_gpus: true}\n", ["defaults.max_gpus: True", "a whole number"]),
    "count as yes": ("defaults: {max_mig_instances: yes}\n", ["defaults.max_mig_instances: True"]),
    "count with a fraction": ("defaults: {max_gpus: 1.5}\n", ["defaults.max_gpus: 1.5", "a whole number"]),
    "count as a float": ("defaults: {pids_limit: 4096.0}\n", ["defaults.pids_limit: 4096.0", "a whole number"]),
    "count as a device id": ("defaults: {max_mig_instances: 1:0}\n", ["defaults.max_mig_instances"]),
    "negative count": ("defaults: {max_gpus: -1}\n", ["defaults.max_gpus: -1"]),
    "infinite cpus": ("defaults: {max_cpus: .inf}\n", ["defaults.max_cpus"]),
    "cpus that are no number": ("defaults: {max_cpus: .nan}\n", ["defaults.max_cpus"]),
    "cpus as true": ("defaults: {max_cpus: true}\n", ["defaults.max_cpus: True"]),
    "cpus in words": ("defaults: {max_cpus: eight}\n", ["defaults.max_cpus: 'eight'"]),
    "equivalents of nothing": ("defaults: {max_gpu_equivalents: 2/0}\n", ["defaults.max_gpu_equivalents: '2/0'"]),
    "flag as text": ("defaults: {allow_full_gpu: 'yes'}\n", ["defaults.allow_full_gpu: 'yes'", "true or false"]),
    "flag as null": ("defaults: {allow_full_gpu: null}\n", ["defaults.allow_full_gpu: None", "true or false"]),
    "priority 0": ("defaults: {priority: 0}\n", ["defaults.priority: 0", "1 (lowest) to 100"]),
    "priority 101": ("defaults: {priority: 101}\n", ["defaults.priority: 101"]),
    "priority null": ("defaults: {priority: null}\n", ["defaults.priority: None"]),
    "number that is none": ("defaults: {priority: !!int x}\n", ["priority"]),
    "number of 5000 digits": (f"defaults: {{priority: {'9' * 5000}}}\n", ["resource-limits.yaml"]),
    "member no": ("groups: {r: {members: [no]}}\n", ["groups.r.members.0: False", "a quoted name"]),
    "member as a number": ("groups: {r: {members: [1001]}}\n", ["groups.r.members.0: 1001", "a quoted name"]),
    "group with a space": (
        "groups: {good: {members: [bob]}, 'a b': {}}\n",
        ["groups: 'a b' is not", "a group name of letters, digits, '_', '.', '@' and '-'"],
    ),
    "group with an umlaut": ("groups: {höhere: {members: [bob]}}\n", ["groups: 'höhere' is not", "a group name of"]),
    "group with a slash": ("groups: {'../a': {}}\n", ["groups", "../a"]),
    "group with a newline": ('groups: {"a\\n": {}}\n', ["groups: 'a\\n' is not", "a group name of"]),
    "variable with a dash": (
        "containers: {environment: {GOOD: '1', A-B: '2'}}\n",
        ["containers.environment: 'A-B' is not", "a variable name of letters, digits and '_'"],
    ),
    "default group with a newline": ('default_group: "student\\n"\n', ["default_group"]),
    "octal count": ("defaults: {max_mig_instances: 010}\n", ["defaults.max_mig_instances: '010'"]),
    "reserved device as a number": ("user_overrides: {a: {reserved_gpus: [0]}}\n", ["reserved_gpus.0: 0", "quoted"]),
    "reservation without an end": (
        "user_overrides: {a: {reserved_gpus: ['0'], reservation_start: '2025-01-01'}}\n",
        ["user_overrides.a", "reservation_end"],
    ),
    "reservation on no day": (
        "user_overrides: {a: {reserved_gpus: ['0'], reservation_start: 2025-02-30, reservation_end: 2025-03-01}}\n",
        ["resource-limits.yaml"],
    ),
    "unknown strategy": ("gpu_allocation: {strategy: fastest}\n", ["gpu_allocation.strategy: 'fastest'", "packed"]),
    "profile without a dot": ("gpu_allocation: {mig_profile: 2g20gb}\n", ["gpu_allocation.mig_profile: '2g20gb'"]),
    "pending timeout without unit": ("policies: {pending_timeout: 10}\n", ["policies.pending_timeout: 10"]),
    "unknown reclaim policy": ("policies: {reclaim_holds: always}\n", ["policies.reclaim_holds: 'always'"]),
    "unknown MIG strategy": (
        "gpu_allocation: {mig_strategy: auto}\n",
        ["gpu_allocation.mig_strategy: 'auto'", "dynamic"],
    ),
    "a service without its kind": (
        "policies: {mig_services: [nvidia-dcgm]}\n",
        ["policies.mig_services.0: 'nvidia-dcgm'", "such as dcgm-exporter.service"],
    ),
    "another kind of unit": (
        "policies: {mig_services: [docker.socket]}\n",
        ["policies.mig_services.0: 'docker.socket'"],
    ),
    "a service that is a path": ("policies: {mig_services: [/etc/a.service]}\n", ["policies.mig_services.0"]),
    "a service that is an option": ("policies: {mig_services: [--all.service]}\n", ["policies.mig_services.0"]),
    "a service with a newline": ('policies: {mig_services: ["a.service\\n"]}\n', ["policies.mig_services.0"]),
    "one service, not in a list": (
        "policies: {mig_services: a.service}\n",
        ["policies.mig_services: 'a.service'", "a list of systemd units"],
    ),
    "quota without per cent": ("groups: {r: {aggregate: {cpu_quota: 4800}}}\n", ["aggregate.cpu_quota: 4800"]),
    "log without unit": ("events: {rotate_at: 16}\n", ["events.rotate_at: 16", "such as 16m"]),
    "log of no size": ("events: {rotate_at: 0m}\n", ["events.rotate_at", "0 would set the log aside for every event"]),
    "no older log": ("events: {keep: 0}\n", ["events.keep: 0", "from 1"]),
    "relative directory of metrics": ("metrics: {textfile_directory: prom}\n", ["metrics.textfile_directory: 'prom'"]),
    "unknown metrics": (
        "metrics: {textfile: /a}\n",
        ["unknown key; did you mean textfile_directory"],
    ),
    "relative mount": ("containers: {allowed_mounts: [data]}\n", ["containers.allowed_mounts.0: 'data'"]),
    "environment with a number": ("containers: {environment: {A: 1}}\n", ["containers.environment.A: 1", "quoted"]),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_limits_file(text: str, words: list[str], host: Host) -> None:
    told = problem(host.limits(text))
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe\x00", b"defaults: {memory: \xe9}\n", bytes(range(256))],
    ids=["UTF-16", "Latin-1", "noise"],
)
def test_bytes_that_are_no_text(data: bytes, host: Host) -> None:
    host.config.write_bytes(data)
    problem(host.config)


def test_a_missing_limits_file_says_how_to_get_one(host: Host) -> None:
    host.config.unlink()
    assert "cannot be read (No such file or directory)" in (told := problem(host.config))
    assert "DS01_CONFIG" in told


def test_a_directory_is_no_limits_file(host: Host) -> None:
    host.config.unlink()
    host.config.mkdir()
    assert "cannot be read (Is a directory)" in problem(host.config)


def test_an_enormous_limits_file_is_refused_unparsed(host: Host) -> None:
    assert "larger than 4 MiB" in problem(host.limits("# x\n" * 1_100_000))


def test_an_alias_is_what_it_stands_for(host: Host) -> None:
    checked = config.load(
        host.limits("groups:\n  a: &a {max_gpus: 2}\n  b: {<<: *a, members: [bob], memory: 1g}\n  c: *a\n")
    )
    bob = limits.resolve(checked, "bob")
    assert (bob.group, bob.max_gpus, bob.memory) == ("b", 2, "1g")


def test_an_alias_of_itself_is_refused(host: Host) -> None:
    assert "defaults.memory" in problem(host.limits("defaults: &d {memory: *d}\n"))


def test_a_bomb_of_aliases_is_refused_in_few_words(host: Host) -> None:
    levels = ["&a0 [" + ", ".join(["lol"] * 9) + "]"]
    levels += [f"&a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, 6)]
    assert "groups.r.members" in problem(host.limits(f"groups: {{r: {{members: {{x: [{', '.join(levels)}]}}}}}}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "defaults:\ngroups:\nuser_overrides:\ndefault_group:\ngpu_allocation:\npolicies:\ncontainers:\n",
        "gpu_allocation:\n  # only a comment\n",
        "groups:\n  student:\n  researcher:\n    members:\n    aggregate:\nuser_overrides:\n  alice:\n",
        "containers: {aliases: null, environment: null, allowed_mounts: null}\n",
    ],
    ids=["every section", "only a comment in it", "groups and users", "in containers"],
)
def test_null_sections_give_the_built_in_limits(text: str, host: Host) -> None:
    checked = config.load(host.limits(text))
    assert limits.resolve(checked, "alice") == limits.resolve(limits.parse_config({}), "alice")


def test_what_yaml_takes_for_something_else_is_a_name_where_a_name_stands(host: Host) -> None:
    checked = config.load(
        host.limits(
            "groups: {no: {members: ['1001'], priority: 7}, 5: {}}\n"
            "user_overrides:\n"
            "  1001: {max_gpus: 4}\n"
            "  on: {reserved_gpus: [1:0], reservation_start: '2025-11-01', reservation_end: '2025-11-02'}\n"
        )
    )
    value = limits.resolve(checked, "1001")
    assert (value.group, value.priority, value.max_gpus) == ("no", 7, 4)
    assert set(checked.groups) == {"no", "5"}
    assert [(r.user, r.devices) for r in checked.reservations] == [("on", ("1:0",))]


def test_services_and_the_mig_strategy_of_a_file(host: Host) -> None:
    names = ["nvidia-dcgm.service", "dcgm-exporter@0.service", "a\\x2db.service"]
    checked = config.load(host.limits(json.dumps({"policies": {"mig_services": names}})))
    assert checked.policies.mig_services == tuple(names)
    assert checked.gpu.mig_strategy == "static"
    checked = config.load(host.limits("gpu_allocation: {mig_strategy: dynamic}\npolicies: {mig_services: null}\n"))
    assert (checked.gpu.mig_strategy, checked.policies.mig_services) == ("dynamic", ())


@pytest.mark.parametrize(
    ("text", "rotate_at", "keep", "textfiles", "mapping"),
    [
        ("events: null\nmetrics: null\n", 16 * 1024**2, 8, None, None),
        ("events: {rotate_at: 512k}\n", 512 * 1024, 8, None, None),
        ("events: {keep: 1}\nmetrics: {textfile_directory: /a}\n", 16 * 1024**2, 1, "/a", None),
        ("metrics: {textfile_directory: null, job_mapping_directory: /b}\n", 16 * 1024**2, 8, None, "/b"),
    ],
    ids=["null", "size", "one each", "the other"],
)
def test_what_is_kept_and_written_for_others(
    text: str, rotate_at: int, keep: int, textfiles: str | None, mapping: str | None, host: Host
) -> None:
    checked = config.load(host.limits(text))
    assert checked.events == limits.EventFiles(rotate_at, keep)
    assert checked.metrics == limits.MetricsFiles(textfiles, mapping)


def schema_of(section: str, key: str) -> Any:
    schema = json.loads((ROOT / "config" / config.SCHEMA_NAME).read_text(encoding="utf-8"))
    return schema["properties"][section]["properties"][key]


def test_what_can_be_chosen_is_the_same_in_the_file_and_in_the_modules() -> None:
    strategies = schema_of("gpu_allocation", "strategy")["enum"]
    assert ds01_gpu_allocate.ITEM["strategy"]["choices"] == strategies
    assert limits.GpuPolicy().strategy in strategies
    assert limits.GpuPolicy().mig_strategy in schema_of("gpu_allocation", "mig_strategy")["enum"]
    assert limits.Policies().reclaim_holds in schema_of("policies", "reclaim_holds")["enum"]


@pytest.mark.parametrize(
    ("section", "key", "wrong"),
    [
        ("gpu_allocation", "strategy", "least-allocated"),
        ("gpu_allocation", "mig_strategy", "Dynamic"),
        ("policies", "reclaim_holds", "lower-priority"),
    ],
)
def test_a_choice_that_is_none_is_refused_and_not_ignored(section: str, key: str, wrong: str, host: Host) -> None:
    told = problem(host.limits(f"{section}: {{{key}: {wrong}}}\n"))
    assert f"{section}.{key}: '{wrong}'" in told
    assert all(choice in told for choice in schema_of(section, key)["enum"])


@pytest.mark.parametrize("key", ["on", "1001", "0x10", "1:0", "null"])
def test_a_key_twice_is_found_whatever_yaml_takes_it_for(key: str, host: Host) -> None:
    assert "line 3" in problem(host.limits(f"user_overrides:\n  {key}: {{}}\n  '{key}': {{}}\n"))


VALID: dict[str, tuple[str, str, Any]] = {
    "fraction of an hour": ("idle_timeout: 0.5h", "idle_timeout", 1800),
    "bare zero": ("gpu_hold_after_stop: 0", "gpu_hold_after_stop", 0),
    "quoted zero": ("gpu_hold_after_stop: '0'", "gpu_hold_after_stop", 0),
    "null": ("gpu_hold_after_stop: null", "gpu_hold_after_stop", None),
    "tilde": ("gpu_hold_after_stop: ~", "gpu_hold_after_stop", None),
    "old key": ("idle_timeout_h: 0.5", "idle_timeout", 1800),
}


@pytest.mark.parametrize(("line", "name", "seconds"), VALID.values(), ids=VALID.keys())
def test_durations_in_the_file(line: str, name: str, seconds: float | None, host: Host) -> None:
    value = getattr(limits.resolve(config.load(host.limits(f"defaults: {{{line}}}\n")), "alice"), name)
    assert (None if value is None else value.total_seconds()) == seconds


@pytest.fixture
def members(host: Host) -> Path:
    """The file of further members of the shipped group researcher."""
    directory = host.config.parent / "groups"
    directory.mkdir()
    return directory / "researcher.members"


def test_members_file(host: Host, members: Path) -> None:
    members.write_text(
        "# joined in 2025\ndora\n\n  eve  # until May\r\nh.baker@uni.example\nMüller\n", encoding="utf-8"
    )
    checked = config.load(host.config)
    for user in ("dora", "eve", "h.baker@uni.example", "Müller", "alice"):
        assert checked.group_of(user) == "researcher"
    assert checked.group_of("until") == "student"


def test_a_members_file_from_windows_keeps_its_first_member(host: Host, members: Path) -> None:
    members.write_bytes(b"\xef\xbb\xbfdora\r\neve\r\n")
    checked = config.load(host.config)
    assert (checked.group_of("dora"), checked.group_of("eve")) == ("researcher", "researcher")


def test_members_of_an_unknown_group_are_an_error(host: Host, members: Path) -> None:
    members.with_name("reseacher.members").write_text("dora\n", encoding="utf-8")
    assert "there is no group 'reseacher'" in problem(host.config)


@pytest.mark.parametrize("kind", ["dangling link", "directory", "not text"])
def test_an_unreadable_members_file_is_an_error(kind: str, host: Host, members: Path) -> None:
    if kind == "dangling link":
        members.symlink_to(members.parent / "gone")
    elif kind == "directory":
        members.mkdir()
    else:
        members.write_bytes(b"dora\n\xff\xfe\n")
    assert "researcher.members: the members file cannot be read" in problem(host.config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_members_directory_that_may_not_be_read_is_an_error(host: Host, members: Path) -> None:
    members.write_text("dora\n", encoding="utf-8")
    members.parent.chmod(0)
    try:
        problem(host.config)
    finally:
        members.parent.chmod(0o755)


def test_a_members_directory_that_is_none_is_an_error(host: Host) -> None:
    (host.config.parent / "groups").write_text("dora\n", encoding="utf-8")
    problem(host.config)


def test_the_schema_beside_the_file_wins(host: Host) -> None:
    shutil.copy(ROOT / "config" / config.SCHEMA_NAME, host.config.parent)
    assert config.find_schema(host.config, config.SCHEMA_NAME).parent == host.config.parent
    assert config.load(host.config).default_group == "student"
