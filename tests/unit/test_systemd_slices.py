"""Slices read from cgroup files, and systemctl called for them. With a real systemd: molecule/allocation."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pytest
from ds01 import services, systemd_slices
from ds01.errors import Ds01Error
from ds01.slice_drift import LiveSlice

GROUP = "ds01.slice/ds01-lab.slice"
ALICE = rf"{GROUP}/ds01-lab-mary\x2dann.slice"
ID = "ab" * 32
SCOPE = f"{ALICE}/docker-{ID}.scope"
V2 = {
    "cgroup.controllers": "cpu memory pids",
    f"{GROUP}/cgroup.events": "populated 1\nfrozen 0",
    f"{ALICE}/cpu.max": "4800000 100000",
    f"{ALICE}/memory.max": "206158430208",
    f"{ALICE}/memory.high": "max",
    f"{ALICE}/memory.stat": "anon 1000\nfile 99999\nshmem 24",
    f"{ALICE}/pids.max": "12288",
    f"{ALICE}/cgroup.events": "populated 1\nfrozen 0",
    f"{SCOPE}/cpu.max": "1600000 100000",
}
V1 = {
    f"systemd/{GROUP}/cgroup.procs": "",
    f"systemd/{ALICE}/cgroup.procs": "",
    f"systemd/{SCOPE}/cgroup.procs": "4711",
    f"cpu/{ALICE}/cpu.cfs_quota_us": "4800000",
    f"cpu/{ALICE}/cpu.cfs_period_us": "100000",
    f"cpu/{SCOPE}/cpu.cfs_quota_us": "1600000",
    f"cpu/{SCOPE}/cpu.cfs_period_us": "100000",
    f"memory/{ALICE}/memory.limit_in_bytes": "206158430208",
    f"memory/{ALICE}/memory.stat": "rss 0\ntotal_rss 1000\ntotal_cache 99999\ntotal_shmem 24",
    f"pids/{ALICE}/pids.max": "12288",
}


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n", encoding="ascii")
    return root


def program(directory: Path, text: str) -> Path:
    """A systemctl that writes down how it was called; what it was asked is in the file that is returned."""
    path, calls = directory / "systemctl", directory / "calls"
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {calls}\n{text}\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return calls


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(systemd_slices, "CGROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def live(root: Path) -> list[LiveSlice]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systemd_slices, "CGROUPS", root)
        return systemd_slices.live()


def test_cgroup_v2(tmp_path: Path) -> None:
    group, user = live(tree(tmp_path, V2))
    assert (group.name, group.empty, group.containers) == ("ds01-lab.slice", False, ())
    assert user.name == r"ds01-lab-mary\x2dann.slice"
    assert user.limits == {
        "CPUQuota": Fraction(48),
        "MemoryMax": 206158430208,
        "MemoryHigh": None,
        "TasksMax": 12288,
    }
    assert (user.empty, user.containers, user.floor) == (False, (ID,), {"MemoryMax": 1024})


def test_cgroup_v1(tmp_path: Path) -> None:
    """No MemoryHigh there, and the kernel takes no quota below that of a container."""
    group, user = live(tree(tmp_path, V1))
    assert (group.name, group.empty) == ("ds01-lab.slice", False)
    assert user.limits == {"CPUQuota": Fraction(48), "MemoryMax": 206158430208, "TasksMax": 12288}
    assert (user.empty, user.containers) == (False, (ID,))
    assert user.floor == {"MemoryMax": 1024, "CPUQuota": Fraction(16)}


UNLIMITED = {
    "v2": {f"{ALICE}/cpu.max": "max 100000", f"{ALICE}/memory.max": "max", f"{ALICE}/pids.max": "max"},
    "v1": {
        f"cpu/{ALICE}/cpu.cfs_quota_us": "-1",
        f"memory/{ALICE}/memory.limit_in_bytes": "9223372036854771712",
        f"pids/{ALICE}/pids.max": "max",
    },
}


@pytest.mark.parametrize("version", UNLIMITED)
def test_unlimited(version: str, tmp_path: Path) -> None:
    _, user = live(tree(tmp_path, {**{"v1": V1, "v2": V2}[version], **UNLIMITED[version]}))
    assert set(user.limits.values()) == {None}


def test_empty(tmp_path: Path) -> None:
    v1 = tree(tmp_path / "1", {**V1, f"systemd/{SCOPE}/cgroup.procs": ""})
    v2 = tree(tmp_path / "2", {**V2, f"{ALICE}/cgroup.events": "populated 0\nfrozen 0"})
    assert live(v1)[1].empty
    assert live(v2)[1].empty


def test_a_controller_that_limits_nothing_and_one_that_is_not_there(tmp_path: Path) -> None:
    """systemd makes no file for a limit that nobody set; a v1 kernel may lack a whole controller."""
    bare = {key: text for key, text in V2.items() if not key.endswith(("pids.max", "cpu.max"))}
    assert live(tree(tmp_path / "2", bare))[1].limits["TasksMax"] is None
    bare = {key: text for key, text in V1.items() if not key.startswith("pids/")}
    assert "TasksMax" not in live(tree(tmp_path / "1", bare))[1].limits


def test_a_host_without_slices(tmp_path: Path) -> None:
    assert live(tmp_path) == []


def test_what_lies_deeper_is_not_a_slice_of_its_own(tmp_path: Path) -> None:
    tree(tmp_path, {**V2, f"{ALICE}/ds01-lab-mary-ann.slice/cgroup.events": "populated 0"})
    assert len(live(tmp_path)) == 2


def test_a_change_is_for_this_boot_and_in_one_call(path: Path) -> None:
    calls = program(path, "")
    systemd_slices.change(r"ds01-lab-mary\x2dann.slice", {"CPUQuota": "", "TasksMax": "5"})
    assert calls.read_text(encoding="utf-8") == (
        "set-property --no-ask-password --runtime -- ds01-lab-mary\\x2dann.slice CPUQuota= TasksMax=5\n"
    )


def test_a_refused_change_says_what_systemd_said(path: Path) -> None:
    program(path, "echo 'Failed to set unit properties: Access denied' >&2; exit 1")
    with pytest.raises(Ds01Error, match="could not be given TasksMax=5: Failed to set unit properties: Access denied"):
        systemd_slices.change("ds01-lab-alice.slice", {"TasksMax": "5"})


def test_a_removal_stops_the_slice_alone(path: Path, cgroups: Path) -> None:
    root = tree(cgroups, {**V2, f"{ALICE}/cgroup.events": "populated 0"})
    calls = program(path, f"rm -r {root / GROUP}")
    assert systemd_slices.remove(r"ds01-lab-mary\x2dann.slice")
    assert calls.read_text(encoding="utf-8") == (
        "stop --no-ask-password --job-mode=ignore-dependencies -- ds01-lab-mary\\x2dann.slice\n"
    )


def test_a_cgroup_that_systemd_has_no_slice_for_is_removed_too(path: Path, cgroups: Path) -> None:
    root = tree(cgroups, {**V2, f"{ALICE}/cgroup.events": "populated 0"})
    calls = program(path, f"case $(wc -l < {path}/calls) in 3) rm -r {root / GROUP};; esac")
    assert systemd_slices.remove(r"ds01-lab-mary\x2dann.slice")
    assert [line.split()[0] for line in calls.read_text(encoding="utf-8").splitlines()] == ["stop", "start", "stop"]


def test_a_removal_gives_way_to_who_came_in_meanwhile(path: Path, cgroups: Path) -> None:
    calls = program(path, "")
    tree(cgroups, V2)
    assert not systemd_slices.remove(r"ds01-lab-mary\x2dann.slice")
    assert calls.read_text(encoding="utf-8").splitlines()[1:] == [
        "start --no-ask-password -- ds01-lab-mary\\x2dann.slice"
    ]


def test_a_limit_comes_into_force_or_does_not(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd_slices, "_SETTLE", 0.1)
    tree(cgroups, V2)
    name = r"ds01-lab-mary\x2dann.slice"
    assert systemd_slices.in_force(name, lambda found: found.limits["TasksMax"] == 12288)
    assert not systemd_slices.in_force(name, lambda found: found.limits["TasksMax"] == 5)
    assert systemd_slices.in_force("ds01-lab-gone.slice", lambda _: False)


def test_the_device_rules_of_scopes(path: Path) -> None:
    """As systemd 257 prints them: a block a unit, DeviceAllow once a rule, or not at all."""
    program(
        path,
        "printf 'DeviceAllow=/dev/char/195:1 rwm\\nDeviceAllow=char-* m\\nId=a.scope\\nLoadState=loaded\\n\\n"
        "Id=b.scope\\nLoadState=loaded\\n\\nId=c.scope\\nLoadState=not-found\\n'",
    )
    assert services.device_rules(["a.scope", "b.scope", "c.scope"]) == {
        "a.scope": ("/dev/char/195:1 rwm", "char-* m"),
        "b.scope": (),
    }
    assert services.device_rules([]) == {}
