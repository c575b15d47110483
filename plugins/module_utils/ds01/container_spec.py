"""What a container is made of: the engine's create call, labels, and the files of its first start. Pure."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from . import names, units, userdb
from .errors import Ds01Error, invalid_input
from .limits import ContainerDefaults, Limits, number_text

WORKSPACE = "/workspace"
_CPU_PERIOD = 100_000
_MEMLOCK_UNLIMITED = -1
_STACK_BYTES = 64 * 1024 * 1024
_IMAGE_MAX = 255
_PORT = re.compile(r"((?P<ip>[0-9.]+|\[[0-9a-f:]+\]):)?(?P<host>[0-9]{1,5}):(?P<inner>[0-9]{1,5})")

# A process that ends at once when asked to, and reaps what users leave behind; people come in with
# `docker exec`, so it needs no more.
KEEP_ALIVE = ("/bin/sh", "-c", "trap 'exit 0' TERM INT HUP; while :; do sleep 3600 & wait $!; done")

# What would undo the allocation, or run code in root's hooks; NVIDIA's runtime reads the first two.
_FORBIDDEN_ENV = ("NVIDIA_", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD", "LD_LIBRARY_PATH")
# Not the container's own, or the same for all of them.
_NOT_KEPT = (WORKSPACE, "/proc", "/sys", "/dev", "/run", "/etc/ds01")
_OWNED_LABELS = ("ds01.", "aime.mlc", "DS01_", "CUSTOM_IMAGE")


@dataclass(frozen=True)
class ContainerRequest:
    """One container as it is asked for. `mounts` are `source:target[:ro]`, `ports` `[ip:]host:container`.

    `limits` may tighten those that the user has on this host (`tighten`).
    """

    name: names.ContainerName
    image: str
    gpus: int = 0
    profile: str | None = None
    workspace: str | None = None
    mounts: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    ports: Sequence[str] = ()
    command: Sequence[str] = ()
    network_mode: str = "bridge"
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mount:
    source: str
    target: str
    read_only: bool = False


def check_image(image: str) -> str:
    """The image reference, or Ds01Error `invalid_input`: it reaches the engine's URL."""
    if not image or len(image) > _IMAGE_MAX or image.startswith("-") or not image.isprintable() or " " in image:
        raise invalid_input(
            f"{image!r} cannot be an image.", "Name a local image, such as ds01-alice/my-project:latest."
        )
    return image


def check_env(env: Mapping[str, str]) -> None:
    """Refuse variables that would reach past the allocation."""
    for key in env:
        if not key or "=" in key or not key.isprintable():
            raise invalid_input(f"{key!r} cannot be an environment variable.")
        if key.startswith(_FORBIDDEN_ENV):
            raise invalid_input(f"The environment variable {key} is DS01's to set.", "Leave it out.")


