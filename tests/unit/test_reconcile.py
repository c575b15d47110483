"""Reconcile, on the host that a test plays: one run puts right whatever happened there, a second changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01 import memory, names, nvml, processes, publishing, reconcile, systemd_slices, usage
from ds01.allocations import Allocations
from ds01.drift import Action
from ds01.errors import Ds01Error
from ds01.occupancy import Program
from ds01.policies import Run, State
from ds01.policy_state import PolicyStore
from ds01.reconcile import Reconciled
from support import Host
from test_allocations_cases import Stage, damage, lose
from world import FOREIGN_PID, Box, Client, projected

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
HALF_A_DAY = 12 * HOUR + timedelta(seconds=1)
"""How long stopped containers are kept, and the rest of the second in which it stopped."""


class Server(Stage):
    """A stage that reconciles itself. `uptime` goes on with the clock, but for a clock that is set."""

    uptime = 100_000.0

    def passes(self, span: timedelta) -> None:
        self.world.later(span)
        self.uptime += span.total_seconds()

    def run(self) -> list[str]:
        """One run, what it did, and that a second one does nothing and changes no file."""
        found = reconcile.reconcile(self.ds01)
        assert found.problems == ()
        self.is_settled()
        return said(found)

    def is_settled(self) -> None:
        before, boxes = self.host.tree(), [(b.name, b.status) for b in self.world.boxes.values()]
        again = reconcile.reconcile(self.ds01)
        assert not again.changed, again.summary()
        assert again.problems == ()
        assert self.host.tree() == before
        assert [(b.name, b.status) for b in self.world.boxes.values()] == boxes
        for container, allocation in self.ds01.store.read().allocations.items():
            assert projected(self.world.cdi, container) == tuple(d.uuid for d in allocation.devices)
        files = {path.name for path in self.world.cdi.glob("ds01-*.json")}
        assert files == {f"ds01-{container}.json" for container in self.ledger}

    def foreseen(self) -> list[str]:
        before = self.host.tree()
        found = said(reconcile.foresee(self.ds01))
        assert self.host.tree() == before, "a report of drift writes nothing"
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.host.events.read_text(encoding="utf-8").splitlines()]

    def told(self, *kinds: str) -> list[str]:
        return [event["message"] for event in self.events if event["event"] in kinds]

    def policies(self, **rules: Any) -> None:
        self.limits(defaults={"container_hold_after_stop": "12h"}, policies=rules)


def said(found: Reconciled) -> list[str]:
    return [f"{action.kind} {action.subject}" for action in found.actions]


@pytest.fixture
def server(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """alice's container runs, bob's stopped and holds its device; nobody is stopped for being idle."""
    made = Server(host, ["full", ["2g.20gb", "2g.20gb", "2g.20gb"]])
    made.world.plug_in(monkeypatch)
    monkeypatch.setattr(systemd_slices, "live", list)
    monkeypatch.setattr(usage, "usages", lambda _ids: {})
    monkeypatch.setattr(memory, "since_boot", lambda: made.uptime)
    made.policies()
    made.runs("p._.alice")
    box = made.runs("q._.bob")
    made.world.stop(box)
    made.call(made.change("held", "q._.bob"))
    reconcile.reconcile(made.ds01)
    yield made
    made.run()


# --- what happened behind DS01's back


def removed(server: Server) -> list[str]:
    server.world.remove(server.world.boxes["p._.alice"], record_too=False)
    return ["gpu.released p._.alice"]


def removed_while_held(server: Server) -> list[str]:
    server.world.remove(server.world.boxes["q._.bob"], record_too=False)
    return ["gpu.released q._.bob"]


def stopped(server: Server) -> list[str]:
    server.world.stop(server.world.boxes["p._.alice"])
    server.passes(MINUTE)
    return ["gpu.held p._.alice"]


def stopped_a_moment_ago(server: Server) -> list[str]:
    """It may be in the middle of a restart."""
    server.world.stop(server.world.boxes["p._.alice"])
    return []


def stopped_longer_than_its_hold(server: Server) -> list[str]:
    server.world.stop(server.world.boxes["p._.alice"])
    server.passes(3 * HOUR)
    return ["gpu.released p._.alice", "gpu.released q._.bob"]


def started(server: Server) -> list[str]:
    assert server.world.start(server.world.boxes["q._.bob"])
    return ["gpu.active q._.bob"]


def the_hold_is_over(server: Server) -> list[str]:
    server.passes(HOUR)
    return ["gpu.released q._.bob"]


def granted_and_never_made(server: Server) -> list[str]:
    server.ask("r._.carol")
    server.passes(10 * MINUTE)
    return ["gpu.released r._.carol"]


def granted_a_moment_ago(server: Server) -> list[str]:
    server.ask("r._.carol")
    return []


def a_cdi_file_is_gone(server: Server) -> list[str]:
    (server.world.cdi / "ds01-p._.alice.json").unlink()
    return ["cdi.mended p._.alice"]


def every_cdi_file_is_gone(server: Server) -> list[str]:
    for path in server.world.cdi.glob("ds01-*.json"):
        path.unlink()
    return ["cdi.mended p._.alice", "cdi.mended q._.bob"]


def a_cdi_file_is_cut_off(server: Server) -> list[str]:
    path = server.world.cdi / "ds01-p._.alice.json"
    path.write_bytes(path.read_bytes()[:40])
    return ["cdi.mended p._.alice"]


def a_cdi_file_is_forged(server: Server) -> list[str]:
    """Bob's would give alice's device."""
    alices = (server.world.cdi / "ds01-p._.alice.json").read_text(encoding="utf-8")
    (server.world.cdi / "ds01-q._.bob.json").write_text(alices.replace("p._.alice", "q._.bob"), encoding="utf-8")
    return ["cdi.mended q._.bob"]


def a_cdi_file_is_edited(server: Server) -> list[str]:
    """Its UUIDs stay, its nodes are others'."""
    path = server.world.cdi / "ds01-p._.alice.json"
    text = path.read_text(encoding="utf-8")
    assert "/dev/nvidia1" in text
    path.write_text(text.replace("/dev/nvidia1", "/dev/nvidia0"), encoding="utf-8")
    return ["cdi.mended p._.alice"]


