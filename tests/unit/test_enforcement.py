"""The limits file's policies: every key of every layer, old names, exemptions. Null, zero and absent differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from ds01 import config
from ds01.enforcement import POLICIES, Enforcement
from ds01.errors import Ds01Error
from ds01.limits import Config, Policies
from ds01.lint import lint
from support import NOW, ROOT, Host, config_of

SCHEMA = json.loads((ROOT / "config" / config.SCHEMA_NAME).read_text(encoding="utf-8"))
LAYERS = ("policies", "group", "override")
MINUTE = timedelta(minutes=1)
REFUSED = object()


@dataclass(frozen=True)
class Key:
    """A key: the name that counts, a value with its meaning, and what null and zero become."""

    name: str
    value: Any
    meaning: Any
    zero: Any = 0
    null: Any = None


def span(name: str, null: Any = None) -> dict[str, Key]:
    hours, minutes, seconds = (
        Key(name, value, value * unit, timedelta(0), null)
        for value, unit in ((2, 60 * MINUTE), (90, MINUTE), (0.5, MINUTE / 60))
    )
    old = {f"{name}_h": hours, f"{name}_m": minutes, f"{name}_s": seconds}
    return {name: Key(name, "1h30m", 90 * MINUTE, timedelta(0), null), **old}


KEYS: dict[str, Key] = {
    "gpu_idle_threshold": Key("gpu_idle_threshold", 7.5, 7.5),
    "cpu_idle_threshold": Key("cpu_idle_threshold", 3, 3),
    "network_idle_threshold": Key("network_idle_threshold", 4096, 4096),
    "idle_detection_window": Key("idle_detection_window", 4, 4, zero=REFUSED, null=REFUSED),
    **span("grace_period"),
    **span("keepalive_max_duration"),
    **span("sigterm_grace", null=REFUSED),
    "sigterm_grace_seconds": Key("sigterm_grace", 30, MINUTE / 2, timedelta(0), REFUSED),
    "warning_time": Key("warning_time", "1h", 60 * MINUTE, timedelta(0)),
    "high_demand_idle_reduction": Key("high_demand_idle_reduction", 0.25, 0.25),
}
EVERY = [pytest.param(key, layer, id=f"{key} in {layer}") for key in KEYS for layer in LAYERS]
OF_THE_HOUSE: dict[str, Key] = {
    **{key: Key("created_timeout", k.value, k.meaning, REFUSED) for key, k in span("created_timeout").items()},
    **{
        key: Key("created_timeout", k.value, k.meaning, REFUSED) for key, k in span("created_container_timeout").items()
    },
    "high_demand_threshold": Key("high_demand_threshold", 0.9, 0.9),
}


def file_with(host: Host, layer: str, content: dict[str, Any], below: dict[str, Any] | None = None) -> Config:
    layers: list[dict[str, Any]] = [{}, {}, {}]
    index = LAYERS.index(layer)
    layers[index] = content
    if index:
        layers[index - 1] = below or {}
    document = {
        "policies": layers[0],
        "groups": {"r": {"members": ["alice"], "policies": layers[1]}},
        "user_overrides": {"alice": {"policies": layers[2]}},
    }
    return config.load(host.limits(json.dumps(document)))


def becomes(host: Host, layer: str, key: str, value: Any) -> Any:
    try:
        return getattr(file_with(host, layer, {key: value}).enforcement_of("alice"), KEYS[key].name)
    except Ds01Error as exc:
        assert exc.reason == "config_invalid"
        assert key in exc.message
        return REFUSED


def test_the_tables_have_every_key_that_the_schema_has() -> None:
    layered = SCHEMA["definitions"]["enforcement"]["properties"]
    assert set(layered) == set(KEYS)
    assert {key.name for key in KEYS.values()} == set(Enforcement.__dataclass_fields__)
    others = {"reclaim_holds", "pending_timeout", "unmanaged", "monitoring_containers", "mig_services"}
    assert set(SCHEMA["properties"]["policies"]["properties"]) == set(KEYS) | set(OF_THE_HOUSE) | others
    assert {key.name for key in OF_THE_HOUSE.values()} | others == set(Policies.__dataclass_fields__)
    exempt_from = SCHEMA["properties"]["exemptions"]["items"]["properties"]["exempt_from"]["items"]["enum"]
    assert exempt_from == [*POLICIES, *(f"{policy}_h" for policy in POLICIES)]


@pytest.mark.parametrize(("key", "layer"), EVERY)
def test_a_value_null_and_zero(key: str, layer: str, host: Host) -> None:
    assert becomes(host, layer, key, KEYS[key].value) == KEYS[key].meaning
    assert becomes(host, layer, key, None) is KEYS[key].null
    assert becomes(host, layer, key, 0) == KEYS[key].zero


@pytest.mark.parametrize(("key", "layer"), EVERY)
def test_absent_is_the_layer_below_and_in_the_end_what_is_built_in(key: str, layer: str, host: Host) -> None:
    name = KEYS[key].name
    built_in = getattr(Enforcement(), name)
    assert getattr(file_with(host, layer, {}).enforcement_of("alice"), name) == built_in
    assert getattr(file_with(host, layer, {key: KEYS[key].value}).enforcement_of("bob"), name) == (
        KEYS[key].meaning if layer == "policies" else built_in
    )
    if layer != "policies":
        below = {key: KEYS[key].value}
        assert getattr(file_with(host, layer, {}, below).enforcement_of("alice"), name) == KEYS[key].meaning


@pytest.mark.parametrize("key", OF_THE_HOUSE)
def test_what_holds_for_all(key: str, host: Host) -> None:
    def becomes(value: Any) -> Any:
        try:
            return getattr(file_with(host, "policies", {key: value}).policies, OF_THE_HOUSE[key].name)
        except Ds01Error as exc:
            assert key in exc.message
            return REFUSED

    assert becomes(OF_THE_HOUSE[key].value) == OF_THE_HOUSE[key].meaning
    assert becomes(None) is None
    assert becomes(0) == OF_THE_HOUSE[key].zero


def test_unmanaged_use_is_reported_unless_the_file_says_stop(host: Host) -> None:
    assert file_with(host, "policies", {}).policies.unmanaged == "report"
    assert file_with(host, "policies", {"unmanaged": "stop"}).policies.unmanaged == "stop"


WRONG: dict[str, tuple[str, list[str]]] = {
    "a number without its unit": ("policies: {grace_period: 30}", ["policies.grace_period: 30", "30m"]),
    "a unit in an old key": ("policies: {grace_period_m: 30m}", ["policies.grace_period_m: '30m'"]),
    "less than nothing": ("policies: {gpu_idle_threshold: -1}", ["policies.gpu_idle_threshold: -1"]),
    "no number": ("policies: {gpu_idle_threshold: .nan}", ["policies.gpu_idle_threshold: nan is not a number"]),
    "no number of a group": (
        "groups: {r: {policies: {cpu_idle_threshold: .inf}}}",
        ["groups.r.policies.cpu_idle_threshold: inf is not a number"],
    ),
    "no share": ("policies: {high_demand_threshold: .nan}", ["policies.high_demand_threshold: nan is not a number"]),
    "percent for a share": ("policies: {high_demand_threshold: 80}", ["policies.high_demand_threshold: 80", "0 to 1"]),
    "a factor that prolongs": ("policies: {high_demand_idle_reduction: 1.5}", ["high_demand_idle_reduction: 1.5"]),
    "half a sample": ("policies: {idle_detection_window: 1.5}", ["policies.idle_detection_window: 1.5"]),
    "yes for a number": ("policies: {idle_detection_window: true}", ["policies.idle_detection_window: True"]),
    "no such choice": ("policies: {unmanaged: kill}", ["policies.unmanaged: 'kill'", "report or stop"]),
    "twice": ("policies: {grace_period: 1h, grace_period_m: 30}", ["policies.grace_period_m", "set twice"]),
    "twice, of the house": (
        "policies: {created_timeout: 1h, created_container_timeout_m: 30}",
        ["policies.created_container_timeout_m", "set twice"],
    ),
    "a typing error": ("policies: {grace_perod: 1h}", ["policies.grace_perod", "did you mean grace_period?"]),
    "of the house, in a group": ("groups: {r: {policies: {unmanaged: stop}}}", ["groups.r.policies.unmanaged"]),
    "of a user": ("user_overrides: {a: {policies: {idle_window: 3}}}", ["user_overrides.a.policies.idle_window"]),
    "an exemption by itself": ("exemptions: {user: alice}", ["exemptions", "a list of exemptions"]),
    "an exemption from what": ("exemptions: [{exempt_from: [memory]}]", ["exemptions.0.exempt_from.0: 'memory'"]),
    "an exemption that is misspelt": ("exemptions: [{usr: alice}]", ["exemptions.0.usr", "did you mean user?"]),
    "a date without quotes": ("exemptions: [{expires_on: 2026-02-28}]", ["exemptions.0.expires_on", "a quoted time"]),
}


@pytest.mark.parametrize(("text", "told"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_refused_with_its_place(text: str, told: list[str], host: Host) -> None:
    with pytest.raises(Ds01Error) as caught:
        config.load(host.limits(f"{text}\n"))
    assert caught.value.reason == "config_invalid"
    for part in told:
        assert part in str(caught.value)


OLD_FILE = """
defaults: {max_runtime_h: 24, idle_timeout_h: 0.5, gpu_hold_after_stop_h: 0.25, container_hold_after_stop_h: 0.5}
groups:
  researcher:
    members: [alice]
    idle_timeout_h: 1
    policies:
      gpu_idle_threshold: 5
      cpu_idle_threshold: 3.0
      network_idle_threshold: 1048576
      idle_detection_window: 4
