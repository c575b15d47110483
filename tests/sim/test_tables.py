"""The models' figures, against those NVIDIA publishes or real GPUs printed."""

import pynvml
import pytest

from .calls import instances, placements, profiles

SEVENS, PAIRS, TWOS, HALVES = "0 1 2 3 4 5 6", "0 2 4 6", "0 2 4", "0 4"

# model: name, id, most, multiprocessors, MiB, starts, size
FIGURES = {
    "A100-SXM4-40GB": [
        ("1g.5gb", 19, 7, 14, 4864, SEVENS, 1),
        ("1g.5gb+me", 20, 1, 14, 4864, SEVENS, 1),
        ("1g.10gb", 15, 4, 14, 9856, PAIRS, 2),
        ("2g.10gb", 14, 3, 28, 9856, TWOS, 2),
        ("3g.20gb", 9, 2, 42, 19968, HALVES, 4),
        ("4g.20gb", 5, 1, 56, 19968, "0", 4),
        ("7g.40gb", 0, 1, 98, 40192, "0", 8),
    ],
    "A100-SXM4-80GB": [
        ("1g.10gb", 19, 7, 14, 9856, SEVENS, 1),
        ("1g.10gb+me", 20, 1, 14, 9856, SEVENS, 1),
        ("1g.20gb", 15, 4, 14, 19968, PAIRS, 2),
        ("2g.20gb", 14, 3, 28, 19968, TWOS, 2),
        ("3g.40gb", 9, 2, 42, 40192, HALVES, 4),
        ("4g.40gb", 5, 1, 56, 40192, "0", 4),
        ("7g.80gb", 0, 1, 98, 80384, "0", 8),
    ],
    "A30-24GB": [
        ("1g.6gb", 14, 4, 14, 5.81, "0 1 2 3", 1),
        ("1g.6gb+me", 21, 1, 14, 5.81, "0 1 2 3", 1),
        ("2g.12gb", 5, 2, 28, 11.69, "0 2", 2),
        ("2g.12gb+me", 6, 1, 28, 11.69, "0 2", 2),
        ("4g.24gb", 0, 1, 56, 23.44, "0", 4),
    ],
    "H100-SXM5-80GB": [
        ("1g.10gb", 19, 7, 16, 9.75, SEVENS, 1),
        ("1g.10gb+me", 20, 1, 16, 9.75, SEVENS, 1),
        ("1g.20gb", 15, 4, 26, 19.62, PAIRS, 2),
        ("2g.20gb", 14, 3, 32, 19.62, TWOS, 2),
        ("3g.40gb", 9, 2, 60, 39.50, HALVES, 4),
        ("4g.40gb", 5, 1, 64, 39.50, "0", 4),
        ("7g.80gb", 0, 1, 132, 79.25, "0", 8),
    ],
    "H200-141GB": [
        ("1g.18gb", 19, 7, 16, 16384, SEVENS, 1),
        ("1g.18gb+me", 20, 1, 16, 16384, SEVENS, 1),
        ("1g.35gb", 15, 4, 26, 33280, PAIRS, 2),
        ("2g.35gb", 14, 3, 32, 33280, TWOS, 2),
        ("3g.71gb", 9, 2, 60, None, HALVES, 4),
        ("4g.71gb", 5, 1, 64, None, "0", 4),
        ("7g.141gb", 0, 1, 132, 140.00, "0", 8),
    ],
    "RTX-PRO-6000": [
        *((f"1g.24gb{kind}", i, most, 46, 23.62, "0 3 6 9", 3) for kind, i, most in
          (("", 14, 4), ("+me", 21, 1), ("+gfx", 47, 4), ("+me.all", 65, 1), ("-me", 67, 4))),
        *((f"2g.48gb{kind}", i, most, 94, 47.38, "0 6", 6) for kind, i, most in
          (("", 5, 2), ("+gfx", 35, 2), ("+me.all", 64, 1), ("-me", 66, 2))),
        *((f"4g.96gb{kind}", i, 1, 188, 95.12, "0", 12) for kind, i in (("", 0), ("+gfx", 32))),
    ],
}  # fmt: skip


