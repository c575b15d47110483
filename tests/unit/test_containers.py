"""The container verbs on a whole installation: many containers in one call, and one that is made anew.

The engine stands in for Docker: it keeps containers, counts what it is asked for, and refuses what it is told to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from ds01 import accounts, engine, names, workspace
from ds01.allocations import Allocations, other_containers
from ds01.container_spec import ContainerRequest
from ds01.container_steps import Report, Wish
from ds01.containers import Containers
from ds01.engine import Container, Image, Listing
from ds01.errors import Ds01Error
from ds01.model import Allocation, Ledger, Process, Request, Ticket, Waiter
from ds01.names import Account, ContainerName
from ds01.paths import Paths
from support import NOW, Host

NAME = ContainerName("p", "alice", "p._.alice")
OLD = names.set_aside("p._.alice")


class Engine:
    """`refuses` names the verb that fails, `refuses_once` those that fail the next time; `asked` counts the verbs."""

    def __init__(self) -> None:
        self.has: dict[str, Container] = {}
        self.files: dict[str, set[str]] = {}
        self.refuses = ""
        self.refuses_once: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.image_id = "sha256:1"

    def _ask(self, verb: str) -> None:
        self.asked[verb] += 1
        if verb == self.refuses or verb in self.refuses_once:
            self.refuses_once.discard(verb)
            raise Ds01Error("engine_error", f"The Docker engine could not {verb}.")

    def listing(self) -> Listing:
        self._ask("listing")
        return Listing(tuple(self.has.values()), ())

    def containers(self) -> tuple[Container, ...]:
        return tuple(self.has.values())

    def container(self, name: str) -> Container | None:
        self._ask("inspect")
        return self.has.get(name)

    def made_from(self, _name: str) -> dict[str, Any]:
        return {}

    def image(self, _name: str) -> Image:
        self._ask("image")
        return Image(self.image_id, {})

    def create(self, name: str, body: Mapping[str, Any]) -> str:
        self._ask("create")
        assert name not in self.has
        labels, made = dict(body["Labels"]), f"id-{self.asked['create']}"
        self.has[name] = Container(made, name, "created", body["Image"], labels, image_id=self.image_id)
        self.files[made] = set()
        return made

    def start(self, name: str) -> None:
        self._ask("start")
        self._set(name, "running")

    def stop(self, name: str, _timeout: int) -> None:
        self._ask("stop")
        self._set(name, "exited")

    def rename(self, name: str, new: str) -> None:
        self._ask("rename")
        assert new not in self.has
        self.has[new] = replace(self.has.pop(name), name=new)

    def remove(self, name: str) -> None:
        self._ask("remove")
        self.has.pop(name, None)

    def copy(self, source: str, target: str, path: str) -> bool:
        self._ask("copy")
        found = path in self.files[self.has[source].id]
        if found:
            self.files[self.has[target].id].add(path)
        return found

    def ends_within(self, *_: object) -> bool:
        return False

    def read_file(self, *_: object) -> None:
        return None

    def exists(self, *_: object) -> bool:
        return False

    def unpack(self, *_: object) -> None:
        self._ask("unpack")

    def last_words(self, _name: str) -> str:
        return ""

    def _set(self, name: str, status: str) -> None:
        self.has[name] = replace(self.has[name], status=status)


@pytest.fixture
def docker(host: Host, monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    host.limits("defaults: {max_containers_per_user: null}\ndefault_group: all\ngroups: {all: {}}\n")
    monkeypatch.setattr(engine, "connect", lambda: made)
    monkeypatch.setattr(accounts, "lookup", lambda name: Account(name, 2001, 2001, f"/nonexistent/{name}"))
    monkeypatch.setattr(workspace, "ensure", lambda *_: None)
    return made


def wish(state: str = "started", project: str = "p", **more: Any) -> Wish:
    name = ContainerName(project, "alice", f"{project}._.alice")
    env = {"SEED": str(more.pop("seed", 1))}
    return Wish(state, name, ContainerRequest(name, "img", env=env), **more)


def apply(*wishes: Wish) -> list[Report]:
    return Containers(Allocations(Paths.from_env())).apply(wishes)


def many(number: int) -> list[Wish]:
    return [wish("present", f"p{index}") for index in range(number)]


@pytest.mark.parametrize("verb", ["apply", "preview"])
def test_many_that_are_as_wished_are_told_from_one_listing(verb: str, host: Host, docker: Engine) -> None:
    made = apply(*many(50))
    assert all(report.actions == ["created"] for report in made)
    docker.asked.clear()
    before = host.tree()
    reports = getattr(Containers(Allocations(Paths.from_env())), verb)(many(50))
    assert docker.asked == {"listing": 1, "image": 1}
    assert [r.name for r in reports] == [w.name for w in many(50)]
    assert [r.result() for r in reports] == [{**r.result(), "changed": False, "failed": False} for r in reports]
    assert [r.container for r in reports] == [r.container for r in made]
    assert host.tree() == before


def test_many_that_are_gone_are_told_from_one_listing(docker: Engine) -> None:
    reports = apply(*(wish("absent", f"p{index}") for index in range(50)))
    assert docker.asked == {"listing": 1}
    assert not any(report.actions or report.error for report in reports)


def test_one_who_waits_is_looked_at_by_itself(docker: Engine) -> None:
    """The listing does not show that the ledger knows the name."""
    store = Allocations(Paths.from_env()).store
    ticket = Ticket(NOW, NOW + timedelta(hours=1), Process(1, 1))
    with store.locked():
        store.write(Ledger(queue=(Waiter(Request("p1._.alice", "alice"), 10, None, ticket),)))
    docker.asked.clear()
    reports = apply(*(wish("absent", f"p{index}") for index in range(3)))
    assert [report.error for report in reports] == [None] * 3
    assert docker.asked.keys() == {"listing", "inspect"}


def test_those_that_differ_are_looked_at_by_themselves(docker: Engine) -> None:
    apply(*many(3))
    docker.has.pop("p1._.alice")
    assert [report.actions for report in apply(*many(3))] == [[], ["created"], []]


def test_a_container_that_stands_there_twice_is_no_guess(docker: Engine) -> None:
    apply(wish())
    reports = apply(wish("stopped"), wish(), wish("present", "other"))
    assert [report.actions for report in reports] == [["stopped"], ["started"], ["created"]]


def test_an_engine_that_does_not_answer_is_said_for_each(docker: Engine) -> None:
    docker.refuses = "listing"
    assert [report.error for report in apply(*many(2))] == [None, None]
    docker.refuses = "inspect"
    assert [r.error and r.error.reason for r in apply(*many(1))] == ["engine_error"]


@pytest.mark.parametrize(
    ("recreate", "seed", "image_id", "anew"),
    [
        ("never", 2, "sha256:2", False),
        ("on_change", 1, "sha256:2", False),
        ("on_change", 2, "sha256:1", True),
        ("on_update", 1, "sha256:1", False),
        ("on_update", 1, "sha256:2", True),
        ("on_update", 2, "sha256:1", True),
        ("always", 1, "sha256:1", True),
    ],
)
def test_when_a_container_is_made_anew(recreate: str, seed: int, image_id: str, anew: bool, docker: Engine) -> None:
    (first,) = apply(wish())
    docker.image_id = image_id
    (report,) = apply(wish(recreate=recreate, seed=seed))
    assert report.actions == (["removed", "created", "started"] if anew else [])
    assert (docker.has["p._.alice"].id == first.container["id"]) is not anew
    assert report.image_outdated is (image_id == "sha256:2" and seed == 1)
    assert bool(report.warnings) is (not anew and (seed == 2 or image_id == "sha256:2"))
    assert list(docker.has) == ["p._.alice"]


def test_what_is_to_be_kept_is_in_the_new_one(docker: Engine) -> None:
    (first,) = apply(wish())
    docker.files[first.container["id"]] = {"/home/alice", "/tmp/x"}
    (report,) = apply(wish(recreate="always", keep=["/home/alice", "/opt/none"]))
    assert docker.files[report.container["id"]] == {"/home/alice"}


@pytest.mark.parametrize("refuses", ["stop", "rename", "create", "unpack", "copy", "start"])
@pytest.mark.parametrize("state", ["started", "present"])
def test_where_no_new_one_can_be_had_the_old_one_is_as_it_was(
    refuses: str, state: str, host: Host, docker: Engine
) -> None:
    apply(wish())
    old, record = docker.has["p._.alice"], host.state / "container-metadata" / "p._.alice.json"
    before = record.read_bytes()
    if (refuses, state) == ("start", "present"):
        return  # nothing is started then
    docker.refuses = refuses
    (report,) = apply(wish(state, recreate="always", keep=["/home/alice"]))
    assert report.error and report.error.reason == "engine_error"
    assert report.actions == []
    assert record.read_bytes() == before
    assert list(docker.has) == ["p._.alice"]
    # What could not be started at all cannot be started again either.
    assert docker.has["p._.alice"] == (replace(old, status="exited") if refuses == "start" else old)


@pytest.mark.parametrize("came_to", ["rename", "create", "record"])
def test_a_request_that_died_halfway_loses_nothing(came_to: str, host: Host, docker: Engine) -> None:
    (first,) = apply(wish())
    record = host.state / "container-metadata" / "p._.alice.json"
    before = record.read_bytes()
    old = replace(docker.has["p._.alice"], status="exited", name=OLD)
    apply(wish(recreate="always"))
    new = docker.has.pop("p._.alice")
    docker.has[OLD] = old
    if came_to != "rename":
        docker.has["p._.alice"] = replace(new, status="created")
    if came_to != "record":
        record.write_bytes(before)
    (report,) = apply(wish("present"))
    assert report.error is None
    assert list(docker.has) == ["p._.alice"]
    assert docker.has["p._.alice"].id == (new.id if came_to == "record" else first.container["id"])


def test_an_engine_that_fails_while_a_request_is_undone_leaves_the_old_one_as_it_was(docker: Engine) -> None:
    """It was killed, and is there again: what stands in the old one's place goes at the second try."""
    (first,) = apply(wish())
    docker.refuses_once = {"unpack", "remove"}
    (report,) = apply(wish(recreate="always"))
    assert report.error
    assert report.error.message.startswith("The Docker engine could not unpack.")
    assert list(docker.has) == ["p._.alice"]
    assert docker.has["p._.alice"].id == first.container["id"]


