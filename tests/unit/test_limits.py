"""Who may have what: layers, old keys, the slice's limits. Null, zero and absent: test_layers.py."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import pytest
from ds01 import limits, names
from ds01.errors import Ds01Error
from ds01.limits import Aggregate, Limits, parse_config, resolve
from hypothesis import given
from hypothesis import strategies as st

HOURS = timedelta(hours=1)


def resolved(user: str = "alice", **document: Any) -> Limits:
    return resolve(parse_config(document), user)


def test_what_no_layer_sets_is_careful_and_never_unlimited() -> None:
    value = resolved()
    assert (value.max_gpus, value.max_gpus_per_container, value.allow_full_gpu) == (1, 1, False)
    assert (value.max_cpus, value.memory, value.memory_swap, value.shm_size) == (8, "32g", "32g", "16g")
    assert (value.pids_limit, value.max_containers_per_user, value.priority) == (4096, 3, 10)
    assert (value.idle_timeout, value.max_runtime) == (48 * HOURS, 168 * HOURS)
    assert (value.gpu_hold_after_stop, value.container_hold_after_stop) == (24 * HOURS, 12 * HOURS)


@pytest.mark.parametrize(
    "section", ["defaults", "groups", "user_overrides", "gpu_allocation", "policies", "containers"]
)
def test_a_null_section_is_an_empty_one(section: str) -> None:
    assert resolved(**{section: None}) == resolved()


def test_null_groups_overrides_and_members_are_empty_ones() -> None:
    empty = resolved(groups={"student": None, "staff": {"members": None}}, user_overrides={"alice": None})
    assert empty == resolved()


def test_an_overridden_user_keeps_the_group_s_name_and_its_other_values() -> None:
    value = resolved(
        "carol",
        defaults={"memory": "32g"},
        groups={"researcher": {"members": ["carol"], "max_mig_instances": 2, "max_cpus": 16, "priority": 50}},
        user_overrides={"carol": {"max_mig_instances": 4}},
    )
    assert (value.group, value.max_gpus) == ("researcher", 4)
    assert (value.max_cpus, value.priority, value.memory) == (16, 50, "32g")
    assert value.slice == "ds01-researcher-carol.slice"


@pytest.mark.parametrize(
    ("user", "group"), [("bob", "researcher"), ("eve", "student"), ("dora", "first"), ("from-file", "researcher")]
)
def test_group_of_a_user(user: str, group: str) -> None:
    config = parse_config(
        {"groups": {"first": {"members": ["dora"]}, "researcher": {"members": ["bob", "dora"]}}},
        {"researcher": ("from-file",)},
    )
    assert config.group_of(user) == group


def test_the_default_group_needs_no_entry() -> None:
    assert resolved(default_group="guest").slice == "ds01-guest-alice.slice"


def test_members_of_a_group_that_does_not_exist_are_an_error() -> None:
    with pytest.raises(Ds01Error, match=r"groups/reseacher\.members.*no group 'reseacher'") as caught:
        parse_config({"groups": {"researcher": {}}}, {"reseacher": ("bob",)})
    assert caught.value.reason == "config_invalid"


@pytest.mark.parametrize(
    ("old", "value", "name", "expected"),
    [
        ("max_mig_instances", 3, "max_gpus", 3),
        ("max_gpus_per_user", 3, "max_gpus", 3),
        ("max_mig_per_container", 3, "max_gpus_per_container", 3),
        ("max_gpu_slots_per_container", 3, "max_gpus_per_container", 3),
        ("max_gpu_slots", 0.5, "max_gpu_equivalents", Fraction(1, 2)),
        ("cpus", 12, "max_cpus", 12),
        ("idle_timeout_h", 0.5, "idle_timeout", HOURS / 2),
        ("idle_timeout_m", 45, "idle_timeout", 0.75 * HOURS),
        ("max_runtime_h", 24, "max_runtime", 24 * HOURS),
        ("gpu_hold_after_stop_h", 0.25, "gpu_hold_after_stop", HOURS / 4),
        ("gpu_hold_after_stop_m", 15, "gpu_hold_after_stop", HOURS / 4),
        ("gpu_hold_after_stop_s", 90, "gpu_hold_after_stop", HOURS / 40),
        ("container_hold_after_stop_h", 12.0, "container_hold_after_stop", 12 * HOURS),
        ("gpu_hold_after_stop_h", 0, "gpu_hold_after_stop", timedelta(0)),
        ("gpu_hold_after_stop_h", None, "gpu_hold_after_stop", None),
        ("max_gpus_per_user", None, "max_gpus", None),
    ],
)
def test_old_key(old: str, value: Any, name: str, expected: Any) -> None:
    assert getattr(resolved(defaults={old: value}), name) == expected


def test_an_old_key_in_a_group_hides_the_new_one_in_the_defaults() -> None:
    value = resolved(
        defaults={"max_gpus": 1, "idle_timeout": "48h"},
        groups={"r": {"members": ["alice"], "max_gpus_per_user": 4, "idle_timeout_h": None}},
    )
    assert (value.max_gpus, value.idle_timeout) == (4, None)


@pytest.mark.parametrize(
    "layer",
    [
        {"max_gpus": 1, "max_mig_instances": 1},
        {"max_gpus_per_user": 1, "max_gpus": None},
        {"cpus": 1, "max_cpus": 2},
        {"idle_timeout": "1h", "idle_timeout_h": 1},
        {"idle_timeout_h": 1, "idle_timeout_m": 60},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("place", ["defaults", "group", "override"])
def test_one_limit_under_two_names_is_refused(layer: dict[str, Any], place: str) -> None:
    document = {
        "defaults": {"defaults": layer},
        "group": {"groups": {"r": layer}},
        "override": {"user_overrides": {"alice": layer}},
    }[place]
    with pytest.raises(Ds01Error, match="set twice") as caught:
        parse_config(document)
    assert caught.value.reason == "config_invalid"
    assert list(layer)[1] in caught.value.message


@pytest.mark.parametrize(
    ("layers", "swap"),
    [
        ([{}, {}, {}], "32g"),
        ([{"memory": "10g"}, {}, {}], "10g"),
        ([{"memory": "10g", "memory_swap": "20g"}, {}, {}], "20g"),
        ([{"memory_swap": "20g"}, {"memory": "10g"}, {}], "10g"),
        ([{"memory": "10g", "memory_swap": "20g"}, {}, {"memory": "30g"}], "30g"),
        ([{"memory": "10g"}, {"memory_swap": "20g"}, {}], "20g"),
        ([{"memory": "10g"}, {"memory": None}, {}], None),
        ([{"memory": "10g"}, {"memory_swap": None}, {}], None),
    ],
)
def test_memory_swap_follows_memory_unless_set_beside_it(layers: list[dict[str, Any]], swap: str | None) -> None:
    value = resolved(
        defaults=layers[0], groups={"r": {"members": ["alice"], **layers[1]}}, user_overrides={"alice": layers[2]}
    )
    assert value.memory_swap == swap


def test_docker_args_as_documented() -> None:
    value = resolved(
        groups={"researchers": {"members": ["alice"], "max_cpus": 16, "memory": "64g", "shm_size": "16g"}},
    )
    assert value.docker_args() == [
        "--cpus=16",
        "--memory=64g",
        "--memory-swap=64g",
        "--shm-size=16g",
        "--pids-limit=4096",
        "--cgroup-parent=ds01-researchers-alice.slice",
    ]


def test_a_null_limit_has_no_docker_flag_and_the_slice_always_has() -> None:
    none = dict.fromkeys(["max_cpus", "memory", "memory_swap", "shm_size", "pids_limit"])
    assert resolved("mary-ann", defaults=none).docker_args() == [r"--cgroup-parent=ds01-student-mary\x2dann.slice"]


@pytest.mark.parametrize(("cpus", "text"), [(16, "16"), (16.0, "16"), (0.5, "0.5"), (1.25, "1.25")])
def test_cpus_are_written_as_people_do(cpus: float, text: str) -> None:
    assert resolved(defaults={"max_cpus": cpus}).docker_args()[0] == f"--cpus={text}"


@pytest.mark.parametrize(
    ("layer", "properties"),
    [
        (
            {"max_cpus": 8, "memory": "32g", "pids_limit": 4096, "max_containers_per_user": 3},
            {"CPUQuota": "2400%", "MemoryMax": "96G", "TasksMax": "12288"},
        ),
        ({"max_cpus": 0.5, "memory": "512m"}, {"CPUQuota": "150%", "MemoryMax": "1536M", "TasksMax": "12288"}),
        ({"max_containers_per_user": None}, {}),
        ({"max_cpus": None}, {"MemoryMax": "96G", "TasksMax": "12288"}),
        ({"memory": None}, {"CPUQuota": "2400%", "TasksMax": "12288"}),
        ({"pids_limit": None}, {"CPUQuota": "2400%", "MemoryMax": "96G"}),
        (
            {"aggregate": {"cpu_quota": "4800%", "memory_max": "192g", "memory_high": "172g", "tasks_max": 12288}},
            {"CPUQuota": "4800%", "MemoryMax": "192G", "MemoryHigh": "172G", "TasksMax": "12288"},
        ),
        ({"aggregate": {"memory_max": "1.5g"}}, {"CPUQuota": "2400%", "MemoryMax": "1536M", "TasksMax": "12288"}),
        ({"aggregate": {"cpu_quota": None, "memory_max": None}}, {"TasksMax": "12288"}),
        ({"aggregate": None}, {"CPUQuota": "2400%", "MemoryMax": "96G", "TasksMax": "12288"}),
    ],
    ids=[
        "computed",
        "computed from fractions",
        "containers unlimited",
        "cpus unlimited",
        "memory unlimited",
        "processes unlimited",
        "given",
        "given in part",
        "given as null",
        "null section",
    ],
)
@pytest.mark.parametrize("place", ["group", "override"])
def test_the_slice_s_limits(layer: dict[str, Any], properties: dict[str, str], place: str) -> None:
    value = (
        resolved(groups={"r": {"members": ["alice"], **layer}})
        if place == "group"
        else resolved(groups={"r": {"members": ["alice"]}}, user_overrides={"alice": layer})
    )
    assert value.aggregate.properties() == properties


@pytest.mark.parametrize("aggregate", [{"cpu_quota": "0%"}, {"tasks_max": 0}, {"memory_max": "0g"}], ids=str)
def test_zero_never_becomes_a_slice_property_that_means_no_limit(aggregate: dict[str, Any]) -> None:
    # systemd ignores CPUQuota=0% and TasksMax=0, and kills whatever starts under MemoryMax=0.
    with pytest.raises(Ds01Error) as caught:
        resolved(groups={"r": {"members": ["alice"], "aggregate": aggregate}})
    assert caught.value.reason == "config_invalid"


def test_who_may_have_no_container_has_limits_all_the_same() -> None:
    value = resolved(defaults={"max_containers_per_user": 0})
    assert value.aggregate.properties() == {"CPUQuota": "800%", "MemoryMax": "32G", "TasksMax": "4096"}


def test_an_override_s_aggregate_changes_single_keys() -> None:
    value = resolved(
        groups={"r": {"members": ["alice"], "aggregate": {"cpu_quota": "100%", "memory_max": "10g"}}},
        user_overrides={"alice": {"aggregate": {"memory_max": "20g"}}},
    )
    assert (value.aggregate.cpu_quota, value.aggregate.memory_max) == ("100%", "20G")


@given(st.integers(1, 1024), st.integers(1, 1000))
def test_a_computed_cpu_quota_is_exact_and_without_exponent(cpus: int, containers: int) -> None:
    value = resolved(defaults={"max_cpus": cpus, "max_containers_per_user": containers})
    assert value.aggregate.cpu_quota == f"{cpus * containers * 100}%"


def test_one_drop_in_a_group_and_one_for_each_user_whose_slice_differs() -> None:
    config = parse_config(
        {
            "default_group": "student",
            "groups": {
                "researcher": {"members": ["bob", "carol"], "aggregate": {"cpu_quota": "4800%"}},
                "phd-students": None,
            },
            "user_overrides": {
                "carol": {"memory": "64g"},
                "bob": {"priority": 99, "max_mig_instances": 8},
                "mary-ann": {"aggregate": {"tasks_max": 7}},
            },
        }
    )
    rest = {"MemoryMax": "96G", "TasksMax": "12288"}
    assert limits.slice_dropins(config) == {
        "ds01-researcher-.slice.d": {"CPUQuota": "4800%", **rest},
        r"ds01-phd\x2dstudents-.slice.d": {"CPUQuota": "2400%", **rest},
        "ds01-student-.slice.d": {"CPUQuota": "2400%", **rest},
        "ds01-researcher-carol.slice.d": {"CPUQuota": "4800%", "MemoryMax": "192G", "TasksMax": "12288"},
        r"ds01-student-mary\x2dann.slice.d": {"CPUQuota": "2400%", "MemoryMax": "96G", "TasksMax": "7"},
    }


@pytest.mark.parametrize("user", ["bob", "carol", "dan", "listed-nowhere", "eve", "mary-ann"])
def test_everybody_s_slice_has_the_user_s_limits(user: str) -> None:
    """Also who is in the default group by being in no other, and who has an override: systemd merges
    the drop-ins of the group's prefix and of the slice itself."""
    config = parse_config(
        {
            "default_group": "student",
            "groups": {"phd-students": {"members": ["bob", "carol"], "memory": "64g"}, "staff": {"members": ["dan"]}},
            "user_overrides": {"carol": {"max_gpus": 9, "memory": "8g"}, "eve": {"pids_limit": None}, "mary-ann": None},
        }
    )
    value, dropins = resolve(config, user), limits.slice_dropins(config)
    of_group, of_user = names.group_dropin_dir(value.group), f"{value.slice}.d"
    assert value.slice.startswith(of_group.removesuffix(".slice.d")), "systemd applies the group's to this slice"
    merged = {**dropins[of_group], **dropins.get(of_user, {})}
    assert {key: text for key, text in merged.items() if text not in ("", "infinity")} == value.aggregate.properties()
    assert value.aggregate.properties(), "nobody is unlimited unasked"


