"""A simulated machine for each test, under the real pynvml."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import pynvml
import pytest

REPO = Path(__file__).resolve().parents[2]
OUT = REPO / "build" / "sim"


def tool(name, *arguments, check=True, **environment):
    """Run one of the built programs; its exit status and what it wrote."""
    result = subprocess.run(
        [OUT / "bin" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=os.environ | {key: str(value) for key, value in environment.items()},
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("sim")


@pytest.fixture(scope="session", autouse=True)
def library():
    subprocess.run(["/usr/bin/make", "--silent", "-C", REPO / "lab" / "sim", f"OUT={OUT}"], check=True)
    # pynvml asks the loader for libnvidia-ml.so.1: a library of that soname that is loaded already is the answer.
    return ctypes.CDLL(str(OUT / "libnvidia-ml.so.1"))


@functools.cache
def initial(*arguments):
    """A machine's state as `nvml-sim init` writes it: the same for the same arguments, because of the seed."""
    with tempfile.TemporaryDirectory() as folder:
        tool("nvml-sim", "init", f"{folder}/state", "--seed", 1, "--unprivileged", *arguments)
        return Path(folder, "state").read_text()


class Machine:
    def __init__(self, state):
        self.state = state

    def set(self, *changes):
        tool("nvml-sim", "set", self.state, *changes)

    def gpu(self, index=0):
        return pynvml.nvmlDeviceGetHandleByIndex(index)

    def migs(self, index=0):
        """The walk every NVML program does: by index up to the maximum, past what is not there."""
        gpu, found = self.gpu(index), {}
        for mig in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
            try:
                found[mig] = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, mig)
            except pynvml.NVMLError_NotFound:
                continue
        return found

    def uuids(self, index=0):
        return [pynvml.nvmlDeviceGetUUID(mig) for mig in self.migs(index).values()]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Call it with `nvml-sim init` arguments; NVML is open on that machine until the test ends."""
    opened = []

    def start(*arguments, init=True):
        state = tmp_path / "state"
        state.write_text(initial(*arguments))
        monkeypatch.setenv("NVML_SIM_STATE", str(state))
        if init:
            pynvml.nvmlInit()
            opened.append(True)
        return Machine(state)

    yield start
    for _ in opened:
        pynvml.nvmlShutdown()
