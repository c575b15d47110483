"""The files that other programs read, and what is counted between two of them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ds01 import metrics, publishing
from ds01.allocations import Allocations
from ds01.ledger import LedgerStore
from ds01.metrics import Family, Picture, Run
from ds01.model import Ledger
from ds01.observation import Observation
from ds01.paths import Paths
from prometheus import needs_promtool, promtool
from prometheus_client.parser import text_string_to_metric_families
from support import NOW, Host, limits_of, machine, taken
from test_metrics import INSTANCES, held, picture, samples, waiter

MINUTE = timedelta(minutes=1)
SERVER = machine("full", ["2g.20gb", "2g.20gb", "3g.40gb"])


@pytest.fixture
def textfiles(host: Host) -> Path:
    return host.root / "node-exporter"


@pytest.fixture
def mapping(host: Host) -> Path:
    return host.root / "jobs"


@pytest.fixture
def ds01(host: Host, textfiles: Path, mapping: Path) -> Allocations:
    """Both are asked for."""
    wanted = {"textfile_directory": str(textfiles), "job_mapping_directory": str(mapping)}
    host.limits(json.dumps({"metrics": wanted, "defaults": {"max_gpus": 4}}))
    return at(NOW)


def at(time: datetime) -> Allocations:
    """DS01 as a new process, at that time."""
    return Allocations(Paths.from_env(), "tester", lambda: time)


def seen(ledger: Ledger | None = None, time: datetime = NOW, **known: Any) -> Picture:
    known = {"available": {"ledger": True}, "inventory": SERVER, **known}
    found = picture(ledger, **known)
    return Picture(**{**vars(found), "now": time})


def run(time: datetime = NOW, ok: bool = True) -> Run:
    return Run(time, 0.25, ok)


def read(directory: Path) -> dict[str, dict[str, float]]:
    """The metrics as Prometheus' own parser reads them: name -> labels (`a=1 b=2`) -> value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families((directory / "ds01.prom").read_text(encoding="utf-8")):
        for sample in family.samples:
            labels = " ".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found.setdefault(sample.name.removeprefix("ds01_"), {})[labels] = sample.value
    return found


def everything() -> tuple[Picture, metrics.Totals]:
    """A picture with every metric in it."""
    ledger = held(taken(SERVER, alice="0 1:0", bob="1:1"), "bob")
    whole = seen(
        ledger,
        occupied={"MIG-1-1": "process 7", "MIG-1-2": "process 8"},
        queue=[waiter("carol", NOW)],
        hold_ends={"p._.bob": NOW + MINUTE},
        idle={"p._.alice": MINUTE},
        containers={"alice": 1},
        limits={
            user: limits_of(user, max_gpus=2, max_gpu_equivalents=1, max_containers_per_user=3)
            for user in ("alice", "bob")
        },
        available={"ledger": True, "driver": True, "engine": False, "events": True},
    )
    totals = metrics.with_time(metrics.Totals(counted_until=NOW - MINUTE), ledger, whole.idle, NOW)
    return whole, metrics.with_run(totals, run())


def every_family() -> list[Family]:
    return metrics.families(*everything())


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    found = every_family()
    publishing.write(tmp_path, found)
    told = read(tmp_path)
    assert {f"ds01_{name}" for name in told} == {family.name for family in found}
    for family in found:
        name = family.name.removeprefix("ds01_")
        assert len(told[name]) == len(family.samples)
        assert sum(told[name].values()) == pytest.approx(sum(value for _, value in family.samples))


@needs_promtool
def test_names_and_texts_follow_prometheus_conventions() -> None:
    assert promtool("check", "metrics", stdin=publishing.render(every_family())) == (0, "")


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "Jürgen", "{}", "", "x\udcff"], ids=ascii)
def test_any_text_can_be_a_label(text: str, tmp_path: Path) -> None:
    publishing.write(tmp_path, [Family("ds01_a", "gauge", "A.", [({"user": text}, 1)])])
    [family] = text_string_to_metric_families((tmp_path / "ds01.prom").read_text(encoding="utf-8"))
    assert family.samples[0].labels["user"] == text.replace("\udcff", "?")


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_others_may_read_it(
    mask: int, ds01: Allocations, textfiles: Path, mapping: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    assert publishing.publish(ds01, seen(taken(SERVER, alice="0")), run()) == []
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (textfiles, mapping)}
    assert modes == {"node-exporter": "0o755", "jobs": "0o755"}
    assert [p.name for p in textfiles.iterdir()] == ["ds01.prom"]
    assert [p.name for p in mapping.iterdir()] == ["0"]
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in (textfiles / "ds01.prom", mapping / "0")} == {"0o644"}
    assert oct(stat.S_IMODE(ds01.paths.totals.stat().st_mode)) == "0o640"


