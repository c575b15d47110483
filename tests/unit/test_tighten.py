"""Limits that a play hands in for one container: they tighten, and never loosen."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ds01_container
import pytest
from ansible.module_utils.testing import patch_module_args
from ds01 import accounts, engine, workspace
from ds01.allocations import Allocations
from ds01.container_spec import ContainerRequest
from ds01.container_steps import Wish
from ds01.containers import Containers
from ds01.engine import Image
from ds01.errors import Ds01Error
from ds01.limits import Limits, as_dict
from ds01.names import Account, ContainerName
from ds01.paths import Paths
from ds01.tighten import IN_CONTAINER, tightened
from hypothesis import given
from hypothesis import strategies as st
from support import Host, limits_of

SET = {"max_cpus": 8, "memory": "32g", "memory_swap": "48g", "shm_size": "16g", "pids_limit": 4096}
OWN = limits_of(**SET)
UNLIMITED = limits_of(**dict.fromkeys(SET))


def taken(own: Limits, handed_in: dict[str, Any]) -> dict[str, Any]:
    """The keys that become others than the user's own."""
    result = tightened(own, handed_in)
    return {key: getattr(result, key) for key in IN_CONTAINER if getattr(result, key) != getattr(own, key)}


TAKEN: dict[str, tuple[Limits, dict[str, Any], dict[str, Any]]] = {
    "nothing handed in": (OWN, {}, {}),
    "all that the user has": (OWN, as_dict(OWN), {}),
    "all that the user has, unlimited": (UNLIMITED, as_dict(UNLIMITED), {}),
    "fewer cores": (OWN, {"max_cpus": 0.5}, {"max_cpus": Fraction(1, 2)}),
    "fewer cores as text": (OWN, {"max_cpus": "2"}, {"max_cpus": Fraction(2)}),
    "as many cores": (OWN, {"max_cpus": 8.0}, {}),
    "less memory takes swap with it": (OWN, {"memory": "8g"}, {"memory": "8g", "memory_swap": "8g"}),
    "less memory, and swap beside it": (
        OWN,
        {"memory": "8g", "memory_swap": "9g"},
        {"memory": "8g", "memory_swap": "9g"},
    ),
    "less swap": (OWN, {"memory_swap": "40g"}, {"memory_swap": "40g"}),
    "the same size in another unit": (OWN, {"shm_size": "16384m"}, {"shm_size": "16384m"}),
    "less shared memory": (OWN, {"shm_size": "64m"}, {"shm_size": "64m"}),
    "fewer processes": (OWN, {"pids_limit": 100}, {"pids_limit": 100}),
    "a limit where there was none": (UNLIMITED, {"max_cpus": 4}, {"max_cpus": Fraction(4)}),
    "memory where there was no limit": (UNLIMITED, {"memory": "1t"}, {"memory": "1t", "memory_swap": "1t"}),
    "null where there is no limit": (UNLIMITED, dict.fromkeys(SET), {}),
    "null memory leaves a limited swap": (replace(UNLIMITED, memory_swap="8g"), {"memory": None}, {}),
    "what is not a container's is not read": (
        OWN,
        {"max_gpus": 99, "priority": 100, "allow_full_gpu": True, "slice": "x.slice", "aggregate": None, "group": "x"},
        {},
    ),
    "the user's own": (OWN, {"user": "alice", "pids_limit": 1}, {"pids_limit": 1}),
}


@pytest.mark.parametrize(("own", "handed_in", "expected"), TAKEN.values(), ids=TAKEN.keys())
def test_what_is_taken(own: Limits, handed_in: dict[str, Any], expected: dict[str, Any]) -> None:
    assert taken(own, handed_in) == expected
    rest = {key: value for key, value in vars(tightened(own, handed_in)).items() if key not in IN_CONTAINER}
    assert rest == {key: value for key, value in vars(own).items() if key not in IN_CONTAINER}


