"""How DS01 last cut this host's GPUs, for after a reboot, which leaves none of it. An adapter: one JSON file.

Each GPU is noted by its UUID, with the boot in which it was last cut so: until that is this boot, what the
GPU shows is not what it should be, and nobody is given a part of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import files
from .errors import Ds01Error

if TYPE_CHECKING:
    from .mig import GpuState, Placed

_T = TypeVar("_T")

_NOT_RESTORED = "it was not cut again since this host started; ds01 restore does that"

_ROOM = 64 * 1024
"""Bytes: more than sixteen GPUs of seven instances take, with their ledger."""


@dataclass(frozen=True)
class SavedGpu:
    """A GPU's layout, and the boot in which it was made."""

    layout: Placed
    boot_id: str


@dataclass(frozen=True)
class SavedLayout:
    """The layouts by GPU UUID. A GPU that DS01 never cut is not among them."""

    gpus: Mapping[str, SavedGpu] = field(default_factory=dict)

    def noted(self, uuid: str, layout: Placed, boot_id: str) -> SavedLayout:
        return replace(self, gpus={**self.gpus, uuid: SavedGpu(layout, boot_id)})

    def without(self, uuids: Collection[str]) -> SavedLayout:
        return replace(self, gpus={uuid: gpu for uuid, gpu in self.gpus.items() if uuid not in uuids})


def layout_of(gpu: GpuState) -> Placed:
    """A GPU's live layout. Instances that are in themselves divided, or lack their compute instance, are
    not DS01's, and left out."""
    from .mig import Placed

    return Placed(gpu.mig, tuple(sorted((i.key for i in gpu.instances if i.whole), key=lambda key: key[1])))


class SavedLayoutStore:
    """The file, replaced as a whole, under the ledger's lock."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> SavedLayout:
        """What was saved; nothing where there is no file. Raises Ds01Error `ledger_unavailable`."""
        return self._read(_from_json)

    def doubtful(self, gpus: Iterable[str], boot_id: str) -> dict[str, str]:
        """Of these GPUs, by UUID, those that may not be cut as they should be, and why: what was not cut again
        in this boot; all of them where the file cannot be read."""
        try:
            waiting = self._read(lambda document: _waiting(document, boot_id))
        except Ds01Error as exc:
            return dict.fromkeys(gpus, exc.message.rstrip("."))
        return {uuid: _NOT_RESTORED for uuid in gpus if uuid in waiting}

    def _read(self, parse: Callable[[Mapping[str, Any]], _T]) -> _T:
        try:
            return parse(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return parse({"gpus": {}})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise Ds01Error(
                "ledger_unavailable",
                f"The saved MIG layout {self._path} cannot be read: {exc}.",
                "Run as root. If the file is damaged, remove it and apply the layout again: ds01 mig apply --help",
            ) from None

    def write(self, saved: SavedLayout) -> None:
        """Replace the file durably. Raises Ds01Error `ledger_unavailable`."""
        if saved == self.read():
            return
        with self._writing():
            files.make_directory(self._path.parent, 0o750)
            files.replace(self._path, _to_json(saved), 0o640, durable=True)

    def check(self) -> None:
        """Raises Ds01Error as `write` would if it wrote so many GPUs now, and some more."""
        with self._writing():
            files.make_directory(self._path.parent, 0o750)
            files.probe(self._path, _to_json(self.read()).ljust(_ROOM))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise Ds01Error(
                "ledger_unavailable",
                f"The saved MIG layout {self._path} could not be written: {exc.strerror}.",
                f"{files.remedy(exc)} Then apply the layout again.",
            ) from None


def _to_json(saved: SavedLayout) -> bytes:
    lines = []
    for uuid, gpu in saved.gpus.items():
        record = {"boot_id": gpu.boot_id, "mig": gpu.layout.enabled, "instances": gpu.layout.instances}
        lines.append(f"  {json.dumps(uuid)}: {json.dumps(record)}")
    return ('{"version": 1,\n "gpus": {\n' + ",\n".join(lines) + "\n }}\n").encode()


def _waiting(document: Mapping[str, Any], boot_id: str) -> frozenset[str]:
    return frozenset(uuid for uuid, gpu in document["gpus"].items() if gpu["boot_id"] != boot_id)


def _from_json(document: Mapping[str, Any]) -> SavedLayout:
    from .mig import Placed  # a run that changes no layout does without

    gpus = {}
    for uuid, gpu in document["gpus"].items():
        instances = tuple((str(profile), int(start)) for profile, start in gpu["instances"])
        gpus[uuid] = SavedGpu(Placed(bool(gpu["mig"]), instances), gpu["boot_id"])
    return SavedLayout(gpus)
