"""What is measured on: a DS01 installation in a temporary directory, containers on an engine, a lab host."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import yaml
from timing import say

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
CORE = ROOT / "plugins" / "module_utils"
DS01 = ROOT / "bin" / "ds01"
SIM = ROOT / "build" / "sim"
LAB = ROOT / "lab" / "lab"
HOST_PREFIX = "ds01-bench"
HOST = f"{HOST_PREFIX}-1"
INVENTORY = ROOT / "build" / "bench" / "inventory"
LIBRARY_MOUNTS = 40
"""Driver libraries in NVIDIA's CDI spec. An assumption: a real driver's number differs by version."""

sys.path[:0] = [str(CORE), str(LAB.parent)]


def base_env() -> dict[str, str]:
    """This environment less what would make Python or DS01 differ from a user's."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DS01_"))}


def run(argv: Sequence[str | Path], env: Mapping[str, str]) -> str:
    """Run a command to its end; its output. One that fails ends the benchmark, with what it said."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise SystemExit(f"bench: {shlex.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


@dataclass(frozen=True)
class Installation:
    """DS01 in a temporary directory, on simulated GPUs; `env` names it to a process."""

    folder: Path
    env: Mapping[str, str]

    @property
    def ledger(self) -> Path:
        return self.folder / "state" / "gpu-state.json"

    def ds01(self, *words: str) -> str:
        return run([DS01, *words], self.env)

    def forget(self) -> None:
        """Back to an empty ledger."""
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        for file in (self.folder / "cdi").glob("ds01-*"):
            file.unlink()


@contextlib.contextmanager
def installation(gpus: str, mig: Sequence[str], engine: str = "") -> Iterator[Installation]:
    """An installation on these GPUs; `engine` is its DOCKER_HOST, and without one it has none."""
    if not (SIM / "libnvidia-ml.so.1").exists():
        raise SystemExit("bench: the simulated driver is missing; build it with: make sim")
    with tempfile.TemporaryDirectory(prefix="ds01-bench-") as name:
        folder = Path(name)
        env = {
            **base_env(),
            "LD_LIBRARY_PATH": str(SIM),
            "NVML_SIM_STATE": str(folder / "gpus"),
            "DS01_CONFIG": str(folder / "resource-limits.yaml"),
            "DS01_STATE_DIR": str(folder / "state"),
            "DS01_LOG_DIR": str(folder / "log"),
            "DS01_CDI_DIR": str(folder / "cdi"),
            **({"DOCKER_HOST": engine} if engine else {"DS01_ENGINE": "none"}),
        }
        cuts = [word for cut in mig for word in ("--mig", cut)]
        run([SIM / "bin" / "nvml-sim", "init", folder / "gpus", "--gpus", gpus, *cuts, "--unprivileged"], env)
        _write_limits(folder)
        _write_nvidia_spec(folder / "cdi", env)
        yield Installation(folder, env)


@contextlib.contextmanager
def in_process(env: Mapping[str, str]) -> Iterator[None]:
    """This process sees the installation of `env`: its GPUs, its directories."""
    # pynvml asks the loader for this name: a library of that name that is loaded already is the answer.
    ctypes.CDLL(str(SIM / "libnvidia-ml.so.1"))
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _write_limits(folder: Path) -> None:
    """The repository's own limits; the one change lets everybody have a whole GPU."""
    limits = yaml.safe_load((ROOT / "config" / "resource-limits.yaml").read_text(encoding="utf-8"))
    limits["defaults"]["allow_full_gpu"] = True
    (folder / "resource-limits.yaml").write_text(yaml.safe_dump(limits), encoding="utf-8")


def _write_nvidia_spec(folder: Path, env: Mapping[str, str]) -> None:
    """What `nvidia-ctk cdi generate` would write for these GPUs, in its form and about its size."""
    from ds01 import nvml

    with in_process(env), nvml.session() as driver:
        devices = driver.inventory().devices
    folder.mkdir()
    spec = {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [_spec_device(name, device) for device in devices for name in (device.id, device.uuid)],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": f"/dev/{node}"} for node in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")],
            "mounts": [_spec_mount(f"/usr/lib/libnvidia-{number}.so") for number in range(LIBRARY_MOUNTS)],
        },
    }
    (folder / "nvidia.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")


def _spec_device(name: str, device: Any) -> dict[str, Any]:
    gpu, mig = device.index
    nodes = [f"/dev/nvidia{gpu}", *(f"/dev/nvidia-caps/nvidia-cap{mig}{cap}" for cap in range(2 if mig >= 0 else 0))]
    return {"name": name, "containerEdits": {"deviceNodes": [{"path": node} for node in nodes]}}


def _spec_mount(path: str) -> dict[str, Any]:
    options = ["ro", "nosuid", "nodev", "rbind", "rprivate"]
    return {"hostPath": path, "containerPath": path, "options": options}