def the_driver_is_another(server: Server) -> list[str]:
    """NVIDIA's spec was written anew, with other libraries."""
    path = server.world.nvidia_cdi / "nvidia.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**spec, "containerEdits": {"env": ["NEW=1"]}}), encoding="utf-8")
    return ["cdi.mended p._.alice", "cdi.mended q._.bob"]


def a_cdi_file_of_nobody(server: Server) -> list[str]:
    alices = (server.world.cdi / "ds01-p._.alice.json").read_text(encoding="utf-8")
    (server.world.cdi / "ds01-x._.eve.json").write_text(alices.replace("p._.alice", "x._.eve"), encoding="utf-8")
    return ["cdi.mended x._.eve"]


def stopped_long_ago(server: Server) -> list[str]:
    server.passes(HALF_A_DAY)
    return ["gpu.released q._.bob", "container.removed q._.bob"]


def stopped_not_so_long_ago(server: Server) -> list[str]:
    server.passes(12 * HOUR)
    return ["gpu.released q._.bob"]


def never_started(server: Server) -> list[str]:
    server.ask("r._.carol")
    server.makes("r._.carol")
    server.passes(30 * MINUTE)
    return ["gpu.released r._.carol", "container.removed r._.carol"]


def not_started_yet(server: Server) -> list[str]:
    server.ask("r._.carol")
    server.makes("r._.carol")
    server.passes(9 * MINUTE)
    return []


def set_aside(server: Server, container: str) -> Box:
    """A request that was to make it anew died, right after this."""
    box = server.world.boxes[container]
    if box.runs:
        server.world.stop(box)
    server.world.rename_box(box, names.set_aside(container))
    return box


def one_was_set_aside(server: Server) -> list[str]:
    set_aside(server, "p._.alice")
    server.passes(MINUTE)
    return ["gpu.held p._.alice", "container.put_back p._.alice"]


def one_was_set_aside_a_moment_ago(server: Server) -> list[str]:
    set_aside(server, "p._.alice")
    return ["container.put_back p._.alice"]


def one_that_held_its_device_was_set_aside(server: Server) -> list[str]:
    set_aside(server, "q._.bob")
    return ["container.put_back q._.bob"]


def one_was_set_aside_long_ago(server: Server) -> list[str]:
    set_aside(server, "p._.alice")
    server.passes(49 * HOUR)
    return [
        "gpu.released p._.alice",
        "gpu.released q._.bob",
        "container.put_back p._.alice",
        "container.removed q._.bob",
    ]


def one_was_set_aside_for_one_that_is_not_complete(server: Server) -> list[str]:
    """It was granted its device anew, and nobody came for that."""
    server.world.stop(server.world.boxes["p._.alice"])
    server.passes(MINUTE)
    reconcile.reconcile(server.ds01)
    server.ask("p._.alice", startable=True)
    set_aside(server, "p._.alice")
    server.makes("p._.alice")
    server.passes(10 * MINUTE)
    return ["gpu.held p._.alice", "container.put_back p._.alice"]