def test_what_could_not_be_undone_is_told_with_the_next_step(docker: Engine) -> None:
    (first,) = apply(wish())
    docker.refuses, docker.refuses_once = "remove", {"unpack"}
    (report,) = apply(wish(recreate="always"))
    assert report.error
    assert str(report.error) == (
        "The Docker engine could not unpack."
        " What was begun could not be taken back: The Docker engine could not remove."
        " If p._.alice is gone, it is there with its files as replaced.p._.alice:"
        " the next request for it, or ds01 reconcile, gives it its name again."
    )
    docker.refuses = ""
    containers = Containers(Allocations(Paths.from_env()))
    assert [action and action.kind for action in (containers.left_aside(NAME), containers.put_back(NAME))] == [
        "container.put_back",
        "container.put_back",
    ]
    assert containers.left_aside(NAME) is containers.put_back(NAME) is None
    assert list(docker.has) == ["p._.alice"]
    assert docker.has["p._.alice"].id == first.container["id"]


def test_a_new_one_that_could_not_be_made_is_told_with_the_next_step(docker: Engine) -> None:
    docker.refuses, docker.refuses_once = "remove", {"unpack"}
    (report,) = apply(wish())
    assert report.error
    assert str(report.error).endswith("The next request for p._.alice, or ds01 reconcile, puts it right.")
    docker.refuses = ""
    (report,) = apply(wish())
    assert (report.error, report.actions) == (None, ["removed", "created", "started"])


