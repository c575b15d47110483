"""The lab host's base image: Debian with systemd, sshd and Docker, made by debootstrap, no registry needed."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import docker
from docker.errors import APIError, ImageNotFound

from . import apt, mounts
from .paths import CACHE
from .shell import as_root, own_directory, run, say

REPOSITORY = "ds01-lab/host"
SUITE = "trixie"  # the first Debian whose Docker (26.1) knows CDI
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SCRIPTS = Path("/usr/share/debootstrap/scripts")

PACKAGES = (
    # what makes it a machine
    *("systemd", "systemd-sysv", "dbus", "libpam-systemd", "openssh-server", "sudo", "procps", "iproute2"),
    *("iputils-ping", "curl", "less", "acl", "jq"),
    # what Ansible and DS01 use on a server
    *("python3", "python3-venv", "python3-packaging", "python3-apt", "ca-certificates"),
    # its own engine
    *("docker.io", "docker-cli", "iptables"),
)
# Units that need what a container does not have: kernel modules, terminals, hardware.
MASKED = (
    "systemd-modules-load.service",
    "systemd-networkd-wait-online.service",
    "getty.target",
    "console-getty.service",
    "modprobe@.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "dev-hugepages.mount",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "fstrim.timer",
)
# Left out for size; a lab host has no readers of manuals.
DROPPED = (
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
    "./etc/ssh/ssh_host_*",  # each host makes its own
)


def inputs_hash(*inputs: object) -> str:
    """A short hash of everything an artefact is made of; the same inputs need no rebuild."""
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(item if isinstance(item, bytes) else repr(item).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def name() -> str:
    """The host image's name; its tag is a hash of what it is made of."""
    return f"{REPOSITORY}:{inputs_hash(SUITE, PACKAGES, MASKED, DROPPED)}"


def ensure(client: docker.DockerClient) -> None:
    """Import the host image where the engine lacks it, built first where the cache lacks it too."""
    tag = name().rpartition(":")[2]
    try:
        client.images.get(name())
    except ImageNotFound:
        archive = own_directory(CACHE) / f"host-{tag}.tar"
        if not archive.exists():
            _build(archive)
        say("host image: import (about 5 s)")
        client.api.import_image(src=str(archive), repository=REPOSITORY, tag=tag)
        _forget_older(client, archive)


def _build(archive: Path) -> None:
    partial = archive.with_suffix(".partial")
    try:
        with debian(PACKAGES) as root:
            excludes = [f"--exclude={pattern}" for pattern in DROPPED]
            run(as_root(["tar", "-C", root, *excludes, "-cf", partial, "."]), timeout=300)
        run(as_root(["mv", partial, archive]))
    finally:
        run(as_root(["rm", "-f", partial]))


@contextmanager
def debian(packages: Sequence[str]) -> Iterator[Path]:
    """A host's root file system with these packages, in a directory that is gone afterwards."""
    if shutil.which("debootstrap", path="/usr/sbin:/usr/bin:/sbin") is None or not KEYRING.exists():
        apt.install({"debootstrap": "debootstrap", str(KEYRING): "debian-archive-keyring"})
    say(f"host image: debootstrap {SUITE} (about 60 s, once)")
    root = CACHE / "rootfs"
    _discard(root)
    # A debootstrap older than the suite lacks its script; sid's is the one all recent suites share.
    script = SCRIPTS / SUITE if (SCRIPTS / SUITE).exists() else SCRIPTS / "sid"
    choices = (f"--keyring={KEYRING}", f"--include={','.join(packages)}")
    try:
        run(
            as_root(["debootstrap", "--variant=minbase", *choices, SUITE, root, apt.mirror(), script]),
            timeout=1800,
        )
        run(as_root(["systemctl", f"--root={root}", "mask", *MASKED]))
        # Empty: each host gets an id of its own when it first boots.
        run(as_root(["truncate", "--size=0", root / "etc/machine-id"]))
        yield root
    finally:
        _discard(root)


def _discard(root: Path) -> None:
    mounts.release(root)  # an interrupted debootstrap leaves proc and sys mounted
    run(as_root(["rm", "--recursive", "--force", "--one-file-system", root]))


def _forget_older(client: docker.DockerClient, archive: Path) -> None:
    """Take images and archives of other inputs away; one that a running host still uses stays."""
    for image in client.images.list(name=REPOSITORY):
        for older in set(image.tags) - {name()}:
            try:
                client.images.remove(older)
            except APIError:
                say(f"host image: {older} is still in use and stays")
    for other in CACHE.glob("host-*.tar"):
        if other != archive:
            run(as_root(["rm", "-f", other]))
