"""The projected device: one CDI spec file a container, written from the ledger. An adapter.

Docker resolves `ds01.io/gpu=<container>` at every start, so this file *is* the grant. Its content
is copied by UUID out of the spec that `nvidia-ctk cdi generate` wrote; nothing is invented here.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .errors import Ds01Error
from .libraries import require

KIND = "ds01.io/gpu"
NVIDIA_KIND = "nvidia.com/gpu"
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_GPU_NODE = re.compile(r"/dev/nvidia\d+")
_CAPABILITIES = "/dev/nvidia-caps/nvidia-cap"
_CDI_VERSION = (0, 6, 0)
"""The first version that knows a spec's annotations."""


class Cdi:
    """The CDI directory that DS01 writes, and those where NVIDIA's spec may lie."""

    def __init__(self, directory: Path, nvidia_directories: Sequence[Path]) -> None:
        self._directory = directory
        self._nvidia_directories = nvidia_directories
        self._read: dict[Path, tuple[object, Mapping[str, Any]]] = {}

    def path(self, container: str) -> Path:
        return self._directory / f"ds01-{container}.json"

    def nvidia_spec(self) -> Mapping[str, Any] | None:
        """NVIDIA's spec of this host, the first that is found; None when there is none."""
        return next((self._spec(file) for file in self.nvidia_files()), None)

    def nvidia_files(self) -> Iterator[Path]:
        """The files of NVIDIA's spec: there may be one of the host's boot and one that is kept."""
        for directory in self._nvidia_directories:
            _check_readable(directory)
            for pattern in ("nvidia*.json", "nvidia*.yaml", "nvidia*.yml"):
                yield from (f for f in sorted(directory.glob(pattern)) if self._spec(f).get("kind") == NVIDIA_KIND)

    def nvidia_targets(self) -> list[Path]:
        """Where NVIDIA's spec is written: where it is now, or else in the first of its directories."""
        return list(self.nvidia_files()) or [self._nvidia_directories[0] / "nvidia.yaml"]

    def _spec(self, file: Path) -> Mapping[str, Any]:
        """One spec file, parsed once as long as it stays the same: a request that waits asks again and again."""
        found = file.stat() if file.exists() else None
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size) if found else None
        known = self._read.get(file)
        if known is None or known[0] != stamp:
            known = self._read[file] = stamp, _read_spec(file)
        return known[1]

    def problem(self, uuids: Iterable[str], spec: Mapping[str, Any] | None) -> str | None:
        """Why NVIDIA's spec cannot carry these devices, in a sentence; None when it can."""
        if spec is None:
            places = " or ".join(str(directory) for directory in self._nvidia_directories)
            return f"NVIDIA's CDI spec was not found in {places}."
        known = {device.get("name"): device for device in spec.get("devices") or []}
        missing = [uuid for uuid in uuids if uuid not in known]
        if missing:
            return f"NVIDIA's CDI spec does not hold {', '.join(missing)}."
        bare = [uuid for uuid in uuids if uuid.startswith("MIG-") and not _is_reachable(known[uuid])]
        return f"NVIDIA's CDI spec lacks the device nodes of {', '.join(bare)}." if bare else None

    def rewrite(self) -> Rewrite:
        """Begin to change several containers' devices together."""
        return Rewrite(self)

    def clear(self) -> None:
        """Remove what a killed `Rewrite` left behind. Under the ledger's lock; raises OSError."""
        for leftover in self._directory.glob(".ds01-*"):
            leftover.unlink(missing_ok=True)

    @property
    def directory(self) -> Path:
        return self._directory

    def containers(self) -> list[str]:
        """Those that have a device now. Raises OSError."""
        return [file.name[len("ds01-") : -len(".json")] for file in self._directory.glob("ds01-*.json")]

    def projected(self, container: str) -> tuple[str, ...] | None:
        """The UUIDs that the container's next start would get, or None when it would fail."""
        try:
            spec = json.loads(self.path(container).read_bytes())
            return tuple(spec["annotations"]["ds01.io/uuids"].split(","))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def says(self, container: str, uuids: Iterable[str], spec: Mapping[str, Any]) -> bool:
        """Whether the container's device is just what these make it: whoever edits one, or installs another driver,
        leaves the UUIDs as they are."""
        try:
            return self.path(container).read_bytes() == _content(container, uuids, spec)
        except OSError:
            return False


