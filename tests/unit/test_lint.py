"""Findings in a valid limits file: what cannot be meant, and what this server cannot give."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from ds01 import units
from ds01.limits import parse_config
from ds01.lint import Finding, lint
from ds01.model import Gpu, Inventory
from support import NOW, machine

FULL = machine("full", "full", "full", "full")
CUT = machine("full", ["2g.20gb"] * 3, ["2g.20gb"] * 3)
UNCUT = machine([], [])
# The careful built-in limits allow no whole GPU: without this, a server of whole GPUs is a finding by itself.
WHOLE = {"allow_full_gpu": True}


def findings(document: dict[str, Any], inventory: Inventory | None = None, users: str | None = None) -> dict[str, str]:
    """Messages by path; `users` are those that the host knows."""
    known = None if users is None else lambda name: name in users.split()
    found = lint(parse_config(document), NOW, inventory, known)
    by_path = {f.path: f.message for f in found}
    assert len(by_path) == len(found), f"a path twice: {found}"
    return by_path


def group(members: str = "alice", **layer: Any) -> dict[str, Any]:
    return {"members": members.split(), **layer}


QUOTAS: dict[str, tuple[dict[str, Any], Inventory, dict[str, str]]] = {
    "reachable": ({"defaults": {**WHOLE, "max_gpus": 4, "max_gpus_per_container": 4}}, FULL, {}),
    "one more than there is": (
        {"defaults": {**WHOLE, "max_gpus": 5}},
        FULL,
        {"defaults.max_gpus": "max_gpus is 5, but this server has 4 devices."},
    ),
    "null is unlimited and no finding": (
        {"defaults": {**WHOLE, **dict.fromkeys(["max_gpus", "max_gpus_per_container", "max_gpu_equivalents"])}},
        FULL,
        {},
    ),
    "zero is none and no finding": (
        {"defaults": {"max_gpus": 0, "max_gpus_per_container": 0, "max_gpu_equivalents": 0}},
        FULL,
        {},
    ),
    "in one container": (
        {"defaults": {**WHOLE, "max_gpus": None, "max_gpus_per_container": 8}},
        FULL,
        {"defaults.max_gpus_per_container": "is 8, but this server has 4 devices."},
    ),
    "shares of GPUs": (
        {"defaults": {**WHOLE, "max_gpu_equivalents": 6}},
        FULL,
        {"defaults.max_gpu_equivalents": "is 6, but this server has 4 devices, 4 GPU-equivalents together."},
    ),
    "shares of slices are exact": ({"defaults": {"max_gpu_equivalents": "12/7"}}, CUT, {}),
    "a seventh more": (
        {"defaults": {"max_gpu_equivalents": "13/7"}},
        CUT,
        {"defaults.max_gpu_equivalents": "is 13/7, but this server has 6 MIG devices, 12/7 GPU-equivalents together"},
    ),
    "whole GPUs count for those who may have them": ({"defaults": {**WHOLE, "max_gpus": 7}}, CUT, {}),
    "and not for the others": (
        {"defaults": {"max_gpus": 7}},
        CUT,
        {"defaults.max_gpus": "max_gpus is 7, but this server has 6 MIG devices; allow_full_gpu is false."},
    ),
    "in a group": (
        {"defaults": WHOLE, "groups": {"r": group(max_gpus=9)}},
        FULL,
        {"groups.r.max_gpus": "is 9, but this server has 4 devices."},
    ),
    "in an override": (
        {"defaults": WHOLE, "groups": {"r": group()}, "user_overrides": {"alice": {"max_gpus": 9}}},
        FULL,
        {"user_overrides.alice.max_gpus": "is 9, but this server has 4 devices."},
    ),
    "inherited by many, said once": (
        {
            "defaults": {**WHOLE, "max_gpus": 9},
            "groups": {"r": group(), "s": group("bob")},
            "user_overrides": {"alice": {"priority": 9}, "eve": {"memory": "1g"}},
        },
        FULL,
        {"defaults.max_gpus": "is 9"},
    ),
    "beyond reach because of what the group may not have": (
        {"defaults": {**WHOLE, "max_gpus": 7}, "groups": {"r": group(allow_full_gpu=False)}},
        CUT,
        {"groups.r.allow_full_gpu": "max_gpus is 7, but this server has 6 MIG devices; allow_full_gpu is false."},
    ),
    "only slices allowed, and nothing is cut": (
        {"groups": {"r": group(**WHOLE)}},
        FULL,
        {
            "defaults.max_gpus": "is 1, but this server has no MIG devices; allow_full_gpu is false.",
            "defaults.max_gpus_per_container": "is 1, but this server has no MIG devices",
        },
    ),
    "what every group replaces limits nobody": (
        {"default_group": "r", "defaults": {"max_gpus": 99}, "groups": {"r": group(max_gpus=1)}},
        CUT,
        {},
    ),
    "more MIG devices are cut for who asks": (
        {"defaults": {"max_gpus": 7}, "gpu_allocation": {"mig_strategy": "dynamic"}},
        CUT,
        {},
    ),
    "whole GPUs are not": (
        {"defaults": {**WHOLE, "max_gpus": 7}, "gpu_allocation": {"mig_strategy": "dynamic"}},
        FULL,
        {"defaults.max_gpus": "is 7, but this server has 4 devices."},
    ),
    "under the old name that the file uses": (
        {"defaults": {**WHOLE, "max_mig_instances": 9}},
        FULL,
        {"defaults.max_mig_instances": "max_gpus is 9"},
    ),
    "a lost GPU is named": (
        {"defaults": {**WHOLE, "max_gpus": 3}},
        Inventory((*FULL.gpus[:3], Gpu(3, "", "unknown", 3, False, 0, "lost")), FULL.devices[:2]),
        {"defaults.max_gpus": "has 2 devices (without GPU 3, which the driver lost)."},
    ),
}


@pytest.mark.parametrize(("document", "inventory", "expected"), QUOTAS.values(), ids=QUOTAS.keys())
def test_quotas_beside_the_hardware(document: dict[str, Any], inventory: Inventory, expected: dict[str, str]) -> None:
    found = findings(document, inventory)
    assert set(found) == set(expected)
    assert [words for path, words in expected.items() if words not in found[path]] == []


def test_without_a_server_no_quota_is_judged() -> None:
    assert findings({"defaults": {"max_gpus": 99, "max_gpu_equivalents": 99, "max_gpus_per_container": 99}}) == {}


PROFILES: dict[str, tuple[dict[str, Any], Inventory, str]] = {
    "there": ({"mig_profile": "2g.20gb"}, CUT, ""),
    "any": ({"mig_profile": None}, CUT, ""),
    "another one": ({"mig_profile": "3g.40gb"}, CUT, "this server has no 3g.40gb device; it has: 2g.20gb, full."),
    "nothing is cut yet": ({"mig_profile": "2g.20gb"}, UNCUT, "it has: no device at all."),
    "a server without MIG gives whole GPUs": ({"mig_profile": "3g.40gb"}, FULL, ""),
    "MIG is not wanted": ({"mig_profile": "3g.40gb", "enable_mig": False}, CUT, ""),
    "it is cut for who asks": ({"mig_profile": "3g.40gb", "mig_strategy": "dynamic"}, CUT, ""),
}


@pytest.mark.parametrize(("policy", "inventory", "says"), PROFILES.values(), ids=PROFILES.keys())
def test_the_profile_of_requests_without_one(policy: dict[str, Any], inventory: Inventory, says: str) -> None:
    layer = {**WHOLE, "max_gpus": 0, "max_gpus_per_container": 0}
    found = findings({"defaults": layer, "gpu_allocation": policy}, inventory)
    assert set(found) == ({"gpu_allocation.mig_profile"} if says else set())
    assert says in found.get("gpu_allocation.mig_profile", "")


FILE_ALONE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "nothing to say": ({"groups": {"r": group("alice bob")}, "user_overrides": {"alice": None, "eve": {}}}, {}),
    "null sections": ({"groups": None, "user_overrides": None, "defaults": None}, {}),
    "a group without members": (
        {"groups": {"r": {"members": []}, "s": None}},
        {"groups.r.members": "nobody is in this group", "groups.s.members": "groups/s.members"},
    ),
    "the default group needs none": ({"default_group": "s", "groups": {"s": None}}, {}),
    "a member of two groups": (
        {"groups": {"r": group("alice bob"), "s": group("carol alice")}},
        {"groups.s.members": "alice is in r too, which stands first in the file and counts."},
    ),
    "a member twice in one group is one member": ({"groups": {"r": group("alice alice")}}, {}),
    "a name that nobody can have": ({"groups": {"r": group("a/b")}}, {"groups.r.members": "cannot be a user name"}),
    "an override for a name that nobody can have": (
        {"user_overrides": {"../x": {}}},
        {"user_overrides.../x": "cannot be a user name"},
    ),
    "an override in no group, where the default group is listed": (
        {"default_group": "s", "groups": {"s": group("bob")}, "user_overrides": {"alcie": {"max_gpus": 2}}},
        {"user_overrides.alcie": "alcie is in no group; s, which counts then, lists its members."},
    ),
    "an override in no group, where the default group is everybody else": (
        {"default_group": "s", "groups": {"s": None, "r": group("bob")}, "user_overrides": {"eve": {"priority": 2}}},
        {},
    ),
    "more in one container than in all": (
        {"groups": {"r": group(max_gpus=2, max_gpus_per_container=4)}},
        {"groups.r.max_gpus_per_container": "is 4, but max_gpus, for all of a user's containers, is 2."},
    ),
    "more in one container than the group allows": (
        {"groups": {"r": group(max_gpus=2)}, "user_overrides": {"alice": {"max_mig_per_container": 3}}},
        {"user_overrides.alice.max_mig_per_container": "is 3, but max_gpus"},
    ),
    "a smaller total above": ({"defaults": {"max_gpus_per_container": 1}, "groups": {"r": group(max_gpus=0)}}, {}),
    "a total of none beside what is built in": ({"defaults": {"max_gpus": 0}}, {}),
    "no total": ({"defaults": {"max_gpus": None, "max_gpus_per_container": 3}}, {}),
}


@pytest.mark.parametrize(("document", "expected"), FILE_ALONE.values(), ids=FILE_ALONE.keys())
def test_what_the_file_alone_shows(document: dict[str, Any], expected: dict[str, str]) -> None:
    found = findings(document)
    assert set(found) == set(expected)
    assert [words for path, words in expected.items() if words not in found[path]] == []


def test_users_whom_the_server_does_not_know() -> None:
    document = {
        "groups": {"r": group("alice bob mallory"), "s": group(" ".join(f"u{n}" for n in range(12)))},
        "user_overrides": {"alice": {}, "nobody-here": {}},
    }
    assert findings(document, users="alice bob") == {
        "groups.r.members": "not a login name of this server: mallory.",
        "groups.s.members": "not a login name of this server: u0, u1, u2, u3, u4, u5, u6, u7, u8, u9 and 2 more.",
        "user_overrides.nobody-here": "not a login name of this server: nobody-here.",
    }
    assert findings(document) == {}


def test_members_of_files_are_members() -> None:
    config = parse_config({"groups": {"r": None, "s": group("dora")}}, {"r": ("dora",)})
    assert [f.path for f in lint(config, NOW)] == ["groups.s.members"]


def booking(*devices: str, start: int = 0, days: int = 7, **layer: Any) -> dict[str, Any]:
    """An override with a reservation that starts in `start` days; the user may have all devices."""
    begin = NOW + timedelta(days=start)
    return {
        "allow_full_gpu": True,
        "max_gpus": None,
        "max_gpus_per_container": None,
        "reserved_gpus": list(devices),
        "reservation_start": units.format_time(begin),
        "reservation_end": units.format_time(begin + timedelta(days=days)),
        **layer,
    }


RESERVATIONS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, str]]] = {
    "possible": ({"carol": booking("0", "1:0"), "dan": booking("2")}, {}),
    "over": (
        {"carol": booking("0", start=-9, days=2)},
        {"carol.reservation_end": "ended at 2025-11-14T10:30:00Z and books nothing."},
    ),
    "over at this moment": ({"carol": booking("0", start=-1, days=1)}, {"carol.reservation_end": "ended"}),
    "over, and another one on the same device": (
        {"a": booking("0", start=-9, days=9), "b": booking("0")},
        {
            "a.reservation_end": "ended",
        },
    ),
    "on a device that is not there": (
        {"carol": booking("7", "1:9", "0")},
        {"carol.reserved_gpus": "this server has no 7, 1:9; see: ds01 status."},
    ),
    "a GPU that is cut books its slices": ({"carol": booking("1")}, {}),
    "twice": (
        {"carol": booking("0"), "dan": booking("0", "2:0", start=2)},
        {
            "dan.reserved_gpus": "0: booked for carol as well from 2025-11-23T10:30:00Z to 2025-11-28T10:30:00Z; "
            "then neither gets it."
        },
    ),
    "a slice of a booked GPU": ({"carol": booking("1"), "dan": booking("1:2")}, {"dan.reserved_gpus": "1:2: booked"}),
    "a GPU of a booked slice": ({"carol": booking("1:2"), "dan": booking("1")}, {"dan.reserved_gpus": "1:2: booked"}),
    "under its id and under its UUID": ({"carol": booking("GPU-0"), "dan": booking("0")}, {"dan.reserved_gpus": "0: "}),
    "one after the other": ({"carol": booking("0"), "dan": booking("0", start=7)}, {}),
    "a whole GPU for who may not have one": (
        {"carol": booking("0", allow_full_gpu=False)},
        {"carol.reserved_gpus": "0: carol may not have a whole GPU, and nobody else gets it."},
    ),
    "more than the user may have": (
        {"carol": booking("1", max_gpus=2, max_gpus_per_container=2)},
        {"carol.reserved_gpus": "3 devices are booked, but carol may have 2; the rest is nobody's."},
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), RESERVATIONS.values(), ids=RESERVATIONS.keys())
def test_reservations(overrides: dict[str, dict[str, Any]], expected: dict[str, str]) -> None:
    found = findings({"user_overrides": overrides}, CUT)
    assert set(found) == {f"user_overrides.{path}" for path in expected}
    assert [words for path, words in expected.items() if words not in found[f"user_overrides.{path}"]] == []


def test_reservations_are_compared_with_each_other_on_any_machine() -> None:
    overrides = {"a": booking("77"), "b": booking("77"), "c": booking("1"), "d": booking("10:1")}
    found = findings({"user_overrides": {**overrides, "e": booking("0", start=-9, days=1)}})
    assert set(found) == {"user_overrides.b.reserved_gpus", "user_overrides.e.reservation_end"}


def test_a_finding_is_a_place_and_a_sentence() -> None:
    found = lint(parse_config({"groups": {"r": None}}), NOW)
    assert found == (Finding("groups.r.members", "nobody is in this group: list them here or in groups/r.members."),)