@pytest.mark.parametrize("key", IN_CONTAINER)
def test_null_is_looser_than_any_limit_and_absent_is_not(key: str) -> None:
    with pytest.raises(Ds01Error, match=rf"limits\.{key}: unlimited is more than .*alice may have") as caught:
        tightened(OWN, {key: None})
    assert caught.value.reason == "invalid_input"
    others = {other: None for other in IN_CONTAINER if other != key}
    assert taken(replace(UNLIMITED, **{key: getattr(OWN, key)}), others) == {}


REFUSED: dict[str, tuple[Limits, dict[str, Any], str]] = {
    "more cores": (OWN, {"max_cpus": 8.5}, "limits.max_cpus: 8.5 is more than 8, which alice may have"),
    "more memory": (OWN, {"memory": "33g"}, "limits.memory: 33g is more than 32g"),
    "more memory in a smaller unit": (OWN, {"memory": "40000m"}, "limits.memory: 40000m is more than 32g"),
    "more swap": (OWN, {"memory_swap": "49g"}, "limits.memory_swap: 49g is more than 48g"),
    "swap that follows beyond its limit": (
        replace(UNLIMITED, memory_swap="8g"),
        {"memory": "9g"},
        "limits.memory_swap: 9g is more than 8g",
    ),
    "swap below the memory": (OWN, {"memory_swap": "31g"}, "memory is 32g, more than memory_swap"),
    "more shared memory": (OWN, {"shm_size": "17g"}, "limits.shm_size: 17g"),
    "more processes": (OWN, {"pids_limit": 4097}, "limits.pids_limit: 4097 is more than 4096"),
    "one too much among several": (OWN, {"max_cpus": 1, "pids_limit": 5000}, "limits.pids_limit"),
    "somebody else's": (OWN, {"user": "bob"}, "limits.user: these are bob's limits, and the container is alice's."),
    "an unknown key": (OWN, {"memmory": "1g"}, "limits.memmory: unknown key; did you mean memory?"),
    "an old name": (OWN, {"cpus": 1}, "limits.cpus: unknown key"),
    "no key at all": (OWN, {7: 1}, "limits.7: unknown key"),
    "zero cores": (UNLIMITED, {"max_cpus": 0}, "limits.max_cpus: 0 is not a number of cores above 0"),
    "zero memory": (UNLIMITED, {"memory": "0g"}, "limits.memory: '0g' is not a size above 0"),
    "zero processes": (UNLIMITED, {"pids_limit": 0}, "limits.pids_limit: 0 is not a whole number above 0"),
    "negative cores": (UNLIMITED, {"max_cpus": -1}, "limits.max_cpus: -1 is not a number of cores"),
    "negative processes": (UNLIMITED, {"pids_limit": -1}, "limits.pids_limit: -1 is not a whole number above 0"),
    "cores without end": (UNLIMITED, {"max_cpus": "1e999999999"}, "is not a number of cores"),
    "cores that are none": (UNLIMITED, {"max_cpus": float("nan")}, "is not a number of cores"),
    "cores true": (UNLIMITED, {"max_cpus": True}, "limits.max_cpus: True"),
    "processes true": (UNLIMITED, {"pids_limit": True}, "limits.pids_limit: True"),
    "processes as text": (UNLIMITED, {"pids_limit": "100"}, "limits.pids_limit: '100' is not a whole number"),
    "memory without a unit": (OWN, {"memory": 8}, "limits.memory: '8' is not a size"),
    "swap that says unlimited to Docker": (OWN, {"memory_swap": "-1"}, "limits.memory_swap: '-1' is not a size"),
    "memory as a list": (OWN, {"memory": ["8g"]}, "limits.memory: "),
}


