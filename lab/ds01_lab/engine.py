"""The Docker engine that carries the lab hosts: the machine's own, or a private one that the lab starts."""

import os
import subprocess
import time
from pathlib import Path

import docker
from docker.errors import DockerException

from . import apt, network
from .errors import LabError
from .paths import RUN, STATE
from .shell import as_root, own_directory, run, say

SOCKET = RUN / "docker.sock"
PIDFILE = RUN / "dockerd.pid"
LOG = RUN / "dockerd.log"
DATA = STATE / "engine"
PRIVATE_URL = f"unix://{SOCKET}"
DEFAULT_URL = "unix:///var/run/docker.sock"
START_SECONDS = 60
STOP_SECONDS = 60


def connect(url: str) -> docker.DockerClient:
    """A client; its calls may take as long as importing a host image does."""
    return docker.DockerClient(base_url=url, timeout=300)


def answers(url: str) -> bool:
    """Whether an engine is behind the URL."""
    try:
        client = docker.DockerClient(base_url=url, timeout=5)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except DockerException:
        return False


def find() -> str | None:
    """The URL of the engine to use, if one answers."""
    asked = os.environ.get("DOCKER_HOST")
    if asked and asked != PRIVATE_URL:
        if answers(asked):
            return asked
        raise LabError(
            f"DOCKER_HOST is {asked}, and nothing answers there",
            "start that engine, or unset DOCKER_HOST and let the lab find or start one",
        )
    return next((url for url in (PRIVATE_URL, DEFAULT_URL) if answers(url)), None)


def ensure() -> str:
    """The URL of an engine that answers, started if need be."""
    url = find()
    if url:
        return url
    apt.install({"dockerd": "docker.io", "iptables": "iptables", "ip": "iproute2"})
    # Where systemd runs, installing the package starts the machine's own engine.
    return find() or _start()


def stop() -> bool:
    """Stop the private engine and take its bridge and mounts away; False where none was running."""
    pid = _own_pid()
    if pid is not None:
        say("engine: stopping the private dockerd")
        run(as_root(["kill", "-TERM", str(pid)]))
        _await_end(pid)
    network.down()
    for mount in _mounts_below(DATA, RUN):
        run(as_root(["umount", "--lazy", mount]))
    return pid is not None


def _start() -> str:
    say("engine: starting a private dockerd (about 3 s)")
    own_directory(STATE)
    own_directory(RUN)
    network.up()
    choices = {
        "data-root": DATA,
        "exec-root": RUN / "exec",
        "pidfile": PIDFILE,
        "host": PRIVATE_URL,
        "group": os.getgid(),
        "bridge": network.BRIDGE,
        "iptables": "false",
    }
    command = as_root(["dockerd", *(f"--{name}={value}" for name, value in choices.items())])
    with LOG.open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # outlives this command and its terminal
            env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
    deadline = time.monotonic() + START_SECONDS
    while not answers(PRIVATE_URL):
        if process.poll() is not None:
            _fail(f"dockerd ended with {process.returncode}")
        if time.monotonic() > deadline:
            _fail(f"dockerd does not answer after {START_SECONDS} s")
        time.sleep(0.2)
    return PRIVATE_URL


def _fail(what: str) -> None:
    tail = "\n".join(LOG.read_text().splitlines()[-15:])
    raise LabError(f"{what}; the end of its log:\n{tail}", f"read {LOG}, then run the same command again")


def _own_pid() -> int | None:
    """The private dockerd's process id. A pid file outlives its process, so the command line must be ours too."""
    try:
        pid = int(PIDFILE.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (OSError, ValueError):
        return None
    return pid if Path(words[0]).name == "dockerd" and f"--pidfile={PIDFILE}" in words else None


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            raise LabError(f"dockerd (pid {pid}) does not stop", f"read {LOG}")
        time.sleep(0.1)


def _mounts_below(*roots: Path) -> list[str]:
    """Mount points that a killed engine left, the deepest first."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return sorted((p for p in points if any(p.startswith(f"{root}/") for root in roots)), reverse=True)
