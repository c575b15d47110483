"""Commands of lab/lab."""

import argparse
import dataclasses
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from docker.errors import DockerException

from . import engine, host, inventory, keys, options, payload, vm, wheels
from .errors import LabError
from .paths import BUILD, DEFAULT_PREFIX, ROOT, inventory_dir
from .shell import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 1 where it could not be done."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.verb(arguments) or 0
    except LabError as error:
        sys.stderr.write(f"lab: {error}\n  next: {error.next_step}\n")
    except DockerException as error:
        sys.stderr.write(
            f"lab: the Docker engine refused: {error}\n  next: lab/lab status, or lab/lab down and up again\n"
        )
    except KeyboardInterrupt:
        return 130
    return 1


def up(arguments: argparse.Namespace) -> None:
    """Hosts up, filled, and in the inventory."""
    began = time.monotonic()
    prefix, asked = arguments.name, host.Hardware.asked(arguments.gpus, arguments.mig)
    with _alone():
        client = engine.connect(engine.ensure())
        wheels.ensure()
        content = payload.build(keys.public_key())
        names = [f"{prefix}-{number}" for number in range(1, arguments.hosts + 1)]
        # The first alone: it makes the image that the others then share.
        host.up(client, prefix, names[0], content, asked)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: host.up(client, prefix, name, content, asked), names[1:]))
        path = _write_inventory(client, prefix, arguments.inventory)
    say(f"up after {time.monotonic() - began:.1f} s: {', '.join(names)}; ansible -i {path} gpu_servers -m ping")


def down(arguments: argparse.Namespace) -> None:
    """One prefix's hosts away; without a prefix all of them, and the engine if the lab started it."""
    with _alone():
        url = engine.find_to_stop() if arguments.name is None else engine.find()
        gone = set()
        if url:
            client = engine.connect(url)
            for container in host.every(client, arguments.name):
                gone.add(container.labels[options.LABEL])
                host.remove(container)
        for prefix in gone:
            inventory.write(arguments.inventory or inventory_dir(prefix), prefix, [])
        if arguments.name is None:
            engine.stop()


def status(arguments: argparse.Namespace) -> None:
    """What there is, one line a host."""
    url = engine.find()
    found = [host.status(container) for container in host.every(engine.connect(url), arguments.name)] if url else []
    if arguments.json:
        known = {"engine": url, "hosts": [dataclasses.asdict(each) for each in found]}
        sys.stdout.write(json.dumps(known, indent=2) + "\n")
        return
    sys.stdout.write(f"engine {url or '(none runs)'}\n")
    for each in found:
        cut = f" ({'; '.join(each.mig)})" if each.mig else ""
        sys.stdout.write(f"{each.name}  {each.state}  {each.address}:{each.port}  {each.gpus}{cut}\n")


