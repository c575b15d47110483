"""The verbs in one process, on a machine that the test makes up: batches, events, projections."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from ds01 import engine, nvml, overview, processes, units, waiting
from ds01.allocations import Allocations
from ds01.cdi import Rewrite
from ds01.engine import Container, Listing
from ds01.errors import Ds01Error
from ds01.model import Inventory, Process, Ticket
from ds01.names import ContainerName
from ds01.paths import Paths
from ds01.transitions import Change
from support import NOW, Host, machine, spec_device

INVENTORY = machine(["2g.20gb"] * 3, ["2g.20gb"] * 3, "full")
LIMITS = """
defaults: {max_gpus: 2, max_gpus_per_container: 2, gpu_hold_after_stop: 1h}
gpu_allocation: {enable_mig: true, mig_profile: 2g.20gb}
user_overrides: {nohold: {gpu_hold_after_stop: 0}}
"""


class Driver:
    """Stands in for an NVML session: the inventory is whatever the test says."""

    def __init__(self, inventory: Inventory) -> None:
        self.now = inventory
        self.busy: dict[str, tuple[int, ...]] = {}

    def inventory(self) -> Inventory:
        return self.now

    def has(self, uuids: Iterable[str]) -> bool:
        return {*uuids} <= {device.uuid for device in self.now.devices}

    def processes(self, _inventory: Inventory) -> dict[str, tuple[int, ...]]:
        return self.busy

    @contextmanager
    def session(self) -> Iterator[Driver]:
        yield self


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(INVENTORY)
    monkeypatch.setattr(nvml, "session", made.session)
    return made


@pytest.fixture
def clock() -> list[datetime]:
    return [NOW]


@pytest.fixture
def ds01(host: Host, driver: Driver, clock: list[datetime]) -> Allocations:
    host.limits(LIMITS)
    paths = Paths(host.config, host.state, host.log, host.cdi, (host.cdi,))
    host.cdi.mkdir()
    devices = [spec_device(d.uuid, d.index[0]) for d in INVENTORY.devices]
    spec = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": devices}
    (host.cdi / "nvidia.json").write_text(json.dumps(spec), encoding="utf-8")
    return Allocations(paths, "tester", lambda: clock[0])


def change(state: str, user: str, project: str = "p", **rest: object) -> Change:
    return Change(state, ContainerName(project, user, f"{project}._.{user}"), **rest)


def projections(host: Host) -> dict[str, str]:
    """The devices that a container could start with now, by container."""
    specs = [json.loads(file.read_text(encoding="utf-8")) for file in host.cdi.glob("ds01-*.json")]
    return {spec["devices"][0]["name"]: spec["annotations"]["ds01.io/uuids"] for spec in specs}


def ledger_says(host: Host) -> dict[str, str]:
    allocations = json.loads(host.ledger.read_bytes())["allocations"] if host.ledger.exists() else {}
    return {name: ",".join(d["uuid"] for d in a["devices"]) for name, a in allocations.items()}


def test_a_batch_is_decided_in_order_and_a_refusal_does_not_stop_it(ds01: Allocations, host: Host) -> None:
    outcomes = ds01.apply(
        [
            change("allocated", "alice", "a"),
            change("allocated", "alice", "b", gpus=2),
            change("allocated", "bob", "c", gpus=2),
            change("released", "alice", "a"),
            change("allocated", "alice", "b", gpus=2),
        ]
    )
    assert [o.reason for o in outcomes] == ["granted", "user_at_limit", "granted", "released", "granted"]
    assert set(ledger_says(host)) == {"b._.alice", "c._.bob"}
    assert json.loads(host.ledger.read_bytes())["generation"] == 1
    events = [json.loads(line)["event"] for line in host.events.read_text(encoding="utf-8").splitlines()]
    assert events == ["gpu.allocated", "gpu.refused", "gpu.allocated", "gpu.released", "gpu.allocated"]


def test_what_can_start_is_what_the_ledger_grants(ds01: Allocations, host: Host) -> None:
    for changes in (
        [change("allocated", "alice"), change("allocated", "nohold", gpus=2)],
        [change("held", "alice"), change("held", "nohold")],
        [change("active", "alice"), change("allocated", "bob")],
        [change("released", "alice"), change("allocated", "alice", "q")],
        [change("allocated", "eve"), change("released", "eve")],
    ):
        ds01.apply(changes)
        assert projections(host) == ledger_says(host)
    assert set(ledger_says(host)) == {"p._.bob", "q._.alice"}


def test_when_one_projection_fails_no_other_of_the_batch_stays(ds01: Allocations, host: Host) -> None:
    ds01.apply([change("allocated", "alice")])
    (host.cdi / ".ds01-p._.bob.json.new").mkdir()
    with pytest.raises(Ds01Error) as caught:
        ds01.apply([change("allocated", "carol"), change("allocated", "bob")])
    assert (caught.value.reason, caught.value.exit_code) == ("permission_denied", 3)
    assert set(ledger_says(host)) == {"p._.alice"}
    assert projections(host) == ledger_says(host), "a container without an allocation could start"


def test_when_a_projection_fails_what_the_batch_released_is_not_half_there(ds01: Allocations, host: Host) -> None:
    ds01.apply([change("allocated", "alice")])
    (host.cdi / ".ds01-p._.bob.json.new").mkdir()
    with pytest.raises(Ds01Error):
        ds01.apply([change("released", "alice"), change("allocated", "bob")])
    assert projections(host) == ledger_says(host)


def test_killed_between_ledger_and_projection_no_container_can_start_on_another_s_device(
    ds01: Allocations, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds01.apply([change("allocated", "alice")])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rewrite, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        ds01.apply([change("released", "alice"), change("allocated", "bob"), change("allocated", "alice")])
    granted = ledger_says(host)
    assert granted["p._.bob"] == "MIG-0-0", "what alice had before"
    wrong = {container: uuids for container, uuids in projections(host).items() if granted.get(container) != uuids}
    assert wrong == {}


def test_a_preview_is_what_apply_does_and_writes_nothing(ds01: Allocations, host: Host) -> None:
    changes = [change("allocated", "alice"), change("allocated", "alice", "q", gpus=2), change("released", "alice")]
    before = host.tree()
    foreseen = ds01.preview(changes)
    assert host.tree() == before
    assert not host.state.exists()
    done = ds01.apply(changes)
    assert [o.result() for o in foreseen] == [o.result() for o in done]


def test_nothing_to_do_writes_nothing(ds01: Allocations, host: Host, clock: list[datetime]) -> None:
    ds01.apply([change("allocated", "alice")])
    before = host.tree()
    clock[0] += timedelta(days=1)
    outcomes = ds01.apply([change("allocated", "alice"), change("released", "bob")])
    assert [(o.reason, o.changed) for o in outcomes] == [("already_allocated", False), ("not_allocated", False)]
    assert host.tree() == before


def test_status_tells_when_a_hold_ends(ds01: Allocations) -> None:
    ds01.apply([change("allocated", "alice"), change("held", "alice", stopped_at=NOW - timedelta(minutes=20))])
    (shown,) = overview.status(ds01)["allocations"]
    assert (shown["status"], shown["stopped_at"]) == ("held", "2025-11-21T10:10:00Z")
    assert shown["hold_ends"] == "2025-11-21T11:10:00Z"
    assert overview.status(ds01, "bob")["allocations"] == []


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize(
    ("hold", "minutes", "kept"),
    [
        ("15m", 1, True),
        ("15m", 14, True),
        ("15m", 16, False),
        ("0.25h", 14, True),
        ("0.25h", 16, False),
        ("0", 0, False),
        ("null", 60 * 24 * 365, True),
    ],
)
def test_a_hold_lasts_as_long_as_the_limits_say_wherever_the_server_stands(
    hold: str,
    minutes: int,
    kept: bool,
    zone: str,
    ds01: Allocations,
    host: Host,
    timezone_of: Callable[[str], None],
) -> None:
    timezone_of(zone)
    assert (time.timezone == 0) is (zone == "UTC"), "this machine does not know its time zones (tzdata)"
    host.limits(LIMITS.replace("gpu_hold_after_stop: 1h", f"gpu_hold_after_stop: {hold}"))
    ds01 = Allocations(ds01.paths, "tester")  # by the real clock
    # As Docker writes FinishedAt.
    finished = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() - 60 * minutes))
    ds01.apply([change("allocated", "alice")])
    (outcome,) = ds01.apply([change("held", "alice", stopped_at=units.parse_time(finished))])
    assert outcome.reason == ("released" if hold == "0" else "held")
    ds01.apply([change("allocated", "bob")])  # whoever comes next takes back what is over
    assert ("p._.alice" in ledger_says(host)) is kept
    assert projections(host) == ledger_says(host)


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (None, "granted"),
        ("0:0", "granted"),
        ("0.0", "granted"),
        ("MIG-0-0", "granted"),
        ("0:1", "not_allocated"),
        ("MIG-0-1", "not_allocated"),
        ("0", "not_allocated"),
        ("0:00", "not_allocated"),
    ],
)
def test_validate(gpu: str | None, reason: str, ds01: Allocations) -> None:
    ds01.apply([change("allocated", "alice")])
    outcome = ds01.validate(ContainerName("p", "alice", "p._.alice"), gpu)
    assert (outcome.reason, outcome.ok, outcome.changed) == (reason, reason == "granted", False)


def _cut_anew(driver: Driver, host: Host) -> None:
    # The same profile under the same index 0:0, but the driver gave it another UUID.
    first, *others = INVENTORY.devices
    driver.now = replace(INVENTORY, devices=(replace(first, uuid="MIG-new"), *others))


def _fail(driver: Driver, host: Host) -> None:
    driver.now = machine(["2g.20gb"] * 3, ["2g.20gb"] * 3, "full", sick={"0:0": "failed"})


def _withdraw(driver: Driver, host: Host) -> None:
    (host.cdi / "ds01-p._.alice.json").unlink()


def _swap(driver: Driver, host: Host) -> None:
    file = host.cdi / "ds01-p._.alice.json"
    file.write_text(file.read_text(encoding="utf-8").replace("MIG-0-0", "MIG-0-1"), encoding="utf-8")


@pytest.mark.parametrize(
    ("accident", "reason"), [(_cut_anew, "gpu_unhealthy"), (_fail, "gpu_unhealthy"), (_swap, "not_allocated")]
)
def test_validate_finds_what_went_wrong(
    accident: Callable[[Driver, Host], None], reason: str, ds01: Allocations, driver: Driver, host: Host
) -> None:
    ds01.apply([change("allocated", "alice")])
    accident(driver, host)
    outcome = ds01.validate(ContainerName("p", "alice", "p._.alice"))
    assert (outcome.ok, outcome.reason) == (False, reason)


@pytest.mark.parametrize("accident", [_withdraw, _swap])
def test_asking_again_mends_the_projection(
    accident: Callable[[Driver, Host], None], ds01: Allocations, driver: Driver, host: Host
) -> None:
    ds01.apply([change("allocated", "alice")])
    accident(driver, host)
    assert ds01.apply([change("allocated", "alice")])[0].ok
    assert projections(host) == ledger_says(host)


def test_a_log_that_cannot_be_written_is_a_warning(ds01: Allocations, host: Host) -> None:
    host.log.write_text("a file", encoding="utf-8")
    (outcome,) = ds01.apply([change("allocated", "alice")])
    assert outcome.ok
    assert [w for w in outcome.warnings if "event log" in w]
    assert set(ledger_says(host)) == {"p._.alice"}


@pytest.mark.parametrize(
    ("container", "user", "full"),
    [
        ("p", "alice", "p._.alice"),
        ("p._.alice", None, "p._.alice"),
        ("p", None, "p._.alice"),
        ("q", "alice", "q._.alice"),
    ],
)
def test_the_container_that_somebody_means(
    container: str, user: str | None, full: str, ds01: Allocations, host: Host
) -> None:
    ds01.apply([change("allocated", "alice"), change("allocated", "bob", "q"), change("allocated", "eve", "q")])
    assert ds01.name(container, user).full == full


@pytest.mark.parametrize(
    ("container", "user", "reason"),
    [
        ("q", None, "invalid_input"),
        ("p", "", "invalid_input"),
        ("p._.alice", "bob", "invalid_input"),
        ("../p", None, "invalid_input"),
    ],
    ids=["ambiguous", "an empty user is no absent one", "somebody else's", "hostile"],
)
def test_what_nobody_can_mean(container: str, user: str | None, reason: str, ds01: Allocations) -> None:
    ds01.apply([change("allocated", "alice"), change("allocated", "bob", "q"), change("allocated", "eve", "q")])
    with pytest.raises(Ds01Error) as caught:
        ds01.name(container, user)
    assert caught.value.reason == reason


def test_no_projection_without_nvidia_s_spec_is_a_warning_where_there_is_no_engine(
    ds01: Allocations, host: Host
) -> None:
    (host.cdi / "nvidia.json").unlink()
    (outcome,) = ds01.apply([change("allocated", "alice")])
    assert outcome.ok
    assert outcome.warnings == ("No NVIDIA CDI spec on this host: no CDI device was written.",)


def test_the_paths_of_a_host(host: Host) -> None:
    paths = Paths.from_env()
    assert (paths.config, paths.ledger, paths.events) == (host.config, host.ledger, host.events)
    assert paths.metadata == host.state / "container-metadata"
    installed = Paths.from_env({})
    assert installed.ledger == Path("/var/lib/ds01/gpu-state.json")
    assert installed.events == Path("/var/log/ds01/events.jsonl")
    assert installed.cdi == Path("/var/run/cdi")


# --- waiting


def ticket(until: timedelta = timedelta(minutes=10), process: Process | None = None) -> Ticket:
    return Ticket(NOW, NOW + until, process or processes.current())


DEAD = Process(2**22 + 1, 1)


def fill(ds01: Allocations) -> None:
    """All six MIG devices are taken, two each."""
    assert all(o.ok for o in ds01.apply([change("allocated", f"u{n}", gpus=2) for n in range(3)]))


def ticking() -> Callable[[], datetime]:
    """A clock that goes, from the tests' own time on."""
    began = time.monotonic()
    return lambda: NOW + timedelta(seconds=time.monotonic() - began)


