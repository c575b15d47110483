"""The simulated machine's state file: lines of a kind and its `key=value` pairs, as the library reads them."""

import contextlib
import fcntl
import itertools
import os
from pathlib import Path

DEFAULT = "/var/lib/nvml-sim/state"


class UsageError(Exception):
    """What the caller asked for cannot be done; the message says why, in one sentence."""


def default_path():
    return Path(os.environ.get("NVML_SIM_STATE") or DEFAULT)


class State:
    """Records by kind, each a dict of texts; a key that is absent is 0 for the library."""

    KINDS = ("driver", "gpu", "gi", "ci", "process", "xid")

    def __init__(self):
        self.records = {kind: [] for kind in self.KINDS}

    @classmethod
    def read(cls, path):
        state = cls()
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise UsageError(f"No state in {path}: {error.strerror}.") from None
        for line in text.splitlines():
            kind, *pairs = line.split()
            if kind not in cls.KINDS or not all("=" in pair for pair in pairs):
                raise UsageError(f"{path} is not a state file: {line!r}.")
            state.records[kind].append(dict(pair.split("=", 1) for pair in pairs))
        return state

    def write(self, path):
        """Replace the file as a whole: a reader sees the old one or the new one."""
        path = Path(path)
        new = path.with_name(path.name + ".new")
        lines = (
            " ".join([kind, *(f"{key}={value}" for key, value in record.items())])
            for kind in self.KINDS
            for record in self.records[kind]
        )
        new.write_text("\n".join(lines) + "\n")
        new.chmod(0o644)
        new.replace(path)

    @property
    def driver(self):
        return self.records["driver"][0]

    @property
    def gpus(self):
        return self.records["gpu"]

    def gpu(self, index):
        if not index.isdigit() or int(index) >= len(self.gpus):
            raise UsageError(f"There is no GPU {index}; this machine has {len(self.gpus)}.")
        return self.gpus[int(index)]

    def of(self, kind, gpu):
        return [record for record in self.records[kind] if record["gpu"] == gpu["minor"]]

    def mig(self, gpu, index):
        """The compute instance with this MIG index: they are in the file in order, and move up past a gap."""
        gaps = int(gpu.get("holes", "0"))
        places = (str(place) for place in itertools.count() if not gaps >> place & 1)
        devices = dict(zip(places, self.of("ci", gpu), strict=False))
        if index not in devices:
            known = ", ".join(devices) or "none"
            raise UsageError(f"GPU {self.gpus.index(gpu)} has no MIG device {index}; it has {known}.")
        return devices[index]


@contextlib.contextmanager
def lock(path):
    """Keep every other process from changing the state, the library's callers included."""
    with Path(f"{path}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def edit(path):
    if not Path(path).exists():
        raise UsageError(f"No state in {path}: run `nvml-sim init {path}` first.")
    with lock(path):
        state = State.read(path)
        yield state
        state.write(path)
