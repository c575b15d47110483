"""MIG layouts in mig-parted's format: the forms it documents, what is wrong in a file, and back again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ds01 import config, layouts
from ds01.errors import Ds01Error
from ds01.mig import Cut, GpuState
from mig_support import A100, TABLES, cut, gpu
from support import ROOT

A100_ID, A30_ID = 0x20B210DE, 0x20B710DE


def a100(index: int, text: str = "") -> GpuState:
    return replace(gpu(text, A100, index), model_id=A100_ID)


def a30(index: int, text: str = "") -> GpuState:
    return replace(gpu(text, TABLES["A30-24GB"], index), name="NVIDIA A30", model_id=A30_ID)


def no_mig(index: int) -> GpuState:
    return GpuState(index, f"GPU-{index}", "NVIDIA L40S", False, capable=False, model_id=0x26B910DE)


HOST = (a100(0), a100(1), a30(2), no_mig(3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mig-layouts.yaml"


def layout(file: Path, entries: str) -> layouts.Layouts:
    """A file with one layout, x; each line of `entries` is an entry in YAML's flow form."""
    listed = "".join(f"    - {{{line.strip()}}}\n" for line in entries.strip().splitlines())
    file.write_text(f"version: v1\nmig-configs:\n  x:\n{listed}", encoding="utf-8")
    return config.load_layouts(file)


def chosen(file: Path, entries: str, gpus: tuple[GpuState, ...] = HOST) -> dict[int, str]:
    return {index: str(found) for index, found in layouts.select(layout(file, entries), "x", gpus).items()}


FORMS = {
    "all off": ("devices: all, mig-enabled: false", dict.fromkeys(range(4), "a whole GPU")),
    "off, with its empty devices": (
        "devices: [0], mig-enabled: false, mig-devices: {}",
        {0: "a whole GPU"},
    ),
    "all on: those that have MIG": (
        "devices: all, mig-enabled: true, mig-devices: {}",
        dict.fromkeys(range(3), "no instances"),
    ),
    "by index": (
        'devices: [0, 1], mig-enabled: true, mig-devices: {"1g.10gb": 7}',
        {0: "7 x 1g.10gb", 1: "7 x 1g.10gb"},
    ),
    "indices of another host, for its models": (
        """devices: [1], mig-enabled: true, mig-devices: {2g.20gb: 3}
           device-filter: "0x233010DE", devices: [0, 7], mig-enabled: true, mig-devices: {1g.10gb: 7}""",
        {1: "3 x 2g.20gb"},
    ),
    "compute instances' profiles, none of one or for another host": (
        """devices: [1], mig-enabled: true, mig-devices: {2g.20gb: 3, 1c.2g.20gb: 0}
           device-filter: "0x233010DE", devices: all, mig-enabled: true, mig-devices: {1c.2g.20gb: 7}""",
        {1: "3 x 2g.20gb"},
    ),
    "by a filter": (
        'device-filter: "0x20B210DE", devices: all, mig-enabled: true, mig-devices: {3g.40gb: 2}',
        {0: "2 x 3g.40gb", 1: "2 x 3g.40gb"},
    ),
    "a filter without quotes, in small letters": (
        "device-filter: 0x20b710de, devices: all, mig-enabled: true, mig-devices: {4g.24gb: 1}",
        {2: "4g.24gb"},
    ),
    "by filters, one of them of no GPU here": (
        'device-filter: ["0x20B710DE", "0x233010DE"], devices: all, mig-enabled: true, mig-devices: {1g.6gb: 4}',
        {2: "4 x 1g.6gb"},
    ),
    "by filter and index": (
        'device-filter: "0x20B210DE", devices: [1, 2], mig-enabled: true, mig-devices: {7g.80gb: 1}',
        {1: "7g.80gb"},
    ),
    "several entries, one of them for nobody": (
        """devices: [0], mig-enabled: false
           device-filter: ["0x233010DE"], devices: all, mig-enabled: true, mig-devices: {1g.10gb: 7}
           devices: [1], mig-enabled: true, mig-devices: {1g.10gb: 2, 2g.20gb: 1, 3g.40gb: 1}""",
        {0: "a whole GPU", 1: "2 x 1g.10gb, 2g.20gb, 3g.40gb"},
    ),
    "names with attributes, and none of one": (
        "devices: [0], mig-enabled: true, mig-devices: {1g.10gb+me: 1, 1g.24gb-me: 1, 1g.24gb+me.all: 1, 2g.20gb: 0}",
        {0: "1g.10gb+me, 1g.24gb-me, 1g.24gb+me.all"},
    ),
}