class Rewrite:
    """Several containers' devices, changed together: all that can fail comes before the ledger's own write.

    What is new is prepared beside its place, what is taken away steps out of sight; `finish` and `undo`
    only rename and remove, which needs no space. Under the ledger's lock.
    """

    def __init__(self, cdi: Cdi) -> None:
        self._cdi = cdi
        self._prepared: dict[Path, Path] = {}
        self._hidden: dict[Path, Path] = {}

    def project(self, container: str, uuids: Iterable[str], spec: Mapping[str, Any]) -> None:
        """Prepare the container's device; nothing where the file already says just that.

        `spec` holds every UUID (see `Cdi.problem`). Raises OSError.
        """
        content = _content(container, uuids, spec)
        target = self._cdi.path(container)
        if self._cdi.says(container, uuids, spec):
            return
        files.make_directory(self._cdi.directory, 0o755)
        self._prepared[target] = files.prepare(target, content, 0o644)

    def withdraw(self, container: str) -> None:
        """Take the container's device away: from now on its start fails. Raises OSError."""
        target = self._cdi.path(container)
        hidden = target.with_name(f".{target.name}.old")
        with contextlib.suppress(FileNotFoundError):
            target.replace(hidden)
            self._hidden[target] = hidden

    def finish(self) -> None:
        """Put what is new in its place, and drop what was taken away. Raises OSError."""
        for target, prepared in self._prepared.items():
            prepared.replace(target)
        for hidden in self._hidden.values():
            hidden.unlink(missing_ok=True)

    def undo(self) -> None:
        """As it was before. Raises OSError."""
        for prepared in self._prepared.values():
            prepared.unlink(missing_ok=True)
        for target, hidden in self._hidden.items():
            hidden.replace(target)


def _content(container: str, uuids: Iterable[str], spec: Mapping[str, Any]) -> bytes:
    return json.dumps(_container_spec(container, uuids, spec)).encode() + b"\n"


def _is_reachable(mig_device: Mapping[str, Any]) -> bool:
    """Whether a MIG device has the nodes of its GPU, of its GPU instance and of its compute instance.

    A spec that was made before the nodes were leaves them out without a word (k8s-dra-driver-gpu, issue 787).
    """
    nodes = (mig_device.get("containerEdits") or {}).get("deviceNodes") or ()
    paths = [str(node.get("path")) for node in nodes]
    gpus = [path for path in paths if _GPU_NODE.fullmatch(path)]
    return len(gpus) == 1 and sum(path.startswith(_CAPABILITIES) for path in paths) >= 2


def _check_readable(directory: Path) -> None:
    """A directory that may not be read is no empty one. Raises Ds01Error `permission_denied`."""
    try:
        if directory.exists():
            next(directory.iterdir(), None)
    except OSError as exc:
        raise Ds01Error(
            "permission_denied", f"The CDI directory {directory} cannot be read: {exc.strerror}.", "Run as root."
        ) from None


def _read_spec(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        spec = json.loads(text) if file.suffix == ".json" else _parse_yaml(text)
    except (OSError, ValueError) as exc:
        raise Ds01Error(
            "driver_unavailable",
            f"NVIDIA's CDI spec {file} cannot be read: {exc}.",
            f"Write it anew with: nvidia-ctk cdi generate --output={file}",
        ) from None
    if not isinstance(spec, dict):
        return {}
    return {**spec, "devices": [d for d in spec.get("devices") or [] if isinstance(d, dict)]}


def _parse_yaml(text: str) -> Any:
    yaml = require("yaml", "PyYAML")
    try:
        # Large on a server with many slices: libyaml, in C, where it is there.
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as exc:
        raise ValueError(str(exc)) from None


def _container_spec(container: str, uuids: Iterable[str], spec: Mapping[str, Any]) -> dict[str, Any]:
    uuids = list(uuids)
    by_name = {device.get("name"): device for device in spec["devices"]}
    edits = _merged([by_name[uuid].get("containerEdits") or {} for uuid in uuids])
    return {
        "cdiVersion": _version(spec.get("cdiVersion")),
        "kind": KIND,
        "annotations": {"ds01.io/uuids": ",".join(uuids)},
        "devices": [{"name": container, "containerEdits": edits}],
        "containerEdits": spec.get("containerEdits") or {},
    }


def _version(theirs: str | None) -> str:
    """NVIDIA's spec version, raised to the one that this file needs."""
    match = _VERSION.match(str(theirs or ""))
    known = tuple(int(part) for part in match.groups()) if match else _CDI_VERSION
    return ".".join(str(part) for part in max(known, _CDI_VERSION))


def _merged(edits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The union of several devices' edits: two slices of one GPU share its node."""
    merged: dict[str, Any] = {}
    for edit in edits:
        for key, values in edit.items():
            if isinstance(values, list):
                known = merged.setdefault(key, [])
                known.extend(value for value in values if value not in known)
            else:
                merged[key] = values
    return merged
