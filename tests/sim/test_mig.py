"""Creating and destroying instances: what works, and the driver's own code where it refuses."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pynvml
import pytest

from .calls import create_ci, create_gi, instances, profiles
from .conftest import OUT, tool

A100 = ("--gpus", "A100-SXM4-80GB", "--mig", "0=")


def test_an_instance_comes_and_goes(machine):
    started = machine(*A100)
    gpu = started.gpu()
    gi = create_gi(gpu, "2g.20gb", start=4)
    assert started.migs() == {}, "a GPU instance alone is no device"
    ci = create_ci(gi)
    device = pynvml.nvmlComputeInstanceGetInfo(ci).device

    assert started.uuids() == [pynvml.nvmlDeviceGetUUID(device)]
    assert re.fullmatch(r"MIG-\w{8}-\w{4}-5\w{3}-[89ab]\w{3}-\w{12}", started.uuids()[0])
    assert pynvml.nvmlDeviceIsMigDeviceHandle(device).value == 1
    assert pynvml.nvmlDeviceIsMigDeviceHandle(gpu).value == 0
    assert pynvml.nvmlDeviceGetName(device) == "NVIDIA A100-SXM4-80GB MIG 2g.20gb"
    assert (pynvml.nvmlDeviceGetGpuInstanceId(device), pynvml.nvmlDeviceGetComputeInstanceId(device)) == (5, 0)
    parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device)
    assert pynvml.nvmlDeviceGetUUID(parent) == pynvml.nvmlDeviceGetUUID(gpu)
    attributes = pynvml.nvmlDeviceGetAttributes(device)
    assert (attributes.multiprocessorCount, attributes.memorySizeMB) == (28, 19968)
    assert pynvml.nvmlDeviceGetMemoryInfo(device).total == 19968 << 20

    pynvml.nvmlComputeInstanceDestroy(ci)
    pynvml.nvmlGpuInstanceDestroy(gi)
    assert instances(gpu) == []
    for stale in (lambda: pynvml.nvmlComputeInstanceDestroy(ci), lambda: pynvml.nvmlDeviceGetUUID(device)):
        with pytest.raises(pynvml.NVMLError_NotFound):
            stale()


def test_an_instance_is_never_given_an_old_ones_uuid(machine):
    started, seen = machine(*A100), set()
    for _ in range(5):
        gi = create_gi(started.gpu(), "1g.10gb", start=0)
        ci = create_ci(gi)
        seen.update(started.uuids())
        pynvml.nvmlComputeInstanceDestroy(ci)
        pynvml.nvmlGpuInstanceDestroy(gi)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("cut", "name", "start"),
    [
        ("1g.10gb", "1g.10gb", 0),  # exactly this placement is taken
        ("7g.80gb", "1g.10gb", 3),
        ("3g.40gb,4g.40gb", "1g.10gb", None),
        ("1g.10gb+me", "1g.10gb+me", 3),  # the media engines are taken, whatever the placement
        ("2g.20gb,2g.20gb,2g.20gb", "3g.40gb", None),
    ],
)
def test_what_is_taken_is_refused(machine, cut, name, start):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", f"0={cut}")
    before = instances(started.gpu())
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        create_gi(started.gpu(), name, start=start)
    assert instances(started.gpu()) == before


@pytest.mark.parametrize(("start", "size"), [(1, 2), (0, 1), (6, 2), (8, 2)])
def test_a_placement_that_does_not_exist_is_an_invalid_argument(machine, start, size):
    gpu = machine(*A100).gpu()
    place = pynvml.c_nvmlGpuInstancePlacement_t(start, size)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profiles(gpu)["2g.20gb"].id, pynvml.byref(place))


def test_the_driver_places_small_instances_from_the_top(machine):
    gpu = machine(*A100).gpu()
    for name in ("1g.10gb", "2g.20gb", "4g.40gb"):
        create_gi(gpu, name)
    assert instances(gpu) == [("4g.40gb", 1, 0), ("2g.20gb", 5, 4), ("1g.10gb", 13, 6)]


def test_capacity_counts_what_still_fits(machine):
    gpu = machine(*A100).gpu()
    create_gi(gpu, "3g.40gb", start=4)
    create_gi(gpu, "1g.10gb+me", start=0)
    left = {n: pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, i.id) for n, i in profiles(gpu).items()}
    assert left == {
        "1g.10gb": 3,
        "1g.10gb+me": 0,
        "1g.20gb": 1,
        "2g.20gb": 1,
        "3g.40gb": 0,
        "4g.40gb": 0,
        "7g.80gb": 0,
    }


def test_an_instance_with_something_in_it_stays(machine):
    started = machine(*A100)
    gi = create_gi(started.gpu(), "3g.40gb")
    ci = create_ci(gi)
    with pytest.raises(pynvml.NVMLError_InUse):
        pynvml.nvmlGpuInstanceDestroy(gi)
    for take, free in (("busy=0:0", "idle=0:0"), ("process=0.0:4711", "exit=0:4711")):
        started.set(take)
        with pytest.raises(pynvml.NVMLError_InUse):
            pynvml.nvmlComputeInstanceDestroy(ci)
        started.set(free)
    pynvml.nvmlComputeInstanceDestroy(ci)
    pynvml.nvmlGpuInstanceDestroy(gi)


def test_a_gpu_instance_can_be_divided_further(machine):
    started = machine(*A100)
    gi = create_gi(started.gpu(), "3g.40gb")
    cis = [create_ci(gi, slices=1) for _ in range(3)]
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        create_ci(gi, slices=1)
    assert [pynvml.nvmlDeviceGetName(d).split()[-1] for d in started.migs().values()] == ["1c.3g.40gb"] * 3
    pynvml.nvmlComputeInstanceDestroy(cis[1])
    assert [pynvml.nvmlDeviceGetComputeInstanceId(d) for d in started.migs().values()] == [0, 2]
    assert pynvml.nvmlComputeInstanceGetInfo(create_ci(gi, slices=1)).id == 1


def test_larger_devices_come_first_so_a_new_one_renumbers_the_rest(machine):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=1g.10gb,1g.10gb")
    ones = started.uuids()
    create_ci(create_gi(started.gpu(), "2g.20gb", start=4))
    assert started.uuids()[1:] == ones


def test_the_walk_by_index_meets_gaps(machine):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=2g.20gb,1g.10gb")
    gpu = started.gpu()
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu) == 7
    assert list(started.migs()) == [0, 1]
    uuids = started.uuids()
    started.set("gap=0:0", "gap=0:2")
    assert list(started.migs()) == [1, 3]
    assert started.uuids() == uuids
    assert [pynvml.nvmlDeviceGetIndex(mig) for mig in started.migs().values()] == [1, 3]
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 7)
    started.set("process=0.3:4711")
    assert len(pynvml.nvmlDeviceGetComputeRunningProcesses(started.migs()[3])) == 1
    started.set("no-gap=0:0", "no-gap=0:2")
    assert list(started.migs()) == [0, 1]


def test_a_device_is_found_by_either_of_its_names(machine):
    started = machine("--gpus", "2xA100-SXM4-80GB", "--mig", "1=2g.20gb")
    [uuid] = started.uuids(1)
    gpu = pynvml.nvmlDeviceGetUUID(started.gpu(1))
    for name in (uuid, f"MIG-{gpu}/3/0"):
        assert pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByUUID(name.encode())) == uuid
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByUUID(b"MIG-00000000-0000-5000-8000-000000000000")


def test_utilisation_is_not_known_under_mig(machine):
    started = machine("--gpus", "2xA100-SXM4-80GB", "--mig", "1=2g.20gb")
    started.set("utilization=0:35")
    assert pynvml.nvmlDeviceGetUtilizationRates(started.gpu(0)).gpu == 35
    for device in (started.gpu(1), started.migs(1)[0]):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            pynvml.nvmlDeviceGetUtilizationRates(device)


def test_a_small_buffer_is_refused(machine):
    gpu = machine(*A100).gpu()
    out, count = (pynvml.c_nvmlGpuInstancePlacement_t * 3)(), pynvml.c_uint(3)
    with pytest.raises(pynvml.NVMLError_InsufficientSize):
        pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, 19, out, pynvml.byref(count))
    assert count.value == 7


@contextlib.contextmanager
def nobody():
    """Not root for a while."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_only_root_changes_gpus_and_sees_all_instances(machine, monkeypatch):
    started = machine("--gpus", "2xA100-SXM4-80GB", "--mig", "0=1g.10gb")
    started.set("permit=root")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are for their owner only
        Path(folder).chmod(0o755)
        monkeypatch.setenv("NVML_SIM_STATE", shutil.copy(started.state, folder))
        with nobody():
            gpu, mig = started.gpu(), started.migs()[0]
            assert pynvml.nvmlDeviceGetUUID(mig).startswith("MIG-"), "looking is for everybody"
            assert pynvml.nvmlDeviceGetComputeRunningProcesses(mig) == []
            assert pynvml.nvmlDeviceGetComputeRunningProcesses(started.gpu(1)) == []
            for change in (
                lambda: pynvml.nvmlDeviceCreateGpuInstance(gpu, 19),
                lambda: pynvml.nvmlDeviceSetMigMode(started.gpu(1), 1),
                lambda: pynvml.nvmlDeviceSetPersistenceMode(gpu, 1),
                lambda: pynvml.nvmlDeviceGetGpuInstanceById(gpu, 13),
                lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(gpu),
            ):
                with pytest.raises(pynvml.NVMLError_NoPermission):
                    change()


