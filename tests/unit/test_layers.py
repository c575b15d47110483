"""Every key of every layer, as it stands in a file: a value, null, zero and absent are four different things."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from ds01 import config
from ds01.errors import Ds01Error
from ds01.limits import GpuPolicy, Limits, parse_config, resolve
from ds01.model import Refusal, Request
from ds01.placement import Situation, decide
from support import NOW, ROOT, Host, machine, taken

_DOCUMENT = json.loads((ROOT / "config" / config.SCHEMA_NAME).read_text(encoding="utf-8"))
SCHEMA = _DOCUMENT["properties"]
LAYERS = ("defaults", "group", "override")
HOUR = timedelta(hours=1)
REFUSED = object()
"""What a key becomes that cannot be null, or cannot be zero."""


@dataclass(frozen=True)
class Key:
    """A key of a layer: what it limits, a value with its meaning, another value for the layer below
    (under the name that counts), and what null and zero become."""

    limits: str
    value: Any
    meaning: Any
    below: Any
    zero: tuple[Any, Any] = (0, 0)
    null: Any = None


def count(name: str, zero: Any = 0) -> Key:
    return Key(name, 4, 4, 7, (0, zero))


def size(name: str) -> Key:
    return Key(name, "64g", "64g", "48g", ("0g", REFUSED))


def cores() -> Key:
    return Key("max_cpus", 0.5, Fraction(1, 2), 3, (0, REFUSED))


def share() -> Key:
    return Key("max_gpu_equivalents", "2/7", Fraction(2, 7), 3, (0, Fraction(0)))


def duration(name: str, value: Any = "1d12h", hours: float = 36) -> Key:
    return Key(name, value, hours * HOUR, "5h", (0, timedelta(0)))


TIMES = ("idle_timeout", "max_runtime", "gpu_hold_after_stop", "container_hold_after_stop")
KEYS: dict[str, Key] = {
    "max_gpus": count("max_gpus"),
    "max_mig_instances": count("max_gpus"),
    "max_gpus_per_user": count("max_gpus"),
    "max_gpus_per_container": count("max_gpus_per_container"),
    "max_mig_per_container": count("max_gpus_per_container"),
    "max_gpu_slots_per_container": count("max_gpus_per_container"),
    "max_gpu_equivalents": share(),
    "max_gpu_slots": share(),
    "allow_full_gpu": Key("allow_full_gpu", True, True, False, (0, REFUSED), REFUSED),
    "max_cpus": cores(),
    "cpus": cores(),
    "memory": size("memory"),
    "memory_swap": size("memory_swap"),
    "shm_size": size("shm_size"),
    "pids_limit": count("pids_limit", REFUSED),
    "max_containers_per_user": count("max_containers_per_user"),
    **{name: duration(name) for name in TIMES},
    **{f"{name}_h": duration(name, 0.5, 0.5) for name in TIMES},
    **{f"{name}_m": duration(name, 90, 1.5) for name in TIMES},
    **{f"{name}_s": duration(name, 1800, 0.5) for name in TIMES},
    "priority": Key("priority", 50, 50, 20, (0, REFUSED), REFUSED),
}
EVERY = [pytest.param(key, layer, id=f"{key} in {layer}") for key in KEYS for layer in LAYERS]
ABOVE_NULL = [
    pytest.param(key, layer, id=f"{key} in {layer}")
    for key in KEYS
    for layer in LAYERS[1:]
    if KEYS[key].null is not REFUSED
]
BUILT_IN = resolve(parse_config({}), "alice")


@pytest.mark.parametrize("layer", LAYERS)
def test_the_table_has_every_key_that_the_schema_has(layer: str) -> None:
    properties = {
        "defaults": SCHEMA["defaults"]["properties"],
        "group": SCHEMA["groups"]["additionalProperties"]["properties"],
        "override": SCHEMA["user_overrides"]["additionalProperties"]["properties"],
    }[layer]
    no_limits = {"members", "aggregate", "policies", "reservation_start", "reservation_end", "reserved_gpus", "reason"}
    assert set(properties) - no_limits == set(KEYS)
    assert set(_DOCUMENT["definitions"]["aggregate"]["properties"]) == set(SLICE)
    assert {key.limits for key in KEYS.values()} == set(Limits.__dataclass_fields__) - {"user", "group", "aggregate"}


def file_with(host: Host, layer: str, content: dict[str, Any], below: dict[str, Any]) -> Limits:
    """alice's limits, from a file with `content` in this layer and `below` in the one under it."""
    index = LAYERS.index(layer)
    layers: list[dict[str, Any]] = [{}, {}, {}]
    layers[index] = content
    if index:
        layers[index - 1] = below
    document = {
        "defaults": layers[0],
        "groups": {"r": {"members": ["alice"], **layers[1]}},
        "user_overrides": {"alice": layers[2]},
    }
    return resolve(config.load(host.limits(json.dumps(document))), "alice")


