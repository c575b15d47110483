"""Who uses GPUs without DS01, from inspect documents as Docker 26.1 writes them."""

from __future__ import annotations

from typing import Any

import pytest
from ds01.occupancy import GpuUse, as_opened, by_mig_index, gpu_use, occupied
from support import machine

SLICE = "2g.20gb"


def request(**fields: Any) -> dict[str, Any]:
    """A device request of the docker command, as the engine shows it."""
    return {"Driver": "", "Count": 0, "DeviceIDs": None, "Capabilities": [["gpu"]], "Options": {}, **fields}


def cdi(*names: str) -> dict[str, Any]:
    return request(Driver="cdi", DeviceIDs=list(names), Capabilities=None, Options=None)


def node(path: str) -> dict[str, str]:
    return {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rwm"}


def inspected(*requests: dict[str, Any], env: tuple[str, ...] = (), **host: Any) -> dict[str, Any]:
    """The parts of an inspect document that count."""
    config = {"DeviceRequests": list(requests) or None, "Devices": [], "Runtime": "runc", "Privileged": False, **host}
    return {"Name": "/trainer", "HostConfig": config, "Config": {"Env": ["PATH=/bin", *env]}}


def nvidia(*env: str, **host: Any) -> dict[str, Any]:
    """A container of NVIDIA's runtime; a default runtime is written into each container, too."""
    return inspected(env=env, Runtime="nvidia", **host)


ALL_VISIBLE = "NVIDIA_VISIBLE_DEVICES=all"

NO_GPU = {
    "a plain container": inspected(),
    "a document without any device fields": {"Name": "/trainer", "HostConfig": {}, "Config": {"Env": None}},
    "a count of 0": inspected(request(Count=0)),
    "ids that say none": inspected(request(DeviceIDs=["none"])),
    "AMD's GPUs by driver": inspected(request(Driver="amd", Count=-1)),
    "AMD's GPUs by capability": inspected(request(Count=-1, Capabilities=[["gpu", "amd"]])),
    "another kind of device": inspected(request(Count=-1, Capabilities=[["tpu"]])),
    "a request for nothing in particular": inspected(request(Count=-1, Capabilities=None)),
    "another vendor's CDI device": inspected(cdi("amd.com/gpu=all", "notnvidia.com/gpu=0")),
    "control nodes only": inspected(
        Devices=[node("/dev/nvidiactl"), node("/dev/nvidia-uvm"), node("/dev/nvidia-caps/nvidia-cap21")]
    ),
    "another device": inspected(Devices=[node("/dev/fuse"), node("/dev/nvidia")]),
    "the variable without NVIDIA's runtime": inspected(env=(ALL_VISIBLE,)),
    "no runtime named": inspected(env=(ALL_VISIBLE,), Runtime=None),
    "the variable is void": nvidia("NVIDIA_VISIBLE_DEVICES=void"),
    "the variable is none": nvidia("NVIDIA_VISIBLE_DEVICES=none"),
    "the variable is empty": nvidia("NVIDIA_VISIBLE_DEVICES="),
    "the variable is absent": nvidia(),
    "the variable was taken away": nvidia("NVIDIA_VISIBLE_DEVICES"),
    "the variable is void in an old CUDA image": nvidia("NVIDIA_VISIBLE_DEVICES=void", "CUDA_VERSION=8.0.61"),
    "a newer CUDA image": nvidia("CUDA_VERSION=12.4.1", "NVIDIA_REQUIRE_CUDA=cuda>=12.4"),
    "privileged alone is like a program on the host (L19)": inspected(Privileged=True),
}

# name: document, what was promised, how
PROMISED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "--gpus all (L7)": (inspected(request(Count=-1)), {"everything": True}, "--gpus all"),
    "--gpus 2 (L7)": (inspected(request(Count=2)), {"first": 2}, "--gpus 2"),
    "a container made with the old default of all GPUs (L14)": (
        inspected(request(Driver="nvidia", Count=-1, Capabilities=[["gpu", "nvidia", "compute"]])),
        {"everything": True},
        "--gpus all",
    ),
    "several ids in one request (L17)": (
        inspected(request(DeviceIDs=["MIG-1-0", "GPU-2"])),
        {"names": ("MIG-1-0", "GPU-2")},
        "--gpus device=MIG-1-0,GPU-2",
    ),
    "several ids in one text (L17)": (
        inspected(request(DeviceIDs=["0, 1:2"])),
        {"names": ("0", "1:2")},
        "--gpus device=0, 1:2",
    ),
    "an id of the replaced system": (inspected(request(DeviceIDs=["0.1"])), {"names": ("0:1",)}, "--gpus device=0.1"),
    "an id with a leading zero": (inspected(request(DeviceIDs=["00:01"])), {"names": ("0:1",)}, "--gpus device=00:01"),
    "an id that says all": (inspected(request(DeviceIDs=["all"])), {"everything": True}, "--gpus device=all"),
    "a bus id": (
        inspected(request(DeviceIDs=["0000:3b:00.0"])),
        {"everything": True},
        "--gpus device=0000:3b:00.0",
    ),
    "an instance in the old form": (
        inspected(request(DeviceIDs=["MIG-GPU-1/1/0"])),
        {"everything": True},
        "--gpus device=MIG-GPU-1/1/0",
    ),
    "only the driver's tools": (
        inspected(request(Count=-1, Capabilities=[["utility"]])),
        {"everything": True},
        "--gpus all",
    ),
    "NVIDIA's driver through CDI": (
        inspected(request(Driver="nvidia.cdi", DeviceIDs=["nvidia.com/gpu=0"], Capabilities=None)),
        {"names": ("0",)},
        "--gpus device=nvidia.com/gpu=0",
    ),
    "CDI, one GPU": (inspected(cdi("nvidia.com/gpu=0")), {"names": ("0",)}, "--device nvidia.com/gpu=0"),
    "CDI, one MIG device": (inspected(cdi("nvidia.com/gpu=0:1")), {"names": ("0:1",)}, "--device nvidia.com/gpu=0:1"),
    "CDI, a UUID": (inspected(cdi("nvidia.com/gpu=GPU-1")), {"names": ("GPU-1",)}, "--device nvidia.com/gpu=GPU-1"),
    "CDI, all": (inspected(cdi("nvidia.com/gpu=all")), {"everything": True}, "--device nvidia.com/gpu=all"),
    "CDI, a form that is not known": (
        inspected(cdi("nvidia.com/gpu=gpu0")),
        {"everything": True},
        "--device nvidia.com/gpu=gpu0",
    ),
    "CDI, another kind of NVIDIA's": (
        inspected(cdi("management.nvidia.com/gpu=0")),
        {"everything": True},
        "--device management.nvidia.com/gpu=0",
    ),
    "CDI, a device that DS01 made for somebody": (
        inspected(cdi("ds01.io/gpu=p._.bob")),
        {"everything": True},
        "--device ds01.io/gpu=p._.bob",
    ),
    "CDI, NVIDIA's beside another vendor's": (
        inspected(cdi("amd.com/gpu=0", "nvidia.com/gpu=1")),
        {"names": ("1",)},
        "--device nvidia.com/gpu=1",
    ),
    "a device node": (
        inspected(Devices=[node("/dev/nvidia3"), node("/dev/nvidiactl")]),
        {"minors": (3,)},
        "device /dev/nvidia3",
    ),
    "every device node": (inspected(Devices=[node("/dev/")]), {"everything": True}, "device /dev"),
    "the variable says all (L15, L19)": (nvidia(ALL_VISIBLE), {"everything": True}, ALL_VISIBLE),
    "an AIME image, privileged (B21)": (
        nvidia(ALL_VISIBLE, Privileged=True),
        {"everything": True},
        f"{ALL_VISIBLE}, --privileged",
    ),
    "privileged sees more than the GPU it asked for (B21)": (
        inspected(request(DeviceIDs=["0"]), Privileged=True),
        {"everything": True, "names": ("0",)},
        "--gpus device=0, --privileged",
    ),
    "the variable lists some": (
        nvidia("NVIDIA_VISIBLE_DEVICES=0,MIG-1-0,"),
        {"names": ("0", "MIG-1-0")},
        "NVIDIA_VISIBLE_DEVICES=0,MIG-1-0,",
    ),
    "the variable names a CDI device": (
        nvidia("NVIDIA_VISIBLE_DEVICES=nvidia.com/gpu=1"),
        {"names": ("1",)},
        "NVIDIA_VISIBLE_DEVICES=nvidia.com/gpu=1",
    ),
    "a variant of NVIDIA's runtime": (
        nvidia("NVIDIA_VISIBLE_DEVICES=1") | {"HostConfig": {"Runtime": "nvidia-cdi"}},
        {"names": ("1",)},
        "NVIDIA_VISIBLE_DEVICES=1",
    ),
    "an old CUDA image, the variable absent": (
        nvidia("CUDA_VERSION=8.0.61"),
        {"everything": True},
        "CUDA_VERSION=8.0.61 with NVIDIA's runtime",
    ),
    "a request takes the place of the image's variable": (
        nvidia(ALL_VISIBLE, DeviceRequests=[request(DeviceIDs=["0"])]),
        {"names": ("0",)},
        "--gpus device=0",
    ),
    "a request for nothing leaves the image's variable": (
        nvidia(ALL_VISIBLE, DeviceRequests=[request(Count=0)]),
        {"everything": True},
        ALL_VISIBLE,
    ),
    "a CDI request may leave the image's variable": (
        nvidia(ALL_VISIBLE, DeviceRequests=[cdi("nvidia.com/gpu=0")]),
        {"everything": True, "names": ("0",)},
        f"--device nvidia.com/gpu=0, {ALL_VISIBLE}",
    ),
    "several ways at once": (
        inspected(request(Count=1), cdi("nvidia.com/gpu=2"), Devices=[node("/dev/nvidia3")]),
        {"first": 1, "names": ("2",), "minors": (3,)},
        "--gpus 1, --device nvidia.com/gpu=2, device /dev/nvidia3",
    ),
}