def execute(arguments: argparse.Namespace) -> None:
    """A command on a host over SSH, the way Ansible gets there; without one, a shell."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    machine = next((m for m in vm.every() if m.name == arguments.host), None)
    words = vm.ssh(machine, *command) if machine else _into_container(arguments.host, command)
    os.execvp(words[0], words)  # noqa: S606 the command becomes ssh, so that terminal and exit code are ssh's own


def vm_up(arguments: argparse.Namespace) -> None:
    """A virtual machine up, filled, and in the inventory."""
    began = time.monotonic()
    machine, asked = vm.Machine(arguments.name), host.Hardware.asked(arguments.gpus, arguments.mig)
    with _alone():
        wheels.ensure()
        path = vm.up(machine, asked, arguments.inventory or inventory_dir(machine.name))
    say(f"up after {time.monotonic() - began:.1f} s: {machine.name}; ansible -i {_short(path)} gpu_servers -m ping")


def vm_down(arguments: argparse.Namespace) -> None:
    """One virtual machine away; without a name all of this checkout."""
    with _alone():
        for machine in vm.every() if arguments.name is None else [vm.Machine(arguments.name)]:
            vm.down(machine)
            inventory.write(arguments.inventory or inventory_dir(machine.name), machine.name, [])


def _into_container(name: str, command: Sequence[str]) -> list[str]:
    container = next((c for c in host.every(engine.connect(engine.ensure())) if c.name == name), None)
    if container is None:
        raise LabError(f"there is no lab host {name}", "see which there are: lab/lab status")
    ssh_options = inventory.ssh_options(keys.known_hosts(container.labels[options.LABEL]))
    port = str(host.endpoint(container).port)
    words = [shlex.join(command)] if command else []
    return ["ssh", "-q", *ssh_options, "-i", str(keys.PRIVATE), "-p", port, f"root@{options.ADDRESS}", *words]


def print_engine(_arguments: argparse.Namespace) -> None:
    """The engine to use, for DOCKER_HOST."""
    with _alone():
        sys.stdout.write(engine.ensure() + "\n")


def download_wheels(_arguments: argparse.Namespace) -> None:
    """The packages that DS01 needs on a host."""
    wheels.ensure()


def _write_inventory(client: object, prefix: str, folder: Path | None) -> Path:
    running = [container for container in host.every(client, prefix) if container.status == "running"]
    path = inventory.write(folder or inventory_dir(prefix), prefix, map(host.endpoint, running))
    return _short(path)


def _short(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


@contextmanager
def _alone() -> Iterator[None]:
    """One changing command at a time: two would build the same image and fight for the same port."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another lab command to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab/lab", description="GPU servers without a GPU, for development and tests."
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, action: object, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=action)
        return sub

    make = verb("up", up, "start lab hosts; those that are up already are kept")
    make.add_argument("--name", default=DEFAULT_PREFIX, metavar="PREFIX", help="hosts are PREFIX-1, PREFIX-2, ...")
    make.add_argument("--hosts", type=_count, default=1, metavar="N", help="how many (default 1)")
    _add_hardware(make)
    make.add_argument("--inventory", type=_folder, metavar="DIR", help="where to write hosts.yml")

    away = verb("down", down, "remove lab hosts; without --name all of them, and the engine if the lab started it")
    away.add_argument("--name", metavar="PREFIX", help="only this prefix's hosts; the engine stays")
    away.add_argument("--inventory", type=_folder, metavar="DIR", help="the DIR that was given to up")

    show = verb("status", status, "list lab hosts")
    show.add_argument("--name", metavar="PREFIX", help="only this prefix's hosts")
    show.add_argument("--json", action="store_true", help="for programs")

    inside = verb("exec", execute, "run a command on a lab host over SSH, or a shell")
    inside.add_argument("host", metavar="HOST")
    inside.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    verb("engine", print_engine, "print the DOCKER_HOST of the lab's engine, started if need be")
    verb("wheels", download_wheels, "download the Python packages that hosts need into build/wheels")

    machines = verbs.add_parser("vm", help="virtual machines: a kernel, a reboot and cgroup v2 of their own")
    of_machines = machines.add_subparsers(required=True, metavar="COMMAND")
    boot = of_machines.add_parser("up", help="make and boot one; what is up already is kept")
    boot.set_defaults(verb=vm_up)
    boot.add_argument("--name", default=vm.DEFAULT_NAME, help=f"its name (default {vm.DEFAULT_NAME})")
    _add_hardware(boot)
    end = of_machines.add_parser("down", help="remove it; without --name all of this checkout")
    end.set_defaults(verb=vm_down)
    end.add_argument("--name")
    for sub in (boot, end):
        sub.add_argument("--inventory", type=_folder, metavar="DIR", help="where hosts.yml is")
    return parser


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", metavar="NxMODEL", help=f"simulated GPUs of each host (default {host.DEFAULT_GPUS})")
    parser.add_argument(
        "--mig", action="append", metavar="GPU=PROFILE,...", help="cut a GPU; may be given several times"
    )


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 50:
        raise argparse.ArgumentTypeError("from 1 to 50")
    return number


def _folder(text: str) -> Path:
    return Path(text).resolve()