def one_without_a_device_was_set_aside(server: Server) -> list[str]:
    labels = {"ds01.managed": "true", "ds01.user": "carol", "ds01.gpus": "0"}
    server.world.start(server.world.create("c._.carol", labels))
    set_aside(server, "c._.carol")
    return ["container.put_back c._.carol"]


def one_is_left_beside_its_successor(server: Server) -> list[str]:
    """The request died before it had removed it."""
    set_aside(server, "p._.alice")
    box = server.makes("p._.alice")
    assert server.world.start(box)
    server.world.note_devices(box, box.opened)
    return ["container.removed replaced.p._.alice"]


def one_has_a_project_of_such_a_name(server: Server) -> list[str]:
    labels = {"ds01.managed": "true", "ds01.user": "carol", "ds01.gpus": "0"}
    server.world.start(server.world.create("replaced.p._.carol", labels))
    return []


def the_ledger_is_lost(server: Server) -> list[str]:
    lose(server)
    return []


def the_ledger_is_damaged(server: Server) -> list[str]:
    damage(server)
    return []


def nothing(_server: Server) -> list[str]:
    return []


HAPPENED: list[Callable[[Server], list[str]]] = [
    removed,
    removed_while_held,
    stopped,
    stopped_a_moment_ago,
    stopped_longer_than_its_hold,
    started,
    the_hold_is_over,
    granted_and_never_made,
    granted_a_moment_ago,
    a_cdi_file_is_gone,
    every_cdi_file_is_gone,
    a_cdi_file_is_cut_off,
    a_cdi_file_is_forged,
    a_cdi_file_is_edited,
    the_driver_is_another,
    a_cdi_file_of_nobody,
    stopped_long_ago,
    stopped_not_so_long_ago,
    never_started,
    not_started_yet,
    one_was_set_aside,
    one_was_set_aside_a_moment_ago,
    one_that_held_its_device_was_set_aside,
    one_was_set_aside_long_ago,
    one_was_set_aside_for_one_that_is_not_complete,
    one_without_a_device_was_set_aside,
    one_is_left_beside_its_successor,
    one_has_a_project_of_such_a_name,
    nothing,
]


@pytest.mark.parametrize("happens", HAPPENED, ids=lambda happens: happens.__name__)
def test_one_run_puts_it_right(happens: Callable[[Server], list[str]], server: Server) -> None:
    expected = happens(server)
    foreseen = server.foreseen()
    assert server.run() == expected
    # A removal that a release has to come before is foreseen as well: it depends on the clock alone.
    assert foreseen == expected


@pytest.mark.parametrize("happens", [the_ledger_is_lost, the_ledger_is_damaged])
def test_a_ledger_that_is_gone_is_found_again(happens: Callable[[Server], list[str]], server: Server) -> None:
    before = server.ledger
    happens(server)
    assert reconcile.reconcile(server.ds01).problems == ()
    assert server.ledger == before


def test_each_action_is_an_event(server: Server) -> None:
    server.passes(HALF_A_DAY)
    (server.world.cdi / "ds01-p._.alice.json").unlink()
    server.run()
    assert server.told("gpu.released")[0].endswith("its hold ended at 2025-11-21T11:30:00Z.")
    assert server.told("cdi.mended") == ["The CDI device of p._.alice was not what the ledger says."]
    assert server.told("container.removed") == [
        "q._.bob is removed: it stopped at 2025-11-21T10:30:00Z, and bob's stopped containers are kept for 12h."
    ]


def test_a_container_that_somebody_starts_just_then_is_not_removed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.passes(11 * HOUR)
    box = server.world.boxes["q._.bob"]
    overdue = reconcile._overdue

    def and_then(*args: Any) -> Any:
        found = overdue(*args)
        box.status = "running"
        return found

    server.run()
    server.passes(2 * HOUR)
    with monkeypatch.context() as patch:
        patch.setattr(reconcile, "_overdue", and_then)
        found = reconcile.reconcile(server.ds01)
    assert [problem["reason"] for problem in found.problems] == ["engine_error"]
    assert "q._.bob" in server.world.boxes
    box.status = "exited"


