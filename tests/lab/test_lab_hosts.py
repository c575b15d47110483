"""What a lab host is made of, and when it counts as the same."""

import pytest
from ds01_lab import options, payload
from ds01_lab.errors import LabError
from ds01_lab.host import DEFAULT_GPUS, Hardware
from ds01_lab.image import inputs_hash


def test_systemd_is_told_to_put_up_with_cgroup_v1_and_with_v2_nothing():
    assert any("SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1" in word for word in options.environment("1"))
    assert options.environment("2") == ["container=docker"]


def test_a_host_is_not_privileged_and_listens_on_loopback_only():
    machine = options.machine("image:tag", "2")
    body = options.host(machine, "lab", "lab-1", 22200, "1xA30-24GB", ["0=1g.6gb", "1=1g.6gb"], "abc")
    config = body["HostConfig"]
    assert "Privileged" not in config
    assert not {"ALL", "SYS_RESOURCE", "SYS_MODULE", "SYS_RAWIO"} & set(config["CapAdd"])
    assert config["PortBindings"] == {"22/tcp": [{"HostIp": "127.0.0.1", "HostPort": "22200"}]}
    assert body["Labels"][options.LABEL] == "lab"
    assert body["Labels"][options.LABEL_MIG].split() == ["0=1g.6gb", "1=1g.6gb"]
    assert "PortBindings" not in machine["HostConfig"], "the part that all hosts share stays as it was"


def test_the_hash_follows_every_input_and_nothing_else():
    assert inputs_hash("a", ("b",), b"c") == inputs_hash("a", ("b",), b"c")
    assert len({inputs_hash("a", "b"), inputs_hash("ab"), inputs_hash("b", "a"), inputs_hash("a", b"b")}) == 4


@pytest.mark.parametrize(
    ("gpus", "mig", "asked"),
    [
        (None, None, None),
        ("2xH200-141GB", None, Hardware("2xH200-141GB", ())),
        (None, ["0=2g.20gb"], Hardware(DEFAULT_GPUS, ("0=2g.20gb",))),
    ],
)
def test_hardware_that_nobody_asked_for_is_left_as_it_is(gpus, mig, asked):
    assert Hardware.asked(gpus, mig) == asked


def test_the_driver_goes_where_the_real_one_is(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("libnvidia-ml.so.1", "bin/nvidia-smi", "nvml-sim-nodes.service"):
        (tmp_path / name).touch()
    assert {(target, mode) for _, target, mode in payload.driver_files(tmp_path)} == {
        ("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", 0o644),
        ("usr/bin/nvidia-smi", 0o755),
        ("etc/systemd/system/nvml-sim-nodes.service", 0o644),
    }


def test_a_missing_driver_says_what_to_run(tmp_path):
    with pytest.raises(LabError) as refused:
        list(payload.driver_files(tmp_path))
    assert refused.value.next_step == "run: make sim"
