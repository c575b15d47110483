"""NVIDIA's own tools on this host: device nodes, and the CDI spec of GPUs that were cut anew. An adapter.

`nvidia-smi` has the driver's missing nodes made, `nvidia-ctk` describes what is there then. In this order:
a spec that is made before the nodes leaves them out.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import files, watchdog
from .errors import Ds01Error

_TIMEOUT = 120
"""Seconds. nvidia-smi alone took 5 s on eight GPUs cut into sevenths (gpu-operator, issue 2155)."""
_GRACE = 10
"""Seconds more: a program that is inside of a driver that hangs cannot even be ended."""

_INSTALL = "playbooks/site.yml installs it."


def installed() -> bool:
    """Whether this host has the container toolkit."""
    return shutil.which("nvidia-ctk") is not None


def check(spec_files: Iterable[Path]) -> None:
    """Raises Ds01Error `driver_unavailable` where no spec could be made now, such as while a GPU is lost, or
    `permission_denied` where it could not be written into one of these files."""
    text = _generate("yaml")
    for file in spec_files:
        _write(files.probe, file, text or "")


def refresh(spec_files: Iterable[Path]) -> None:
    """Make the nodes that are missing, and write NVIDIA's CDI spec anew into each of these files.

    Where nvidia-ctk finds no device the files stay as they are. Raises Ds01Error `driver_unavailable` or
    `permission_denied`.
    """
    _run("nvidia-smi", "-L")  # its exit code tells of lost GPUs, which is no matter here
    texts: dict[str, str | None] = {}
    for file in spec_files:
        kind = "json" if file.suffix == ".json" else "yaml"
        if kind not in texts:
            texts[kind] = _generate(kind)
        text = texts[kind]
        if text is not None and not (file.exists() and file.read_text(encoding="utf-8") == text):
            _write(_replace, file, text)


def remove(spec_files: Iterable[Path]) -> None:
    """Take NVIDIA's CDI spec away, of a host that has no device any more: the engine reads none without devices.

    Raises Ds01Error `permission_denied`.
    """
    for file in spec_files:
        _write(_remove, file, "")


def _generate(kind: str) -> str | None:
    """The spec as nvidia-ctk prints it; None where there is no device."""
    argv = ["nvidia-ctk", "cdi", "generate", *(["--format", kind] if kind != "yaml" else [])]
    done = _run(*argv)
    if done.returncode == 0:
        return done.stdout.rstrip("\r\n") + "\n"
    if "no devices" in done.stderr:
        return None
    raise Ds01Error(
        "driver_unavailable",
        f"NVIDIA's CDI spec cannot be written: {_last_line(done.stderr).rstrip('.')}.",
        f"Try: {' '.join(argv)}",
    )


def _write(write: Callable[[Path, bytes], None], file: Path, text: str) -> None:
    try:
        files.make_directory(file.parent, 0o755)
        write(file, text.encode())
    except OSError as exc:
        raise Ds01Error(
            "permission_denied", f"NVIDIA's CDI spec {file} cannot be written: {exc.strerror}.", files.remedy(exc)
        ) from None


def _replace(file: Path, data: bytes) -> None:
    files.replace(file, data, 0o644)


def _remove(file: Path, _data: bytes) -> None:
    file.unlink(missing_ok=True)


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    seconds = _TIMEOUT + _GRACE
    late = watchdog.hangs(f"{' '.join(argv)} did not end within {seconds:g} s: the driver hangs.")
    try:
        with watchdog.bounded(seconds, lambda: late):
            return subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False)
    except FileNotFoundError:
        raise Ds01Error("driver_unavailable", f"There is no {argv[0]} on this host.", _INSTALL) from None
    except subprocess.TimeoutExpired:
        problem = f"{' '.join(argv)} did not answer within {_TIMEOUT} s."
        raise Ds01Error("driver_unavailable", problem, "Its driver may hang: dmesg shows more.") from None
    except OSError as exc:
        raise Ds01Error("driver_unavailable", f"{argv[0]} cannot be run: {exc.strerror}.", _INSTALL) from None


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1] if lines else "it did not say why"
