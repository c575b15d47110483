"""Whole GPUs and the driver: identity, MIG mode, faults and reboots."""

import os
import subprocess
import sys
import threading
import time

import pynvml
import pytest

from .calls import create_gi, instances
from .conftest import OUT, tool

IN_USE, RESET_REQUIRED = pynvml.NVML_ERROR_IN_USE, pynvml.NVML_ERROR_RESET_REQUIRED


def test_what_a_gpu_says_of_itself(machine):
    started = machine("--gpus", "4xA100-SXM4-80GB", "--driver-version", "575.57.08")
    assert pynvml.nvmlDeviceGetCount() == 4
    assert pynvml.nvmlSystemGetDriverVersion() == "575.57.08"
    assert pynvml.nvmlSystemGetCudaDriverVersion() == 12090
    gpu = started.gpu(2)
    pci = pynvml.nvmlDeviceGetPciInfo(gpu)
    assert (pci.busId, pci.busIdLegacy, pci.pciDeviceId) == ("00000000:47:00.0", "0000:47:00.0", 0x20B210DE)
    assert (pynvml.nvmlDeviceGetIndex(gpu), pynvml.nvmlDeviceGetMinorNumber(gpu)) == (2, 2)
    assert pynvml.nvmlDeviceGetArchitecture(gpu) == pynvml.NVML_DEVICE_ARCH_AMPERE
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
    assert (memory.total, memory.used) == (81920 << 20, 0)
    for found in (
        pynvml.nvmlDeviceGetHandleByPciBusId(b"0000:47:00.0"),
        pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(gpu).encode()),
        pynvml.nvmlDeviceGetHandleBySerial(pynvml.nvmlDeviceGetSerial(gpu).encode()),
    ):
        assert pynvml.nvmlDeviceGetIndex(found) == 2
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        started.gpu(4)
    levels = [pynvml.nvmlDeviceGetTopologyCommonAncestor(started.gpu(0), started.gpu(i)) for i in range(4)]
    assert levels == [0, pynvml.NVML_TOPOLOGY_MULTIPLE, pynvml.NVML_TOPOLOGY_SYSTEM, pynvml.NVML_TOPOLOGY_SYSTEM]
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        pynvml.nvmlDeviceGetNumFans(gpu)


def test_nothing_answers_before_init(machine):
    machine("--gpus", "A100-SXM4-80GB")
    pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()
    pynvml.nvmlInit()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("version-mismatch=on", pynvml.NVMLError_LibRmVersionMismatch),
        ("loaded=off", pynvml.NVMLError_DriverNotLoaded),
    ],
)
def test_a_driver_that_does_not_work(machine, change, refusal):
    started = machine("--gpus", "A100-SXM4-80GB", init=False)
    started.set(change)
    with pytest.raises(refusal):
        pynvml.nvmlInit()
    started.set("reboot")
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()


def test_no_state_is_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("NVML_SIM_STATE", str(tmp_path / "none"))
    with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
        pynvml.nvmlInit()
    (tmp_path / "none").write_text("gpu minor=0 model=Voodoo\n")
    with pytest.raises(pynvml.NVMLError_Unknown):
        pynvml.nvmlInit()


def test_a_lost_gpu_takes_nobody_with_it(machine):
    started = machine("--gpus", "3xA100-SXM4-80GB", "--mig", "1=1g.10gb")
    gpu, mig = started.gpu(1), started.migs(1)[0]
    uuid = started.uuids(1)[0]
    started.set("lost=1")
    assert pynvml.nvmlDeviceGetCount() == 3
    for call in (
        lambda: started.gpu(1),
        lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()),
        lambda: pynvml.nvmlDeviceGetUUID(gpu),
        lambda: pynvml.nvmlDeviceGetMigMode(gpu),
        lambda: pynvml.nvmlDeviceGetRemappedRows(gpu),
        lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(gpu),
        lambda: pynvml.nvmlDeviceCreateGpuInstance(gpu, 19),
        lambda: pynvml.nvmlDeviceGetUUID(mig),
    ):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            call()
    assert [pynvml.nvmlDeviceGetIndex(started.gpu(i)) for i in (0, 2)] == [0, 2]
    started.set("found=1")
    assert started.uuids(1) == [uuid]