policies:
  high_demand_threshold: 0.8
  high_demand_idle_reduction: 0.5
  gpu_idle_threshold: 5
  cpu_idle_threshold: 2.0
  network_idle_threshold: 1048576
  idle_detection_window: 3
  grace_period_m: 30
  keepalive_max_duration_h: 24
  sigterm_grace_s: 60
  created_container_timeout_m: 30
exemptions:
  - username: alice
    category: research
    exempt_from: [idle_timeout_h]
    reason: long simulation
    approved_by: admin
    approved_on: "2025-11-01"
    expires_on: null
"""


def test_a_file_of_the_replaced_system_means_what_it_meant(host: Host) -> None:
    read = config.load(host.limits(OLD_FILE))
    assert read.policies == Policies()
    assert read.enforcement_of("bob") == Enforcement()
    alice = read.enforcement_of("alice")
    assert (alice.cpu_idle_threshold, alice.idle_detection_window, alice.grace_period) == (3.0, 4, 30 * MINUTE)
    assert read.exemptions[0].covers("idle_timeout", "alice", "p._.alice", NOW)
    assert not read.exemptions[0].covers("max_runtime", "alice", "p._.alice", NOW)


def test_null_sections(host: Host) -> None:
    text = "policies:\nexemptions:\ngroups: {r: {policies: }}\nuser_overrides: {alice: {policies: }}\n"
    read = config.load(host.limits(text))
    assert (read.enforcement_of("alice"), read.exemptions) == (Enforcement(), ())


def test_the_shipped_file_says_what_is_built_in() -> None:
    shipped = config.load(ROOT / "config" / "resource-limits.yaml")
    assert shipped.enforcement_of("nobody-knows") == Enforcement()
    assert shipped.policies == Policies()


GOOD = {
    "user": "alice",
    "exempt_from": ["idle_timeout"],
    "reason": "thesis",
    "approved_by": "admin",
    "expires_on": "2026-02-28",
}
FINDINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "as it should be": ({}, None),
    "for good": ({"expires_on": None}, None),
    "over": ({"expires_on": "2025-11-20"}, "this exemption ended at 2025-11-21T00:00:00Z and exempts nobody."),
    "not approved": ({"approved_by": None}, "this exempts nobody: approved_by is missing."),
    "without a reason": ({"reason": " "}, "this exempts nobody: reason is missing."),
    "no such day": ({"expires_on": "2026-02-30"}, "this exempts nobody: expires_on '2026-02-30' is no time."),
    "of a stranger": ({"user": "zoe"}, "not a login name of this server: zoe."),
}


@pytest.mark.parametrize(("changed", "message"), FINDINGS.values(), ids=FINDINGS.keys())
def test_an_exemption_that_exempts_nobody_is_found(changed: dict[str, Any], message: str | None) -> None:
    found = lint(config_of(exemptions=[{**GOOD, **changed}]), NOW, known_user=lambda name: name == "alice")
    expected = [("exemptions.0", message)] if message else []
    assert [(f.path, f.message) for f in found] == expected
