"""Debian packages for this machine, and the mirror it is set up with."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import LabError
from .shell import as_root, run, say

POLICY = Path("/usr/sbin/policy-rc.d")
MIRROR_VARIABLE = "DS01_LAB_MIRROR"
INSTALL_OPTIONS = ("--quiet", "--yes", "--no-install-recommends")


def install(commands: Mapping[str, str]) -> None:
    """Install the packages behind the commands that are missing; `commands` maps a command to its package."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    packages = sorted({package for command, package in commands.items() if not shutil.which(command, path=path)})
    if not packages:
        return
    say(f"this machine: apt-get install {' '.join(packages)} (about 15 s, once)")
    refresh()
    with _no_service_starts():
        run(
            as_root(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", *INSTALL_OPTIONS, *packages]),
            timeout=600,
        )


def refresh() -> None:
    """Fetch apt's package lists."""
    if shutil.which("apt-get") is None:
        raise LabError("this machine has no apt-get", "run the lab on Debian, or set DOCKER_HOST to an engine")
    run(as_root(["apt-get", "update", "--quiet"]), timeout=300)


def mirror() -> str:
    """The Debian mirror this machine's own apt uses, so that the lab names no host."""
    chosen = os.environ.get(MIRROR_VARIABLE)
    if chosen:
        return chosen
    form = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
    for attempt in range(2):
        found = choose_mirror(run(["apt-get", "indextargets", "--format", form]))
        if found:
            return found
        if attempt == 0:
            refresh()  # before the first update apt does not know whose repositories these are
    raise LabError("apt on this machine knows no Debian mirror", f"set {MIRROR_VARIABLE} to a Debian mirror's URL")


def choose_mirror(targets: str) -> str | None:
    """The first repository that is Debian's main archive; security and third parties carry other labels."""
    for line in targets.splitlines():
        origin, label, uri = line.split("|", 2)
        if origin == label == "Debian":
            return uri
    return None


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Without systemd, a package's script would start a daemon in its own way; keep it from that."""
    if Path("/run/systemd/system").is_dir() or POLICY.exists():
        yield
        return
    run(as_root(["sh", "-c", f"printf '#!/bin/sh\\nexit 101\\n' > {POLICY} && chmod 0755 {POLICY}"]))
    try:
        yield
    finally:
        run(as_root(["rm", "-f", POLICY]))
