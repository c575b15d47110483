"""A virtual machine that passes for a GPU server: a kernel, a boot and cgroups (v2) of its own, emulated."""

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import apt, host, inventory, keys, payload, vm_image
from .errors import LabError
from .inventory import Endpoint
from .options import ADDRESS
from .paths import BUILD
from .shell import run, say

DEFAULT_NAME = "ds01-vm"
ACCELERATOR = os.environ.get("DS01_LAB_ACCEL", "tcg,thread=multi")  # or kvm, where it works
PORTS = range(23000, 23100)
BOOT_SECONDS = 1200  # it takes 40 s on two idle cores, and was seen to take ten times that on busy ones
FILL_SECONDS = 300
STOP_SECONDS = 30
# Emulated on a busy machine, a unit was seen to take longer than the 90 s that systemd gives it.
TIMEOUTS = "systemd.default_timeout_start_sec=600 systemd.default_device_timeout_sec=600"
KERNEL_OPTIONS = f"root=/dev/vda rw console=ttyS0 net.ifnames=0 systemd.show_status=0 {TIMEOUTS}"


@dataclass(frozen=True)
class Machine:
    """One virtual machine: a folder with its disk, and its process while it runs."""

    name: str

    @property
    def folder(self) -> Path:
        """All that it has on this machine."""
        return BUILD / self.name / "vm"

    @property
    def disk(self) -> Path:
        """Its file system."""
        return self.folder / "disk"

    @property
    def console(self) -> Path:
        """What its kernel and systemd say."""
        return self.folder / "console.log"

    @property
    def host_key(self) -> Path:
        """The key that its sshd shows."""
        return self.folder / "ssh_host_ed25519_key"

    @property
    def made_of(self) -> Path:
        """The hardware and the base that it was made of, as text."""
        return self.folder / "made-of"

    def command(self) -> list[str]:
        """The words of its process; none where it does not run."""
        try:
            pid = int((self.folder / "pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except (OSError, ValueError):
            return []
        # A pid file outlives its process, and the number may be somebody else's by now.
        return words if any(str(self.disk) in word for word in words) else []

    def port(self) -> int | None:
        """Where its sshd is reached; None where it does not run."""
        found = re.search(r"hostfwd=tcp:[\d.]+:(\d+)-:22", " ".join(self.command()))
        return int(found[1]) if found else None

    def endpoint(self) -> Endpoint:
        """Its address, and the host key that was put onto its disk."""
        port = self.port()
        if port is None:
            raise LabError(f"the virtual machine {self.name} does not run", f"lab/lab vm up --name {self.name}")
        algorithm, key, *_ = self.host_key.with_suffix(".pub").read_text().split()
        return Endpoint(self.name, port, f"{algorithm} {key}")


def every() -> list[Machine]:
    """The virtual machines of this checkout, running or not."""
    return [Machine(folder.parent.name) for folder in sorted(BUILD.glob("*/vm"))]


def up(machine: Machine, asked: host.Hardware | None, inventory_folder: Path) -> Path:
    """Made, booted, filled and in the inventory; what is there and made of the same is kept. The inventory's path."""
    apt.install({"qemu-system-x86_64": "qemu-system-x86", "debugfs": "e2fsprogs"})
    boot = vm_image.ensure()
    hardware = asked or _hardware(machine) or host.Hardware(host.DEFAULT_GPUS, host.DEFAULT_MIG)
    made_of = "\n".join((boot.folder.name, hardware.gpus, *hardware.mig)) + "\n"
    if not machine.made_of.exists() or machine.made_of.read_text() != made_of:
        down(machine)
        _make(machine, boot, made_of)
    if not machine.command():
        _start(machine, boot)
    path = inventory.write(inventory_folder, machine.name, [machine.endpoint()])
    _await_boot(machine)
    _fill(machine, hardware)
    return path


def down(machine: Machine) -> None:
    """Ended as if its power was cut, and its disk deleted."""
    if machine.command():
        say(f"virtual machine {machine.name}: remove")
        pid = int((machine.folder / "pid").read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while machine.command():
            if time.monotonic() > deadline:
                raise LabError(f"the virtual machine's process {pid} does not end", f"end it by hand: kill -9 {pid}")
            time.sleep(0.1)
    shutil.rmtree(machine.folder, ignore_errors=True)


def ssh(machine: Machine, *argv: str) -> list[str]:
    """The words that run a command there, or a shell."""
    options = inventory.ssh_options(keys.known_hosts(machine.name))
    login = ["ssh", "-q", *options, "-i", str(keys.PRIVATE), "-p", str(machine.endpoint().port), f"root@{ADDRESS}"]
    return [*login, *([shlex.join(argv)] if argv else [])]


def _hardware(machine: Machine) -> host.Hardware | None:
    if not machine.made_of.exists():
        return None
    _, gpus, *mig = machine.made_of.read_text().splitlines()
    return host.Hardware(gpus, tuple(mig))


def _make(machine: Machine, boot: vm_image.Boot, made_of: str) -> None:
    say(f"virtual machine {machine.name}: make (about 5 s)")
    machine.folder.mkdir(parents=True)
    run(["cp", "--sparse=always", "--reflink=auto", boot.disk, machine.disk], timeout=300)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", machine.name, "-f", machine.host_key])
    (machine.folder / "authorized_keys").write_text(keys.public_key())
    (machine.folder / "hostname").write_text(f"{machine.name}\n")
    _put(
        machine,
        {
            "/root/.ssh/authorized_keys": ("authorized_keys", 0o600),
            "/etc/hostname": ("hostname", 0o644),
            "/etc/ssh/ssh_host_ed25519_key": (machine.host_key.name, 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (f"{machine.host_key.name}.pub", 0o644),
        },
    )
    machine.made_of.write_text(made_of)


def _put(machine: Machine, files: dict[str, tuple[str, int]]) -> None:
    """Write files of the machine's folder onto its disk, without mounting it."""
    lines = ["mkdir /root/.ssh", "set_inode_field /root/.ssh mode 040700"]
    for target, (source, mode) in files.items():
        lines += [f"rm {target}", f"write {machine.folder / source} {target}"]
        lines += [f"set_inode_field {target} {key} {value}" for key, value in _owned_by_root(mode).items()]
    run(["debugfs", "-w", "-f", "/dev/stdin", machine.disk], stdin="\n".join(lines) + "\n")


def _owned_by_root(mode: int) -> dict[str, str]:
    return {"mode": f"0100{mode:o}", "uid": "0", "gid": "0"}


def _start(machine: Machine, boot: vm_image.Boot) -> None:
    say(f"virtual machine {machine.name}: boot (about 60 s)")
    words = command_line(machine, boot, _free_port())
    run(["nice", "-n", "10", *words])


def command_line(machine: Machine, boot: vm_image.Boot, port: int) -> list[str]:
    """How its process is started: nothing leaves it, and only this machine reaches its sshd."""
    return [
        *("qemu-system-x86_64", "-name", machine.name, "-accel", ACCELERATOR, "-cpu", "max", "-smp", "2", "-m", "2048"),
        *("-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", KERNEL_OPTIONS),
        # What it writes need not survive this machine's own crash.
        *("-drive", f"file={machine.disk},format=raw,if=virtio,cache=unsafe"),
        *("-netdev", f"user,id=net0,restrict=on,hostfwd=tcp:{ADDRESS}:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=net0,romfile=", "-device", "virtio-rng-pci"),
        *("-display", "none", "-monitor", "none", "-serial", f"file:{machine.console}"),
        *("-pidfile", str(machine.folder / "pid"), "-daemonize"),
    ]


def _free_port() -> int:
    for port in PORTS:
        if host.free(port):
            return port
    raise LabError(f"no free port in {PORTS.start}-{PORTS.stop - 1}", "remove virtual machines: lab/lab vm down")


def _await_boot(machine: Machine) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while (state := _system_state(machine)) not in ("running", "degraded"):
        if not machine.command() or time.monotonic() > deadline:
            tail = "\n".join(machine.console.read_text(errors="replace").splitlines()[-15:])
            raise LabError(
                f"the virtual machine {machine.name} is {state or 'not reached'}\n{tail}", f"read {machine.console}"
            )
        time.sleep(2)
    if state == "degraded":
        failed = _inside(machine, "systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager")
        say(f"virtual machine {machine.name}: up, but these units failed:\n{failed.rstrip()}")


def _system_state(machine: Machine) -> str:
    with suppress(subprocess.TimeoutExpired):
        argv = ssh(machine, "systemctl", "is-system-running")
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    return ""


def _fill(machine: Machine, hardware: host.Hardware) -> None:
    """Put the payload in and have the machine set itself up, unless it went through with just that before."""
    content = payload.build(keys.public_key(), payload.REBOOTS)
    digest = hashlib.sha256(content).hexdigest()
    if _inside(machine, "sh", "-c", f"cat {host.FILLED} 2>/dev/null || true").strip() == digest:
        return
    say(f"virtual machine {machine.name}: users, simulated driver, test images (about 60 s)")
    unpack = ssh(machine, "tar", "-C", "/", "-xf", "-")
    sent = subprocess.run(unpack, input=content, capture_output=True, timeout=FILL_SECONDS, check=False)
    if sent.returncode != 0:
        said = sent.stderr.decode().strip()
        raise LabError(f"{machine.name}: the payload did not arrive: {said}", "lab/lab vm down, then up again")
    _inside(machine, payload.SETUP, "--gpus", hardware.gpus, *(word for cut in hardware.mig for word in ("--mig", cut)))
    _inside(machine, "sh", "-c", f"echo {digest} > {host.FILLED}")


def _inside(machine: Machine, *argv: str) -> str:
    return run(ssh(machine, *argv), timeout=FILL_SECONDS)
