"""The projected device: copied by UUID out of NVIDIA's spec, nothing invented."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ds01.cdi import Cdi
from ds01.errors import Ds01Error

CONTAINER = "p._.alice"


def node(path: str) -> dict[str, str]:
    return {"path": path}


def edits(*paths: str, **more: Any) -> dict[str, Any]:
    return {"deviceNodes": [node(path) for path in paths], **more}


# Two slices of GPU 0 and one of GPU 1, as `nvidia-ctk cdi generate --device-name-strategy=uuid` writes them.
SPEC: dict[str, Any] = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {
            "name": "MIG-a",
            "containerEdits": edits("/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap22"),
        },
        {
            "name": "MIG-b",
            "containerEdits": edits("/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31"),
        },
        {"name": "GPU-1", "containerEdits": edits("/dev/nvidia1", "/dev/dri/card1", env=["A=1"])},
        {"name": "all", "containerEdits": edits("/dev/nvidia0", "/dev/nvidia1")},
        {"name": "bare"},
    ],
    "containerEdits": {
        "env": ["NVIDIA_VISIBLE_DEVICES=void"],
        "deviceNodes": [node("/dev/nvidiactl"), node("/dev/nvidia-uvm")],
        "mounts": [{"hostPath": "/lib/libcuda.so.550", "containerPath": "/lib/libcuda.so.550", "options": ["ro"]}],
        "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": ["update-ldcache"]}],
    },
}


@pytest.fixture
def cdi(tmp_path: Path) -> Cdi:
    return Cdi(tmp_path / "cdi", (tmp_path / "cdi", tmp_path / "etc"))


def project(cdi: Cdi, container: str, uuids: Sequence[str], spec: dict[str, Any] = SPEC) -> None:
    rewrite = cdi.rewrite()
    rewrite.project(container, uuids, spec)
    rewrite.finish()


def withdraw(cdi: Cdi, container: str) -> None:
    rewrite = cdi.rewrite()
    rewrite.withdraw(container)
    rewrite.finish()


def projected(cdi: Cdi, *uuids: str, spec: dict[str, Any] = SPEC) -> dict[str, Any]:
    project(cdi, CONTAINER, uuids, spec)
    return json.loads(cdi.path(CONTAINER).read_text(encoding="utf-8"))


def strings(value: Any) -> set[str]:
    """Every text in a JSON document."""
    if isinstance(value, dict):
        return set().union(*(strings(v) for v in value.values()))
    if isinstance(value, list):
        return set().union(set(), *(strings(v) for v in value))
    return {value} if isinstance(value, str) else set()


def test_the_file_as_documented(cdi: Cdi, tmp_path: Path) -> None:
    written = projected(cdi, "MIG-b")
    assert cdi.path(CONTAINER) == tmp_path / "cdi" / "ds01-p._.alice.json"
    assert written["kind"] == "ds01.io/gpu"
    (device,) = written["devices"]
    assert device["name"] == CONTAINER
    assert device["containerEdits"] == edits(
        "/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31"
    )
    assert written["containerEdits"] == SPEC["containerEdits"]


@pytest.mark.parametrize("uuids", [["MIG-a"], ["GPU-1"], ["MIG-a", "MIG-b"], ["MIG-b", "GPU-1"]], ids="+".join)
def test_nothing_is_invented_and_nobody_else_s_node_is_given(cdi: Cdi, uuids: list[str]) -> None:
    written = projected(cdi, *uuids)
    own = {"ds01.io/gpu", CONTAINER, ",".join(uuids), written["cdiVersion"]}
    mine = [d["containerEdits"] for d in SPEC["devices"] if d["name"] in uuids]
    assert strings(written) - own == strings([mine, SPEC["containerEdits"]])


def test_two_slices_of_a_gpu_share_its_node(cdi: Cdi) -> None:
    nodes = projected(cdi, "MIG-a", "MIG-b")["devices"][0]["containerEdits"]["deviceNodes"]
    assert nodes == edits("/dev/nvidia0", *(f"/dev/nvidia-caps/nvidia-cap{n}" for n in (21, 22, 30, 31)))["deviceNodes"]


def test_devices_with_different_edits_keep_them_all(cdi: Cdi) -> None:
    assert projected(cdi, "MIG-a", "GPU-1")["devices"][0]["containerEdits"] == edits(
        "/dev/nvidia0",
        "/dev/nvidia-caps/nvidia-cap21",
        "/dev/nvidia-caps/nvidia-cap22",
        "/dev/nvidia1",
        "/dev/dri/card1",
        env=["A=1"],
    )


def test_nvidia_s_spec_is_not_changed_by_copying(cdi: Cdi) -> None:
    before = json.dumps(SPEC)
    project(cdi, CONTAINER, ["MIG-a", "MIG-b", "GPU-1"])
    assert json.dumps(SPEC) == before


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("0.3.0", "0.6.0"), ("0.5.0", "0.6.0"), ("0.6.0", "0.6.0"), ("0.10.0", "0.10.0"), ("1.0.0", "1.0.0")],
)
def test_version_is_high_enough_for_annotations(theirs: str, ours: str, cdi: Cdi) -> None:
    assert projected(cdi, "MIG-a", spec={**SPEC, "cdiVersion": theirs})["cdiVersion"] == ours


def test_projecting_again_leaves_the_file_alone(cdi: Cdi) -> None:
    projected(cdi, "MIG-a")
    inode = cdi.path(CONTAINER).stat().st_ino
    project(cdi, CONTAINER, ["MIG-a"])
    assert cdi.path(CONTAINER).stat().st_ino == inode


def test_another_device_replaces_the_file_as_a_whole(cdi: Cdi) -> None:
    projected(cdi, "MIG-a")
    with cdi.path(CONTAINER).open("rb") as reader:
        projected(cdi, "MIG-b")
        assert b"cap21" in reader.read()
    assert cdi.projected(CONTAINER) == ("MIG-b",)
    assert [p.name for p in cdi.path(CONTAINER).parent.iterdir()] == ["ds01-p._.alice.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_modes_do_not_depend_on_the_umask(mask: int, cdi: Cdi, umask: Callable[[int], int]) -> None:
    umask(mask)
    projected(cdi, "MIG-a")
    assert oct(stat.S_IMODE(cdi.path(CONTAINER).stat().st_mode)) == "0o644"
    assert oct(stat.S_IMODE(cdi.path(CONTAINER).parent.stat().st_mode)) == "0o755"


def test_a_planted_link_is_not_followed(cdi: Cdi, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi" / ".ds01-p._.alice.json.new").symlink_to(victim)
    with pytest.raises(OSError):
        project(cdi, CONTAINER, ["MIG-a"])
    assert victim.read_bytes() == b"untouched"
    assert not cdi.path(CONTAINER).exists()
    cdi.clear()
    project(cdi, CONTAINER, ["MIG-a"])
    assert victim.read_bytes() == b"untouched"


def test_withdraw(cdi: Cdi) -> None:
    withdraw(cdi, CONTAINER)
    projected(cdi, "MIG-a")
    withdraw(cdi, CONTAINER)
    assert list(cdi.directory.iterdir()) == []


def test_what_is_prepared_is_not_there_yet_and_what_is_withdrawn_comes_back(cdi: Cdi) -> None:
    projected(cdi, "MIG-a")
    inode = cdi.path(CONTAINER).stat().st_ino
    rewrite = cdi.rewrite()
    rewrite.project(CONTAINER, ["MIG-b"], SPEC)
    rewrite.project("q._.alice", ["MIG-a"], SPEC)
    assert cdi.projected(CONTAINER) == ("MIG-a",)
    rewrite.withdraw(CONTAINER)
    assert cdi.containers() == []
    rewrite.undo()
    assert (cdi.containers(), cdi.projected(CONTAINER)) == ([CONTAINER], ("MIG-a",))
    assert cdi.path(CONTAINER).stat().st_ino == inode
    assert len(list(cdi.directory.iterdir())) == 1


def test_withdraw_takes_only_this_container_s_device(cdi: Cdi) -> None:
    for container in ("p._.alice", "p._.alice2", "pp._.alice"):
        project(cdi, container, ["MIG-a"])
    withdraw(cdi, "p._.alice")
    assert [cdi.projected(c) for c in ("p._.alice", "p._.alice2", "pp._.alice")] == [None, ("MIG-a",), ("MIG-a",)]


def test_projected_tells_what_the_next_start_would_get(cdi: Cdi) -> None:
    assert cdi.projected(CONTAINER) is None
    projected(cdi, "MIG-a", "GPU-1")
    assert cdi.projected(CONTAINER) == ("MIG-a", "GPU-1")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"annotations": null}', b"\xff"], ids=repr)
def test_a_broken_projection_is_none(content: bytes, cdi: Cdi) -> None:
    cdi.path(CONTAINER).parent.mkdir()
    cdi.path(CONTAINER).write_bytes(content)
    assert cdi.projected(CONTAINER) is None


@pytest.mark.parametrize(
    ("uuids", "missing"),
    [
        ([], None),
        (["MIG-a"], None),
        (["MIG-a", "GPU-1"], None),
        (["MIG-gone"], "MIG-gone"),
        (["MIG-a", "MIG-gone", "GPU-9"], "MIG-gone, GPU-9"),
        (["MIG"], "MIG"),
    ],
)
def test_a_missing_uuid_is_a_problem(uuids: list[str], missing: str | None, cdi: Cdi) -> None:
    problem = cdi.problem(uuids, SPEC)
    assert problem == (f"NVIDIA's CDI spec does not hold {missing}." if missing else None)


@pytest.mark.parametrize("spec", [{}, {"devices": None}, {"devices": []}], ids=repr)
def test_a_spec_without_devices_holds_nothing(spec: dict[str, Any], cdi: Cdi) -> None:
    assert cdi.problem(["MIG-a"], spec) == "NVIDIA's CDI spec does not hold MIG-a."


def test_no_spec_names_the_places_that_were_searched(cdi: Cdi, tmp_path: Path) -> None:
    assert cdi.nvidia_spec() is None
    assert cdi.problem(["MIG-a"], None) == (
        f"NVIDIA's CDI spec was not found in {tmp_path / 'cdi'} or {tmp_path / 'etc'}."
    )


def test_a_mig_device_without_the_nodes_of_its_instances_cannot_be_used(cdi: Cdi) -> None:
    """That is what a spec looks like that was made before the nodes were: no error, only the GPU's own node."""
    for lacking in ([], ["/dev/nvidia0"], ["/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap21"]):
        spec = {**SPEC, "devices": [{"name": "MIG-a", "containerEdits": edits(*lacking)}]}
        assert cdi.problem(["MIG-a"], spec) == "NVIDIA's CDI spec lacks the device nodes of MIG-a."