def parse_mount(text: str, defaults: ContainerDefaults) -> Mount:
    """`source:target[:ro]`, from a directory that the limits file allows."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise invalid_input(f"{text!r} is not a mount.", "Write /source:/target or /source:/target:ro.")
    source, target = (posixpath.normpath(part) for part in parts[:2])
    if not source.startswith("/") or not target.startswith("/") or target == "/":
        raise invalid_input(f"{text!r} is not a mount.", "Both paths are absolute.")
    if not any(below(source, root) for root in defaults.allowed_mounts):
        allowed = ", ".join(defaults.allowed_mounts) or "none"
        raise Ds01Error(
            "invalid_input",
            f"{source} may not be mounted (allowed: {allowed}).",
            "An admin can add it to containers.allowed_mounts in resource-limits.yaml.",
        )
    return Mount(source, target, parts[2:] == ["ro"])


def below(path: str, root: str) -> bool:
    """Whether a normalised path is the directory or lies in it."""
    root = root.rstrip("/")
    return path == root or path.startswith(f"{root}/")


def check_network(mode: str, defaults: ContainerDefaults) -> None:
    """bridge and none are for everybody; host only where the limits file says so."""
    if mode not in ("bridge", "none", "host"):
        raise invalid_input(f"{mode!r} is not a network mode.", "Use bridge, none or host.")
    if mode == "host" and not defaults.allow_host_network:
        raise invalid_input("The host's network is not allowed.", "An admin can set containers.allow_host_network.")


def body(
    request: ContainerRequest,
    account: names.Account,
    limits: Limits,
    defaults: ContainerDefaults,
    mounts: Sequence[Mount],
    image_labels: Mapping[str, str],
    memlock: int = _MEMLOCK_UNLIMITED,
) -> dict[str, Any]:
    """The create call. Its own device is all that a container ever asks for; never privileged.

    `memlock` is -1 (unlimited) or bytes; `image_labels` are the image's, whose claims to be DS01's
    are blanked. The intent label is a hash of everything here.
    """
    env = {
        **defaults.environment,
        **request.env,
        "DS01_CONTAINER": request.name.full,
        "USER": userdb.login_name(account),
        "ENV": "/etc/ds01/shellrc",  # what an interactive POSIX shell reads
        "NVIDIA_VISIBLE_DEVICES": "void",  # an image's own "all" would ask NVIDIA's runtime for everything
    }
    exposed, bindings = _ports(request.ports)
    spec: dict[str, Any] = {
        "Image": request.image,
        "Hostname": request.name.project.replace("_", "-").replace(".", "-").strip("-") or "ds01",
        "User": f"{account.uid}:{account.gid}",
        "Tty": True,
        "OpenStdin": True,
        "WorkingDir": WORKSPACE,
        "Env": [f"{key}={value}" for key, value in sorted(env.items())],
        "Cmd": list(request.command or KEEP_ALIVE),
        "ExposedPorts": exposed,
        "Labels": {**_blanked(image_labels), **_labels(request)},
        "HostConfig": {
            **_resources(limits, memlock),
            "CgroupParent": limits.slice,
            "DeviceRequests": _device_requests(request),
            "Mounts": [_mount(m) for m in mounts],
            "NetworkMode": request.network_mode,
            "PortBindings": bindings,
            "Privileged": False,
            "RestartPolicy": {"Name": "no"},
            "SecurityOpt": [] if defaults.sudo else ["no-new-privileges"],
        },
    }
    spec["Labels"]["ds01.intent"] = intent(spec)
    return spec


def check_keep(path: str) -> str:
    """A path whose files a new container gets from the old one, normalised. Raises Ds01Error `invalid_input`."""
    plain = posixpath.normpath(path)
    if not path.startswith("/") or plain in ("/", "//") or any(below(plain, root) for root in _NOT_KEPT):
        raise invalid_input(
            f"{path!r} cannot be kept.", f"Name absolute paths such as /home/alice; {WORKSPACE} stays in any case."
        )
    return plain


def differences(made_from: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """In what a container differs from a wish: `is` and `wanted` by a name for people.

    `made_from` is what the engine says that it was made from, in the form of the create call; it adds defaults of
    its own and of the image, so only what says something in both is compared. Variables are named without values,
    for those may be secrets. Empty where it is none of these.
    """
    if not made_from:
        return {}
    is_, wanted = _plain(made_from), _plain(spec)
    found = {key: {"is": is_[key], "wanted": wanted[key]} for key in wanted if is_[key] != wanted[key]}
    has = set(made_from.get("Env") or ())
    variables = sorted(text.partition("=")[0] for text in spec["Env"] if text not in has)
    return {**found, **({"env": {"is": "other values", "wanted": variables}} if variables else {})}


def _plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    host, labels = spec["HostConfig"], spec.get("Labels") or {}
    quota = host.get("CpuQuota") or 0
    sizes = {"memory": host.get("Memory"), "shm_size": host.get("ShmSize")}
    bindings = host.get("PortBindings") or {}
    mounts = host.get("Mounts") or ()
    return {
        "image": spec.get("Image"),
        "gpus": int(labels.get("ds01.gpus") or 0),
        "profile": labels.get("ds01.profile") or None,
        "user": spec.get("User"),
        "command": list(spec.get("Cmd") or ()),
        "max_cpus": quota / (host.get("CpuPeriod") or _CPU_PERIOD) if quota else None,
        **{key: units.format_size(size).lower() if size else None for key, size in sizes.items()},
        "pids_limit": host.get("PidsLimit") or None,
        "slice": host.get("CgroupParent"),
        "network_mode": host.get("NetworkMode"),
        "ports": sorted(
            f"{b.get('HostIp') or '*'}:{b['HostPort']}:{to}" for to, all_ in bindings.items() for b in all_
        ),
        "mounts": sorted(f"{m['Source']}:{m['Target']}{':ro' if m.get('ReadOnly') else ''}" for m in mounts),
        "security": list(host.get("SecurityOpt") or ()),
    }


def stamped(spec: Mapping[str, Any], now: datetime, devices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The create call with its time and its first devices, which are no part of the intent.

    The devices' identities are for `ds01 rebuild`, should both ledger and metadata be lost.
    """
    more = {"ds01.created_at": units.format_time(now), "ds01.devices": json.dumps(list(devices))}
    return {**spec, "Labels": {**spec["Labels"], **more}}