def test_idle_time_is_counted_on_over_processes(ds01: Allocations, textfiles: Path) -> None:
    idle, ledger = {"p._.alice": timedelta(hours=2)}, taken(SERVER, alice="0 1:0")
    for minute in (0, 1, 2):
        now = NOW + minute * MINUTE
        assert publishing.publish(at(now), seen(ledger, now, idle=idle), run(now)) == []
    told = read(textfiles)
    assert told["container_idle_seconds"] == {"container=p._.alice user=alice": 7200}
    assert told["idle_device_seconds_total"] == {"user=alice": 240}


def test_what_was_counted_before_there_was_idle_time_is_kept(ds01: Allocations, textfiles: Path) -> None:
    publishing.publish(ds01, seen(taken(SERVER, alice="0"), NOW), run())
    publishing.publish(at(NOW + MINUTE), seen(taken(SERVER, alice="0"), NOW + MINUTE), run())
    saved = json.loads(ds01.paths.totals.read_bytes())
    del saved["idle"]
    ds01.paths.totals.write_text(json.dumps(saved), encoding="utf-8")
    publishing.publish(at(NOW + MINUTE), seen(taken(SERVER, alice="0"), NOW + MINUTE), run())
    assert read(textfiles)["allocated_device_seconds_total"] == {"status=active user=alice": 60}


def test_nothing_is_written_that_nobody_asked_for(host: Host) -> None:
    host.limits("metrics: null\n")
    before = host.tree()
    assert publishing.publish(at(NOW), seen(taken(SERVER, alice="0")), run()) == []
    assert host.tree() == before


def test_counting_goes_on_over_processes_and_files_of_the_log(ds01: Allocations, textfiles: Path) -> None:
    ledger = held(taken(SERVER, alice="0"), "alice", NOW)
    publishing.publish(ds01, seen(ledger), run())
    ds01.events.write("gpu.refused", NOW, reason="user_at_limit")
    for minute in (1, 2, 3):
        later = at(NOW + minute * MINUTE)
        later.events.write("gpu.refused", NOW, reason="user_at_limit")
        later.events.files.rotate(1, 2)
        later.events.write("gpu.held", NOW)
        publishing.publish(later, seen(ledger, NOW + minute * MINUTE), run(NOW + minute * MINUTE))
        told = read(textfiles)
        assert told["events_total"]["event=gpu.refused"] == minute + 1
        assert told["events_total"]["event=gpu.held"] == minute
        assert told["refusals_total"]["reason=user_at_limit"] == minute + 1
        assert told["allocated_device_seconds_total"] == {"status=held user=alice": 60 * minute}
        assert told["reconcile_last_run_timestamp_seconds"] == {"": NOW.timestamp() + 60 * minute}


def test_showing_it_counts_nothing(ds01: Allocations, host: Host, textfiles: Path) -> None:
    ledger = taken(SERVER, alice="0")
    publishing.publish(ds01, seen(ledger), run())
    ds01.events.write("gpu.held", NOW)
    before = host.tree()
    for _ in range(2):
        later = publishing.families(at(NOW + MINUTE), seen(ledger, NOW + MINUTE))
        assert samples(later, "events_total")["event=gpu.held"] == 1
        assert samples(later, "allocated_device_seconds_total") == {"user=alice status=active": 60}
        assert samples(later, "reconcile_last_run_timestamp_seconds") == {"": NOW.timestamp()}
    assert host.tree() == before


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"events": 1}', b"9" * 5000, b"[" * 99999], ids=range(9)
)
def test_totals_that_cannot_be_read_begin_anew(damage: bytes, ds01: Allocations, textfiles: Path) -> None:
    ds01.events.write("gpu.held", NOW)
    publishing.publish(ds01, seen(), run())
    ds01.paths.totals.write_bytes(damage)
    assert publishing.publish(ds01, seen(), run()) == []
    assert read(textfiles)["events_total"]["event=gpu.held"] == 1