def queue_of(ds01: Allocations) -> list[str]:
    return [row["user"] for row in overview.status(ds01)["queue"]]


def test_who_waits_is_served_in_turn_and_nobody_overtakes(ds01: Allocations) -> None:
    fill(ds01)
    waiting = [change("allocated", user, ticket=ticket()) for user in ("carol", "dan")]
    assert [o.position for o in ds01.apply(waiting)] == [1, 2]
    assert queue_of(ds01) == ["carol", "dan"]
    ds01.apply([change("released", "u0")])
    ds01.apply([change("allocated", "dan", "q")])
    ds01.apply([change("released", "dan", "q")])
    (late,) = ds01.apply([change("allocated", "eve", gpus=1)])
    assert (late.reason, "kept for requests that wait" in late.message) == ("no_gpu_available", True)
    assert [o.reason for o in ds01.apply(list(reversed(waiting)))] == ["granted", "granted"]
    assert queue_of(ds01) == []


def test_whoever_waits_with_a_higher_priority_is_served_first(ds01: Allocations) -> None:
    fill(ds01)
    low = change("allocated", "carol", ticket=ticket())
    high = change("allocated", "dan", ticket=ticket(), priority=90, may_raise=True)
    ds01.apply([low, high])
    assert queue_of(ds01) == ["dan", "carol"]
    ds01.apply([change("released", "u0"), change("allocated", "u0", "other", priority=90, may_raise=True)])
    assert [o.ok for o in ds01.apply([low, high])] == [False, True]


