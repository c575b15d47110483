"""Virtual machines: how they are started, and which process is one."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from ds01_lab import payload, vm
from ds01_lab.errors import LabError
from ds01_lab.vm_image import Boot


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(vm, "BUILD", tmp_path)
    made = vm.Machine("lab-vm")
    made.folder.mkdir(parents=True)
    return made


def test_nothing_leaves_a_virtual_machine_and_only_loopback_reaches_it(machine):
    words = vm.command_line(machine, Boot(Path("/cache/vm-1")), 23001)
    network = next(word for word in words if word.startswith("user,"))
    assert network == "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:23001-:22"


def test_the_disk_of_the_cache_is_never_written_to(machine):
    boot = Boot(Path("/cache/vm-1"))
    assert str(boot.disk) not in " ".join(vm.command_line(machine, boot, 23001))


@pytest.mark.parametrize(
    "content",
    [None, "", "not a number", "1", "999999999", str(os.getpid())],
    ids=["none", "empty", "no number", "init", "gone", "this one"],
)
def test_a_pid_file_of_somebody_elses_process_is_no_machine(machine, content):
    if content is not None:
        (machine.folder / "pid").write_text(content)
    assert machine.command() == []
    assert machine.port() is None
    with pytest.raises(LabError) as refused:
        machine.endpoint()
    assert "vm up --name lab-vm" in refused.value.next_step


def test_a_running_machine_is_known_by_its_disk_and_tells_its_port(machine):
    words = vm.command_line(machine, Boot(Path("/cache/vm-1")), 23001)
    sleep = [sys.executable, "-c", "input('begun')", *words]
    with subprocess.Popen(sleep, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.read(5)  # a program's command line is empty for a moment after it was started
        (machine.folder / "pid").write_text(str(process.pid))
        assert machine.port() == 23001
        machine.host_key.with_suffix(".pub").write_text("ssh-ed25519 AAAA lab-vm\n")
        assert machine.endpoint() == vm.Endpoint("lab-vm", 23001, "ssh-ed25519 AAAA")
        process.communicate(b"\n")


def test_machines_are_found_by_their_folders(machine):
    assert vm.every() == [machine]


@pytest.mark.parametrize(("units", "reboot"), [((), False), (payload.REBOOTS, True)])
def test_a_virtual_machines_gpus_reboot_with_it_and_a_containers_do_not(monkeypatch, units, reboot):
    monkeypatch.setattr(payload.testimages, "archives", dict)
    monkeypatch.setattr(payload, "driver_files", lambda _sim: [])
    with tarfile.open(fileobj=io.BytesIO(payload.build("key", units))) as content:
        wanted = "etc/systemd/system/multi-user.target.wants/nvml-sim-reboot.service"
        assert (wanted in content.getnames()) == reboot