def test_a_crash_before_the_totals_are_saved_doubles_nothing(
    ds01: Allocations, textfiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds01.events.write("gpu.held", NOW)
    with monkeypatch.context() as patch:

        def dies(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(publishing, "_save", dies)
        with pytest.raises(KeyboardInterrupt):
            publishing.publish(ds01, seen(), run())
    publishing.publish(ds01, seen(), run())
    assert read(textfiles)["events_total"]["event=gpu.held"] == 1


@pytest.mark.parametrize("which", ["textfile_directory", "job_mapping_directory"])
def test_a_directory_that_cannot_be_written_is_told_and_the_other_is_written(
    which: str, host: Host, textfiles: Path, mapping: Path
) -> None:
    (host.root / "file").write_text("", encoding="utf-8")
    wanted = {"textfile_directory": str(textfiles), "job_mapping_directory": str(mapping)}
    host.limits(json.dumps({"metrics": {**wanted, which: str(host.root / "file" / "x")}}))
    [problem] = publishing.publish(at(NOW), seen(taken(SERVER, alice="0")), run())
    assert "could not be written" in problem
    assert str(host.root / "file") in problem
    assert (mapping / "0").exists() if which == "textfile_directory" else (textfiles / "ds01.prom").exists()


# --- job mapping


def jobs(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in directory.iterdir() if path.is_file()}


# One allocation after the other, and the files after each.
COURSE: Sequence[tuple[Ledger, dict[str, str]]] = [
    (taken(SERVER, alice="0 1:0"), {"0": "alice:p._.alice\n", "1.3": "alice:p._.alice\n"}),
    (taken(SERVER, alice="0"), {"0": "alice:p._.alice\n", "1.3": ""}),
    (taken(SERVER, bob="1:0"), {"0": "", "1.3": "bob:p._.bob\n"}),
    (Ledger(), {"0": "", "1.3": ""}),
]


def test_files_are_emptied_when_their_device_is_released(ds01: Allocations, mapping: Path) -> None:
    for ledger, expected in COURSE:
        publishing.publish(ds01, seen(ledger, instances=INSTANCES), run())
        assert jobs(mapping) == expected


def test_a_file_that_is_right_is_left_alone(ds01: Allocations, mapping: Path) -> None:
    publishing.publish(ds01, seen(taken(SERVER, alice="0")), run())
    before = (mapping / "0").stat()
    publishing.publish(ds01, seen(taken(SERVER, alice="0")), run())
    assert (mapping / "0").stat() == before


def test_files_that_are_no_mapping_are_left_alone(ds01: Allocations, mapping: Path, tmp_path: Path) -> None:
    mapping.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("untouched", encoding="utf-8")
    (mapping / "7").symlink_to(victim)
    (mapping / "8").mkdir()
    for name in ("README", "0.1.2", "-1", "9"):
        (mapping / name).write_text("x", encoding="utf-8")
    publishing.publish(ds01, seen(), run())
    assert victim.read_text(encoding="utf-8") == "untouched"
    assert {**jobs(mapping), "7": ""} == {"README": "x", "0.1.2": "x", "-1": "x", "9": "", "7": ""}


@pytest.mark.parametrize("unknown", [{"inventory": None}, {"instances": None}], ids=["devices", "instances"])
def test_what_is_not_known_is_not_emptied(unknown: dict[str, Any], ds01: Allocations, mapping: Path) -> None:
    publishing.publish(ds01, seen(taken(SERVER, alice="0")), run())
    publishing.publish(ds01, seen(**unknown), run())
    assert jobs(mapping) == {"0": "alice:p._.alice\n"}


# --- the picture


def test_a_picture_of_what_was_seen(ds01: Allocations) -> None:
    ledger = held(taken(SERVER, alice="0", bob="1:0"), "bob")
    found = publishing.picture(ds01, ledger, Observation(SERVER), None)
    assert (found.now, found.ledger, found.inventory, found.containers) == (NOW, ledger, None, None)
    assert set(found.limits) == {"alice", "bob"}
    assert found.hold_ends == {"p._.bob": NOW + timedelta(hours=24)}
    assert found.available == {"ledger": True, "driver": True, "events": True}


def test_a_ledger_that_cannot_be_read_is_a_metric(ds01: Allocations, host: Host) -> None:
    host.state.mkdir()
    host.ledger.write_text("torn", encoding="utf-8")
    found = publishing.look(ds01)
    assert (found.ledger, found.available["ledger"]) == (None, False)
    host.ledger.unlink()
    with LedgerStore(host.ledger).transaction() as transaction:
        transaction.commit(taken(SERVER, alice="0"), NOW)
    assert publishing.look(at(NOW)).available["ledger"] is True


def test_a_log_that_cannot_be_written_is_a_metric(ds01: Allocations, host: Host) -> None:
    host.log.write_text("a file", encoding="utf-8")
    assert publishing.look(ds01).available["events"] is False


def test_a_log_nobody_wrote_yet_is_none_that_cannot_be_written(ds01: Allocations) -> None:
    assert publishing.look(ds01).available["events"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can")
def test_half_written_metrics_are_never_read(ds01: Allocations, textfiles: Path) -> None:
    publishing.publish(ds01, seen(), run())
    first = (textfiles / "ds01.prom").stat().st_ino
    publishing.publish(ds01, seen(taken(SERVER, alice="0")), run())
    assert (textfiles / "ds01.prom").stat().st_ino != first, "it was written in place"