@pytest.mark.parametrize(
    "gone", [ticket(process=DEAD), ticket(timedelta())], ids=["its process died", "its time is over"]
)
def test_a_dead_waiter_drops_out(gone: Ticket, ds01: Allocations, clock: list[datetime]) -> None:
    fill(ds01)
    ds01.apply([change("allocated", "carol", ticket=replace(gone, until=NOW + timedelta(seconds=5)))])
    clock[0] += timedelta(seconds=0 if gone.process == DEAD else 5)
    assert queue_of(ds01) == []
    ds01.apply([change("released", "u0")])
    assert ds01.apply([change("allocated", "eve", gpus=2)])[0].ok


def test_a_refusal_that_waiting_would_not_change_is_given_at_once(ds01: Allocations) -> None:
    (outcome,) = ds01.apply([change("allocated", "carol", gpus=3, ticket=ticket())])
    assert (outcome.reason, outcome.waiter) == ("container_limit", None)
    assert queue_of(ds01) == []


def test_waiting_on_writes_nothing_and_is_said_once(ds01: Allocations, host: Host) -> None:
    fill(ds01)
    waiting = [change("allocated", "carol", ticket=ticket())]
    ds01.apply(waiting)
    before = host.tree()
    ds01.apply(waiting)
    assert host.tree() == before
    events = [json.loads(line)["event"] for line in host.events.read_text(encoding="utf-8").splitlines()]
    assert events.count("gpu.queued") == 1