@pytest.mark.parametrize(("entries", "expected"), FORMS.values(), ids=FORMS)
def test_the_forms_of_mig_parted(entries: str, expected: dict[int, str], file: Path) -> None:
    assert chosen(file, entries) == expected


def test_its_block_form_and_its_comments(file: Path) -> None:
    file.write_text(
        """version: v1
mig-configs:
  # everything
  all-mixed:
    - devices: all
      mig-enabled: true
      mig-devices:
        "1g.10gb": 2
        2g.20gb: 1

  off:
  - device-filter: "0x20B210DE"
    devices:
    - 0
    - 1
    mig-enabled: false
    mig-devices: {}
"""
    )
    found = config.load_layouts(file)
    assert list(found) == ["all-mixed", "off"]
    assert layouts.select(found, "all-mixed", HOST[:1]) == {0: Cut(True, ("1g.10gb", "1g.10gb", "2g.20gb"))}
    assert layouts.select(found, "off", HOST) == {0: Cut(False), 1: Cut(False)}


ON = "mig-enabled: true, mig-devices: {1g.10gb: 1}"
WRONG = {
    "mig-enabled is missing": ("devices: all", "mig-configs.x.0: "),
    "a word that is not all": (
        f"devices: some, {ON}",
        "mig-configs.x.0.devices: 'some' is not allowed here; expected all",
    ),
    "a negative index": (f"devices: [-1], {ON}", "mig-configs.x.0.devices"),
    "an unknown key": (
        f"device: all, devices: all, {ON}",
        "mig-configs.x.0.device: unknown key; did you mean devices?",
    ),
    "yes is not true": ("devices: all, mig-enabled: 1, mig-devices: {}", "mig-configs.x.0.mig-enabled"),
    "no devices though on": ("devices: all, mig-enabled: true", "mig-configs.x.0: mig-devices is missing"),
    "null devices though on": ("devices: all, mig-enabled: true, mig-devices: null", "mig-devices is missing"),
    "devices though off": (
        "devices: all, mig-enabled: false, mig-devices: {1g.10gb: 1}",
        "mig-configs.x.0.mig-devices: there can be no MIG devices",
    ),
    "not a profile": (
        "devices: all, mig-enabled: true, mig-devices: {big: 1}",
        "mig-configs.x.0.mig-devices.big: this is not a MIG profile",
    ),
    "a compute instance's profile": (
        "devices: all, mig-enabled: true, mig-devices: {1c.2g.20gb: 2}",
        "mig-configs.x.0.mig-devices.1c.2g.20gb: DS01 makes one compute instance",
    ),
    "a GPU that this host does not have": (
        "devices: [1, 7], mig-enabled: true, mig-devices: {2g.20gb: 3}",
        "mig-configs.x.0.devices: there is no GPU 7 here; there are: 0, 1, 2, 3.",
    ),
    "the same with a filter": (
        'device-filter: "0x20B710DE", devices: [2, 5, 7], mig-enabled: true, mig-devices: {4g.24gb: 1}',
        "mig-configs.x.0.devices: there is no GPU 5, 7 here",
    ),
    "a negative number": (
        "devices: all, mig-enabled: true, mig-devices: {1g.10gb: -1}",
        "mig-configs.x.0.mig-devices.1g.10gb: -1 is not allowed here; expected how many",
    ),
    "a profile twice": ("devices: all, mig-enabled: true, mig-devices: {1g.10gb: 1, 1g.10gb: 2}", "given twice"),
    "a filter that is no id": (
        f"device-filter: A100, devices: all, {ON}",
        "mig-configs.x.0.device-filter: 'A100' is not",
    ),
    "two entries for one GPU": (
        f"devices: [0], {ON}\ndevices: all, {ON}",
        "mig-configs.x.1: GPU 0 (NVIDIA A100) is in mig-configs.x.0 already",
    ),
    "for no GPU of this host": (
        f"device-filter: 0x233010DE, devices: all, {ON}",
        "mig-configs.x: no entry is for a GPU of this host: 0 (NVIDIA A100, 0x20B210DE)",
    ),
}