def test_one_that_is_made_anew_just_then_stays_with_what_is_its_own(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.passes(HALF_A_DAY)
    overdue, box = reconcile._overdue, server.world.boxes["q._.bob"]

    def and_then(*args: Any) -> Any:
        found = overdue(*args)
        box.id = "id-of-the-new-one"
        server.world.note_devices(box, ())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(reconcile, "_overdue", and_then)
        assert "container.removed q._.bob" not in said(reconcile.reconcile(server.ds01))
    assert "q._.bob" in server.world.boxes
    assert (server.world.metadata / "q._.bob.json").exists()


def test_one_that_was_never_started_is_looked_at_once_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran and stopped since the first look, which took a while."""
    never_started(server)
    box = server.world.boxes["r._.carol"]
    settle = Allocations.settle

    def and_then(*args: Any) -> Any:
        found = settle(*args)
        server.world.stop(box)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Allocations, "settle", and_then)
        reconcile.reconcile(server.ds01)
    assert "r._.carol" in server.world.boxes


# --- containers that were set aside for a new one


def test_one_that_was_set_aside_is_the_same_as_before(server: Server) -> None:
    box = set_aside(server, "p._.alice")
    device = server.ledger["p._.alice"]
    server.run()
    assert server.world.boxes["p._.alice"] is box
    assert server.ledger["p._.alice"] == device
    assert server.told("container.put_back") == [
        "p._.alice has its name again: the request that was to replace it died."
    ]


def test_what_is_set_aside_keeps_its_device_from_others(server: Server) -> None:
    """Whoever asks before a reconcile has put it back finds no device that is free again."""
    before = server.ledger["p._.alice"]
    set_aside(server, "p._.alice")
    server.ask("r._.carol")
    assert server.ledger["p._.alice"] == before


def test_nothing_is_put_back_while_a_request_works_on_it(server: Server) -> None:
    set_aside(server, "p._.alice")
    with at_work(server, "containers.lock", "p._.alice"):
        assert server.foreseen() == server.run() == []
    assert server.run() == ["container.put_back p._.alice"]


def test_one_whose_name_is_somebody_elses_is_named_and_stays(server: Server) -> None:
    box = set_aside(server, "p._.alice")
    server.world.create("p._.alice", {})
    for verb in (reconcile.foresee, reconcile.reconcile):
        assert [(p["stage"], p["reason"]) for p in verb(server.ds01).problems] == [("p._.alice", "container_foreign")]
    assert sorted(server.world.boxes) == ["p._.alice", "q._.bob", box.name]
    server.world.remove(server.world.boxes["p._.alice"], record_too=False)
    server.run()
    assert server.world.boxes["p._.alice"] is box


def test_one_that_nobody_could_see_is_kept_as_long_as_if_it_had_stopped_when_it_came_back(server: Server) -> None:
    set_aside(server, "p._.alice")
    server.passes(49 * HOUR)
    server.run()
    server.passes(12 * HOUR - MINUTE)
    assert server.run() == []
    server.passes(MINUTE)
    assert server.run() == ["container.removed p._.alice"]


# --- how often it looks


@pytest.fixture
def looks(server: Server, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the engine was asked for its containers, and NVML was opened, while metrics are published as well."""
    counted: Counter[str] = Counter()

    def counts(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **named: Any) -> Any:
            counted[what] += 1
            return real(*args, **named)

        return asked

    server.limits(metrics={"textfile_directory": str(server.host.root / "textfiles")})
    monkeypatch.setattr(Client, "containers", counts("listings", Client.containers))
    monkeypatch.setattr(nvml, "session", counts("sessions", nvml.session))
    return counted


def test_a_converged_run_lists_the_containers_once_and_opens_nvml_once(server: Server, looks: Counter[str]) -> None:
    reconcile.reconcile(server.ds01)
    looks.clear()
    found = reconcile.reconcile(server.ds01)
    assert (found.actions, found.problems) == ((), ())
    assert looks == {"listings": 1, "sessions": 1}
    looks.clear()
    reconcile.foresee(server.ds01)
    assert looks == {"listings": 1, "sessions": 1}


def test_after_a_change_it_looks_again(server: Server, looks: Counter[str]) -> None:
    """What is written of the containers is what is there at the end."""
    server.passes(HALF_A_DAY)
    looks.clear()
    assert "container.removed q._.bob" in said(reconcile.reconcile(server.ds01))
    assert looks["listings"] > 1
    assert looks["sessions"] == 2
    text = (server.host.root / "textfiles" / "ds01.prom").read_text(encoding="utf-8")
    counted = [line for line in text.splitlines() if line.startswith("ds01_user_containers{")]
    assert ["alice" in line for line in counted] == [True], counted


def test_what_belongs_to_one_whose_account_is_gone_is_removed_too(server: Server) -> None:
    """His uid stands for his name in the container's; no account has it any more."""
    labels = {"ds01.managed": "true", "ds01.user": "h.baker@uni.example", "ds01.gpus": "0"}
    box = server.world.create("old._.3999999999", labels)
    server.world.start(box)
    server.world.stop(box)
    server.passes(HALF_A_DAY)
    assert "container.removed old._.3999999999" in server.run()


def record_of(server: Server, container: str, age: timedelta) -> Path:
    """A record of a container that there never was."""
    file: Path = server.world.metadata / f"{container}.json"
    file.write_text('{"container_id": "gone"}', encoding="utf-8")
    written = (server.world.clock - age).timestamp()
    os.utime(file, (written, written))
    return file


def test_records_of_containers_that_are_gone_go_too(server: Server) -> None:
    """Somebody removed them past DS01."""
    alice, bob = sorted(server.world.boxes)
    for container in (alice, bob):  # one runs, one holds its device
        record_of(server, container, 2 * HOUR)
    old, young = record_of(server, "p._.carol", HOUR), record_of(server, "q._.carol", HOUR - MINUTE)
    assert server.foreseen() == ["record.removed p._.carol"]
    assert server.run() == ["record.removed p._.carol"]
    assert [path.stem for path in sorted(server.world.metadata.iterdir())] == sorted([alice, bob, young.stem])
    assert not old.exists()
    assert server.told("record.removed") == ["p._.carol is gone, and its record is removed."]


def test_the_record_of_one_that_was_set_aside_stays(server: Server) -> None:
    """A request died while it replaced it."""
    file = record_of(server, "p._.carol", 2 * HOUR)
    server.world.create("p._.carol", {"ds01.managed": "true", "ds01.user": "carol", "ds01.gpus": "0"})
    set_aside(server, "p._.carol")
    assert server.foreseen() == server.run() == ["container.put_back p._.carol"]
    assert file.exists()


@pytest.mark.parametrize("silent", ["driver_answers", "engine_answers"])
def test_no_record_goes_while_it_is_not_known_who_is_there(silent: str, server: Server) -> None:
    file = record_of(server, "p._.carol", 2 * HOUR)
    setattr(server.world, silent, False)
    reconcile.reconcile(server.ds01)
    assert file.exists()
    setattr(server.world, silent, True)


# --- the run in a sentence


def a_run(*kinds: str, problems: int = 0, foreseen: bool = False) -> Reconciled:
    return Reconciled(tuple(Action(kind, "", "") for kind in kinds), ({},) * problems, foreseen)


SUMMARIES = {
    "settled": (a_run(), "everything is as it should be."),
    "done": (a_run("gpu.released", "policy.warned"), "2 done."),
    "foreseen": (a_run("gpu.released", foreseen=True), "1 to do."),
    "reported": (a_run("unmanaged.seen", "slice.deferred"), "2 reported."),
    "to be reported": (a_run("unmanaged.seen", foreseen=True), "1 to report."),
    "both": (a_run("unmanaged.seen", "unmanaged.stopped"), "1 done; 1 reported."),
    "as somebody wants it": (a_run("slice.moved"), "everything is as it should be; 1 to know of."),
    "and more": (a_run("slice.moved", "slice.changed"), "1 done; 1 to know of."),
    "not known": (a_run(problems=2), "nothing done; 2 could not be looked at or done."),
    "nor foreseen": (a_run(problems=1, foreseen=True), "nothing to do; 1 could not be looked at or done."),
}


@pytest.mark.parametrize(("found", "says"), SUMMARIES.values(), ids=SUMMARIES)
def test_the_summary_says_what_was_done_and_what_is_only_told(found: Reconciled, says: str) -> None:
    assert found.summary() == says


def test_a_report_of_drift_says_what_is_to_do(server: Server) -> None:
    server.passes(HOUR)
    assert reconcile.foresee(server.ds01).summary() == "1 to do."
    assert reconcile.reconcile(server.ds01).summary() == "1 done."


# --- what does not answer


def silent_driver(server: Server) -> None:
    server.world.driver_answers = False


def silent_engine(server: Server) -> None:
    server.world.engine_answers = False


@pytest.mark.parametrize(
    ("silent", "stages"),
    [
        (silent_driver, {"allocations": "driver_unavailable"}),
        (
            silent_engine,
            dict.fromkeys(("allocations", "containers", "slices"), "engine_unavailable"),
        ),
    ],
)
def test_what_does_not_answer_is_told_and_nobody_is_harmed(
    silent: Callable[[Server], None], stages: dict[str, str], server: Server
) -> None:
    server.passes(3 * HOUR)
    before = server.ledger
    silent(server)
    found = reconcile.reconcile(server.ds01)
    assert {p["stage"]: p["reason"] for p in found.problems} == stages
    assert (server.ledger, found.actions) == (before, ())
    assert found.summary() == f"nothing done; {len(stages)} could not be looked at or done."
    server.world.driver_answers = server.world.engine_answers = True
    assert server.run() == ["gpu.released q._.bob"]


def test_without_the_driver_containers_are_removed_all_the_same(server: Server) -> None:
    server.passes(HALF_A_DAY)
    silent_driver(server)
    found = reconcile.reconcile(server.ds01)
    assert said(found) == ["container.removed q._.bob"]
    assert "q._.bob" not in server.ledger
    server.world.driver_answers = True


def test_a_limits_file_with_a_mistake_says_what_to_do_to_nobody(server: Server) -> None:
    server.passes(12 * HOUR)
    good, before = server.host.config.read_text(encoding="utf-8"), server.host.tree()
    server.host.limits("defaults: {max_gpus: many}")
    for verb in (reconcile.reconcile, reconcile.foresee):
        with pytest.raises(Ds01Error) as caught:
            verb(server.ds01)
        assert caught.value.reason == "config_invalid"
    server.host.limits(good)
    assert server.host.tree() == before


@contextlib.contextmanager
def at_work(server: Server, lock: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody who has this lock until its input ends."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from pathlib import Path; from ds01 import exclusion\n"
        "with exclusion.alone(Path(sys.argv[2]), sys.argv[3]):\n  print(flush=True); sys.stdin.read()"
    )
    root = next(p for p in sys.path if p.endswith("module_utils"))
    argv = [sys.executable, "-c", code, root, str(server.host.state / lock), name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        yield other
        other.communicate()


def test_it_never_runs_twice_at_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_LOCK_WAIT", 0.1)
    server.passes(HOUR)
    with at_work(server, "reconcile.lock", "reconcile") as other:
        with pytest.raises(Ds01Error) as caught:
            reconcile.reconcile(server.ds01)
        assert caught.value.reason == "lock_timeout"
        assert caught.value.message == f"Another reconcile runs (pid {other.pid}), and did not end within 0.1 s."
        assert reconcile.foresee(server.ds01).problems == (), "who only looks waits for nobody"
    assert server.run() == ["gpu.released q._.bob"]


def test_a_second_run_waits_for_the_first(server: Server) -> None:
    server.passes(HOUR)
    with at_work(server, "reconcile.lock", "reconcile") as other, ThreadPoolExecutor(1) as thread:
        second = thread.submit(reconcile.reconcile, server.ds01)
        with pytest.raises(NotYetError):
            second.result(timeout=0.3)
        other.communicate()
        assert said(second.result(timeout=10)) == ["gpu.released q._.bob"]


# --- clocks that are set


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)], ids=["on", "back"])
def test_a_clock_that_was_set_removes_nobody_and_back_again_nothing_is_lost(jump: timedelta, server: Server) -> None:
    server.world.later(jump)
    server.run()
    assert set(server.world.boxes) == {"p._.alice", "q._.bob"}
    assert server.ledger["p._.alice"] == "0 active" or "active" in server.ledger["p._.alice"]
    server.world.later(-jump)
    server.run()
    assert set(server.world.boxes) == {"p._.alice", "q._.bob"}
    assert server.ledger["p._.alice"].endswith("active")