@pytest.mark.parametrize(
    ("model", "before", "status", "after"),
    [
        ("A100-SXM4-80GB", [], 0, [1, 1]),
        ("A100-SXM4-80GB", ["process=0:4711"], IN_USE, [0, 1]),
        ("A30-24GB", ["busy=0"], IN_USE, [0, 1]),
        ("A100-SXM4-80GB", ["passthrough=0"], RESET_REQUIRED, [0, 1]),
        ("H100-SXM5-80GB", [], 0, [1, 1]),
        ("H100-SXM5-80GB", ["process=0:4711"], IN_USE, [0, 0]),
        ("H200-141GB", ["passthrough=0"], 0, [1, 1]),
    ],
)
def test_mig_mode_tells_what_came_of_it(machine, model, before, status, after):
    started = machine("--gpus", model)
    if before:
        started.set(*before)
    assert pynvml.nvmlDeviceSetMigMode(started.gpu(), 1) == status
    assert pynvml.nvmlDeviceGetMigMode(started.gpu()) == after


def test_a_pending_mode_comes_with_the_next_reset(machine):
    started = machine("--gpus", "A100-SXM4-80GB")
    started.set("process=0:4711")
    pynvml.nvmlDeviceSetMigMode(started.gpu(), 1)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceCreateGpuInstance(started.gpu(), 19)
    started.set("exit=0:4711", "reset=0")
    assert pynvml.nvmlDeviceGetMigMode(started.gpu()) == [1, 1]
    create_gi(started.gpu(), "1g.10gb")
    assert pynvml.nvmlDeviceSetMigMode(started.gpu(), 0) == IN_USE
    assert pynvml.nvmlDeviceGetMigMode(started.gpu()) == [1, 0]


@pytest.mark.parametrize(("model", "mode"), [("A100-SXM4-80GB", [1, 1]), ("H100-SXM5-80GB", [0, 0])])
def test_a_reboot_leaves_no_instances_and_only_stored_modes(machine, model, mode):
    started = machine("--gpus", model, "--mig", "0=1g.10gb")
    [old] = started.uuids()
    started.set("process=0.0:4711", "lost=0", "reboot")
    assert pynvml.nvmlDeviceGetMigMode(started.gpu()) == mode
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(started.gpu()) == []
    assert started.uuids() == []
    assert "boot 2" in tool("nvml-sim", "show", started.state).stdout
    pynvml.nvmlDeviceSetMigMode(started.gpu(), 1)
    assert instances(started.gpu()) == []
    gi = create_gi(started.gpu(), "1g.10gb", start=6)
    pynvml.nvmlGpuInstanceCreateComputeInstance(gi, 0)
    assert started.uuids() != [old]


def test_processes_are_listed_where_they_run(machine):
    started = machine("--gpus", "2xA100-SXM4-80GB", "--mig", "1=2g.20gb,1g.10gb")
    started.set("process=0:11:2000", "process=0:12:100:G", "process=1.1:13:500")
    [one] = pynvml.nvmlDeviceGetComputeRunningProcesses(started.gpu(0))
    assert (one.pid, one.usedGpuMemory) == (11, 2000 << 20)
    assert (one.gpuInstanceId, one.computeInstanceId) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert [p.pid for p in pynvml.nvmlDeviceGetGraphicsRunningProcesses(started.gpu(0))] == [12]
    migs = started.migs(1)
    assert [[p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(mig)] for mig in migs.values()] == [[], [13]]
    [inside] = pynvml.nvmlDeviceGetComputeRunningProcesses(started.gpu(1))
    assert (inside.pid, inside.gpuInstanceId, inside.computeInstanceId) == (13, 9, 0), "the GPU says in which instance"
    assert pynvml.nvmlDeviceGetMemoryInfo(migs[1]).used == 500 << 20


def test_health(machine):
    started = machine("--gpus", "A100-SXM4-80GB")
    gpu = started.gpu()
    assert pynvml.nvmlDeviceGetRemappedRows(gpu) == (0, 0, 0, 0)
    assert pynvml.nvmlDeviceGetRetiredPages(gpu, 1) == []
    started.set("remap-pending=0", "remap-failed=0", "retired=0:2", "ecc-uncorrected=0:3", "temperature=0:80")
    assert pynvml.nvmlDeviceGetRemappedRows(gpu) == (0, 0, 1, 1)
    assert len(pynvml.nvmlDeviceGetRetiredPages(gpu, 1)) == 2
    assert pynvml.nvmlDeviceGetTotalEccErrors(gpu, 1, 0) == 3
    assert pynvml.nvmlDeviceGetTemperature(gpu, 0) == 80
    started.set("reboot")
    assert pynvml.nvmlDeviceGetRemappedRows(gpu) == (0, 1, 0, 1), "the row is remapped now"
    started.set("healthy=0")
    assert pynvml.nvmlDeviceGetRemappedRows(gpu) == (0, 0, 0, 0)


