"""Layout changes on machines that something is wrong with: GPUs lost, no permission, no driver, no tools."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sim_tools
from ds01 import nvml
from ds01.errors import Ds01Error
from sim_server import Server, Start, needs_sim, start, steps  # noqa: F401 - start is a fixture
from support import Host

pytestmark = needs_sim

MIXED = "2g.20gb,1g.10gb,1g.10gb,3g.40gb"
ANEW = "2g.20gb,1g.10gb,1g.10gb,2g.20gb,1g.10gb+me"


@pytest.fixture
def server(start: Start) -> Server:  # noqa: F811
    """Two A100 of which the first is cut; alice has the 2g, bob holds a 1g, and the layout is saved."""
    made = start("2xA100-SXM4-80GB,L40S-48GB", g0=MIXED)
    for container, profile in (("p._.alice", "2g.20gb"), ("q._.bob", "1g.10gb")):
        assert made.allocate(container, profile).reason == "granted"
    made.report("active", "p._.alice")
    made.report("held", "q._.bob")
    made.apply(g0=MIXED)
    made.calls.clear()
    return made


_OPEN = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    _OPEN.close()


def opened(server: Server, gpu: int) -> None:
    _OPEN.enter_context(server.somebody_opens(gpu))


def sim(*changes: str) -> Callable[[Server], None]:
    return lambda server: server.simulate(*changes)


Fault = tuple[Callable[[Server], None], dict[str, str], str, tuple[str, ...]]

BEFORE: dict[str, Fault] = {
    "the GPU is lost": (sim("lost=0"), {"g0": ANEW}, "gpu_unhealthy", ("GPU 0 is lost",)),
    "another GPU is lost, so NVIDIA's spec cannot be written": (
        sim("lost=1"),
        {"g0": ANEW},
        "driver_unavailable",
        ("GPU 1 is lost, and meanwhile no other can be cut anew: NVIDIA's CDI spec", "nvidia-smi --gpu-reset"),
    ),
    "a GPU without MIG": (sim(), {"g2": "2g.20gb"}, "profile_not_available", ("GPU 2", "L40S", "has no MIG")),
    "MIG off where there is none": (sim(), {"g2": "", "g0": ANEW}, "profile_not_available", ("has no MIG",)),
    "the driver was upgraded": (
        sim("version-mismatch=on"),
        {"g0": ANEW},
        "driver_unavailable",
        ("version mismatch. The driver", "reboot"),
    ),
    "no driver is loaded": (sim("loaded=off"), {"g0": ANEW}, "driver_unavailable", ("Load the",)),
    "two with the media engines": (
        sim(),
        {"g1": "1g.10gb+me,1g.10gb+me"},
        "layout_impossible",
        ("one set of media engines",),
    ),
    "a program has the GPU open whose mode is to change": (
        lambda s: opened(s, 1),
        {"g1": "2g.20gb"},
        "layout_in_use",
        ("GPU 1 cannot become 2g.20gb", "the GPU itself is in use by process", "(sleep of root"),
    ),
    "somebody's device is in the way": (
        sim(),
        {"g0": "4g.40gb,3g.40gb"},
        "layout_in_use",
        ("2g.20gb at 0-1 is in use by p._.alice of alice", "1g.10gb at 2 is in use by q._.bob of bob until 2"),
    ),
    "a process outside DS01 is on it": (
        sim(f"process=0.0:{os.getpid()}"),
        {"g0": ANEW},
        "layout_in_use",
        ("3g.40gb at 4-7", f"process {os.getpid()} ("),
    ),
    "a process is on the whole GPU": (
        sim(f"process=1:{os.getpid()}"),
        {"g1": "2g.20gb"},
        "layout_in_use",
        ("the GPU itself", f"process {os.getpid()} ("),
    ),
    "nvidia-ctk is no program": (
        lambda s: (s.host.root / "bin" / "nvidia-ctk").write_bytes(b"\x7f\0"),
        {"g0": ANEW},
        "driver_unavailable",
        ("nvidia-ctk cannot be run", "playbooks/site.yml installs it"),
    ),
    "nvidia-ctk fails": (
        lambda s: broken(s, "nvidia-ctk"),
        {"g0": ANEW},
        "driver_unavailable",
        ("NVIDIA's CDI spec cannot be written", "it broke. Try:"),
    ),
}


def broken(server: Server, tool: str) -> None:
    (server.host.root / "bin" / tool).write_text("#!/bin/sh\necho it broke >&2; exit 1\n", encoding="utf-8")


def unwritable(folder: Path) -> None:
    """Not even for root."""
    subprocess.run(["/usr/bin/chattr", "+i", folder], check=False, capture_output=True)
    try:
        (folder / "probe").touch()
    except OSError:
        return
    (folder / "probe").unlink()
    pytest.skip("this file system knows no immutable directories")


def writable(folder: Path) -> None:
    subprocess.run(["/usr/bin/chattr", "-i", folder], check=False, capture_output=True)


@pytest.mark.parametrize(("fault", "wanted", "reason", "says"), BEFORE.values(), ids=BEFORE)
def test_what_is_wrong_beforehand_is_told_and_nothing_is_begun(
    fault: Callable[[Server], None], wanted: dict[str, str], reason: str, says: tuple[str, ...], server: Server
) -> None:
    cuts, written = server.cuts(), server.written()
    fault(server)
    refusal = server.refused(**wanted)
    assert refusal.reason == reason, refusal
    for words in says:
        assert words in str(refusal)
    assert server.calls.writes == []
    assert (server.cuts(), server.written()) == (cuts, written)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """A disk without room, with what was in the folder."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    if subprocess.run(
        ["/usr/bin/env", "mount", "-t", "tmpfs", "-o", "size=128k", "none", folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        yield
    finally:
        subprocess.run(["/usr/bin/env", "umount", folder], check=True, capture_output=True)


@pytest.mark.parametrize("where", ["state", "cdi"])
def test_a_full_disk_is_seen_beforehand(where: str, server: Server) -> None:
    cuts, ledger = server.cuts(), server.ledger()
    with full(getattr(server.host, where)):
        refusal = server.refused(g0=ANEW)
        assert refusal.hint.startswith("Free space on that file system."), refusal
        assert "No space left on device" in refusal.message
        assert (server.calls.writes, server.cuts(), server.ledger()) == ([], cuts, ledger)
        server.check_nothing_false()
    assert server.apply(g0=ANEW).changed
    server.check_all_done()


def mended(server: Server) -> None:
    shutil.rmtree(server.host.root / "bin")
    sim_tools.write(server.host.root / "bin", server.root)


MEANWHILE: dict[str, tuple[Callable[[Server], None], Callable[[Server], None], str]] = {
    "nvidia-smi": (lambda s: broken(s, "nvidia-smi"), mended, "driver_unavailable"),
    "nvidia-ctk": (lambda s: broken(s, "nvidia-ctk"), mended, "driver_unavailable"),
    "the CDI directory": (lambda s: unwritable(s.host.cdi), lambda s: writable(s.host.cdi), "permission_denied"),
}


@pytest.mark.parametrize(("breaks", "mend", "reason"), MEANWHILE.values(), ids=MEANWHILE)
def test_what_breaks_after_the_cut(
    breaks: Callable[[Server], None], mend: Callable[[Server], None], reason: str, server: Server
) -> None:
    """Device nodes or NVIDIA's spec cannot be made for the new devices: they are taken away again."""
    ledger, cuts, saved = server.ledger(), server.cuts(), server.saved.read_bytes()
    server.calls.before("nvmlDeviceCreateGpuInstanceWithPlacement", lambda: breaks(server))
    try:
        refusal = server.refused(g0=ANEW)
        assert refusal.reason == reason, refusal
        assert refusal.hint
        server.check_nothing_false()
        assert (server.cuts(), server.saved.read_bytes()) == (cuts, saved)
        assert server.projected() == server.ledger() == ledger
        given = server.allocate("r._.carol", "1g.10gb+me")
        assert (given.ok, server.ledger()) == (False, ledger)
    finally:
        mend(server)
    server.calls.clear()
    assert server.apply(g0=ANEW).changed
    assert server.ledger() == ledger
    server.check_all_done()
    assert not server.apply(g0=ANEW).changed


WHOLE = range(1, 11)  # the nine writes of the change below, and none


@pytest.mark.parametrize("number", WHOLE)
def test_a_gpu_is_lost_in_the_middle(number: int, server: Server) -> None:
    """Before each of the writes; nothing can be undone on it. When it is back the next run completes the change."""
    ledger = server.ledger()
    server.calls.before("write", lambda: server.simulate("lost=0"), number)
    if number == len(WHOLE):
        assert server.apply(g0=ANEW, g1="7g.80gb").changed
        assert len(server.calls.writes) == number - 1
        return
    refusal = server.refused(g0=ANEW, g1="7g.80gb")
    assert refusal.reason in ("gpu_unhealthy", "driver_unavailable")
    assert "GPU 0" in str(refusal)
    assert server.cut(1) == "off", "what can be undone is undone"
    server.calls.clear()
    server.simulate("found=0")
    server.check_nothing_false()
    assert server.projected() == server.ledger() == ledger
    server.apply(g0=ANEW, g1="7g.80gb")
    assert server.ledger() == ledger
    server.check_all_done()


def test_a_mode_that_cannot_be_switched_back_is_told(server: Server) -> None:
    """The driver returns that it is in use, and raises nothing."""

    def meanwhile() -> None:
        server.simulate("busy=1", "lost=0")  # monitoring opens the new MIG GPU, the other one falls off the bus

    server.calls.before("nvmlDeviceCreateGpuInstanceWithPlacement", meanwhile)
    refusal = server.refused(g0=ANEW, g1="3g.40gb")
    assert refusal.details["undone"] is False
    for part in ("Not undone: MIG mode of GPU 1 was switched (", "did not disable MIG on GPU 1: another client"):
        assert part in str(refusal)
    server.calls.clear()
    server.simulate("idle=1", "found=0")
    server.apply(g0=ANEW, g1="3g.40gb")
    server.check_all_done()


def test_a_change_that_is_not_in_the_log_is_told(server: Server) -> None:
    """As a grant's: what was done is done."""
    server.host.events.unlink()
    server.host.events.mkdir()
    told = [f"The event log {server.host.events} could not be written: Is a directory."]
    assert server.apply(g0=ANEW).result()["warnings"] == told
    assert server.apply(g0=ANEW).result()["warnings"] == [], "nothing was to be written"
    server.boot()
    restored = server.restore()
    assert (restored.result()["warnings"], restored.problems) == (told, ())
    server.check_all_done()


@pytest.mark.parametrize("refused_from", ["the first look", "the first change"])
def test_only_root_may(refused_from: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's process, on a driver that asks who one is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # the test's own directory is root's alone
        shutil.copytree(server.host.root, name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("machine", "bin"))
        for key, value in os.environ.items():
            monkeypatch.setenv(key, value.replace(str(server.host.root), name))
        host = Host(*(Path(str(part).replace(str(server.host.root), name)) for part in vars(server.host).values()))
        theirs = Server(host, server.calls)
        sim_tools.write(host.root / "bin", theirs.root)
        theirs.make_nodes()
        for path in (host.root, *host.root.rglob("*")):
            os.chown(path, 65534, 65534)
        if refused_from == "the first look":
            theirs.simulate("permit=root")
        else:
            server.calls.before("write", lambda: theirs.simulate("permit=root"))
        before = theirs.written()
        said = as_nobody(lambda: theirs.apply(g0=ANEW))
        assert said == ("permission_denied" if refused_from == "the first change" else "driver_unavailable", True)
        assert (theirs.written(), theirs.cuts()) == (before, server.cuts())


def as_nobody(action: Callable[[], object]) -> tuple[str, bool]:
    """Do it in a child that is not root: the refusal's reason, and whether it says that root may."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
        except Ds01Error as exc:
            os.write(write, pickle.dumps((exc.reason, "Run as root" in str(exc))))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(answer) if answer else ("", False)  # noqa: S301 - our own child's


def test_a_pending_mode_of_an_earlier_attempt_is_told_and_mended(server: Server) -> None:
    """Somebody asked for MIG while the GPU was in use; the wish waits in it for a reset."""
    server.simulate("busy=1")
    with nvml.session():
        set_mode, handle = (server.calls.originals[n] for n in ("nvmlDeviceSetMigMode", "nvmlDeviceGetHandleByIndex"))
        assert set_mode(handle(1), 1) == 19
    assert server.foresee(g1="full").changed, "MIG off: the wish is to be taken back"
    server.simulate("idle=1")
    assert steps(server.apply(g1="2g.20gb"))[0] == "1 enable"
    server.check_all_done()
