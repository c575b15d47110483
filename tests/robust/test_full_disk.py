"""Nothing can be written: a refusal that says so, nothing half done, and with room again the same call succeeds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ds01.errors import Ds01Error
from ds01.events import EventLog
from ds01.ledger import LedgerStore
from ds01.transitions import Outcome
from installation import Installation, made_for
from support import Host
from syscalls import in_child
from test_allocations import change, ledger_says, projections
from test_cli_sim import SIM
from test_crash import LIMITS, STORIES, Story, nothing_false

PAGE = 4096
SIZE = 32 * PAGE


def _can_mount() -> bool:
    """Whether a file system can be mounted here: for root, and not in every container."""
    if os.geteuid() != 0:
        return False
    attempt = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(attempt, check=False, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.robust,
    pytest.mark.sim,
    pytest.mark.skipif(not (SIM / "libnvidia-ml.so.1").exists(), reason="the simulated driver is not built: make sim"),
    pytest.mark.skipif(not _can_mount(), reason="no file system can be mounted here: needs root"),
]


@dataclass(frozen=True)
class Disk:
    """A file system so small that it is soon full."""

    path: Path

    def leave(self, pages: int) -> None:
        """Fill it up to so many pages."""
        self.free()
        free = os.statvfs(self.path)
        with (self.path / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            filler.write(bytes((free.f_bavail - pages) * free.f_bsize))

    def free(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    path = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", path], check=True, timeout=20)
    yield Disk(path)
    subprocess.run(["umount", path], check=True, timeout=20)


@pytest.fixture
def host(request: pytest.FixtureRequest, host: Host, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host of which these directories lie on the small disk."""
    moved = replace(host, **{name: disk.path / name for name in request.param})
    for name, value in moved.env.items():
        monkeypatch.setenv(name, value)
    return moved


def told(act: Callable[[], Sequence[Outcome]]) -> Callable[[], list[str]]:
    """The reasons of the outcomes, or that of the batch's refusal."""

    def call() -> list[str]:
        try:
            return [outcome.reason for outcome in act()]
        except Ds01Error as exc:
            return [exc.reason]

    return call


def wherever() -> pytest.MarkDecorator:
    """Each story, with its files on the small disk in turn."""
    cases = [
        pytest.param(places, story, id=f"{' and '.join(places)}-{name}")
        for places in (("state",), ("cdi",), ("state", "cdi"))
        for name, story in STORIES.items()
    ]
    return pytest.mark.parametrize(("host", "story"), cases, indirect=["host"])


def refusals(story: Story, here: Installation, disk: Disk, folder: Path) -> Iterator[Callable[[], list[str]]]:
    """Tell the story with no room left, one page, two, until there is enough. After each refusal: how to ask again."""
    here.host.limits(LIMITS)
    for batch in story.before:
        assert all(outcome.ok for outcome in in_child(here.applying(batch)))
    here.copy_to(folder)
    act = told(here.applying(story.killed, story.later))
    for pages in range(8):
        disk.free()
        here.put_back(folder)
        disk.leave(pages)
        answer = in_child(act)
        if answer not in (["ledger_unavailable"], ["permission_denied"]):
            break
        yield act
    assert len(answer) == len(story.killed), answer


@wherever()
def test_a_refusal_lies_nowhere_and_asking_again_with_room_succeeds(
    story: Story, here: Installation, disk: Disk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for ask_again in refusals(story, here, disk, tmp_path_factory.mktemp("start")):
        nothing_false(here.host)
        disk.free()
        assert len(in_child(ask_again)) == len(story.killed)
        assert projections(here.host) == ledger_says(here.host)
        assert not [name for name in here.files() if name.endswith((".new", ".link"))]


@wherever()
def test_a_refusal_changes_nothing(
    story: Story, here: Installation, disk: Disk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("start")
    for _ in refusals(story, here, disk, folder):
        written, projected = here.allocations(), projections(here.host)
        disk.free()
        here.put_back(folder)
        assert (written, projected) == (here.allocations(), projections(here.host))


@pytest.mark.parametrize("host", [("state",)], indirect=True)
def test_the_command_says_what_to_do(here: Installation, disk: Disk) -> None:
    here.host.limits(LIMITS)
    disk.leave(0)
    for verb in ("allocate", "release", "mark-stopped", "rebuild"):
        whom = [] if verb == "rebuild" else ["--user=alice", "--container=p"]
        result = here.server.ds01(verb, *whom)
        expected = {"allocate": "ledger_unavailable", "mark-stopped": "not_allocated", "rebuild": "engine_unavailable"}
        assert expected.get(verb, "") in result.err
        assert (result.code == 0) == (verb == "release"), "there is nothing to release"
    assert "Free space" in here.server.ds01("allocate", "--user=alice", "--container=p").err
    disk.free()
    assert here.server.ds01("allocate", "--user=alice", "--container=p").code == 0


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        pytest.param(("state",), "ledger_unavailable", id="state"),
        pytest.param(("cdi",), "permission_denied", id="cdi"),
    ],
    indirect=["host"],
)
def test_a_rebuild(reason: str, here: Installation, disk: Disk, engine_with: Callable[..., None]) -> None:
    here.host.limits(LIMITS)
    in_child(here.applying([change("allocated", "alice"), change("allocated", "bob")]))
    had = ledger_says(here.host)
    engine_with(made_for(here.allocations()))
    here.host.ledger.write_bytes(b"{")
    for container in had:
        (here.host.cdi / f"ds01-{container}.json").unlink()
    disk.leave(0)
    act = told(here.applying([change("active", "alice")]))
    assert in_child(act) == [reason]
    assert LedgerStore(here.host.ledger).lost() or ledger_says(here.host) == had
    disk.free()
    assert in_child(act) == ["active"]
    assert projections(here.host) == ledger_says(here.host) == had


@pytest.mark.parametrize("host", [("log",)], indirect=True)
@pytest.mark.parametrize("room", [0, 1, 100], ids="{} bytes left".format)
def test_the_log(room: int, here: Installation, disk: Disk) -> None:
    here.host.limits(LIMITS)
    here.host.log.mkdir()
    first = json.dumps({"timestamp": "2025-11-21T10:30:00Z", "event": "gpu.held", "message": ""})
    here.host.events.write_text(
        first.replace('""', f'"{"x" * (PAGE - room - len(first) - 1)}"') + "\n", encoding="utf-8"
    )
    disk.leave(0)
    (outcome,) = in_child(here.applying([change("allocated", "alice")]))
    assert outcome.ok
    assert [w for w in outcome.warnings if "event log" in w and "No space left" in w]
    assert set(ledger_says(here.host)) == {"p._.alice"}
    disk.free()
    (outcome,) = in_child(here.applying([change("released", "alice")]))
    assert outcome.warnings == ()
    told = [event["event"] for event in EventLog(here.host.events, "").read(9, bool)]
    assert told == ["gpu.held", "gpu.released"], "the line that was cut took the next one with it"