@pytest.mark.parametrize(("own", "handed_in", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(own: Limits, handed_in: dict[str, Any], says: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        tightened(own, handed_in)
    assert caught.value.reason == "invalid_input"
    assert says in caught.value.message


_PLAY = st.fixed_dictionaries(
    {},
    optional={
        "max_cpus": st.none() | st.integers(-1, 20),
        "pids_limit": st.none() | st.integers(-1, 9000),
        **dict.fromkeys(("memory", "memory_swap", "shm_size"), st.none() | st.sampled_from(["0g", "1g", "32g", "64g"])),
    },
)


@given(_PLAY)
def test_nothing_that_is_accepted_is_looser(handed_in: dict[str, Any]) -> None:
    try:
        result = tightened(OWN, handed_in)
    except Ds01Error:
        return
    assert 0 < result.max_cpus <= OWN.max_cpus
    assert 0 < result.pids_limit <= OWN.pids_limit
    sizes = [int(getattr(result, key)[:-1]) for key in ("memory", "memory_swap", "shm_size")]
    assert all(0 < size <= most for size, most in zip(sizes, (32, 48, 16), strict=True))


class Engine:
    """Has every image and no container; `made` is what the create call was given."""

    made: dict[str, Any]

    def container(self, _name: str) -> None:
        return None

    def containers(self) -> tuple[()]:
        return ()

    def image(self, name: str) -> Image:
        return Image(name, {})

    def create(self, _name: str, body: dict[str, Any]) -> str:
        self.made = body
        raise Ds01Error("container_failed", "Far enough.")


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(engine, "connect", lambda: made)
    monkeypatch.setattr(accounts, "lookup", lambda name: Account(name, 2001, 2001, f"/nonexistent/{name}"))
    monkeypatch.setattr(workspace, "ensure", lambda *_: None)
    return made


def wish(**limits: Any) -> Wish:
    name = ContainerName("p", "carol", "p._.carol")
    return Wish("present", name, ContainerRequest(name, "img", limits=limits))


def test_the_create_call_has_the_tighter_limits_and_the_intent_too(host: Host, docker: Engine) -> None:
    containers = Containers(Allocations(Paths.from_env()))
    intents = set()
    for limits, memory, processes in (({}, 32, 4096), ({"memory": "8g", "pids_limit": 9}, 8, 9)):
        containers.apply([wish(**limits)])
        made = docker.made["HostConfig"]
        assert (made["Memory"], made["MemorySwap"], made["PidsLimit"]) == (memory << 30, memory << 30, processes)
        assert made["CgroupParent"] == "ds01-student-carol.slice"
        intents.add(docker.made["Labels"]["ds01.intent"])
    assert len(intents) == 2


@pytest.mark.parametrize("verb", ["apply", "preview"])
def test_looser_limits_are_refused_before_anything_is_made(verb: str, host: Host, docker: Engine) -> None:
    before = host.tree()
    (report,) = getattr(Containers(Allocations(Paths.from_env())), verb)([wish(memory="33g")])
    assert (report.result()["reason"], report.actions) == ("invalid_input", [])
    assert not hasattr(docker, "made")
    assert host.tree() == before


@pytest.mark.parametrize("form", ["one", "batch"])
def test_the_module_hands_on_what_the_play_says_null_and_absent_apart(
    form: str, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Asked:
        def __init__(self, _allocations: object) -> None: ...

        def apply(self, wishes: list[Wish]) -> None:
            asked.extend(wishes)
            raise ds01_container.Ds01Error("engine_unavailable", "Far enough.")

    monkeypatch.setattr(ds01_container, "Containers", Asked)
    item = {"project": "p", "user": "carol", "image": "img", "limits": {"memory": "8g", "max_cpus": None}}
    arguments = item if form == "one" else {"containers": [item, {"project": "q", "user": "carol", "image": "img"}]}
    with patch_module_args({**arguments, "_ansible_remote_tmp": str(tmp_path)}), pytest.raises(SystemExit):
        ds01_container.main()
    assert json.loads(capsys.readouterr().out)["reason"] == "engine_unavailable"
    handed_on = [w.request.limits for w in asked]
    assert handed_on == [{"memory": "8g", "max_cpus": None}, {}][: len(asked)]
    assert len(asked) == (1 if form == "one" else 2)
