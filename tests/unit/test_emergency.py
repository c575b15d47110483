"""The emergency stop, on the host that a test plays: what ends, what is free afterwards, what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docker.errors
import pytest
from ds01 import cli, emergency, engine
from ds01.emergency import Target
from ds01.errors import Ds01Error
from support import Host
from test_allocations_cases import Stage, damage, lose
from world import Client, projected

LAYOUT = ["full", ["2g.20gb", "2g.20gb", "2g.20gb"], "full"]


@pytest.fixture
def stage(host: Host, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """alice runs one on GPU 0 and one on 1:0, bob one on 1:1, and has a hold on 1:2; dave is CPU-only."""
    made = Stage(host, LAYOUT)
    made.world.plug_in(monkeypatch)
    for container in ("a._.alice", "b._.alice", "c._.bob", "d._.bob"):
        made.runs(container)
    box = made.world.boxes["d._.bob"]
    made.world.stop(box)
    made.call(made.change("held", "d._.bob"))
    labels = {"ds01.managed": "true", "ds01.user": "dave", "ds01.gpus": "0"}
    made.world.start(made.world.create("e._.dave", labels))
    return made


def running(stage: Stage) -> list[str]:
    return sorted(box.name for box in stage.world.running())


def gpu_of(stage: Stage, container: str) -> str:
    return stage.ledger[container].split()[0]


def events(stage: Stage) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stage.host.events.read_text(encoding="utf-8").splitlines()]


def test_a_user(stage: Stage) -> None:
    had = {name: gpu_of(stage, name) for name in ("a._.alice", "b._.alice")}
    report = emergency.stop(stage.ds01, emergency.target(user="alice"))
    assert sorted(report.stopped) == ["a._.alice", "b._.alice"]
    assert (report.released, report.problems) == (had, [])
    assert running(stage) == ["c._.bob", "e._.dave"]
    assert sorted(stage.ledger) == ["c._.bob", "d._.bob"]
    assert set(stage.world.boxes) >= {"a._.alice", "b._.alice"}, "files stay"
    assert projected(stage.world.cdi, "a._.alice") is None, "a raw docker start would find nothing"


def test_a_hold_is_freed_too(stage: Stage) -> None:
    report = emergency.stop(stage.ds01, emergency.target(user="bob"))
    assert (report.stopped, sorted(report.released)) == (["c._.bob"], ["c._.bob", "d._.bob"])


def test_everything(stage: Stage) -> None:
    stage.world.start(stage.world.create("theirs", {}))
    report = emergency.stop(stage.ds01, emergency.target())
    assert sorted(report.stopped) == ["a._.alice", "b._.alice", "c._.bob", "e._.dave"]
    assert stage.ledger == {}
    assert running(stage) == ["theirs"], "what is not DS01's is left"
    before = stage.host.tree()
    again = emergency.stop(stage.ds01, emergency.target())
    assert not again.changed
    assert stage.host.tree() == before
    assert again.summary() == "Nothing to stop: all of DS01's containers do not run, and hold no device."


@pytest.mark.parametrize("by", ["id", "gpu", "uuid", "gpu uuid", "old id"])
def test_a_gpu(by: str, stage: Stage) -> None:
    device = stage.ds01.store.read().allocations["c._.bob"].devices[0]
    index = device.id.partition(":")[0]
    named = {
        "id": device.id,
        "gpu": index,
        "uuid": device.uuid,
        "gpu uuid": device.gpu_uuid,
        "old id": device.id.replace(":", "."),
    }[by]
    on_it = {name for name in stage.ledger if gpu_of(stage, name).partition(":")[0] == index}
    concerned = on_it if by.startswith("gpu") else {"c._.bob"}
    report = emergency.stop(stage.ds01, emergency.target(gpu=named))
    assert set(report.released) == concerned
    assert not concerned & set(stage.ledger)
    assert "e._.dave" in running(stage), "CPU-only"


def test_one_that_runs_without_an_allocation_is_found_by_its_records(stage: Stage) -> None:
    device = stage.ds01.store.read().allocations["c._.bob"].devices[0]
    ledger = json.loads(stage.host.ledger.read_text(encoding="utf-8"))
    assert ledger["allocations"].pop("c._.bob")
    before = stage.ds01.store.read()
    with stage.ds01.store.transaction() as transaction:
        transaction.commit(before.without("c._.bob"), stage.world.clock)
    report = emergency.stop(stage.ds01, emergency.target(gpu=device.id))
    assert report.stopped == ["c._.bob"]


def test_a_dry_run_touches_nothing(stage: Stage) -> None:
    before, boxes = stage.host.tree(), running(stage)
    report = emergency.foresee(stage.ds01, emergency.target())
    assert sorted(report.stopped) == ["a._.alice", "b._.alice", "c._.bob", "e._.dave"]
    assert sorted(report.released) == ["a._.alice", "b._.alice", "c._.bob", "d._.bob"]
    assert report.summary().startswith("Would stop 4 container(s) (")
    assert (stage.host.tree(), running(stage), stage.world.asked_to_end) == (before, boxes, [])


def test_one_that_does_not_stop_is_killed(stage: Stage) -> None:
    stage.world.refuses_to["c._.bob"] = ("stop",)
    report = emergency.stop(stage.ds01, emergency.target(user="bob"))
    assert stage.world.asked_to_end == [("stop", "c._.bob"), ("kill", "c._.bob")]
    assert (report.stopped, report.problems) == (["c._.bob"], [])


def test_one_that_cannot_be_killed_keeps_its_device_and_no_other(stage: Stage) -> None:
    stage.world.refuses_to["a._.alice"] = ("stop", "kill")
    report = emergency.stop(stage.ds01, emergency.target(user="alice"))
    assert report.stopped == ["b._.alice"]
    assert report.problems == [
        "The Docker engine could not kill a._.alice: cannot kill a._.alice: it hangs",
        "a._.alice runs again or still.",
    ]
    assert sorted(stage.ledger) == ["a._.alice", "c._.bob", "d._.bob"]


def test_one_that_somebody_starts_again_meanwhile_is_met_by_the_next_look(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start past DS01, just after it ended: its device is still projected then."""
    box, stop = stage.world.boxes["c._.bob"], Client.stop

    def and_start_again(client: Client, name: str, *, timeout: int) -> None:
        stop(client, name, timeout=timeout)
        if len(stage.world.asked_to_end) == 1:
            assert stage.world.start(box)

    monkeypatch.setattr(Client, "stop", and_start_again)
    report = emergency.stop(stage.ds01, emergency.target(user="bob"))
    assert (report.stopped, report.problems) == (["c._.bob"], [])
    assert sorted(report.released) == ["c._.bob", "d._.bob"]
    assert "c._.bob" not in running(stage)