def intent(spec: Mapping[str, Any]) -> str:
    """A hash of what was asked for, to compare with later wishes instead of the engine's echoes."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _resources(limits: Limits, memlock: int) -> dict[str, Any]:
    # A quota rather than "nano CPUs": the engine refuses more of those than this machine has.
    cpu = {} if limits.max_cpus is None else {"CpuPeriod": _CPU_PERIOD, "CpuQuota": int(limits.max_cpus * _CPU_PERIOD)}
    sizes = {"Memory": limits.memory, "MemorySwap": limits.memory_swap, "ShmSize": limits.shm_size}
    return {
        **cpu,
        **{key: units.parse_size(size) for key, size in sizes.items() if size is not None},
        **({} if limits.pids_limit is None else {"PidsLimit": limits.pids_limit}),
        "Ulimits": [
            {"Name": "memlock", "Soft": memlock, "Hard": memlock},
            {"Name": "stack", "Soft": _STACK_BYTES, "Hard": _STACK_BYTES},
        ],
    }


def _device_requests(request: ContainerRequest) -> list[dict[str, Any]]:
    if not request.gpus:
        return []
    return [{"Driver": "cdi", "DeviceIDs": [names.cdi_device(request.name.full)]}]


def _mount(mount: Mount) -> dict[str, Any]:
    return {"Type": "bind", "Source": mount.source, "Target": mount.target, "ReadOnly": mount.read_only}


def _ports(ports: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    exposed: dict[str, Any] = {}
    bindings: dict[str, Any] = {}
    for text in ports:
        match = _PORT.fullmatch(text)
        if not match or not all(0 < int(match[key]) < 65536 for key in ("host", "inner")):
            raise invalid_input(f"{text!r} is not a port mapping.", "Write 8888:8888 or 127.0.0.1:8888:8888.")
        exposed[f"{match['inner']}/tcp"] = {}
        binding = {"HostIp": match["ip"] or "", "HostPort": match["host"]}
        bindings.setdefault(f"{match['inner']}/tcp", []).append(binding)
    return exposed, bindings


def _labels(request: ContainerRequest) -> dict[str, str]:
    """DS01's labels, and those that tools for AIME MLC look for."""
    name = request.name
    return {
        "ds01.managed": "true",
        "ds01.user": name.user,
        "ds01.project": name.project,
        "ds01.image": request.image,
        "ds01.gpus": str(request.gpus),
        "ds01.profile": request.profile or "",
        "ds01.allocation": name.full if request.gpus else "",
        "DS01_MANAGED": "true",
        "CUSTOM_IMAGE": request.image,
        "aime.mlc": name.user,
        "aime.mlc.NAME": name.project,
        "aime.mlc.USER": name.user,
    }


def _blanked(image_labels: Mapping[str, str]) -> dict[str, str]:
    """An image's labels would be merged in: its claims to be DS01's are overwritten with nothing."""
    return {key: "" for key in image_labels if key.startswith(_OWNED_LABELS)}