@pytest.mark.parametrize("document", NO_GPU.values(), ids=NO_GPU)
def test_promised_no_gpu(document: dict[str, Any]) -> None:
    assert gpu_use(document) is None


@pytest.mark.parametrize(("document", "promised", "how"), PROMISED.values(), ids=PROMISED)
def test_what_a_container_was_promised(document: dict[str, Any], promised: dict[str, Any], how: str) -> None:
    assert gpu_use(document) == GpuUse("trainer", **promised, how=how)


def test_an_image_cannot_write_to_the_terminal_or_flood_the_log() -> None:
    use = gpu_use(nvidia(f"NVIDIA_VISIBLE_DEVICES=\x1b[2J\n{'9' * 5000}"))
    assert use is not None
    assert use.everything
    assert use.how.isprintable()
    assert len(use.how) < 200


# name: the server, what is promised, ids of the devices that are taken
COVERED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "everything": (["full", [SLICE, SLICE]], {"everything": True}, "0 1:0 1:1"),
    "a GPU by index": (["full", "full"], {"names": ("1",)}, "1"),
    "a GPU by index is no MIG device": (["full", [SLICE, SLICE]], {"names": ("0",)}, "0"),
    "a GPU in MIG mode: all that it is cut into": (["full", [SLICE, SLICE]], {"names": ("1",)}, "1:0 1:1"),
    "its UUID": (["full", [SLICE, SLICE]], {"names": ("GPU-1",)}, "1:0 1:1"),
    "a MIG device: only it": ([[SLICE, SLICE]], {"names": ("0:1",)}, "0:1"),
    "a MIG device's UUID": ([[SLICE, SLICE]], {"names": ("mig-0-1",)}, "0:1"),
    "a node": (["full", [SLICE, SLICE]], {"minors": (1,)}, "1:0 1:1"),
    "the first of them": (["full", [SLICE], "full"], {"first": 2}, "0 1:0"),
    "more than there are": (["full"], {"first": 8}, "0"),
    "what is not here": (["full", [SLICE]], {"names": ("7", "1:9", "GPU-f", "MIG-f"), "minors": (9, 255)}, ""),
    "MIG mode and not cut": ([[]], {"everything": True}, ""),
    "GPU 1 is not GPU 10": (["full"] * 11, {"names": ("1", "GPU-1")}, "1"),
}