def lab_engine() -> str:
    """The lab's Docker engine, started if need be: its DOCKER_HOST."""
    say("== engine of the lab")
    return run([LAB, "engine"], base_env()).strip()


@contextlib.contextmanager
def containers(engine: str, number: int, running: int = 0) -> Iterator[list[str]]:
    """So many of DS01's containers on the engine, without devices; their names. The first `running` of them run, the
    others were never started: to start one takes far longer than to make it."""
    client = docker.APIClient(base_url=engine, version="auto", timeout=60)
    prefix = f"ds01-bench-{os.getpid()}"
    image, image_that_runs = f"{prefix}:latest", f"{prefix}:running"
    owners = [f"user{index % 30}" for index in range(number)]
    names = [f"{prefix}-{index}._.{owner}" for index, owner in enumerate(owners)]
    say(f"== {number} containers on the engine, {running} of them running")
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        client.import_image_from_data(_small_archive(), repository=prefix, tag="latest")
        stack.callback(client.remove_image, image, force=True)
        if running:
            client.import_image_from_data(_busybox(), repository=prefix, tag="running")
            stack.callback(client.remove_image, image_that_runs, force=True)
        for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
            labels = {**_LABELS, "ds01.user": owner, "ds01.project": name.partition("._.")[0]}
            runs = index < running
            made_of, command = (image_that_runs, _SLEEP) if runs else (image, ["/none"])
            host = client.create_host_config(network_mode="none")  # of its own, and quickly made
            client.create_container(made_of, command=command, name=name, labels=labels, host_config=host)
            stack.callback(client.remove_container, name, force=True)
            if runs:
                client.start(name)
        yield names


_LABELS = {"ds01.managed": "true", "ds01.gpus": "0", "ds01.allocation": ""}


_SLEEP = ["/bin/sleep", "1000000"]


def _busybox() -> bytes:
    """The files of the lab's smallest test image: a static busybox."""
    from ds01_lab import testimages

    _, image = testimages.archives()["minimal.tar"]
    with tarfile.open(fileobj=io.BytesIO(image)) as archive:
        layer = archive.extractfile("layer.tar")
        assert layer
        return layer.read()


def _small_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("none"))
    return buffer.getvalue()


@dataclass(frozen=True)
class LabHost:
    """A lab host of its own, reached as Ansible and as an admin reach it."""

    env: Mapping[str, str]
    ssh: Sequence[str]

    def playbook(self, path: str | Path, **variables: str) -> str:
        extra = [word for key, value in variables.items() for word in ("-e", f"{key}={value}")]
        return run([ROOT / ".venv" / "bin" / "ansible-playbook", path, *extra], self.env)

    def limits(self, **keys: Any) -> Path:
        """The repository's limits with some of the keys changed, for everybody."""
        limits = yaml.safe_load((ROOT / "config" / "resource-limits.yaml").read_text(encoding="utf-8"))
        for layer in (limits["defaults"], *limits["groups"].values()):
            layer.update(keys)
        path = INVENTORY.parent / "resource-limits.yaml"
        path.write_text(yaml.safe_dump(limits), encoding="utf-8")
        return path

    def command(self, line: str) -> str:
        """A shell line over a connection that stays open, as Ansible's does."""
        return run([*self.ssh, line], self.env)


@contextlib.contextmanager
def lab_host() -> Iterator[LabHost]:
    """A fresh lab host; removed at the end, whatever happened."""
    say(f"== lab host {HOST}")
    try:
        run([LAB, "up", "--name", HOST_PREFIX, "--inventory", INVENTORY], base_env())
        with tempfile.TemporaryDirectory(prefix="ds01-bench-") as folder:
            ssh = _ssh(Path(folder) / "ssh")
            env = base_env() | {
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_INVENTORY": str(INVENTORY),
                "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
            }
            try:
                yield LabHost(env, ssh)
            finally:
                subprocess.run([*ssh, "-O", "exit"], capture_output=True, check=False)
    finally:
        run([LAB, "down", "--name", HOST_PREFIX, "--inventory", INVENTORY], base_env())


def _ssh(control: Path) -> list[str]:
    """The ssh command of the inventory's first host, with a shared connection like Ansible's."""
    group = yaml.safe_load((INVENTORY / "hosts.yml").read_text(encoding="utf-8"))["gpu_servers"]
    known, port = group["vars"], group["hosts"][HOST]["ansible_port"]
    shared = ["-o", "ControlMaster=auto", "-o", "ControlPersist=60s", "-o", f"ControlPath={control}"]
    return [
        "ssh",
        "-q",
        *shlex.split(known["ansible_ssh_common_args"]),
        *shared,
        *("-i", known["ansible_ssh_private_key_file"], "-p", str(port)),
        f"{known['ansible_user']}@{known['ansible_host']}",
    ]