@pytest.mark.parametrize("status", ["created", "exited", "running"])
def test_a_new_one_that_failed_and_could_not_be_removed_is_never_taken_for_complete(
    status: str, docker: Engine
) -> None:
    """The request had failed: the record is the old one's again."""
    (first,) = apply(wish())
    docker.rename("p._.alice", OLD)
    docker.create("p._.alice", {"Image": "img", "Labels": docker.has[OLD].labels})
    docker._set("p._.alice", status)
    (report,) = apply(wish("present"))
    assert report.error is None
    assert list(docker.has) == ["p._.alice"]
    assert docker.has["p._.alice"].id == first.container["id"]


def test_somebody_elses_container_of_the_name_costs_nobody_his_own(docker: Engine) -> None:
    apply(wish())
    docker.rename("p._.alice", OLD)
    docker.has["p._.alice"] = Container("id-x", "p._.alice", "running", "img", {})
    (report,) = apply(wish("present"))
    assert report.error and report.error.reason == "container_foreign"
    assert sorted(docker.has) == ["p._.alice", OLD]


def test_one_that_was_set_aside_counts_once(docker: Engine) -> None:
    """Another request of its user finds it under its own name, as the ledger has it."""
    apply(wish())
    docker.rename("p._.alice", OLD)
    now = Ledger(allocations={"p._.alice": Allocation("p._.alice", "alice", (), 0, NOW)})
    assert other_containers(ContainerName("q", "alice", "q._.alice"), docker.containers(), now) == 1
    assert other_containers(NAME, docker.containers(), now) == 0


def test_a_users_own_container_of_such_a_name_is_left_alone(docker: Engine) -> None:
    apply(wish("present", "replaced.p"), wish("present"))
    reports = apply(wish("present", "replaced.p"), wish("present"))
    assert not any(report.actions or report.error for report in reports)
    assert sorted(docker.has) == ["p._.alice", OLD]