def test_a_clock_that_stays_as_it_was_set_is_trusted_after_an_hour(server: Server) -> None:
    server.world.later(timedelta(days=1))
    server.run()
    server.passes(HOUR - timedelta(seconds=1))
    assert server.run() == []
    server.passes(timedelta(seconds=1))
    assert server.run() == ["container.removed q._.bob"]


def boots(server: Server, clock_ahead: timedelta) -> None:
    server.world.reboot(turned=False, order={})
    server.world.later(clock_ahead)
    server.uptime = 60.0


def test_a_clock_that_is_wrong_at_boot_removes_nobody_before_it_is_put_right(server: Server) -> None:
    boots(server, 13 * HOUR)
    server.run()
    server.passes(10 * MINUTE)
    server.run()
    server.world.later(-13 * HOUR)
    assert "container.removed q._.bob" not in server.run()
    server.passes(HOUR)
    server.run()
    assert set(server.world.boxes) == {"p._.alice", "q._.bob"}


def test_a_server_that_was_off_for_long_removes_what_is_over_an_hour_after_it_is_on_again(server: Server) -> None:
    boots(server, 13 * HOUR)
    server.run()
    server.passes(HOUR - MINUTE - timedelta(seconds=1))
    assert server.foreseen() == server.run() == []
    server.passes(timedelta(seconds=1))
    assert server.foreseen() == server.run() == ["container.removed p._.alice", "container.removed q._.bob"]


