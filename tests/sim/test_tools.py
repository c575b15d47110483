"""The stand-ins: nvidia-smi, nvidia-ctk and the device nodes."""

import json
import os
import re
import stat

import pynvml
import pytest
import yaml

from .calls import create_gi
from .conftest import tool

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make device nodes")
SPLIT = ("--gpus", "2xA100-SXM4-80GB", "--mig", "1=2g.20gb,1g.10gb")


def test_smi_lists_devices_as_the_real_one(machine):
    started = machine("--gpus", "2xH200-141GB", "--mig", "1=2g.35gb,1g.18gb")
    create_gi(started.gpu(1), "1g.18gb", start=6)
    gpus = [pynvml.nvmlDeviceGetUUID(started.gpu(i)) for i in (0, 1)]
    migs = started.uuids(1)
    assert tool("nvidia-smi", "-L").stdout == (
        f"GPU 0: NVIDIA H200 (UUID: {gpus[0]})\n"
        f"GPU 1: NVIDIA H200 (UUID: {gpus[1]})\n"
        f"  MIG 2g.35gb     Device  0: (UUID: {migs[0]})\n"
        f"  MIG 1g.18gb     Device  1: (UUID: {migs[1]})\n"
    )


def test_smi_lists_divided_instances(machine):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=")
    gi = create_gi(started.gpu(), "3g.40gb")
    pynvml.nvmlGpuInstanceCreateComputeInstance(gi, 0)
    assert f"\n  MIG 1c.3g.40gb  Device  0: (UUID: {started.uuids()[0]})\n" in tool("nvidia-smi", "-L").stdout


def test_smi_goes_on_past_a_lost_gpu_and_fails(machine):
    machine("--gpus", "3xL40S-48GB").set("lost=1")
    listed = tool("nvidia-smi", "-L", check=False)
    assert listed.returncode == pynvml.NVML_ERROR_GPU_IS_LOST
    assert re.findall(r"^GPU (\d)", listed.stdout, re.MULTILINE) == ["0", "2"]
    assert "GPU1: GPU is lost" in listed.stdout


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("loaded=off", 9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."),
        ("version-mismatch=on", 18, "Failed to initialize NVML: Driver/library version mismatch"),
    ],
)
def test_smi_without_a_driver(machine, change, code, words):
    machine(*SPLIT, init=False).set(change)
    listed = tool("nvidia-smi", "-L", check=False)
    assert (listed.returncode, listed.stdout.startswith(words)) == (code, True)


def test_smi_answers_queries(machine):
    started = machine("--gpus", "A100-SXM4-80GB,L40S-48GB", "--mig", "0=")
    uuid = pynvml.nvmlDeviceGetUUID(started.gpu())
    fields = "index,uuid,name,mig.mode.current,driver_version"
    lines = tool("nvidia-smi", f"--query-gpu={fields}", "--format=csv").stdout.splitlines()
    assert lines[:2] == [fields.replace(",", ", "), f"0, {uuid}, NVIDIA A100-SXM4-80GB, Enabled, 580.95.05"]
    assert ", NVIDIA L40S, [N/A], " in lines[2]
    assert len(tool("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").stdout.splitlines()) == 2
    tool("nvidia-smi", "-i", 1, "-pm", 1)
    assert [pynvml.nvmlDeviceGetPersistenceMode(started.gpu(i)) for i in (0, 1)] == [0, 1]
    modes = tool("nvidia-smi", "--query-gpu=persistence_mode", "--format=csv,noheader").stdout
    assert modes == "Disabled\nEnabled\n"
    assert "NVIDIA L40S" in tool("nvidia-smi").stdout