def test_an_xid_is_an_event(machine):
    started = machine("--gpus", "2xA100-SXM4-80GB")
    started.set("xid=1:31")
    events = pynvml.nvmlEventSetCreate()
    for index in (0, 1):
        pynvml.nvmlDeviceRegisterEvents(started.gpu(index), pynvml.nvmlEventTypeXidCriticalError, events)
    with pytest.raises(pynvml.NVMLError_Timeout):
        pynvml.nvmlEventSetWait(events, 20)  # what happened before is not told
    threading.Timer(0.1, started.set, ["xid=1:94"]).start()
    event = pynvml.nvmlEventSetWait(events, 5000)
    assert (event.eventData, pynvml.nvmlDeviceGetIndex(event.device)) == (94, 1)
    started.set("xid=1:79")
    assert pynvml.nvmlEventSetWait(events, 1000).eventData == 79
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        pynvml.nvmlEventSetWait(events, 1000)
    pynvml.nvmlEventSetFree(events)


def test_swapped_indices_keep_everything_else(machine):
    started = machine("--gpus", "2xA100-SXM4-80GB", "--mig", "1=1g.10gb")
    before = [pynvml.nvmlDeviceGetUUID(started.gpu(i)) for i in (0, 1)]
    started.set("swap=0:1")
    assert [pynvml.nvmlDeviceGetUUID(started.gpu(i)) for i in (0, 1)] == before[::-1]
    assert pynvml.nvmlDeviceGetMinorNumber(started.gpu(0)) == 1
    assert len(started.uuids(0)) == 1


def test_a_slow_driver(machine):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=")
    started.set("slow=0.2")
    begin = time.monotonic()
    create_gi(started.gpu(), "1g.10gb")
    assert time.monotonic() - begin >= 0.2


@pytest.mark.parametrize(
    ("kind", "returns", "hangs"),
    [
        ("change", "pynvml.nvmlInit(); pynvml.nvmlDeviceGetCount()", "pynvml.nvmlDeviceSetMigMode(gpu(), 0)"),
        ("call", "pynvml.nvmlInit()", "pynvml.nvmlDeviceGetCount()"),
        ("init", "gpu", "pynvml.nvmlInit()"),
    ],
)
def test_a_driver_that_hangs(machine, kind, returns, hangs):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=", init=False)
    started.set(f"hang={kind}")
    code = f"""
import pynvml
def gpu():
    return pynvml.nvmlDeviceGetHandleByIndex(0)
{returns}
print("before", flush=True)
{hangs}
"""
    environment = os.environ | {"NVML_SIM_STATE": str(started.state), "LD_LIBRARY_PATH": str(OUT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "before\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        started.set("hang=none")
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("set", "STATE", "lost=7"), "There is no GPU 7; this machine has 1."),
        (("set", "STATE", "burn=0"), "'burn=0' is no change; there are reboot and lost=,"),
        (("set", "STATE", "busy=0:3"), "GPU 0 has no MIG device 3; it has none."),
        (("set", "STATE", "process=0:x"), "'x' is not a whole number."),
        (("set", "STATE", "slow=long"), "'long' is not a number of seconds."),
        (("set", "STATE", "hang=yes"), "Say init, call, change or none, not 'yes'."),
        (("show", "/nowhere"), "No state in /nowhere: No such file or directory."),
        (("init", "STATE", "--gpus", "2xVoodoo"), "There is no model 'Voodoo'; there are A30-24GB,"),
        (("init", "STATE", "--gpus", "A30-24GB", "--mig", "0=1g.5gb"), "GPU 0 has no profile '1g.5gb'; it has 1g.6gb,"),
        (("init", "STATE", "--gpus", "L40S-48GB", "--mig", "0="), "GPU 0 (NVIDIA L40S) has no MIG."),
        (("init", "STATE", "--gpus", "A30-24GB", "--mig", "1g.6gb"), "--mig '1g.6gb' is not of the form"),
    ],
)
def test_a_wrong_command_is_told_in_one_sentence(machine, arguments, sentence):
    started = machine("--gpus", "A100-SXM4-80GB", init=False)
    before = started.state.read_text()
    result = tool("nvml-sim", *(started.state if a == "STATE" else a for a in arguments), check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"nvml-sim: {sentence}")
    assert result.stderr.count("\n") == 1
    assert started.state.read_text() == before


def test_a_wrong_change_undoes_those_beside_it(machine):
    started = machine("--gpus", "A100-SXM4-80GB")
    assert tool("nvml-sim", "set", started.state, "lost=0", "lost=9", check=False).returncode == 2
    started.gpu(0)


def test_the_same_seed_gives_the_same_machine(tmp_path):
    def text(seed):
        state = tmp_path / "state"
        arguments = ("--gpus", "2xA100-SXM4-80GB", "--mig", "1=1g.10gb,2g.20gb")
        tool("nvml-sim", "init", state, *arguments, *seed)
        return state.read_text()

    assert text(("--seed", 7)) == text(("--seed", 7))
    assert text(()) != text(())