_YAML = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: MIG-a\n  containerEdits: {}\n"


@pytest.mark.parametrize("place", ["cdi", "etc"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nvidia.yaml", _YAML),
        ("nvidia.yml", _YAML),
        ("nvidia.json", json.dumps(SPEC)),
        ("nvidia-gpu.json", json.dumps(SPEC)),
    ],
    ids=["yaml", "yml", "json", "other name"],
)
def test_nvidia_s_spec_is_found(place: str, name: str, text: str, cdi: Cdi, tmp_path: Path) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / name).write_text(text, encoding="utf-8")
    spec = cdi.nvidia_spec()
    assert spec is not None
    assert spec["devices"][0]["name"] == "MIG-a"


def test_a_spec_of_another_kind_and_our_own_are_passed_over(cdi: Cdi, tmp_path: Path) -> None:
    project(cdi, CONTAINER, ["MIG-a"])
    (tmp_path / "cdi" / "nvidia-imex.json").write_text('{"kind": "nvidia.com/imex-channel"}', encoding="utf-8")
    (tmp_path / "cdi" / "nvidia-list.json").write_text("[]", encoding="utf-8")
    assert cdi.nvidia_spec() is None


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("nvidia.json", b"{"),
        ("nvidia.yaml", b"a: ["),
        ("nvidia.yaml", b"\xff\xfe\x00"),
        ("nvidia.yaml", b"!!python/object/apply:os.system [id]"),
    ],
    ids=["cut JSON", "cut YAML", "not text", "Python object"],
)
def test_an_unreadable_spec_is_refused_with_the_command_that_writes_it(
    name: str, data: bytes, cdi: Cdi, tmp_path: Path
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / name).write_bytes(data)
    with pytest.raises(Ds01Error) as caught:
        cdi.nvidia_spec()
    assert (caught.value.reason, caught.value.exit_code) == ("driver_unavailable", 3)
    assert "nvidia-ctk cdi generate" in caught.value.hint