@pytest.mark.parametrize(("entries", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_its_path(entries: str, message: str, file: Path) -> None:
    with pytest.raises(Ds01Error) as error:
        chosen(file, entries)
    assert error.value.reason == "config_invalid"
    assert message in error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file of MIG layouts is empty"),
        (
            "version: v2\nmig-configs: {x: [{devices: all, mig-enabled: false}]}",
            "version: 'v2' is not allowed here; expected v1",
        ),
        ("version: v1", "expected"),
        ("version: v1\nmig-configs: {}", "mig-configs: "),
        ("version: v1\nmig-configs: {x: []}", "mig-configs.x: "),
        ("version: v1\nmig-configs: {x: [}", "line 2"),
    ],
)
def test_a_file_that_is_none(content: str, message: str, file: Path) -> None:
    file.write_text(content, encoding="utf-8")
    with pytest.raises(Ds01Error, match=message) as error:
        config.load_layouts(file)
    assert error.value.message.startswith(str(file))


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(Ds01Error, match=r"cannot be read \(No such file"):
        config.load_layouts(file)


def test_a_layout_that_cannot_be_made_keeps_no_other_from_it(file: Path) -> None:
    """A file that mig-parted used, with compute instances in one of its layouts."""
    file.write_text(
        """version: v1
mig-configs:
  all-2g: [{devices: all, mig-enabled: true, mig-devices: {2g.20gb: 3}}]
  divided:
  - {devices: [0], mig-enabled: true, mig-devices: {1c.2g.20gb: 2, 2g.20gb: 1}}
  - {devices: [9], mig-enabled: false}
  far: [{device-filter: "0x233010DE", devices: [9], mig-enabled: false}]
"""
    )
    found = config.load_layouts(file)
    assert layouts.select(found, "all-2g", HOST[:1]) == {0: Cut(True, ("2g.20gb",) * 3)}
    with pytest.raises(Ds01Error, match="one compute instance over the whole"):
        layouts.select({"divided": found["divided"][:1]}, "divided", HOST)
    divided = ("mig-configs.divided.0.mig-devices.1c.2g.20gb", f"{layouts._DIVIDED}.")
    assert layouts.findings(found) == [divided]
    assert layouts.findings(found, [0, 1]) == [
        divided,
        ("mig-configs.divided.1.devices", "there is no GPU 9 here; there are: 0, 1."),
    ]


def test_a_layout_that_is_not_there(file: Path) -> None:
    with pytest.raises(Ds01Error, match=r"There is no layout 'y'. There are: x."):
        layouts.select(layout(file, f"devices: all, {ON}"), "y", HOST)