# --- the disk is full


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, os.strerror(28))


def test_a_full_disk_is_told_and_everything_stays_as_it_was(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.passes(3 * HOUR)
    (server.world.cdi / "ds01-p._.alice.json").unlink()
    files = [*server.world.cdi.iterdir(), server.host.ledger, server.ds01.paths.memory]
    before = [(path, path.read_bytes()) for path in files]
    with monkeypatch.context() as patch:
        patch.setattr("ds01.files.replace", full)
        found = reconcile.reconcile(server.ds01)
    assert found.problems[0]["stage"] == "allocations"
    assert [(path, path.read_bytes()) for path in files] == before
    assert server.run() == ["gpu.released q._.bob", "cdi.mended p._.alice"]


def test_what_was_done_is_told_where_the_memory_cannot_be_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.world.slots[0].foreign_process = True
    with monkeypatch.context() as patch:
        patch.setattr(memory, "write", _refuses)
        found = reconcile.reconcile(server.ds01)
    assert [problem["stage"] for problem in found.problems] == ["memory"]
    assert found.result()["problems"][0]["reason"] == "permission_denied"
    server.world.slots[0].foreign_process = False


def test_a_log_that_cannot_be_written_is_told_and_keeps_nobody_from_work(server: Server) -> None:
    server.passes(HOUR)
    log = server.host.events.read_bytes()
    server.host.events.unlink()
    server.host.events.mkdir()
    found = reconcile.reconcile(server.ds01)
    assert said(found) == ["gpu.released q._.bob"]
    assert [problem["stage"] for problem in found.problems] == ["events"]
    server.host.events.rmdir()
    server.host.events.write_bytes(log)


def _refuses(*_: Any) -> None:
    raise Ds01Error("permission_denied", "The disk is full.")


# --- idle containers in the metrics


@pytest.mark.parametrize(
    ("run", "box", "known"),
    [
        ({}, "p._.alice", True),
        ({"streak": 0}, "p._.alice", False),
        ({"boot_id": "before"}, "p._.alice", False),
        ({}, "q._.bob", False),
    ],
    ids=["idle", "in use, or not known", "of another boot", "stopped"],
)
def test_the_metrics_know_what_the_policies_saw(run: dict[str, Any], box: str, known: bool, server: Server) -> None:
    seen = {"boot_id": processes.boot_id(), "seen": MINUTE, "idle": HOUR, "streak": 5, **run}
    paths = server.ds01.paths
    PolicyStore(paths.policy_state).write({server.world.boxes[box].id: State(run=Run(**seen))})
    assert publishing.look(server.ds01).idle == ({box: HOUR} if known else {})
    paths.policy_state.unlink()


# --- use without DS01


def foreign(server: Server, name: str, *promised: str, labels: dict[str, str] | None = None) -> Box:
    box = server.world.create(name, labels or {})
    box.promised = promised
    box.status = "running"
    return box


def computing(server: Server, monkeypatch: pytest.MonkeyPatch, **belongs: Any) -> None:
    """A process on GPU 0."""
    server.world.slots[0].foreign_process = True
    found = Program(FOREIGN_PID, f"process {FOREIGN_PID} (python3 of bob)", "bob", **{"started": 7, **belongs})
    monkeypatch.setattr(processes, "program", lambda _pid: found)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Whom DS01 asked to end."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(processes, "ask_to_end", lambda pid, began: asked.append((pid, began)) or True)
    return asked


def seen(server: Server) -> list[str]:
    found = reconcile.reconcile(server.ds01)
    return [action.message for action in found.actions]


def test_a_container_outside_is_reported_once_and_left(server: Server) -> None:
    foreign(server, "trainer", "0")
    message = "Device 0 is used without DS01 by container trainer (--gpus device=0)."
    assert seen(server) == seen(server) == [message]
    assert server.told("unmanaged.seen") == [message], "one event"
    assert server.world.boxes["trainer"].runs
    del server.world.boxes["trainer"]


def test_everybody_on_a_device_is_found_by_name(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(server, "trainer", "0")
    computing(server, monkeypatch, name="python3")
    (action,) = reconcile.reconcile(server.ds01).result()["actions"]
    assert [(who["container"], who["pid"], who["user"]) for who in action["by"]] == [
        ("trainer", None, None),
        (None, FOREIGN_PID, "bob"),
    ]
    server.is_settled()
    (bobs,) = (event for event in server.events if event.get("user") == "bob" and event["event"] == "unmanaged.seen")
    assert (bobs["device"], bobs["pid"], bobs["program"]) == ("0", FOREIGN_PID, "python3")
    (trainers,) = (event for event in server.events if event.get("container") == "trainer")
    assert trainers["message"] == "Device 0 is used without DS01 by container trainer (--gpus device=0)."
    server.world.slots[0].foreign_process = False
    del server.world.boxes["trainer"]


def test_what_somebody_else_has_is_said(server: Server) -> None:
    device = server.ds01.store.read().allocations["p._.alice"].devices[0]
    foreign(server, "trainer", device.uuid)
    (message,) = seen(server)
    assert message.endswith(f"--gpus device={device.uuid}), and is p._.alice's.")
    del server.world.boxes["trainer"]


def test_a_container_outside_is_stopped_where_that_is_wanted(server: Server, ended: list[Any]) -> None:
    server.policies(unmanaged="stop")
    (device,) = (d for d in server.world.inventory.devices if d.id == "1:2")
    foreign(server, "trainer", "0", device.uuid)
    message = f"Container trainer (--gpus device=0,{device.uuid}) is stopped: it uses 0, 1:2 without DS01."
    assert "unmanaged.stopped trainer" in server.foreseen()
    assert server.world.boxes["trainer"].runs
    assert message in seen(server)
    assert not server.world.boxes["trainer"].runs
    assert server.told("unmanaged.stopped") == [message]
    assert server.run() == []
    assert ended == []


def test_a_copy_of_one_of_ds01s_is_outside(server: Server) -> None:
    server.policies(unmanaged="stop")
    foreign(server, "copy", "0", labels={**server.world.boxes["p._.alice"].labels})
    server.run()
    assert not server.world.boxes["copy"].runs


def test_who_only_watches_is_neither_reported_nor_stopped(
    server: Server, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.policies(unmanaged="stop", monitoring_containers=["dcgm-exporter"])
    box = foreign(server, "dcgm-exporter", "all")
    computing(server, monkeypatch, container_id=box.id)
    assert seen(server) == []
    assert (box.runs, ended) == (True, [])


@pytest.mark.parametrize("unmanaged", ["report", "stop"])
def test_ds01s_own_are_never_taken_for_strangers(
    unmanaged: str, server: Server, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.policies(unmanaged=unmanaged)
    slot = next(slot for slot in server.world.slots if slot.profile == "full")
    server.limits(policies={"unmanaged": unmanaged})
    computing(server, monkeypatch, container_id=server.world.boxes["p._.alice"].id)
    assert slot.foreign_process
    assert seen(server) == []
    assert (server.world.boxes["p._.alice"].runs, ended) == (True, [])


def test_one_of_ds01s_that_runs_without_an_allocation_is_reported_only(server: Server, ended: list[Any]) -> None:
    server.policies(unmanaged="stop")
    server.call(server.change("released", "q._.bob"))
    box = server.world.boxes["q._.bob"]
    box.status = "running"
    (message,) = seen(server)
    assert message.endswith("is used without DS01 by container q._.bob (without an allocation).")
    assert box.runs
    server.world.stop(box)


def test_a_process_in_a_container_outside_stops_the_container(
    server: Server, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A privileged one that was promised nothing."""
    server.policies(unmanaged="stop")
    box = foreign(server, "sneaky")
    computing(server, monkeypatch, container_id=box.id)
    server_says = seen(server)
    assert f"Container sneaky (its process {FOREIGN_PID}) is stopped: it uses 0 without DS01." in server_says
    assert (box.runs, ended) == (False, [])
    server.world.slots[0].foreign_process = False


def test_a_process_is_asked_to_end_once(server: Server, ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server.policies(unmanaged="stop")
    computing(server, monkeypatch)
    says = f"Process {FOREIGN_PID} (python3 of bob) is asked to end: it uses 0 without DS01."
    assert says in seen(server)
    assert says not in seen(server), "it does not want to: nothing stronger is done"
    assert ended == [(FOREIGN_PID, 7)]
    assert server.told("unmanaged.stopped") == [says]
    computing(server, monkeypatch, started=8)
    assert says in seen(server), "another process of that number"
    server.world.slots[0].foreign_process = False
    reconcile.reconcile(server.ds01)
    assert memory.read(server.ds01.paths.memory).asked == {}


@pytest.mark.parametrize(
    ("belongs", "rules"),
    [
        ({"started": None}, {"unmanaged": "stop"}),
        ({"unit": "nvidia-dcgm.service"}, {"unmanaged": "stop", "mig_services": ["nvidia-dcgm.service"]}),
        ({}, {"unmanaged": "report"}),
        ({}, {}),
    ],
    ids=["it cannot be seen", "a service that may", "report", "by default"],
)
def test_a_process_that_is_only_reported(
    belongs: dict[str, Any], rules: dict[str, Any], server: Server, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.policies(**rules)
    computing(server, monkeypatch, **belongs)
    assert seen(server) == [f"Device 0 is used without DS01 by process {FOREIGN_PID} (python3 of bob)."]
    assert ended == []
    server.world.slots[0].foreign_process = False


def test_a_container_that_cannot_be_stopped_is_a_problem(server: Server) -> None:
    server.policies(unmanaged="stop")
    box = foreign(server, "trainer", "0")
    server.world.refuses_to[box.id] = ("stop", "kill")
    found = reconcile.reconcile(server.ds01)
    assert [(p["stage"], p["reason"]) for p in found.problems] == [("trainer", "engine_error")]
    assert server.host.events.exists()
    del server.world.boxes["trainer"]