def metadata(request: ContainerRequest, limits: Limits, container_id: str, now: datetime) -> dict[str, Any]:
    """The container's record (interfaces: "Metadata"), before `with_devices`."""
    cpus = limits.max_cpus
    return {
        "container_name": request.name.full,
        "user": request.name.user,
        "project": request.name.project,
        "image": request.image,
        "gpu_id": None,
        "gpus": request.gpus,
        "devices": [],
        "container_id": container_id,
        "created_at": units.format_time(now),
        "resource_limits": {
            "max_cpus": None if cpus is None else json.loads(number_text(cpus)),
            "memory": limits.memory,
            "shm_size": limits.shm_size,
            "pids_limit": limits.pids_limit,
        },
        "slice": limits.slice,
    }


@dataclass(frozen=True)
class ImageFiles:
    """What the first start needs to know of an image; None where a file does not exist."""

    passwd: str | None
    group: str | None
    shadow: str | None
    has_shell: bool
    has_sudo: bool
    has_bashrc: bool


def first_start(
    request: ContainerRequest, account: names.Account, defaults: ContainerDefaults, image: ImageFiles
) -> bytes:
    """A tar archive for the container's root: the user with home and shell, prompt, aliases, sudo."""
    shell = defaults.shell if image.has_shell else "/bin/sh"
    home = userdb.home(account)
    owner = (account.uid, account.gid)
    archive = _Archive()
    for directory in ("/etc/ds01", "/etc/profile.d", "/home"):
        archive.directory(directory, 0o755, (0, 0))
    archive.directory(home, 0o750, owner)
    archive.file("/etc/passwd", userdb.passwd(image.passwd, account, shell))
    archive.file("/etc/group", userdb.group(image.group, account))
    if image.shadow is not None:
        archive.file("/etc/shadow", userdb.shadow(image.shadow, account), 0o640)
    archive.file("/etc/ds01/shellrc", shellrc(request.name, defaults))
    archive.file("/etc/profile.d/ds01.sh", ". /etc/ds01/shellrc\n")
    if not image.has_bashrc:
        archive.file(f"{home}/.bashrc", "[ -r /etc/ds01/shellrc ] && . /etc/ds01/shellrc\n", 0o644, owner)
    if defaults.sudo and image.has_sudo:
        archive.file("/etc/sudoers.d/ds01", f"{userdb.login_name(account)} ALL=(ALL) NOPASSWD: ALL\n", 0o440)
    return archive.close()


def shellrc(name: names.ContainerName, defaults: ContainerDefaults) -> str:
    """What an interactive shell reads: a prompt that names the container, and the site's aliases."""
    bash = rf"[{name.project}] \u:\w\$ "
    # Other POSIX shells do not know \u and \w; they expand variables in PS1 instead.
    plain = f"[{name.project}] ${{USER:-$(id -un 2>/dev/null)}}:$PWD$ "
    lines = [
        "# Written by DS01 when this container was created.",
        f'if [ -n "${{BASH_VERSION:-}}" ]; then PS1={shlex.quote(bash)}; else PS1={shlex.quote(plain)}; fi',
        *(f"alias {key}={shlex.quote(value)}" for key, value in sorted(defaults.aliases.items())),
    ]
    return "\n".join(lines) + "\n"


class _Archive:
    """A tar archive in memory; names are absolute, as people write them."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w")  # noqa: SIM115 - closed in close()

    def file(self, path: str, text: str, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
        data = text.encode(errors="surrogateescape")
        self._tar.addfile(self._entry(path, mode, owner, size=len(data)), io.BytesIO(data))

    def directory(self, path: str, mode: int, owner: tuple[int, int]) -> None:
        entry = self._entry(path, mode, owner)
        entry.type = tarfile.DIRTYPE
        self._tar.addfile(entry)

    def _entry(self, path: str, mode: int, owner: tuple[int, int], size: int = 0) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(path.lstrip("/"))
        entry.mode, entry.size = mode, size
        entry.uid, entry.gid = owner
        return entry

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()
