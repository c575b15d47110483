"""What the lab puts into a host besides its base image: key, users, simulated driver, test images."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from . import testimages
from .errors import LabError
from .options import INIT
from .paths import HOST_FILES, SIM
from .tree import Tree

HERE = "usr/local/lib/ds01-lab"
SETUP = f"/{HERE}/setup"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
UNITS = "etc/systemd/system"
REBOOTS = ("nvml-sim-reboot.service",)  # for machines whose every boot is one of their GPUs as well

# The people of every lab host. The last two are names that careless code trips over.
USERS = {"alice": 2001, "bob": 2002, "carol": 2003, "dave": 2004, "mary-ann": 2005, "h.baker@uni.example": 2006}


def first_process() -> bytes:
    """What a host needs to start at all; all else is put in when it runs, in the same way each time."""
    tree = Tree()
    tree.file(INIT.lstrip("/"), (HOST_FILES / "init").read_bytes(), 0o755)
    return tree.content()


def build(public_key: str, units: Iterable[str] = ()) -> bytes:
    """The payload as one archive to unpack at the root of a running host; `units` of lab/host start there at boot."""
    tree = Tree()
    for unit in units:
        tree.file(f"{UNITS}/{unit}", (HOST_FILES / unit).read_bytes())
        tree.link(f"{UNITS}/multi-user.target.wants/{unit}", f"../{unit}")
    tree.folder("root/.ssh", 0o700)
    tree.file("root/.ssh/authorized_keys", public_key, 0o600)
    tree.file(INIT.lstrip("/"), (HOST_FILES / "init").read_bytes(), 0o755)
    tree.folder(HERE, 0o755)
    tree.file(SETUP.lstrip("/"), (HOST_FILES / "setup").read_bytes(), 0o755)
    tree.file(f"{HERE}/users", "".join(f"{name} {uid}\n" for name, uid in USERS.items()))
    tree.folder(f"{HERE}/images", 0o755)
    archives = testimages.archives()
    tree.file(f"{HERE}/images/index", "".join(f"{name} {found[0]}\n" for name, found in archives.items()))
    for name, (_, content) in archives.items():
        tree.file(f"{HERE}/images/{name}", content)
    for path, target, mode in driver_files(SIM):
        tree.file(target, path.read_bytes(), mode)
    return tree.content()


def driver_files(sim: Path) -> Iterator[tuple[Path, str, int]]:
    """The simulated driver's files, each with the place where the real one has it."""
    if not (sim / "libnvidia-ml.so.1").exists():
        raise LabError(f"the simulated driver is not in {sim}", "run: make sim")
    for path in sorted(sim.glob("*.so*")):
        yield path, f"{LIBRARIES}/{path.name}", 0o644
    for path in sorted((sim / "bin").iterdir()):
        yield path, f"usr/bin/{path.name}", 0o755
    for path in sorted(sim.glob("*.service")):
        yield path, f"{UNITS}/{path.name}", 0o644
