"""The Docker engine that carries the lab hosts: the machine's own, or a private one that the lab starts."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import docker
from docker.errors import DockerException

from . import apt, mounts, network
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


def find_to_stop() -> str | None:
    """As `find`; a private engine that was killed, or went with a reboot, is started again if it has hosts.

    They would run on unseen, or come back with the next start.
    """
    url = find()
    containers = DATA / "containers"
    if url is None and containers.exists() and run(as_root(["find", containers, "-mindepth", "1", "-maxdepth", "1"])):
        return _start()
    return url


def stop() -> None:
    """Stop the private engine if it runs, and take its bridge and mounts away."""
    pid = _own_pid()
    if pid is not None:
        say("engine: stopping the private dockerd")
        _end(pid)
    network.down()
    mounts.release(DATA, RUN)


def _start() -> str:
    say("engine: starting a private dockerd (about 3 s)")
    own_directory(STATE)
    own_directory(RUN)
    _clear_killed()
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
    return _process(PIDFILE, "dockerd")


def _process(pidfile: Path, program: str) -> int | None:
    """The private engine's process. A pid file outlives it, so the command line must be that program's and ours."""
    try:
        pid = int(pidfile.read_text())
    except (OSError, ValueError):
        return None
    words = _command_line(pid)
    return pid if Path(words[0]).name == program and any(str(RUN) in word for word in words) else None


def _command_line(pid: int) -> list[str]:
    """A process's words; one empty word for a process that has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return [""]


def _clear_killed() -> None:
    """After a dockerd that was killed: its containerd must be gone and its pid files too, or the next one stumbles."""
    if _own_pid() is not None:
        return
    containerd = RUN / "exec" / "containerd" / "containerd.pid"
    _end(_process(containerd, "containerd"))
    run(as_root(["rm", "-f", PIDFILE, containerd]))


def _end(pid: int | None) -> None:
    """Ask a process to end, and wait until it has."""
    if pid is None:
        return
    with suppress(LabError):  # it may have ended by itself
        run(as_root(["kill", "-TERM", str(pid)]))
    deadline = time.monotonic() + STOP_SECONDS
    while _command_line(pid) != [""]:
        if time.monotonic() > deadline:
            raise LabError(f"process {pid} of the lab's engine does not stop", f"read {LOG}")
        time.sleep(0.1)
