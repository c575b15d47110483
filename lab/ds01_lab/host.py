"""Lab hosts: make, start, fill, look at, remove."""

import hashlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import docker
from docker.errors import APIError, NotFound
from docker.models.containers import Container

from . import image, options, payload
from .errors import LabError
from .inventory import Endpoint
from .options import ADDRESS
from .shell import say

DEFAULT_GPUS = "4xA100-SXM4-80GB"
# One whole GPU and three cut for sharing: enough for every kind of request.
DEFAULT_MIG = tuple(f"{gpu}=2g.20gb,2g.20gb,2g.20gb" for gpu in (1, 2, 3))
PORTS = range(22200, 23000)  # below the kernel's ephemeral range, so nothing takes one while a host reboots
BOOT_SECONDS = 180  # it takes 1 s; an emulated machine was seen to take 100
FILLED = "/usr/local/lib/ds01-lab/filled"  # on the host: the hash of the payload that its setup went through with


@dataclass(frozen=True)
class Hardware:
    """The simulated GPUs of a host, and how they are cut at first."""

    gpus: str
    mig: tuple[str, ...]

    @classmethod
    def asked(cls, gpus: str | None, mig: Sequence[str] | None) -> "Hardware | None":
        """What the caller asks for; None leaves it to what there is, or to the default."""
        if gpus is None and mig is None:
            return None
        return cls(gpus or DEFAULT_GPUS, tuple(mig or ()))


@dataclass(frozen=True)
class Status:
    """One host as it is now."""

    name: str
    prefix: str
    state: str
    address: str
    port: int | None
    gpus: str
    mig: list[str]


def up(client: docker.DockerClient, prefix: str, name: str, content: bytes, asked: Hardware | None) -> Endpoint:
    """One host, booted and filled; what is there already and made of the same inputs is kept."""
    container = _find(client, name, asked)
    if container is None:
        container = _create(client, prefix, name, asked or Hardware(DEFAULT_GPUS, DEFAULT_MIG))
    elif container.status != "running":
        say(f"lab host {name}: start")
        container.start()
    _await_boot(container)
    _fill(container, content)
    return endpoint(container)


def every(client: docker.DockerClient, prefix: str | None = None) -> list[Container]:
    """The lab's containers, of one prefix or all, running or not."""
    label = options.LABEL if prefix is None else f"{options.LABEL}={prefix}"
    return sorted(client.containers.list(all=True, filters={"label": label}), key=lambda found: found.name)


def remove(container: Container) -> None:
    """Take a host away with all its data."""
    say(f"lab host {container.name}: remove")
    container.remove(force=True, v=True)


def status(container: Container) -> Status:
    """What `lab status` shows."""
    labels = container.labels
    return Status(
        name=container.name,
        prefix=labels[options.LABEL],
        state=_system_state(container) if container.status == "running" else container.status,
        address=ADDRESS,
        port=_port(container),
        gpus=labels[options.LABEL_GPUS],
        mig=labels[options.LABEL_MIG].split(),
    )