def test_one_that_is_gone_by_then_is_no_problem(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(client: Client, name: str, *, timeout: int) -> None:
        stage.world.remove(stage.world.boxes[name], record_too=True)
        raise docker.errors.NotFound("no such container", explanation="no such container")

    monkeypatch.setattr(Client, "stop", gone)
    report = emergency.stop(stage.ds01, emergency.target(user="bob"))
    assert (report.problems, sorted(report.released)) == ([], ["c._.bob", "d._.bob"])


@pytest.mark.parametrize("how", [lose, damage])
def test_a_ledger_that_is_lost_keeps_nothing_alive(how: Any, stage: Stage) -> None:
    how(stage)
    report = emergency.stop(stage.ds01, emergency.target(user="alice"))
    assert sorted(report.stopped) == ["a._.alice", "b._.alice"]
    assert report.problems == []
    assert not {"a._.alice", "b._.alice"} & set(stage.ledger)
    assert projected(stage.world.cdi, "a._.alice") is None


def test_without_the_driver(stage: Stage) -> None:
    stage.world.driver_answers = False
    report = emergency.stop(stage.ds01, emergency.target())
    assert (len(report.stopped), stage.ledger, report.problems) == (4, {}, [])


def test_with_a_limits_file_that_is_broken(stage: Stage) -> None:
    """The containers end; devices stay theirs until somebody mends it."""
    stage.host.limits("defaults: {max_gpus: many}")
    report = emergency.stop(stage.ds01, emergency.target(user="alice"))
    assert sorted(report.stopped) == ["a._.alice", "b._.alice"]
    (problem,) = report.problems
    assert problem.startswith("The containers have ended, but their devices are not free: ")
    assert running(stage) == ["c._.bob", "e._.dave"]


def test_without_the_engine(stage: Stage) -> None:
    stage.world.engine_answers = False
    with pytest.raises(Ds01Error) as caught:
        emergency.stop(stage.ds01, emergency.target())
    assert caught.value.reason == "engine_unavailable"


def test_who_waits_is_named(stage: Stage) -> None:
    stage.ask("f._.bob")
    assert stage.ask("g._.bob", pid=77).waiter
    report = emergency.stop(stage.ds01, emergency.target(user="bob"))
    assert report.waiting == ["g._.bob (process 77)"]
    assert report.summary().endswith("Still waiting for devices: g._.bob (process 77).")
    assert emergency.foresee(stage.ds01, emergency.target(user="alice")).waiting == []


def test_one_that_only_carries_the_labels_is_left_and_named(stage: Stage) -> None:
    renamed = stage.world.boxes.pop("c._.bob")
    renamed.name = "mine"
    stage.world.boxes["mine"] = renamed
    report = emergency.stop(stage.ds01, emergency.target(user="bob"))
    assert (report.left, report.stopped) == (["mine"], [])
    assert "Left running, for it is not DS01's own: mine." in report.summary()


def test_the_audit_log(stage: Stage) -> None:
    before = len(events(stage))
    emergency.stop(stage.ds01, emergency.target(user="alice"))
    new = events(stage)[before:]
    assert (new[0]["event"], new[0]["user"], new[0]["message"]) == (
        "policy.emergency_stop",
        "alice",
        "Emergency stop of the containers of alice.",
    )
    rest = sorted((event["event"], event["container"], event["reason"]) for event in new[1:])
    assert rest == [
        ("container.stopped", "a._.alice", "emergency"),
        ("container.stopped", "b._.alice", "emergency"),
        ("gpu.released", "a._.alice", "released"),
        ("gpu.released", "b._.alice", "released"),
    ]


def test_ledger_and_devices_change_in_one_transaction(stage: Stage) -> None:
    generation = stage.ds01.store.read().generation
    emergency.stop(stage.ds01, emergency.target())
    assert stage.ds01.store.read().generation == generation + 1


def test_they_end_side_by_side(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """None waits for another's time to end by itself: all four are asked before any of them has ended."""
    import threading

    together, stop = threading.Barrier(4, timeout=10), Client.stop

    def ends_with_the_others(client: Client, name: str, *, timeout: int) -> None:
        together.wait()
        stop(client, name, timeout=timeout)

    monkeypatch.setattr(Client, "stop", ends_with_the_others)
    assert len(emergency.stop(stage.ds01, emergency.target()).stopped) == 4


# name: target, the warning
DOUBTS = {
    "a typo": (
        {"user": "alcie"},
        "Nobody is called alcie here: neither host, ledger nor engine know that name. Did you mean alice?",
    ),
    "somebody else": ({"user": "zora"}, "Nobody is called zora here: neither host, ledger nor engine know that name."),
    "of the host": ({"user": "root"}, None),
    "of the engine": ({"user": "dave"}, None),
    "a GPU that is not there": (
        {"gpu": "9"},
        "GPU 9 is in neither the ledger, NVIDIA's CDI spec nor /dev. There is {all}.",
    ),
    "a MIG device": ({"gpu": "0:1"}, "GPU 0:1 is in neither the ledger, NVIDIA's CDI spec nor /dev. There is {all}."),
    "a UUID": ({"gpu": "GPU-00"}, "GPU GPU-00 is in neither the ledger, NVIDIA's CDI spec nor /dev. There is GPU-0."),
    "of the spec": ({"gpu": "GPU-2"}, None),
    "of /dev": ({"gpu": "3"}, None),
    "of the ledger": ({"gpu": "1"}, None),
    "everything": ({}, None),
}


@pytest.mark.parametrize(("named", "doubt"), DOUBTS.values(), ids=DOUBTS)
def test_what_may_be_a_slip_of_the_pen_is_a_warning(
    named: dict[str, str], doubt: str | None, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"):
        (tmp_path / node).touch()
    monkeypatch.setattr(emergency, "_DEV", tmp_path)
    stage.world.driver_answers = False
    what = emergency.target(**named)
    known = "0, 1, 1:0, 1:1, 1:2, 2, 3"
    expected = [doubt.format(all=known)] if doubt else []
    assert emergency.foresee(stage.ds01, what).warnings == expected
    report = emergency.stop(stage.ds01, what)
    assert (report.result()["warnings"], report.problems) == (expected, [])


@pytest.mark.parametrize("gpu", ["", "GPU", "one", "-1", "0:", "0;1", "GPU-../x", "1\n"])
def test_what_names_no_gpu(gpu: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        emergency.target(gpu=gpu)
    assert caught.value.reason == "invalid_input"


def test_a_user_whom_the_host_does_not_know_any_more() -> None:
    assert emergency.target(user="h.baker@uni.example") == Target(user="h.baker@uni.example")
    with pytest.raises(Ds01Error, match="cannot be a user name"):
        emergency.target(user="../x")


def test_the_command(stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "Allocations", lambda _: stage.ds01)
    assert cli.main(["emergency-stop", "--user", "alice", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("Would stop 2 container(s) (a._.alice, b._.alice) and free devices: ")
    assert cli.main(["emergency-stop", "--all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["changed"], len(result["stopped"]), len(result["released"])) == (True, 4, 4)
    assert set(result) == {"changed", "stopped", "released", "waiting", "left", "problems", "warnings", "msg"}
    assert cli.main(["emergency-stop", "--user", "alcie", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"][0].endswith("Did you mean alice?")
    stage.world.refuses_to["e._.dave"] = ("stop", "kill")
    stage.world.start(stage.world.boxes["e._.dave"])
    assert cli.main(["emergency-stop", "--all"]) == 1
    assert "ds01: not stopped: e._.dave runs again or still." in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--all", "--user", "alice"], ["--gpu", "0", "--all"]])
def test_one_of_user_gpu_and_all_has_to_be_named(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["emergency-stop", *words])


def test_a_connection_for_each_thread(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Client] = []
    connect = engine.connect
    monkeypatch.setattr(engine, "connect", lambda: made.append(connect()) or made[-1])
    emergency.stop(stage.ds01, emergency.target())
    assert len(set(map(id, made))) == 5
