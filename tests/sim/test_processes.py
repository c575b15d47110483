"""Which compute processes DS01 sees on which device."""

import pynvml
import pytest
from ds01.errors import Ds01Error
from ds01.nvml import Nvml

SERVER = ("--gpus", "3xA100-SXM4-80GB", "--mig", "1=2g.20gb,1g.10gb")

# name: what happens, pids by the id of the device they are on
SEEN = {
    "nothing runs": ([], {}),
    "on a whole GPU": (["process=0:4711"], {"0": (4711,)}),
    "several, and one of them twice": (["process=0:13", "process=0:12", "process=0:13:500"], {"0": (12, 13)}),
    "graphics does not count": (["process=0:4711:30:G"], {}),
    "on one MIG device": (["process=1.1:4711"], {"1:1": (4711,)}),
    "on both MIG devices": (["process=1.0:11", "process=1.1:12", "process=1.1:11"], {"1:0": (11,), "1:1": (11, 12)}),
    "past a gap in the MIG indices": (["gap=1:0", "process=1.2:4711"], {"1:2": (4711,)}),
    "by index, whatever the minors": (["process=0:4711", "swap=0:2"], {"2": (4711,)}),
    "beside a lost GPU": (["process=0:11", "process=2:12", "lost=0"], {"2": (12,)}),
}


def seen(driver):
    inventory = driver.inventory()
    ids = {device.uuid: device.id for device in inventory.devices}
    return {ids[uuid]: pids for uuid, pids in driver.processes(inventory).items()}


@pytest.mark.parametrize(("changes", "pids"), SEEN.values(), ids=SEEN)
def test_where_processes_run(machine, changes, pids):
    started = machine(*SERVER)
    if changes:
        started.set(*changes)
    assert seen(Nvml(pynvml)) == pids


def test_a_gpu_lost_after_it_was_listed_is_passed_over(machine):
    started = machine(*SERVER)
    started.set("process=0:11", "process=2:12")
    driver = Nvml(pynvml)
    inventory = driver.inventory()
    started.set("lost=0")
    assert list(driver.processes(inventory).values()) == [(12,)]


def test_a_process_of_no_instance_counts_for_all_of_them(machine, monkeypatch):
    machine(*SERVER)
    process = pynvml.c_nvmlProcessInfo_v3_t(4711, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [process])
    assert seen(Nvml(pynvml)) == {"0": (4711,), "1:0": (4711,), "1:1": (4711,), "2": (4711,)}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (pynvml.NVML_ERROR_NOT_SUPPORTED, None),
        (pynvml.NVML_ERROR_NO_PERMISSION, "driver_unavailable"),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, "driver_unavailable"),
        (pynvml.NVML_ERROR_TIMEOUT, "driver_unavailable"),
    ],
    ids=["a platform that does not tell", "not root", "a driver too old to ask", "no answer"],
)
def test_what_cannot_be_asked_is_refused_where_it_could_be(machine, monkeypatch, error, reason):
    machine(*SERVER)
    driver = Nvml(pynvml)
    inventory = driver.inventory()

    def fail(gpu):
        raise pynvml.NVMLError(error)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", fail)
    if reason is None:
        assert driver.processes(inventory) == {}
        return
    with pytest.raises(Ds01Error) as caught:
        driver.processes(inventory)
    assert caught.value.reason == reason


def test_each_gpu_is_asked_once(machine, monkeypatch):
    started = machine(*SERVER)
    started.set("process=1.0:11", "process=1.1:12")
    asked, ask = [], pynvml.nvmlDeviceGetComputeRunningProcesses
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda gpu: asked.append(gpu) or ask(gpu))
    assert seen(Nvml(pynvml)) == {"1:0": (11,), "1:1": (12,)}
    assert len(asked) == 3
