"""The device nodes that nvidia-modprobe makes on a real host, and which of them a device needs."""

import os
import stat
from pathlib import Path

from state import UsageError

NVIDIA = 195
# The real driver is given these two while it loads. The kernel hands such numbers out from 511 down, so the low end
# of the range belongs to nobody.
UVM, CAPS = 384, 385


def gpu_node(minor):
    return f"/dev/nvidia{minor}"


def cap_number(minor, gi, ci=None):
    """The driver's numbering of capabilities: 135 a GPU, 9 a GPU instance (itself and its compute instances)."""
    return 3 + 135 * minor + 9 * gi + (0 if ci is None else 1 + ci)


def cap_node(number):
    return f"/dev/nvidia-caps/nvidia-cap{number}"


def mig_nodes(minor, gi, ci):
    return [gpu_node(minor), cap_node(cap_number(minor, gi)), cap_node(cap_number(minor, gi, ci))]


def wanted(state):
    """Path -> (major, minor, mode) of every node this machine has."""
    found = {
        "/dev/nvidiactl": (NVIDIA, 255, 0o666),
        "/dev/nvidia-uvm": (UVM, 0, 0o666),
        "/dev/nvidia-uvm-tools": (UVM, 1, 0o666),
        cap_node(1): (CAPS, 1, 0o400),  # may configure MIG
        cap_node(2): (CAPS, 2, 0o444),  # may look at it
    }
    for gpu in state.gpus:
        minor = int(gpu["minor"])
        found[gpu_node(minor)] = (NVIDIA, minor, 0o666)
        numbers = [cap_number(minor, int(gi["id"])) for gi in state.of("gi", gpu)]
        numbers += [cap_number(minor, int(ci["gi"]), int(ci["id"])) for ci in state.of("ci", gpu)]
        found.update({cap_node(number): (CAPS, number, 0o444) for number in numbers})
    return found


def sync(state, root="/"):
    """Make /dev agree with the state; return the paths made and removed."""
    if Path("/proc/driver/nvidia/version").exists() and Path(root).resolve() == Path("/"):
        raise UsageError("A real NVIDIA driver is loaded: its device nodes stay as they are.")
    nodes = {Path(root) / path.lstrip("/"): node for path, node in wanted(state).items()}
    dev = Path(root) / "dev"
    present = {*dev.glob("nvidia[0-9]*"), *dev.glob("nvidia-caps/nvidia-cap[0-9]*")}
    removed = sorted(present - nodes.keys())
    for path in removed:
        path.unlink()
    made = [path for path, node in nodes.items() if _make(path, *node)]
    return made, removed


def _make(path, major, minor, mode):
    device = os.makedev(major, minor)
    try:
        now = path.lstat()
        if stat.S_ISCHR(now.st_mode) and now.st_rdev == device and stat.S_IMODE(now.st_mode) == mode:
            return False
        path.unlink()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mknod(path, stat.S_IFCHR | mode, device)
    except PermissionError:
        raise UsageError(f"Only root can make the device node {path}.") from None
    path.chmod(mode)  # whatever the umask is
    return True
