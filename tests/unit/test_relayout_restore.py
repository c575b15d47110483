"""After a reboot: the saved layout again, in the same places, whatever the GPUs are called now."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest
from ds01 import cli, interruption, overview, partitions, publishing, reconcile, relayout
from ds01.errors import Ds01Error
from sim_server import Server, Start, needs_sim, start  # noqa: F401 - start is a fixture
from state import edit
from support import come

pytestmark = needs_sim

MIXED = "2g.20gb,2g.20gb,1g.10gb"
HOPPER = "1g.10gb,3g.40gb"


@pytest.fixture
def server(start: Start) -> Server:  # noqa: F811
    """An A100, which keeps its MIG mode over a reboot, and an H100, which does not; alice is on the first, bob on
    the second."""
    made = start("A100-SXM4-80GB,H100-SXM5-80GB")
    made.apply(g0=MIXED, g1=HOPPER)
    assert made.allocate("p._.alice", "2g.20gb").ok
    assert made.allocate("q._.bob", "3g.40gb").ok
    made.report("held", "q._.bob")
    return made


def gpus_of(server: Server) -> dict[str, str]:
    """The UUID of the GPU that each container's device is on, by the ledger."""
    records = json.loads(server.host.ledger.read_bytes())["allocations"]
    return {name: record["devices"][0]["gpu_uuid"] for name, record in records.items()}


@pytest.mark.parametrize("swap", [False, True], ids=["as before", "swapped"])
def test_everything_is_back(swap: bool, server: Server) -> None:
    cuts, before, where = server.cuts(), server.ledger(), gpus_of(server)
    server.boot(*(["swap=0:1"] if swap else []))
    assert server.projected() == {}
    assert not server.allocate("r._.dan", "1g.10gb").ok, "nothing is offered before"
    restored = server.restore()
    assert (restored.changed, restored.problems) == (True, ())
    assert server.cuts() == (cuts[::-1] if swap else cuts)
    assert gpus_of(server) == where
    assert server.ledger().keys() == before.keys()
    assert not {u for uuids in server.ledger().values() for u in uuids} & {u for us in before.values() for u in us}
    server.check_all_done()
    assert server.allocate("r._.dan", "1g.10gb").ok


def test_a_second_restore_does_nothing(server: Server) -> None:
    server.boot()
    server.restore()
    written, log = server.written(), server.host.events.read_bytes()
    server.calls.clear()
    restored = server.restore()
    assert (restored.changed, restored.problems) == (False, ())
    assert (server.calls.writes, server.calls.made.count("nvmlInit")) == ([], 1)
    assert (server.written(), server.host.events.read_bytes()) == (written, log)


def test_a_gpu_that_cannot_be_cut_keeps_no_other_from_it(server: Server) -> None:
    """The H100's mode is off, and somebody uses it."""
    cuts = server.cuts()
    server.boot("busy=1")
    restored = server.restore()
    assert "GPU 1" in " ".join(restored.problems)
    assert server.cuts() == [cuts[0], "off"]
    assert server.projected().keys() == {"p._.alice"}
    assert server.ledger().keys() == {"p._.alice", "q._.bob"}, "bob's hold waits for his GPU"
    given = server.allocate("r._.dan", "full")
    assert not given.ok, "a GPU that should be cut is offered to nobody"
    server.simulate("idle=1")
    assert server.restore().problems == ()
    assert server.cuts() == cuts
    server.check_all_done()


def test_a_gpu_that_is_lost_at_boot(server: Server) -> None:
    cuts, lost = server.cuts(), gpus_of(server)["q._.bob"]
    server.boot()
    server.simulate("lost=1")
    restored = server.restore()
    assert lost in " ".join(restored.problems)
    assert server.cut(0) == cuts[0]
    server.check_nothing_false()
    assert server.ledger()["p._.alice"] == (server.uuids(0)["2g.20gb@0"],), "though nothing can be described meanwhile"
    server.simulate("found=1")
    assert server.restore().problems == ()
    assert server.cuts() == cuts
    server.check_all_done()


