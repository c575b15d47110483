"""MIG tables of real GPUs (NVIDIA's MIG User Guide and `nvidia-smi mig -lgip/-lgipp`), and GPUs in one line."""

from __future__ import annotations

from datetime import datetime, timedelta

from ds01.mig import Cut, GpuState, Holder, Instance, Placed, Profile, Table
from support import NOW

_SEVEN, _PAIRS, _TWOS, _HALVES = (0, 1, 2, 3, 4, 5, 6), (0, 2, 4, 6), (0, 2, 4), (0, 4)
_QUARTERS, _SIXES = (0, 3, 6, 9), (0, 6)

# name, id, compute slices, memory slices, starts, most
_A100 = [
    ("1g.10gb", 19, 1, 1, _SEVEN, 7),
    ("1g.10gb+me", 20, 1, 1, _SEVEN, 1),
    ("1g.20gb", 15, 1, 2, _PAIRS, 4),
    ("2g.20gb", 14, 2, 2, _TWOS, 3),
    ("3g.40gb", 9, 3, 4, _HALVES, 2),
    ("4g.40gb", 5, 4, 4, (0,), 1),
    ("7g.80gb", 0, 7, 8, (0,), 1),
]
_A30 = [
    ("1g.6gb", 14, 1, 1, (0, 1, 2, 3), 4),
    ("1g.6gb+me", 21, 1, 1, (0, 1, 2, 3), 1),
    ("2g.12gb", 5, 2, 2, (0, 2), 2),
    ("2g.12gb+me", 6, 2, 2, (0, 2), 1),
    ("4g.24gb", 0, 4, 4, (0,), 1),
]
_RTX = [
    ("1g.24gb", 14, 1, 3, _QUARTERS, 4),
    ("1g.24gb+me", 21, 1, 3, _QUARTERS, 1),
    ("1g.24gb+gfx", 47, 1, 3, _QUARTERS, 4),
    ("1g.24gb+me.all", 65, 1, 3, _QUARTERS, 1),
    ("1g.24gb-me", 67, 1, 3, _QUARTERS, 4),
    ("2g.48gb", 5, 2, 6, _SIXES, 2),
    ("2g.48gb+gfx", 35, 2, 6, _SIXES, 2),
    ("2g.48gb+me.all", 64, 2, 6, _SIXES, 1),
    ("2g.48gb-me", 66, 2, 6, _SIXES, 2),
    ("4g.96gb", 0, 4, 12, (0,), 1),
    ("4g.96gb+gfx", 32, 4, 12, (0,), 1),
]
TABLES = {
    name: Table(tuple(Profile(*row) for row in rows))
    for name, rows in (("A100-SXM4-80GB", _A100), ("A30-24GB", _A30), ("RTX-PRO-6000", _RTX))
}
A100 = TABLES["A100-SXM4-80GB"]
"""Of an A100 80GB, and of an H100 80GB: the same names, sizes and placements."""


def held(user: str, hours: float | None = None) -> Holder:
    """A container `p._.<user>`, over in so many hours (None: nobody knows when)."""
    until: datetime | None = NOW + timedelta(hours=hours) if hours is not None else None
    return Holder(f"p._.{user}", user, until)


def instances(text: str, table: Table = A100, **holders: Holder) -> tuple[Instance, ...]:
    """`"2g.20gb@0 1g.10gb@6=alice"`: profiles at their starts, and who holds them. A `?` after the start
    is a GPU instance without its compute instance."""
    found = []
    for number, part in enumerate(text.split()):
        place, _, user = part.partition("=")
        profile, _, start = place.partition("@")
        whole = not start.endswith("?")
        who = (holders.get(user) or held(user),) if user else ()
        uuids = (f"MIG-{number}",) if whole else ()
        size = table.by_name[profile].size if profile in table.by_name else 4
        found.append(Instance(number + 1, profile, int(start.rstrip("?")), size, uuids, whole, who))
    return tuple(found)


def gpu(text: str = "", table: Table = A100, index: int = 0, mig: bool = True, **holders: Holder) -> GpuState:
    return GpuState(index, f"GPU-{index}", "NVIDIA A100", mig, table, instances(text, table, **holders))


def cut(text: str) -> Cut:
    """`"3g.40gb 2g.20gb"`; `off` is a whole GPU."""
    return Cut(False) if text == "off" else Cut(True, tuple(text.split()))


def placed(text: str) -> Placed:
    """`"2g.20gb@2 1g.10gb@6"`; `off` is a whole GPU."""
    pairs = (part.split("@") for part in text.split())
    return Placed(False) if text == "off" else Placed(True, tuple((name, int(start)) for name, start in pairs))
