"""A `systemctl` for tests: units are files in a folder, and a stop spreads as systemd's. Molecule has the real one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """#!{python}
import json, sys
from pathlib import Path

UNITS = Path({units!r})
SPREADS = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
verb, names = sys.argv[1], sys.argv[sys.argv.index("--") + 1 :]


def read(name):
    file = UNITS / name
    missing = {{"ActiveState": "inactive", "LoadState": "not-found"}}
    return {{"LoadState": "loaded", **json.loads(file.read_text())}} if file.exists() else missing


def become(name, state):
    unit = read(name)
    if unit["ActiveState"] != state:
        (UNITS / name).write_text(json.dumps({{**unit, "ActiveState": state}}))
        with UNITS.with_name("systemd.log").open("a") as log:
            print("started" if state == "active" else "stopped", name, file=log)


def stop(name, seen):
    if name not in seen:
        seen.add(name)
        for kind in SPREADS:
            for other in read(name).get(kind, "").split():
                stop(other, seen)
        become(name, "inactive")


for name in names:
    if verb == "show":
        print(f"Id={{name}}")
        print("".join(f"{{key}}={{value}}\\n" for key, value in read(name).items()))
    elif verb == "stop":
        stop(name, set())
    elif verb == "start":
        if read(name)["LoadState"] != "loaded":
            sys.exit(f"Failed to start {{name}}: Unit is {{read(name)['LoadState']}}.")
        if "fails" in read(name):
            sys.exit(f"Job for {{name}} failed.")
        become(name, "active")
"""


@dataclass(frozen=True)
class Systemd:
    """The units, each in its file, and a log of what was stopped and started."""

    folder: Path

    def unit(self, name: str, state: str = "active", **properties: str) -> None:
        """`RequiredBy="a.service b.service"` as `systemctl show` prints it; with `fails` it does not start."""
        (self.folder / name).write_text(json.dumps({"ActiveState": state, **properties}), encoding="utf-8")

    def remove(self, name: str) -> None:
        """The unit's file is deleted."""
        (self.folder / name).unlink()

    def running(self) -> list[str]:
        files = sorted(self.folder.iterdir())
        return [f.name for f in files if json.loads(f.read_text(encoding="utf-8"))["ActiveState"] == "active"]

    def log(self) -> list[str]:
        """`stopped a.service`, in order."""
        file = self.folder.with_name("systemd.log")
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def install(path: Path, folder: Path) -> Systemd:
    """Write it into a folder of PATH."""
    folder.mkdir()
    program = path / "systemctl"
    program.write_text(_PROGRAM.format(python=sys.executable, units=str(folder)), encoding="utf-8")
    program.chmod(0o755)
    return Systemd(folder)