def test_a_user_freed_of_the_group_s_limit_gets_a_drop_in_that_says_so() -> None:
    config = parse_config({"user_overrides": {"alice": {"memory": None, "max_cpus": None, "pids_limit": None}}})
    # An empty drop-in would leave the group's MemoryMax in force.
    properties = limits.slice_dropins(config)["ds01-student-alice.slice.d"]
    assert properties == {"CPUQuota": "", "MemoryMax": "infinity", "TasksMax": "infinity"}


def test_reservation() -> None:
    config = parse_config(
        {
            "user_overrides": {
                "carol": {
                    "reservation_start": "2025-11-01T00:00:00Z",
                    "reservation_end": "2025-11-08T00:00:00",
                    "reserved_gpus": ["0", "1:0", "2.1"],
                    "reason": "thesis deadline",
                }
            }
        }
    )
    (found,) = config.reservations
    assert (found.user, found.devices, found.reason) == ("carol", ("0", "1:0", "2:1"), "thesis deadline")
    start, end = datetime(2025, 11, 1, tzinfo=timezone.utc), datetime(2025, 11, 8, tzinfo=timezone.utc)
    moments = [start - timedelta(seconds=1), start, end - timedelta(seconds=1), end]
    assert [found.covers(when) for when in moments] == [False, True, True, False]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"reserved_gpus": ["0"]}, "needs reservation_start"),
        ({"reserved_gpus": ["0"], "reservation_start": "2025-11-01"}, "needs reservation_end"),
        (
            {"reserved_gpus": ["0"], "reservation_start": "2025-11-08", "reservation_end": "2025-11-01"},
            "must be later",
        ),
        (
            {"reserved_gpus": ["0"], "reservation_start": "2025-11-01", "reservation_end": "2025-11-01"},
            "must be later",
        ),
        ({"reserved_gpus": ["0"], "reservation_start": "soon", "reservation_end": "2025-11-01"}, "cannot be read"),
    ],
)
def test_a_reservation_that_says_too_little_or_nonsense(entry: dict[str, Any], problem: str) -> None:
    with pytest.raises(Ds01Error, match=rf"user_overrides\.carol: .*{problem}"):
        parse_config({"user_overrides": {"carol": entry}})


def test_an_empty_reservation_books_nothing() -> None:
    assert parse_config({"user_overrides": {"carol": {"reserved_gpus": []}, "dan": None}}).reservations == ()


_LAYER = st.fixed_dictionaries(
    {},
    optional={
        "max_gpus": st.none() | st.integers(0, 9),
        "max_containers_per_user": st.none() | st.integers(0, 9),
        "pids_limit": st.none() | st.integers(1, 999),
        "idle_timeout": st.none() | st.sampled_from(["0", "1h", "2d"]),
        "priority": st.integers(1, 100),
    },
)


@given(_LAYER, _LAYER, _LAYER)
def test_each_key_comes_from_the_highest_layer_that_has_it(
    defaults: dict[str, Any], group: dict[str, Any], override: dict[str, Any]
) -> None:
    layered = resolved(
        defaults=defaults, groups={"r": {"members": ["alice"], **group}}, user_overrides={"alice": override}
    )
    merged = resolved(groups={"r": {"members": ["alice"]}}, defaults={**defaults, **group, **override})
    assert layered == merged


def test_aggregate_without_limits_has_no_properties() -> None:
    assert Aggregate().properties() == {}