@pytest.mark.parametrize("arguments", [("-q",), ("mig", "-lgi"), ("--query-gpu=fan", "--format=csv"), ("-pm", "2")])
def test_smi_refuses_what_it_does_not_know(machine, arguments):
    machine(*SPLIT)
    refused = tool("nvidia-smi", *arguments, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("Invalid combination of input arguments: ")


def test_ctk_refuses_what_it_does_not_know(machine):
    machine(*SPLIT)
    for arguments in (("cdi", "generate", "--csv.file=x"), ("cdi", "generate", "--mode=wsl"), ("runtime", "configure")):
        assert tool("nvidia-ctk", *arguments, check=False).returncode == 2
    assert tool("nvidia-ctk", "--version").stdout.startswith("NVIDIA Container Toolkit CLI version 1.")


def nodes(root):
    return {str(path.relative_to(root / "dev")) for path in root.glob("dev/**/nvidia*") if not path.is_dir()}


@AS_ROOT
def test_nodes_follow_the_instances(machine, tmp_path):
    started = machine(*SPLIT)
    root = tmp_path / "root"
    tool("nvml-sim", "nodes", started.state, "--root", root)
    plain = {"nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"}
    plain |= {"nvidia-caps/nvidia-cap1", "nvidia-caps/nvidia-cap2"}
    # 2g is GPU instance 3 and the 1g is 9: 3 + 135 * 1 + 9 * 3 and 9 * 9, the compute instance one further.
    caps = {f"nvidia-caps/nvidia-cap{n}" for n in (165, 166)}
    assert nodes(root) >= plain | caps
    assert len(nodes(root)) == len(plain) + 4
    status = (root / "dev/nvidia1").stat()
    assert stat.S_ISCHR(status.st_mode)
    assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == (195, 1)
    assert tool("nvml-sim", "nodes", started.state, "--root", root).stdout == "", "nothing is left to do"

    started.set("reboot")
    assert tool("nvml-sim", "nodes", started.state, "--root", root).stdout.count("removed") == 4
    assert nodes(root) == plain


@AS_ROOT
def test_every_device_of_the_cdi_spec_has_its_nodes(machine, tmp_path):
    started = machine(*SPLIT)
    root, spec = tmp_path / "root", tmp_path / "cdi" / "nvidia.json"
    tool("nvml-sim", "nodes", started.state, "--root", root)
    tool("nvidia-ctk", "cdi", "generate", f"--output={spec}", f"--dev-root={root}")
    content = json.loads(spec.read_text())
    devices = {d["name"]: [n["path"] for n in d["containerEdits"]["deviceNodes"]] for d in content["devices"]}
    gpu, migs = pynvml.nvmlDeviceGetUUID(started.gpu(0)), started.uuids(1)
    assert set(devices) == {"0", gpu, "1:0", "1:1", *migs, "all"}
    assert devices["0"] == devices[gpu] == ["/dev/nvidia0"]
    caps = ["/dev/nvidia-caps/nvidia-cap165", "/dev/nvidia-caps/nvidia-cap166"]
    assert devices["1:0"] == devices[migs[0]] == ["/dev/nvidia1", *caps]
    assert len(devices[migs[1]]) == 3
    assert len(devices["all"]) == 6
    assert content["containerEdits"]["env"] == ["NVIDIA_VISIBLE_DEVICES=void"]
    common = {node["path"] for node in content["containerEdits"]["deviceNodes"]}
    assert common == {"/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"}

    listed = tool("nvidia-ctk", "cdi", "list", "--spec-dir", spec.parent).stdout.splitlines()
    assert listed == sorted(f"nvidia.com/gpu={name}" for name in devices)
    text = spec.with_suffix(".yaml")
    tool("nvidia-ctk", "cdi", "generate", "--output", text, f"--dev-root={root}")
    assert yaml.safe_load(text.read_text()) == content
    spec.unlink()
    assert tool("nvidia-ctk", "cdi", "list", "--spec-dir", spec.parent).stdout.splitlines() == listed


@AS_ROOT
def test_missing_nodes_cost_a_warning_and_no_error(machine, tmp_path):
    """As with the real tool: after a MIG change the spec names only the parent until the nodes are made."""
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=")
    root = tmp_path / "root"
    tool("nvml-sim", "nodes", started.state, "--root", root)
    gi = create_gi(started.gpu(), "1g.10gb")
    pynvml.nvmlGpuInstanceCreateComputeInstance(gi, 0)
    made = tool("nvidia-ctk", "cdi", "generate", "--format=json", f"--dev-root={root}")
    [device, *_] = json.loads(made.stdout)["devices"]
    assert [node["path"] for node in device["containerEdits"]["deviceNodes"]] == ["/dev/nvidia0"]
    assert made.stderr.count("Could not locate /dev/nvidia-caps/") == 2


def test_a_lost_gpu_stops_the_cdi_spec(machine):
    machine("--gpus", "2xL40S-48GB").set("lost=1")
    failed = tool("nvidia-ctk", "cdi", "generate", check=False)
    assert failed.returncode == 1
    assert "error getting device handle for index '1': GPU is lost" in failed.stderr


@AS_ROOT
def test_char_links_point_at_the_nodes(machine, tmp_path):
    started = machine(*SPLIT)
    root = tmp_path / "root"
    tool("nvml-sim", "nodes", started.state, "--root", root)
    command = ("nvidia-ctk", "system", "create-dev-char-symlinks", "--create-all", f"--dev-root={root}")
    assert tool(*command).stderr.count("Creating link") == len(nodes(root))
    assert (root / "dev/char/195:1").resolve() == root / "dev/nvidia1"
    assert tool(*command).stderr == ""


def test_the_launcher_works_out_of_the_checkout(machine):
    started = machine(*SPLIT)
    shown = json.loads(tool("../../../bin/nvml-sim", "show", started.state, "--json").stdout)
    assert [gpu["model"] for gpu in shown["gpus"]] == ["A100-SXM4-80GB"] * 2
    assert [gi["profile"] for gi in shown["gpus"][1]["gpu_instances"]] == ["2g.20gb", "1g.10gb"]
