"""Mounts that something the lab ran has left behind."""

from pathlib import Path

from .shell import as_root, run


def release(*roots: Path) -> None:
    """Unmount all that is mounted below the directories."""
    table = Path("/proc/mounts").read_text()
    for point in below(table, *roots):
        run(as_root(["umount", "--lazy", point]))


def below(table: str, *roots: Path) -> list[str]:
    """The mount points below the directories, the deepest first; `table` is what /proc/mounts says."""
    points = [line.split()[1] for line in table.splitlines()]
    return sorted((p for p in points if any(p.startswith(f"{root}/") for root in roots)), reverse=True)