def test_status_finds_devices_by_their_places(server: Server) -> None:
    """The layout is back, and the ledger has the UUIDs of before: the restore could not write it, or somebody
    else's tool cut the GPUs."""
    ledger = server.host.ledger.read_bytes()
    server.boot("swap=0:1")
    server.restore()
    server.simulate("lost=0")
    server.host.ledger.write_bytes(ledger)
    listed = [
        (row["id"], row["status"], row["container"])
        for row in partitions.listing(partitions.look(server.ds01()))["instances"]
        if row["container"]
    ]
    assert listed == [("1:0", "pending", "p._.alice")]
    status = overview.status(server.ds01())
    assert [(d["id"], d["status"], d["container"]) for d in status["devices"] if d["container"]] == listed
    assert {a["container"]: a["gpu_id"] for a in status["allocations"]}["p._.alice"] == "1:0"
    shown = publishing.families(server.ds01(), publishing.look(server.ds01()))
    assert 'status="pending"} 1' in publishing.render(shown).decode()


def test_what_somebody_cut_before_is_put_right(server: Server) -> None:
    """Another tool was faster at boot, with another layout; nobody uses it."""
    cuts = server.cuts()
    server.boot()
    server.somebody_cuts(0, "7g.80gb", 0)
    restored = server.restore()
    assert (server.cuts(), restored.problems) == (cuts, ())
    server.check_all_done()


def test_what_is_in_use_is_left_and_told(server: Server) -> None:
    cuts = server.cuts()
    server.boot()
    server.somebody_cuts(0, "7g.80gb", 0)
    server.simulate("process=0.0:4711")
    restored = server.restore()
    assert "process 4711" in " ".join(restored.problems)
    assert server.cuts() == ["7g.80gb@0", cuts[1]]
    server.check_nothing_false()
    assert server.projected().keys() == {"q._.bob"}


def test_what_was_cut_otherwise_in_this_boot_is_left_alone(server: Server) -> None:
    """Somebody may use it in a way that only the engine knows, and a restore asks no engine that does not run."""
    server.somebody_removes(0, 2)
    server.somebody_cuts(0, "1g.10gb", 2)
    cuts = server.cuts()
    restored = server.restore()
    assert server.cuts() == cuts
    assert restored.problems == ("GPU 0 was cut otherwise since it was restored: it is left as it is.",)


def load_the_driver_anew(server: Server) -> None:
    """In the same boot: no instance outlives it, nor an H100's MIG mode."""
    server.simulate("reset=0", "reset=1")
    with edit(server.state) as machine:
        machine.gpus[1].update(mig="0", pending="0")
    server.write_nvidia_spec()


def test_the_driver_is_loaded_anew(server: Server) -> None:
    cuts, before = server.cuts(), gpus_of(server)
    load_the_driver_anew(server)
    assert server.cuts() == ["", "off"]
    whole = server.allocate("r._.dan", "full")
    assert (whole.ok, whole.reason) == (False, "no_gpu_available"), "bob has a half of it"
    assert "1 has the room of 3g.40gb that q._.bob has and that is missing (sudo ds01 restore)" in whole.message
    restored = server.restore()
    assert (restored.changed, restored.problems) == (True, ())
    assert (server.cuts(), gpus_of(server)) == (cuts, before)
    server.check_all_done()


def test_a_mode_that_was_switched_off_where_nobody_has_anything_stays_off(server: Server) -> None:
    server.report("released", "q._.bob")
    load_the_driver_anew(server)
    restored = server.restore()
    assert restored.problems == ("GPU 1 was cut otherwise since it was restored: it is left as it is.",)
    assert server.cut(1) == "off"