CREATE_ONE = """
import pynvml
pynvml.nvmlInit()
made = 0
for gpu in map(pynvml.nvmlDeviceGetHandleByIndex, range(2)):
    for start in range(7):
        try:
            place = pynvml.c_nvmlGpuInstancePlacement_t(start, 1)
            gi = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 19, pynvml.byref(place))
            pynvml.nvmlGpuInstanceCreateComputeInstance(gi, 0)
            made += 1
        except pynvml.NVMLError_InsufficientResources:
            pass
print(made)
"""


def test_twenty_processes_never_overlap(machine):
    """Also the documented way in: another process, through the loader's path and the environment."""
    started = machine("--gpus", "2xA100-SXM4-80GB", "--mig", "0=", "--mig", "1=")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE_ONE],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LD_LIBRARY_PATH": str(OUT)},
        )
        for _ in range(20)
    ]
    made = [int(run.communicate(timeout=30)[0]) for run in runs]
    assert sum(made) == 14
    for index in (0, 1):
        assert sorted(start for _, _, start in instances(started.gpu(index))) == list(range(7))
        assert len(set(started.uuids(index))) == 7


def test_init_finds_an_order_that_fits(tmp_path):
    state = tmp_path / "state"
    tool("nvml-sim", "init", state, "--gpus", "A100-SXM4-80GB", "--mig", "0=3g.40gb,2g.20gb,2g.20gb")
    refused = tool("nvml-sim", "init", state, "--gpus", "A100-SXM4-80GB", "--mig", "0=4g.40gb,4g.40gb", check=False)
    assert refused.returncode == 2
    assert refused.stderr == "nvml-sim: 4g.40gb, 4g.40gb do not fit on GPU 0 together.\n"