def test_waiting_ends_with_a_grant_when_somebody_releases(ds01: Allocations) -> None:
    fill(ds01)
    said: list[str] = []
    ds01.clock = ticking()
    releasing = threading.Timer(0.4, lambda: Allocations(ds01.paths).apply([change("released", "u1")]))
    releasing.start()
    (outcome,) = waiting.apply(ds01, [change("allocated", "carol", wait=timedelta(seconds=30))], said.append)
    releasing.join()
    assert outcome.reason == "granted"
    assert said[0].startswith("p._.carol waits at position 1, until")
    assert ds01.store.read().queue == ()


def test_waiting_ends_with_a_refusal_when_its_time_is_over(ds01: Allocations) -> None:
    fill(ds01)
    ds01.clock = ticking()
    (outcome,) = waiting.apply(ds01, [change("allocated", "carol", wait=timedelta(seconds=1))])
    assert (outcome.reason, "It waited since" in outcome.message) == ("no_gpu_available", True)
    assert ds01.store.read().queue == ()


def test_who_is_interrupted_waits_no_more(ds01: Allocations) -> None:
    fill(ds01)
    ds01.clock = ticking()

    def interrupt(_: str) -> None:
        assert queue_of(ds01) == ["carol"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting.apply(ds01, [change("allocated", "carol", wait=timedelta(seconds=9))], interrupt)
    assert ds01.store.read().queue == ()


# --- takeover, boots, and what DS01 does not manage


def test_a_hold_that_is_taken_over_leaves_ledger_and_cdi_at_once(ds01: Allocations, host: Host) -> None:
    fill(ds01)
    ds01.apply([change("held", "u1")])
    (outcome,) = ds01.apply([change("allocated", "boss", gpus=2, priority=90, may_raise=True)])
    assert [a.container for a in outcome.given_up] == ["p._.u1"]
    assert set(ledger_says(host)) == {"p._.u0", "p._.u2", "p._.boss"}
    assert projections(host) == ledger_says(host)
    events = [json.loads(line) for line in host.events.read_text(encoding="utf-8").splitlines()]
    reclaimed = next(e for e in events if e["event"] == "gpu.reclaimed")
    assert (reclaimed["user"], reclaimed["container"]) == ("u1", "p._.u1")


def test_a_device_with_a_foreign_process_is_not_granted_and_the_refusal_says_so(
    ds01: Allocations, driver: Driver
) -> None:
    driver.busy = {d.uuid: (1,) for d in INVENTORY.devices}
    (outcome,) = ds01.apply([change("allocated", "alice")])
    assert outcome.reason == "no_gpu_available"
    assert "0:0 is used by process 1 (" in outcome.message
    driver.busy = {"MIG-0-0": (1,)}
    (outcome,) = ds01.apply([change("allocated", "alice")])
    assert outcome.allocation is not None
    assert outcome.allocation.gpu_id == "0:1"


def test_after_a_reboot_everybody_is_projected_and_only_then(
    ds01: Allocations, host: Host, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds01.apply([change("allocated", "alice"), change("allocated", "bob"), change("active", "bob")])
    first = ds01.store.read().boot_id
    for file in host.cdi.glob("ds01-*.json"):
        file.unlink()  # /var/run is a tmpfs
    monkeypatch.setattr(processes, "boot_id", lambda: "the next boot")
    ds01.apply([change("held", "bob")])
    assert (projections(host), ds01.store.read().boot_id) == ({}, first)
    ds01.apply([change("allocated", "carol")])
    assert ds01.store.read().boot_id == "the next boot"
    assert projections(host) == ledger_says(host)
    assert set(projections(host)) == {"p._.alice", "p._.bob", "p._.carol"}


def test_a_device_that_something_else_uses_is_shown_so(ds01: Allocations, driver: Driver) -> None:
    driver.busy = {"MIG-0-0": (1,), "MIG-0-1": (1,)}
    ds01.apply([change("allocated", "alice", gpus=2)])
    first, second, third = overview.status(ds01)["devices"][:3]
    assert (first["status"], first["container"]) == ("occupied", None)
    assert first["occupied_by"].startswith("process 1 (")
    assert second["status"] == "occupied"
    assert (third["status"], third["occupied_by"]) == ("pending", None)


def test_that_a_waiter_is_gone_is_no_reason_to_write(ds01: Allocations, host: Host) -> None:
    fill(ds01)
    ds01.apply([change("allocated", "carol", ticket=ticket(process=DEAD))])
    before = host.ledger.read_bytes()
    ds01.apply([change("allocated", "u0", gpus=2), change("allocated", "dan")])
    assert host.ledger.read_bytes() == before
    ds01.apply([change("released", "u0")])
    assert ds01.store.read().queue == ()


# --- what changes between the look and the lock


class Docker:
    """Stands in for the engine: containers by name, and what happens when they are listed."""

    def __init__(self) -> None:
        self.status: dict[str, str] = {}
        self.at_listing: list[Callable[[], None]] = []

    def containers(self) -> tuple[Container, ...]:
        if self.at_listing:
            self.at_listing.pop(0)()
        return tuple(
            Container(f"id of {name}", name, status, "img", {"ds01.managed": "true", "ds01.user": name.split("._.")[1]})
            for name, status in self.status.items()
        )

    def listing(self) -> Listing:
        return Listing(self.containers(), ())

    def container(self, name: str) -> Container | None:
        return next((c for c in self.containers() if c.name == name), None)

    def identity(self) -> str:
        return "the engine"


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Docker:
    made = Docker()
    monkeypatch.delenv("DS01_ENGINE")
    monkeypatch.setattr(engine, "connect", lambda: made)
    return made


def held_by_alice(ds01: Allocations, docker: Docker) -> None:
    """Alice's stopped container holds the only device that fits."""
    docker.status["p._.alice"] = "exited"
    assert ds01.apply([change("allocated", "alice", profile="full")])[0].ok
    assert ds01.apply([change("active", "alice", container_id="id"), change("held", "alice", stopped_at=NOW)])[1].ok


TAKE = {"profile": "full", "priority": 90, "may_raise": True}


@pytest.mark.parametrize("how", ["taken over", "its hold ended", "released"])
def test_a_container_that_is_started_past_ds01_while_its_device_is_taken_keeps_it(
    how: str, ds01: Allocations, docker: Docker, host: Host, clock: list[datetime]
) -> None:
    host.limits(LIMITS.replace("max_gpus_per_container: 2,", "max_gpus_per_container: 2, allow_full_gpu: true,"))
    held_by_alice(ds01, docker)
    before = projections(host)

    def start() -> None:
        docker.status["p._.alice"] = "running"

    docker.at_listing = [lambda: None, start]
    asked = change("released", "alice") if how == "released" else change("allocated", "bob", **TAKE)
    clock[0] += timedelta(hours=1 if how == "its hold ended" else 0)
    (outcome,) = ds01.apply([asked])
    assert outcome.reason == ("container_running" if how == "released" else "no_gpu_available")
    assert projections(host) == before == ledger_says(host)


def test_a_ledger_that_vanishes_while_the_lock_is_waited_for_is_not_taken_for_an_empty_one(
    ds01: Allocations, docker: Docker, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds01.apply([change("allocated", "carol")])
    asked: list[str] = []
    monkeypatch.setattr(ds01, "rebuild", lambda: asked.append("rebuild"))
    docker.at_listing = [host.ledger.unlink]
    ds01.apply([change("allocated", "bob")])
    assert asked == ["rebuild"]


def test_what_was_seen_is_looked_at_again_when_the_ledger_changed_meanwhile(
    ds01: Allocations, docker: Docker, driver: Driver
) -> None:
    """Somebody else's request came first: what it did to containers is seen only by a second look."""
    other = Allocations(ds01.paths, "other", ds01.clock)
    other.apply([change("allocated", "carol")])

    def meanwhile() -> None:
        other.apply([change("allocated", "bob")])
        docker.status["p._.alice"] = docker.status["q._.alice"] = docker.status["r._.alice"] = "created"

    docker.at_listing = [meanwhile]
    (outcome,) = ds01.apply([change("allocated", "alice", "s")])
    assert outcome.reason == "container_limit", "three containers were made before the lock was had"


def test_a_waiter_of_an_earlier_boot_is_in_nobody_s_way(ds01: Allocations, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ds01)
    ds01.apply([change("allocated", "carol", ticket=ticket())])
    monkeypatch.setattr(processes, "boot_id", lambda: "the next boot")
    assert queue_of(ds01) == []
    assert [o.ok for o in ds01.apply([change("released", "u0"), change("allocated", "eve", gpus=2)])] == [True, True]


def test_a_device_that_is_not_there_any_more_is_not_projected_whatever_nvidia_s_spec_says(
    ds01: Allocations, host: Host, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds01.apply([change("allocated", "alice"), change("allocated", "bob")])
    for file in host.cdi.glob("ds01-*.json"):
        file.unlink()
    monkeypatch.setattr(processes, "boot_id", lambda: "the next boot")
    driver.now = replace(INVENTORY, devices=INVENTORY.devices[1:])
    ds01.apply([change("allocated", "carol")])
    assert set(projections(host)) == {"p._.bob", "p._.carol"}


def test_a_device_that_is_only_called_otherwise_stays_projected(ds01: Allocations, host: Host, driver: Driver) -> None:
    """The same UUID under another index: the record changes, and the CDI file already says what it should."""
    ds01.apply([change("allocated", "alice")])
    first, *others = INVENTORY.devices
    driver.now = replace(INVENTORY, devices=(replace(first, id="0:6"), *others))
    ds01.apply([change("allocated", "bob")])
    assert ds01.store.read().allocations["p._.alice"].gpu_id == "0:6"
    assert projections(host) == ledger_says(host)


def test_a_held_device_that_something_else_uses_is_not_started_on(ds01: Allocations, driver: Driver) -> None:
    ds01.apply([change("allocated", "alice"), change("held", "alice")])
    driver.busy = {"MIG-0-0": (1,)}
    (outcome,) = ds01.apply([change("allocated", "alice", startable=True)])
    assert outcome.allocation is not None
    assert (outcome.reason, outcome.allocation.gpu_id) == ("granted", "0:1")
    assert "is used by process 1" in outcome.message


def test_a_grant_that_ran_out_while_the_rest_of_the_batch_waited_is_no_grant(ds01: Allocations, host: Host) -> None:
    host.limits(LIMITS + "policies: {pending_timeout: 1s}\n")
    ds01.clock = ticking()
    changes = [change("allocated", f"u{n}", gpus=2, wait=timedelta(seconds=3)) for n in range(4)]
    outcomes = waiting.apply(ds01, changes)
    granted = {o.name.full: o.allocation.gpu_id for o in outcomes if o.ok and o.allocation}
    assert granted == {name: a.gpu_id for name, a in ds01.store.read().allocations.items()}
    assert [o.reason for o in outcomes].count("not_allocated") >= 1
