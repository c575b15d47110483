"""The engine's create call, and what lies in a container at its first start."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
from ds01 import container_spec
from ds01.container_spec import ContainerRequest, ImageFiles, Mount
from ds01.errors import Ds01Error
from ds01.limits import ContainerDefaults, Limits
from ds01.names import Account, ContainerName
from support import limits_of

ALICE = Account("alice", 2001, 2002, "/home/alice", group="alice")
NAME = ContainerName("my-project", "alice", "my-project._.alice")
REQUEST = ContainerRequest(NAME, "img:1", gpus=1)
DEFAULTS = ContainerDefaults(allowed_mounts=("/data", "/srv/models/"))
BARE = ImageFiles(None, None, None, has_shell=False, has_sudo=False, has_bashrc=False)


def body(
    request: ContainerRequest = REQUEST,
    limits: Limits | None = None,
    defaults: ContainerDefaults = DEFAULTS,
    labels: dict[str, str] | None = None,
) -> dict[str, Any]:
    mounts = [Mount("/home/alice/workspace", "/workspace")]
    return container_spec.body(request, ALICE, limits or limits_of(), defaults, mounts, labels or {})


def test_a_gpu_container_asks_for_its_own_device_and_nothing_else() -> None:
    host = body()["HostConfig"]
    assert host["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["ds01.io/gpu=my-project._.alice"]}]
    assert host["Privileged"] is False
    assert not {"Devices", "CapAdd", "Runtime", "PidMode", "IpcMode", "UsernsMode"} & set(host)


def test_a_cpu_only_container_asks_for_no_device() -> None:
    spec = body(replace(REQUEST, gpus=0))
    assert spec["HostConfig"]["DeviceRequests"] == []
    assert "NVIDIA_VISIBLE_DEVICES=void" in spec["Env"]


def test_it_runs_as_the_user_in_the_workspace_with_a_terminal() -> None:
    spec = body()
    assert (spec["User"], spec["WorkingDir"], spec["Tty"], spec["OpenStdin"]) == ("2001:2002", "/workspace", True, True)
    assert spec["HostConfig"]["RestartPolicy"] == {"Name": "no"}


def test_all_limits_are_in_the_create_call() -> None:
    limits = limits_of(max_cpus=2.5, memory="64g", shm_size="16g", pids_limit=4096)
    host = body(limits=limits)["HostConfig"]
    assert (host["CpuPeriod"], host["CpuQuota"]) == (100_000, 250_000)
    assert host["Memory"] == host["MemorySwap"] == 64 * 1024**3
    assert (host["ShmSize"], host["PidsLimit"]) == (16 * 1024**3, 4096)
    assert host["CgroupParent"] == "ds01-student-alice.slice"
    assert host["Ulimits"] == [
        {"Name": "memlock", "Soft": -1, "Hard": -1},
        {"Name": "stack", "Soft": 67108864, "Hard": 67108864},
    ]


def test_a_null_limit_is_left_out() -> None:
    unlimited = limits_of(max_cpus=None, memory=None, memory_swap=None, shm_size=None, pids_limit=None)
    host = body(limits=unlimited)["HostConfig"]
    assert not {"CpuQuota", "Memory", "MemorySwap", "ShmSize", "PidsLimit"} & set(host)


def test_labels_are_ds01_s_and_an_image_cannot_claim_them() -> None:
    labels = body(labels={"ds01.user": "mallory", "ds01.protected": "true", "aime.mlc.GPUS": "all", "vendor": "x"})[
        "Labels"
    ]
    assert labels["ds01.user"] == labels["aime.mlc"] == labels["aime.mlc.USER"] == "alice"
    assert labels["ds01.protected"] == labels["aime.mlc.GPUS"] == ""
    assert "vendor" not in labels, "the engine merges it by itself"
    assert (labels["ds01.managed"], labels["DS01_MANAGED"], labels["CUSTOM_IMAGE"]) == ("true", "true", "img:1")


def test_the_intent_changes_with_the_wish_and_not_with_the_time() -> None:
    spec = body()
    later = container_spec.stamped(spec, datetime(2025, 11, 21, 10, 30, tzinfo=timezone.utc), [{"id": "0"}])
    assert later["Labels"]["ds01.devices"] == '[{"id": "0"}]'
    assert later["Labels"]["ds01.created_at"] == "2025-11-21T10:30:00Z"
    assert later["Labels"]["ds01.intent"] == spec["Labels"]["ds01.intent"] == body()["Labels"]["ds01.intent"]
    others = [
        body(replace(REQUEST, image="img:2")),
        body(replace(REQUEST, gpus=2)),
        body(replace(REQUEST, env={"A": "b"})),
        body(limits=limits_of(memory="1g")),
    ]
    assert len({spec["Labels"]["ds01.intent"], *(o["Labels"]["ds01.intent"] for o in others)}) == 5


def test_new_privileges_only_where_sudo_is_meant() -> None:
    assert body()["HostConfig"]["SecurityOpt"] == ["no-new-privileges"]
    assert body(defaults=ContainerDefaults(sudo=True))["HostConfig"]["SecurityOpt"] == []


@pytest.mark.parametrize(
    "env",
    [
        {"NVIDIA_VISIBLE_DEVICES": "all"},
        {"NVIDIA_MIG_CONFIG_DEVICES": "all"},
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"LD_PRELOAD": "/x.so"},
        {"LD_LIBRARY_PATH": "/x"},
        {"": "x"},
        {"A=B": "x"},
        {"A\nB": "x"},
    ],
    ids=lambda env: ascii(next(iter(env))),
)
def test_variables_that_reach_past_the_allocation_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(Ds01Error) as caught:
        container_spec.check_env(env)
    assert caught.value.reason == "invalid_input"


@pytest.mark.parametrize(
    "image", ["", "-x", "a b", "a\nb", "x" * 300], ids=["empty", "dash", "space", "newline", "long"]
)
def test_hostile_images_are_refused(image: str) -> None:
    with pytest.raises(Ds01Error, match="cannot be an image"):
        container_spec.check_image(image)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data:/data", Mount("/data", "/data")),
        ("/data/sets:/sets:ro", Mount("/data/sets", "/sets", read_only=True)),
        ("/srv/models:/models:rw", Mount("/srv/models", "/models")),
    ],
)
def test_allowed_mounts(text: str, expected: Mount) -> None:
    assert container_spec.parse_mount(text, DEFAULTS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/etc:/etc",
        "/data/../etc:/etc",
        "/database:/x",
        "data:/x",
        "/data:x",
        "/data:/",
        "/data",
        "/data:/x:zz",
        "a:b:c:d",
    ],
)
def test_other_mounts_are_refused(text: str) -> None:
    with pytest.raises(Ds01Error):
        container_spec.parse_mount(text, DEFAULTS)


@pytest.mark.parametrize(
    ("mode", "allowed", "fine"),
    [
        ("bridge", False, True),
        ("none", False, True),
        ("host", False, False),
        ("host", True, True),
        ("container:x", True, False),
    ],
)
def test_network_modes(mode: str, allowed: bool, fine: bool) -> None:
    defaults = ContainerDefaults(allow_host_network=allowed)
    if fine:
        container_spec.check_network(mode, defaults)
    else:
        with pytest.raises(Ds01Error):
            container_spec.check_network(mode, defaults)


@pytest.mark.parametrize(
    ("text", "binding"),
    [
        ("8888:80", {"HostIp": "", "HostPort": "8888"}),
        ("127.0.0.1:8888:80", {"HostIp": "127.0.0.1", "HostPort": "8888"}),
    ],
)
def test_ports(text: str, binding: dict[str, str]) -> None:
    spec = body(replace(REQUEST, ports=[text]))
    assert spec["HostConfig"]["PortBindings"] == {"80/tcp": [binding]}
    assert spec["ExposedPorts"] == {"80/tcp": {}}


@pytest.mark.parametrize("text", ["80", "a:b", "0:80", "80:70000", "::", "x:1:y"])
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(Ds01Error, match="port mapping"):
        body(replace(REQUEST, ports=[text]))


def first_start(defaults: ContainerDefaults = DEFAULTS, image: ImageFiles = BARE) -> dict[str, tarfile.TarInfo]:
    data = container_spec.first_start(REQUEST, ALICE, defaults, image)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {f"/{member.name}": member for member in archive}


def content(path: str, defaults: ContainerDefaults = DEFAULTS, image: ImageFiles = BARE) -> str:
    data = container_spec.first_start(REQUEST, ALICE, defaults, image)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile(path.lstrip("/"))
        assert file is not None
        return file.read().decode()


def test_the_home_is_the_user_s_and_the_system_files_are_root_s() -> None:
    files = first_start()
    assert (files["/home/alice"].uid, files["/home/alice"].gid, files["/home/alice"].mode) == (2001, 2002, 0o750)
    assert (files["/etc/passwd"].uid, files["/etc/passwd"].mode) == (0, 0o644)
    assert files["/home/alice/.bashrc"].uid == 2001


def test_only_what_the_image_lacks_is_added() -> None:
    full = ImageFiles("", "", "", has_shell=True, has_sudo=True, has_bashrc=True)
    assert "/etc/shadow" not in first_start()
    assert first_start(image=full)["/etc/shadow"].mode == 0o640
    assert "/home/alice/.bashrc" not in first_start(image=full)
    assert content("/etc/passwd").endswith(":/bin/sh\n")
    assert content("/etc/passwd", image=full).endswith(":/bin/bash\n")


@pytest.mark.parametrize(("wanted", "has", "there"), [(True, True, True), (True, False, False), (False, True, False)])
def test_sudo_where_it_is_allowed_and_the_image_has_it(wanted: bool, has: bool, there: bool) -> None:
    files = first_start(ContainerDefaults(sudo=wanted), replace(BARE, has_sudo=has))
    assert ("/etc/sudoers.d/ds01" in files) is there
    if there:
        assert files["/etc/sudoers.d/ds01"].mode == 0o440


def test_prompt_and_aliases_survive_quotes() -> None:
    text = content("/etc/ds01/shellrc", ContainerDefaults(aliases={"say": "echo 'it'; rm -rf \"$X\""}))
    assert "[my-project] " in text
    assert """alias say='echo '"'"'it'"'"'; rm -rf "$X"'""" in text


def made_from(spec: dict[str, Any], **host: Any) -> dict[str, Any]:
    """What an engine says of a container that was made from this: with the image's variables, and its own defaults."""
    defaults = {"Memory": 0, "CpuQuota": 0, "PidsLimit": None, "ShmSize": 64 << 20, "PortBindings": {}}
    return {**spec, "Env": [*spec["Env"], "PATH=/bin"], "HostConfig": {**defaults, **spec["HostConfig"], **host}}