def endpoint(container: Container) -> Endpoint:
    """Where sshd is, with the host key read through the engine rather than over the network it shall protect."""
    container.reload()
    port = _port(container)
    if port is None:
        raise LabError(f"{container.name} publishes no sshd", "remove it with lab/lab down, then lab/lab up again")
    algorithm, key, *_ = _inside(container, "cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()
    return Endpoint(container.name, port, f"{algorithm} {key}")


def _find(client: docker.DockerClient, name: str, asked: Hardware | None) -> Container | None:
    """The host of that name if it is what is asked for; one that is not is removed."""
    try:
        container = client.containers.get(name)
    except NotFound:
        return None
    labels = container.labels
    if options.LABEL not in labels:
        raise LabError(f"a container named {name} exists and is not the lab's", "choose another --name")
    has = Hardware(labels[options.LABEL_GPUS], tuple(labels[options.LABEL_MIG].split()))
    if asked in (None, has) and labels[options.LABEL_INPUTS] == image.inputs_hash(_machine(client)):
        return container
    say(f"lab host {name}: made of other inputs, so it is made anew")
    remove(container)
    return None


def _create(client: docker.DockerClient, prefix: str, name: str, hardware: Hardware) -> Container:
    image.ensure(client)
    say(f"lab host {name}: make and boot (about 3 s)")
    machine = _machine(client)
    inputs = image.inputs_hash(machine)
    for port in filter(free, PORTS):
        body = options.host(machine, prefix, name, port, hardware.gpus, hardware.mig, inputs)
        container = client.containers.get(client.api.create_container_from_config(body, name)["Id"])
        container.put_archive("/", payload.first_process())
        try:
            container.start()
        except APIError as error:
            container.remove(force=True, v=True)
            # Somebody was quicker with this port.
            if "already allocated" in str(error) or "already in use" in str(error):
                continue
            raise
        return container
    raise LabError(f"no free port in {PORTS.start}-{PORTS.stop - 1}", "remove lab hosts: lab/lab down")


def _await_boot(container: Container) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while (state := _system_state(container)) not in ("running", "degraded"):
        if time.monotonic() > deadline:
            tail = _journal(container)
            raise LabError(
                f"{container.name}: systemd is {state or 'not there'} after {BOOT_SECONDS} s\n{tail}",
                f"look inside: DOCKER_HOST=$(lab/lab engine) docker exec {container.name} systemctl list-jobs",
            )
        time.sleep(0.2)
    if state == "degraded":
        failed = _inside(container, "systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager")
        say(f"lab host {container.name}: up, but these units failed:\n{failed.rstrip()}")


def _fill(container: Container, content: bytes) -> None:
    """Put the payload in and have the host set itself up, unless it went through with just that before."""
    digest = hashlib.sha256(content).hexdigest()
    if container.exec_run(["cat", FILLED]).output.decode().strip() == digest:
        return
    say(f"lab host {container.name}: users, simulated driver, test images (about 3 s)")
    container.put_archive("/", content)
    labels = container.labels
    gpus, mig = labels[options.LABEL_GPUS], labels[options.LABEL_MIG].split()
    _inside(container, payload.SETUP, "--gpus", gpus, *(word for cut in mig for word in ("--mig", cut)))
    _inside(container, "sh", "-c", f"echo {digest} > {FILLED}")


def _inside(container: Container, *argv: str) -> str:
    done = container.exec_run(list(argv))
    if done.exit_code != 0:
        raise LabError(
            f"{container.name}: {' '.join(argv)} failed with {done.exit_code}\n{done.output.decode().strip()}",
            f"look inside: lab/lab exec {container.name}; to start over: lab/lab down",
        )
    return done.output.decode()


def _system_state(container: Container) -> str:
    """What systemd says of itself; a word of our own while it cannot be asked yet."""
    try:
        words = container.exec_run(["systemctl", "is-system-running"]).output.decode().split()
    except APIError:
        return "restarting"
    return words[0] if len(words) == 1 else "booting"


def _journal(container: Container) -> str:
    """The end of the host's journal, or of its console where there is no journal yet."""
    try:
        done = container.exec_run(["journalctl", "--boot", "--no-pager", "--lines=20"])
        if done.exit_code == 0 and b"-- No entries --" not in done.output:
            return _short(done.output.decode())
    except APIError:
        pass  # not running any more
    return _short(container.logs(tail=20).decode())


def _short(text: str) -> str:
    return "\n".join(line[:160] for line in text.splitlines())


def _machine(client: docker.DockerClient) -> dict[str, Any]:
    return options.machine(image.name(), client.info().get("CgroupVersion", "1"))


def _port(container: Container) -> int | None:
    bindings = container.attrs["HostConfig"]["PortBindings"].get(options.SSH)
    return int(bindings[0]["HostPort"]) if bindings else None


def free(port: int) -> bool:
    """Whether nothing listens on that port of this machine."""
    with socket.socket() as probe:
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True