def test_what_is_missing_is_told_until_it_is_back(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    load_the_driver_anew(server)
    shown = overview.status(server.ds01())
    assert [(d["id"], d["container"], d["user"]) for d in shown["missing"]] == [
        ("0:0", "p._.alice", "alice"),
        ("1:0", "q._.bob", "bob"),
    ]
    assert [d["container"] for d in overview.status(server.ds01(), "bob")["missing"]] == ["q._.bob"]
    assert cli.main(["status"]) == 0
    assert "1:0 (3g.40gb) of q._.bob is missing" in capsys.readouterr().out
    for verb in (reconcile.foresee, reconcile.reconcile):
        found = [action for action in verb(server.ds01()).actions if action.kind == "device.missing"]
        assert [(action.subject, action.details["device"]) for action in found] == [
            ("p._.alice", "0:0"),
            ("q._.bob", "1:0"),
        ]
    assert not server.restore().problems
    assert overview.status(server.ds01())["missing"] == []
    assert not [action for action in reconcile.foresee(server.ds01()).actions if action.kind == "device.missing"]


def test_what_is_only_missing_in_this_boot_is_cut_again(server: Server) -> None:
    cuts = server.cuts()
    server.somebody_removes(0, 2)
    assert server.restore().problems == ()
    assert server.cuts() == cuts


@pytest.mark.parametrize("write", [1, 3, 5])
def test_an_interruption_loses_no_gpu_that_is_done(write: int, server: Server) -> None:
    """systemd ends a unit that takes too long by SIGTERM."""
    server.boot()
    server.calls.before("write", lambda: come(signal.SIGTERM), write)
    with pytest.raises(interruption.Interrupted), interruption.as_exception():
        server.restore()
    server.calls.clear()
    server.check_nothing_false()
    done = {uuid for uuid, gpu in json.loads(server.saved.read_bytes())["gpus"].items() if gpu["boot_id"] == "boot 2"}
    there = {name for name, gpu in gpus_of(server).items() if gpu in done}
    assert server.projected().keys() == there
    last = json.loads(server.host.events.read_text(encoding="utf-8").splitlines()[-1])
    assert (last["event"], len(last["problems"])) == ("mig.restored", 2 - len(done))
    assert server.restore().problems == ()
    server.check_all_done()


@pytest.mark.parametrize("content", ["", "{", '{"gpus": {"GPU-1": {}}}', "[]"])
def test_a_damaged_file_keeps_no_whole_gpu_from_its_user(content: str, server: Server) -> None:
    """What should be cut nobody knows then, so nobody is given anything new."""
    server.apply(g1="full", force=["q._.bob"])
    assert server.allocate("w._.carol", "full").ok
    server.boot()
    server.saved.write_text(content, encoding="utf-8")
    restored = server.restore()
    assert "mig-layout.json cannot be read" in " ".join(restored.problems)
    assert restored.summary() == "Nothing was cut again."
    assert server.projected().keys() == {"w._.carol"}
    shown = overview.status(server.ds01())
    assert {gpu["health"] for gpu in shown["gpus"]} == {"suspect"}
    assert "mig-layout.json cannot be read" in shown["gpus"][0]["health_reason"]
    refused = server.allocate("r._.dan", "1g.10gb")
    assert (refused.ok, server.cut(0)) == (False, "")


DAMAGE = b'{"version": 1, "allocations": {'


@pytest.fixture
def without_ledger(server: Server) -> Server:
    """After a reboot, with a ledger that nobody can read; the A100 has its mode, the H100 has not."""
    server.boot()
    server.host.ledger.write_bytes(DAMAGE)
    server.calls.clear()
    return server


def test_without_a_ledger_what_takes_nothing_away_is_cut_again(without_ledger: Server) -> None:
    """And nothing else: a GPU that is whole now may be what somebody was given."""
    restored = without_ledger.restore()
    assert without_ledger.cuts() == ["2g.20gb@0 2g.20gb@2 1g.10gb@6", "off"]
    assert [plan.gpu for plan in restored.plans] == [0]
    damaged, left = restored.problems
    assert "gpu-state.json cannot be read" in damaged
    assert "Restore it from the containers with: ds01 rebuild" in damaged
    assert left == "GPU 1 is cut otherwise, and without a ledger nobody knows who uses it."
    assert (without_ledger.host.ledger.read_bytes(), without_ledger.projected()) == (DAMAGE, {}), "it is to be rebuilt"
    without_ledger.calls.clear()
    again = without_ledger.restore()
    assert (again.problems, again.changed, without_ledger.calls.writes) == (restored.problems, False, [])


def test_without_a_ledger_nothing_is_destroyed(without_ledger: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever cut the GPU otherwise meanwhile may have given it to somebody."""
    without_ledger.somebody_cuts(0, "7g.80gb", 0)
    foreseen = relayout.foresee_restore(without_ledger.ds01())
    assert cli.main(["restore"]) == 1
    said = capsys.readouterr()
    told = [f"GPU {n} is cut otherwise, and without a ledger nobody knows who uses it." for n in (0, 1)]
    assert foreseen.problems[1:] == tuple(told)
    assert [line for line in said.err.splitlines() if "cut otherwise" in line] == [
        f"ds01: not restored: {line}" for line in told
    ]
    assert "gpu-state.json cannot be read" in said.err
    assert said.out == "Nothing was cut again.\n"
    assert (without_ledger.cuts(), without_ledger.calls.writes) == (["7g.80gb@0", "off"], [])
    assert (without_ledger.host.ledger.read_bytes(), without_ledger.projected()) == (DAMAGE, {})


def taken_out(server: Server, index: int) -> str:
    """The machine starts without this GPU; its UUID."""
    server.boot()
    with edit(server.state) as machine:
        [gone] = machine.records["gpu"][index : index + 1]
        machine.records["gpu"].remove(gone)
    server.nvidia_spec.unlink()  # on the other GPU nothing is cut yet, and without a device there is no spec
    server.calls.clear()
    return gone["uuid"]


def saved_gpus(server: Server) -> set[str]:
    return set(json.loads(server.saved.read_bytes())["gpus"])


def test_a_gpu_that_was_taken_out_is_forgotten_on_request(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Until then every boot tells it, since a GPU that is only lost comes back."""
    cuts, before = server.cuts(), saved_gpus(server)
    gone = taken_out(server, 1)
    assert cli.main(["restore"]) == 1
    assert f"If it is gone for good: ds01 restore --forget {gone}" in capsys.readouterr().err
    assert cli.main(["restore", "--forget", gone]) == 0
    assert capsys.readouterr().out == "Every saved layout is in place.\n"
    assert (saved_gpus(server), server.cuts()) == (before - {gone}, cuts[:1])
    assert server.ledger().keys() == {"p._.alice", "q._.bob"}, "bob's hold ends as ever"
    server.check_nothing_false()
    logged = [json.loads(line) for line in server.host.events.read_text(encoding="utf-8").splitlines()]
    assert [(event["uuid"], event["message"]) for event in logged if event["event"] == "mig.forgotten"] == [
        (gone, f"{gone} was taken out for good: it is not cut again.")
    ]
    written = server.written()
    assert cli.main(["restore"]) == 0
    assert server.written() == written
    assert server.report("released", "q._.bob").ok


def there(server: Server) -> str:
    return json.loads(server.host.ledger.read_bytes())["allocations"]["p._.alice"]["devices"][0]["gpu_uuid"]


def lost(server: Server) -> str:
    uuid = taken_out(server, 1)
    server.simulate("lost=0")
    return uuid


NOT_FORGOTTEN: dict[str, tuple[Callable[[Server], str], str, str]] = {
    "it is there": (there, "invalid_input", "is there: its layout is kept. To cut it otherwise: ds01 mig apply"),
    "a GPU is lost, which may be it": (lost, "gpu_unhealthy", "GPU 0 is lost, and may be one that is to be forgotten"),
    "it was never cut": (lambda _: "GPU-nobody", "invalid_input", "No layout of GPU-nobody is saved. Saved are those"),
}


@pytest.mark.parametrize(("name", "reason", "says"), NOT_FORGOTTEN.values(), ids=NOT_FORGOTTEN)
def test_what_is_not_forgotten(
    name: Callable[[Server], str], reason: str, says: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    uuid = name(server)
    written, cuts = server.written(), server.cuts()
    server.calls.clear()
    assert cli.main(["restore", "--forget", uuid]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith(f"ds01: {reason}: ")
    assert says in said
    assert (server.written(), server.cuts(), server.calls.writes) == (written, cuts, [])


def test_one_of_several_that_is_there_keeps_all(server: Server) -> None:
    kept, gone = there(server), taken_out(server, 1)
    saved = saved_gpus(server)
    with pytest.raises(Ds01Error, match=f"{kept} is there"):
        relayout.forget(server.ds01(), [gone, kept])
    assert saved_gpus(server) == saved