DIFFERENCES: dict[str, tuple[ContainerRequest, dict[str, Any]]] = {
    "nothing": (REQUEST, {}),
    "another image": (replace(REQUEST, image="img:2"), {"image": {"is": "img:1", "wanted": "img:2"}}),
    "no device": (replace(REQUEST, gpus=0), {"gpus": {"is": 1, "wanted": 0}}),
    "a profile": (replace(REQUEST, profile="full"), {"profile": {"is": None, "wanted": "full"}}),
    "another network": (
        replace(REQUEST, network_mode="none"),
        {"network_mode": {"is": "bridge", "wanted": "none"}},
    ),
    "a port": (
        replace(REQUEST, ports=["127.0.0.1:80:8888"]),
        {"ports": {"is": [], "wanted": ["127.0.0.1:80:8888/tcp"]}},
    ),
    "a variable, without its value": (
        replace(REQUEST, env={"TOKEN": "secret"}),
        {"env": {"is": "other values", "wanted": ["TOKEN"]}},
    ),
}


@pytest.mark.parametrize(("request_", "expected"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_what_a_container_differs_in_is_named(request_: ContainerRequest, expected: dict[str, Any]) -> None:
    assert container_spec.differences(made_from(body()), body(request_)) == expected


def test_limits_that_differ_are_named_as_in_the_limits_file() -> None:
    found = container_spec.differences(
        made_from(body(limits=limits_of(max_cpus=2, memory="64g", pids_limit=9))),
        body(limits=limits_of(max_cpus=2.5, memory="1536m", pids_limit=None)),
    )
    assert found["max_cpus"] == {"is": 2.0, "wanted": 2.5}
    assert found["memory"] == {"is": "64g", "wanted": "1536m"}
    assert found["pids_limit"] == {"is": 9, "wanted": None}


def test_a_container_that_went_away_differs_in_nothing_that_could_be_named() -> None:
    assert container_spec.differences({}, body()) == {}


@pytest.mark.parametrize("path", ["/home/alice", "/opt/conda/", "/srv//x/../y"])
def test_a_path_that_can_be_kept(path: str) -> None:
    assert container_spec.check_keep(path) == {"/opt/conda/": "/opt/conda", "/srv//x/../y": "/srv/y"}.get(path, path)


@pytest.mark.parametrize(
    "path", ["", "/", "//", "home/alice", "/home/..", "/workspace", "/workspace/x", "/proc/1", "/dev", "/x/../sys"]
)
def test_a_path_that_cannot_be_kept(path: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        container_spec.check_keep(path)
    assert caught.value.reason == "invalid_input"
