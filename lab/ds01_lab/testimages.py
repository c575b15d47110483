"""Small container images for tests, made by hand as `docker load` archives: no registry and no engine needed."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import apt
from .errors import LabError
from .image import inputs_hash
from .paths import CACHE
from .shell import own_directory, run, say
from .tree import Tree

TOOLS = ("busybox-static", "bash-static")
APPLETS_LEFT_OUT = {"bash", "busybox"}
EPOCH = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class Account:
    """A line of /etc/passwd with a group of its own."""

    name: str
    uid: int
    home: str
    shell: str = "/bin/bash"


@dataclass(frozen=True)
class TestImage:
    """What one image holds besides busybox; without accounts it has neither bash nor /etc/passwd."""

    __test__ = False  # not a pytest class, for all its name

    name: str
    accounts: tuple[Account, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The name by which Docker knows it."""
        return f"ds01-lab/{self.name}:latest"


SYSTEM = (Account("root", 0, "/root"), Account("nobody", 65534, "/nonexistent", "/bin/false"))
IMAGES = (
    TestImage("base", SYSTEM),
    TestImage("minimal"),
    # Everything an image can hold that DS01 must not be led astray by.
    TestImage(
        "conflict",
        (*SYSTEM, Account("ubuntu", 2001, "/home/ubuntu"), Account("bob", 1500, "/home/bob")),
        env={"NVIDIA_VISIBLE_DEVICES": "all"},
        labels={"ds01.user": "mallory", "ds01.protected": "true", "ds01.managed": "false"},
    ),
)


def archives() -> dict[str, tuple[str, bytes]]:
    """Each image's archive: file name -> (image id, content), made once and kept in the cache."""
    folder = own_directory(CACHE) / f"test-images-{inputs_hash(IMAGES, Path(__file__).read_bytes())}"
    if not folder.exists():
        _build(folder)
    index = dict(line.split() for line in (folder / "index").read_text().splitlines())
    return {name: (image_id, (folder / name).read_bytes()) for name, image_id in index.items()}


def _build(folder: Path) -> None:
    say("test images: base, minimal, conflict (about 5 s, once)")
    for other in CACHE.glob("test-images-*"):
        shutil.rmtree(other)
    partial = CACHE / "test-images.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    busybox, bash = _static_tools(partial)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=10, check=True)
    index = []
    for image in IMAGES:
        image_id, content = docker_archive(
            image, layer(image, busybox.read_bytes(), bash.read_bytes(), applets.stdout.split())
        )
        (partial / f"{image.name}.tar").write_bytes(content)
        index.append(f"{image.name}.tar {image_id}\n")
    (partial / "index").write_text("".join(index))
    shutil.rmtree(partial / "packages")
    partial.rename(folder)


def _static_tools(folder: Path) -> tuple[Path, Path]:
    """busybox and bash, linked statically, out of Debian's packages without installing these."""
    download = folder / "packages"
    download.mkdir()
    # apt's own sandbox user cannot write into a directory of ours.
    fetch = ["apt-get", "download", "--quiet", "--option", "APT::Sandbox::User=root", *TOOLS]
    try:
        run(fetch, timeout=120, cwd=download)
    except LabError:
        apt.refresh()  # a fresh machine has no package lists, an old one stale ones
        run(fetch, timeout=120, cwd=download)
    for package in download.glob("*.deb"):
        run(["dpkg-deb", "--extract", package, download / "root"])
    root = download / "root"
    return next(p for p in (root / "bin/busybox", root / "usr/bin/busybox") if p.exists()), next(
        p for p in (root / "bin/bash-static", root / "usr/bin/bash-static") if p.exists()
    )


def layer(image: TestImage, busybox: bytes, bash: bytes, applets: Iterable[str]) -> bytes:
    """The image's one filesystem layer, the same bytes for the same inputs."""
    tree = Tree()
    for folder, mode in (
        ("bin", 0o755),
        ("etc", 0o755),
        ("tmp", 0o1777),
        ("root", 0o700),
        ("home", 0o755),
        ("usr", 0o755),
    ):
        tree.folder(folder, mode)
    for alias, target in (("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin")):
        tree.link(alias, target)
    tree.file("bin/busybox", busybox, 0o755)
    # Without accounts the image is as bare as an image can be: no way to add a user either.
    kept_out = APPLETS_LEFT_OUT | (set() if image.accounts else {"adduser", "addgroup", "su"})
    for applet in sorted(set(applets) - kept_out):
        tree.link(f"bin/{applet}", "busybox")
    if image.accounts:
        tree.file("bin/bash", bash, 0o755)
        tree.file("etc/passwd", "".join(f"{a.name}:x:{a.uid}:{a.uid}::{a.home}:{a.shell}\n" for a in image.accounts))
        tree.file("etc/group", "".join(f"{a.name}:x:{a.uid}:\n" for a in image.accounts))
        tree.file("etc/shadow", "".join(f"{a.name}:*:1::::::\n" for a in image.accounts), 0o640)
        for account in image.accounts:
            if account.home.startswith("/home/"):
                tree.folder(account.home.lstrip("/"), 0o755, account.uid)
    return tree.content()


def docker_archive(image: TestImage, layer_tar: bytes) -> tuple[str, bytes]:
    """The image's id and the archive that `docker load` reads."""
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": EPOCH,
            "config": {
                "Cmd": ["/bin/sh"],
                "Env": ["PATH=/bin", *(f"{key}={value}" for key, value in image.env.items())],
                "Labels": image.labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer_tar).hexdigest()}"]},
        },
        sort_keys=True,
    ).encode()
    digest = hashlib.sha256(config).hexdigest()
    manifest = [{"Config": f"{digest}.json", "RepoTags": [image.reference], "Layers": ["layer.tar"]}]
    tree = Tree()
    tree.file("manifest.json", json.dumps(manifest))
    tree.file(f"{digest}.json", config)
    tree.file("layer.tar", layer_tar)
    return f"sha256:{digest}", tree.content()