def becomes(host: Host, layer: str, key: str, content: dict[str, Any]) -> Any:
    """What `key` limits, above another value in the layer below; REFUSED where the file is."""
    name = KEYS[key].limits
    try:
        return getattr(file_with(host, layer, content, {name: KEYS[key].below}), name)
    except Ds01Error as exc:
        assert exc.reason == "config_invalid"
        assert key in exc.message
        return REFUSED


@pytest.mark.parametrize(("key", "layer"), EVERY)
def test_a_value_is_what_it_says(key: str, layer: str, host: Host) -> None:
    assert becomes(host, layer, key, {key: KEYS[key].value}) == KEYS[key].meaning


@pytest.mark.parametrize(("key", "layer"), EVERY)
def test_null_is_unlimited_and_hides_the_layer_below(key: str, layer: str, host: Host) -> None:
    assert becomes(host, layer, key, {key: None}) is KEYS[key].null


@pytest.mark.parametrize(("key", "layer"), EVERY)
def test_zero_is_none_at_all_and_never_unlimited(key: str, layer: str, host: Host) -> None:
    written, meaning = KEYS[key].zero
    found = becomes(host, layer, key, {key: written})
    assert found is not None
    assert found is meaning or found == meaning


@pytest.mark.parametrize(("key", "layer"), EVERY)
def test_absent_is_the_layer_below(key: str, layer: str, host: Host) -> None:
    found = becomes(host, layer, key, {})
    below = getattr(BUILT_IN, KEYS[key].limits)
    if layer != "defaults":
        below = getattr(file_with(host, "defaults", {KEYS[key].limits: KEYS[key].below}, {}), KEYS[key].limits)
    assert found == below


@pytest.mark.parametrize(("key", "layer"), ABOVE_NULL)
def test_absent_is_unlimited_where_the_layer_below_is(key: str, layer: str, host: Host) -> None:
    assert getattr(file_with(host, layer, {}, {KEYS[key].limits: None}), KEYS[key].limits) is None


@pytest.mark.parametrize(("key", "layer"), ABOVE_NULL)
def test_a_value_above_null_limits_again(key: str, layer: str, host: Host) -> None:
    name = KEYS[key].limits
    assert getattr(file_with(host, layer, {key: KEYS[key].value}, {name: None}), name) == KEYS[key].meaning


QUOTAS = ("max_gpus", "max_gpus_per_container", "max_gpu_equivalents", "max_containers_per_user")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("key", QUOTAS)
def test_who_is_unlimited_is_never_at_a_limit_and_who_has_none_always_is(key: str, layer: str, host: Host) -> None:
    inventory = machine("full", "full", "full", "full")
    everything = {"allow_full_gpu": True, **dict.fromkeys(QUOTAS)}

    def decided(value: int | None) -> str:
        own = file_with(host, layer, {**everything, key: value}, {key: 1})
        situation = Situation(taken(inventory, alice="0 1"), inventory, GpuPolicy(), NOW, containers=99)
        found = decide(Request("q._.alice", "alice", 2), own, situation)
        return found.reason if isinstance(found, Refusal) else "granted"

    assert decided(None) == "granted"
    assert decided(0) in ("user_at_limit", "container_limit")


# The user's slice, for a user who may have three containers of 8 cores, 32g and 4096 processes: what the
# file says, its property, what is computed where it says nothing, and a zero.
SLICE: dict[str, tuple[Any, tuple[str, str], str | None, Any]] = {
    "cpu_quota": ("400%", ("CPUQuota", "400%"), "2400%", "0%"),
    "memory_max": ("10g", ("MemoryMax", "10G"), "96G", "0g"),
    "memory_high": ("9g", ("MemoryHigh", "9G"), None, "0g"),
    "tasks_max": (100, ("TasksMax", "100"), "12288", 0),
}


@pytest.mark.parametrize("key", SLICE)
@pytest.mark.parametrize("layer", LAYERS[1:])
def test_the_slice_s_keys_too(key: str, layer: str, host: Host) -> None:
    value, (name, written), computed, zero = SLICE[key]

    def properties(content: dict[str, Any], below: dict[str, Any] | None = None) -> dict[str, str]:
        under = {"aggregate": below} if below and layer == "override" else {}
        return file_with(host, layer, content, under).aggregate.properties()

    assert properties({"aggregate": {key: value}})[name] == written
    assert properties({}).get(name) == computed
    assert properties({"aggregate": {}}).get(name) == computed
    assert name not in properties({"aggregate": {key: None}})
    assert name not in properties({"aggregate": {key: None}}, {key: value})
    if layer == "override":
        assert properties({}, {key: value})[name] == written
    with pytest.raises(Ds01Error, match=rf"aggregate\.{key}: 0 would stop everything"):
        properties({"aggregate": {key: zero}})