def test_the_file_of_this_repository() -> None:
    """Its layouts can all be made, of the models that they are for."""
    found = config.load_layouts(ROOT / "config" / "mig-layouts.yaml")
    host = (a100(0), a100(1), a100(2), a100(3), a30(4))
    for name in found:
        for index, wanted in layouts.select(found, name, host).items():
            table = host[index].table
            assert set(wanted.profiles) <= set(table.by_name), name
    assert {str(c) for c in layouts.select(found, "all-smallest", host).values()} == {"7 x 1g.10gb", "4 x 1g.6gb"}


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        (["3g.40gb", "2g.20gb"], Cut(True, ("3g.40gb", "2g.20gb"))),
        (["2g.20gb", "2g.20gb"], Cut(True, ("2g.20gb", "2g.20gb"))),
        ([], Cut(True)),
        (["full"], Cut(False)),
    ],
    ids=str,
)
def test_a_gpu_by_its_profiles(profiles: list[str], expected: Cut) -> None:
    assert layouts.cut_of(profiles) == expected


@pytest.mark.parametrize("profiles", [["3g.40gb", "2g20gb"], ["full", "2g.20gb"]], ids=str)
def test_what_is_no_profile(profiles: list[str]) -> None:
    with pytest.raises(Ds01Error, match="this is not a MIG profile") as error:
        layouts.cut_of(profiles)
    assert error.value.reason == "invalid_input"


def test_as_many_as_fit() -> None:
    assert str(layouts.filled(a100(0), "2g.20gb")) == "3 x 2g.20gb"
    assert str(layouts.filled(a30(0), "2g.20gb")) == "2g.20gb", "the planner says that there is none"


# --- and back


EXPORTED = """version: v1
mig-configs:
  current:
  - devices: [0, 1]
    mig-enabled: true
    mig-devices:
      "1g.10gb+me": 1
      "2g.20gb": 2
  - devices: [2]
    mig-enabled: true
    mig-devices: {}
  - devices: [3]
    mig-enabled: false
    mig-devices: {}
"""


def test_what_is_there_is_written_and_read_again(file: Path) -> None:
    gpus = (a100(0, "2g.20gb@0 2g.20gb@4 1g.10gb+me@2"), a100(1, "1g.10gb+me@6 2g.20gb@0 2g.20gb@2"), a30(2), no_mig(3))
    written = layouts.text(layouts.exported(gpus))
    assert written == EXPORTED
    file.write_text(written, encoding="utf-8")
    again = layouts.select(config.load_layouts(file), "current", gpus)
    assert {i: sorted(c.profiles) for i, c in again.items()} == {
        0: sorted(cut("1g.10gb+me 2g.20gb 2g.20gb").profiles),
        1: sorted(cut("1g.10gb+me 2g.20gb 2g.20gb").profiles),
        2: [],
        3: [],
    }


def test_what_is_left_out_is_told() -> None:
    """A leftover, an instance that is divided, and a GPU that tells nothing; a whole instance is in the document."""
    state = a100(0, "2g.20gb@0 1g.10gb@2? 3g.40gb@4")
    divided = replace(state.instances[2], devices=("MIG-1", "MIG-2"), whole=False)
    gpus = (replace(state, instances=(*state.instances[:2], divided)), replace(a100(1, ""), health="lost"), no_mig(2))
    assert layouts.exported(gpus[:1])["mig-configs"]["current"][0]["mig-devices"] == {"2g.20gb": 1}
    assert layouts.left_out(gpus) == [
        "GPU 1 is lost: how it is cut cannot be seen, and it is left out.",
        "1g.10gb at 2 of GPU 0 has no compute instance: it is left out.",
        "3g.40gb at 4-7 of GPU 0 is divided into smaller compute instances: it is left out.",
    ]
    assert layouts.left_out([a100(0, "2g.20gb@0")]) == []


def test_gpus_that_are_all_alike_are_all() -> None:
    document = layouts.exported((a100(0, "2g.20gb@0"), a100(1, "2g.20gb@4 3g.40gb@0?")), "my layout")
    assert document["mig-configs"]["my layout"] == [
        {"devices": "all", "mig-enabled": True, "mig-devices": {"2g.20gb": 1}}
    ]
    assert '  "my layout":\n  - devices: all\n' in layouts.text(document)