@pytest.mark.parametrize(("gpus", "promised", "ids"), COVERED.values(), ids=COVERED)
def test_what_a_use_covers(gpus: list[Any], promised: dict[str, Any], ids: str) -> None:
    inventory = machine(*gpus)
    taken = occupied(inventory, [GpuUse("trainer", **promised, how="somehow")], {}, str)
    assert " ".join(d.id for d in inventory.devices if d.uuid in taken) == ids


ALL, ONE = GpuUse("trainer", everything=True, how="--gpus all"), GpuUse("other", names=("0",), how="--gpus device=0")

PHRASES = {
    "nobody": ([], (), None),
    "a container": ([ALL], (), "container trainer (--gpus all)"),
    "containers": ([ONE, ALL], (), "container other (--gpus device=0) and 1 more"),
    "a process": ([], (4711,), "process 4711"),
    "processes": ([], (4711, 12, 13), "process 4711 and 2 more"),
    "a container and its processes": ([ALL], (4711, 12), "container trainer (--gpus all)"),
}


@pytest.mark.parametrize(("uses", "pids", "phrase"), PHRASES.values(), ids=PHRASES)
def test_the_phrase(uses: list[GpuUse], pids: tuple[int, ...], phrase: str | None) -> None:
    taken = occupied(machine("full"), iter(uses), {"GPU-0": pids} if pids else {}, lambda pid: f"process {pid}")
    assert taken == ({"GPU-0": phrase} if phrase else {})


