"""`ds01 metrics` as a process, on a machine of the simulated driver."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ds01 import nvml, publishing
from ds01.metrics import Run
from prometheus import PROMTOOL, promtool
from prometheus_client.parser import text_string_to_metric_families
from sim_server import Start, needs_sim, start  # noqa: F401 - a fixture
from support import NOW
from test_cli_sim import Server, machine_state, server  # noqa: F401 - fixtures

pytestmark = needs_sim

Told = dict[str, dict[str, float]]


def told(text: str) -> Told:
    """Name -> labels (`a=1 b=2`, sorted) -> value."""
    found: Told = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = " ".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found.setdefault(sample.name.removeprefix("ds01_"), {})[labels] = sample.value
    return found


def test_what_a_server_tells(server: Server) -> None:  # noqa: F811
    server.allocate("alice", "a")
    server.allocate("alice", "b")
    server.ds01("mark-stopped", "--container", "b", "--user", "alice")
    assert server.allocate("alice", "c").json["reason"] == "user_at_limit"
    shown = server.ds01("metrics")
    assert (shown.code, shown.err) == (0, "")
    if PROMTOOL:
        assert promtool("check", "metrics", stdin=shown.out.encode()) == (0, "")
    found = told(shown.out)
    assert found["component_available"] == {"component=driver": 1, "component=events": 1, "component=ledger": 1}
    assert {k: v for k, v in found["devices"].items() if v} == {
        "profile=2g.20gb status=free": 7,
        "profile=2g.20gb status=pending": 1,
        "profile=2g.20gb status=held": 1,
        "profile=full status=free": 1,
    }
    assert found["user_devices"] == found["user_devices_limit"] == {"group=researchers user=alice": 2}
    assert found["refusals_total"]["reason=user_at_limit"] == 1
    assert found["events_total"]["event=gpu.allocated"] == 2
    assert list(found["hold_start_timestamp_seconds"]) == ["container=b._.alice user=alice"]
    assert "reconcile_last_run_timestamp_seconds" not in found
    by_name = {row["name"]: row for row in server.ds01("metrics", "--json").json}
    assert by_name["ds01_queue_requests"]["samples"] == [{"labels": {}, "value": 0}]


def test_it_is_written_where_somebody_wants_it(server: Server) -> None:  # noqa: F811
    directory = server.host.root / "textfiles"
    written = server.ds01("metrics", "--output", str(directory))
    assert (written.code, written.out) == (0, "")
    assert "ds01.prom" in written.err
    assert told((directory / "ds01.prom").read_text(encoding="utf-8"))["queue_requests"] == {"": 0}


def test_a_lost_gpu_and_a_driver_that_does_not_answer(server: Server) -> None:  # noqa: F811
    server.allocate("alice", "a", "--profile", "full")
    server.simulate("lost=0")
    found = told(server.ds01("metrics").out)
    assert found["gpu_health"]["gpu=0 health=lost"] == 1
    assert found["allocated_devices_missing"] == {"": 1}
    found = told(server.ds01("metrics", LD_LIBRARY_PATH="/nowhere").out)
    assert found["component_available"]["component=driver"] == 0
    assert found["user_devices"] == {"group=researchers user=alice": 1}
    assert not {"devices", "gpu_health", "unmanaged_devices"} & set(found)


def test_an_engine_that_does_not_answer_hides_no_device(server: Server) -> None:  # noqa: F811
    found = told(server.ds01("metrics", DS01_ENGINE=None, DOCKER_HOST="unix:///nowhere/docker.sock").out)
    assert found["component_available"] == {
        "component=driver": 1,
        "component=engine": 0,
        "component=events": 1,
        "component=ledger": 1,
    }
    assert sum(found["devices"].values()) == 10
    found = told(
        server.ds01("metrics", DS01_ENGINE=None, DOCKER_HOST="unix:///nowhere", LD_LIBRARY_PATH="/nowhere").out
    )
    assert [found["component_available"][f"component={part}"] for part in ("driver", "engine")] == [0, 0]


def test_use_without_ds01(server: Server) -> None:  # noqa: F811
    server.simulate(f"process=0:{os.getpid()}")
    found = told(server.ds01("metrics").out)
    assert found["unmanaged_devices"] == {"": 1}
    assert [re.search("device=[^ ]+", labels)[0] for labels in found["unmanaged_device_info"]] == ["device=0"]


def test_the_job_mapping_names_gpu_instances_as_the_driver_does(start: Start, tmp_path: Path) -> None:  # noqa: F811
    here = start("2xA100-SXM4-80GB", g1="3g.40gb,2g.20gb,1g.10gb")
    here.allocate("p._.alice", "1g.10gb")
    here.allocate("p._.bob", "full")
    with here.host.config.open("a", encoding="utf-8") as config:
        config.write(f"metrics: {{job_mapping_directory: {tmp_path / 'jobs'}}}\n")
    ds01 = here.ds01()
    with nvml.session() as driver:
        ledger, seen = ds01.store.read(), ds01.look_at_driver(driver)
        pictured = publishing.picture(ds01, ledger, seen, driver)
        layout = driver.layout(seen.inventory)
    assert publishing.publish(ds01, pictured, Run(NOW, 0, ok=True)) == []
    [instance] = [i.id for i in layout[1].instances if i.profile == "1g.10gb"]
    found = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "jobs").iterdir()}
    assert found == {f"1.{instance}": "alice:p._.alice\n", "0": "bob:p._.bob\n"}


def test_instances_of_a_gpu_that_is_lost_meanwhile_are_left_out(start: Start) -> None:  # noqa: F811
    here = start("2xA100-SXM4-80GB", g0="2g.20gb", g1="2g.20gb,1g.10gb")
    with nvml.session() as driver:
        inventory = driver.inventory()
        here.simulate("lost=0")
        assert set(driver.instances(inventory)) == {d.uuid for d in inventory.devices if d.index[0] == 1}