def same_memory(mib, figure):
    """Figures are in MiB, or in GiB with the two decimals that nvidia-smi prints."""
    return figure is None or (mib == figure if isinstance(figure, int) else abs(mib / 1024 - figure) < 0.0051)


@pytest.mark.parametrize("model", FIGURES)
def test_profiles_are_those_of_the_model(machine, model):
    gpu = machine("--gpus", model, "--mig", "0=").gpu()
    found = profiles(gpu)
    assert set(found) == {name for name, *_ in FIGURES[model]}
    for name, number, most, multiprocessors, memory, starts, size in FIGURES[model]:
        info = found[name]
        assert (info.id, info.instanceCount, info.multiprocessorCount) == (number, most, multiprocessors), name
        assert same_memory(info.memorySizeMB, memory), name
        assert placements(gpu, number) == [(int(start), size) for start in starts.split()], name
        assert f"{info.sliceCount}g" == name.partition(".")[0]
        assert pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, number) == most, name


def test_the_number_asked_with_is_not_the_id(machine):
    started = machine("--gpus", "1xA100-SXM4-40GB,1xA30-24GB")
    assert [pynvml.nvmlDeviceGetGpuInstanceProfileInfo(started.gpu(i), 0, version=1).id for i in (0, 1)] == [19, 14]


def fillings(options, taken=frozenset(), chosen=()):
    """Every set of placements that leaves room for no other one, as the slices it gives."""
    free = [option for option in options if not taken & option[1]]
    if not free:
        yield "".join(sorted(slices for slices, _ in chosen))
    for option in free:
        if not chosen or min(option[1]) > min(chosen[-1][1]):  # each set once: from left to right
            yield from fillings(options, taken | option[1], (*chosen, option))


def test_an_a100_can_be_filled_in_the_fourteen_known_ways(machine):
    gpu = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=").gpu()
    plain = {name: info.id for name, info in profiles(gpu).items() if name not in ("1g.10gb+me", "1g.20gb")}
    options = [
        (name[0], frozenset(range(start, start + size)))
        for name, number in plain.items()
        for start, size in placements(gpu, number)
    ]
    known = "1111111 111112 11113 11122 1113 1114 1123 1222 123 124 223 33 34 7"
    assert set(fillings(options)) == set(known.split())


@pytest.mark.parametrize(
    ("model", "name", "ids"),
    [
        ("A100-SXM4-80GB", "1g.10gb", range(7, 14)),
        ("A100-SXM4-80GB", "1g.20gb", range(3, 7)),
        ("A100-SXM4-80GB", "2g.20gb", range(3, 6)),
        ("A100-SXM4-80GB", "3g.40gb", range(1, 3)),
        ("A100-SXM4-80GB", "7g.80gb", range(1)),
        ("A30-24GB", "1g.6gb", range(3, 7)),
        ("A30-24GB", "2g.12gb", range(1, 3)),
        ("A30-24GB", "4g.24gb", range(1)),
        ("RTX-PRO-6000", "1g.24gb", range(3, 7)),
        ("H100-SXM5-80GB", "2g.20gb", range(3, 6)),
    ],
)
def test_instance_ids_are_from_the_sizes_range(machine, model, name, ids):
    started = machine("--gpus", model, "--mig", f"0={','.join([name] * len(ids))}")
    assert [number for _, number, _ in instances(started.gpu())] == list(ids)


def test_a_placement_cannot_be_told_from_an_id(machine):
    started = machine("--gpus", "A100-SXM4-80GB", "--mig", "0=3g.40gb,3g.40gb")
    assert instances(started.gpu()) == [("3g.40gb", 1, 4), ("3g.40gb", 2, 0)]


def test_a_gpu_without_mig_says_so(machine):
    gpu = machine("--gpus", "L40S-48GB").gpu()
    for refuse in (
        lambda: pynvml.nvmlDeviceGetMigMode(gpu),
        lambda: pynvml.nvmlDeviceSetMigMode(gpu, 1),
        lambda: pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 0),
        lambda: pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, 19),
        lambda: pynvml.nvmlDeviceCreateGpuInstance(gpu, 19),
        lambda: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0),
        lambda: pynvml.nvmlDeviceGetGpuInstanceId(gpu),
    ):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            refuse()
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu) == 0
