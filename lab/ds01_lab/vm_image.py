"""The disk, kernel and initial RAM disk that virtual machines boot from: a host's Debian with a kernel of its own."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from . import apt, image
from .paths import CACHE
from .shell import as_root, own_directory, run, say

SIZE = "6G"  # sparse: what is not written takes no room
PACKAGES = (*image.PACKAGES, "linux-image-cloud-amd64", "initramfs-tools", "udev", "zstd")
# An initial RAM disk with every driver takes an emulated processor long to unpack; these find the disk.
MODULES = ("virtio_pci", "virtio_blk", "ext4")
INITRAMFS = "MODULES=list\nCOMPRESS=zstd\n"
# The addresses of qemu's user network; restricted, it leads nowhere but to the port that is forwarded in.
NETWORK = "[Match]\nType=ether\nDriver=virtio_net\n\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"
UNITS = ("ssh.service", "systemd-networkd.service", "docker.service")


@dataclass(frozen=True)
class Boot:
    """What a virtual machine is booted from; the disk is to be copied first."""

    folder: Path

    @property
    def kernel(self) -> Path:
        """Debian's cloud kernel."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """Its initial RAM disk."""
        return self.folder / "initrd"

    @property
    def disk(self) -> Path:
        """An ext4 file system, raw and sparse."""
        return self.folder / "disk"


def ensure() -> Boot:
    """What to boot from, made first where the cache lacks it (about 3 minutes)."""
    inputs = image.inputs_hash(
        image.SUITE, PACKAGES, image.MASKED, image.DROPPED, SIZE, MODULES, INITRAMFS, NETWORK, UNITS
    )
    boot = Boot(own_directory(CACHE) / f"vm-{inputs}")
    if not boot.folder.exists():
        _build(boot.folder)
    return boot


def _build(folder: Path) -> None:
    apt.install({"mkfs.ext4": "e2fsprogs"})
    for other in CACHE.glob("vm-*"):
        shutil.rmtree(other)
    partial = Boot(CACHE / "vm.partial")
    shutil.rmtree(partial.folder, ignore_errors=True)
    own_directory(partial.folder)
    with image.debian(PACKAGES) as root:
        say("virtual machine: initial RAM disk and file system (about 60 s, once)")
        _configure(root)
        for source, target in (("vmlinuz-*", partial.kernel), ("initrd.img-*", partial.initrd)):
            found = sorted((root / "boot").glob(source))[-1]
            run(as_root(["install", "-m", "0644", found, target]))
        for pattern in (*image.DROPPED, "./boot/initrd.img-*"):
            run(as_root(["sh", "-c", f"cd {root} && rm -rf {pattern}"]))
        run(as_root(["mkfs.ext4", "-q", "-d", root, partial.disk, SIZE]), timeout=300)
        run(as_root(["chmod", "0644", partial.disk]))
    partial.folder.rename(folder)


def _configure(root: Path) -> None:
    """What a container has from its engine: a network, and a way to its disk."""
    _write(root / "etc/initramfs-tools/conf.d/ds01-lab", INITRAMFS)
    _write(root / "etc/initramfs-tools/modules", "".join(f"{name}\n" for name in MODULES))
    run(as_root(["chroot", root, "update-initramfs", "-u", "-k", "all"]), timeout=300)
    _write(root / "etc/systemd/network/10-lab.network", NETWORK)
    _write(root / "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
    run(as_root(["systemctl", f"--root={root}", "enable", *UNITS]))


def _write(path: Path, content: str) -> None:
    run(as_root(["install", "-D", "-m", "0644", "/dev/stdin", path]), stdin=content)
