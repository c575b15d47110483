"""Playbooks against a lab host over SSH: a server from nothing, a converged one, one request."""

from __future__ import annotations

from collections.abc import Iterator

import world
from timing import Case, Section, interleaved, line, say, timed

IMAGE = "ds01-lab/base:latest"
PLAYBOOKS = world.ROOT / "playbooks"
PING = world.BENCH / "ping.yml"
REQUEST = {"ds01_user": "alice", "ds01_project": "bench"}
MANY = 300
NO_OP = "ansible-playbook with one ping task"


def servers(rounds: int) -> Iterator[Section]:
    """site.yml first and again, then requests on the server that it made."""
    with world.lab_host() as host:
        yield _site(host, max(3, rounds // 3))
        yield _request(host, rounds)
        yield _many(host, rounds)


def _site(host: world.LabHost, rounds: int) -> Section:
    title = "site.yml on one server"
    say(f"== {title}: the first run")
    first = Case("DS01", "site.yml, first run on a bare server", lambda: host.playbook(PLAYBOOKS / "site.yml"))
    once = line(first, [timed(first.run)])
    again = "site.yml, nothing to do"
    cases = [
        Case("DS01", again, lambda: host.playbook(PLAYBOOKS / "site.yml")),
        Case("floor", NO_OP, lambda: host.playbook(PING), against=again),
    ]
    lines = interleaved(title, cases, rounds)
    return Section(title, [once, *lines], ["first run: once", f"{rounds} rounds, interleaved"])


def _request(host: world.LabHost, rounds: int) -> Section:
    title = "one request, from command line to running container"
    create, remove = "container_create.yml", "container_remove.yml"
    bare_create = f"docker create --interactive --tty --name bare {IMAGE} && docker start bare"
    cases = [
        Case("DS01", create, lambda: host.playbook(PLAYBOOKS / create, ds01_image=IMAGE, **REQUEST)),
        Case("DS01", remove, lambda: host.playbook(PLAYBOOKS / remove, **REQUEST)),
        Case("floor", NO_OP, lambda: host.playbook(PING), against=create),
        Case("floor", "docker create + start over ssh", lambda: host.command(bare_create), against=create),
        Case("floor", "docker rm --force over ssh", lambda: host.command("docker rm --force bare"), against=remove),
    ]
    return Section(title, interleaved(title, cases, rounds), [f"{rounds} rounds, interleaved"])


def _many(host: world.LabHost, rounds: int) -> Section:
    """A course's containers in one task, all there: what one more of them costs."""
    title = f"ds01_container, {MANY} containers in one task, nothing to do"
    have = lambda count: host.playbook(world.BENCH / "many.yml", image=IMAGE, count=str(count))  # noqa: E731
    host.playbook(PLAYBOOKS / "site.yml", ds01_limits_file=str(host.limits(max_containers_per_user=None)))
    say(f"== {title}: they are made")
    have(MANY)
    name = f"{MANY} converged containers, one task"
    cases = [
        Case("DS01", name, lambda: have(MANY)),
        Case("DS01", "1 converged container", lambda: have(1)),
        Case("floor", NO_OP, lambda: host.playbook(PING), against=name),
    ]
    lines = interleaved(title, cases, rounds)
    each = (lines[0].median - lines[1].median) / (MANY - 1)
    return Section(title, lines, [f"{rounds} rounds, interleaved", f"one more container: {each * 1000:.2f} ms"])