def test_only_the_process_that_is_named_is_looked_up() -> None:
    asked: list[int] = []
    occupied(machine("full", "full"), [ONE], {"GPU-0": (1, 2), "GPU-1": (3, 4)}, lambda pid: str(asked.append(pid)))
    assert asked == [3]


BY_INDEX = GpuUse("trainer", names=("0:1", "1", "MIG-1-0"), how="--device nvidia.com/gpu=0:1")


@pytest.mark.parametrize("names", [("0:1",), ("0", "1:0")], ids=str)
def test_a_mig_index_is_no_lasting_name(names: tuple[str, ...]) -> None:
    assert by_mig_index(GpuUse("trainer", names=names))
    assert not by_mig_index(GpuUse("trainer", names=("0", "MIG-0-1")))


def test_what_was_promised_by_index_is_what_the_container_opened() -> None:
    """The GPU was cut anew since: what is 0:1 now is not what the container was given at its start."""
    inventory = machine(["2g.20gb", "2g.20gb"], "full")
    use = as_opened(GpuUse("trainer", names=("0:1",), how="x"), (12, 13), {"MIG-0-0": 12, "MIG-0-1": 21})
    assert set(occupied(inventory, [use], {}, str)) == {"MIG-0-0"}


def test_what_cannot_be_told_counts_for_the_whole_gpu() -> None:
    inventory = machine(["2g.20gb", "2g.20gb"], "full")
    assert as_opened(BY_INDEX, None, {}).names == ("1", "MIG-1-0", "0")
    use = as_opened(GpuUse("trainer", names=("0:1",), how="x"), None, {})
    assert set(occupied(inventory, [use], {}, str)) == {"MIG-0-0", "MIG-0-1"}


def test_names_that_last_stay() -> None:
    assert as_opened(BY_INDEX, (12,), {}).names == ("1", "MIG-1-0")
